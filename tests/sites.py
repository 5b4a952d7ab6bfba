"""Serves folders over http from this process, with the faults of real networks."""

import threading
import time
from collections import deque
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest


def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


class Site:
    """A local server of a folder. `asked` lists the paths of all requests.

    ranges: whether it honours Range headers. drop_after: it closes the connection after this many bytes. status,
    location: those of every answer (a location redirects). length: maps the size of a file to the Content-Length that
    is sent (None: no header). pause: seconds before each block of 4096 bytes. faults: what happens to the next
    requests, in order: a status (300 to 599), another number of bytes as in `drop_after`, or "other" for other bytes
    (zeros) of the same length.
    """

    def __init__(self, folder: Path):
        self.ranges, self.drop_after, self.status, self.location, self.asked = True, None, 200, None, []
        self.length: Callable[[int], int | None] = lambda size: size
        self.pause, self.faults = 0.0, deque()
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                site.asked.append(self.path)
                fault = site.faults.popleft() if site.faults else None
                status = fault if isinstance(fault, int) and 300 <= fault < 600 else site.status
                path = folder / self.path.lstrip("/")
                if site.location or status != 200 or not path.is_file():
                    self.send_response(302 if site.location else status if status != 200 else 404)
                    self.send_header("Location", site.location or "")
                    self.end_headers()
                    return
                data = path.read_bytes()
                data = bytes(len(data)) if fault == "other" else data
                begin = int((self.headers.get("Range") or "bytes=0-")[6:-1]) if site.ranges else 0
                self.send_response(206 if begin else 200)
                if (length := site.length(len(data) - begin)) is not None:
                    self.send_header("Content-Length", str(length))
                self.end_headers()
                sent = data[begin:][: fault if isinstance(fault, int) else site.drop_after]
                try:
                    for at in range(0, len(sent), 4096):
                        time.sleep(site.pause)
                        self.wfile.write(sent[at : at + 4096])
                except OSError:  # the reader has gone
                    pass

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
