"""ldm-app: a page on which trained models draw, and one on which runs can be watched."""

import atexit
import inspect
import ipaddress
import logging
import os
import secrets
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from omegaconf import DictConfig

from ldm_train.rules import Rule, check, flag, number, optional, scalar, text, whole

RULES: dict[str, Rule] = {
    "runs_dir": text("a folder"),
    "host": text("an address"),
    "port": whole(0, 65535),
    "password": optional(scalar),
    "user": text("a name"),
    "open_browser": flag,
    "queue": whole(1, 10000),
    **{f"limits.{name}": whole(1, 2**20) for name in ("pictures", "steps", "side", "characters")},
    **{f"limits.{name}": number(1e-3, 1e6) for name in ("upload", "megapixels")},
}


def is_loopback(host: str) -> bool:
    """Returns True if an address can be reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@contextmanager
def without_stubs() -> Iterator[None]:
    """A context in which gradio can be imported without writing a .pyi file beside each of its components, which takes
    seconds at every start and writes files that nobody asked for. gradio skips classes whose file cannot be found, so
    inspect.getfile fails for its classes."""
    getfile = inspect.getfile

    def without_gradios(of: Any) -> str:
        if isinstance(of, type) and of.__module__.startswith("gradio."):
            raise OSError(f"{of} is written no stub for")
        return getfile(of)

    inspect.getfile = without_gradios
    try:
        yield
    finally:
        inspect.getfile = getfile


def _check_port(host: str, port: int) -> None:
    """Raises ValueError if the port cannot be used, e.g. because another program listens on it; called before a model
    is loaded."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(
                f"port={port} of host={host} cannot be used ({error.strerror}); set port=0 for a free one"
            ) from error


def serve(config: DictConfig) -> None:
    """Starts the app and waits for Ctrl+C. Raises ValueError or FileNotFoundError if it cannot be served."""
    launched = start(config)
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        launched.close()


def start(config: DictConfig) -> Any:
    """Starts the app in the background; returns the Blocks."""
    check(config, RULES)
    password = None if config.password in (None, "") else str(config.password)
    if not is_loopback(config.host) and password is None:
        raise ValueError(
            f"host={config.host} is reached from other machines: set password=<words> (user={config.user}), or leave host= out"
        )
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    # A folder of this app alone, deleted when it ends: uploads, previews and files that the pages have shown.
    cache = tempfile.TemporaryDirectory(prefix="ldm-app-")
    atexit.register(cache.cleanup)
    os.environ["GRADIO_TEMP_DIR"] = cache.name
    try:
        with without_stubs():
            from ldm_train.app import blocks  # imports gradio, which takes seconds
    except ModuleNotFoundError as error:
        raise ValueError(f"ldm-app needs the package {error.name}: pip install 'ldm-train[app]'") from error

    logging.getLogger("httpx").setLevel(logging.WARNING)
    if config.port:
        _check_port(config.host, config.port)
    demo = blocks.build(config)
    expected = f"{config.user}\n{password}".encode()

    def known(user: str, password: str) -> bool:
        return secrets.compare_digest(f"{user}\n{password}".encode(), expected)

    _, address, _ = demo.queue(max_size=config.queue, default_concurrency_limit=1).launch(
        server_name=config.host,
        server_port=config.port or None,
        inbrowser=config.open_browser,
        auth=None if password is None else known,
        run_history=False,
        max_file_size=int(config.limits.upload * 1e6),
        prevent_thread_lock=True,
        quiet=True,
        footer_links=[],
        ssr_mode=False,
        enable_monitoring=False,
        share=False,
        **blocks.LOOK,
    )
    print(f"open {address}" + ("" if password is None else f" (user {config.user})") + "; Ctrl+C ends it", flush=True)
    return demo
