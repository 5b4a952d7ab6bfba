"""What of a page leaves this machine: copies of single files, and values as text."""

from pathlib import Path
from typing import Any

from gradio.processing_utils import save_file_to_cache


def served(path: str | Path, component: Any) -> str:
    """A copy of one file that the page shows: no folder of runs is open to requests. It is deleted when it is old."""
    return save_file_to_cache(path, component.GRADIO_CACHE)


def as_text(value: Any) -> str:
    """A value of a file or a request as text in Markdown."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>!#" else c for c in str(value))
