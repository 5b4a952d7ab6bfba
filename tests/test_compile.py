"""torch.compile: the networks of every family are traced without a graph break, in training and in sampling, and
compiled networks compute the same and have the same weight names as the others. On a GPU if there is one. All tests:
pytest -m "slow or not slow" tests/test_compile.py
"""

import json
from copy import deepcopy
from functools import cache, partial
from typing import Any

import pytest
import torch
from chains import composed
from hydra.utils import instantiate
from omegaconf import OmegaConf
from test_devices import RECIPES
from torch import nn

from ldm_train.compiling import check_compiler, compile_sampling, compile_training, record_cuda_graphs
from ldm_train.models.autoencoder import AutoencoderKL, AutoencoderVQ
from ldm_train.models.dit import DiT
from ldm_train.models.unet import UNet

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TARGET = "ldm_train.models.unet.UNet"
AUTOENCODER = {"z_channels": 4, "channels": 8, "channel_mult": (1, 2), "num_res_blocks": 1, "attention_levels": (1,)}
AUTOENCODERS = {
    "kl": partial(AutoencoderKL, **AUTOENCODER),
    "kl of patches": partial(AutoencoderKL, patch_size=2, **AUTOENCODER),
    "vq": partial(AutoencoderVQ, num_codes=16, **AUTOENCODER),
    "vq averaged and restarted": partial(AutoencoderVQ, num_codes=16, codebook_ema=0.9, restart_after=2, **AUTOENCODER),
}
# U-Net options that recipes of the published sizes use and the small recipes do not.
VARIANTS = {
    "scale and shift": {"scale_shift": True, "resblock_resample": True},
    "linear projections": {"context_dim": 8, "linear_projection": True, "transformer_depth": 2},
    "attention to the context alone": {"context_dim": 8, "cross_only_levels": (0,)},
    "a vector of classes": {"vector_dim": 1, "vector_classes": 4},
    "activations computed again": {"context_dim": 8, "activation_checkpointing": True},
}  # fmt: skip


def filled(network: nn.Module) -> nn.Module:
    """Moves a network to the device with all parameters random: layers that start at zero would hide the others."""
    torch.manual_seed(0)
    for p in network.parameters():
        nn.init.normal_(p, std=0.1)
    return network.to(DEVICE)


@cache
def small_tree(recipe: str) -> str:
    """Returns a recipe's network as JSON, with as few layers and channels as possible."""
    experiment, *options = RECIPES[recipe]
    config = composed("train", f"experiment={experiment}", *options)
    tree = OmegaConf.to_container(config.diffusion.network, resolve=True)
    if tree["_target_"].endswith("DiT"):
        tree |= {"hidden_size": 16, "depth": 2, "num_heads": 2}
    else:
        # One level is enough (the variants trace two), except with a control, which adds to each level.
        levels = [1, 2] if "control" in str(tree) else [1]
        attention = [len(levels) - 1] if tree.get("attention_levels") else []
        tree |= {"channels": 16, "channel_mult": levels, "num_res_blocks": 1, "attention_levels": attention}
        tree |= {"head_dim": None, "num_heads": 2}
    return json.dumps(tree, sort_keys=True)


def inputs_of(network: Any) -> dict[str, torch.Tensor]:
    """Returns one tensor for each input that a network takes, for a batch of two 4x4 latents."""
    torch.manual_seed(1)
    widths = network.condition_widths
    given = {"noisy_latents": torch.randn(2, network.in_channels, 4, 4), "timesteps": torch.tensor([3.0, 700.0])}
    if widths["context"]:
        given |= {"context": torch.randn(2, 3, widths["context"]), "context_mask": torch.ones(2, 3, dtype=torch.bool)}
    if widths["concat"]:
        given["concat"] = torch.randn(2, widths["concat"], 4, 4)
    if widths.get("control"):
        given["control"] = torch.randn(2, widths["control"], 4, 4)
    if widths["vector"]:
        given["vector"] = (
            torch.ones(2, 1) if getattr(network, "vector_classes", None) else torch.randn(2, widths["vector"])
        )
    return {name: value.to(DEVICE) for name, value in given.items()}


def check_traced(
    network: nn.Module,
    inputs: dict[str, Any],
    backend: str = "eager",
    tolerance: float = 0.0,
    modes: tuple[bool, ...] = (True, False),
) -> None:
    """Compiles a network and compares it with an uncompiled copy: outputs and gradients in training mode, outputs in
    eval mode. `fullgraph=True` raises an error at a graph break."""
    torch.compiler.reset()
    written = deepcopy(network)
    traced = torch.compile(network, fullgraph=True, backend=backend)

    def first(output: Any) -> torch.Tensor:
        return output[0] if isinstance(output, tuple) else output

    for training in modes:
        network.train(training), written.train(training)
        if not training and "context" in inputs:  # sampling projects the context beforehand
            with torch.no_grad():
                inputs = inputs | {"context": written.projected(inputs["context"])}
        with torch.set_grad_enabled(training):
            pair = []
            for run in (traced, written):
                torch.manual_seed(2)
                pair.append(first(run(**inputs)))
        torch.testing.assert_close(*pair, rtol=tolerance, atol=tolerance)
        if training:
            for output in pair:
                output.square().mean().backward()
    for (name, p), q in zip(network.named_parameters(), written.parameters()):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=tolerance, atol=tolerance)


@cache
def traced_network(tree: str) -> None:
    network = filled(instantiate(json.loads(tree), _convert_="all"))
    check_traced(network, inputs_of(network))


@pytest.mark.slow
def test_a_unet_under_every_condition_is_traced_whole() -> None:
    tree = {
        "in_channels": 4,
        "channels": 8,
        "channel_mult": [1],
        "num_res_blocks": 1,
        "attention_levels": [0],
        "num_heads": 2,
    }
    traced_network(json.dumps(tree | {"_target_": TARGET, "context_dim": 8, "concat_channels": 1, "vector_dim": 6}))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_network_of_every_family_is_traced_whole(recipe: str) -> None:
    traced_network(small_tree(recipe))  # cached: once for recipes with the same network


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_the_unet_are_traced_whole(variant: str) -> None:
    network = filled(UNet(4, 8, (1, 2), 1, attention_levels=(0,), num_heads=2, **VARIANTS[variant]))
    check_traced(network, inputs_of(network))


@pytest.mark.slow
@pytest.mark.parametrize("kind", AUTOENCODERS)
def test_autoencoders_are_traced_whole(kind: str) -> None:
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    check_traced(filled(AUTOENCODERS[kind]()), {"images": images})


def test_names_of_weights_are_those_of_a_network_that_is_not_compiled() -> None:
    network = filled(DiT(4, 16, 2, 2, context_dim=6))
    names = list(network.state_dict())
    compile_training(network, backend="eager")
    compile_sampling(network, backend="eager")
    record_cuda_graphs(network)
    assert list(network.state_dict()) == names


def test_training_is_compiled_and_what_has_no_gradients_runs_as_written() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    network = filled(DiT(4, 16, 3, 2, context_dim=6))
    inputs = inputs_of(network)
    expected = network(**inputs)
    compile_training(network, backend=backend)
    with torch.no_grad():
        assert torch.equal(network(**inputs), expected)
    assert not graphs
    assert torch.equal(network(**inputs), expected)
    assert len(graphs) == 1  # one graph for the three blocks, which are alike


def test_a_missing_compiler_is_said_with_the_option() -> None:
    from torch._inductor import config

    # Not by monkeypatch, which would leave the option out of torch's config for the tests that follow.
    with (
        config.patch({"cpp.cxx": (None, "/nothing/g++")}),
        pytest.raises(
            ValueError, match=r"diffusion\.compile needs a C\+\+ compiler on a CPU.*leave diffusion\.compile out"
        ),
    ):
        check_compiler("diffusion.compile", torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["a U-Net", "a transformer", "kl"])
def test_compiled_networks_compute_what_they_are_written_to(kind: str) -> None:
    if kind == "kl":
        images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).to(DEVICE)
        # The posterior mean, as compiled code draws other random numbers. (Training compiles encoder and decoder only.)
        inputs = {"images": images, "sample": False}
        return check_traced(
            filled(AUTOENCODERS[kind]()), inputs, "inductor", 1e-4, modes=(True,)
        )  # autoencoders are compiled only in training
    if kind == "a U-Net":  # with one level: more take minutes to compile
        network = filled(UNet(4, 16, (1,), 1, (0,), head_dim=8, context_dim=6))
    else:
        network = filled(instantiate(json.loads(small_tree(kind)), _convert_="all"))
    check_traced(network, inputs_of(network), "inductor", 1e-4)


@pytest.mark.slow
@pytest.mark.skipif(DEVICE.type != "cuda", reason="there are CUDA graphs on GPUs alone")
def test_replayed_kernels_leave_earlier_outputs_alone() -> None:
    torch.compiler.reset()
    network = filled(DiT(4, 16, 2, 2, context_dim=6)).eval()
    inputs = inputs_of(network)
    with torch.no_grad():
        steps = [
            inputs | {"context": network.projected(inputs["context"]), "timesteps": inputs["timesteps"] + k}
            for k in range(6)
        ]
        expected = [network(**step) for step in steps]
        record_cuda_graphs(network)
        drawn = [network(**step) for step in steps]
    for ours, written in zip(drawn, expected):
        torch.testing.assert_close(ours, written, rtol=1e-3, atol=1e-3)
