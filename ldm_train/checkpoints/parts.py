"""Builds models from files that may come from untrusted sources: they are read as plain values, and no arbitrary code
that they name is run.

A model folder, run folder or recipe says which parts to build with `_target_` and values. Hydra's own `instantiate`
would call any function that can be imported, and resolve `${...}`; here a file can only choose among the classes and
samplers that this package's model files declare, and those of packages that the user's own command or call names
(`trust`).
"""

import importlib
import inspect
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from ldm_train.conditioning.text import TrainedText
from ldm_train.models.autoencoder import Autoencoder
from ldm_train.models.unet import UNet
from ldm_train.storage import KINDS, check_kinds

# Packages and modules whose classes and samplers a file may name. Nothing in them writes files or runs commands.
BUILDABLE = (
    "ldm_train.models",
    "ldm_train.conditioning",
    "ldm_train.diffusion",
    "ldm_train.samplers",
    "ldm_train.latent_diffusion",
    "ldm_train.unclip",
)

LARGEST_NUMBER = 1 << 20  # widths, counts, class labels and vocabularies all stay below it
NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


def _within(name: str, places: Sequence[str]) -> bool:
    return any(name == place or name.startswith(f"{place}.") for place in places)


def find_part(name: Any, where: str | Path, trust: Sequence[str] = (), places: Sequence[str] = BUILDABLE) -> Any:
    """Returns the class (or sampler) that a file names by its dotted path.

    places: modules and packages of ldm_train whose own classes may be named. trust: packages, or dotted names, that the
        user has named. Nothing else is even imported. Raises ValueError with the file, what it asks for and the remedy.
    """
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ValueError(f"{where} asks for {name!r}, which is not the name of a part")
    trusted = _within(name, trust)
    module_name, _, attribute = name.rpartition(".")
    if not trusted and not _within(module_name, places):
        package = name.partition(".")[0]
        remedy = "such files build only models, conditioners, schedules and samplers"
        if package not in {"ldm_train", "torch", "builtins", *sys.stdlib_module_names}:
            remedy += f"; if you know {package} and whose file this is, set trust=[{package}]"
        raise ValueError(f"{where} asks for {name}: {remedy}")
    try:
        part = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{where} asks for {name}, which is not there ({error})") from error
    declared = str(getattr(part, "__module__", ""))
    # Names that a module only imports do not count: `from os import system` must not make it a part.
    own = _within(declared, [e.partition(".")[0] for e in trust]) if trusted else declared == module_name
    sampler = callable(part) and (trusted or _within(module_name, ["ldm_train.samplers"]))
    if not own or attribute.startswith("_") or not (isinstance(part, type) or sampler):
        raise ValueError(f"{where} asks for {name}, which is not a class or sampler of {module_name}")
    return part


def build(tree: Any, where: str | Path, trust: Sequence[str] = (), places: Sequence[str] = BUILDABLE) -> Any:
    """Builds the object that a tree of plain values describes: calls each `_target_` with the options beside it,
    innermost first. `_partial_: true` binds the options instead of calling; functions can only be bound. Strings are
    not interpolated.

    Raises ValueError, naming `where`, for parts that may not be built (see `find_part`), options they do not have,
    values they refuse, and numbers larger than any option of a model.
    """
    if isinstance(tree, list):
        return [build(v, where, trust, places) for v in tree]
    if isinstance(tree, int | float) and not isinstance(tree, bool) and not abs(tree) <= LARGEST_NUMBER:
        raise ValueError(f"{where} holds the number {tree}; no option of a model is that large")
    if not isinstance(tree, dict):
        return tree
    if "_target_" not in tree:
        return {k: build(v, where, trust, places) for k, v in tree.items()}
    name = tree["_target_"]
    part = find_part(name, where, trust, places)
    options = {k: v for k, v in tree.items() if k not in ("_target_", "_partial_", "_convert_")}
    if odd := next((k for k in options if k.startswith("_")), None):
        raise ValueError(f"{where}: {name} has no option {odd}")
    bound = tree.get("_partial_", False)
    if bound is not True and not isinstance(part, type):
        raise ValueError(f"{where}: {name} is a function, which a file may only bind (_partial_: true)")
    made = {k: build(v, where, trust, places) for k, v in options.items()}
    try:
        return partial(part, **made) if bound is True else part(**made)
    except ValueError as error:  # the part's own message, which may lack `where`
        raise error if str(where) in str(error) else ValueError(f"{where}: {error}") from error
    except FileNotFoundError:
        raise
    except (TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError, AssertionError, OSError) as error:
        raise ValueError(f"{where}: {name} cannot be built from its options ({error})") from error


def build_sampler(tree: Any, where: str | Path, trust: Sequence[str] = ()) -> Callable[..., Any]:
    """Returns a sampler with its options bound. Raises the ValueErrors of `build`, also if the tree describes anything
    else, or an option has another type than its default, which would otherwise fail only while the first image is
    sampled."""
    if not isinstance(tree, dict) or tree.get("_partial_") is not True or "_target_" not in tree:
        raise ValueError(f"{where} does not name a valid sampler (_target_ and _partial_: true); pass sampler=")
    part = find_part(tree["_target_"], where, trust)
    if isinstance(part, type):
        raise ValueError(f"{where} asks for {tree['_target_']}, which is not a sampler")
    parameters = inspect.signature(part).parameters.values()
    known = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY or p.default is not p.empty}
    odd = [k for k in tree if not k.startswith("_") and k not in known]
    if odd and not any(p.kind is p.VAR_KEYWORD for p in parameters):
        raise ValueError(f"{where}: {tree['_target_']} has no option {odd[0]}")
    usual = {name: value for name, value in known.items() if type(value) in KINDS}
    check_kinds(tree, usual, f"{where}: {tree['_target_']} does not take its options", {})
    with no_larger_than({}, where):
        return build(tree, where, trust)


def whole(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a part's config tree with all its options, i.e. with the defaults of those that the tree omits."""
    part = find_part(tree["_target_"], "the model")
    classes = [part, Autoencoder] if issubclass(part, Autoencoder) else [part]
    signatures = [inspect.signature(kind).parameters.values() for kind in classes]
    defaults = {p.name: p.default for ps in signatures for p in ps if p.default is not p.empty}
    full = {k: list(v) if isinstance(v, list | tuple) else v for k, v in (defaults | dict(tree)).items()}
    if issubclass(part, Autoencoder):
        full["embed_dim"] = full["embed_dim"] or full["z_channels"]
    if issubclass(part, UNet):
        full["out_channels"] = full["out_channels"] or full["in_channels"]
        full["context_dim"], depth = full["context_dim"] or None, full["transformer_depth"]
        full["transformer_depth"] = depth or (1 if full["context_dim"] else None)
    if issubclass(part, TrainedText):
        full["head_dim"] = full["head_dim"] or full["dim"] // full["heads"]
    return full


def targets(tree: Any) -> Iterator[str]:
    """Yields every `_target_` in a tree."""
    if isinstance(tree, dict):
        if isinstance(tree.get("_target_"), str):
            yield tree["_target_"]
        for value in tree.values():
            yield from targets(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from targets(value)


@contextmanager
def no_larger_than(weights: dict[str, tuple[int, ...]], where: str | Path) -> Iterator[None]:
    """A context that stops building a model if it grows far beyond the weights to be loaded into it. Raises ValueError.

    weights: shapes by name. The limit leaves room for frozen encoders, which are not among a model's weights.
    """
    most_tensors = 2 * len(weights) + 2_000
    most_values = 2 * sum(math.prod(shape) for shape in weights.values()) + (1 << 31)

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal most_tensors, most_values
        most_tensors -= 1
        most_values -= 0 if parameter is None else parameter.numel()
        if most_tensors < 0 or most_values < 0:
            raise ValueError(f"{where} describes a model far larger than the weights beside it")

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def cast(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Returns tensors on the CPU, floating-point ones in `dtype`. Raises ValueError for values that the dtype cannot
    hold."""
    made = {k: (t.to(dtype) if t.is_floating_point() else t).cpu().contiguous().clone() for k, t in tensors.items()}
    for name, tensor in made.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} has values that are not finite in {dtype}; choose another dtype")
    return made
