"""Lists of image addresses with captions (LAION-style parquet): fetched politely, checked, and packed."""

import http.client
import io
import ipaddress
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from ldm_train.data.prepare.build import digest
from ldm_train.data.prepare.image_folder import encoded_png, reduced
from ldm_train.data.shards import DataError

AGENT = "ldm-train/0.1 (image download for model training)"
OPT_OUT = {"noai", "noimageai", "noindex", "noimageindex"}
PERMANENT = {400, 401, 403, 404, 405, 406, 410, 414, 451}  # asking again does not help


class Unfetchable(ValueError):
    """An address that was not fetched; the message says why. final: trying again is of no use."""

    def __init__(self, message: str, final: bool = False):
        super().__init__(message)
        self.final = final


def public_address(host: str, port: int, allow_private: bool = False) -> str:
    """The address to connect to. Raises Unfetchable where the host is unknown, or any of its addresses is not public.

    The address itself is returned, and connected to, so that a name cannot mean something else a moment later.
    """
    try:
        found = [entry[4][0] for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    except OSError as error:
        raise Unfetchable(f"{host}: {error}") from error
    for address in found:
        ip = ipaddress.ip_address(address.split("%")[0])
        mapped = getattr(ip, "ipv4_mapped", None) or ip
        if not allow_private and (not mapped.is_global or mapped.is_multicast):
            raise Unfetchable(f"{host} is {address}, a private address; allow it with source.allow_private=true", True)
    return found[0]


def _handlers(allow_private: bool) -> list[urllib.request.BaseHandler]:
    class Plain(http.client.HTTPConnection):
        def connect(self) -> None:
            address = public_address(self.host, self.port, allow_private)
            self.sock = socket.create_connection((address, self.port), self.timeout)

    class Secure(http.client.HTTPSConnection):
        def connect(self) -> None:
            address = public_address(self.host, self.port, allow_private)
            plain = socket.create_connection((address, self.port), self.timeout)
            self.sock = self._context.wrap_socket(plain, server_hostname=self.host)

    class HTTP(urllib.request.HTTPHandler):
        def http_open(self, request: urllib.request.Request) -> Any:
            return self.do_open(Plain, request)

    class HTTPS(urllib.request.HTTPSHandler):
        def https_open(self, request: urllib.request.Request) -> Any:
            return self.do_open(Secure, request, context=self._context)

    class Redirects(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, request: Any, file: Any, code: int, message: str, headers: Any, url: str) -> Any:
            check_scheme(url)
            return super().redirect_request(request, file, code, message, headers, url)

    # Proxies of the environment would hide the address that is connected to.
    return [urllib.request.ProxyHandler({}), HTTP(), HTTPS(), Redirects()]


def check_scheme(url: str) -> None:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise Unfetchable(f"{url}: {error}", True) from error
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise Unfetchable(f"{url}: only http and https addresses are fetched", True)


def fetch(
    url: str, timeout: float = 10.0, retries: int = 2, max_bytes: int = 50_000_000, allow_private: bool = False
) -> bytes:
    """The bytes at an address.

    timeout: seconds without an answer, and six times that for the whole. max_bytes: larger files are refused.
    Raises Unfetchable, after `retries` more attempts where these may help; pages that opt out of use for machine
    learning (X-Robots-Tag: noai, noindex, ...) are not fetched.
    """
    check_scheme(url)
    opener = urllib.request.build_opener(*_handlers(allow_private))
    request = urllib.request.Request(url, headers={"User-Agent": AGENT, "Accept": "image/*,*/*;q=0.5"})
    for attempt in range(retries + 1):
        try:
            return _read(opener, request, timeout, max_bytes)
        except Unfetchable as error:
            if error.final or attempt == retries:
                raise
        time.sleep(0.5 * 2**attempt)
    raise AssertionError("unreachable")


def _read(opener: Any, request: urllib.request.Request, timeout: float, max_bytes: int) -> bytes:
    end = time.monotonic() + 6 * timeout
    try:
        with opener.open(request, timeout=timeout) as response:
            tags = {t.strip().lower() for line in response.headers.get_all("X-Robots-Tag", []) for t in line.split(",")}
            if tags & OPT_OUT:
                raise Unfetchable(f"its owner opts out ({', '.join(sorted(tags & OPT_OUT))})", True)
            length = response.headers.get("Content-Length", "")
            if length.isdigit() and int(length) > max_bytes:
                raise Unfetchable(f"{length} bytes, more than max_bytes={max_bytes}", True)
            blocks, size = [], 0
            while block := response.read1(1 << 16):
                blocks.append(block)
                size += len(block)
                if size > max_bytes:
                    raise Unfetchable(f"more than max_bytes={max_bytes}", True)
                if time.monotonic() > end:
                    raise Unfetchable(f"not finished after {6 * timeout:.0f} s")
            if length.isdigit() and size < int(length):
                raise Unfetchable(f"the connection broke at {size} of {length} bytes")
            return b"".join(blocks)
    except urllib.error.HTTPError as error:
        raise Unfetchable(f"answered {error.code}", error.code in PERMANENT) from error
    except urllib.error.URLError as error:
        if isinstance(error.reason, Unfetchable):
            raise error.reason from error
        raise Unfetchable(f"no connection: {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:
        raise Unfetchable(f"{type(error).__name__}: {error}") from error


class URLList:
    """path: a parquet file, or a folder of them, with a column of addresses and one of captions.

    url_column, caption_column (null: none). width_column, height_column: where the table has them, pictures below
    min_size are not even fetched. max_size: reduce the short side. Every k-th row validates, k = 1 / val_fraction.
    threads: connections at a time per process. timeout, retries, max_bytes, allow_private: see `fetch`.
    What could not be fetched is left out and listed with the reason in skipped.txt; finished shards are never fetched
    again.
    """

    classes: list[str] | None = None

    def __init__(
        self,
        path: str,
        url_column: str = "URL",
        caption_column: str | None = "TEXT",
        width_column: str | None = "WIDTH",
        height_column: str | None = "HEIGHT",
        min_size: int = 0,
        max_size: int | None = 512,
        val_fraction: float = 0.01,
        threads: int = 32,
        timeout: float = 10.0,
        retries: int = 2,
        max_bytes: int = 50_000_000,
        allow_private: bool = False,
    ):
        try:
            import pyarrow.parquet as parquet
        except ImportError as error:
            raise DataError("parquet needs the package pyarrow: pip install 'ldm-train[prepare]'") from error
        source = Path(path)
        self.files = sorted(source.glob("*.parquet")) if source.is_dir() else [source]
        if not self.files or not self.files[0].is_file():
            raise FileNotFoundError(f"path={path} is neither a .parquet file nor a folder of them")
        self.columns = {"url": url_column, "caption": caption_column, "width": width_column, "height": height_column}
        self.groups: list[tuple[int, int, int]] = []  # (first row, file, row group)
        rows = 0
        for number, file in enumerate(self.files):
            try:
                table = parquet.ParquetFile(file)
            except (OSError, ValueError) as error:
                raise DataError(f"{file}: {error}") from error
            names = table.schema_arrow.names
            if missing := [c for c in (url_column, caption_column) if c and c not in names]:
                raise DataError(
                    f"{file} has the columns {', '.join(names)}, not {', '.join(missing)}; set source.url_column, "
                    "source.caption_column (null for none)"
                )
            for column in ("width", "height"):
                if self.columns[column] not in names:
                    self.columns[column] = None
            for group in range(table.num_row_groups):
                self.groups.append((rows, number, group))
                rows += table.metadata.row_group(group).num_rows
        self.rows, self.every = rows, max(2, round(1 / val_fraction)) if val_fraction else rows + 1
        self.min_size, self.max_size, self.threads = min_size, max_size, threads
        self.options = {"timeout": timeout, "retries": retries, "max_bytes": max_bytes, "allow_private": allow_private}
        self._table: tuple[int, Any] = (-1, None)
        self.identity = {
            "source": "urls",
            "columns": self.columns,
            "min_size": min_size,
            "max_size": max_size,
            "every": self.every,
            "files": digest([[f.name, f.stat().st_size] for f in self.files]),
        }

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_table": (-1, None)}

    def splits(self) -> dict[str, int]:
        validation = -(-self.rows // self.every)
        return {"train": self.rows - validation, "val": validation}

    def row(self, split: str, i: int) -> int:
        """Row of sample i: rows 0, k, 2k, ... validate, the others train in order."""
        return i * self.every if split == "val" else i + i // (self.every - 1) + 1

    def _record(self, row: int) -> dict[str, Any]:
        import pyarrow.parquet as parquet

        place = max(k for k, (first, _, _) in enumerate(self.groups) if first <= row)
        if self._table[0] != place:
            _, file, group = self.groups[place]
            columns = [c for c in self.columns.values() if c]
            self._table = (place, parquet.ParquetFile(self.files[file]).read_row_group(group, columns=columns))
        table = self._table[1]
        return {n: table[c][row - self.groups[place][0]].as_py() if c else None for n, c in self.columns.items()}

    def sample(self, split: str, i: int) -> tuple[str, dict[str, bytes]]:
        row = self.row(split, i)
        return self._fetched(row, self._record(row))

    def samples(self, split: str, chunk: range) -> Iterator[tuple[str, dict[str, bytes]] | Exception]:
        """The samples of a shard in order, fetched by several threads; an exception stands for one that failed."""
        records = [(row, self._record(row)) for row in (self.row(split, i) for i in chunk)]

        def attempt(task: tuple[int, dict]) -> tuple[str, dict[str, bytes]] | Exception:
            try:
                return self._fetched(*task)
            except (OSError, ValueError, SyntaxError) as error:
                return error

        with ThreadPoolExecutor(self.threads) as pool:
            yield from pool.map(attempt, records)

    def _fetched(self, row: int, record: dict[str, Any]) -> tuple[str, dict[str, bytes]]:
        url = str(record["url"])
        try:
            sides = [record[n] for n in ("width", "height") if record[n]]
            if sides and min(sides) < self.min_size:
                raise Unfetchable(f"{min(sides):.0f} pixels, less than min_size={self.min_size}", True)
            data = fetch(url, **self.options)
            with Image.open(io.BytesIO(data)) as image:
                image.load()
                if min(image.size) < self.min_size:
                    raise Unfetchable(f"{min(image.size)} pixels, less than min_size={self.min_size}", True)
                kind = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}.get(image.format or "")
                if kind is None:
                    data, kind = encoded_png(image.convert("RGBA" if "A" in image.mode else "RGB")), "png"
            extension, data = reduced(data, kind, self.max_size, url)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"{url}: {error}") from error
        fields = {extension: data}
        if self.columns["caption"]:
            fields["txt"] = str(record["caption"] or "").strip().encode()
        return f"{row:012d}", fields
