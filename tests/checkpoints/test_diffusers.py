"""Pipelines in folders of diffusers: loaded by us, they draw what diffusers draws."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from chains import tokenizer
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    LDMPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers import VQModel as Quantised
from safetensors.torch import load, load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

import ldm_train
from ldm_train.checkpoints.diffusers import diffusers_metadata, load_diffusers
from ldm_train.checkpoints.native import find_model, model_metadata
from ldm_train.latent_diffusion import Sampling, Start
from ldm_train.samplers.ddim import ddim

SCHEDULER = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False,
    "set_alpha_to_one": True, "timestep_spacing": "trailing",
}  # fmt: skip
TRUNK = {"norm_num_groups": 32, "block_out_channels": (128, 256), "layers_per_block": 1}


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    """Makes every matrix and kernel random with small values: zero-initialised layers would hide those before."""
    generator = torch.Generator().manual_seed(1)
    for p in module.parameters():
        if p.ndim > 1:
            p.data = torch.randn(p.shape, generator=generator) * (0.5 / p[0].numel() ** 0.5)
    return module.eval()


def autoencoder(kind: type) -> torch.nn.Module:
    extra = {"num_vq_embeddings": 32, "vq_embed_dim": 4} if kind is Quantised else {}
    return randomised(
        kind(
            down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2, latent_channels=4,
            scaling_factor=0.3, **TRUNK, **extra,
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def text_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, StableDiffusionPipeline]]:
    made: dict[str, tuple[Path, StableDiffusionPipeline]] = {}

    def build(version: str) -> tuple[Path, StableDiffusionPipeline]:
        if version not in made:
            torch.manual_seed(0)
            folder = tmp_path_factory.mktemp("sd")
            shape = (
                {"attention_head_dim": 4}
                if version == "1"
                else {"attention_head_dim": [2, 4], "use_linear_projection": True}
            )
            unet = UNet2DConditionModel(
                sample_size=8, in_channels=4, out_channels=4, cross_attention_dim=32,
                down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"], up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
                **TRUNK, **shape,
            )  # fmt: skip
            words = tokenizer(folder)
            text = CLIPTextModel(
                CLIPTextConfig(
                    vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                    max_position_embeddings=16, bos_token_id=0, eos_token_id=1, pad_token_id=1,
                )
            )  # fmt: skip
            prediction = "epsilon" if version == "1" else "v_prediction"
            pipeline = StableDiffusionPipeline(
                autoencoder(AutoencoderKL), text.eval(), words, randomised(unet),
                DDIMScheduler(prediction_type=prediction, **SCHEDULER), None, None, requires_safety_checker=False,
            )  # fmt: skip
            pipeline.set_progress_bar_config(disable=True)
            pipeline.save_pretrained(folder / "model")
            made[version] = (folder / "model", pipeline)
        return made[version]

    return build


@pytest.mark.parametrize("version", ["1", "2"])
def test_a_text_pipeline_draws_what_diffusers_draws(version: str, text_pipeline: Callable) -> None:
    folder, pipeline = text_pipeline(version)
    model = ldm_train.load(str(folder))
    assert model.sampling.guidance_scale == 7.5
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    captions = ["a red dog", "cat"]
    theirs = (
        pipeline(captions, latents=noise, num_inference_steps=4, guidance_scale=3.0, output_type="pt").images * 2 - 1
    )
    ours = model.sample({"caption": captions}, [0, 1], Sampling(ddim, 4, 3.0), Start(noise=noise))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-3)
    other = model.sample({"caption": ["cat", "a red dog"]}, [0, 1], Sampling(ddim, 4, 3.0), Start(noise=noise))
    assert (other - ours).abs().max() > 0.01


def test_an_unconditional_pipeline_draws_what_diffusers_draws(tmp_path: Path) -> None:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=4, out_channels=4, down_block_types=["DownBlock2D", "AttnDownBlock2D"],
        up_block_types=["AttnUpBlock2D", "UpBlock2D"], attention_head_dim=32, **TRUNK,
    )  # fmt: skip
    pipeline = LDMPipeline(autoencoder(Quantised), randomised(unet), DDIMScheduler(**SCHEDULER))
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(tmp_path)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    theirs = pipeline(generator=torch.Generator().manual_seed(3), num_inference_steps=4, output_type="np").images
    ours = ldm_train.load(str(tmp_path)).sample({}, [0], Sampling(ddim, 4, 1.0), Start(noise=noise))
    torch.testing.assert_close(ours, torch.from_numpy(theirs).permute(0, 3, 1, 2) * 2 - 1, rtol=1e-3, atol=5e-3)


def test_the_folder_is_a_model_like_any_other(text_pipeline: Callable, tmp_path: Path) -> None:
    folder, _ = text_pipeline("1")
    assert find_model(folder) == folder
    assert len(model_metadata(folder)["sha256"]) == 64


@pytest.fixture
def copy(text_pipeline: Callable, tmp_path: Path) -> Path:
    """A copy of the pipeline's folder, to be damaged. Its files are hard links: replace them, never write into them."""
    return Path(shutil.copytree(text_pipeline("1")[0], tmp_path / "model", copy_function=os.link))


def replace(path: Path, content: str | bytes) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def change(path: Path, **options: Any) -> None:
    replace(path, json.dumps(json.loads(path.read_text()) | options))


@pytest.mark.parametrize(
    ("file", "options", "message"),
    [
        (
            "unet/config.json",
            {"class_embed_type": "timestep"},
            r"class_embed_type='timestep'; models with class_embed_type=None can be",
        ),
        ("unet/config.json", {"norm_num_groups": 16}, "norm_num_groups=16 at width 128"),
        ("unet/config.json", {"in_channels": 9}, "in_channels=9, the latents have 4 channels: depth and x4 upsc"),
        ("unet/config.json", {"layers_per_block": 2}, r"unet lacks down_blocks"),
        ("unet/config.json", {"block_out_channels": [2**14, 2**14]}, r"unet: .* has shape \(512, 128\)"),
        ("text_encoder/config.json", {"hidden_size": 48}, "hidden_size=48; models with hidden_size=32, as the U-Net"),
        ("vae/config.json", {"shift_factor": 0.1}, "shift_factor=0.1"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "exp"}, "beta_schedule='exp'"),
        ("text_encoder/config.json", {"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000; models with"),
        ("text_encoder/config.json", {"num_hidden_layers": 3}, "are not a CLIP text encoder .the encoder lacks"),
        ("text_encoder/config.json", {"vocab_size": 2**20}, "are not a CLIP text encoder"),
        ("text_encoder/config.json", {"model_type": "bert"}, "model_type='bert'"),
        ("tokenizer/tokenizer_config.json", {"vocab_file": "/etc/hostname"}, "tokenizer_config.json has vocab_file="),
        (
            "tokenizer/tokenizer_config.json",
            {"fast_tokenizer_files": ["../x"]},
            "config.json has fast_tokenizer_files=",
        ),
        ("tokenizer/tokenizer_config.json", {"pad_token": 7}, "are not a CLIP text encoder"),
        (
            "model_index.json",
            {"_class_name": "StableDiffusionXLPipeline"},
            "index.json is for 'StableDiffusionXLPipeline'",
        ),
        ("model_index.json", {"_class_name": ["pipeline", "Mine"]}, r"model_index.json is for \['pipeline', 'Mine'\]"),
        ("model_index.json", {"unet": None}, "names no unet; it is not a latent diffusion pipeline"),
        ("model_index.json", {"unet": []}, "names no unet"),
        (
            "model_index.json",
            {"unet": ["hostile", "UNet2DConditionModel"]},
            "takes its unet from 'hostile'; diffusers' own",
        ),
        (
            "model_index.json",
            {"tokenizer": ["hostile", "CLIPTokenizer"]},
            "takes its tokenizer from 'hostile'; transformers'",
        ),
    ],
)
def test_what_cannot_be_loaded_is_named(file: str, options: dict, message: str, copy: Path) -> None:
    (copy / "hostile.py").write_text("raise SystemExit('the folder was run')")
    change(copy / file, **options)
    with pytest.raises(ValueError, match=message):
        ldm_train.load(str(copy))


JSON_FILES = ("model_index.json", "unet/config.json", "vae/config.json", "scheduler/scheduler_config.json", "text_encoder/config.json",
              "tokenizer/tokenizer_config.json")  # fmt: skip
NO_JSON = ("", "{", "[1]", "7", '"x"', "null", "[" * 100_000, "1" * 5000, b"\xff\xfe{")


@pytest.mark.parametrize(
    ("file", "content"),
    [  # in the fast tier: every content in one file, and a third of them in each other file
        pytest.param(file, content, marks=() if file == "unet/config.json" or (i + j) % 3 == 0 else pytest.mark.slow)
        for i, file in enumerate(JSON_FILES)
        for j, content in enumerate(NO_JSON)
    ],
)
def test_a_json_file_that_is_none_is_named(file: str, content: str | bytes, copy: Path) -> None:
    replace(copy / file, content)
    with pytest.raises(ValueError, match=rf"{file} is not a JSON file(: | \(.*\); take an undamaged copy)"):
        load_diffusers(copy)
    (copy / file).unlink()
    with pytest.raises(FileNotFoundError, match=f"{file} is missing; take a whole copy"):
        load_diffusers(copy)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_weights_that_cannot_be_read_are_named(part: str, copy: Path) -> None:
    path = next((copy / part).glob("*.safetensors"))
    whole = path.read_bytes()
    for content in (b"", whole[:7], whole[:100], whole[:-5], b"\xff" * 100):
        replace(path, content)
        with pytest.raises(
            ValueError, match=rf"{part}/{path.name} cannot be read \(.*\); download it again, as .safetensors"
        ):
            load_diffusers(copy)
    if part != "text_encoder":
        save_file({k: v.int() for k, v in load(whole).items()}, path)
        with pytest.raises(ValueError, match=rf"{part}: .* floating point"):
            load_diffusers(copy)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"{part} holds no weights"):
        load_diffusers(copy)


class Hostile:
    def __reduce__(self) -> tuple:
        return Path.touch, (Path("the folder was run"),)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_pickles_are_read_without_code_or_refused(
    part: str, copy: Path, text_pipeline: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = next((copy / part).glob("*.safetensors"))
    pickle = path.with_name("pytorch_model.bin" if part == "text_encoder" else f"{path.stem}.bin")
    weights = load_file(path)
    path.unlink()
    for content in ({"a": Hostile()}, Hostile(), [1], {"a": 1}, {1: torch.zeros(1)}):
        torch.save(content, pickle)
        with pytest.raises(
            ValueError, match=rf"{pickle.name} cannot be read \(.*\); download it again, as .safetensors"
        ):
            load_diffusers(copy)
    assert not Path("the folder was run").exists()
    pickle.unlink()
    torch.save(weights, pickle)
    load_diffusers(copy)


@pytest.mark.parametrize(
    "names", [{"a": "../../vae/diffusion_pytorch_model.safetensors"}, {"a": 7}, {"a": "gone"}, 7, None]
)
def test_shards_elsewhere_are_refused(names: Any, copy: Path) -> None:
    whole = copy / "unet/diffusion_pytorch_model.safetensors"
    whole.rename(copy / "unet/one.safetensors")
    index = whole.with_name(f"{whole.name}.index.json")
    index.write_text(json.dumps({"weight_map": names}))
    with pytest.raises(
        ValueError, match=r"unet/diffusion_pytorch_model.safetensors.index.json names .*not a file beside it"
    ):
        load_diffusers(copy)
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))
    load_diffusers(copy)


def test_links_out_of_the_folder_are_refused_but_a_hubs_cache_is_read(copy: Path, tmp_path: Path) -> None:
    outside = tmp_path / "blobs"
    outside.mkdir()
    (copy / "unet/config.json").rename(outside / "1")
    (copy / "unet/config.json").symlink_to(outside / "1")
    for reader in (load_diffusers, diffusers_metadata):
        with pytest.raises(ValueError, match=r"unet/config.json is a link that leads out of "):
            reader(copy)
    (tmp_path / "snapshots").mkdir()
    cached = tmp_path / "snapshots" / "main"
    copy.rename(cached)
    load_diffusers(cached)
    (cached / "unet/config.json").unlink()
    (cached / "unet/config.json").symlink_to("config.json")
    with pytest.raises(FileNotFoundError, match=r"unet/config.json is missing"):
        load_diffusers(cached)


def test_code_in_the_folder_is_never_run_nor_other_weights_read(
    copy: Path, text_pipeline: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = "raise SystemExit('the folder was run')"
    for name in ("pipeline.py", "unet/mine.py", "text_encoder/mine.py", "tokenizer/mine.py", "diffusers.py"):
        (copy / name).write_text(bad)
    change(
        copy / "text_encoder/config.json", auto_map={"AutoModel": "mine.A"}, transformers_weights="../vae/x.safetensors"
    )
    change(
        copy / "tokenizer/tokenizer_config.json", auto_map={"AutoTokenizer": ["mine.A", "mine.B"]}, tokenizer_class="A"
    )
    (copy / "text_encoder/adapter_config.json").write_text(
        '{"base_model_name_or_path": "nowhere", "peft_type": "LORA"}'
    )
    monkeypatch.chdir(copy)
    _, pipeline = text_pipeline("1")
    context = load_diffusers(copy).conditioners["text"](["a cat"], torch.tensor([False]))["context"]
    ids = pipeline.tokenizer(["a cat"], padding="max_length", max_length=16, return_tensors="pt").input_ids
    torch.testing.assert_close(context, pipeline.text_encoder(ids).last_hidden_state)


def test_the_prefix_of_published_text_encoders_is_read(copy: Path) -> None:
    path = copy / "text_encoder/model.safetensors"
    weights, before = load_file(path), load_diffusers(copy).conditioners["text"](["a cat"], torch.tensor([False]))
    path.unlink()
    save_file(
        {f"text_model.{k}": v for k, v in weights.items()}
        | {"text_model.embeddings.position_ids": torch.arange(16)[None]},
        path,
    )
    after = load_diffusers(copy).conditioners["text"](["a cat"], torch.tensor([False]))
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_a_tokenizer_that_does_not_fit_is_refused(copy: Path) -> None:
    change(copy / "text_encoder/config.json", vocab_size=10)
    path = copy / "text_encoder/model.safetensors"
    weights = load_file(path)
    key = next(k for k in weights if "token_embedding" in k)
    path.unlink()
    save_file(weights | {key: weights[key][:10].clone()}, path)
    with pytest.raises(ValueError, match=r"not a CLIP text encoder \(token \d+ has no embedding\)"):
        load_diffusers(copy)
    shutil.rmtree(copy / "tokenizer")
    with pytest.raises(FileNotFoundError, match=r"tokenizer_config.json is missing"):
        load_diffusers(copy)


def test_a_part_that_is_missing_is_named(text_pipeline: Callable, tmp_path: Path) -> None:
    folder, _ = text_pipeline("1")
    (tmp_path / "model_index.json").write_text((folder / "model_index.json").read_text())
    with pytest.raises(FileNotFoundError, match=r"vae/config.json is missing; take a whole copy"):
        ldm_train.load(str(tmp_path))
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae/config.json").write_text((folder / "vae/config.json").read_text())
    with pytest.raises(FileNotFoundError, match=r"holds no weights \(diffusion_pytorch_model.safetensors\)"):
        ldm_train.load(str(tmp_path))
