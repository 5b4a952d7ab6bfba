"""The CLIP score: its cosines equal those of transformers, and guidance by its gradient raises them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from ldm_train.conditioning.clip_score import ClipScore
from ldm_train.conditioning.image_embedding import PretrainedVision
from ldm_train.conditioning.text import FrozenText
from ldm_train.diffusion.guidance import score_guidance
from ldm_train.diffusion.schedule import NoiseSchedule
from ldm_train.rng import NoiseSource
from ldm_train.samplers.ddim import ddim


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    words = ["<|startoftext|>", "<|endoftext|>", *(f"{c}{end}" for c in "acdegiort" for end in ("", "</w>"))]
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = tower | {
        "vocab_size": len(words), "max_position_embeddings": 12, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
    }  # fmt: skip
    model = CLIPModel(
        CLIPConfig(text_config=text, vision_config=tower | {"image_size": 16, "patch_size": 4}, projection_dim=16)
    )
    model.save_pretrained(folder)
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=12).save_pretrained(folder)
    CLIPImageProcessor(crop_size=16, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4]).save_pretrained(folder)
    return folder


def test_cosines_are_those_of_transformers(folder: Path) -> None:
    score, captions = ClipScore(str(folder)), ["a red dog", "cat"]
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    tokenizer, processor = CLIPTokenizer.from_pretrained(folder), CLIPImageProcessor.from_pretrained(folder)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (processor.image_mean, processor.image_std))
    reference = CLIPModel.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = reference(
            **tokenizer(captions, padding=True, return_tensors="pt"), pixel_values=((images + 1) / 2 - mean) / std
        ).logits_per_image
        found = score(images, score.texts(captions)) * score.logit_scale
    torch.testing.assert_close(found, expected.diagonal(), rtol=1e-4, atol=1e-4)
    assert score(images[:, :1], score.texts(captions)).shape == (2,)
    assert len(score.texts(["a red dog " * 50])) == 1  # longer than the model's context


def test_models_stored_in_half_precision_compute_in_float32(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    CLIPModel.from_pretrained(folder).half().save_pretrained(tmp_path)
    score, images = ClipScore(str(tmp_path)), torch.rand(2, 3, 16, 16) * 2 - 1
    assert score.texts(["a red dog"]).dtype == score.embedded(images).dtype == torch.float32
    text = FrozenText(str(tmp_path), 32, max_length=12).pretrained()[1]
    config = CLIPConfig.from_pretrained(folder).vision_config
    CLIPVisionModelWithProjection(config).half().save_pretrained(tmp_path)
    vision = PretrainedVision(str(tmp_path)).loaded().model
    for model in (score.model, text, vision):
        assert {weight.dtype for weight in model.parameters()} == {torch.float32}


def test_encoders_with_lacking_or_damaged_weights_are_named(folder: Path, tmp_path: Path) -> None:
    """The library would draw the lacking ones at random, other ones each time."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    CLIPTextModel(CLIPConfig.from_pretrained(folder).text_config).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    lacking = next(name for name in weights if "mlp.fc1" in name)
    save_file({k: v for k, v in weights.items() if k != lacking}, path, {"format": "pt"})
    with pytest.raises(FileNotFoundError, match=r"cannot load the text encoder .*lack 1 weights, the first is .*fc1"):
        FrozenText(str(tmp_path), 32, max_length=12).pretrained()
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(FileNotFoundError, match="cannot load the text encoder"):
        FrozenText(str(tmp_path), 32, max_length=12).pretrained()


def test_guidance_by_its_gradient_raises_the_score(folder: Path) -> None:
    score, schedule = ClipScore(str(folder)), NoiseSchedule()
    texts, noise, times = score.texts(["a red dog"] * 4), NoiseSource(range(4)), schedule.timesteps(10)

    def denoise(x_t: torch.Tensor, t: float) -> torch.Tensor:  # data N(0, 1)
        return schedule.numbers(t)[0] * x_t

    def found(scale: float) -> float:
        guided = score_guidance(denoise, lambda x0: score.logit_scale * score(x0, texts), schedule, scale)
        with torch.inference_mode():
            made = ddim(guided, noise.normal((3, 16, 16), "start"), times, schedule, noise)
            return float(score(made, texts).mean())

    scores = [found(scale) for scale in (0.0, 1.0, 5.0)]
    assert scores == sorted(scores)
    assert scores[2] > scores[0] + 0.03


def test_a_missing_model_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"cannot load the CLIP model /no/where .* give a folder that holds"):
        ClipScore("/no/where")
