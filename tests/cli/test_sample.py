"""ldm-sample: every task on small models with random weights, and what it says to inputs that cannot be."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from PIL import Image

from ldm_train import images as pictures
from ldm_train.checkpoints.native import save_model
from ldm_train.cli.common import config_folder
from ldm_train.cli.sample import quoted, sample
from ldm_train.conditioning.text import train_tokenizer
from ldm_train.latent_diffusion import LatentDiffusion

SPATIAL = "ldm_train.conditioning.spatial."
TEXT = {
    "_target_": "ldm_train.conditioning.text.TrainedText", "tokenizer": train_tokenizer(["a red circle"], 300).to_str(),
    "dim": 8, "depth": 1, "heads": 2, "max_length": 8,
}  # fmt: skip
CONDITIONERS = {
    "none": {},
    "text": {"text": TEXT},
    "class": {
        "class": {"_target_": "ldm_train.conditioning.class_label.ClassLabel", "classes": ["cat", "dog"], "dim": 8, "slot": "context"}
    },
    "layout": {
        "layout": {
            "_target_": "ldm_train.conditioning.layout.LayoutBoxes", "dim": 8, "labels": ["cat", "dog"], "max_objects": 2,
            "depth": 1, "heads": 2,
        }
    },
    "semantic": {"map": {"_target_": SPATIAL + "SemanticMap", "num_labels": 5}},
    "superres": {"lowres": {"_target_": SPATIAL + "LowResolution", "factor": 4}},
    "inpaint": {"masked": {"_target_": SPATIAL + "MaskedImageCondition"}},
    "depth": {"depth": {"_target_": SPATIAL + "DepthMap"}},
    "variation": {
        "image": {
            "_target_": "ldm_train.conditioning.image_embedding.ImageEmbedding",
            "encoder": {"_target_": "ldm_train.conditioning.image_embedding.TinyVision"},
            "encoder_dim": 128, "dim": 8,
        }
    },
}  # fmt: skip
CONTEXT, CONCAT = {"text", "class", "layout"}, {"semantic": 3, "superres": 3, "inpaint": 5, "depth": 1}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    base, made = tmp_path_factory.mktemp("models"), {}

    def build(kind: str) -> Path:
        if kind not in made:
            torch.manual_seed(0)
            tree = {
                "_target_": "ldm_train.latent_diffusion.LatentDiffusion",
                "unet": {
                    "_target_": "ldm_train.models.unet.UNet", "in_channels": 4, "channels": 32, "channel_mult": [1, 2],
                    "num_res_blocks": 1, "attention_levels": [1], "num_heads": 2,
                    "context_dim": 8 if kind in CONTEXT else None, "vector_dim": 8 if kind == "variation" else None,
                    "concat_channels": CONCAT.get(kind, 0),
                },
                "first_stage": {
                    "_target_": "ldm_train.models.first_stage.FirstStage",
                    "autoencoder": {
                        "_target_": "ldm_train.models.autoencoder.AutoencoderKL", "z_channels": 4, "channels": 16,
                        "channel_mult": [1, 1, 1], "num_res_blocks": 1, "mid_attention": False,
                    },
                },
                "schedule": {"_target_": "ldm_train.diffusion.schedule.NoiseSchedule"},
                "conditioners": CONDITIONERS[kind], "latent_size": [8, 8],
            }  # fmt: skip
            model = instantiate(tree, _convert_="all")
            for p in model.unet.parameters():  # zero-initialised last layers would hide every condition
                if not p.any() and p.ndim > 1:
                    torch.nn.init.normal_(p, std=0.2)
            sampling = {"num_inference_steps": 3, "guidance_scale": 2.0, "spacing": "trailing"}
            sampling["sampler"] = {"_target_": "ldm_train.samplers.ddim.ddim", "_partial_": True}
            save_model(base / kind, model, tree, {"sampling": sampling})
            made[kind] = base / kind
        return made[kind]

    return build


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    rng = np.random.default_rng(0)
    photo = Image.fromarray(rng.integers(0, 255, (5, 7, 3), np.uint8)).resize((56, 40))
    mask = np.zeros((40, 56), np.uint8)
    mask[10:30, 20:40] = 255
    layout = [[0.1, 0.2, 0.4, 0.4, "dog"]]
    made = {
        "photo.png": photo,
        "mask.png": Image.fromarray(mask),
        "empty.png": Image.fromarray(np.zeros((40, 56), np.uint8)),
        "map.png": Image.fromarray(rng.integers(0, 5, (40, 56), np.uint8)),
        "wrong.png": Image.fromarray(np.full((40, 56), 9, np.uint8)),
        "depth.png": Image.fromarray(rng.integers(0, 255, (40, 56), np.uint8)),
    }
    for name, image in made.items():
        image.save(tmp_path / name)
    (tmp_path / "layout.json").write_text(json.dumps(layout))
    (tmp_path / "broken.png").write_bytes(b"no picture")
    return {p.name: str(p) for p in tmp_path.iterdir()}


@pytest.fixture
def run(model_folder: Callable[[str], Path], tmp_path: Path) -> Callable[..., list[torch.Tensor]]:
    def draw(kind: str, *options: str, out: str = "out") -> list[torch.Tensor]:
        arguments = [
            quoted(a) for a in (f"run={model_folder(kind)}", f"out={tmp_path / out}", "n=2", "overwrite=true", *options)
        ]
        with initialize_config_dir(str(config_folder()), version_base="1.3"):
            paths = sample(compose("sample", arguments))
        made = []
        for path in paths:
            with Image.open(path) as image:
                made.append(torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1)
        return made

    return draw


TASKS = {
    "unconditional": ("none", ()),
    "txt2img": ("text", ("prompts=a red circle",)),
    "class": ("class", ("classes=[dog]",)),
    "layout": ("layout", ("layout={layout.json}",)),
    "semantic": ("semantic", ("map={map.png}",)),
    "superres": ("superres", ("image={photo.png}",)),
    "variation": ("variation", ("image={photo.png}",)),
    "depth": ("depth", ("depth={depth.png}",)),
    "inpaint": ("inpaint", ("image={photo.png}", "mask={mask.png}")),
    "img2img": ("text", ("image={photo.png}", "prompts=a red circle")),
    "reconstruct": ("none", ("image={photo.png}", "task=reconstruct")),
}


@pytest.mark.parametrize("task", TASKS)
def test_each_task_means_what_its_inputs_say(task: str, run: Callable, files: dict[str, str], tmp_path: Path):
    kind, options = TASKS[task]
    named = [o.split("{")[0] + files[o.split("{")[1][:-1]] if "{" in o else o for o in options]
    made = run(kind, *named)
    assert [tuple(image.shape) for image in made] == [(3, 32, 32)] * 2
    recipe = json.loads((tmp_path / "out/recipe.json").read_text())
    assert recipe["task"] == task
    assert (made[0] - made[1]).abs().max() > (0.02 if task != "reconstruct" else -1)
    # The condition matters: without it the same seed draws something else.
    if task not in ("unconditional", "reconstruct", "img2img", "inpaint"):
        plain = run(kind, "task=unconditional", out="plain")
        assert (plain[0] - made[0]).abs().max() > 0.01


@pytest.mark.parametrize("kind", ["inpaint", "none"])
def test_inpainting_leaves_known_pixels_as_they_are(kind: str, run: Callable, files: dict[str, str]):
    """By a model trained for it, and by one that was not."""
    made = run(kind, f"image={files['photo.png']}", f"mask={files['mask.png']}", "sampler=dpm_solver")
    with Image.open(files["photo.png"]) as image:
        middle = image.crop((8, 0, 48, 40)).resize((32, 32), Image.Resampling.BICUBIC)
    known = torch.from_numpy(np.array(middle)).permute(2, 0, 1) / 127.5 - 1
    corner = slice(0, 7)
    assert (made[0][:, corner, corner] - made[1][:, corner, corner]).abs().max() == 0
    assert (made[0][:, corner, corner] - known[:, corner, corner]).abs().max() < 0.1
    assert (made[0][:, 10:20, 12:20] - made[1][:, 10:20, 12:20]).abs().max() > 0.02


def test_strength_leads_from_the_reconstruction_to_noise_alone(run: Callable, files: dict[str, str]):
    image = f"image={files['photo.png']}"
    rebuilt = run("text", image, "task=reconstruct", out="r")[0]
    distances = []
    for strength in (0.0, 0.1, 1.0):
        made = run("text", image, f"strength={strength}", "num_inference_steps=10", out=f"s{strength}")[0]
        distances.append(float((made - rebuilt).abs().mean()))
    assert distances[0] == 0
    assert distances == sorted(distances)
    free = run("text", "num_inference_steps=10", out="free")[0]
    made = run("text", image, "strength=1", "num_inference_steps=10", out="s1")[0]
    assert torch.equal(free, made)


def test_negative_prompts_and_guidance_options_matter(run: Callable):
    plain = run("text", "prompts=a red circle")[0]
    for k, options in enumerate((["negative=circle, red"], ["guidance.rescale=0.7"], ["guidance.interval=[0.5,3]"])):
        assert (run("text", "prompts=a red circle", *options, out=f"o{k}")[0] - plain).abs().max() > 0.005
    assert torch.equal(run("text", "prompts=a red circle", "negative=''", out="same")[0], plain)


def test_other_sizes_than_the_trained_one(run: Callable):
    assert run("none", "size=[64,48]")[0].shape == (3, 64, 48)
    with pytest.raises(ValueError, match=r"size 60x48 is not divisible by 8 .* use 64x48"):
        run("none", "size=[60,48]")


def test_pairs_of_inputs(run: Callable, files: dict[str, str], tmp_path: Path):
    made = run("semantic", f"map=[{files['map.png']},{files['map.png']}]")
    assert len(made) == 4
    assert pictures.read_recipe(tmp_path / "out/00002_seed2.png")["condition"] == "map.png"
    with pytest.raises(ValueError, match="they are paired, give equally many or one"):
        run(
            "text",
            f"image=[{files['photo.png']},{files['photo.png']}]",
            "prompts=[one,two,three]",
            "task=img2img",
        )


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("none", ("task=paint",), "unknown task 'paint'; this model can do unconditional, inpaint, outpaint, img2img"),
        ("none", ("task=superres", "image={photo.png}"), "no lowres conditioner, so it cannot do task=superres; it can do"),
        ("none", ("prompts=a cat",), "no caption conditioner, so prompts= means nothing to it; it takes no condition"),
        ("class", ("classes=[cow]",), "unknown class 'cow'; this model knows cat, dog"),
        ("none", ("task=inpaint", "image={photo.png}"), r"task=inpaint needs mask=<file>"),
        ("none", ("task=inpaint", "image={photo.png}", "mask={empty.png}"), "has no hole: white is what is drawn anew"),
        ("superres", ("task=superres",), "task=superres needs image=<file>"),
        ("none", ("image={broken.png}",), r"image=.*broken\.png: "),
        ("none", ("image=nothing.png",), r"image=nothing\.png: there is no such file"),
        ("semantic", ("map={wrong.png}",), "label 9 in a segmentation map, this model has 5 labels"),
        ("layout", ("layout=[[0.5,0.5,0.9,0.2,0]]",), "a box is not inside the picture"),
        ("layout", ("layout=circle",), "is no layout; write"),
        ("layout", ('layout=[[0.1,0.1,0.2,0.2,"cow"]]',), "unknown label 'cow'; this model knows cat, dog"),
        ("none", ("negative=ugly",), "takes no captions, so negative= means nothing"),
        ("text", ("image={photo.png}", "strength=1.5"), "strength is a share between 0 and 1"),
        ("none", ("num_inference_steps=0",), "num_inference_steps is 0; it must lie between 1 and 1000"),
        ("none", ("num_inference_steps=1001",), "num_inference_steps is 1001"),
        ("text", ("guidance.rescale=2",), r"guidance\.rescale is a share"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_named(
    kind: str, options: tuple[str, ...], message: str, run: Callable, files: dict[str, str], tmp_path: Path
):
    named = [o.split("{")[0] + files[o.split("{")[1][:-1]] if "{" in o else o for o in options]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(kind, *named)
    assert not (tmp_path / "out").exists()


def test_five_lines_of_python(model_folder: Callable[[str], Path]):
    model = LatentDiffusion.from_pretrained(str(model_folder("text")))
    images = model.sample({"caption": ["a red circle", "a cat"]}, seeds=[1, 2])
    assert images.shape == (2, 3, 32, 32)
    again = model.sample({"caption": ["a red circle"]}, seeds=[1], num_inference_steps=3, guidance_scale=2.0)
    torch.testing.assert_close(images[:1], again, rtol=1e-4, atol=1e-4)
    with pytest.raises(FileNotFoundError, match="holds no trained model"):
        LatentDiffusion.from_pretrained(str(model_folder("text").parent / "nothing"))


def test_autoguidance_leads_away_from_a_weaker_model(model_folder: Callable[[str], Path]):
    model = LatentDiffusion.from_pretrained(str(model_folder("none")))
    weak = LatentDiffusion.from_pretrained(str(model_folder("none")))
    alone = model.sample({}, [3], guidance_scale=1.0)
    torch.testing.assert_close(model.sample({}, [3], guidance_scale=3.0, weak=weak), alone, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        for p in weak.unet.parameters():
            p.mul_(0.9)
    assert (model.sample({}, [3], guidance_scale=3.0, weak=weak) - alone).abs().max() > 0.01


def test_guidance_keeps_pictures_that_training_never_dropped(model_folder: Callable[[str], Path]):
    """Both sides of guidance see the low-resolution picture: its null was never trained."""
    model, seen = LatentDiffusion.from_pretrained(str(model_folder("superres"))), []
    model.unet.register_forward_pre_hook(lambda _, args, named: seen.append(named["concat"]), with_kwargs=True)
    lowres = torch.rand(1, 3, 8, 8) * 2 - 1
    model.sample({"lowres": lowres}, [0], guidance_scale=3.0)
    assert torch.equal(seen[0][0], lowres[0])
    assert torch.equal(seen[0][1], lowres[0])
    next(iter(model.conditioners.values())).dropout = 0.1  # trained with a null: guidance leads away from it
    seen.clear()
    model.sample({"lowres": lowres}, [0], guidance_scale=3.0)
    assert not seen[0][1].any()
