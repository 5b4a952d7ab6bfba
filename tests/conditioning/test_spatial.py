"""Conditions that are pictures, layouts or embeddings: the null condition equals dropping every row, and values end up
in the right places."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import DDPMScheduler
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection, ViTConfig, ViTModel

from ldm_train.checkpoints.native import load_model, save_model
from ldm_train.checkpoints.parts import build
from ldm_train.conditioning.base import Conditioner
from ldm_train.conditioning.image_embedding import ImageEmbedding, PretrainedVision, TinyVision
from ldm_train.conditioning.layout import LayoutBoxes
from ldm_train.conditioning.spatial import DepthMap, LowResolution, MaskedImageCondition, SemanticMap
from ldm_train.data.masks import masked_image
from ldm_train.models.autoencoder import AutoencoderKL
from ldm_train.models.first_stage import FirstStage


@pytest.fixture(scope="module")
def first_stage() -> FirstStage:
    torch.manual_seed(0)
    return FirstStage(AutoencoderKL(z_channels=2, channels=16, channel_mult=(1, 1, 1), num_res_blocks=1), 0.5)


BOXES = [
    torch.tensor([[0.1, 0.2, 0.3, 0.4, 5.0], [0.0, 0.0, 1.0, 1.0, 2.0]]),
    torch.tensor([[0.5, 0.5, 0.2, 0.2, 0.0]]),
]
MADE = {
    "semantic": (lambda: SemanticMap(6, channels=4), lambda: torch.randint(0, 6, (2, 32, 16))),
    "lowres": (lambda: LowResolution(factor=4), lambda: torch.rand(2, 3, 8, 4) * 2 - 1),
    "noisy lowres": (lambda: LowResolution(noise_levels=100, vector_dim=8), lambda: torch.rand(2, 3, 8, 4) * 2 - 1),
    "masked": (
        MaskedImageCondition,
        lambda: torch.cat([torch.rand(2, 3, 32, 16), torch.rand(2, 1, 32, 16).round()], 1),
    ),
    "masked as ldm": (
        lambda: MaskedImageCondition(form="ldm"),
        lambda: torch.cat([torch.rand(2, 3, 32, 16), torch.rand(2, 1, 32, 16).round()], 1),
    ),
    "depth": (DepthMap, lambda: torch.rand(2, 1, 32, 16)),
    "layout": (lambda: LayoutBoxes(16, 6, max_objects=3, vocab_size=101, depth=1, heads=2), lambda: BOXES),
    "embedding": (lambda: ImageEmbedding(TinyVision(), 128, 8), lambda: torch.rand(2, 3, 32, 32) * 2 - 1),
    "embedded tokens": (
        lambda: ImageEmbedding(TinyVision(), 128, 8, slot="context", noise_levels=100),
        lambda: torch.rand(2, 3, 32, 32) * 2 - 1,
    ),
}


@pytest.fixture(params=MADE)
def conditioner_and_values(request: pytest.FixtureRequest, first_stage: FirstStage) -> tuple[Conditioner, object]:
    make, values = MADE[request.param]
    conditioner = make()
    conditioner.attach(first_stage)
    return conditioner.eval(), values()


@torch.no_grad()
def test_null_is_a_full_drop_and_dropout_touches_dropped_rows_alone(conditioner_and_values: tuple) -> None:
    conditioner, values = conditioner_and_values
    null, full = conditioner.null(2, (8, 4)), conditioner(values, torch.tensor([True, True]))
    some, plain = (conditioner(values, torch.tensor([d, False])) for d in (True, False))
    assert set(null) - {"context_mask"} == set(conditioner.widths)
    for key, value in null.items():
        torch.testing.assert_close(full[key], value)
        torch.testing.assert_close(some[key][0], value[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(some[key][1], plain[key][1], rtol=1e-5, atol=1e-5)
    for slot, width in conditioner.widths.items():
        assert plain[slot].shape[2 if slot == "context" else 1] == width
    assert "concat" not in plain or plain["concat"].shape[2:] == (8, 4)
    first = next(iter(conditioner.widths))
    assert not torch.allclose(plain[first][0], null[first][0], atol=1e-3)


def test_the_encoders_of_others_are_no_part_of_a_conditioners_weights(conditioner_and_values: tuple) -> None:
    conditioner, _ = conditioner_and_values
    assert not any("first_stage" in k or "network" in k for k in conditioner.state_dict())


@torch.no_grad()
def test_a_semantic_map_is_the_averaged_one_hot_map(first_stage: FirstStage) -> None:
    conditioner = SemanticMap(6)
    conditioner.attach(first_stage)
    labels = torch.randint(0, 6, (2, 32, 16))
    one_hot = F.one_hot(labels, 6).permute(0, 3, 1, 2).float()
    # LDM's rescaler halves the size twice, bilinearly
    expected = F.interpolate(
        F.interpolate(one_hot, scale_factor=0.5, mode="bilinear"), scale_factor=0.5, mode="bilinear"
    )
    torch.testing.assert_close(conditioner.shares(labels), expected)
    partly = labels.masked_fill(labels == 3, 255)
    conditioner.ignore = 255
    shares = conditioner.shares(partly)
    torch.testing.assert_close(shares[:, 3], torch.zeros_like(shares[:, 3]))
    torch.testing.assert_close(shares[:, 2], expected[:, 2])


def test_a_label_that_the_model_lacks_is_named(first_stage: FirstStage) -> None:
    conditioner = SemanticMap(6)
    conditioner.attach(first_stage)
    with pytest.raises(ValueError, match=r"label 9 in a segmentation map, this model has 6 labels.*num_labels"):
        conditioner(torch.full((1, 32, 16), 9), torch.tensor([False]))
    with pytest.raises(ValueError, match="30x16 pixels is not divisible by downsample_factor 4"):
        conditioner(torch.zeros(1, 30, 16, dtype=torch.long), torch.tensor([False]))


def test_the_published_layout_has_92_tokens() -> None:
    conditioner = LayoutBoxes(16, 600, depth=1, heads=2)
    boxes = torch.tensor([[0.0, 0.0, 0.5, 0.5, 7.0], [0.25, 0.5, 0.75, 0.5, 599.0]])
    tokens = conditioner.tokens(boxes)
    assert len(tokens) == 92
    corner = lambda x, y: round(y * 89) * 90 + round(x * 89)  # noqa: E731
    assert tokens[:6].tolist() == [599, corner(0.25, 0.5), 90 * 90 - 1, 7, 0, corner(0.5, 0.5)]  # the larger one first
    assert tokens[6:90].eq(8191).all()
    assert tokens[90:].tolist() == [0, 90 * 90 - 1]
    many = torch.cat([torch.rand(50, 2) * 0.5, torch.rand(50, 2) * 0.5, torch.zeros(50, 1)], dim=1)
    assert conditioner.tokens(many).shape == (92,)


def test_boxes_narrower_than_a_pixel_are_drawn() -> None:
    conditioner = LayoutBoxes(16, 2, max_objects=3, vocab_size=101, depth=1, heads=2)
    boxes = torch.tensor([[0.5, 0.25, 0.003, 0.5, 0.0], [0.1, 0.9, 0.003, 0.003, 1.0]])
    drawn = (conditioner.picture([boxes], (16, 32))[0] < 0.99).any(dim=0)
    assert drawn[:, 16].nonzero()[:, 0].tolist() == list(range(4, 12))
    assert drawn[14, 3]


def test_wrong_layouts_are_named() -> None:
    conditioner = LayoutBoxes(16, ["cat", "dog"], max_objects=3, vocab_size=101, depth=1, heads=2)
    with pytest.raises(ValueError, match="box label 2 is outside the 2 labels"):
        conditioner.tokens(torch.tensor([[0.1, 0.1, 0.2, 0.2, 2.0]]))
    with pytest.raises(ValueError, match="box label -1 is outside the 2 labels"):
        conditioner.tokens(torch.tensor([[0.1, 0.1, 0.2, 0.2, 1.0], [0.1, 0.1, 0.2, 0.2, -1.0]]))
    with pytest.raises(ValueError, match="a box is not inside the picture"):
        conditioner.tokens(torch.tensor([[0.9, 0.1, 0.2, 0.2, 1.0]]))
    with pytest.raises(ValueError, match="unknown label 'cow'; this model knows cat, dog"):
        conditioner.parse('[[0, 0, 0.5, 0.5, "cow"]]')
    with pytest.raises(ValueError, match="is not a layout; write"):
        conditioner.parse("a cat on the left")
    parsed = conditioner.parse('[[0, 0, 0.5, 0.5, "dog"], [0.5, 0.5, 0.5, 0.5, 0]]')
    assert parsed[:, 4].tolist() == [1, 0]
    assert conditioner.describe([parsed]) == ["dog, cat"]
    with pytest.raises(ValueError, match=r"\[\[0, 0, 0.5, 0.5, 1.7\]\]' is not a layout; write"):
        conditioner.parse("[[0, 0, 0.5, 0.5, 1.7]]")
    with pytest.raises(ValueError, match="vocab_size 101 is too small for 200 labels"):
        LayoutBoxes(16, 200, vocab_size=101)


@torch.no_grad()
def test_a_masked_image_gives_its_latents_and_a_mask_that_covers_every_touched_cell(first_stage: FirstStage) -> None:
    conditioner = MaskedImageCondition()
    conditioner.attach(first_stage)
    image, mask = torch.rand(1, 3, 32, 16) * 2 - 1, torch.zeros(1, 1, 32, 16)
    mask[0, 0, 5, 9] = 1  # one pixel of cell (1, 2)
    values = masked_image(image[0], mask[0])[None]
    concat = conditioner(values, torch.tensor([False]))["concat"]
    assert concat[0, -1].nonzero().tolist() == [[1, 2]]
    posterior = first_stage.posterior(first_stage.encode_moments(values[:, :3]))
    torch.testing.assert_close(concat[:, :2], first_stage.scaled(posterior.mean))


@torch.no_grad()
def test_a_mask_of_all_ones_is_the_null_condition(first_stage: FirstStage) -> None:
    conditioner = MaskedImageCondition()
    conditioner.attach(first_stage)
    picture = torch.rand(2, 3, 16, 16) * 2 - 1
    values = torch.stack([masked_image(p, torch.ones(1, 16, 16)) for p in picture])
    found = conditioner(values, torch.zeros(2, dtype=torch.bool))["concat"]
    size = conditioner.latent_size(16, 16)
    assert torch.equal(found, conditioner.null(2, size)["concat"])
    assert found[:, -1].eq(1).all()


def published_holes(count: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns pictures (B, 3, 32, 16) in [-1, 1], masks (B, 1, 32, 16) with ragged holes, and both joined as by the
    data pipeline."""
    torch.manual_seed(3)
    pictures, masks = torch.rand(count, 3, 32, 16) * 2 - 1, (torch.rand(count, 1, 32, 16) > 0.7).float()
    return pictures, masks, torch.stack([masked_image(p, m) for p, m in zip(pictures, masks)])


@torch.no_grad()
def test_the_form_ldm_is_that_of_the_released_inpainting_model(first_stage: FirstStage) -> None:
    """As in CompVis' scripts/inpaint.py: masked_image = (1 - mask) image with both in [0, 1], then everything is scaled
    to [-1, 1]; the condition is the latents of masked_image, then the mask resized by nearest neighbour."""
    pictures, masks, values = published_holes()
    conditioner = MaskedImageCondition(form="ldm")
    conditioner.attach(first_stage)
    masked = (1 - masks) * (pictures + 1) / 2
    latents = first_stage.scaled(first_stage.autoencoder.encode(masked * 2 - 1).mean)
    expected = torch.cat([latents, F.interpolate(masks * 2 - 1, size=latents.shape[-2:])], dim=1)
    keep = torch.zeros(2, dtype=torch.bool)
    for mode in (True, False):
        torch.testing.assert_close(conditioner.train(mode)(values, keep)["concat"], expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_form_sd2_is_that_of_stable_diffusion_2(first_stage: FirstStage) -> None:
    """As in LatentInpaintDiffusion: the mask in {0, 1} resized by nearest neighbour, then a sample of the posterior of
    image * (mask < 0.5), the image in [-1, 1]. In a dropped condition the hole is the whole picture (AddMask's
    p_drop)."""
    pictures, masks, values = published_holes()
    conditioner = MaskedImageCondition(form="sd2")
    conditioner.attach(first_stage)
    for dropped in (False, True):
        masks = torch.ones_like(masks) if dropped else masks
        posterior = first_stage.autoencoder.encode(pictures * (masks < 0.5))
        small = F.interpolate(masks, size=posterior.mean.shape[-2:])
        drop = torch.full((2,), dropped)
        torch.manual_seed(7)
        expected = torch.cat([small, first_stage.scaled(posterior.sample())], dim=1)
        torch.manual_seed(7)
        torch.testing.assert_close(conditioner.train()(values, drop)["concat"], expected, rtol=1e-5, atol=1e-5)
        # Eval mode takes the posterior mean, so that a picture depends on its seed only.
        expected = torch.cat([small, first_stage.scaled(posterior.mean)], dim=1)
        torch.testing.assert_close(conditioner.eval()(values, drop)["concat"], expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_depth_map_is_stretched_as_in_stable_diffusion_2(first_stage: FirstStage) -> None:
    """As in LatentDepth2ImageDiffusion: resized bicubically without antialiasing, then 2 (d - min) / (max - min +
    0.001) - 1; flat maps are -1."""
    depth = torch.rand(2, 1, 32, 16)
    depth[1] = 0.4
    conditioner = DepthMap()
    conditioner.attach(first_stage)
    small = F.interpolate(depth, size=(8, 4), mode="bicubic", align_corners=False)
    low, high = (f(small, dim=[1, 2, 3], keepdim=True) for f in (torch.amin, torch.amax))
    expected = 2.0 * (small - low) / (high - low + 0.001) - 1.0
    torch.testing.assert_close(conditioner(depth, torch.zeros(2, dtype=torch.bool))["concat"], expected)
    torch.testing.assert_close(expected[1], torch.full((1, 8, 4), -1.0), rtol=0, atol=1e-3)


def test_an_unknown_form_of_inpainting_is_named() -> None:
    with pytest.raises(ValueError, match="form 'sd3' of an inpainting condition; choose covering, ldm, sd2"):
        MaskedImageCondition(form="sd3")


def test_noise_on_a_small_image_comes_in_training_only_and_is_told(first_stage: FirstStage) -> None:
    conditioner = LowResolution(noise_levels=300, vector_dim=8)
    conditioner.attach(first_stage)
    images, keep = torch.zeros(64, 3, 8, 4), torch.zeros(64, dtype=torch.bool)
    noisy = conditioner.train()(images, keep)
    assert noisy["concat"].std() > 0.05
    assert len(noisy["vector"].unique(dim=0)) > 30
    clean = conditioner.eval()(images, keep)
    assert clean["concat"].abs().max() == 0
    assert len(clean["vector"].unique(dim=0)) == 1


@torch.no_grad()
@pytest.mark.parametrize("measured", [False, True])
def test_image_embeddings_are_noised_as_in_unclip(measured: bool, tmp_path: Path) -> None:
    """As in CLIPEmbeddingNoiseAugmentation: the raw embedding is normalised by the data's statistics, noised on the
    cosine schedule and scaled back; the embedding of the noise level is appended. Of the released models, H has mean 0
    and std 1, and L a file of statistics."""
    normaliser = StableUnCLIPImageNormalizer(128)
    if measured:
        normaliser.mean.copy_(torch.randn(1, 128))
        normaliser.std.copy_(torch.rand(1, 128) + 0.5)
        normaliser.save_pretrained(tmp_path)
    statistics = str(tmp_path / "diffusion_pytorch_model.safetensors") if measured else "unit"
    encoder = TinyVision()
    conditioner = ImageEmbedding(encoder, 128, None, noise_levels=1000, statistics=statistics).train()
    images, keep = torch.rand(3, 3, 32, 32) * 2 - 1, torch.zeros(3, dtype=torch.bool)
    bare = encoder(images)
    torch.manual_seed(5)
    levels, noise = torch.randint(1000, (3,)), torch.randn_like(bare)
    noised = DDPMScheduler(beta_schedule="squaredcos_cap_v2").add_noise(normaliser.scale(bare), noise, levels)
    told = get_timestep_embedding(levels, 128, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.manual_seed(5)
    found = conditioner(images, keep)["vector"]
    torch.testing.assert_close(found[:, :128], normaliser.unscale(noised)[:, 0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[:, 128:], told, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(conditioner.eval()(images, keep)["vector"][:, :128], bare[:, 0])
    # The weights contain the statistics, so that moving or changing the file cannot change a trained model.
    again = ImageEmbedding(encoder, 128, None, noise_levels=1000, statistics="unit")
    again.load_state_dict(conditioner.state_dict())
    torch.testing.assert_close(again.std, normaliser.std[0].detach())


def test_a_trained_model_needs_no_file_of_statistics(tmp_path: Path) -> None:
    """A model folder loads after the file is deleted, also with the config of an older folder that names the file."""
    file = tmp_path / "statistics.safetensors"
    save_file({"mean": torch.randn(128), "std": torch.rand(128) + 0.5}, file)
    part = "ldm_train.conditioning.image_embedding."
    options = {
        "_target_": f"{part}ImageEmbedding", "encoder": {"_target_": f"{part}TinyVision"}, "encoder_dim": 128, "dim": None,
        "noise_levels": 10, "statistics": str(file),
    }  # fmt: skip
    tree = {
        "_target_": "ldm_train.latent_diffusion.LatentDiffusion",
        "network": {
            "_target_": "ldm_train.models.unet.UNet", "in_channels": 4, "channels": 32, "channel_mult": [1],
            "num_res_blocks": 1, "attention_levels": [], "num_heads": 2, "vector_dim": 256,
        },
        "first_stage": {
            "_target_": "ldm_train.models.first_stage.FirstStage",
            "autoencoder": {
                "_target_": "ldm_train.models.autoencoder.AutoencoderKL", "z_channels": 4, "channels": 16,
                "channel_mult": [1, 1], "num_res_blocks": 1, "mid_attention": False,
            },
        },
        "schedule": {"_target_": "ldm_train.diffusion.schedule.NoiseSchedule"},
        "conditioners": {"image": options}, "latent_size": [8, 8],
    }  # fmt: skip
    model = build(tree, "test")
    save_model(tmp_path / "model", model, tree, {})
    assert str(file) not in (tmp_path / "model" / "config.yaml").read_text()
    older = yaml.safe_dump(tree)
    file.unlink()
    assert torch.equal(load_model(tmp_path / "model").conditioners["image"].std, model.conditioners["image"].std)
    (tmp_path / "model" / "config.yaml").write_text(older)
    metadata = json.loads((tmp_path / "model" / "metadata.json").read_text())
    del metadata["config_sha256"]
    (tmp_path / "model" / "metadata.json").write_text(json.dumps(metadata))
    assert torch.equal(load_model(tmp_path / "model").conditioners["image"].mean, model.conditioners["image"].mean)


def test_embedding_statistics_that_cannot_be_are_named(tmp_path: Path) -> None:
    def made(file: str) -> ImageEmbedding:
        return ImageEmbedding(TinyVision(), 128, None, noise_levels=10, statistics=str(tmp_path / file))

    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors is not a file.*statistics.*'unit'"):
        made("nowhere.safetensors")
    (tmp_path / "text.safetensors").write_text("mean")
    save_file({"mean": torch.zeros(1, 128)}, tmp_path / "half.safetensors")
    save_file({"mean": torch.zeros(1, 64), "std": torch.ones(1, 64)}, tmp_path / "narrow.safetensors")
    save_file({"mean": torch.zeros(1, 128), "std": torch.zeros(1, 128)}, tmp_path / "flat.safetensors")
    for file in ("text", "half", "narrow", "flat"):
        with pytest.raises(ValueError, match=rf"{file}\.safetensors .*`mean` and `std`.* 128"):
            made(f"{file}.safetensors")


def vision_folder(folder: Path, model: torch.nn.Module) -> Path:
    model.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}


@torch.no_grad()
def test_pretrained_vision_gives_the_embeddings_of_transformers(tmp_path: Path) -> None:
    clip = CLIPVisionModelWithProjection(CLIPVisionConfig(**SIZES, projection_dim=12)).eval()
    vit = ViTModel(ViTConfig(**SIZES)).eval()
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    for name, model, pooled in (("clip", clip, "image_embeds"), ("vit", vit, "pooler_output")):
        folder = vision_folder(tmp_path / name, model)
        processor = CLIPImageProcessor.from_pretrained(folder)
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (processor.image_mean, processor.image_std))
        expected = model(pixel_values=((images + 1) / 2 - mean) / std)
        found = PretrainedVision(str(folder))(images)
        torch.testing.assert_close(found[:, 0], getattr(expected, pooled), rtol=1e-4, atol=1e-5)
        hidden = PretrainedVision(str(folder), hidden=True)(images)
        torch.testing.assert_close(hidden, expected.last_hidden_state, rtol=1e-4, atol=1e-5)
    conditioner = ImageEmbedding(PretrainedVision(str(tmp_path / "clip")), 12, 8)
    assert conditioner(images, torch.tensor([False, True]))["vector"].shape == (2, 8)
    with pytest.raises(FileNotFoundError, match=r"cannot load the vision encoder .*nowhere"):
        ImageEmbedding(PretrainedVision(str(tmp_path / "nowhere")), 12, 8).require()


@pytest.mark.parametrize("box", [[torch.nan, 0.5, 0.4, 0.4], [0.1, 0.1, 0.0, 0.4], [0.5, 0.5, 0.2, -0.2]])
def test_boxes_without_an_extent_are_refused(box: list[float]) -> None:
    conditioner = LayoutBoxes(16, 6, max_objects=3, depth=1, heads=2)
    with pytest.raises(ValueError, match="a box has no extent"):
        conditioner.tokens(torch.tensor([[*box, 0]]))
