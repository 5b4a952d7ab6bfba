"""Pipelines in diffusers' folders: loaded, they draw what diffusers draws."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    LDMPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers import VQModel as Quantised
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ldm_train.checkpoints.native import find_model, model_metadata
from ldm_train.latent_diffusion import LatentDiffusion
from ldm_train.samplers.ddim import ddim

SCHEDULER = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False,
    "set_alpha_to_one": True, "timestep_spacing": "trailing",
}  # fmt: skip
TRUNK = {"norm_num_groups": 32, "block_out_channels": (128, 256), "layers_per_block": 1}


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    """Every parameter random, yet small: zero-initialised layers would hide what precedes them."""
    generator = torch.Generator().manual_seed(1)
    for p in module.parameters():
        if p.ndim > 1:
            p.data = torch.randn(p.shape, generator=generator) * (0.5 / p[0].numel() ** 0.5)
    return module.eval()


def tokenizer(folder: Path) -> CLIPTokenizer:
    words = ["<|startoftext|>", "<|endoftext|>", *(f"{c}{end}" for c in "acdegiort" for end in ("", "</w>"))]
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)


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
    model = LatentDiffusion.from_pretrained(str(folder))
    assert model.sampling["guidance_scale"] == 7.5
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    captions = ["a red dog", "cat"]
    theirs = (
        pipeline(captions, latents=noise, num_inference_steps=4, guidance_scale=3.0, output_type="pt").images * 2 - 1
    )
    ours = model.sample({"caption": captions}, [0, 1], ddim, 4, 3.0, initial_noise=noise)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-3)
    other = model.sample({"caption": ["cat", "a red dog"]}, [0, 1], ddim, 4, 3.0, initial_noise=noise)
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
    ours = LatentDiffusion.from_pretrained(str(tmp_path)).sample({}, [0], ddim, 4, 1.0, initial_noise=noise)
    torch.testing.assert_close(ours, torch.from_numpy(theirs).permute(0, 3, 1, 2) * 2 - 1, rtol=1e-3, atol=5e-3)


def test_the_folder_is_a_model_like_any_other(text_pipeline: Callable, tmp_path: Path) -> None:
    folder, _ = text_pipeline("1")
    assert find_model(folder) == folder
    assert len(model_metadata(folder)["sha256"]) == 64


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        (
            "unet",
            {"class_embed_type": "timestep"},
            r"class_embed_type='timestep'; models with class_embed_type=None can be",
        ),
        ("unet", {"norm_num_groups": 16}, "norm_num_groups=16 at width 128"),
        ("unet", {"in_channels": 9}, "takes 9 channels, the latents have 4: inpainting, depth and upscaling pipelines"),
        ("unet", {"layers_per_block": 2}, r"lacks down_blocks"),
        ("vae", {"shift_factor": 0.1}, "shift_factor=0.1"),
        ("scheduler", {"beta_schedule": "exp"}, "beta_schedule='exp'"),
    ],
)
def test_what_cannot_be_loaded_is_named(
    part: str, change: dict, message: str, text_pipeline: Callable, tmp_path: Path
) -> None:
    folder, _ = text_pipeline("1")
    for path in folder.rglob("*"):
        target = tmp_path / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            target.symlink_to(path)
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    config = json.loads((folder / part / name).read_text())
    (tmp_path / part / name).unlink()
    (tmp_path / part / name).write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        LatentDiffusion.from_pretrained(str(tmp_path))


def test_a_part_that_is_missing_is_named(text_pipeline: Callable, tmp_path: Path) -> None:
    folder, _ = text_pipeline("1")
    (tmp_path / "model_index.json").write_text((folder / "model_index.json").read_text())
    with pytest.raises(FileNotFoundError, match=r"vae/config.json is missing; the diffusers folder is not complete"):
        LatentDiffusion.from_pretrained(str(tmp_path))
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae/config.json").write_text((folder / "vae/config.json").read_text())
    with pytest.raises(FileNotFoundError, match=r"holds no weights \(diffusion_pytorch_model.safetensors\)"):
        LatentDiffusion.from_pretrained(str(tmp_path))
