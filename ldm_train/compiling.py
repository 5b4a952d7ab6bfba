"""Applies torch.compile to networks in place.

The weights keep their names, so checkpoints and models are the same as those of runs without compilation.
"""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn


@runtime_checkable
class HasRegions(Protocol):
    """A network that is better compiled region by region: regions that are alike are compiled once."""

    def regions(self) -> Sequence[nn.Module]: ...


def check_compiler(option: str, device: torch.device) -> None:
    """Raises ValueError, naming the option and the remedy, if torch has no working compiler for this device."""
    if device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler as error:
            raise ValueError(
                f"{option} needs a C++ compiler on a CPU, and none works here; install one (apt-get install g++), name it in "
                f"the environment variable CXX, or leave {option} out"
            ) from error
    elif device.type in ("cuda", "xpu"):
        from torch.utils._triton import has_triton

        if not has_triton():
            raise ValueError(
                f"{option} needs Triton on a GPU, and it does not work here; pip install triton, or leave it out"
            )


def regions_of(network: nn.Module) -> Sequence[nn.Module]:
    """The modules to compile separately: the network's regions, or the whole network."""
    regions = network.regions() if isinstance(network, HasRegions) else (network,)
    # To torch, blocks of one class are versions of one function, of which it compiles eight before it gives up.
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, 2 * len(regions))
    return regions


def compile_training(*networks: nn.Module, **options: Any) -> None:
    """Compiles the forward passes that run with gradients enabled.

    Validation and sample grids, which are rare and have other shapes, run uncompiled. Each input shape is compiled
    separately: the result of a step then depends only on its own shapes, not on earlier ones, so a resumed run
    reproduces an uninterrupted one. options: passed to torch.compile
    """
    for network in networks:
        for region in regions_of(network):
            _compile_under_gradients(region, options)


def _compile_under_gradients(region: nn.Module, options: dict[str, Any]) -> None:
    written, compiled = region.forward, torch.compile(region.forward, dynamic=False, **options)

    def forward(*args: Any, **named: Any) -> Any:
        return (compiled if torch.is_grad_enabled() else written)(*args, **named)

    region.forward = forward


def compile_sampling(network: nn.Module, **options: Any) -> None:
    """Compiles a network for sampling. options: passed to torch.compile"""
    for region in regions_of(network):
        region.compile(**options)


def record_cuda_graphs(network: nn.Module) -> None:
    """Compiles a whole network for sampling with CUDA graphs: kernels are recorded once per shape and replayed
    together.

    A replay overwrites the output of the previous one, which multistep samplers still hold, so each output is copied.
    """
    compiled = torch.compile(network.forward, mode="reduce-overhead")

    def replayed(*args: Any, **named: Any) -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(*args, **named).clone()

    network.forward = replayed
