"""ldm-sample: every task on small models with random weights, and the errors for invalid inputs."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from chains import composed
from PIL import Image
from small_models import small_model
from tiers import tiered

import ldm_train
from ldm_train import images as pictures
from ldm_train.checkpoints.native import save_model
from ldm_train.cli.common import quoted
from ldm_train.cli.sample import FREE
from ldm_train.errors import Refused
from ldm_train.generation.sample import sample
from ldm_train.latent_diffusion import Guidance, LatentDiffusion, Sampling
from ldm_train.samplers.ddim import ddim


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    base = tmp_path_factory.mktemp("models")
    return lambda kind: small_model(kind, base / kind)


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
    (tmp_path / "blank.txt").write_text("a red circle\n\na cat\n")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    (tmp_path / "number.jsonl").write_text('{"prompt": "a cat", "negative": 5}\n')
    (tmp_path / "negative.jsonl").write_text('{"prompt": "a cat", "negative": "a dog"}\n')
    Image.fromarray(np.full((20, 60), 255, np.uint8)).save(tmp_path / "wide.png")
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a cat"}\n{"prompt": \n')
    (tmp_path / "three.jsonl").write_text('{"prompt": "a cat", "n": 3}\n')
    (tmp_path / "unknown.jsonl").write_text('{"prompt": "a cat", "steps": 3}\n')
    return {p.name: str(p) for p in tmp_path.iterdir()}


@pytest.fixture
def run(model_folder: Callable[[str], Path], tmp_path: Path) -> Callable[..., list[torch.Tensor]]:
    def draw(kind: str, *options: str, out: str = "out") -> list[torch.Tensor]:
        arguments = [
            quoted(a, FREE)
            for a in (f"run={model_folder(kind)}", f"out={tmp_path / out}", "n=2", "overwrite=true", *options)
        ]
        paths = sample(composed("sample", *arguments))
        made = []
        for path in paths:
            with Image.open(path) as image:
                made.append(torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1)
        return made

    return draw


def named(options: tuple[str, ...], files: dict[str, str]) -> list[str]:
    """Replaces file names in braces, e.g. {photo.png}, by the paths of those files; ${...} stays."""
    return [re.sub(r"(?<!\$)\{([\w.]+)\}", lambda m: files[m[1]], o) for o in options]


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
    "outpaint": ("text", ("image={photo.png}", "extend=[0,8,0,0]")),
    "interpolate": ("text", ("task=interpolate", "prompts=[a red circle,a cat]")),
    "reconstruct": ("none", ("image={photo.png}", "task=reconstruct")),
}
REPLAYED = TASKS | {
    "arithmetic": ("text", ("task=interpolate", "prompts=[+a cat,-a dog,+a red circle]")),
    "inversion": ("calm", ("image={photo.png}", "invert=true", "panorama=0.5", "size=[64,64]", "guidance_scale=1")),
    "walk": ("calm", ("task=interpolate", "image=[{photo.png},{photo.png}]", "n=3", "guidance_scale=1")),
    "jumps": ("none", ("image={photo.png}", "mask={mask.png}", "resample.repeats=2", "resample.jump_length=1")),
    "a field of the model's own": ("edges", ("+fields.edges={photo.png}",)),
    "captions that mean something elsewhere": (
        "text",
        ("prompts=${a}, 'b' and [c]", "negative=${d}", "guidance_scale=2"),
    ),
}


@pytest.mark.parametrize("task", TASKS)
def test_each_task_means_what_its_inputs_say(task: str, run: Callable, files: dict[str, str], tmp_path: Path):
    kind, options = TASKS[task]
    made = run(kind, *named(options, files))
    if task == "reconstruct":  # is deterministic: makes one image per input
        made = made * 2
    assert [tuple(image.shape) for image in made] == [(3, 32, 40 if task == "outpaint" else 32)] * 2
    recipe = json.loads((tmp_path / "out/recipe.json").read_text())
    assert recipe["task"] == task
    assert (made[0] - made[1]).abs().max() > (0.02 if task != "reconstruct" else -1)
    # The condition matters: without it, or with another one, the same seed draws something else.
    if task not in ("unconditional", "reconstruct", "img2img", "inpaint", "outpaint"):
        other = {"semantic": ("map={empty.png}",), "superres": ("image={depth.png}",), "depth": ("depth={photo.png}",)}
        plain = run(kind, *named(other.get(task, ("task=unconditional",)), files), out="plain")
        assert (plain[0] - made[0]).abs().max() > 0.01


@pytest.mark.parametrize("kind", ["inpaint", "none"])
def test_inpainting_leaves_known_pixels_as_they_are(kind: str, run: Callable, files: dict[str, str]):
    """With a model trained for inpainting and with one that was not."""
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
    wide, high = run("none", "size=5:3", out="wide")[0], run("none", "size=2:3", out="high")[0]
    assert wide.shape == (3, 24, 40)  # the model was trained at 32x32
    assert high.shape == (3, 40, 24)


def test_pairs_of_inputs(run: Callable, files: dict[str, str], tmp_path: Path):
    made = run("semantic", f"map=[{files['map.png']},{files['map.png']}]")
    assert len(made) == 4
    assert pictures.read_recipe(tmp_path / "out/00002_seed2.png")["condition"] == "map.png"
    with pytest.raises(ValueError, match="they are paired, give equally many or one"):
        run("text", f"image=[{files['photo.png']},{files['photo.png']}]", "prompts=[one,two,three]", "task=img2img")


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("none", ("task=paint",), "unknown task 'paint'; this model can do unconditional, inpaint, outpaint, img2img"),
        ("none", ("task=superres", "image={photo.png}"), "no lowres conditioner, so it cannot do task=superres; it can do"),
        ("none", ("+fields.edges=x.png",), r"no edges conditioner, so fields\.edges= has no effect"),
        ("edges", ("+fields.edge=x.png",), r"no edge conditioner, so fields\.edge= .*; it takes fields\.edges="),
        ("edges", ("+fields.edges=x.png",), r"fields\.edges=x\.png: there is no such file"),
        ("none", ("fields=5",), "fields=5 is not a section with options; set fields.<name>="),
        ("none", ("tiles=5",), r"tiles=5 is not a section with options; set tiles\.cells="),
        ("none", ("guide=null",), r"guide=None is not a section with options; set guide\.classifier="),
        ("none", ("prompts=a cat",), "no caption conditioner, so prompts= has no effect; it takes no condition"),
        ("class", ("classes=[cow]",), "unknown class 'cow'; this model knows cat, dog"),
        ("none", ("task=inpaint", "image={photo.png}"), r"task=inpaint needs mask=<file>"),
        ("none", ("task=inpaint", "image={photo.png}", "mask={empty.png}"), "has no hole: white marks what is redrawn"),
        ("superres", ("task=superres",), "task=superres needs image=<file>"),
        ("none", ("image={broken.png}",), r"image=.*broken\.png: "),
        ("none", ("image=nothing.png",), r"image=nothing\.png: there is no such file"),
        ("semantic", ("map={wrong.png}",), "label 9 in a segmentation map, this model has 5 labels"),
        ("layout", ("layout=[[0.5,0.5,0.9,0.2,0]]",), "a box is not inside the picture"),
        ("layout", ("layout=circle",), "is not a layout; write"),
        ("layout", ('layout=[[0.1,0.1,0.2,0.2,"cow"]]',), "unknown label 'cow'; this model knows cat, dog"),
        ("none", ("negative=ugly",), "takes no captions, so negative= has no effect"),
        ("text", ("image={photo.png}", "strength=1.5"), "strength is a share between 0 and 1"),
        ("none", ("num_inference_steps=0",), "num_inference_steps is 0; it must lie between 1 and 1000"),
        ("none", ("num_inference_steps=1001",), "num_inference_steps is 1001"),
        ("text", ("guidance.rescale=2",), r"guidance\.rescale is a share"),
        ("text", ("guidance_scale=1", "negative=ugly"), "negative: without effect at guidance_scale=1"),
        ("none", ("task=outpaint", "image={photo.png}"), "task=outpaint needs extend=<pixels>"),
        ("none", ("image={photo.png}", "extend=[0,0,0,0]"), "at least one of them above 0"),
        ("none", ("image={photo.png}", "extend=[0,3,0,0]"), r"size 32x35 is not divisible by 8.*by other values in extend="),
        ("none", ("image={photo.png}", "task=img2img", "extend=[8,0,0,0]"), "extend= has no effect with task=img2img"),
        ("none", ("task=interpolate", "image={photo.png}"), "needs two pictures or more"),
        ("text", ("task=interpolate", "prompts=[a,b]", "n=1"), "needs n of at least 2"),
        ("none", ("film=avi",), "film is one of gif, mp4, strip, not 'avi'"),
        ("none", ("precision=8",), "precision is one of 32, bf16-mixed"),
        ("none", ("compile=fast",), "compile is one of default, cuda_graphs"),
        ("none", ("panorama=1",), "panorama is the share of a window"),
        ("none", ("tiles.cells=8", "tiles.overlap=8"), "tiles of 8 cells cannot share 8"),
        ("none", ("resample.repeats=2", "resample.jump_length=0"), r"resample\.jump_length=0 is below 1"),
        ("none", ("accelerator=gpu",), "no GPU is visible; use accelerator=cpu"),
        ("none", ("guide.classifier=nothing", "classes=[a]"), "guide.classifier=nothing is neither a run with a finished classifier"),
        ("none", ("guide.clip=/nothing/here", "prompts=x"), "cannot load the CLIP model /nothing/here"),
        ("none", ("guide.clip=nothing/here",), r"guide\.clip needs prompts="),
        ("text", ("weaker_model=nothing", "prompts=a cat"), "weaker_model=nothing has no trained model"),
        ("text", ("image_prompt=a cat", "image={photo.png}"), "it needs invert=true"),
        ("text", ("prompts={blank.txt}",), r"blank\.txt, line 2 is blank; remove it, or write \"\" for an empty caption"),
        ("text", ("prompts={empty.txt}",), r"empty\.txt is empty"),
        ("text", ("prompts=nowhere.txt",), r"prompts=nowhere\.txt: there is no such file"),
        ("text", ("prompts={broken.jsonl}",), r"broken\.jsonl, line 2 is not JSON"),
        ("text", ("prompts={unknown.jsonl}",), r"unknown\.jsonl, line 1: unknown key 'steps'; known are prompt, negative, seed, n"),
        ("text", ("prompts={number.jsonl}",), r"number\.jsonl, line 1: negative is 5, not a caption"),
        ("text", ("prompts={latin.txt}",), r"latin\.txt is not UTF-8 text"),
        ("text", ("prompts=[]",), r"prompts=\[\] is an empty list"),
        ("text", ("task=unconditional", "prompts=a cat"), "prompts= has no effect with task=unconditional"),
        ("text", ("prompts={negative.jsonl}", "guidance_scale=1"), "negative= needs guidance"),
        ("text", ("task=reconstruct", "image={photo.png}", "film=gif"), "nothing is drawn by task=reconstruct"),
        ("text", ("image={photo.png}", "strength=0", "film=gif"), "nothing is drawn by task=img2img"),
        ("text", ("image={photo.png}", "strength=0.01"), r"strength=0\.01 of num_inference_steps=\d+ is less than one step; set it to"),
        ("text", ("guidance_scale=2", "guidance.interval=[1e-5,1e-4]"), "holds none of the noise levels .* so nothing is guided"),
        ("superres", (), r"never trained without lowres, so it cannot do task=unconditional without; give image="),
        ("superres", ("task=img2img", "image={photo.png}"), r"cannot do task=img2img: its image= is the condition \(lowres\)"),
        ("text", ("image={photo.png}", "invert=true", "sampler=heun"), r"leave sampler= out \(it is ddim, eta 0\)"),
        ("text", ("image={photo.png}", "invert=true", "resample.repeats=2"), "which inversion has just taken out"),
        ("text", ("image={photo.png}", "invert=true", "invert_iterations=0"), "invert_iterations=0 is below 1"),
        ("none", ("image={photo.png}", "invert=true", "image_prompt=a cat"), "so image_prompt= has no effect"),
        ("text", ("prompts=a cat", "invert=true"), "invert= has no effect with task=txt2img"),
        ("none", ("guidance_scale=3", "guidance.rescale=0.5"), "takes no condition that guidance could strengthen"),
        ("text", ("guidance.threshold=0",), r"guidance\.threshold is a percentile"),
        ("text", ("guidance.interval=5",), r"guidance\.interval=5 is not a list of 2 numbers"),
        ("text", ("guidance.interval=[2,1]",), r"guidance\.interval=\[2, 1\] is \[low, high\] in noise levels, the lower one first"),
        ("none", ("size=16:0",), r"size=16:0 is not a ratio of width to height such as 16:9"),
        ("none", ("size=[64]",), r"size=\[64\] is not a list of 2 whole numbers"),
        ("none", ("image={photo.png}", "extend=[0.5,0,0,0]"), r"extend=\[0\.5, 0, 0, 0\] is not a list of 4 whole numbers"),
        ("none", ("n=abc",), "n='abc' is not a whole number"),
        ("none", ("seed=1.5",), "seed=1.5 is not a whole number"),
        ("none", ("batch_size=0",), "batch_size=0 is below 1"),
        ("none", ("strength=abc",), "strength='abc' is not a number"),
        ("none", ("accelerator=tpu",), "accelerator is auto, cpu, gpu or mps"),
        ("none", ("devices=2", "film=gif"), "film= is made while pictures are drawn, in one process"),
        ("none", ("devices=5000", "accelerator=cpu"), "devices=5000, but there are"),
        ("none", ("engine=spark",), "engine=spark is not known: engine=ray"),
        ("none", ("tiles.cells=0",), r"tiles\.cells=0 is below 1"),
        ("none", ("image={photo.png}", "mask={wide.png}"), "give a mask of the picture's own proportions"),
        ("text", ("task=interpolate", "prompts=[a,b]", "weaker_model=x", "guidance_scale=2"), "the weaker model knows no mixtures"),
        ("none", ("recipe={photo.png}",), "is not a recipe of ldm-sample"),
        ("none", ("seed=null",), "seed=null: it needs a whole number"),
        ("none", ("n=null",), "n=null: it needs a whole number"),
        ("none", ("strength=null",), "strength=null: it needs a number"),
        ("none", ("trust=my_package",), r"trust is a list: trust=\[my_package\]"),
        ("none", ("runs_dir=[a]",), r"runs_dir=\['a'\] is not a folder"),
        ("text", ("prompts=a cat", "strength=0.2"), "strength= has an effect only with task=img2img"),
        ("none", ("guidance_scale=9",), "guidance_scale= has an effect only for a model that takes a condition"),
        ("none", ("resample.jump_length=3",), r"resample\.jump_length= has an effect only with resample\.repeats=2"),
        ("none", ("tiles.overlap=3",), r"tiles\.overlap= has an effect only with tiles\.cells="),
        ("none", ("invert_iterations=3",), "invert_iterations= has an effect only with invert=true"),
        ("none", ("guide.clip_scale=3",), r"guide\.clip_scale= has an effect only with guide\.clip="),
        ("text", ("task=reconstruct", "image={photo.png}", "prompts=a cat"), "prompts= has an effect only where something is drawn"),
        ("superres", ("task=interpolate",), r"cannot do task=interpolate: its image= is the condition \(lowres\)"),
        ("none", ("image={photo.png}", "task=reconstruct", "num_inference_steps=7"), "num_inference_steps= has an effect only where"),
        ("text", ("image={photo.png}", "task=reconstruct", "guidance.rescale=0.5"), "guidance.rescale= has an effect only where"),
        ("text", ("image={photo.png}", "invert=true", "prompts={three.jsonl}"), "a prompt's n has no effect with invert=true"),
        ("layout", ("layout=[[0.1,0.1,0.2,0.2,1e999]]",), "is not a layout; write"),
        ("layout", ('layout=[["cat",0.1,0.1,0.2,0.2]]',), "is not a layout; write"),
        ("none", ("recipe=nothing.json",), r"recipe=nothing\.json: there is no such file"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_named(
    kind: str, options: tuple[str, ...], message: str, run: Callable, files: dict[str, str], tmp_path: Path
):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(kind, *named(options, files))
    assert not (tmp_path / "out").exists()


def test_five_lines_of_python(model_folder: Callable[[str], Path]):
    model = ldm_train.load(str(model_folder("text")))
    images = model.sample({"caption": ["a red circle", "a cat"]}, seeds=[1, 2])
    assert images.shape == (2, 3, 32, 32)
    again = model.sample(
        {"caption": ["a red circle"]}, seeds=[1], sampling=Sampling(num_inference_steps=3, guidance_scale=2.0)
    )
    torch.testing.assert_close(images[:1], again, rtol=1e-4, atol=1e-4)
    with pytest.raises(FileNotFoundError, match="holds no trained model"):
        ldm_train.load(str(model_folder("text").parent / "nothing"))


def test_autoguidance_leads_away_from_a_weaker_model(model_folder: Callable[[str], Path]):
    model = ldm_train.load(str(model_folder("none")))
    weaker = ldm_train.load(str(model_folder("none")))
    alone = model.sample({}, [3], Sampling(guidance_scale=1.0))
    torch.testing.assert_close(
        model.sample({}, [3], Sampling(guidance_scale=3.0), guidance=Guidance(weaker_model=weaker)),
        alone,
        rtol=1e-3,
        atol=1e-3,
    )
    with torch.no_grad():
        for p in weaker.network.parameters():
            p.mul_(0.9)
    assert (
        model.sample({}, [3], Sampling(guidance_scale=3.0), guidance=Guidance(weaker_model=weaker)) - alone
    ).abs().max() > 0.01


def test_guidance_keeps_pictures_that_training_never_dropped(model_folder: Callable[[str], Path]):
    """The low-resolution image is not left out for guidance, because its null was never trained; without another
    condition both sides would be the same, and the network is evaluated once."""
    model, seen = ldm_train.load(str(model_folder("superres"))), []
    model.network.register_forward_pre_hook(lambda _, args, named: seen.append(named["concat"]), with_kwargs=True)
    lowres = torch.rand(1, 3, 8, 8) * 2 - 1
    condition = model.condition({"lowres": lowres})
    model.sample({}, [0], Sampling(guidance_scale=3.0), condition=condition)
    assert all(torch.equal(pictures, lowres) for pictures in seen)
    next(iter(model.conditioners.values())).dropout = 0.1  # trained with a null: guidance leads away from the null
    seen.clear()
    model.sample({"lowres": lowres}, [0], Sampling(guidance_scale=3.0))
    assert not seen[0][1].any()


def test_a_prompt_file_gives_each_line_its_own_pictures(run: Callable, tmp_path: Path):
    lines = ['{"prompt": "a cat", "seed": 7, "n": 1}', '{"prompt": "a red circle", "negative": "a cat"}']
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    made = run("text", f"prompts={tmp_path}/prompts.jsonl")
    recipe = json.loads((tmp_path / "out/recipe.json").read_text())
    assert [(e["seed"], e["condition"]) for e in recipe["images"]] == [
        (7, "a cat"),
        (1, "a red circle"),
        (2, "a red circle"),
    ]
    alone = run("text", "prompts=a cat", "seed=7", "n=1", out="one")[0]
    assert (made[0] - alone).abs().max() < 0.02
    negative = run("text", "prompts=a red circle", "negative=a cat", "seed=1", out="negative")
    assert (made[1] - negative[0]).abs().max() < 0.02
    (tmp_path / "prompts.txt").write_text('a cat\n""\n', encoding="utf-8-sig")  # as Notepad writes it
    made = run("text", f"prompts={tmp_path}/prompts.txt", out="txt")
    empty = run("text", "prompts=''", "seed=2", out="none")
    assert (made[2] - empty[0]).abs().max() < 0.02
    assert len(made) == 4
    texts = [e["condition"] for e in json.loads((tmp_path / "txt/recipe.json").read_text())["images"]]
    assert texts == ["a cat", "a cat", "", ""]


def test_an_interrupted_job_continues_and_its_pixels_are_those_of_an_undisturbed_one(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = run("text", "prompts=a red circle", "n=5", "batch_size=2", out="whole")
    from ldm_train.generation.job import Job

    saved, batches = Job.save, []

    def stops(self: Job, part: list, images: torch.Tensor) -> None:
        if len(batches) == 2:
            raise KeyboardInterrupt
        batches.append([r.number for r in part])
        saved(self, part, images)

    monkeypatch.setattr(Job, "save", stops)
    with pytest.raises(KeyboardInterrupt):
        run("text", "prompts=a red circle", "n=5", "batch_size=2", out="again")
    assert batches == [[0, 1], [2, 3]]
    assert not json.loads((tmp_path / "again/recipe.json").read_text())["finished"]
    assert not list((tmp_path / "again").glob(".*"))
    monkeypatch.setattr(
        Job, "save", lambda self, part, images: (batches.append([r.number for r in part]), saved(self, part, images))
    )
    made = run("text", "prompts=a red circle", "n=5", "batch_size=2", "overwrite=false", out="again")
    assert batches[2:] == [[4]]
    assert all(map(torch.equal, made, whole))
    assert json.loads((tmp_path / "again/recipe.json").read_text())["finished"]
    # A finished job draws nothing again until an image is damaged; then the whole batch of that image is drawn.
    run("text", "prompts=a red circle", "n=5", "batch_size=2", "overwrite=false", out="again")
    (tmp_path / "again/00001_seed1.png").write_bytes(b"damaged")
    made = run("text", "prompts=a red circle", "n=5", "batch_size=2", "overwrite=false", out="again")
    assert batches[3:] == [[0, 1]]
    assert all(map(torch.equal, made, whole))


@pytest.mark.slow
@pytest.mark.skipif(os.cpu_count() == 1, reason="needs two cores")
def test_several_processes_draw_the_same_bytes_and_continue_a_job(run: Callable, tmp_path: Path):
    options = ("prompts=[a red circle,a cat]", "batch_size=1", "accelerator=cpu")
    run("text", *options, out="one")
    run("text", *options, "devices=2", out="several")
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert len(files) == 6  # four pictures, their grid and recipe
    assert all((tmp_path / "several" / name).read_bytes() == (tmp_path / "one" / name).read_bytes() for name in files)
    (tmp_path / "several" / "00002_seed2.png").unlink()
    run("text", *options, "devices=2", out="several")
    assert all((tmp_path / "several" / name).read_bytes() == (tmp_path / "one" / name).read_bytes() for name in files)


def test_another_job_does_not_overwrite_a_folder(run: Callable, tmp_path: Path):
    run("text", "prompts=a red circle", "overwrite=false")
    before = (tmp_path / "out/00000_seed0.png").read_bytes()
    with pytest.raises(
        Refused, match=r"(?s)config\.prompts: .*Choose another out=<folder>, or overwrite=true"
    ) as refused:
        run("text", "prompts=a cat", "overwrite=false")
    assert "out holds pictures of another job" in str(refused.value)
    assert (tmp_path / "out/00000_seed0.png").read_bytes() == before
    run("text", "prompts=a cat", "n=1")  # overwrite=true, and fewer images: the old ones are removed
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["00000_seed0.png", "grid.png", "recipe.json"]


def test_a_recipe_replays_to_identical_bytes(
    run: Callable, model_folder: Callable, files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture
):
    options = (
        "prompts=a red circle",
        f"image={files['photo.png']}",
        "strength=0.8",
        "n=3",
        "batch_size=2",
        "sampler=dpm_solver",
    )
    run("text", *options)
    inputs = [f"run={model_folder('text')}", f"image={files['photo.png']}"]
    replay = sample(composed("sample", f'recipe="{tmp_path}/out/recipe.json"', *inputs))
    single = sample(composed("sample", f'recipe="{tmp_path}/out/00002_seed2.png"', f"out={tmp_path}/single", *inputs))
    said = capsys.readouterr().out
    assert "3 of 3 pictures are identical to the recipe's" in said
    assert "1 of 1 pictures are identical to the recipe's" in said
    for path in replay:
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
    assert [p.name for p in single] == ["00002_seed2.png"]
    assert single[0].read_bytes() == (tmp_path / "out/00002_seed2.png").read_bytes()
    for other in ("guidance_scale=5", "+fields.edges=x.png", "fields=5", "guide=5"):
        option = other.strip("+").partition("=")[0]
        with pytest.raises(ValueError, match=f"recipe= draws again what was drawn; {option}= cannot change it"):
            sample(composed("sample", f'recipe="{tmp_path}/out"', other))
    Image.new("RGB", (40, 40)).save(files["photo.png"])
    with pytest.raises(ValueError, match="image= is no longer the same file"):
        sample(composed("sample", f'recipe="{tmp_path}/out"', f"out={tmp_path}/changed", *inputs))


def test_a_replay_elsewhere_says_that_pixels_may_differ(
    run: Callable, model_folder: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
):
    model = f"run={model_folder('text')}"
    run("text", "prompts=a red circle")
    path = tmp_path / "out/recipe.json"
    recipe = json.loads(path.read_text())
    recipe["machine"]["torch"] = "1.0"
    path.write_text(json.dumps(recipe))
    sample(composed("sample", f'recipe="{path}"', f"out={tmp_path}/elsewhere", model))
    assert "pixels may differ" in capsys.readouterr().out
    recipe["model_sha256"] = "0"
    path.write_text(json.dumps(recipe))
    with pytest.raises(ValueError, match="does not hold the weights that drew this recipe"):
        sample(composed("sample", f'recipe="{path}"', f"out={tmp_path}/other", model))


def test_a_job_or_replay_in_its_own_folder_is_drawn_again_on_another_machine(
    run: Callable, model_folder: Callable, tmp_path: Path
):
    model = f"run={model_folder('text')}"
    own = (model, "prompts=a yellow circle", "n=1")
    first = sample(composed("sample", *own))
    recipe = f'recipe="{first[0].parent}"'
    replay = sample(composed("sample", recipe, model))
    for path in (first[0], replay[0]):
        before = json.loads((path.parent / "recipe.json").read_text())
        before["machine"]["torch"] = "1.0"
        (path.parent / "recipe.json").write_text(json.dumps(before))
        path.write_bytes(b"drawn there")
    assert sample(composed("sample", *own)) == first
    assert sample(composed("sample", recipe, model)) == replay
    for path in (first[0], replay[0]):
        assert path.read_bytes() != b"drawn there"
    run("text", "prompts=a red circle", "n=1", out="named")  # a folder that the command names is not replaced
    recipe = json.loads((tmp_path / "named/recipe.json").read_text())
    recipe["machine"]["torch"] = "1.0"
    (tmp_path / "named/recipe.json").write_text(json.dumps(recipe))
    with pytest.raises(Refused, match=r"machine\.torch: 1\.0"):
        run("text", "prompts=a red circle", "n=1", "overwrite=false", out="named")


def test_a_recipe_takes_files_however_their_paths_are_written(
    run: Callable, model_folder: Callable, files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    made = run("text", "image=./photo.png", "n=1")
    for written in ("./photo.png", "photo.png", files["photo.png"]):
        command = (f"recipe={tmp_path}/out", f"run={model_folder('text')}", f"image={written}", "overwrite=true")
        (again,) = sample(composed("sample", *command))
        with Image.open(again) as image:
            assert torch.equal(torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1, made[0])


@pytest.mark.parametrize(
    ("kind", "options", "size", "kept"),
    [("none", (), "32x32", "40,56"), ("superres", (), "8x8", "160,224"), ("none", ("size=[40,56]",), None, None)],
)
def test_pictures_that_are_cut_are_named_with_the_size_that_keeps_them(
    kind: str, options: tuple, size: str | None, kept: str | None, run: Callable, files: dict[str, str], capsys
):
    run(kind, f"image={files['photo.png']}", "n=1", *options)
    said = capsys.readouterr().out
    if size is None:
        assert "cropped" not in said
    else:
        assert f"photo.png: 56x40 pixels are cropped and resized to {size}; size=[{kept}] keeps them" in said
        assert len(run(kind, f"image={files['photo.png']}", "n=1", f"size=[{kept}]", out="whole")) == 1


def test_overwriting_leaves_what_the_job_did_not_make(run: Callable, tmp_path: Path):
    run("text", "prompts=a red circle", "n=1", "film=strip")
    (tmp_path / "out/00000_seed0.txt").write_text("my caption")
    run("text", "prompts=a cat", "n=1", "seed=3")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "00000_seed0.txt", "00000_seed3.png", "grid.png", "recipe.json",
    ]  # fmt: skip


def test_a_job_continues_from_another_name_of_its_model(
    run: Callable, model_folder: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    run("text", "prompts=a red circle", "n=2")
    monkeypatch.chdir(model_folder("text").parent)
    sample(composed("sample", "run=text", "runs_dir=.", "prompts=a red circle", "n=2", f"out={tmp_path}/out"))
    assert "2 pictures were there already" in capsys.readouterr().out


def test_the_network_is_evaluated_once_where_guidance_has_nothing_to_drop(model_folder: Callable[[str], Path]):
    for kind, batch, each in (
        ("text", {}, 1),
        ("text", {"caption": ["a cat"]}, 2),
        ("superres", {"lowres": torch.zeros(1, 3, 8, 8)}, 1),
    ):
        model, counts = ldm_train.load(model_folder(kind)), []
        model.network.register_forward_pre_hook(lambda _, inputs, counts=counts: counts.append(len(inputs[0])))
        model.sample(batch, [0], Sampling(ddim, 3, guidance_scale=2.0))
        assert counts == [each] * 3


def test_captions_keep_separators_of_unicode_and_files_may_have_spaces(run: Callable, tmp_path: Path, monkeypatch):
    (tmp_path / "my prompts.txt").write_text("a cat\u0085 sits\na dog\u2028runs\n")
    monkeypatch.chdir(tmp_path)
    run("text", "prompts=my prompts.txt", "n=1")
    entries = json.loads((tmp_path / "out/recipe.json").read_text())["config"]["prompts"]
    assert entries == ["a cat\u0085 sits", "a dog\u2028runs"]
    run("text", "prompts=other prompts.txt", "n=1", out="caption")
    assert json.loads((tmp_path / "caption/recipe.json").read_text())["config"]["prompts"] == ["other prompts.txt"]


@pytest.mark.parametrize("kind", ["gif", "mp4", "strip"])
def test_films_show_the_way_from_noise_to_the_picture(kind: str, run: Callable, tmp_path: Path):
    made = run("text", "prompts=a red circle", "n=2", f"film={kind}")
    paths = sorted((tmp_path / "out").glob("*strip.png" if kind == "strip" else f"*.{kind}"))
    assert len(paths) == 2
    if kind == "strip":
        with Image.open(paths[0]) as strip:
            assert strip.width > 3 * 128
    elif kind == "gif":
        with Image.open(paths[0]) as film:
            # Three steps; the last one is the image itself and is held. Equal frames may be merged.
            assert film.n_frames >= 3
            film.seek(film.n_frames - 1)
            last = torch.from_numpy(np.array(film.convert("RGB"))).permute(2, 0, 1)[:, 4::8, 4::8] / 127.5 - 1
        assert (last - made[0]).abs().mean() < 0.1  # 256 colours
    else:
        imageio = pytest.importorskip("imageio.v3")
        assert imageio.imread(paths[0]).shape == (15, 256, 256, 3)


def test_a_replayed_picture_has_its_own_film(run: Callable, model_folder: Callable, tmp_path: Path) -> None:
    run("text", "prompts=a red circle", "n=3", "film=strip")
    folder = tmp_path / "out"
    paths = sorted(folder.glob("*[0-9].png"))
    sample(
        composed(
            "sample", f"recipe={paths[2]}", f"run={model_folder('text')}", f"out={tmp_path / 'again'}", "film=strip"
        )
    )
    (film,) = (tmp_path / "again").glob("*strip.png")
    (usual,) = folder.glob(f"{paths[2].stem}*strip.png")
    assert film.name == usual.name
    assert np.array_equal(np.asarray(Image.open(film)), np.asarray(Image.open(usual)))


def test_a_job_of_very_many_pictures_is_continued_and_replayed(
    run: Callable, model_folder: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
):
    run("none")
    recipe = json.loads((tmp_path / "out/recipe.json").read_text())
    many = [{"file": f"{k:05d}_seed{k}.png", "seed": k, "condition": "x" * 400} for k in range(2, 50_000)]
    (tmp_path / "out/recipe.json").write_text(json.dumps({**recipe, "images": [*recipe["images"], *many]}, indent=1))
    assert (tmp_path / "out/recipe.json").stat().st_size > 16 << 20
    again = composed("sample", f"recipe={tmp_path}/out", f"run={model_folder('none')}", f"out={tmp_path}/again")
    capsys.readouterr()
    sample(again)
    assert "2 of 2 pictures are identical" in capsys.readouterr().out
    run("none")
    assert "2 pictures were there already" in capsys.readouterr().out


def test_pictures_of_many_prompts_carry_those_of_their_batch(
    run: Callable, model_folder: Callable, tmp_path: Path, capsys
):
    """A job of thousands of captions must not write all of them into each picture; each can be drawn again all the
    same."""
    entries = [f"caption {k} of a red circle" for k in range(97)] + [
        {"prompt": "a cat", "n": 3, "seed": 7, "negative": "a dog"}
    ]
    (tmp_path / "many.jsonl").write_text(
        "".join(json.dumps(e if isinstance(e, dict) else {"prompt": e}) + "\n" for e in entries)
    )
    run("text", f"prompts={tmp_path}/many.jsonl", "n=1", "batch_size=4", "num_inference_steps=1")
    for name in ("00041_seed41.png", "00099_seed9.png"):
        recipe = pictures.read_recipe(tmp_path / "out" / name)
        kept = [e for e in recipe["config"]["prompts"] if (e if isinstance(e, str) else e["prompt"])]
        assert len(recipe["config"]["prompts"]) <= len(kept) + 2  # the others are counted before and after
        assert len(kept) == (4 if "41" in name else 2)  # the last batch: a caption, and three pictures of the cat
        assert (tmp_path / "out" / name).stat().st_size < 32 * 32 * 3 + 2500  # pixels of noise, and a short recipe
        capsys.readouterr()
        replay = (f"recipe={tmp_path}/out/{name}", f"run={model_folder('text')}", f"out={tmp_path}/{name}-again")
        (again,) = sample(composed("sample", *replay))
        assert again.read_bytes() == (tmp_path / "out" / name).read_bytes()
        assert "1 of 1 pictures are identical" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "out/recipe.json").read_text())["config"]["prompts"]) == 98


def test_a_full_disk_leaves_nothing_half_written(run: Callable, tmp_path: Path):
    """The limit on file size is just below the size of an image; the recipe fits."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    run("none", "n=1", out="probe")
    size = (tmp_path / "probe/00000_seed0.png").stat().st_size
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size - 100, hard))
        with pytest.raises(OSError, match=r"could not write .*00000_seed0\.png: File too large; nothing half-written"):
            run("none", "n=2")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["recipe.json"]


@pytest.mark.slow
def test_walks_begin_and_end_at_their_ends(run: Callable, files: dict[str, str], tmp_path: Path):
    by_prompt = run("text", "task=interpolate", "prompts=[a red circle,a cat]", "n=3")
    first, last = (
        run("text", "prompts=a red circle", "n=1", out="a")[0],
        run("text", "prompts=a cat", "seed=1", "n=1", out="b")[0],
    )
    assert (by_prompt[0] - first).abs().max() < 0.03
    assert (by_prompt[2] - last).abs().max() < 0.03
    assert len(run("text", "task=interpolate", "prompts=[a,b,c]", "n=3", out="three")) == 5
    assert len(run("none", "task=interpolate", "n=4", out="seeds")) == 4
    Image.open(files["photo.png"]).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "mirrored.png")
    pair = f"[{files['photo.png']},{tmp_path}/mirrored.png]"
    options = ("num_inference_steps=25", "invert_iterations=10", "guidance_scale=1")
    walk = run("calm", "task=interpolate", f"image={pair}", "n=3", *options, out="images")
    rebuilt = run("calm", "task=reconstruct", f"image={pair}", "n=1", out="rebuilt")
    for made, wanted in ((walk[0], rebuilt[0]), (walk[2], rebuilt[1])):
        assert (made - wanted).abs().mean() < 0.1 * wanted.std()


def test_arithmetic_adds_and_subtracts_conditions(run: Callable):
    plain = run("text", "prompts=a cat", "n=1")[0]
    summed = run("text", "task=interpolate", "prompts=[+a red circle,-a red circle,+a cat]", "n=1", out="sum")[0]
    halves = run("text", "task=interpolate", "prompts=[+0.5 a cat,+0.5 a cat]", "n=1", out="half")[0]
    assert (summed - plain).abs().max() < 0.1
    assert (halves - plain).abs().max() < 0.03
    other = run("text", "task=interpolate", "prompts=[+a red circle,-a cat,+a dog]", "n=1", out="other")[0]
    assert (other - plain).abs().max() > 0.1


@pytest.mark.slow
def test_an_inverted_picture_is_drawn_once_per_prompt(run: Callable, files: dict[str, str], tmp_path: Path):
    options = (f"image={files['photo.png']}", "invert=true", "guidance_scale=1", "prompts=[a cat,a dog]", "n=4")
    assert len(run("text", *options)) == 2
    assert json.loads((tmp_path / "out/recipe.json").read_text())["config"]["n"] == 1


def test_inversion_edits_from_the_pictures_own_noise(run: Callable, files: dict[str, str]):
    image = f"image={files['photo.png']}"
    rebuilt = run("calm", image, "task=reconstruct", out="r")[0]
    options = ("invert=true", "num_inference_steps=25", "invert_iterations=10", "guidance_scale=1")
    same = run("calm", image, "image_prompt=a cat", "prompts=a cat", *options, out="same")[0]
    changed = run("calm", image, "image_prompt=a cat", "prompts=a red circle", *options, out="changed")[0]
    assert (same - rebuilt).abs().mean() < 0.1 * rebuilt.std()
    assert (changed - rebuilt).abs().mean() > 2 * (same - rebuilt).abs().mean()


def test_all_classes_are_drawn_by_one_word(run: Callable, tmp_path: Path):
    drawn = run("class", "classes=all", "n=1", out="all")
    names = pictures.read_recipe(next((tmp_path / "all").glob("00000_*.png")))["config"]["classes"]
    assert len(drawn) == len(names) > 1
    assert all(
        torch.equal(a, b) for a, b in zip(drawn, run("class", f"classes=[{','.join(names)}]", "n=1", out="named"))
    )


def test_an_inversion_knows_the_conditions_that_training_never_dropped(
    run: Callable, files: dict[str, str], monkeypatch: pytest.MonkeyPatch
):
    known, invert = [], LatentDiffusion.invert

    def recorded(self: LatentDiffusion, latents: torch.Tensor, batch: dict[str, Any], *more: Any) -> torch.Tensor:
        known.append({name: len(values) for name, values in batch.items()})
        return invert(self, latents, batch, *more)

    monkeypatch.setattr(LatentDiffusion, "invert", recorded)
    image, label_map = f"image={files['photo.png']}", f"map={files['map.png']}"
    run("semantic", image, label_map, "invert=true", "num_inference_steps=2")
    run("text", image, "invert=true", "prompts=a cat", "image_prompt=a circle", "num_inference_steps=2")
    run("text", image, "invert=true", "prompts=a cat", "num_inference_steps=2")  # training dropped captions
    both = f"image=[{files['photo.png']},{files['photo.png']}]"
    run("semantic", both, label_map, "task=interpolate", "num_inference_steps=2", "n=3")
    assert known == [{"segmentation": 1}, {"caption": 1}, {}, {"segmentation": 2}]


def test_panoramas_and_tiles_draw_large_pictures(run: Callable):
    plain = run("none", "n=1")[0]
    assert (run("none", "n=1", "panorama=0.5", out="same")[0] - plain).abs().max() < 0.02  # one window covers the whole
    wide = run("none", "n=1", "size=[32,96]", "panorama=0.5", out="wide")[0]
    tiled = run("none", "n=1", "size=[32,96]", "panorama=0.5", "tiles.cells=16", "tiles.overlap=12", out="tiled")[0]
    assert wide.shape == (3, 32, 96)
    assert (tiled - wide).abs().max() < 0.05
    assert (wide - run("none", "n=1", "size=[32,96]", out="whole")[0]).abs().max() > 0.02


@pytest.mark.slow
def test_a_sweep_puts_every_job_into_its_own_folder(model_folder: Callable, tmp_path: Path):
    command = [
        sys.executable,
        "-m",
        "ldm_train.cli.sample",
        "-m",
        f"run={model_folder('text')}",
        "prompts=a red circle",
    ]
    done = subprocess.run(
        [*command, "guidance_scale=1,3", "n=1", f"out={tmp_path}/grid"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    folders = list((tmp_path / "grid").iterdir())
    assert len(folders) == 2, done.stdout
    scales = {json.loads((f / "recipe.json").read_text())["config"]["guidance_scale"] for f in folders}
    assert scales == {1, 3}


@tiered("task", REPLAYED, fast=5)
def test_every_task_replays_to_identical_bytes(
    task: str, run: Callable, model_folder: Callable, files: dict[str, str], tmp_path: Path
):
    kind, options = REPLAYED[task]
    run(kind, *(["num_inference_steps=2"] if task != "reconstruct" else []), *named(options, files))
    inputs = [f"run={model_folder(kind)}", *(o for o in named(options, files) if str(tmp_path) in o)]
    replay = sample(composed("sample", f'recipe="{tmp_path}/out/recipe.json"', *inputs))
    assert replay
    for path in replay:
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def test_a_recipe_builds_nothing_but_samplers_of_ours(run: Callable, model_folder: Callable, tmp_path: Path):
    run("text", "prompts=a red circle", "n=1")
    path = tmp_path / "out/recipe.json"
    recipe = json.loads(path.read_text())
    commands = [
        {"_target_": target, "_args_": ["touch here"]}
        for target in ("pathlib.Path.write_text", "ldm_train.pipeline.resume.os.system")
    ]
    for tree in (*commands, {"_partial_": True}):
        recipe["config"]["sampler"] = tree
        path.write_text(json.dumps(recipe))
        with pytest.raises(ValueError, match=r"asks for|does not name a valid sampler"):
            sample(composed("sample", f'recipe="{path}"', f"out={tmp_path}/evil", f"run={model_folder('text')}"))


def test_an_error_while_drawing_leaves_the_folder_free(run: Callable, tmp_path: Path):
    with pytest.raises(ValueError, match="eta is 'abc', not a finite number"):
        run("text", "prompts=a cat", "sampler=ddim", "sampler.eta=abc", "overwrite=false")
    assert not (tmp_path / "out").exists()
    assert len(run("text", "prompts=a cat", "overwrite=false")) == 2


@pytest.mark.slow
def test_inversion_and_panorama_go_together(run: Callable, files: dict[str, str]):
    options = (f"image={files['photo.png']}", "size=[64,64]", "n=1")
    rebuilt = run("calm", *options, "task=reconstruct", out="r")[0]
    more = ("invert=true", "panorama=0.5", "num_inference_steps=25", "invert_iterations=10", "guidance_scale=1")
    made = run("calm", *options, *more)[0]
    assert (made - rebuilt).abs().mean() < 0.1 * rebuilt.std()


def test_a_weaker_model_of_other_latents_is_refused(run: Callable, model_folder: Callable[[str], Path]):
    folder = model_folder("text")
    plain = run("text", "prompts=a cat", "guidance_scale=1", out="plain")[0]
    # Guided away from itself, the model draws the same.
    made = run("text", "prompts=a cat", f"weaker_model={folder}", "guidance_scale=3")[0]
    assert (made - plain).abs().max() < 0.03
    model = ldm_train.load(str(folder))
    model.first_stage.set_statistics(3.0)
    save_model(folder.parent / "other", model, yaml.safe_load((folder / "config.yaml").read_text()), {})
    with pytest.raises(ValueError, match=r"weaker_model=.* was trained on latents of another scale"):
        run("text", "prompts=a cat", f"weaker_model={folder.parent / 'other'}", "guidance_scale=2")
    with pytest.raises(ValueError, match=r"weaker_model=.* was trained on another autoencoder"):
        run("text", "prompts=a cat", f"weaker_model={model_folder('none')}", "guidance_scale=2")


def test_a_turned_photo_takes_the_mask_of_what_is_seen(run: Callable, tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[274] = 6  # turned by 90 degrees
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (32, 64, 3), np.uint8)).save(tmp_path / "turned.jpg", exif=turned)
    for name, size in (("seen", (64, 32)), ("stored", (32, 64))):
        Image.fromarray(np.full(size, 255, np.uint8)).save(tmp_path / f"{name}.png")
    given = ("task=inpaint", f"image={tmp_path}/turned.jpg", "n=1")
    assert len(run("none", *given, f"mask={tmp_path}/seen.png")) == 1
    with pytest.raises(ValueError, match="proportions"):
        run("none", *given, f"mask={tmp_path}/stored.png", out="other")


@pytest.mark.parametrize("name", ["grid.png", "00001_seed1.png"])
def test_pictures_of_other_origin_are_not_replaced(run: Callable, tmp_path: Path, name: str) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_bytes(b"mine")
    with pytest.raises(Refused, match=rf"{name} is there without a recipe\.json"):
        run("none", "n=2", out="mine")
    assert [(p.name, p.read_bytes()) for p in (tmp_path / "mine").iterdir()] == [(name, b"mine")]
