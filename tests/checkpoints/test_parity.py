"""Our networks and diffusers' with the same weights: equal outputs and gradients (within rounding), and weights that
come back bit for bit.

Small by default; `pytest tests/checkpoints/test_parity.py -m 'slow or not slow' -n 0 --full-size` takes the published
widths.
"""

import gc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from chains import composed
from omegaconf import OmegaConf
from torch import nn

from ldm_train.checkpoints import diffusers_describe as describe
from ldm_train.checkpoints import diffusers_export as export
from ldm_train.checkpoints.diffusers_networks import load_first_stage, load_unet
from ldm_train.checkpoints.parts import build, whole
from ldm_train.models.first_stage import FirstStage

UNETS = [
    "sd1", "sd2_base", "celebahq_f4", "text2img_f8", "imagenet_class_f4", "superres_bsr_f4", "semantic_landscapes_f4",
    "layout_openimages_f4",
]  # fmt: skip
AUTOENCODERS = ["kl_f4", "kl_f8", "kl_f16", "kl_f32", "vq_f4", "vq_f4_noattn", "vq_f8", "vq_f8_n256", "vq_f16"]
FAST = ("sd2_base", "celebahq_f4", "vq_f8")


def slow_but(names: list[str]) -> list[Any]:
    return [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.fixture
def full_size(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--full-size"))


def tree_of(option: str, *choices: str) -> dict[str, Any]:
    node = OmegaConf.select(composed("train", *choices), option)
    return whole(OmegaConf.to_container(node, resolve=True))


def randomised(module: nn.Module) -> nn.Module:
    """Halves all weights and adds small random numbers: zero-initialised layers would hide the layers before them."""
    generator = torch.Generator().manual_seed(1)
    for p in module.parameters():
        size = p[0].numel() ** -0.5 if p.ndim > 1 else 0.1
        p.data = p.data * 0.5 + torch.randn(p.shape, generator=generator) * 0.5 * size
    return module.eval()


def compare(outputs: list[torch.Tensor], ours: Mapping[str, torch.Tensor], theirs: nn.Module) -> None:
    """Fails unless outputs agree within 1e-5 of their largest value, and each tensor's gradients within 1e-4 of theirs
    (plus rounding)."""
    first, second = (output.detach() for output in outputs)
    assert (first - second).abs().max() <= 1e-5 * second.abs().max()
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    # The bias of keys has no effect, as softmax does not change under a shift: its gradient is only rounding.
    rounding = 1e-6 * max(float(g.abs().max()) for g in gradients.values())
    for name, gradient in gradients.items():
        error, size = float((ours[name] - gradient).abs().max()), float(gradient.abs().max())
        assert error <= 1e-4 * size + rounding, name


@pytest.mark.parametrize("name", slow_but(UNETS))
def test_unets_compute_what_diffusers_do(name: str, full_size: bool, tmp_path: Path):
    tree = tree_of("diffusion.network", f"experiment={name}") | {"activation_checkpointing": False}
    if not full_size:  # at 128 channels norms have 32 groups everywhere
        levels = [level for level in tree["attention_levels"] if level < 2] or tree["attention_levels"][:0]
        tree |= {"channels": 128, "channel_mult": [1, 2], "attention_levels": levels, "num_res_blocks": 1}
    ours, concat = randomised(build(tree, name)), tree["concat_channels"]
    kind, config = describe.unet_config(tree, ours, [16, 16])
    theirs = getattr(diffusers, kind)(**config).eval()
    tensors = export.unet_tensors(ours.state_dict(), tree["num_res_blocks"])
    theirs.load_state_dict(tensors)
    x, t = torch.randn(1, tree["in_channels"], 16, 16), torch.tensor([321])
    given = {"concat": torch.randn(1, concat, 16, 16)} if concat else {}
    if tree["context_dim"]:
        given["context"] = torch.randn(1, 5, tree["context_dim"])
    own = {"encoder_hidden_states": given["context"]} if "context" in given else {}
    outputs = [
        ours(x, t.float(), **given),
        theirs(torch.cat([x, *(v for k, v in given.items() if k == "concat")], 1), t, **own).sample,
    ]
    weights = torch.randn(outputs[0].shape)
    for output in outputs:
        (output * weights).sum().backward()
    gradients = {k: p.grad for k, p in ours.named_parameters() if p.grad is not None}
    compare(outputs, export.unet_tensors(gradients, tree["num_res_blocks"]), theirs)
    ours.zero_grad(), theirs.zero_grad()
    theirs.save_pretrained(tmp_path)
    state = theirs.state_dict()
    del theirs, outputs, gradients
    gc.collect()
    again, size = load_unet(tmp_path, tree["in_channels"], concat)
    assert size == [16, 16]
    assert all(torch.equal(v, ours.state_dict()[k]) for k, v in again.state_dict().items())
    back = export.unet_tensors(again.state_dict(), tree["num_res_blocks"])
    assert back.keys() == state.keys()
    assert all(torch.equal(back[k], state[k]) for k in state)


@pytest.mark.parametrize("name", slow_but(AUTOENCODERS))
def test_autoencoders_compute_what_diffusers_do(name: str, full_size: bool, tmp_path: Path):
    tree = tree_of("autoencoder.network", f"autoencoder={name}")
    if not full_size:
        tree |= {"num_res_blocks": 1}
    ours, f = randomised(build(tree, name)), 2 ** (len(tree["channel_mult"]) - 1)
    part = export.autoencoder(tree, FirstStage(ours, 0.5))
    ours.requires_grad_(True)
    theirs = getattr(diffusers, part.kind)(**part.config).eval()
    theirs.load_state_dict(part.tensors)
    images = torch.rand(1, 3, 2 * f, 2 * f) * 2 - 1
    moments = ours.encode_moments(images)
    encoded = theirs.encode(images)
    kl = hasattr(encoded, "latent_dist")
    z = moments.chunk(2, dim=1)[0] if kl else moments
    outputs = [moments, encoded.latent_dist.parameters if kl else encoded.latents]
    assert (outputs[0] - outputs[1]).abs().max() <= 1e-5 * outputs[1].abs().max()
    latents = z.detach().requires_grad_()
    pictures = [ours.decode(latents), theirs.decode(latents).sample]
    weights = [torch.randn_like(outputs[0]), torch.randn_like(pictures[0])]
    for output, picture in zip(outputs, pictures):
        ((output * weights[0]).sum() + (picture * weights[1]).sum()).backward()
    gradients = {k: p.grad for k, p in ours.named_parameters() if p.grad is not None and not k.startswith("quantize")}
    named = export.autoencoder_tensors(gradients, len(tree["channel_mult"]))
    for p in [p for k, p in theirs.named_parameters() if k.startswith("quantize")]:
        p.grad = None  # diffusers' codebook also gets gradients from the decoder's input
    compare(pictures, named, theirs)
    theirs.save_pretrained(tmp_path)
    again = load_first_stage(tmp_path)
    assert again.one_scale == 0.5
    assert all(torch.equal(v, ours.state_dict()[k]) for k, v in again.autoencoder.state_dict().items())
