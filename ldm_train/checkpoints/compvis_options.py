"""The options of a section of CompVis' YAML, read as plain values."""

import math
from collections.abc import Mapping
from typing import Any

from ldm_train.storage import shown


class Options:
    """The options of one section, all of which must be consumed before `done`. Errors name the file and the option."""

    def __init__(self, tree: Any, where: str):
        if not isinstance(tree, Mapping):
            raise ValueError(f"{where} is {shown(tree)}, no section with options")
        self.left, self.where = dict(tree), where

    def take(self, name: str, kinds: type | tuple[type, ...], *default: Any) -> Any:
        """Removes and returns an option of one of these types; if it is missing or None, returns its default. Raises
        ValueError for other types, non-finite numbers, and a missing option without a default."""
        value = self.left.pop(name, None)
        if value is None and default:
            return default[0]
        fits = isinstance(value, kinds) and (not isinstance(value, bool) or kinds is bool)
        if not fits or (isinstance(value, float) and not math.isfinite(value)):
            raise ValueError(f"{self.where}.{name} is {shown(value)}; it cannot be converted")
        return value

    def numbers(self, name: str, *default: Any) -> list[int]:
        values = self.take(name, list, *default)
        if len(values) > 16 or not all(type(v) is int and 0 < v < 1 << 20 for v in values):
            raise ValueError(f"{self.where}.{name} is {shown(values)}, no list of up to 16 whole numbers")
        return list(values)

    def only(self, **allowed: Any) -> None:
        """Removes options that can only be converted at these values (a tuple lists several; the first is the default).
        Raises ValueError for other values."""
        for name, value in allowed.items():
            values = value if isinstance(value, tuple) else (value,)
            if (given := self.left.pop(name, values[0])) not in values:
                raise ValueError(
                    f"{self.where}.{name} is {shown(given)}; models with {shown(values[0])} can be converted"
                )

    def ignore(self, *names: str) -> None:
        """Removes options that do not change what the model computes."""
        for name in names:
            self.left.pop(name, None)

    def part(self, name: str) -> tuple[str, "Options"]:
        """Removes a nested part and returns (the last word of its `target`, its `params` as Options)."""
        section = Options(self.left.pop(name, None), f"{self.where}.{name}")
        target = section.take("target", str)
        return target.rpartition(".")[2], Options(section.left.get("params") or {}, f"{section.where}.params")

    def done(self) -> None:
        if self.left:
            name, value = next(iter(self.left.items()))
            raise ValueError(f"{self.where}.{name}={shown(value)} is unknown; it cannot be converted")
