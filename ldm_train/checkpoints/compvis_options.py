"""The options of a section of CompVis' YAML, read as plain values."""

import math
from collections.abc import Mapping
from typing import Any

from ldm_train.storage import shown


class Options:
    """The options of one section, each of which is to be used. Errors name the file and the option."""

    def __init__(self, tree: Any, where: str):
        if not isinstance(tree, Mapping):
            raise ValueError(f"{where} is {shown(tree)}, no section with options")
        self.left, self.where = dict(tree), where

    def take(self, name: str, kinds: type | tuple[type, ...], *default: Any) -> Any:
        """An option of one of these types (None counts as left out), or its default where it has one."""
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
        """Options that can be converted at these values only."""
        for name, value in allowed.items():
            values = value if isinstance(value, tuple) else (value,)
            if (given := self.left.pop(name, values[0])) not in values:
                raise ValueError(
                    f"{self.where}.{name} is {shown(given)}; models with {shown(values[0])} can be converted"
                )

    def ignore(self, *names: str) -> None:
        """Options that do not change what the model computes."""
        for name in names:
            self.left.pop(name, None)

    def part(self, name: str) -> tuple[str, "Options"]:
        """(last word of its target, its options) of a part."""
        section = Options(self.left.pop(name, None), f"{self.where}.{name}")
        target = section.take("target", str)
        return target.rpartition(".")[2], Options(section.left.get("params") or {}, f"{section.where}.params")

    def done(self) -> None:
        if self.left:
            name, value = next(iter(self.left.items()))
            raise ValueError(f"{self.where}.{name}={shown(value)} is unknown; it cannot be converted")
