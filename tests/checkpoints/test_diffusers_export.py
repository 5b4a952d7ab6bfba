"""Our models, exported: diffusers opens them without this package and draws what they draw."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from chains import composed
from chains import tokenizer as clip_words
from safetensors.torch import load_file
from test_diffusers import randomised

from ldm_train.checkpoints import diffusers_export
from ldm_train.checkpoints.adapters import export_adapter
from ldm_train.checkpoints.for_diffusers import conditioners as for_diffusers
from ldm_train.checkpoints.native import load_latent_diffusion, load_model, save_model
from ldm_train.checkpoints.parts import build
from ldm_train.conditioning.learned_tokens import add_tokens, settle
from ldm_train.conditioning.text import train_tokenizer
from ldm_train.latent_diffusion import LatentDiffusion, Sampling, Start
from ldm_train.models import lora
from ldm_train.models.autoencoder import AutoencoderKL
from ldm_train.models.first_stage import FirstStage, fold_statistics
from ldm_train.models.lora import LoRA
from ldm_train.pipeline.convert import convert
from ldm_train.samplers.ddim import ddim

STEPS, SCALE = 5, 2.5
TOKENIZER = train_tokenizer(["a red circle", "a blue square"], 270).to_str()
CONDITIONERS = "ldm_train.conditioning"
CLASS = {"_target_": f"{CONDITIONERS}.class_label.ClassLabel", "classes": ["cat", "dog"], "dim": 16}
TEXT = {
    "_target_": f"{CONDITIONERS}.text.TrainedText", "tokenizer": TOKENIZER, "dim": 16, "depth": 1, "heads": 2, "max_length": 8,
}  # fmt: skip


def tree(conditioners: dict[str, Any], network: dict[str, Any], wide: bool = False, vq: bool = False) -> dict[str, Any]:
    """Returns the config tree of a model. wide: with 32 groups in all norms, as diffusers' own classes need."""
    channels = 128 if wide else 32
    autoencoder = {
        "_target_": f"ldm_train.models.autoencoder.Autoencoder{'VQ' if vq else 'KL'}", "z_channels": 3,
        "channels": 128 if wide else 16, "channel_mult": [1, 2], "num_res_blocks": 1, **({"num_codes": 16} if vq else {}),
        "attention_levels": [1],
    }  # fmt: skip
    trunk = {"channels": channels, "channel_mult": [1, 2], "num_res_blocks": 1, "attention_levels": [1], "head_dim": 16}
    return {
        "_target_": "ldm_train.latent_diffusion.LatentDiffusion",
        "network": {"_target_": "ldm_train.models.unet.UNet", "in_channels": 3} | trunk | network,
        "first_stage": {"_target_": "ldm_train.models.first_stage.FirstStage", "autoencoder": autoencoder},
        "schedule": {"_target_": "ldm_train.diffusion.schedule.NoiseSchedule"},
        "conditioners": conditioners,
        "latent_size": [8, 8],
    }


def pixels(size: int) -> dict[str, Any]:
    made = tree({}, {"head_dim": None, "num_heads": 1}, wide=True)
    made["first_stage"]["autoencoder"] = {"_target_": "ldm_train.models.autoencoder.AutoencoderIdentity"}
    return made | {"latent_size": [size, size]}


SPATIAL = f"{CONDITIONERS}.spatial"
MAP = {"_target_": f"{SPATIAL}.SemanticMap", "num_labels": 4, "channels": 2, "ignore": 0, "dropout": 0.1}
TREES: dict[str, dict[str, Any]] = {
    "classes and captions": tree(
        {"class_label": CLASS, "text": TEXT | {"pooled": True}}, {"context_dim": 16, "vector_dim": 32}
    ),
    "classes as a vector": tree({"class_label": CLASS}, {"vector_dim": 16, "scale_shift": True}),
    "classes as a token": tree({"class_label": CLASS | {"slot": "context"}}, {"context_dim": 16}, vq=True),
    "captions with visible padding": tree(
        {"text": TEXT | {"masked": False, "head_dim": 4}},
        {"context_dim": 16, "linear_projection": True, "cross_only_levels": [1], "attention_levels": [0, 1]},
    ),
    "small pictures": tree(
        {"lowres": {"_target_": f"{SPATIAL}.LowResolution", "factor": 4}},
        {"concat_channels": 3, "mid_attention": False},
    ),
    "label maps": tree({"segmentation": MAP}, {"concat_channels": 2}),
    "masked pictures": tree({"masked": {"_target_": f"{SPATIAL}.MaskedImageCondition"}}, {"concat_channels": 4}),
    "a codebook alone": tree({}, {}, wide=True, vq=True),
    "nothing": tree({}, {}, wide=True),
    "pixels": pixels(16),
}
PER_CHANNEL = {name for name in TREES if name not in ("a codebook alone", "pixels")}
PICTURES, HOLE = torch.rand(2, 3, 16, 16) * 2 - 1, torch.zeros(2, 1, 16, 16)
HOLE[:, :, 4:9, 3:12] = 1
LABELS = torch.arange(512).view(2, 16, 16) % 4
SMALL = torch.rand(2, 3, 4, 4) * 2 - 1
# The conditions as given to our model, and as given to diffusers' pipeline.
GIVEN: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "classes and captions": (
        {"class_label": torch.tensor([1, 0]), "caption": ["a red circle", "blue"]},
        {"class_label": ["dog", 0], "prompt": ["a red circle", "blue"]},
    ),
    "classes as a vector": ({"class_label": torch.tensor([1, 0])}, {"class_label": ["dog", "cat"]}),
    "classes as a token": ({"class_label": torch.tensor([1, 0])}, {"class_label": [1, 0]}),
    "captions with visible padding": ({"caption": ["a blue", "square"]}, {"prompt": ["a blue", "square"]}),
    "small pictures": ({"lowres": SMALL}, {"image": SMALL}),
    "label maps": ({"segmentation": LABELS}, {"segmentation": LABELS}),
    "masked pictures": (
        {"masked_image": torch.cat([PICTURES.masked_fill(HOLE > 0.5, -1), HOLE], 1)}, {"image": PICTURES, "mask": HOLE}
    ),
}  # fmt: skip
THEIRS = """
import sys, torch
sys.modules["ldm_train"] = None                  # importing it raises ImportError
from diffusers import DiffusionPipeline
images = {}
for folder, given, noise, steps, scale, adapter in torch.load(sys.argv[1]):
    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, low_cpu_mem_usage=False)
    if adapter:
        pipeline.unet.load_lora_adapter(adapter, prefix="unet")
    pipeline.set_progress_bar_config(disable=True)
    if type(pipeline).__name__ == "LatentDiffusionPipeline":
        pictures = pipeline(**given, latents=noise, num_inference_steps=steps, guidance_scale=scale, output_type="pt").images
    else:                                        # these make their noise themselves
        import diffusers.pipelines.deprecated.latent_diffusion_uncond.pipeline_latent_diffusion_uncond as module
        module.randn_tensor = lambda shape, **_: noise
        import diffusers.pipelines.ddpm.pipeline_ddpm as module
        module.randn_tensor = lambda shape, **_: noise
        kind = type(pipeline).__name__
        pictures = pipeline(batch_size=2, num_inference_steps=steps, output_type="np").images
        pictures = torch.from_numpy(pictures).permute(0, 3, 1, 2)
    images[folder] = (type(pipeline).__name__, pictures)
torch.save(images, sys.argv[2])
"""


def model(name: str) -> LatentDiffusion:
    """Builds a model with small random parameters: zero-initialised layers would hide the layers before them."""
    made, generator = build(TREES[name], name), torch.Generator().manual_seed(1)
    for p in made.parameters():
        p.data = torch.randn(p.shape, generator=generator) * (0.5 / p[0].numel() ** 0.5 if p.ndim > 1 else 0.1)
    scale, shift = torch.tensor([0.8, 1.1, 1.4]), torch.tensor([0.1, -0.2, 0.3])
    if name not in PER_CHANNEL:
        scale, shift = scale[:1] if name != "pixels" else torch.ones(1), torch.zeros(1)
    made.first_stage.set_statistics(scale.expand(3), shift.expand(3))
    return made.eval()


def exported(name: str, folder: Path, *options: str) -> Path:
    """Saves a model and exports its folder with ldm-convert; returns the exported folder."""
    sampling = {"num_inference_steps": STEPS, "guidance_scale": SCALE, "spacing": "trailing"}
    save_model(folder / "native", model(name), TREES[name], {"sampling": sampling})
    arguments = (f"from={folder}/native", f"to={folder}/theirs", "format=diffusers", *options)
    return convert(composed("convert", *arguments))


@torch.no_grad()
def test_a_learned_word_of_several_vectors_means_there_what_it_means_here() -> None:
    made = model("captions with visible padding")
    text = made.conditioners["text"]
    add_tokens(text, "<my-dog>", torch.randn(2, 16))
    settle(text)
    component = diffusers_export.conditioners(made, TREES["captions with visible padding"]["conditioners"], False)
    options = {k: v for k, v in component.config["parts"]["prompt"].items() if k != "dropped"}
    theirs = for_diffusers.TrainedText(**options).eval()
    prefix = "conditions.prompt."
    theirs.load_state_dict({k.removeprefix(prefix): v for k, v in component.tensors.items() if k.startswith(prefix)})
    captions = ["a <my-dog> circle", "a red circle"]
    ours = text(captions, torch.tensor([False, False]))["context"]
    torch.testing.assert_close(theirs(captions, False)["encoder_hidden_states"], ours)
    plain = theirs(["a my-dog circle", "a red circle"], False)["encoder_hidden_states"]
    assert (plain[0] - ours[0]).abs().max() > 0.01


ADAPTED = (
    "classes and captions",
    "classes as a token",
)  # models drawn with an adapter (diffusers' UNet2DModel takes none)


def adapted(network: LatentDiffusion, file: Path) -> str:
    """Gives a model a random adapter and writes it to `file` in diffusers' layout; returns the file's name."""
    network.adapt(LoRA(rank=2, alpha=3, targets="all"), "adapter")
    with torch.no_grad():
        for p in network.adapter.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(3)) * 0.1)
    export_adapter(lora.pairs_of(network.parts(), "adapter"), network, file, "diffusers")
    return str(file)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, torch.Tensor, torch.Tensor]]:
    """{name: (the pipeline's class, our pictures, theirs)}; theirs come from a process that cannot import ours."""
    root, jobs, ours = tmp_path_factory.mktemp("exported"), [], {}
    for name in TREES:
        folder = exported(name, root / name, "verify=true")
        network, (batch, given) = load_latent_diffusion(folder.parent / "native"), GIVEN.get(name, ({}, {}))
        adapter = adapted(network, folder.parent / "adapter.safetensors") if name in ADAPTED else None
        noise = torch.randn(2, 3, *network.latent_size, generator=torch.Generator().manual_seed(2))
        with torch.inference_mode():
            ours[str(folder)] = network.sample(
                batch, [0, 1], Sampling(ddim, STEPS, SCALE, spacing="trailing"), Start(noise=noise)
            )
        jobs.append((str(folder), given, noise, STEPS, SCALE, adapter))
    torch.save(jobs, root / "jobs.pt")
    environment = os.environ | {"HF_HOME": str(root / "hub"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-c", THEIRS, str(root / "jobs.pt"), str(root / "images.pt")]
    done = subprocess.run(arguments, env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = torch.load(root / "images.pt")
    return {Path(k).parent.name: (theirs[k][0], ours[k], theirs[k][1] * 2 - 1) for k in ours}


KINDS = {"a codebook alone": "LDMPipeline", "nothing": "LDMPipeline", "pixels": "DDPMPipeline"}


@pytest.mark.slow
@pytest.mark.parametrize("name", TREES)
def test_diffusers_draws_what_we_draw(name: str, drawn: dict[str, Any]):
    kind, ours, theirs = drawn[name]
    assert kind == KINDS.get(name, "LatentDiffusionPipeline")
    assert ours.std() > 0.02
    # The documented limit is 2/255 of [0, 1]. Only the order of sums and ties in a codebook make a difference.
    torch.testing.assert_close(theirs, ours, rtol=0, atol=4 / 255 if "codebook" in name or "token" in name else 1e-3)


TRUNK = {"norm_num_groups": 32, "block_out_channels": (128, 128), "layers_per_block": 1}
SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}


def published(kind: str, folder: Path) -> Any:
    """Makes and saves a small pipeline of diffusers' own classes with random weights."""
    import diffusers
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
    from transformers import BertTokenizer, CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    levels, inpainting = 4 if kind == "LDMTextToImagePipeline" else 2, kind == "StableDiffusionInpaintPipeline"
    vq, trunk = kind == "LDMSuperResolutionPipeline", TRUNK | {"block_out_channels": (128,) * levels}
    channels = 3 if vq else 4
    vae = randomised(
        (diffusers.VQModel if vq else diffusers.AutoencoderKL)(
            down_block_types=["DownEncoderBlock2D"] * levels, up_block_types=["UpDecoderBlock2D"] * levels,
            latent_channels=channels, scaling_factor=0.3, **trunk, **({"num_vq_embeddings": 32} if vq else {}),
        )
    )  # fmt: skip
    scheduler = diffusers.DDIMScheduler(timestep_spacing="trailing", set_alpha_to_one=True, **SCHEDULER)
    if vq:
        unet = diffusers.UNet2DModel(
            sample_size=8, in_channels=6, out_channels=3, down_block_types=["DownBlock2D", "AttnDownBlock2D"],
            up_block_types=["AttnUpBlock2D", "UpBlock2D"], attention_head_dim=32, **TRUNK,
        )  # fmt: skip
        made = diffusers.LDMSuperResolutionPipeline(vae, randomised(unet), scheduler)
    else:
        unet = diffusers.UNet2DConditionModel(
            sample_size=8, in_channels=9 if inpainting else 4, out_channels=4, cross_attention_dim=48, attention_head_dim=4,
            down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"], up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
            **TRUNK,
        )  # fmt: skip
        if kind == "LDMTextToImagePipeline":
            words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "dog", "cat"]
            (folder.parent / "vocab.txt").write_text("\n".join(words))
            config = LDMBertConfig(
                vocab_size=len(words),
                encoder_layers=2,
                encoder_ffn_dim=192,
                encoder_attention_heads=2,
                head_dim=16,
                d_model=48,
            )
            text = BertTokenizer(str(folder.parent / "vocab.txt"))
            bert = randomised(LDMBertModel(config))
            made = diffusers.LDMTextToImagePipeline(vae, bert, text, randomised(unet), scheduler)
        else:
            words = clip_words(folder.parent)
            config = CLIPTextConfig(
                vocab_size=len(words), hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                max_position_embeddings=16, bos_token_id=0, eos_token_id=1, pad_token_id=1,
            )  # fmt: skip
            parts = (vae, randomised(CLIPTextModel(config)), words, randomised(unet), scheduler, None, None)
            made = getattr(diffusers, kind)(*parts, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    made.save_pretrained(folder)
    return made


def drawn_by(kind: str, pipeline: Any, noise: torch.Tensor) -> torch.Tensor:
    captions, steps = ["a red dog", "cat"], {"num_inference_steps": 4}
    if kind == "LDMSuperResolutionPipeline":
        import diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion_superresolution as module

        module.randn_tensor = lambda shape, **_: noise
        return pipeline(torch.linspace(-1, 1, 384).view(2, 3, 8, 8), output_type="pt", **steps).images
    given = {"image": PICTURES / 2 + 0.5, "mask_image": HOLE, "height": 16, "width": 16} if "Inpaint" in kind else {}
    return pipeline(captions, latents=noise, guidance_scale=2.0, output_type="pt", **given, **steps).images


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        "StableDiffusionPipeline",
        "StableDiffusionInpaintPipeline",
        "LDMTextToImagePipeline",
        "LDMSuperResolutionPipeline",
    ],
)
def test_a_published_pipeline_is_read_and_comes_back_to_the_bit(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import diffusers

    pipeline = published(kind, tmp_path / "theirs")
    convert(composed("convert", f"from={tmp_path}/theirs", f"to={tmp_path}/native", "verify=true"))
    if kind.startswith("Stable"):  # our folder contains the text encoder
        (tmp_path / "theirs").rename(tmp_path / "elsewhere")
    ours, channels = load_latent_diffusion(tmp_path / "native"), 3 if "Super" in kind else 4
    if kind.startswith("Stable"):
        ours.conditioners["text"].require()
        (tmp_path / "elsewhere").rename(tmp_path / "theirs")
    noise = torch.randn(2, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    batch = {"caption": ["a red dog", "cat"]}
    if "Super" in kind:
        batch = {"lowres": torch.linspace(-1, 1, 384).view(2, 3, 8, 8)}
    if "Inpaint" in kind:
        batch["masked_image"] = torch.cat([PICTURES.masked_fill(HOLE > 0.5, -1), HOLE], 1)
        # Theirs samples the picture's posterior, ours takes the mean; theirs also encodes the whole picture.
        kept = diffusers.AutoencoderKL.encode
        monkeypatch.setattr(
            diffusers.AutoencoderKL,
            "encode",
            lambda self, x: type("Mean", (), {"latents": kept(self, x).latent_dist.mode()}),
        )
    theirs = drawn_by(kind, pipeline, noise) * 2 - 1
    scale = 1.0 if "Super" in kind else 2.0
    drawn = ours.sample(batch, [0, 1], Sampling(ddim, 4, scale, spacing="trailing"), Start(noise=noise))
    torch.testing.assert_close(drawn, theirs, rtol=1e-3, atol=4e-3)
    monkeypatch.undo()
    folder = convert(
        composed("convert", f"from={tmp_path}/native", f"to={tmp_path}/again", "format=diffusers", "verify=true")
    )
    again = getattr(diffusers, kind).from_pretrained(folder, low_cpu_mem_usage=False)
    again.set_progress_bar_config(disable=True)
    for name in ("unet", "vae", "vqvae", "bert", "text_encoder"):
        for file in (tmp_path / "theirs" / name).glob("*.safetensors"):
            before, after = load_file(file), load_file(next((folder / name).glob("*.safetensors")))
            before = {k: v for k, v in before.items() if "to_logits" not in k}
            assert all(torch.equal(after[key], before[key]) for key in before), name
    assert torch.equal(drawn_by(kind, again, noise), drawn_by(kind, pipeline, noise)) or "Inpaint" in kind


@pytest.mark.parametrize("name", ["classes and captions", "classes as a vector", "a codebook alone"])
def test_what_was_written_computes_what_the_model_does(name: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    folder = exported(name, tmp_path, "verify=true")
    assert "verified: read again" in capsys.readouterr().out
    index = json.loads((folder / "model_index.json").read_text())
    own = isinstance(index["_class_name"], list)
    assert (folder / "pipeline.py").exists() == own == (name != "a codebook alone")
    for code in folder.rglob("*.py"):  # only code from this package
        assert code.read_bytes() == (diffusers_export.FILES / code.name).read_bytes()
    if own:
        with pytest.raises(ValueError, match=r"is for .*; it was exported with code of its own"):
            load_latent_diffusion(folder)
    else:
        assert torch.equal(load_latent_diffusion(folder).network.out[2].weight, model(name).network.out[2].weight)


@pytest.mark.parametrize("name", ["nothing", "a codebook alone"])
def test_folded_statistics_leave_latents_and_pictures_as_they_were(name: str):
    first, one = model(name).first_stage, name == "a codebook alone"
    other = FirstStage(build(TREES[name]["first_stage"]["autoencoder"], name))
    other.autoencoder.load_state_dict(fold_statistics(first.autoencoder.state_dict(), first.scale, first.shift))
    moments, theirs = (stage.encode_moments(PICTURES) for stage in (first, other))
    torch.testing.assert_close(other.posterior(theirs).mean, first.scaled(first.posterior(moments).mean))
    if not one:
        spread, kept = other.posterior(theirs), first.posterior(moments)
        torch.testing.assert_close(spread.std, kept.std * first.scale)
    latents = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(other.decode(latents), first.decode(latents), rtol=0, atol=1e-5)


def patches() -> dict[str, Any]:
    """The config tree of a first stage whose autoencoder works on patches of 2x2 pixels."""
    stage = tree({}, {})["first_stage"]
    stage["autoencoder"]["patch_size"] = 2
    return stage


REFUSED = {
    "diffusion.network is a DiT": {
        "network": {
            "_target_": "ldm_train.models.dit.DiT", "in_channels": 3, "hidden_size": 32, "depth": 1, "num_heads": 2
        }
    },
    "a LinearFlow with FlowPrediction has no counterpart": {
        "schedule": {"_target_": "ldm_train.diffusion.linear_flow.LinearFlow"},
        "parameterisation": {"_target_": "ldm_train.diffusion.flow_prediction.FlowPrediction"},
    },
    r"diffusion.schedule.kind is sqrt; diffusers knows scaled_linear": {
        "schedule": {"_target_": "ldm_train.diffusion.schedule.NoiseSchedule", "kind": "sqrt"}
    },
    "the conditioner boxes is a LayoutBoxes that has no counterpart": {
        "conditioners": {
            "boxes": {"_target_": f"{CONDITIONERS}.layout.LayoutBoxes", "dim": 16, "labels": 3, "depth": 1, "heads": 2}
        },
        "network": tree({}, {"context_dim": 16})["network"],
    },
    "diffusion.network.resblock_resample is True": {"network": tree({}, {"resblock_resample": True})["network"]},
    "autoencoder.network.patch_size is 2": {"first_stage": patches()},
    "diffusion.network.channel_mult begins with 2": {"network": tree({}, {"channel_mult": [2, 2]})["network"]},
    r"heads of \[32, 64\] channels; in diffusers": {"network": tree({}, {"head_dim": None, "num_heads": 1})["network"] | {
        "num_heads": 2, "attention_levels": [0, 1], "channels": 64}},
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_what_diffusers_cannot_express_is_refused_by_name_and_nothing_is_written(message: str, tmp_path: Path):
    own = tree({}, {}) | REFUSED[message]
    save_model(tmp_path / "native", build(own, "test"), own, {})
    with pytest.raises(ValueError, match=message):
        convert(composed("convert", f"from={tmp_path}/native", f"to={tmp_path}/theirs", "format=diffusers"))
    assert [path.name for path in tmp_path.iterdir()] == ["native"]


def test_an_interrupted_export_leaves_nothing_and_what_stood_there_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = exported("nothing", tmp_path)
    before = (folder / "model_index.json").stat().st_mtime_ns
    with pytest.raises(FileExistsError, match="exists; choose another, or overwrite=true"):
        exported("nothing", tmp_path)
    monkeypatch.setattr(diffusers_export, "save_file", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        exported("nothing", tmp_path, "overwrite=true")
    assert (folder / "model_index.json").stat().st_mtime_ns == before
    monkeypatch.undo()
    exported("nothing", tmp_path, "overwrite=true", "dtype=float16")
    assert load_file(folder / "unet" / diffusers_export.WEIGHTS)["conv_in.weight"].dtype == torch.float16
    assert sorted(path.name for path in tmp_path.iterdir()) == ["native", "theirs"]


def test_an_autoencoder_alone_comes_and_goes(tmp_path: Path):
    own = TREES["nothing"]["first_stage"]["autoencoder"]
    save_model(tmp_path / "native", build(own, "test"), own, {})
    folder = convert(
        composed("convert", f"from={tmp_path}/native", f"to={tmp_path}/theirs", "format=diffusers", "verify=true")
    )
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", diffusers_export.WEIGHTS]
    convert(composed("convert", f"from={folder}", f"to={tmp_path}/again", "verify=true"))
    before, after = (load_model(tmp_path / name).state_dict() for name in ("native", "again"))
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_two_conditioners_of_a_kind_are_not_merged(tmp_path: Path):
    own = tree({"a": CLASS, "b": CLASS | {"slot": "context"}}, {"context_dim": 16, "vector_dim": 16})
    save_model(tmp_path / "native", build(own, "test"), own, {})
    with pytest.raises(ValueError, match="two conditioners that are a ClassLabel; one of a kind can be exported"):
        convert(composed("convert", f"from={tmp_path}/native", f"to={tmp_path}/theirs", "format=diffusers"))


def test_what_diffusers_does_otherwise_is_said(tmp_path: Path, capsys: pytest.CaptureFixture):
    sampler = {"_target_": "ldm_train.samplers.unipc.unipc", "_partial_": True}
    usual = {"num_inference_steps": 7, "guidance_scale": 1.5, "spacing": "karras", "sampler": sampler}
    save_model(tmp_path / "native", model("nothing"), TREES["nothing"], {"sampling": usual})
    convert(composed("convert", f"from={tmp_path}/native", f"to={tmp_path}/theirs", "format=diffusers"))
    said = capsys.readouterr().out
    for words in (
        "spacing karras becomes trailing",
        "sampler unipc becomes DDIM",
        "num_inference_steps=7, guidance_scale=1.5",
    ):
        assert words in said


def test_a_folder_of_something_else_is_never_replaced(tmp_path: Path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/thesis.txt").write_text("three years")
    with pytest.raises(FileExistsError, match="is there and no folder of diffusers; it is not replaced"):
        exported("nothing", tmp_path, "overwrite=true")
    assert (tmp_path / "theirs/thesis.txt").read_text() == "three years"


def test_files_beside_a_model_are_never_deleted_with_it(tmp_path: Path):
    folder = exported("nothing", tmp_path)
    (folder / "thesis.txt").write_text("three years")
    with pytest.raises(FileExistsError, match=r"holds thesis\.txt, which is no part of a model"):
        exported("nothing", tmp_path, "overwrite=true")
    assert (folder / "thesis.txt").is_file()
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("name: mine")
    with pytest.raises(ValueError, match=r"is a run, or another folder with a config\.yaml"):
        convert(composed("convert", f"from={tmp_path}/native", f"to={run}", "overwrite=true"))
    assert (run / "config.yaml").read_text() == "name: mine"


def test_a_linked_target_stays_a_link(tmp_path: Path):
    folder = exported("nothing", tmp_path)
    folder.rename(tmp_path / "disk")
    folder.symlink_to(tmp_path / "disk")
    exported("nothing", tmp_path, "overwrite=true", "dtype=float16")
    assert folder.is_symlink()
    assert load_file(folder / "unet" / diffusers_export.WEIGHTS)["conv_in.weight"].dtype == torch.float16
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "native", "theirs"]


@torch.no_grad()
def test_a_narrow_autoencoder_opens_as_its_folder_says(tmp_path: Path, capsys: pytest.CaptureFixture):
    tree = {"z_channels": 4, "channels": 16, "channel_mult": [1, 2], "num_res_blocks": 1}
    made = AutoencoderKL(**tree).eval()
    save_model(tmp_path / "ours", made, {"_target_": "ldm_train.models.autoencoder.AutoencoderKL", **tree}, {})
    convert(composed("convert", f"from={tmp_path}/ours", f"to={tmp_path}/theirs", "format=diffusers"))
    assert "diffusers.AutoModel.from_pretrained" in capsys.readouterr().out
    theirs = diffusers.AutoModel.from_pretrained(
        str(tmp_path / "theirs"), trust_remote_code=True, low_cpu_mem_usage=False
    )
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    moments = theirs.eval().encode(images).latent_dist
    torch.testing.assert_close(moments.mean, made.encode(images).mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(theirs.decode(moments.mean).sample, made.decode(moments.mean), rtol=1e-4, atol=1e-4)


def test_an_autoencoder_of_diffusers_keeps_the_scale_of_its_latents(tmp_path: Path):
    folder = exported("nothing", tmp_path)
    config = folder / "vqvae" / "config.json"
    config = config if config.is_file() else folder / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"scaling_factor": 0.3}))
    convert(composed("convert", f"from={config.parent}", f"to={tmp_path}/again", "format=diffusers", "verify=true"))
    assert json.loads((tmp_path / "again" / "config.json").read_text())["scaling_factor"] == pytest.approx(0.3)


def test_verify_does_not_overlook_nan(tmp_path: Path):
    broken = model("nothing")
    broken.first_stage.autoencoder.decoder.conv_out.bias.data[0] = float("nan")
    save_model(tmp_path / "native", broken, TREES["nothing"], {})
    options = (f"from={tmp_path}/native", f"to={tmp_path}/theirs")
    with pytest.raises(ValueError, match=r"not finite|computes something else"):
        convert(composed("convert", *options, "format=diffusers", "verify=true"))
    with pytest.raises(ValueError, match="computes something else"):
        convert(composed("convert", *options, "verify=true"))
