"""Checkpoints of CompVis/latent-diffusion load strictly, compute the same and are written back bit for bit."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from chains import composed
from diffusers import DDIMScheduler
from published_yaml import AUTOENCODERS, DIFFUSION, autoencoder_config, diffusion_config, of_one_architecture, tensors
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiers import tiered
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from ldm_train.checkpoints import compvis
from ldm_train.checkpoints.clip import read_clip_tokenizer, read_image_encoder, read_text_encoder
from ldm_train.checkpoints.compvis_describe import describe
from ldm_train.checkpoints.compvis_yaml import published
from ldm_train.checkpoints.native import load_latent_diffusion, load_model, read_metadata, save_model
from ldm_train.checkpoints.parts import build
from ldm_train.conditioning.text import read_tokenizer
from ldm_train.devices import shapes_only
from ldm_train.latent_diffusion import Sampling, Start
from ldm_train.pipeline.convert import convert
from ldm_train.samplers.ddim import ddim
from ldm_train.storage import read_config

State = dict[str, torch.Tensor]


def vocabulary(folder: Path, size: int = 40) -> Path:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"word{i}" for i in range(size - 4))]
    (folder / "vocab.txt").write_text("\n".join(words))
    return folder / "vocab.txt"


def checkpoint(folder: Path, model: dict[str, Any], suffix: str = ".ckpt") -> tuple[Path, State]:
    """Writes a checkpoint in the form of the released ones, with random weights and its YAML beside it; returns its
    path and tensors."""
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(shape, generator=generator) * 0.05 for name, shape in tensors(model).items()}
    if "scale_factor" in state:
        state["scale_factor"] = torch.tensor(0.7)
    path = folder / f"model{suffix}"
    path.with_suffix(".yaml").write_text(yaml.safe_dump({"model": model}))
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state, "global_step": 1, "epoch": 0}, path)
    return path, state


def clip_words(folder: Path) -> Path:
    """Writes a small CLIP tokenizer to folder/words; returns that folder."""
    words = ["<|startoftext|>", "<|endoftext|>", *(f"{c}{end}" for c in "acdegiort" for end in ("", "</w>"))]
    (folder / "words").mkdir()
    (folder / "words/vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / "words/merges.txt").write_text("#version: 0.2\n")
    return folder / "words"


def clip_of_text(folder: Path) -> Path:
    """Writes a small CLIP text model whose embeddings have 768 values, with its tokenizer; returns the folder."""
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 20,
    }
    torch.manual_seed(0)
    config = CLIPTextConfig(**sizes, projection_dim=768, bos_token_id=0, eos_token_id=1)
    CLIPTextModelWithProjection(config).save_pretrained(folder / "clip")
    read_clip_tokenizer(clip_words(folder)).save_pretrained(folder / "clip")
    return folder / "clip"


def converted(source: Path, target: Path, *options: str) -> Path:
    return convert(composed("convert", f"from={source}", f"to={target}", *options))


REPEATED = {"kl-f4", "kl-f4-z4", "kl-f16", "vq-f4", "vq-f8", *(n for n in AUTOENCODERS if n.startswith("autoencoder_"))}
# Models whose parts are all in other models too: these are converted as a whole only in the slow tier.
SEEN = of_one_architecture(DIFFUSION) | {
    "celeba256", "cin256-v2", "txt2img-1p4B-eval", "sd-v1-inpainting", "sd-v2-base", "sd-v2-inpainting", "sd-v2-unclip-h",
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "small"),
    [
        *((name, True) for name in (*AUTOENCODERS, *DIFFUSION) if name in SEEN | REPEATED),
        *(pytest.param(name, False, marks=pytest.mark.slow) for name in (*AUTOENCODERS, *DIFFUSION)),
    ],
)
def test_every_tensor_of_a_published_model_has_its_place(name: str, small: bool, tmp_path: Path):
    sizes = (32, 16) if small else ()
    model = autoencoder_config(name, *sizes) if name in AUTOENCODERS else diffusion_config(name, small)
    needs = {
        "labels": 601,
        "tokenizer": read_tokenizer(str(vocabulary(tmp_path, 40 if small else 30522))).to_str(),
        "statistics": "unit",
    }
    described = published({"model": model}, name, needs)
    theirs = tensors(model)
    with shapes_only():
        ours = build(described.tree, name)
    given = {k: torch.empty(shape, device="meta") for k, shape in theirs.items()}
    if name.startswith("sd-"):  # the text encoder is a model of transformers, which maps the names itself
        _, used, unused = read_text_encoder(given, tmp_path)
        assert small or len(used) == (196 if "v1" in name else 12 * 24 + 4)
        assert all("position_ids" in k or "text_projection" in k or "logit_scale" in k for k in unused)
        theirs = {k: shape for k, shape in theirs.items() if k not in used | set(unused)}
    if "unclip" in name:
        _, vision, used, unused = read_image_encoder(
            given, "OpenCLIP" in str(model["params"]["embedder_config"]), tmp_path
        )
        assert small or sum(p.numel() for p in vision.parameters()) == {"h": 632_076_800, "l": 303_966_208}[name[-1]]
        theirs = {k: shape for k, shape in theirs.items() if k not in used | set(unused)}
    for averaged in (False, True)[: 1 + (described.latent and described.uses_ema)]:
        left = dict(theirs)
        state = ours.state_dict()
        for key, place in compvis.places(ours, described, averaged).items():
            shapes = [left.pop(part) for part in place.theirs]
            rows = sum(shape[0] for shape in shapes)
            if shapes and key != "conditioners.class_label.embedding.weight":
                assert (rows, *shapes[0][1:]) == state[key].shape, key
        others = {part for place in compvis.places(ours, described, not averaged).values() for part in place.theirs}
        reasons = {part: compvis.left_out(part, described, others) for part in left if part != "scale_factor"}
        assert None not in reasons.values(), [part for part, reason in reasons.items() if reason is None]


@tiered("name", [pytest.param(n, marks=pytest.mark.slow if n in REPEATED else ()) for n in AUTOENCODERS])
def test_autoencoders_load_and_come_back_to_the_bit(name: str, tmp_path: Path):
    source, state = checkpoint(tmp_path, autoencoder_config(name, 32, 16), ".safetensors")
    folder = converted(source, tmp_path / "native", "verify=true")
    model, f = load_model(folder), 2 ** (len(AUTOENCODERS[name][0]) - 1)
    assert model.downsample_factor == f
    assert model(torch.zeros(1, 3, 2 * f, 2 * f), sample=False)[0].isfinite().all()
    again = load_file(converted(folder, tmp_path / "again.safetensors", "format=compvis", "verify=true"))
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], state[key]) for key in state)


CONDITIONS = {
    "class_label": torch.tensor([3]), "caption": ["word1 word2"], "segmentation": torch.zeros(1, 256, 256, dtype=torch.long),
    "boxes": [torch.tensor([[0.1, 0.1, 0.5, 0.5, 3.0]])],
}  # fmt: skip


@tiered("name", [pytest.param(n, marks=pytest.mark.slow) if n in SEEN else n for n in DIFFUSION])
def test_diffusion_models_load_sample_and_come_back_to_the_bit(name: str, tmp_path: Path):
    model = diffusion_config(name, small=True)
    source, state = checkpoint(tmp_path, model)
    words = clip_words(tmp_path) if name.startswith("sd-") else vocabulary(tmp_path)
    options = [f"text_encoder={clip_of_text(tmp_path)}"] if name.startswith("rdm") else []
    if name.endswith("unclip-l"):
        with pytest.raises(FileNotFoundError, match=r"speaks of ViT-L-14_stats.th; put it beside the checkpoint"):
            converted(source, tmp_path / "native", f"tokenizer={words}")
        torch.save((torch.arange(32.0)[None], torch.full((1, 32), 2.0)), tmp_path / "ViT-L-14_stats.th")
    folder = converted(source, tmp_path / "native", f"tokenizer={words}", "labels=100", *options)
    for name_in_folder in [n for n in ("words", "clip", "ViT-L-14_stats.th") if (tmp_path / n).exists()]:
        (tmp_path / name_in_folder).rename(tmp_path / f"moved_{name_in_folder}")  # the model has copies of its own
    latent = load_latent_diffusion(folder)
    latent.latent_size = (16, 16)
    f = latent.first_stage.downsample_factor
    conditions = CONDITIONS | {
        "lowres": torch.zeros(1, 3, 16, 16), "masked_image": torch.zeros(1, 4, 16 * f, 16 * f),
        "segmentation": torch.zeros(1, 16 * f, 16 * f, dtype=torch.long), "depth": torch.rand(1, 1, 16 * f, 16 * f),
        "reference": torch.rand(1, 3, 40, 40),
    }  # fmt: skip
    batch = {field: conditions[field] for field in latent.fields}
    images = latent.sample(batch, [0], Sampling(num_inference_steps=2))
    assert images.shape == (1, 3, 16 * f, 16 * f)
    assert images.isfinite().all()
    assert float(latent.first_stage.scale[0, 0]) == pytest.approx(
        float(state["scale_factor"])
        if model["params"].get("scale_by_std")
        else model["params"].get("scale_factor", 1.0)
    )
    again = load_file(converted(folder, tmp_path / "again.safetensors", "format=compvis", "verify=true"))
    averaged = model["params"].get("use_ema", True)
    for key, tensor in again.items():
        if key == "scale_factor":
            continue
        theirs = (
            f"model_ema.{key.removeprefix('model.').replace('.', '')}" if averaged and key.startswith("model.") else key
        )
        assert torch.equal(tensor, state[theirs]), key
    left = [k for k in state if k.startswith(("model.", "first_stage_model.")) and k not in again]
    assert not left
    if name.startswith("sd-"):
        unused = {k for k in state if k.startswith("cond_stage_model") and k not in again}
        assert all(k.endswith(("position_ids", "text_projection", "logit_scale")) for k in unused)
    if "unclip" in name:
        assert {k for k in state if k.startswith("embedder.model.visual.")} == {k for k in again if "embedder" in k}
        assert yaml.safe_load((tmp_path / "again.yaml").read_text())["model"]["target"] == model["target"]
    if name.endswith("unclip-l"):
        mean, std = torch.load(tmp_path / "again.clip_stats.th", weights_only=True)
        assert torch.equal(mean, torch.arange(32.0))
        assert torch.equal(std, torch.full((32,), 2.0))


def test_openclips_text_encoder_computes_what_it_did(tmp_path: Path):
    """Compares with open_clip's forward pass, rewritten with torch's attention: pre-norm blocks, GELU, causal mask, the
    last block left out."""
    model = diffusion_config("sd-v2-base", small=True)
    source, state = checkpoint(tmp_path, model)
    folder = converted(source, tmp_path / "native", f"tokenizer={clip_words(tmp_path)}")
    text = load_latent_diffusion(folder).conditioners["text"]
    assert text.path == str((folder / "text_encoder").resolve())
    tokens = [0, 2, 1, *[0] * 74]  # start, "a", end, and open_clip's padding
    assert text.pretrained()[0](["a"])["input_ids"][0][1] in (2, 3)
    tokens[1] = text.pretrained()[0](["a"])["input_ids"][0][1]
    own = {k.removeprefix("cond_stage_model.model."): v for k, v in state.items() if k.startswith("cond_stage_model.")}
    x = own["token_embedding.weight"][tokens][None] + own["positional_embedding"]
    mask = torch.full((77, 77), float("-inf")).triu(1)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, (64,), own[f"{name}.weight"], own[f"{name}.bias"])

    block = "transformer.resblocks.0"  # the first of two: the last is left out
    attention = torch.nn.MultiheadAttention(64, 1, batch_first=True)
    attention.load_state_dict(
        {k.removeprefix(f"{block}.attn."): v for k, v in own.items() if k.startswith(f"{block}.attn.")}
    )
    y = norm(x, f"{block}.ln_1")
    x = x + attention(y, y, y, attn_mask=mask, need_weights=False)[0]
    y = F.gelu(F.linear(norm(x, f"{block}.ln_2"), own[f"{block}.mlp.c_fc.weight"], own[f"{block}.mlp.c_fc.bias"]))
    x = x + F.linear(y, own[f"{block}.mlp.c_proj.weight"], own[f"{block}.mlp.c_proj.bias"])
    with torch.no_grad():
        torch.testing.assert_close(text.encode(["a"])[0], norm(x, "ln_final"), rtol=1e-4, atol=1e-5)


@tiered("kind", ["h", "l"], fast=1)
def test_unclips_encoder_of_pictures_computes_what_it_did(kind: str, tmp_path: Path):
    """Compares with open_clip's forward pass, rewritten with torch's attention: pre-norm blocks, GELU (L: its sigmoid
    approximation), class token. A config that names a folder outside the model is refused."""
    source, state = checkpoint(tmp_path, diffusion_config(f"sd-v2-unclip-{kind}", small=True))
    torch.save((torch.zeros(32), torch.ones(32)), tmp_path / "ViT-L-14_stats.th")
    folder = converted(source, tmp_path / "native", f"tokenizer={clip_words(tmp_path)}")
    image = load_latent_diffusion(folder).conditioners["image"]
    assert image.encoder.path == str((folder / "image_encoder").resolve())
    own = {k.removeprefix("embedder.model.visual."): v for k, v in state.items() if "visual." in k}
    pictures = torch.rand(2, 3, 32, 32) * 2 - 1
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (
        (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    ))  # fmt: skip
    x = F.conv2d(((pictures + 1) / 2 - mean) / std, own["conv1.weight"], stride=8).flatten(2).mT
    x = torch.cat([own["class_embedding"].expand(2, 1, -1), x], 1) + own["positional_embedding"]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, (64,), own[f"{name}.weight"], own[f"{name}.bias"])

    x = norm(x, "ln_pre")
    for n in range(2):
        block = f"transformer.resblocks.{n}"
        attention = torch.nn.MultiheadAttention(64, 1, batch_first=True)
        attention.load_state_dict(
            {k.removeprefix(f"{block}.attn."): v for k, v in own.items() if f"{block}.attn." in k}
        )
        y = norm(x, f"{block}.ln_1")
        x = x + attention(y, y, y, need_weights=False)[0]
        y = F.linear(norm(x, f"{block}.ln_2"), own[f"{block}.mlp.c_fc.weight"], own[f"{block}.mlp.c_fc.bias"])
        y = F.gelu(y) if kind == "h" else y * torch.sigmoid(1.702 * y)
        x = x + F.linear(y, own[f"{block}.mlp.c_proj.weight"], own[f"{block}.mlp.c_proj.bias"])
    with torch.no_grad():
        torch.testing.assert_close(
            image.embed(pictures)[:, 0], norm(x[:, 0], "ln_post") @ own["proj"], rtol=1e-4, atol=1e-5
        )
    changed = (folder / "config.yaml").read_text().replace("./image_encoder", "./../words")
    (folder / "config.yaml").write_text(changed)
    record = json.loads((folder / "metadata.json").read_text())
    (folder / "metadata.json").write_text(json.dumps({k: v for k, v in record.items() if k != "config_sha256"}))
    with pytest.raises(ValueError, match="words"):
        load_latent_diffusion(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd-v1", "sd-v2-v"])
def test_the_single_file_opens_in_diffusers_and_draws_the_same(name: str, tmp_path: Path):
    from diffusers import StableDiffusionPipeline

    model = diffusion_config(name, small=True)
    shallow = {"channel_mult": [1, 1, 1, 1], "num_res_blocks": 1}  # 128 is the least width with 32 groups in all norms
    model["params"]["unet_config"]["params"] |= shallow | {"model_channels": 128}
    dd = model["params"]["first_stage_config"]["params"]["ddconfig"]
    dd |= {"ch_mult": [1, 1, 1, 1], "num_res_blocks": 1, "ch": 128}
    source, _ = checkpoint(tmp_path, model)
    folder = converted(source, tmp_path / "native", f"tokenizer={clip_words(tmp_path)}")
    config = converted(
        folder, tmp_path / "config", "format=diffusers", "verify=true"
    )  # from_single_file needs it offline
    file = converted(folder, tmp_path / "one.safetensors", "format=single_file", "verify=true")
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata()["modelspec.architecture"] == f"stable-diffusion-{name[3:5]}"
        assert ("v_pred" in opened.keys()) == (name == "sd-v2-v")  # noqa: SIM118 - no mapping
    pipelines = [
        StableDiffusionPipeline.from_single_file(
            str(file), config=str(config), local_files_only=True, low_cpu_mem_usage=False
        ),
        StableDiffusionPipeline.from_pretrained(config, low_cpu_mem_usage=False),
    ]
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    options = {"num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "pt", "height": 64, "width": 64}
    theirs = [pipeline("a cat", latents=noise, **options).images for pipeline in pipelines]
    torch.testing.assert_close(*theirs, rtol=0, atol=1e-4)
    latent = load_latent_diffusion(folder)
    ours = latent.sample({"caption": ["a cat"]}, [0], Sampling(ddim, 3, 2.0, spacing="trailing"), Start(noise=noise))
    other = StableDiffusionPipeline.from_pretrained(config, low_cpu_mem_usage=False)
    other.scheduler = DDIMScheduler.from_config(
        other.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True
    )
    torch.testing.assert_close(other("a cat", latents=noise, **options).images * 2 - 1, ours, rtol=0, atol=1e-3)


def test_a_single_file_is_for_models_of_stable_diffusions_shape(tmp_path: Path):
    source, _ = checkpoint(tmp_path, diffusion_config("lsun_churches256", small=True))
    folder = converted(source, tmp_path / "native")
    with pytest.raises(ValueError, match="format=single_file is for models of Stable Diffusion's shape"):
        converted(folder, tmp_path / "one.safetensors", "format=single_file")
    source, _ = checkpoint(tmp_path, diffusion_config("sd-v1", small=True))
    with pytest.raises(
        ValueError, match=r"reads captions with CLIP's tokenizer; give tokenizer=<folder with vocab.json"
    ):
        converted(source, tmp_path / "other")
    folder = converted(source, tmp_path / "other", f"tokenizer={clip_words(tmp_path)}")
    with pytest.raises(ValueError, match=r"one.ckpt: a single file is one of .safetensors"):
        converted(folder, tmp_path / "one.ckpt", "format=single_file")


def test_older_attention_mixes_heads_otherwise_and_is_reordered():
    """QKVAttentionLegacy's rows, ordered (head, q | k | v, channel), become q of all heads, then k, v; and back."""
    heads, width = 4, 32
    x, weight = torch.randn(2, width, 5), torch.randn(3 * width, width)
    qkv = torch.einsum("oc,bcn->bon", weight, x)
    q, k, v = qkv.reshape(2 * heads, 3 * width // heads, 5).split(width // heads, dim=1)  # as in the published code
    ours = torch.einsum("oc,bcn->bon", compvis._to_ours(weight, heads), x)
    for theirs, part in zip((q, k, v), ours.chunk(3, dim=1)):
        assert torch.equal(part.reshape(2 * heads, width // heads, 5), theirs)
    assert torch.equal(compvis._to_older(compvis._to_ours(weight, heads), heads), weight)


class Evil:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.mark}",)


def changed(model: dict[str, Any], place: str, value: Any) -> dict[str, Any]:
    tree = yaml.safe_load(yaml.safe_dump(model))
    *sections, last = place.split(".")
    owner = tree
    for part in sections:
        owner = owner[part]
    owner[last] = value
    return tree


DAMAGE: dict[str, tuple[Callable[[State], Any], str]] = {
    "an unknown key": (lambda s: s | {"model.diffusion_model.extra": torch.zeros(2)}, "holds model.diffusion_model.extra"),
    "a missing key": (lambda s: {k: v for k, v in s.items() if "out.2.bias" not in k and "out2bias" not in k}, "lacks model"),
    "another shape": (lambda s: s | {"first_stage_model.quant_conv.weight": torch.zeros(3, 4, 1, 1)}, "quant_conv.weight has shape"),
    "whole numbers": (lambda s: s | {"first_stage_model.quant_conv.bias": torch.zeros(3, dtype=torch.long)}, "floating point"),
    "no averaged weights": (lambda s: {k: v for k, v in s.items() if "ema" not in k}, "holds no averaged weights"),
    "used codes": (lambda s: s | {"first_stage_model.quantize.used": torch.zeros(4)}, "holds first_stage_model.quantize.used"),
    "no tensors": (lambda s: {"a": 1}, "holds no state_dict"),
    "a list": (lambda s: [1], "holds no state_dict"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(name: str, tmp_path: Path):
    source, state = checkpoint(tmp_path, diffusion_config("celeba256", small=True))
    damage, words = DAMAGE[name]
    torch.save(damage(state), source)
    with pytest.raises(ValueError, match=words):
        converted(source, tmp_path / "native")
    assert not (tmp_path / "native").exists()


def test_files_that_run_code_or_end_early_are_refused(tmp_path: Path):
    source, _ = checkpoint(tmp_path, autoencoder_config("kl-f4", 32))
    whole = source.read_bytes()
    for data in (whole[: len(whole) // 2], b"", pickle.dumps(Evil(tmp_path / "mark"))):
        source.write_bytes(data)
        with pytest.raises(ValueError, match="without running code that it brings, or is damaged"):
            converted(source, tmp_path / "native")
    torch.save({"state_dict": {"a": Evil(tmp_path / "mark")}}, source)
    with pytest.raises(ValueError, match="without running code"):
        converted(source, tmp_path / "native")
    assert not (tmp_path / "mark").exists()
    assert not (tmp_path / "native").exists()


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        ("target", "os.system", "model.target is 'system'"),
        ("params.first_stage_config.target", "subprocess.Popen", "is of 'Popen'"),
        ("params.unet_config.params.dims", 3, "dims is 3; models with 2"),
        ("params.unet_config.params.surprise", 1, "surprise=1 is unknown"),
        ("params.unet_config.params.channel_mult", "many", "channel_mult is 'many'"),
        ("params.unet_config.params.model_channels", 10**9, "no option of a model is that large"),
        ("params.first_stage_config.params.ddconfig.attn_type", "linear", "attn_type is 'linear'"),
        ("params.first_stage_config.params.ddconfig.z_channels", None, "z_channels is None"),
        ("params.parameterization", "score", "parameterization is 'score'"),
        (
            "params.cond_stage_config",
            {"target": "a.FrozenT5Embedder"},
            "'FrozenT5Embedder' for 'image'; it cannot be converted yet",
        ),
        ("params", 5, "no section with options"),
    ],
)
def test_a_yaml_that_describes_another_model_is_refused_by_name(place: str, value: Any, words: str, tmp_path: Path):
    source, _ = checkpoint(tmp_path, diffusion_config("celeba256", small=True))
    model = changed(diffusion_config("celeba256", small=True), place, value)
    source.with_suffix(".yaml").write_text(yaml.safe_dump({"model": model}))
    with pytest.raises(ValueError, match=words):
        converted(source, tmp_path / "native")
    assert not (tmp_path / "native").exists()


def test_what_stage_1_trained_with_is_left_out_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source, state = checkpoint(tmp_path, autoencoder_config("kl-f4", 32))
    torch.save(state | {"loss.logvar": torch.zeros(()), "loss.discriminator.main.0.weight": torch.zeros(3)}, source)
    converted(source, tmp_path / "native")
    assert (
        "left out, only stage 1 trains with them: loss.logvar, loss.discriminator.main.0.weight"
        in capsys.readouterr().out
    )


def test_the_live_weights_are_taken_where_they_are_asked_for(tmp_path: Path):
    source, state = checkpoint(tmp_path, diffusion_config("celeba256", small=True))
    model = load_model(converted(source, tmp_path / "native", "weights=live"))
    assert torch.equal(model.state_dict()["network.out.2.bias"], state["model.diffusion_model.out.2.bias"])


def test_an_autoencoders_averaged_weights_are_taken_unless_the_live_ones_are_asked_for(tmp_path: Path):
    source, state = checkpoint(tmp_path, autoencoder_config("kl-f4", 32))
    averages = {f"model_ema.{name.replace('.', '')}": tensor + 1 for name, tensor in state.items()}
    counters = {"model_ema.decay": torch.tensor(0.9), "model_ema.lossdiscriminatormain0weight": torch.zeros(3)}
    torch.save({"state_dict": state | averages | counters}, source)
    name = "encoder.conv_in.weight"
    for option, wanted in (
        ((), state[name] + 1),
        (("weights=live",), state[name]),
        (("weights=averaged",), state[name] + 1),
    ):
        folder = converted(source, tmp_path / f"native{len(option)}{wanted.sum():.0f}", "overwrite=true", *option)
        assert torch.equal(load_model(folder).state_dict()[name], wanted), option
    torch.save({"state_dict": state}, source)
    with pytest.raises(ValueError, match=r"no averaged weights \(model_ema\.\*\), which weights=averaged asks for"):
        converted(source, tmp_path / "none", "weights=averaged")


@pytest.mark.parametrize("suffix", [".ckpt", ".bin"])
def test_a_changed_bit_is_found_by_its_checksum(suffix: str, tmp_path: Path):
    source, state = checkpoint(tmp_path, autoencoder_config("kl-f4", 32), suffix)
    data = bytearray(source.read_bytes())
    data[data.index(state["decoder.conv_out.weight"].numpy().tobytes()) + 5] ^= 1
    source.write_bytes(data)
    with pytest.raises(ValueError, match=r"is damaged \(.*the checksum of .* differs"):
        converted(source, tmp_path / "native")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("repo=me/x",), "repo= has an effect only with to=hub"),
        (("private=true",), "private= has an effect only with to=hub"),
        (("control=edges",), "control= says what the image of a ControlNetModel"),
        (("format=diffusers", "encoders=true"), "encoders= has an effect only with format=native"),
        (("labels=3",), r"labels= describes a checkpoint file .* is not one; leave it out"),
        (("weights=live",), r"weights= describes a checkpoint file"),
    ],
)
def test_options_without_effect_on_a_conversion_are_refused(options: tuple[str, ...], words: str, tmp_path: Path):
    source, _ = checkpoint(tmp_path, autoencoder_config("kl-f4", 32))
    folder = converted(source, tmp_path / "native")
    with pytest.raises(ValueError, match=words):
        converted(folder, tmp_path / "again", *options)
    assert not (tmp_path / "again").exists()


def test_models_of_captions_are_guided_as_published_and_others_are_not(tmp_path: Path):
    for name, scale, options in (("sd-v1", 7.5, (f"tokenizer={clip_words(tmp_path)}",)), ("celeba256", 1.0, ())):
        (tmp_path / name).mkdir()
        source, _ = checkpoint(tmp_path / name, diffusion_config(name, small=True))
        sampling = read_metadata(converted(source, tmp_path / name / "native", *options))["sampling"]
        assert sampling["guidance_scale"] == scale


def test_values_that_half_precision_cannot_hold_are_refused_in_text_encoders_too(tmp_path: Path):
    source, state = checkpoint(tmp_path, diffusion_config("sd-v1", small=True))
    name = next(key for key in state if key.startswith("cond_stage_model.") and key.endswith("q_proj.weight"))
    torch.save({"state_dict": state | {name: state[name] * 1e9}}, source)
    folder = converted(source, tmp_path / "native", f"tokenizer={clip_words(tmp_path)}")
    with pytest.raises(ValueError, match=r"values that are not finite in torch\.float16; choose another dtype"):
        converted(folder, tmp_path / "half.ckpt", "format=compvis", "dtype=float16")
    assert not (tmp_path / "half.ckpt").exists()


def test_parts_of_models_and_of_trainings_name_the_folder_to_give(tmp_path: Path):
    source, _ = checkpoint(tmp_path, autoencoder_config("kl-f4", 32))
    folder = converted(source, tmp_path / "native")
    with pytest.raises(FileNotFoundError, match=f"part of a model folder; give the folder: {folder}"):
        converted(folder / "model.safetensors", tmp_path / "again")
    training = tmp_path / "run" / "autoencoder" / "checkpoints"
    training.mkdir(parents=True)
    (training.parent / "stage.json").write_text("{}")
    source.rename(training / "last.ckpt")
    with pytest.raises(
        FileNotFoundError, match=f"checkpoint of a training, not a model; give the run: {tmp_path / 'run'}$"
    ):
        converted(training / "last.ckpt", tmp_path / "again")


def test_nothing_is_overwritten_or_written_in_a_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source, _ = checkpoint(tmp_path, autoencoder_config("kl-f4", 32))
    converted(source, tmp_path / "native", "dry_run=true")
    assert "a model folder" in capsys.readouterr().out
    assert not (tmp_path / "native").exists()
    converted(source, tmp_path / "native")
    with pytest.raises(FileExistsError, match="exists; choose another, or overwrite=true"):
        converted(source, tmp_path / "native")
    (tmp_path / "mine.yaml").write_text("mine: true")
    with pytest.raises(FileExistsError, match=r"mine\.yaml exists"):
        converted(tmp_path / "native", tmp_path / "mine.safetensors", "format=compvis")
    assert (tmp_path / "mine.yaml").read_text() == "mine: true"


def test_half_precision_keeps_the_scale_and_refuses_what_it_cannot_hold(tmp_path: Path):
    source, _ = checkpoint(tmp_path, diffusion_config("lsun_churches256", small=True))
    folder = converted(source, tmp_path / "native")
    half = load_file(converted(folder, tmp_path / "half.safetensors", "format=compvis", "dtype=float16", "verify=true"))
    assert half["scale_factor"] == torch.tensor(0.7)
    assert {tensor.dtype for name, tensor in half.items() if name != "scale_factor"} == {torch.float16}
    model = load_model(folder)
    model.network.out[2].bias.data[0] = 1e6
    save_model(tmp_path / "large", model, read_config(folder / "config.yaml"), {})
    with pytest.raises(ValueError, match=r"network\.out\.2\.bias has values that are not finite in torch\.float16"):
        converted(tmp_path / "large", tmp_path / "large.safetensors", "format=compvis", "dtype=float16")
    assert not (tmp_path / "large.safetensors").exists()


UNFIT: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a flow": (
        lambda t: t.update(
            schedule={"_target_": "ldm_train.diffusion.linear_flow.LinearFlow"},
            parameterisation={"_target_": "ldm_train.diffusion.flow_prediction.FlowPrediction"},
        ),
        "a LinearFlow has no form",
    ),
    "a prediction of ones own": (
        lambda t: t.update(parameterisation={"_target_": "mine.Score"}), "a mine.Score has no form in CompVis' code"
    ),
    "no attention in the middle": (
        lambda t: t["network"].update(mid_attention=False), "diffusion.network.mid_attention is False; a checkpoint of CompVis"
    ),
    "an end without signal": (
        lambda t: t["schedule"].update(zero_terminal_snr=True), "zero_terminal_snr is true, which CompVis' code does not know"
    ),
    "two conditions": (
        lambda t: t.update(conditioners={"a": {"_target_": "ldm_train.conditioning.spatial.DepthMap"}} | {"b": {
            "_target_": "ldm_train.conditioning.spatial.DepthMap"}}), "this model has the conditioners a, b"
    ),
    "a depth map": (
        lambda t: t.update(conditioners={"a": {"_target_": "ldm_train.conditioning.spatial.DepthMap"}}),
        "the conditioner a is a DepthMap",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNFIT)
def test_a_model_that_no_yaml_describes_is_refused_by_name(name: str):
    tree = published({"model": diffusion_config("celeba256", small=True)}, "x").tree
    change, words = UNFIT[name]
    change(tree)
    with pytest.raises(ValueError, match=words):
        describe(tree)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("to=x", "from=nothing.ckpt"), r"from=nothing\.ckpt: there is no such file"),
        (("to=x", "from=nowhere"), "is not a checkpoint"),
        (("to=x",), "from=null|from=None is not a path"),
        (("from=x", "to=y", "format=compvis"), "a checkpoint of CompVis is a file"),
        (("from=x", "to=y.safetensors"), "format=native is a folder; set format=compvis"),
        (("from=x", "to=y", "dtype=float16"), "dtype= is for other forms"),
        (("from=x", "to=y", "format=onnx"), "format is native, compvis, diffusers, single_file or kohya"),
    ],
)
def test_a_command_that_cannot_be_carried_out_says_why(options: tuple[str, ...], words: str):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        convert(composed("convert", *options))


def test_signs_of_velocity_and_zero_snr_are_heeded(tmp_path: Path):
    words = clip_words(tmp_path)
    source, state = checkpoint(tmp_path, diffusion_config("sd-v2-v", small=True))
    torch.save({"state_dict": state | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}}, source)
    model = load_latent_diffusion(converted(source, tmp_path / "native", f"tokenizer={words}"))
    assert model.schedule.zero_terminal_snr
    source, state = checkpoint(tmp_path, diffusion_config("sd-v2-base", small=True))
    torch.save({"state_dict": state | {"v_pred": torch.zeros(0)}}, source)
    with pytest.raises(
        ValueError, match=r"says that it predicts velocity \(v_pred\), .* says otherwise; give its own YAML"
    ):
        converted(source, tmp_path / "other", f"tokenizer={words}")


def test_a_single_file_has_stable_diffusions_noise(tmp_path: Path):
    model = diffusion_config("sd-v1", small=True)
    model["params"]["linear_end"] = 0.02
    source, _ = checkpoint(tmp_path, model)
    folder = converted(source, tmp_path / "native", f"tokenizer={clip_words(tmp_path)}")
    with pytest.raises(ValueError, match=r"know Stable Diffusion's noise only, this model's linear_end is 0.02"):
        converted(folder, tmp_path / "one.safetensors", "format=single_file")
