"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv:2106.09685): a weight W becomes W + strength * alpha / rank * up @ down.

They are parametrisations of weights (torch.nn.utils.parametrize), not wrappers around layers as in PEFT: networks here
concatenate or reshape weights before multiplying by them (see `pointwise`), which bypasses a wrapper. Hence an adapter
and its merged weights compute bit-identical results, and an adapter whose `up` is zero changes nothing.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import parametrize

# A regular expression for the ends of attention layers' names in the U-Net, the DiT and the text encoders.
ATTENTION = (
    r"(to_q|to_k|to_v|to_out\.0|qkv|proj_out|attn\w*\.proj|self_attn|self_attn\.out_proj|[qkv]_proj|out_proj"
    r"|SelfAttention\.[qkvo]|query|key|value)"
)
EVERYTHING = r".*"
TARGETS = {"attention": ATTENTION, "all": EVERYTHING}
OF_TEXT = ("conditioners.", "encoders.")
WEIGHTS = ("weight", "in_proj_weight")  # names of a layer's tensors that can be adapted


class Pair(nn.Module):
    """One adapter's addition to one weight (out, in, ...): down (rank, in, ...), initialised as in PEFT, and
    up (out, rank, 1, ...), initialised to zero. Raises ValueError for a rank that the weight cannot have."""

    def __init__(self, shape: Sequence[int], rank: int, alpha: float):
        super().__init__()
        if not 0 < rank <= min(shape[0], math.prod(shape[1:])):
            raise ValueError(
                f"rank={rank} does not fit a weight of {'x'.join(map(str, shape))}; use 1 to "
                f"{min(shape[0], math.prod(shape[1:]))}"
            )
        self.rank, self.alpha, self.strength = rank, float(alpha), 1.0
        self.down = nn.Parameter(torch.empty(rank, *shape[1:]))
        self.up = nn.Parameter(torch.zeros(shape[0], rank, *(1 for _ in shape[2:])))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    @classmethod
    def of(cls, down: torch.Tensor, up: torch.Tensor, alpha: float) -> "Pair":
        """Returns a pair with given values, float32. down (rank, in, ...), up (out, rank, 1, ...), matching shapes."""
        pair = cls.__new__(cls)
        nn.Module.__init__(pair)
        pair.rank, pair.alpha, pair.strength = down.shape[0], float(alpha), 1.0
        pair.down, pair.up = nn.Parameter(down.float()), nn.Parameter(up.float())
        return pair

    def forward(self) -> torch.Tensor:
        """Returns the addition (out, in, ...), float32, scaled by strength * alpha / rank."""
        up, down = self.up.flatten(1).float(), self.down.flatten(1).float()
        # Under autocast the product would be rounded to 16 bits and so differ from the merged weights.
        with torch.autocast(up.device.type if up.device.type != "meta" else "cpu", enabled=False):
            product = up @ down
        shape = (self.up.shape[0], *self.down.shape[1:])
        return (self.strength * self.alpha / self.rank) * product.view(shape)


class Sum(nn.Module):
    """The parametrisation of one weight: adds all adapters' pairs, in the order in which they were attached."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs = nn.ModuleDict()

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        for pair in self.pairs.values():
            if pair.strength != 0:
                weight = weight + pair().to(weight.dtype)
        return weight


@dataclass(frozen=True)
class LoRA:
    """Options for creating an adapter.

    rank: of the additions. alpha: their scale is alpha / rank; None: alpha is the rank
    targets: "attention", "all" (every adaptable layer, see `adaptable`), or a regular expression for the ends of
        layers' names
    text_encoder: also adapt the text encoders' layers, i.e. those in the submodules "conditioners" and "encoders"
    Raises ValueError for a rank or alpha that is not positive, or an invalid regular expression.
    """

    rank: int = 8
    alpha: float | None = None
    targets: str = "attention"
    text_encoder: bool = False

    def __post_init__(self) -> None:
        if type(self.rank) is not int or self.rank < 1:
            raise ValueError(f"rank={self.rank} is not a whole number above 0")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha={self.alpha} is not a number above 0")
        try:
            re.compile(self.targets)
        except re.error as error:
            raise ValueError(
                f"targets={self.targets} is neither attention nor all, and no regular expression ({error})"
            ) from error

    def shapes(self, module: nn.Module) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of the weights to adapt, by name. Raises ValueError if there are none."""
        pattern = re.compile(rf"(.*\.)?({TARGETS.get(self.targets, self.targets)})")
        found = {
            n: tuple(w.shape)
            for n, w in adaptable(module)
            if pattern.fullmatch(n.rpartition(".")[0]) and (self.text_encoder or not n.startswith(OF_TEXT))
        }
        if not found:
            raise ValueError(f"targets={self.targets} names no layer; use attention or all")
        return found

    def attach(self, module: nn.Module, name: str = "adapter") -> nn.ModuleDict:
        """Attaches a new adapter to a module, whose own weights are frozen. The rank is lowered where a weight is too
        small for it. Returns the adapter, see the function `attach`."""
        module.requires_grad_(False)
        shapes = self.shapes(module)
        scale = 1.0 if self.alpha is None else self.alpha / self.rank  # also where the rank is lowered
        ranks = {key: min(self.rank, shape[0], math.prod(shape[1:])) for key, shape in shapes.items()}
        pairs = {key: Pair(shape, ranks[key], scale * ranks[key]) for key, shape in shapes.items()}
        return attach(module, pairs, name)


def adaptable(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (name, weight) of linear, convolutional and attention layers; of adapted layers, the original weight."""
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.MultiheadAttention):
            for leaf in WEIGHTS:
                if parametrize.is_parametrized(layer, leaf):
                    yield f"{name}.{leaf}", layer.parametrizations[leaf].original
                elif isinstance(weight := getattr(layer, leaf, None), nn.Parameter):
                    yield f"{name}.{leaf}", weight


def attach(module: nn.Module, pairs: Mapping[str, Pair], name: str) -> nn.ModuleDict:
    """Adds an adapter's pairs to a module's weights, next to those of other adapters. Returns the pairs as one module,
    by the weights' names with "/" for ".". Raises ValueError, before anything is changed, if a pair does not fit or the
    name is already taken."""
    weights = dict(adaptable(module))
    for key, pair in pairs.items():
        given = (pair.up.shape[0], *pair.down.shape[1:])
        if key not in weights:
            raise ValueError(f"the adapter {name} changes {key}, which this model lacks: it is of another architecture")
        if tuple(weights[key].shape) != given:
            shapes = ["x".join(map(str, shape)) for shape in (given, weights[key].shape)]
            raise ValueError(
                f"the adapter {name} is of another architecture: its {key} is {shapes[0]}, the model's {shapes[1]}"
            )
    if any(name in totals.pairs for _, totals in _sums(module)):
        raise ValueError(f"the adapter {name} is there already; take it once, with one weight")
    for key, pair in pairs.items():
        path, _, leaf = key.rpartition(".")
        layer = module.get_submodule(path)
        if not parametrize.is_parametrized(layer, leaf):
            parametrize.register_parametrization(layer, leaf, Sum(), unsafe=True)
        layer.parametrizations[leaf][0].pairs[name] = pair if pair.down.is_meta else pair.to(weights[key].device)
    return nn.ModuleDict({key.replace(".", "/"): pair for key, pair in pairs.items()})


def _sums(module: nn.Module) -> Iterator[tuple[str, Sum]]:
    """Yields the parametrisations of a module's adapted weights, with the weights' names."""
    for path, layer in module.named_modules():
        if parametrize.is_parametrized(layer):
            for leaf, totals in layer.parametrizations.items():
                if isinstance(totals[0], Sum):
                    yield f"{path}.{leaf}", totals[0]


def pairs_of(module: nn.Module, name: str) -> dict[str, Pair]:
    """Returns an adapter's pairs by the names of the weights. Raises ValueError if the module has no such adapter."""
    found = {key: total.pairs[name] for key, total in _sums(module) if name in total.pairs}
    if not found:
        raise ValueError(f"there is no adapter {name} on this model; merged ones are part of its weights")
    return found


def set_strength(module: nn.Module, name: str, strength: float) -> None:
    """Sets how strongly an adapter acts: 0 not at all, 1 as trained. Raises ValueError if there is no such adapter."""
    for pair in pairs_of(module, name).values():
        pair.strength = float(strength)


@torch.no_grad()
def merge(module: nn.Module) -> dict[str, torch.Tensor]:
    """Merges all adapters into their weights, which become plain parameters again. Returns the original weights by
    name, for `unmerge`. Raises ValueError if there is no adapter, e.g. after an earlier merge."""
    kept: dict[str, torch.Tensor] = {}
    for key, _ in list(_sums(module)):
        path, _, leaf = key.rpartition(".")
        layer = module.get_submodule(path)
        kept[key] = layer.parametrizations[leaf].original.detach().clone()
        parametrize.remove_parametrizations(layer, leaf)
    if not kept:
        raise ValueError("there is no adapter to merge; a merged one is part of the weights")
    return kept


@torch.no_grad()
def unmerge(module: nn.Module, kept: Mapping[str, torch.Tensor]) -> None:
    """Restores the original weights that `merge` returned, bit for bit."""
    for key, weight in kept.items():
        module.get_parameter(key).copy_(weight)
