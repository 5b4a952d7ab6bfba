"""What belongs to the fast tier and what to the slow one, for tests of many values."""

from collections.abc import Collection
from typing import Any

import pytest


def tiered(names: Any, values: Collection[Any], fast: int = 2, ids: list[str] | None = None) -> pytest.MarkDecorator:
    """pytest.mark.parametrize with `fast` of the values in the fast tier, spread evenly over them, and the others in the
    slow tier. Values that are marked already stay as they are."""
    several = not isinstance(names, str) or "," in names
    usual = [i for i, value in enumerate(values) if not getattr(value, "marks", ())]
    chosen = {usual[k * len(usual) // fast] for k in range(min(fast, len(usual)))}

    def entry(i: int, value: Any) -> Any:
        if i in chosen or i not in usual:
            return value
        if hasattr(value, "marks"):  # a pytest.param
            return pytest.param(*value.values, marks=pytest.mark.slow, id=value.id)
        return pytest.param(*(value if several else (value,)), marks=pytest.mark.slow)

    return pytest.mark.parametrize(names, [entry(i, value) for i, value in enumerate(values)], ids=ids)
