"""Validation rules for the options of a command: tables of option names and rules, checked before anything is built."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

# value -> the value to use. Raises ValueError with a message template: {name} and {value} stand for the option's name
# and value, {value!r} for the value's repr and {group} for the name with slashes.
Rule = Callable[[Any], Any]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def number(least: float = -math.inf, most: float = math.inf, kind: str = "number") -> Rule:
    """A finite number in a range, both ends included."""

    def rule(value: Any) -> Any:
        if value is None:
            raise ValueError(f"{{name}}=null: it needs a {kind}")
        if not _is_number(value):
            raise ValueError(f"{{name}}={{value!r}} is not a {kind}")
        if not math.isfinite(value):
            raise ValueError("{name}={value} is not a finite number")
        if value < least:
            raise ValueError(f"{{name}}={{value}} is below {least}; it must be at least that")
        if value > most:
            raise ValueError(f"{{name}}={{value}} is above {most}; it must be at most that")
        return value

    return rule


def whole(least: float = -math.inf, most: float = math.inf) -> Rule:
    """A whole number in a range, both ends included; it may be written as 1e4."""

    def rule(value: Any) -> int:
        if number(least, most, "whole number")(value) != int(value):
            raise ValueError("{name}={value} is not a whole number")
        return int(value)

    return rule


def flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("{name}={value!r} is neither true nor false")
    return value


def engine(value: Any) -> str:
    """What runs the processes of a command instead of this machine alone; only "ray" is accepted."""
    if value != "ray":
        raise ValueError(
            "{name}={value} is not known: engine=ray runs it on a Ray cluster; leave it out for this machine alone"
        )
    return value


def one_of(*values: Any) -> Rule:
    def rule(value: Any) -> Any:
        if value not in values:
            raise ValueError(f"{{name}} is {', '.join(map(str, values[:-1]))} or {values[-1]}, not {{value!r}}")
        return value

    return rule


def text(meant: str = "text") -> Rule:
    """A non-empty string. meant: what it is called in the message."""

    def rule(value: Any) -> str:
        if not isinstance(value, str) or not value:
            raise ValueError(f"{{name}}={{value}} is not {meant}")
        return value

    return rule


def scalar(value: Any) -> Any:
    """Any value except a section or a list."""
    if isinstance(value, dict | list):
        raise ValueError("{name}={value} is not text")
    return value


def list_of(*kinds: type, example: str = "[{value}]") -> Rule:
    """A list whose entries have one of these types (true and false do not count as numbers)."""

    def rule(value: Any) -> list[Any]:
        if not isinstance(value, list) or not all(isinstance(v, kinds) and not isinstance(v, bool) for v in value):
            raise ValueError(f"{{name}} is a list: {{name}}={example}")
        return value

    return rule


def numbers(count: int, entry: Rule, kind: str = "numbers") -> Rule:
    """A list of `count` numbers that each satisfy the rule `entry`."""

    def rule(value: Any) -> list[Any]:
        try:
            if isinstance(value, list) and len(value) == count:
                return [entry(v) for v in value]
        except ValueError:
            pass  # a message about the whole list says more than one about an entry
        raise ValueError(f"{{name}}={{value}} is not a list of {count} {kind}")

    return rule


def noise_levels(value: Any) -> list[float]:
    """An interval of noise levels, [low, high]."""
    low, high = numbers(2, number(0))(value)
    if not low < high:
        raise ValueError("{name}={value} is [low, high] in noise levels, the lower one first")
    return [low, high]


def section(meant: str) -> Rule:
    """A section with its own options. meant: the rest of the message for any other value, with the remedy."""

    def rule(value: Any) -> Any:
        if not isinstance(value, dict):
            raise ValueError(f"{{name}}={{value}}{meant}")
        return value

    return rule


def optional(rule: Rule) -> Rule:
    return lambda value: None if value is None else rule(value)


def either(first: Rule, second: Rule) -> Rule:
    """Accepts what one of two rules accepts; an error message is that of the second rule."""

    def rule(value: Any) -> Any:
        try:
            return first(value)
        except ValueError:
            return second(value)

    return rule


def _sentence(template: str, name: str, value: Any) -> str:
    words = {"{name}": name, "{group}": name.replace(".", "/"), "{value!r}": repr(value), "{value}": str(value)}
    return re.sub("|".join(map(re.escape, words)), lambda match: words[match[0]], template)


def check(config: DictConfig, rules: Mapping[str, Rule], required: Sequence[str] = ()) -> None:
    """Applies every rule to its option, if the option is present, and replaces the value by the rule's result.

    required: options that must be present. Raises ValueError, naming the option, for a value that its rule does not
    accept.
    """
    for name, rule in rules.items():
        owner, _, last = name.rpartition(".")
        options = OmegaConf.select(config, owner) if owner else config
        if not OmegaConf.is_dict(options) or (last not in options and name not in required):
            continue
        value = options.get(last)
        plain = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        try:
            accepted = rule(plain)
        except ValueError as error:
            raise ValueError(_sentence(str(error), name, plain)) from None
        if accepted is not plain:
            OmegaConf.update(config, name, accepted)
