"""Downloads with a progress bar, resume and checksum."""

import hashlib
import http.client
import os
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm


def download(url: str, path: str | Path, md5: str, timeout: float = 30.0) -> Path:
    """The file at `path`, fetched from `url` if absent; an interrupted download continues where it stopped.

    Raises ConnectionError if there is no network or the connection breaks, ValueError for a wrong checksum; both name
    the file and the remedy.
    """
    path = Path(path)
    if path.is_file():
        check_md5(path, md5)
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    have = partial.stat().st_size if partial.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            resumed = response.status == 206
            total = int(response.headers.get("Content-Length", 0)) + (have if resumed else 0)
            bar = tqdm(total=total, initial=have if resumed else 0, unit="B", unit_scale=True, desc=path.name)
            with open(partial, "ab" if resumed else "wb") as file, bar:
                while block := response.read(1 << 20):
                    file.write(block)
                    bar.update(len(block))
        if partial.stat().st_size < total:  # urllib takes a dropped connection for the end of the file
            raise ConnectionError(f"the connection broke at {partial.stat().st_size} of {total} bytes")
    except urllib.error.HTTPError as error:
        if error.code != 416:  # 416: the partial file is already whole
            raise ConnectionError(f"{url} answered {error.code}; download it by hand to {path}") from error
    except (urllib.error.URLError, TimeoutError) as error:
        raise ConnectionError(
            f"no connection to {url} ({error}); download it on another machine and pass path=<file> (md5 {md5})"
        ) from error
    except (ConnectionError, http.client.HTTPException) as error:
        raise ConnectionError(f"{url}: {error}; run the same command to continue") from error
    check_md5(partial, md5)
    os.replace(partial, path)
    return path


def check_md5(path: Path, md5: str) -> None:
    """Raises ValueError, naming the file and the remedy, if the checksum differs."""
    with open(path, "rb") as file:
        actual = hashlib.file_digest(file, "md5").hexdigest()
    if actual != md5:
        raise ValueError(f"{path} has md5 {actual}, expected {md5}; delete it and download it again")
