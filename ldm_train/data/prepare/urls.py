"""Lists of image addresses with captions (LAION-style parquet): images are fetched, honouring opt-outs, checked and
packed."""

import http.client
import io
import ipaddress
import itertools
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

from PIL import Image

from ldm_train.data.files import DataError, optional_package
from ldm_train.data.prepare.build import Source, class_and_captions, digest
from ldm_train.data.prepare.image_folder import stored

AGENT = "ldm-train/0.1 (image download for model training)"
OPT_OUT = {"noai", "noimageai", "noindex", "noimageindex"}
PERMANENT = {400, 401, 403, 404, 405, 406, 410, 414, 451}  # retrying does not help
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # the only ones that are decoded
MAX_REDIRECTS = 5


class Unfetchable(ValueError):
    """An address that was not fetched; the message says why. transient: another attempt may succeed."""

    def __init__(self, message: str, transient: bool = False):
        super().__init__(message)
        self.transient = transient


# Python's `is_global` differs between versions and hardly handles IPv4 addresses inside IPv6 ones. This list has IANA's
# special-purpose address registries and, as one block, the IPv4 addresses that were never assigned for global unicast.
SPECIAL = """
0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 172.16.0.0/12 192.0.0.0/24 192.0.2.0/24 192.88.99.0/24
192.168.0.0/16 198.18.0.0/15 198.51.100.0/24 203.0.113.0/24 224.0.0.0/3
2001::/23 2001:db8::/32 2002::/16 3fff::/20
"""  # IPv6: protocols (Teredo, ORCHID, ...), documentation, 6to4, documentation
NOT_PUBLIC = [ipaddress.ip_network(network) for network in SPECIAL.split()]
GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
NAT64 = ipaddress.ip_network("64:ff9b::/96")  # through it, IPv6-only networks reach public IPv4 addresses (RFC 6052)


def is_public(address: str) -> bool:
    """Returns True if an IP address is global unicast. An address that embeds an IPv4 address (mapped, NAT64) is
    public if that one is; the retired forms (IPv4-compatible, 6to4, Teredo) never are."""
    ip = ipaddress.ip_address(address.split("%")[0])
    if ip.version == 6:
        embedded = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in NAT64 else ip.ipv4_mapped
        if embedded:
            return is_public(str(embedded))
        if ip not in GLOBAL_UNICAST:
            return False
    return not any(ip in network for network in NOT_PUBLIC if network.version == ip.version)


def public_addresses(host: str, port: int, allow_private: bool = False) -> list[str]:
    """The IP addresses of a host. Raises Unfetchable if the host is unknown or, without `allow_private`, if any of
    them is not public. Connections are made to these addresses, so that a changed DNS answer has no effect."""
    try:
        addresses = [entry[4][0] for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    except OSError as error:
        raise Unfetchable(f"{host}: {error}", True) from error
    for address in addresses:
        if not allow_private and not is_public(address):
            raise Unfetchable(f"{host} is {address}, a private address; allow it with source.allow_private=true")
    return list(dict.fromkeys(addresses))


class _Connections:
    """An opener that connects only to checked addresses and follows no redirects, and the sockets it has opened."""

    def __init__(self, allow_private: bool):
        self.was_cut = False
        self.opened = opened = []

        def connected(connection: http.client.HTTPConnection) -> socket.socket:
            failure: Exception = Unfetchable(f"{connection.host} has no address", True)
            for address in public_addresses(connection.host, connection.port, allow_private):
                try:
                    opened.append(socket.create_connection((address, connection.port), connection.timeout))
                    return opened[-1]
                except OSError as error:
                    failure = error
            raise failure

        class Plain(http.client.HTTPConnection):
            def connect(self) -> None:
                self.sock = connected(self)

        class Secure(http.client.HTTPSConnection):
            def connect(self) -> None:
                self.sock = self._context.wrap_socket(connected(self), server_hostname=self.host)
                opened.append(self.sock)

        class HTTP(urllib.request.HTTPHandler):
            def http_open(self, request: urllib.request.Request) -> Any:
                return self.do_open(Plain, request)

        class HTTPS(urllib.request.HTTPSHandler):
            def https_open(self, request: urllib.request.Request) -> Any:
                return self.do_open(Secure, request, context=self._context)

        class NoRedirects(urllib.request.HTTPRedirectHandler):
            def http_error_302(self, *_: Any) -> None:  # urllib's own method reads the redirect's whole body
                return None

            http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302

        # Proxies from the environment are not used: they would hide the address that the connection goes to.
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), HTTP(), HTTPS(), NoRedirects())

    def cut(self) -> None:
        """Closes all sockets that are still open."""
        self.was_cut = True
        for sock in self.opened:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


def checked_url(url: str) -> str:
    """The URL with unsafe characters quoted. Raises Unfetchable for anything but http and https."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise Unfetchable(f"{url}: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise Unfetchable(f"{url}: only http and https addresses are fetched")
    return quote(url, safe="%/:=&?~#+!$,;'@()*[]")


def fetch(
    url: str, timeout: float = 10.0, retries: int = 2, max_bytes: int = 50_000_000, allow_private: bool = False
) -> bytes:
    """Fetches the bytes at an address.

    timeout: seconds without an answer; each attempt may take six times as long in total. max_bytes: larger files are
    refused. allow_private: also connect to addresses that are not public.
    Raises Unfetchable, after `retries` more attempts if these may help; also for files whose owners opt out of use for
    machine learning (X-Robots-Tag: noai, noindex, ...).
    """
    for attempt in itertools.count():
        connections = _Connections(allow_private)
        alarm = threading.Timer(6 * timeout, connections.cut)
        alarm.daemon = True
        alarm.start()
        try:
            data = _follow(connections.opener, url, timeout, max_bytes)
            if connections.was_cut:  # a cut connection looks like the end of an answer
                raise Unfetchable(f"not finished after {6 * timeout:.0f} s", True)
            return data
        except Unfetchable as error:
            if not error.transient or attempt >= retries:
                raise
        finally:
            alarm.cancel()
        time.sleep(0.5 * 2**attempt)


def _follow(opener: Any, url: str, timeout: float, max_bytes: int) -> bytes:
    for _ in range(MAX_REDIRECTS + 1):
        answer = _read(opener, checked_url(url), timeout, max_bytes)
        if isinstance(answer, bytes):
            return answer
        url = urljoin(url, answer)
    raise Unfetchable(f"more than {MAX_REDIRECTS} redirects")


def _read(opener: Any, url: str, timeout: float, max_bytes: int) -> bytes | str:
    """The bytes, or the address to which the answer redirects."""
    request = urllib.request.Request(url, headers={"User-Agent": AGENT, "Accept": "image/*,*/*;q=0.5"})
    end = time.monotonic() + 6 * timeout
    try:
        with opener.open(request, timeout=timeout) as response:
            tags = {t.strip().lower() for line in response.headers.get_all("X-Robots-Tag", []) for t in line.split(",")}
            if tags & OPT_OUT:
                raise Unfetchable(f"its owner opts out ({', '.join(sorted(tags & OPT_OUT))})")
            length = response.headers.get("Content-Length", "")
            if length.isdigit() and int(length) > max_bytes:
                raise Unfetchable(f"{length} bytes, more than max_bytes={max_bytes}")
            data = bytearray()
            while block := response.read1(1 << 16):
                data += block
                if len(data) > max_bytes:
                    raise Unfetchable(f"more than max_bytes={max_bytes}")
                if time.monotonic() > end:
                    raise Unfetchable(f"not finished after {6 * timeout:.0f} s", True)
            if length.isdigit() and len(data) < int(length):
                raise Unfetchable(f"the connection broke at {len(data)} of {length} bytes", True)
            return bytes(data)
    except urllib.error.HTTPError as error:
        with error:  # it holds the connection
            if error.code in (301, 302, 303, 307, 308) and (target := error.headers.get("Location")):
                return target
            raise Unfetchable(f"answered {error.code}", error.code not in PERMANENT) from None
    except urllib.error.URLError as error:
        raise Unfetchable(f"no connection: {error.reason}", True) from error
    except (OSError, http.client.HTTPException) as error:
        raise Unfetchable(f"{type(error).__name__}: {error}", True) from error


class URLList(Source):
    """Images fetched from the addresses in a table, with captions.

    path: a parquet file, or a folder of them, with a column of addresses and one of captions.

    url_column, caption_column (null: none). width_column, height_column: if the table has them, images below min_size
    are not even fetched. max_size: reduce the short side. Every k-th row is for validation, k = 1 / val_fraction.
    max_pixels: larger images are refused without decoding. threads: connections at a time per process.
    timeout, retries, max_bytes, allow_private: see `fetch`.
    Images that could not be fetched are left out and listed with the reason in skipped.txt; finished shards are never
    fetched again. If most of a shard fails for reasons that may pass (e.g. no network), it is not written.
    """

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
        max_pixels: int = 50_000_000,
        allow_private: bool = False,
    ):
        parquet = optional_package("pyarrow.parquet", "parquet needs")
        types = optional_package("pyarrow.types", "parquet needs")
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
            self.columns |= {side: None for side in ("width", "height") if self.columns[side] not in names}
            for side in ("width", "height"):
                kind = table.schema_arrow.field(column).type if (column := self.columns[side]) else None
                if kind is not None and not (types.is_integer(kind) or types.is_floating(kind)):
                    raise DataError(f"{file}: {column} holds {kind}, not numbers; set source.{side}_column=null")
            for group in range(table.num_row_groups):
                self.groups.append((rows, number, group))
                rows += table.metadata.row_group(group).num_rows
        self.rows, self.every = rows, max(2, round(1 / val_fraction)) if val_fraction else rows + 1
        self.min_size, self.max_size, self.max_pixels, self.threads = min_size, max_size, max_pixels, threads
        self.options = {"timeout": timeout, "retries": retries, "max_bytes": max_bytes, "allow_private": allow_private}
        self._table: tuple[int, Any] = (-1, None)
        options = {"source": "urls", "columns": self.columns, "min_size": min_size, "max_size": max_size}
        files = digest([[f.name, f.stat().st_size] for f in self.files])
        self.identity = options | {"every": self.every, "files": files}

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_table": (-1, None)}

    def splits(self) -> dict[str, int]:
        validation = -(-self.rows // self.every)
        return {"train": self.rows - validation, "val": validation}

    def row(self, split: str, i: int) -> int:
        """Row of sample i: rows 0, k, 2k, ... are for validation, the others for training, in order."""
        return i * self.every if split == "val" else i + i // (self.every - 1) + 1

    def _record(self, split: str, i: int) -> tuple[int, dict[str, Any]]:
        """(row, its values) of sample i."""
        import pyarrow.parquet as parquet

        row = self.row(split, i)
        place = max(k for k, (first, _, _) in enumerate(self.groups) if first <= row)
        if self._table[0] != place:
            _, file, group = self.groups[place]
            columns = [c for c in self.columns.values() if c]
            self._table = (place, parquet.ParquetFile(self.files[file]).read_row_group(group, columns=columns))
        table, line = self._table[1], row - self.groups[place][0]
        return row, {name: table[c][line].as_py() if c else None for name, c in self.columns.items()}

    def sample(self, split: str, i: int) -> tuple[str, dict[str, bytes]]:
        return self._fetched(*self._record(split, i))

    def samples(self, split: str, chunk: range) -> Iterator[tuple[str, dict[str, bytes]] | Exception]:
        """Yields the samples of a shard in order, fetched by several threads, with the exception instead of a sample
        that failed."""
        records = [self._record(split, i) for i in chunk]

        def attempt(record: tuple[int, dict]) -> tuple[str, dict[str, bytes]] | Exception:
            try:
                return self._fetched(*record)
            except (OSError, ValueError, SyntaxError) as error:
                return error

        with ThreadPoolExecutor(self.threads) as pool:
            yield from pool.map(attempt, records)

    def _fetched(self, row: int, record: dict[str, Any]) -> tuple[str, dict[str, bytes]]:
        url = str(record["url"])
        try:
            sides = [record[n] for n in ("width", "height") if record[n]]
            if sides and min(sides) < self.min_size:
                raise Unfetchable(f"{min(sides):.0f} pixels, less than min_size={self.min_size}")
            data = fetch(url, **self.options)
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                if image.width * image.height > self.max_pixels:
                    raise Unfetchable(f"{image.width}x{image.height} pixels, more than max_pixels={self.max_pixels}")
                image.load()
                if min(image.size) < self.min_size:
                    raise Unfetchable(f"{min(image.size)} pixels, less than min_size={self.min_size}")
            extension, data = stored(data, None, self.max_size, url)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise Unfetchable(f"{url}: {error}", getattr(error, "transient", False)) from None
        captions = [str(record["caption"] or "").strip()] if self.columns["caption"] else []
        return f"{row:012d}", {extension: data} | class_and_captions(captions=captions)
