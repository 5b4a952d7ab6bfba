"""Adapters as files: reads and writes our folder and the layouts of diffusers/PEFT and of kohya."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_diffusers import randomised, text_pipeline
from test_diffusers_export import TREES
from tiers import tiered

import ldm_train
from ldm_train.checkpoints.adapters import LAYOUTS, export_adapter, find_adapter, read_adapter, save_adapter
from ldm_train.checkpoints.diffusers_export import unet_tensors
from ldm_train.checkpoints.parts import build
from ldm_train.latent_diffusion import LatentDiffusion, Sampling, Start
from ldm_train.models import lora
from ldm_train.models.lora import LoRA
from ldm_train.models.unet import UNet
from ldm_train.samplers.ddim import ddim

__all__ = ["text_pipeline"]  # a fixture


def model(name: str = "classes and captions") -> LatentDiffusion:
    torch.manual_seed(0)
    return randomised(build(TREES[name], "here"))


def adapted(how: LoRA, name: str = "classes and captions") -> LatentDiffusion:
    made = model(name)
    made.adapt(how, "adapter")
    randomised(made.adapter)
    return made


@torch.no_grad()
def difference(first: LatentDiffusion, second: LatentDiffusion) -> float:
    weights = [dict(m.merge_adapters() and m.network.state_dict()) for m in (first, second)]
    return max(float((weights[0][key] - weights[1][key]).abs().max()) for key in weights[0])


@pytest.mark.parametrize("targets", ["attention", "all"])
@pytest.mark.parametrize("layout", [None, *LAYOUTS])
@tiered("name", ["classes and captions", "nothing"], fast=1)
def test_an_adapter_comes_back_from_its_file(layout: str | None, targets: str, name: str, tmp_path: Path) -> None:
    first, second = adapted(LoRA(rank=2, alpha=3, targets=targets), name), model(name)
    pairs = lora.pairs_of(first.parts(), "adapter")
    if layout is None:
        path = tmp_path / "adapter"
        save_adapter(path, first.parts(), "adapter", {})
    else:
        path = tmp_path / "adapter.safetensors"
        assert export_adapter(pairs, first, path, layout) == []
    read, left = read_adapter(path, second)
    assert left == []
    lora.attach(second.parts(), read, "read")
    assert difference(first, second) < 1e-6


def test_kohyas_file_has_its_names_and_alphas(tmp_path: Path) -> None:
    made = adapted(LoRA(rank=2, alpha=3))
    export_adapter(lora.pairs_of(made.parts(), "adapter"), made, tmp_path / "k.safetensors", "kohya")
    tensors = load_file(tmp_path / "k.safetensors")
    layer = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    assert tensors[f"{layer}.lora_down.weight"].shape == (2, 64)
    assert tensors[f"{layer}.lora_up.weight"].shape == (64, 2)
    assert float(tensors[f"{layer}.alpha"]) == 3


@pytest.mark.parametrize(
    ("down", "up"),
    [
        ("mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.down.weight", "up.weight"),
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_linear_layer.down.weight", "up.weight"),
    ],
)
def test_files_of_earlier_versions_of_diffusers_are_read(down: str, up: str, tmp_path: Path) -> None:
    """With the integer alphas that its conversion for kohya writes."""
    weights = torch.randn(2, 64), torch.randn(64, 2)
    made = dict(zip((down, down.replace("down.weight", up)), weights))
    save_file(made, tmp_path / "a.safetensors")
    ((key, pair),) = read_adapter(tmp_path / "a.safetensors", model())[0].items()
    assert key == "network.middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    torch.testing.assert_close(pair(), weights[1] @ weights[0])
    layer = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    kohya = {f"{layer}.lora_{k}.weight": v for k, v in zip(("down", "up"), weights)}
    save_file(kohya | {f"{layer}.alpha": torch.tensor(2)}, tmp_path / "b.safetensors")
    ((_, again),) = read_adapter(tmp_path / "b.safetensors", model())[0].items()
    torch.testing.assert_close(again(), pair())
    save_file({k: v.int() for k, v in kohya.items()}, tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match=r"holds torch\.int32, not floating-point values"):
        read_adapter(tmp_path / "c.safetensors", model())


def test_a_file_in_the_names_of_compvis_is_read(tmp_path: Path) -> None:
    layer = "lora_unet_middle_block_1_transformer_blocks_0_attn2_to_out_0"
    down, up = torch.randn(2, 64), torch.randn(64, 2)
    save_file({f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up}, tmp_path / "a.safetensors")
    ((key, pair),) = read_adapter(tmp_path / "a.safetensors", model())[0].items()
    assert key == "network.middle_block.1.transformer_blocks.0.attn2.to_out.0.weight"
    torch.testing.assert_close(pair(), up @ down)


def test_layers_of_lower_rank_are_scaled_alike_in_every_version_of_diffusers(tmp_path: Path) -> None:
    """Older versions take one rank and one alpha for the whole file."""
    made = adapted(LoRA(rank=8, targets="all"))
    pairs = lora.pairs_of(made.parts(), "adapter")
    for pair in pairs.values():
        torch.nn.init.normal_(pair.up)
    assert len({pair.rank for pair in pairs.values()}) > 1
    export_adapter(pairs, made, tmp_path / "a.safetensors", "diffusers")
    tensors = load_file(tmp_path / "a.safetensors")
    assert {len(tensor) for name, tensor in tensors.items() if name.endswith("lora_A.weight")} == {8}
    assert {tensor.shape[1] for name, tensor in tensors.items() if name.endswith("lora_B.weight")} == {8}
    again, left = read_adapter(tmp_path / "a.safetensors", model())
    assert left == []
    assert again.keys() == pairs.keys()
    for key, pair in again.items():
        torch.testing.assert_close(pair(), pairs[key](), msg=key)


def test_layers_of_a_text_encoder_are_left_out_in_words(tmp_path: Path) -> None:
    made = adapted(LoRA(rank=2))
    export_adapter(lora.pairs_of(made.parts(), "adapter"), made, tmp_path / "a.safetensors", "kohya")
    tensors = load_file(tmp_path / "a.safetensors")
    te = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    tensors |= {f"{te}.lora_down.weight": torch.ones(1, 4), f"{te}.lora_up.weight": torch.ones(4, 1)}
    save_file(tensors, tmp_path / "a.safetensors")
    assert read_adapter(tmp_path / "a.safetensors", model())[1] == ["1 layers of text encoders"]


def damaged(kind: str, path: Path) -> str:
    """Damages an adapter's file; returns the words that the error message must contain."""
    tensors = load_file(path)
    first = next(key for key in tensors if key.endswith("lora_A.weight"))
    if kind == "not finite":
        tensors[first][0, 0] = torch.inf
        said = "not finite"
    elif kind == "half a pair":
        del tensors[first]
        said = "has no down"
    elif kind == "another architecture":
        tensors = {key.replace("mid_block", "mid_blocks"): value for key, value in tensors.items()}
        said = "of another architecture"
    elif kind == "no product":
        tensors[first] = torch.randn(5, 64)
        said = "give no product"
    elif kind == "another method":
        tensors["unet.conv_in.hada_w1_a"] = torch.ones(2, 2)
        said = "not part of a LoRA"
    else:
        path.write_bytes(path.read_bytes()[:-100])
        return "not a file of weights"
    save_file(tensors, path)
    return said


@pytest.mark.parametrize(
    "kind", ["not finite", "half a pair", "another architecture", "no product", "another method", "cut off"]
)
def test_a_damaged_file_is_named(kind: str, tmp_path: Path) -> None:
    made, path = adapted(LoRA(rank=2)), tmp_path / "a.safetensors"
    export_adapter(lora.pairs_of(made.parts(), "adapter"), made, path, "diffusers")
    said = damaged(kind, path)
    with pytest.raises(ValueError, match=said) as error:
        read_adapter(path, model())
    assert str(path) in str(error.value)


def test_a_changed_folder_is_named(tmp_path: Path) -> None:
    made = adapted(LoRA(rank=2))
    save_adapter(tmp_path, made.parts(), "adapter", {})
    record = json.loads((tmp_path / "adapter.json").read_text())
    (tmp_path / "adapter.json").write_text(json.dumps(record | {"alpha": {}}))
    with pytest.raises(ValueError, match="records no alpha of"):
        read_adapter(tmp_path, model())
    (tmp_path / "adapter.json").write_text(json.dumps(record | {"sha256": "0"}))
    with pytest.raises(ValueError, match="is damaged"):
        read_adapter(tmp_path, model())


def test_an_adapter_that_is_nowhere_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="adapters: subject is not a run that trained an adapter"):
        find_adapter("subject", tmp_path)


def pair_of_unets() -> tuple[UNet2DConditionModel, LatentDiffusion]:
    """(diffusers' U-Net, a model of ours), with the same weights in both networks."""
    options = {"channels": 128, "channel_mult": [1, 2], "num_res_blocks": 1, "attention_levels": [1], "head_dim": 16}
    whole = build(TREES["classes and captions"], "here")
    whole.network = randomised(UNet(4, context_dim=16, **options)).eval()
    theirs = UNet2DConditionModel(
        in_channels=4, out_channels=4, block_out_channels=(128, 256), layers_per_block=1, cross_attention_dim=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(8, 16),
    )  # fmt: skip
    theirs.load_state_dict(unet_tensors(whole.network.state_dict(), 1))
    return theirs.eval(), whole


@torch.no_grad()
def test_diffusers_own_unet_takes_the_file(tmp_path: Path) -> None:
    """diffusers' own U-Net with the same weights computes the same, also with the adapter loaded through PEFT."""
    theirs, whole = pair_of_unets()
    network = whole.network
    x, times, context = torch.randn(1, 4, 8, 8), torch.tensor([10]), torch.randn(1, 3, 16)
    torch.testing.assert_close(theirs(x, times, context).sample, network(x, times, context), atol=1e-4, rtol=1e-4)
    whole.adapt(LoRA(rank=2, alpha=3, targets="all"), "adapter")
    randomised(whole.adapter)
    export_adapter(lora.pairs_of(whole.parts(), "adapter"), whole, tmp_path / "a.safetensors", "diffusers")
    assert (theirs(x, times, context).sample - network(x, times, context)).abs().max() > 1e-2
    theirs.load_lora_adapter(load_file(tmp_path / "a.safetensors"), prefix="unet")
    torch.testing.assert_close(theirs(x, times, context).sample, network(x, times, context), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ({"to_q.alpha": torch.zeros(0)}, "the alpha of .* is not a number"),
        (
            {"to_q.lora_down.weight": torch.randn(2, 16), "to_q.lora_up.weight": torch.randn(16, 2)},
            "another architecture",
        ),
        ({"to_q.lora_down.weight": torch.tensor(1.0)}, "give no product"),
        ({"to_q.lora_up.weight": torch.randn(64, 2, 3, 3)}, "give no product"),
    ],
)
def test_layers_that_do_not_fit_are_named(layers: dict[str, torch.Tensor], said: str, tmp_path: Path) -> None:
    """Layers of attention without a context, whose queries, keys and values are one weight in our networks."""
    prefix = "lora_unet_mid_block_attentions_0_"
    tensors = {f"{prefix}{k}": v for k, v in layers.items()}
    for part in ("to_q", "to_k"):
        tensors = {f"{prefix}{part}.lora_down.weight": torch.randn(2, 64),
                   f"{prefix}{part}.lora_up.weight": torch.randn(64, 2)} | tensors  # fmt: skip
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=said):
        read_adapter(tmp_path / "a.safetensors", model("nothing"))


def test_a_layer_under_two_names_is_refused(tmp_path: Path) -> None:
    made, path = adapted(LoRA(rank=2)), tmp_path / "a.safetensors"
    export_adapter(lora.pairs_of(made.parts(), "adapter"), made, path, "diffusers")
    tensors = load_file(path)
    name = next(key for key in tensors if key.endswith("lora_A.weight")).removesuffix(".lora_A.weight")
    other = f"lora_unet_{name.removeprefix('unet.').replace('.', '_')}"
    tensors |= {f"{other}.lora_down.weight": torch.ones(2, 64), f"{other}.lora_up.weight": torch.ones(64, 2)}
    save_file(tensors, path)
    with pytest.raises(ValueError, match="twice, under two names"):
        read_adapter(path, model())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_adapter_of_a_frozen_text_encoder_draws_in_diffusers_what_we_draw(
    layout: str, text_pipeline: Callable, tmp_path: Path
) -> None:
    """The file of an adapter (random weights) is loaded by diffusers' `load_lora_weights` and by our own model."""
    folder, _ = text_pipeline("1")
    first, fresh, path = ldm_train.load(str(folder)), ldm_train.load(str(folder)), tmp_path / "a.safetensors"
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    drawing = {"caption": ["a red dog", "cat"]}, [0, 1], Sampling(ddim, 4, 3.0), Start(noise=noise)
    plain = first.sample(*drawing)
    for conditioner in first.conditioners.values():
        conditioner.require()
    first.adapt(LoRA(rank=2, alpha=3, targets="attention", text_encoder=True), "adapter")
    randomised(first.adapter)
    pairs = lora.pairs_of(first.adaptable(), "adapter")
    of_text = {key for key in pairs if key.startswith("encoders.text.")}
    assert len(of_text) == 8  # queries, keys, values and outputs of two layers
    assert export_adapter(pairs, first, path, layout) == []
    first.merge_adapters()
    ours = first.sample(*drawing)
    read, left = read_adapter(path, fresh)
    assert (left, read.keys()) == ([], pairs.keys())
    lora.attach(fresh.adaptable(), {key: read[key] for key in of_text}, "of text alone")
    fresh.merge_adapters()
    half = fresh.sample(*drawing)
    assert (half - plain).abs().max() > 0.02
    lora.attach(fresh.adaptable(), {key: pair for key, pair in read.items() if key not in of_text}, "the rest")
    fresh.merge_adapters()
    torch.testing.assert_close(fresh.sample(*drawing), ours, rtol=0, atol=1e-3)
    pipeline = StableDiffusionPipeline.from_pretrained(folder, low_cpu_mem_usage=False)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(str(tmp_path), weight_name=path.name)
    theirs = pipeline(["a red dog", "cat"], latents=noise, num_inference_steps=4, guidance_scale=3.0, output_type="pt")
    torch.testing.assert_close(ours, theirs.images * 2 - 1, rtol=1e-3, atol=2e-3)


@torch.no_grad()
@pytest.mark.parametrize(
    "settings", [{}, {"use_rslora": True}, {"alpha_pattern": {"to_q": 3, "attn1.to_v": 1}}], ids=str
)
@pytest.mark.parametrize("place", ["header", "adapter_config.json"])
def test_the_alphas_of_pefts_settings_are_taken(settings: dict[str, Any], place: str, tmp_path: Path) -> None:
    """lora_alpha is not a tensor of the file: diffusers writes it to the header, PEFT to a file beside it."""
    theirs, whole = pair_of_unets()
    x, times, context = torch.randn(1, 4, 8, 8), torch.tensor([10]), torch.randn(1, 3, 16)
    names = ["to_q", "to_k", "to_v", "to_out.0"]
    theirs.add_adapter(LoraConfig(r=4, lora_alpha=16, init_lora_weights=False, target_modules=names, **settings))
    theirs.save_lora_adapter(tmp_path, weight_name="adapter_model.safetensors")
    file = tmp_path / "adapter_model.safetensors"
    if place != "header":
        with safe_open(file, "pt") as saved:
            (tmp_path / place).write_text(saved.metadata()["lora_adapter_metadata"])
        save_file(load_file(file), file)
    pairs, left = read_adapter(file, whole)
    lora.attach(whole.adaptable(), pairs, "theirs")
    assert left == []
    torch.testing.assert_close(whole.network(x, times, context), theirs(x, times, context).sample, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("{", "the LoRA settings of .* cannot be read"),
        ("[]", "cannot be read"),
        ('{"use_dora": true}', "is a DoRA"),
        ('{"lora_alpha": "16"}', "the alpha of .*to_q is '16'"),
        ('{"lora_alpha": 1e999}', "the alpha of .*to_q is inf"),
        ('{"lora_alpha": 4, "alpha_pattern": {"(a+)+b": 2}}', "more than names of layers"),
    ],
)
def test_settings_that_cannot_be_followed_are_named(settings: str, said: str, tmp_path: Path) -> None:
    layer = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {f"{layer}.lora_A.weight": torch.randn(2, 64), f"{layer}.lora_B.weight": torch.randn(64, 2)}
    save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": settings})
    with pytest.raises(ValueError, match=said):
        read_adapter(tmp_path / "a.safetensors", model())
