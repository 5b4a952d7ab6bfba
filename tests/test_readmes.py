"""The guides are right: every command in every README composes, and runs if its model can be made in seconds; every
Python block compiles and its imports exist; every link has a target."""

import ast
import importlib
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from chains import SMALL
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image
from tiers import tiered

from ldm_train import names
from ldm_train.cli.common import null_as_none, quoted
from ldm_train.cli.sample import FREE
from ldm_train.configuration import config_folder
from ldm_train.pipeline import budget

ROOT = Path(__file__).parents[1]
GUIDES = sorted(
    {p for p in ROOT.rglob("*.md") if not {"runs", ".venv", ".git", ".pytest_cache"} & set(p.relative_to(ROOT).parts)}
)
COMMANDS = {
    "train.py": "train", "ldm-sample": "sample", "ldm-evaluate": "evaluate", "ldm-prepare": "prepare", "ldm-sweep": "sweep",
    "ldm-search": "search", "ldm-bench": "bench", "ldm-convert": "convert", "ldm-app": "app",
}  # fmt: skip
ADDED = ("extractors.", "fields.")  # options that a command's main() adds with a +


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands() -> list[tuple[str, str]]:
    found = []
    for guide in GUIDES:
        for block in blocks(guide.read_text(), "bash"):
            for line in block.splitlines():
                for part in line.split("&&"):
                    if re.match(r"\s*(python train\.py|ldm-\w+)", part):
                        found.append((str(guide.relative_to(ROOT)), part.strip()))
    return found


def first_of_each(argument: str) -> str:
    """Reduces a sweep's argument to its first job: the first of several values, where a list counts as one value."""
    name, _, value = argument.partition("=")
    if "],[" in value:
        return f"{name}={value.split('],[')[0]}]"
    return argument if value[:1] in "[{'\"" or "," not in value else f"{name}={value.split(',')[0]}"


@tiered(("guide", "line"), commands(), fast=24)
def test_a_command_of_a_guide_composes(guide: str, line: str) -> None:
    words = shlex.split(line, comments=True)
    words = words[1:] if words[0] == "python" else words
    command, arguments = words[0], [re.sub(r"[<>…]", "x", w) for w in words[1:] if w not in ("-m", "--help")]
    if command == "ldm-bench":
        arguments = [f"what={a}" if a.isidentifier() else a for a in arguments]
    arguments = [null_as_none(names.argument(quoted(a, FREE))) for a in arguments]
    arguments = [f"+{a}" if a.startswith(ADDED) else a for a in arguments if not a.startswith("hydra")]
    if "-m" in words:
        arguments = [first_of_each(a) for a in arguments]
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        config = compose(COMMANDS[command], arguments)
    for key in config:
        OmegaConf.to_container(config._get_node(key)) if OmegaConf.is_config(config._get_node(key)) else None


# The models that commands name, each with a recipe that makes one of its kind in seconds. All others need other data.
MODELS = {
    "quickstart": ["experiment=quickstart"],
    "mine": ["experiment=shapes_class"],
    "shapes_layout": ["experiment=shapes_layout"],
    "scenes_semantic_small": ["experiment=shapes_semantic"],
    "clothing_superres_small": ["experiment=shapes_superres"],
    "shapes_unconditional": ["experiment=shapes_unconditional"],
    "shapes_text": ["experiment=shapes_text"],
    "shapes_subject": ["experiment=shapes_text", "diffusion.init=shapes_text", "diffusion/adapter=lora"],
    "shapes_student": ["experiment=shapes_student"],
    "shapes_control": ["experiment=shapes_control"],
    "shapes_image": ["experiment=shapes_image"],
    "shapes_prior": ["experiment=shapes_prior"],
    "classifier_shapes": ["experiment=classifier_shapes", "classifier.max_steps=2", "classifier.batch_size=8"],
}
QUICK = [*SMALL, "autoencoder.max_steps=2", "diffusion.max_steps=2", "autoencoder.val_every=2", "diffusion.val_every=2",
         "diffusion.evaluate_every=null", "evaluation.metrics=[fid_tiny]"]  # fmt: skip


def fitting(line: str) -> list[str]:
    """Returns QUICK; for a prior without the U-Net's width."""
    return [o for o in QUICK if "prior" not in line or not o.startswith("diffusion.network.channels")]


BRIEFLY = {
    "train.py": [*QUICK, "stages=[autoencoder,latents,diffusion,export]"],
    "ldm-sample": ["num_inference_steps=2", "accelerator=cpu"],
    "ldm-evaluate": ["progress=false", "accelerator=cpu"],
    "ldm-prepare": ["workers=1"],
    "ldm-sweep": [],
    "ldm-search": [],
}
ELSEWHERE = (
    r"celebahq|ldm-convert|ldm-app|style\.safetensors|clothing_f8|my_package|ldm-search|ldm-sweep dir=runs/shapes_f_sweep"
    r"|ldm-sweep dir=runs/ledger|ldm-bench|_f_sweep"
)


def typed(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    """Runs a command line, split into words, in this process."""
    name = "train" if words[0] == "train.py" else words[0].removeprefix("ldm-")
    monkeypatch.setattr(sys, "argv", words)
    importlib.import_module(f"ldm_train.cli.{name}").main()


def unrehearsed(*_: object) -> dict[str, int]:
    """Replaces the rehearsal on the meta device, which takes as long as the two training steps."""
    return {"weights": 1}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models, pictures and prompt lists that the commands in the guides name."""
    folder = tmp_path_factory.mktemp("guides")
    noise = np.random.default_rng(0)
    for name in ("photo.png", "photos/a/1.png", "photos/a/2.png", "photos/b/3.png", "photos/b/4.png", "samples/1.png",
                 "samples/2.png"):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 255, (32, 32, 3), np.uint8)).save(folder / name)
    Image.fromarray(noise.integers(0, 255, (8, 8, 3), np.uint8)).save(folder / "small.png")
    Image.fromarray((np.indices((32, 32)).sum(0) > 40).astype(np.uint8) * 255).save(folder / "hole.png")
    Image.fromarray(np.zeros((32, 32), np.uint8)).save(folder / "map.png")
    lines = [{"prompt": "a red circle", "negative": "blue", "seed": 7, "n": 2}, {"prompt": "a blue square"}]
    (folder / "prompts.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(budget, "step_memory", unrehearsed)
        for name, recipe in MODELS.items():
            stages = "[latents,classifier]" if name == "classifier_shapes" else "[autoencoder,latents,diffusion,export]"
            taking = name in ("classifier_shapes", "shapes_text", "shapes_subject", "shapes_student", "shapes_control")
            more = ["autoencoder.pretrained=shapes_unconditional"] if taking else []
            stages = stages.replace("[latents", "[autoencoder,latents")
            typed(patch, ["train.py", *fitting(recipe[0]), *recipe, *more, f"name={name}", f"stages={stages}"])
    shutil.copytree(folder / "runs/mine", folder / "runs/quickstart/seed=1")  # a job of a sweep, for ldm-sweep
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("guide", "line"), [pair for pair in commands() if not re.search(ELSEWHERE, pair[1])], ids=lambda text: text[:60]
)
def test_a_command_of_a_guide_runs(guide: str, line: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("HOME", str(place))
    monkeypatch.setattr(budget, "step_memory", unrehearsed)
    words = [w.replace("$HOME", str(place)) for w in shlex.split(line, comments=True)]
    words = words[1:] if words[0] == "python" else words
    sizes = [re.sub(r"^seed=\d,.*$", "seed=0", re.sub(r"^n=\d+$", "n=4", w)) for w in words]
    sizes = [re.sub(r"max_steps=\d+$", "max_steps=2", w) for w in sizes]
    brief = [
        o
        for o in BRIEFLY[words[0]]
        if o not in set(QUICK) - set(fitting(line)) and f" {o.partition('=')[0]}=" not in f" {' '.join(words)}"
    ]
    name = [f"name={abs(hash(line))}"] if words[0] == "train.py" and not re.search("name=| -m ", line) else []
    out = [f"out={place}/{abs(hash(line))}"] if words[0] in ("ldm-sample", "ldm-prepare") else []
    typed(monkeypatch, [*sizes, *brief, *name, *[o for o in out if " out=" not in line]])


@pytest.mark.parametrize("guide", GUIDES, ids=lambda p: str(p.relative_to(ROOT)))
def test_python_of_a_guide_compiles_and_imports_what_there_is(guide: Path) -> None:
    for block in blocks(guide.read_text(), "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("ldm_train"):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), block


@pytest.mark.chain
def test_both_stages_train_from_python_as_the_guide_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = (b for b in blocks((ROOT / "ldm_train/README.md").read_text(), "python") if "fit(" in b)
    exec(code.replace("STEPS, BATCH, folder = 200", "STEPS, BATCH, folder = 3").replace("count=512", "count=64"), {})
    assert (tmp_path / "runs/by_hand/samples.png").is_file()


@pytest.mark.parametrize("guide", GUIDES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_and_files_of_a_guide_are_there(guide: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", guide.read_text()):
        assert "://" in target or (guide.parent / target).exists(), target


def test_the_front_page_is_one_screen() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= 8 * 1024
