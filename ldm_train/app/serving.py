"""How pages send data from this machine: copies of single files, and values as text."""

from pathlib import Path
from typing import Any

from gradio.processing_utils import save_file_to_cache

_copies: dict[tuple[str, str, int, int], str] = {}  # by folder of copies, file, its size and time


def served(path: str | Path, component: Any) -> str:
    """Returns the path of a copy of one file that the page shows, so that no folder of runs is open to requests. The
    copy is deleted when it is old. A file is read again only if it has changed."""
    there = Path(path).stat()
    place = (component.GRADIO_CACHE, str(path), there.st_size, there.st_mtime_ns)
    if not Path(_copies.get(place, "")).is_file():
        _copies[place] = save_file_to_cache(path, component.GRADIO_CACHE)
    return _copies[place]


def as_text(value: Any) -> str:
    """Escapes a value from a file or a request, so that Markdown shows it as text."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>!#" else c for c in str(value))
