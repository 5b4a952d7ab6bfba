"""Nothing read from a model, run, recipe, picture, checkpoint or folder of shards chooses what code runs or where files
go.

Each hostile file is given to every function and command that reads its kind. An audit hook of the interpreter sees
commands, foreign imports and files opened for writing, so that "nothing happened" is observed, not inferred.
"""

import ast
import hashlib
import json
import os
import pickle
import shutil
import struct
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from chains import SMALL, composed, with_data
from omegaconf import OmegaConf
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from small_models import FIRST_STAGE
from test_fuzz import damaged_json
from tiers import tiered

import ldm_train
from ldm_train.checkpoints.native import load_model, meta_autoencoder, save_model
from ldm_train.checkpoints.parts import build
from ldm_train.cli.common import USER_ERRORS, quoted
from ldm_train.cli.sample import FREE
from ldm_train.evaluation import measurement
from ldm_train.generation.sample import sample
from ldm_train.pipeline.machine import machine_of
from ldm_train.pipeline.measure import evaluate
from ldm_train.pipeline.run import Run, own_parts
from ldm_train.pipeline.sweep import read_runs
from ldm_train.storage import open_lock, partial_of
from ldm_train.training.loggers import MetricsCSV

SECONDS = 2.0  # the most CPU time that a refusal may take
MODEL = {
    "_target_": "ldm_train.latent_diffusion.LatentDiffusion",
    "network": {
        "_target_": "ldm_train.models.unet.UNet", "in_channels": 4, "channels": 32, "channel_mult": [1, 1],
        "num_res_blocks": 1, "attention_levels": [], "num_heads": 2,
    },
    "first_stage": FIRST_STAGE,
    "schedule": {"_target_": "ldm_train.diffusion.schedule.NoiseSchedule"},
    "conditioners": {},
    "latent_size": [8, 8],
}  # fmt: skip
SAMPLER = {"_target_": "ldm_train.samplers.ddim.ddim", "_partial_": True}
SAMPLING = {"num_inference_steps": 2, "guidance_scale": 1.0, "spacing": "trailing", "sampler": SAMPLER}

# Config trees that an attacker would want built, by name. {mark} is a file that must never appear.
TREES: dict[str, Any] = {
    "a command": {"_target_": "os.system", "command": "touch {mark}"},
    "a command, bound": {"_target_": "os.system", "_partial_": True, "command": "touch {mark}"},
    "positional arguments": {"_target_": "os.system", "_args_": ["touch {mark}"]},
    "a process": {"_target_": "subprocess.Popen", "args": ["touch", "{mark}"]},
    "eval": {"_target_": "builtins.eval", "_args_": ["open('{mark}', 'w')"]},
    "exec": {"_target_": "builtins.exec", "_args_": ["open('{mark}', 'w')"]},
    "a file": {"_target_": "pathlib.Path.write_text", "_args_": ["{mark}", "x"]},
    "what a module of ours imports": {"_target_": "ldm_train.training.loggers.subprocess.run", "args": ["touch", "{mark}"]},
    "a class that a model file imports": {"_target_": "ldm_train.conditioning.text.Path", "_args_": ["{mark}"]},
    "a shell behind tars": {
        "_target_": "ldm_train.data.prepare.index.write_tar_index", "path": "pipe:touch {mark}", "out": "{mark}.d"
    },
    "our own writing of JSON": {"_target_": "ldm_train.data.shards.write_json", "path": "{mark}", "value": 1},
    "our own writing of shards": {"_target_": "ldm_train.data.shards.write_shard", "path": "{mark}", "samples": []},
    "our own copying": {"_target_": "ldm_train.checkpoints.native.copy_model", "source": "{folder}", "folder": "{mark}"},
    "our own preparing": {"_target_": "ldm_train.data.prepare.shapes.Shapes"},
    "interpolation": "${{oc.env:HOME}}",
    "interpolation that creates": "${{oc.create:{{_target_:os.system,command:'touch {mark}'}}}}",
    "escaped interpolation": "\\${{oc.env:HOME}}",
    "hydra's own call": {"_target_": "hydra.utils.instantiate", "config": {"_target_": "os.system", "command": "touch {mark}"}},
    "pickles": {"_target_": "torch.serialization.load", "f": "{folder}/evil.pt", "weights_only": False},
    "torch hub": {"_target_": "torch.hub.load", "repo_or_dir": "{folder}", "model": "m", "source": "local"},
    "numpy pickles": {"_target_": "numpy.load", "file": "{folder}/evil.npy", "allow_pickle": True},
    "a module beside": {"_target_": "evil_module.Evil"},
    "importing": {"_target_": "importlib.import_module", "name": "evil_module"},
    "a private part": {"_target_": "ldm_train.models.unet.__builtins__"},
    "relative": {"_target_": "..os.system"},
    "no name": {"_target_": 5},
    "a list for a name": {"_target_": ["os", "system"]},
    "a function of ours, called": {"_target_": "ldm_train.samplers.ddim.ddim"},
    "a function that reads files": {"_target_": "ldm_train.conditioning.text.read_tokenizer", "path": "/etc/passwd"},
    "a number beyond measure": {"_target_": "ldm_train.diffusion.schedule.NoiseSchedule", "num_train_timesteps": 10**15},
    "a model without end": {**MODEL["network"], "num_res_blocks": 10**6},
    "a model of terabytes": {**MODEL["network"], "channels": 2**18},
}  # fmt: skip
# Contents of a config.yaml that is not a tree of plain values.
TEXTS = {
    "a tag that calls": "!!python/object/apply:os.system ['touch {mark}']",
    "a tag that imports": "!!python/module:evil_module",
    "an alias bomb": "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)),
    "an alias of itself": "a: &a [*a]",
    "nesting": "[" * 100_000,
    "nothing": "",
    "a list": "- 1",
    "bytes": "\x00\x01\x02",
    "a number of ten thousand digits": "a: " + "9" * 10_000,
    "a number of six thousand hexadecimal digits": "a: 0x" + "f" * 6_000,
    "such a number for a name": "0x" + "f" * 6_000 + ": a",
    "a tag that its value does not fit": "a: !!bool foo",
    "a number without digits": 'a: !!int ""',
    "a day that is none": "a: !!timestamp foo",
    "a month that is none": "a: 2020-13-45",
}

# -- watching ----------------------------------------------------------------------------------------------------------

_watch: dict[str, Any] = {"on": False, "seen": [], "allowed": ()}
_COMMANDS = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.spawn", "pty.spawn", "pickle.find_class")


def _hook(event: str, arguments: tuple) -> None:
    if not _watch["on"]:
        return
    if event in _COMMANDS or (event == "import" and str(arguments[0]).startswith("evil_module")):
        _watch["seen"].append((event, str(arguments)[:200]))
    elif event == "open" and isinstance(arguments[0], str) and set(str(arguments[1] or "")) & set("wax+"):
        path = os.path.realpath(arguments[0])
        # pytest compiles plugins of installed packages when it first loads them.
        of_pytest = path.startswith(sys.prefix) and "/__pycache__/" in path and "-pytest-" in path
        elsewhere = not path.startswith(("/dev/", *_watch["allowed"])) and not of_pytest
        _watch["seen"] += [(event, arguments[0])] * elsewhere


sys.addaudithook(_hook)


@contextmanager
def watched(*allowed: Path) -> Iterator[None]:
    """A context that fails if a command is run, evil_module is imported, a class is unpickled or a file outside
    `allowed` is opened for writing."""
    _watch.update(on=True, seen=[], allowed=tuple(os.path.realpath(p) for p in allowed))
    try:
        yield
    finally:
        _watch["on"] = False
    assert not _watch["seen"]


class Evil:
    """An object whose unpickling runs a command that creates the file `mark`."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.mark}",)


def filled(tree: Any, mark: Path, folder: Path) -> Any:
    if isinstance(tree, str):
        return tree.format(mark=mark, folder=folder)
    if isinstance(tree, dict):
        return {k: filled(v, mark, folder) for k, v in tree.items()}
    return [filled(v, mark, folder) for v in tree] if isinstance(tree, list) else tree


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A valid model folder, from which the hostile ones are made."""
    folder = tmp_path_factory.mktemp("honest") / "model"
    torch.manual_seed(0)
    save_model(folder, build(MODEL, "test"), MODEL, {"sampling": SAMPLING})
    ldm_train.load(str(folder))  # imports of the first load must not count as time of a refusal
    return folder


def reconfigured(folder: Path, config: str) -> None:
    """Replaces the config in a model folder and removes its checksum from the metadata, as an attacker would."""
    (folder / "config.yaml").write_text(config)
    whole = json.loads((folder / "metadata.json").read_text())
    del whole["config_sha256"]
    (folder / "metadata.json").write_text(json.dumps(whole))


@pytest.fixture
def stranger(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """stranger(config text, metadata) -> an attacker's model folder. It is in the working directory, beside
    evil_module.py."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil_module.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')\nclass Evil:\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(config: str | None = None, metadata: dict[str, Any] | None = None, name: str = "stranger") -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        for file in model.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        if config is not None:
            reconfigured(folder, config)
        whole = json.loads((folder / "metadata.json").read_text()) | (metadata or {})
        (folder / "metadata.json").write_text(json.dumps(whole))
        (folder / "evil.pt").write_bytes(pickle.dumps(Evil(tmp_path / "mark")))
        np.save(folder / "evil.npy", np.array([Evil(tmp_path / "mark")], dtype=object), allow_pickle=True)
        return folder

    return make


def sampled(*arguments: str) -> None:
    sample(composed("sample", *[quoted(a, FREE) for a in arguments]))


def evaluated(*arguments: str) -> None:
    evaluate(composed("evaluate", "progress=false", *arguments))


def prepared(tmp_path: Path, *arguments: str) -> Run:
    """Runs train.py up to the point where the first stage would begin."""
    config = composed("train", *SMALL, f"runs_dir={tmp_path}", f"data_dir={tmp_path}/data", "name=run", *arguments)
    with_data(config)
    return Run(config, tmp_path / "run", machine_of(config, {}), own_parts(config))


def refused(action: Callable[[], Any], mark: Path, *allowed: Path) -> str:
    """Returns the error message with which an action is refused. Fails if it takes too long, runs anything or writes a
    file outside `allowed`."""
    begin = time.process_time()  # CPU time of this process, as the machine may be busy
    with watched(*allowed), pytest.raises(USER_ERRORS) as caught:
        action()
    assert time.process_time() - begin < SECONDS + 3 * bool(allowed)  # preparing draws its data first
    assert not mark.exists()
    assert not Path(f"{mark}.d").exists()
    return str(caught.value)


# -- model folders -----------------------------------------------------------------------------------------------------

PLACES: dict[str, Callable[[Any], Any]] = {
    "the whole": lambda evil: evil,
    "the U-Net": lambda evil: {**MODEL, "network": evil},
    "a conditioner": lambda evil: {**MODEL, "conditioners": {"text": evil}},
    "an option": lambda evil: {**MODEL, "first_stage": {**MODEL["first_stage"], "scale_factor": evil}},
}


def doors(folder: Path, honest: Path, tmp_path: Path) -> dict[str, Callable[[], Any]]:
    """Returns every function and command that loads a model folder, by name."""
    return {
        "load": lambda: ldm_train.load(str(folder)),
        "load_model": lambda: load_model(folder),
        "meta_autoencoder": lambda: meta_autoencoder(folder),
        "ldm-evaluate reconstruct": lambda: evaluated(
            f"reconstruct={folder}", f"data.root={tmp_path}", "data.image_size=32", "metrics=[]"
        ),
        "ldm-sample run": lambda: sampled(f"run={folder}", "n=1", f"out={tmp_path}/out"),
        "ldm-sample weak": lambda: sampled(f"run={honest}", f"weaker_model={folder}", "guidance_scale=2", "n=1", f"out={tmp_path}/out"),
        "ldm-sample guide": lambda: sampled(f"run={honest}", f"guide.classifier={folder}", "classes=[0]", f"out={tmp_path}/out"),
    }  # fmt: skip


# In the fast tier each file is read by ldm_train.load and by one of the other functions and commands, in turn.
EVERY_DOOR = pytest.mark.parametrize("all_doors", [False, pytest.param(True, marks=pytest.mark.slow)])


def chosen_doors(number: int, all_doors: bool, *arguments: Path) -> dict[str, Callable[[], Any]]:
    every = doors(*arguments)
    turn = list(every)[1 + number % (len(every) - 1)]
    return every if all_doors else {name: every[name] for name in ("load", turn)}


@EVERY_DOOR
@pytest.mark.parametrize("name", TREES)
def test_a_model_folder_builds_models_and_nothing_else(
    name: str, all_doors: bool, stranger: Callable[..., Path], model: Path, tmp_path: Path
):
    mark, place = tmp_path / "mark", list(PLACES)[len(name) % len(PLACES)]
    if not isinstance(TREES[name], dict):
        place = "an option"
    config = PLACES[place](filled(TREES[name], mark, tmp_path / "stranger"))
    folder = stranger(yaml.safe_dump(config))
    for door, enter in chosen_doors(list(TREES).index(name), all_doors, folder, model, tmp_path).items():
        message = refused(enter, mark)
        assert str(folder) in message or "guide.classifier" in message, f"{door}: {message}"
    assert not (tmp_path / "out").exists()


@EVERY_DOOR
@pytest.mark.parametrize("name", TEXTS)
def test_a_config_that_is_no_tree_of_plain_values_is_named(
    name: str, all_doors: bool, stranger: Callable[..., Path], model: Path, tmp_path: Path
):
    folder = stranger(TEXTS[name].format(mark=tmp_path / "mark"))
    for enter in chosen_doors(list(TEXTS).index(name), all_doors, folder, model, tmp_path).values():
        assert "config.yaml" in refused(enter, tmp_path / "mark")


@pytest.mark.parametrize("name", TREES)
def test_a_model_folder_brings_samplers_and_nothing_else(name: str, stranger: Callable[..., Path], tmp_path: Path):
    mark = tmp_path / "mark"
    evil = filled(TREES[name], mark, tmp_path / "stranger")
    folder = stranger(metadata={"sampling": {**SAMPLING, "sampler": evil}})
    for enter in (lambda: ldm_train.load(str(folder)), lambda: sampled(f"run={folder}", "n=1")):
        assert str(folder) in refused(enter, mark)


@pytest.mark.parametrize(
    "metadata",
    [
        {"sha256": 5}, {"sha256": ["x"]}, {"sampling": []}, {"sampling": {"num_inference_steps": "many"}},
        {"sampling": {**SAMPLING, "out": "/"}}, {"sampling": {**SAMPLING, "spacing": {"a": 1}}},
    ],
)  # fmt: skip
def test_metadata_of_another_shape_is_named(metadata: dict, stranger: Callable[..., Path], tmp_path: Path):
    folder = stranger(metadata=metadata)
    assert str(folder) in refused(lambda: sampled(f"run={folder}", "n=1"), tmp_path / "mark")


def test_weights_that_do_not_fit_their_config_are_named(stranger: Callable[..., Path], tmp_path: Path):
    folder = stranger(yaml.safe_dump({**MODEL, "latent_size": [8, 8], "network": {**MODEL["network"], "channels": 64}}))
    message = refused(lambda: ldm_train.load(str(folder)), tmp_path / "mark")
    assert "does not fit the model of" in message
    (folder / "model.safetensors").write_bytes(b"\xff" * 64)
    whole = json.loads((folder / "metadata.json").read_text())
    whole["sha256"] = hashlib.sha256(b"\xff" * 64).hexdigest()
    (folder / "metadata.json").write_text(json.dumps(whole))
    message = refused(lambda: ldm_train.load(str(folder)), tmp_path / "mark")
    assert "is not a file of weights" in message


def test_another_model_is_no_autoencoder(model: Path, tmp_path: Path):
    message = refused(
        lambda: evaluated(f"reconstruct={model}", f"data.root={tmp_path}", "data.image_size=32"), tmp_path / "mark"
    )
    assert f"{model} holds a LatentDiffusion" in message
    assert "not an autoencoder" in message


def test_a_part_of_ones_own_is_built_where_the_command_trusts_its_package(
    stranger: Callable[..., Path], tmp_path: Path, model: Path
):
    (tmp_path / "my_parts.py").write_text(
        "from os import system\nfrom ldm_train.models.unet import UNet\n\n\nclass MyUNet(UNet):\n    pass\n"
    )
    folder = stranger(yaml.safe_dump({**MODEL, "network": {**MODEL["network"], "_target_": "my_parts.MyUNet"}}))
    message = refused(lambda: ldm_train.load(str(folder)), tmp_path / "mark")
    assert "set trust=[my_parts]" in message
    assert type(ldm_train.load(str(folder), trust=["my_parts"]).network).__name__ == "MyUNet"
    sampled(f"run={folder}", "trust=[my_parts]", "n=1", f"out={tmp_path}/out")
    # Trust does not extend to what the package has imported.
    evil = {"_target_": "my_parts.system", "_partial_": True, "command": "touch mark"}
    folder = stranger(yaml.safe_dump({**MODEL, "network": evil}))
    with pytest.raises(ValueError, match=r"my_parts\.system, which is not a class or sampler of my_parts"):
        ldm_train.load(str(folder), trust=["my_parts"])


# -- recipes -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def honest_recipe(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("recipe") / "out"
    sampled(f"run={model}", "n=1", f"out={out}")
    return json.loads((out / "recipe.json").read_text())


def _recipes(recipe: dict[str, Any], tmp_path: Path) -> Iterator[Path]:
    """Yields the recipe as a JSON file, and as the text chunk of a PNG."""
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    yield tmp_path / "recipe.json"
    info = PngInfo()
    info.add_text("recipe", json.dumps({"number": 0, "seed": 0, "condition": ""} | recipe))
    Image.new("RGB", (8, 8)).save(tmp_path / "recipe.png", pnginfo=info)
    yield tmp_path / "recipe.png"


@pytest.mark.parametrize("name", TREES)
def test_a_recipe_chooses_a_sampler_and_nothing_else(
    name: str, stranger: Callable[..., Path], model: Path, honest_recipe: dict, tmp_path: Path
):
    mark = tmp_path / "mark"
    evil = filled(TREES[name], mark, stranger())
    recipe = {**honest_recipe, "config": {**honest_recipe["config"], "sampler": evil}}
    for path in _recipes(recipe, tmp_path):
        message = refused(lambda path=path: sampled(f"recipe={path}", f"run={model}"), mark)
        assert str(path) in message or "weights" in message


def test_a_picture_of_a_job_may_have_any_number(model: Path, honest_recipe: dict, tmp_path: Path):
    *_, path = _recipes({**honest_recipe, "number": 70_000}, tmp_path)
    with pytest.raises(ValueError, match="it asks for picture 70000 of a job with 1"):
        sampled(f"recipe={path}", f"run={model}")


SET_BY_RECIPES = {
    "where it writes": {"out": "{folder}/elsewhere"},
    "what it overwrites": {"overwrite": True},
    "another model": {"run": "{folder}"},
    "what is trusted": {"trust": ["os"]},
    "where runs are": {"runs_dir": "/"},
    "an option that is none": {"command": "touch {mark}"},
    "an option in a section": {"guidance": {"interval": None, "hook": "x"}},
    "a section that is none": {"guide": "x"},
    "a file of prompts": {"prompts": "{folder}/secret.txt"},
    "a file of classes": {"classes": "{folder}/secret.txt"},
    "a picture": {"image": "{folder}/secret.png"},
    "a mask": {"image": "{folder}/secret.png", "mask": "{folder}/secret.png"},
    "a layout": {"layout": "{folder}/secret.json"},
    "a picture for a field": {"fields": {"edges": "{folder}/secret.png"}},
    "pictures for a field": {"fields": {"edges": ["{folder}/secret.png"]}},
    "a section for a field": {"fields": {"edges": {"a": "{folder}/secret.png"}}},
    "a weaker model": {"weaker_model": "{folder}", "guidance_scale": 2},
    "a classifier": {"guide": {"classifier": "{folder}", "classifier_scale": 1.0, "clip": None, "clip_scale": 1.0}},
    "a CLIP of the network": {"guide": {"classifier": None, "classifier_scale": 1.0, "clip": "evil/clip", "clip_scale": 1.0}},
    "text for a number": {"n": "many"},
    "no finite number": {"guidance_scale": 1e400},
    "a compiler": {"compile": ["x"]},
    "a task of another kind": {"task": {"a": 1}},
}  # fmt: skip


@pytest.mark.parametrize("name", SET_BY_RECIPES)
def test_a_recipe_chooses_neither_files_nor_places(
    name: str, stranger: Callable[..., Path], model: Path, honest_recipe: dict, tmp_path: Path
):
    folder, mark = stranger(), tmp_path / "mark"
    (folder / "secret.txt").write_text("secret\n")
    Image.new("RGB", (32, 32)).save(folder / "secret.png")
    (folder / "secret.json").write_text("[[0.1, 0.1, 0.2, 0.2, 0]]")
    before = sorted(p for p in tmp_path.rglob("*"))
    config = {**honest_recipe["config"], **filled(SET_BY_RECIPES[name], mark, folder)}
    for path in _recipes({**honest_recipe, "config": config}, tmp_path):
        message = refused(lambda path=path: sampled(f"recipe={path}", f"run={model}"), mark)
        assert "secret\n" not in message
    after = {p.name for p in tmp_path.rglob("*") if p not in before}
    assert after == {"recipe.json", "recipe.png"}


def test_a_recipe_loads_no_model_that_the_command_does_not_name(
    stranger: Callable[..., Path], honest_recipe: dict, tmp_path: Path
):
    recipe = {**honest_recipe, "model": str(stranger())}
    for path in _recipes(recipe, tmp_path):
        assert f"run={recipe['model']}" in refused(lambda path=path: sampled(f"recipe={path}"), tmp_path / "mark")


@pytest.mark.parametrize(
    "change",
    [
        {"machine": {}}, {"machine": {"batch_size": 10**9}}, {"machine": {"batch_size": "x"}}, {"files": []},
        {"files": {"a": 5}}, {"config": []}, {"images": 5}, {"images": [{"file": 5}]}, {"model": None}, {"number": "../x"},
        {"number": -1}, {"number": 9},
    ],
)  # fmt: skip
def test_a_recipe_of_another_shape_is_none(change: dict, model: Path, honest_recipe: dict, tmp_path: Path):
    (tmp_path / "recipe.json").write_text(json.dumps({**honest_recipe, **change}))
    message = refused(lambda: sampled(f"recipe={tmp_path}/recipe.json", f"run={model}"), tmp_path / "mark")
    assert "is not a recipe of ldm-sample" in message


KINDS = {
    "a number for a section": {"guidance": 5},
    "true for a section": {"guide": True},
    "a text for a section": {"resample": "x"},
    "nothing for a section": {"tiles": None},
    "no number of pictures": {"n": None},
    "no seed": {"seed": None},
    "no strength": {"strength": None},
    "no number in a section": {"resample": {"jump_length": 10, "repeats": None}},
    "a number beyond measure": {"n": 10**12},
    "a number beyond a float": {"guidance_scale": 10**400},
    "a size beyond measure": {"size": [10**18, 8]},
    "text for a sampler's number": {"sampler": {**SAMPLER, "eta": "x"}},
    "an option that the sampler has not": {"sampler": {**SAMPLER, "x": 1}},
    "what is handed to the sampler": {"sampler": {**SAMPLER, "denoise": None}},
    "no pictures": {"image": []},
    "an empty layout": {"layout": [[]]},
}


@pytest.mark.parametrize("name", KINDS)
def test_a_recipe_of_other_kinds_of_values_is_named(name: str, model: Path, honest_recipe: dict, tmp_path: Path):
    recipe = {**honest_recipe, "config": {**honest_recipe["config"], **KINDS[name]}}
    for path in _recipes(recipe, tmp_path):
        message = refused(lambda path=path: sampled(f"recipe={path}", f"run={model}"), tmp_path / "mark")
        assert str(path) in message


def test_a_model_whose_sampler_has_other_kinds_of_values_is_named(stranger: Callable[..., Path], tmp_path: Path):
    folder = stranger(metadata={"sampling": {**SAMPLING, "sampler": {**SAMPLER, "eta": "x"}}})
    for enter in (lambda: ldm_train.load(str(folder)), lambda: sampled(f"run={folder}", "n=1")):
        message = refused(enter, tmp_path / "mark")
        assert str(folder) in message
        assert "eta is 'x', not a finite number" in message


def test_a_picture_beyond_measure_is_no_recipe(model: Path, tmp_path: Path):
    Image.new("L", (8, 8)).save(tmp_path / "recipe.png")
    data = (tmp_path / "recipe.png").read_bytes()
    header = b"IHDR" + struct.pack(">II", 60_000, 60_000) + data[24:29]
    (tmp_path / "recipe.png").write_bytes(data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:])
    message = refused(lambda: sampled(f"recipe={tmp_path}/recipe.png", f"run={model}"), tmp_path / "mark")
    assert f"recipe={tmp_path}/recipe.png is not a recipe" in message


def test_a_recipe_with_any_value_replaced_draws_or_is_named(
    model: Path, honest_recipe: dict, tmp_path: Path, request: pytest.FixtureRequest
):
    folder, faults = tmp_path / "copy", []
    for number in range(request.config.getoption("--fuzz")):
        rng = np.random.default_rng([number, 11])
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / "recipe.json").write_text(damaged_json(json.dumps(honest_recipe), rng))
        try:
            sampled(f"recipe={folder}/recipe.json", f"run={model}")
        except Exception as error:
            named = isinstance(error, USER_ERRORS) and str(folder) in str(error)
            faults += [] if named else [f"case {number}: {type(error).__name__}: {error}"]
    assert not faults


def test_overwriting_removes_nothing_but_pictures_of_the_job(model: Path, honest_recipe: dict, tmp_path: Path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    (out / "00000_seed0.png").write_bytes(b"")
    entries = [{"file": name} for name in ("*.png", "thesis.tex", "../thesis", "[a-z]*", "00000_seed0.png")]
    (out / "recipe.json").write_text(json.dumps({**honest_recipe, "task": "other", "images": entries}))
    sampled(f"run={model}", "n=1", f"out={out}", "overwrite=true")
    assert (out / "thesis.tex").read_text() == "years of work"


# -- runs --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def honest_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run of two steps per stage, and its data."""
    folder = tmp_path_factory.mktemp("honest_run")
    prepared(
        folder, "autoencoder.max_steps=2", "diffusion.max_steps=2", "stages=[autoencoder,latents,diffusion]"
    ).execute()
    return folder


def _copied(run: Path, tmp_path: Path, change: Callable[[dict[str, Any]], Any] | None = None) -> Path:
    folder = tmp_path / "run"
    shutil.copytree(run / "run", folder)
    if change is not None:
        path = folder / "config.yaml"
        tree = yaml.safe_load(path.read_text())
        change(tree)
        path.write_text(yaml.safe_dump(tree))
    return folder


WHERE = {
    "an extractor": lambda tree, evil: tree["evaluation"]["extractors"].update(tiny=evil),
    "the perceptual network": lambda tree, evil: tree["evaluation"].update(perceptual=evil),
    "lpips": lambda tree, evil: tree["evaluation"].update(lpips=evil, paired=["lpips"]),
    "a field made from the image": lambda tree, evil: tree["data"].update(derived={"lowres": evil}),
    "the sampler": lambda tree, evil: tree.update(sampler=evil),
    "the data module": lambda tree, evil: tree["data"].update(module=evil),
    "a stage": lambda tree, evil: tree["stage"].update(diffusion=evil),
    "a conditioner": lambda tree, evil: tree["diffusion"]["conditioning"]["conditioners"].update(text=evil),
}


BUILT = ("a command, bound", "a process", "a shell behind tars", "a module beside", "interpolation that creates")


@tiered(
    ("where", "names"),
    [
        *((where, (BUILT[i % 4], BUILT[4])) for i, where in enumerate(WHERE)),
        *(
            pytest.param(where, [n for j, n in enumerate(BUILT[:4]) if j != i % 4], marks=pytest.mark.slow)
            for i, where in enumerate(WHERE)
        ),
    ],
    fast=3,
)
def test_a_run_builds_nothing_where_it_is_evaluated(
    where: str, names: Sequence[str], honest_run: Path, stranger: Callable[..., Path], tmp_path: Path
):
    mark = tmp_path / "mark"
    for name in names:
        evil = filled(TREES[name], mark, stranger())
        run = _copied(honest_run, tmp_path / f"case{len(name)}", lambda tree, e=evil: WHERE[where](tree, e))
        error = None
        with watched(tmp_path, honest_run):
            try:
                evaluated(f"run={run}", "n=2", f"runs_dir={run.parent}", "metrics=[fid_tiny]")
            except USER_ERRORS as caught:
                error = str(caught)
        assert not mark.exists()
        # The evaluation uses its own options for these parts and ignores the run's; everything else is refused.
        elsewhere = ("an extractor", "the perceptual network", "lpips", "a stage", "the data module")
        unused = where in elsewhere and not name.startswith("interpolation")
        assert (
            unused
            if error is None
            else any(w in error for w in ("asks for", "does not name a valid sampler", "${", "cannot be built"))
        ), error


def test_a_run_builds_nothing_where_its_autoencoder_is_measured(honest_run: Path, tmp_path: Path):
    mark = tmp_path / "mark"
    evil = {"_target_": "shutil.copyfile", "src": __file__, "dst": str(mark), "_partial_": False}

    def change(tree: dict[str, Any]) -> None:
        tree["autoencoder"]["data"].update(module=evil)
        tree["data"].update(module=evil)

    run = _copied(honest_run, tmp_path, change)
    evaluated(f"reconstruct={run}", "n=2", f"runs_dir={run.parent}", "metrics=[fid_tiny]")
    assert not mark.exists()


def test_a_copied_run_is_continued_without_running_what_it_holds(
    honest_run: Path, stranger: Callable[..., Path], tmp_path: Path
):
    mark, options = tmp_path / "mark", ("autoencoder.max_steps=2", "diffusion.max_steps=2")
    evil = filled(TREES["a shell behind tars"], mark, stranger())
    for part, restart in (("autoencoder", "latents"), ("diffusion", "evaluation")):
        base = tmp_path / part
        run = _copied(honest_run, base)
        reconfigured(run / part / "model", yaml.safe_dump(evil))
        message = refused(lambda b=base, r=restart: prepared(b, *options, f"restart={r}").execute(), mark, base)
        assert "write_tar_index" in message
    base = tmp_path / "checkpoint"
    run = _copied(honest_run, base)
    note = json.loads((run / "autoencoder" / "stage.json").read_text())
    (run / "autoencoder" / "stage.json").write_text(json.dumps({**note, "finished": False, "steps": 0}))
    for later in ("latents", "diffusion"):
        shutil.rmtree(run / later)
    (run / "autoencoder" / "checkpoints" / "last.ckpt").write_bytes(pickle.dumps(Evil(mark)))
    assert "last.ckpt" in refused(lambda: prepared(base, *options).execute(), mark, base)


@pytest.mark.parametrize(
    "text",
    [
        "[]", "{", '{"key": {}, "finished": "yes"}', "[" * 10_000,
        *(pytest.param(text, marks=pytest.mark.slow) for text in ("5", "null", "{}", '{"key": 1}')),
    ],
)  # fmt: skip
def test_a_damaged_stage_note_is_named_with_the_way_on(text: str, honest_run: Path, tmp_path: Path):
    run = _copied(honest_run, tmp_path)
    (run / "autoencoder" / "stage.json").write_text(text)
    message = refused(lambda: prepared(tmp_path, "autoencoder.max_steps=2").execute(), tmp_path / "mark", tmp_path)
    assert "stage.json" in message
    assert "restart=autoencoder" in message


def test_a_sweep_of_strangers_is_read_as_data(honest_run: Path, tmp_path: Path):
    run = _copied(honest_run, tmp_path, lambda tree: tree.update(seed="${oc.env:HOME}"))
    assert str(run) in refused(lambda: read_runs(tmp_path), tmp_path / "mark")


def test_an_interrupted_measurement_is_no_program(honest_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A pickle in the place of a partial measurement is not executed, and the measurement still finishes."""
    seen: list[Path] = []
    real = measurement.measure_samples

    def spoilt(*arguments: Any, **options: Any) -> Any:
        partial = options["partial"]
        path = partial.with_name(f"{partial.name}.0-1")
        path.write_bytes(pickle.dumps(Evil(tmp_path / "mark")))
        seen.append(path)
        return real(*arguments, **options)

    monkeypatch.setattr("ldm_train.pipeline.measure.measure_samples", spoilt)
    run = _copied(honest_run, tmp_path)
    with watched(tmp_path, honest_run):
        evaluated(f"run={run}", "n=2", f"runs_dir={tmp_path}", "metrics=[fid_tiny]")
    assert seen
    assert not (tmp_path / "mark").exists()


# -- links -------------------------------------------------------------------------------------------------------------


def test_pictures_go_through_no_link(stranger: Callable[..., Path], tmp_path: Path):
    """Pictures are not written through symbolic links: neither in the model's folder nor under the names of pictures,
    recipes and partial files; links that bear the names of pictures to come are refused as other files are."""
    folder, victim = stranger(), tmp_path / "victim"
    victim.mkdir()
    (victim / "thesis.tex").write_text("years of work")
    (folder / "samples").symlink_to(victim)
    message = refused(lambda: sampled(f"run={folder}", "n=1"), tmp_path / "mark")
    assert f"{folder}/samples" in message
    assert "through a link" in message
    out = tmp_path / "out"
    out.mkdir()
    for name in ("00000_seed0.png", "grid.png"):
        (out / name).symlink_to(victim / "thesis.tex")
        assert "would replace it" in refused(lambda: sampled(f"run={folder}", "n=1", f"out={out}"), tmp_path / "mark")
        (out / name).unlink()
    for name in ("00000_seed0.png", "grid.png", "recipe.json"):
        partial_of(out / name).symlink_to(victim / "thesis.tex")
    sampled(f"run={folder}", "n=1", f"out={out}")
    (out / "replay").symlink_to(victim)
    assert "through a link" in refused(lambda: sampled(f"recipe={out}", f"run={folder}"), tmp_path / "mark")
    assert [p.name for p in victim.iterdir()] == ["thesis.tex"]
    assert (victim / "thesis.tex").read_text() == "years of work"
    assert not any(p.is_symlink() for p in out.iterdir() if p.is_file())


def test_measurements_go_through_no_link(honest_run: Path, tmp_path: Path):
    run, victim = _copied(honest_run, tmp_path), tmp_path / "victim"
    victim.mkdir()
    (run / "evaluations").symlink_to(victim)
    for what in ("run", "reconstruct"):
        message = refused(
            lambda what=what: evaluated(f"{what}={run}", "n=2", f"runs_dir={tmp_path}", "metrics=[fid_tiny]"),
            tmp_path / "mark",
            run,
            tmp_path / ".references",
        )
        assert "through a link" in message
    assert not list(victim.iterdir())


def test_logs_go_through_no_link(tmp_path: Path):
    victim = tmp_path / "victim"
    victim.write_text("years of work")
    (tmp_path / "metrics.csv").symlink_to(victim)
    partial_of(tmp_path / "metrics.csv").symlink_to(victim)
    MetricsCSV(tmp_path / "metrics.csv").log_metrics({"loss": 1.0}, 1)
    (tmp_path / "lock").symlink_to(victim)
    with pytest.raises(ValueError, match=r"lock is a link"):
        open_lock(tmp_path / "lock")
    assert victim.read_text() == "years of work"


def test_what_a_lock_says_stays_until_it_is_held(tmp_path: Path):
    with open_lock(tmp_path / "lock") as first:
        first.write("4711")
    with open_lock(tmp_path / "lock") as second:
        assert second.read() == "4711"


# -- the package -------------------------------------------------------------------------------------------------------


def test_nothing_in_the_package_reads_a_file_that_can_run_code():
    """The sources import no pickle module, torch.load has weights_only=True, np.load never has allow_pickle=True, and
    there is no unsafe YAML, eval, exec, os.system, shell=True or remote code of transformers."""
    faults = []
    for path in Path(ldm_train.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [a.name for a in node.names] + [getattr(node, "module", None) or ""]
                faults += [
                    f"{path}:{node.lineno} imports {n}"
                    for n in names
                    if n.split(".")[0] in ("pickle", "dill", "joblib")
                ]
            if not isinstance(node, ast.Call):
                continue
            called, options = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            if called == "torch.load" and options.get("weights_only") != "True":
                faults.append(f"{path}:{node.lineno} torch.load without weights_only=True")
            if called in ("np.load", "numpy.load") and options.get("allow_pickle") == "True":
                faults.append(f"{path}:{node.lineno} np.load with allow_pickle")
            if called in ("yaml.unsafe_load", "yaml.full_load", "eval", "exec", "os.system"):
                faults.append(f"{path}:{node.lineno} {called}")
            if options.get("shell") == "True" or options.get("trust_remote_code") == "True":
                faults.append(f"{path}:{node.lineno} {ast.unparse(node)[:80]}")
            if "Auto" in called and called.endswith("from_pretrained") and options.get("trust_remote_code") != "False":
                faults.append(f"{path}:{node.lineno} {called} without trust_remote_code=False")
    assert not faults


SECTIONS = ("data", "autoencoder", "diffusion", "sampling", "latents", "evaluation", "data.derived", "autoencoder.data")
VALUES = (
    "data.root", "data.weights", "data.image_size", "data.channels", "data.reader", "data.crop", "data.scale", "data.val_split",
    "data.max_bad_fraction", "evaluation.batch_size", "evaluation.metrics", "evaluation.predictors", "evaluation.restoration",
    "sampling.num_inference_steps", "sampling.guidance_scale", "latents.per_channel", "diffusion.batch_size", "seed",
    "diffusion.conditioning.conditioners", "diffusion.conditioning", "sampler",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("key", [*SECTIONS, *VALUES])
def test_a_run_whose_config_is_damaged_is_named_and_one_that_lacks_options_is_measured(
    key: str, stranger_run: Path, tmp_path: Path
):
    """Removes a value of the config or replaces it by others: ldm-evaluate measures it or raises one of USER_ERRORS."""
    text, (*way, last) = (stranger_run / "config.yaml").read_text(), key.split(".")
    for value in (KeyError, 5, "x", ["a"], None, {"a": 1}):
        tree = yaml.safe_load(text)
        owner = tree
        for step in way:
            owner = owner[step]
        if value is KeyError:
            owner.pop(last)
        else:
            owner[last] = value
        folder = tmp_path / "run"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(stranger_run, folder)
        (folder / "config.yaml").write_text(yaml.safe_dump(tree))
        with suppress(*USER_ERRORS):  # anything else fails the test
            evaluated(f"run={folder}", "n=2", f"runs_dir={tmp_path}", "metrics=[fid_tiny]")


@pytest.mark.slow
def test_a_run_with_any_value_of_its_config_replaced_is_measured_or_refused(
    stranger_run: Path, tmp_path: Path, request: pytest.FixtureRequest
):
    """ldm-evaluate with run= or reconstruct= measures the run or raises one of USER_ERRORS."""
    text, folder, faults = json.dumps(yaml.safe_load((stranger_run / "config.yaml").read_text())), tmp_path / "run", []
    shutil.copytree(stranger_run, folder)
    for number in range(request.config.getoption("--fuzz")):
        damaged = damaged_json(text, np.random.default_rng([number, 17]))
        (folder / "config.yaml").write_text(yaml.safe_dump(json.loads(damaged)))
        way = ("run", "reconstruct")[number % 2]
        try:
            evaluated(f"{way}={folder}", "n=2", f"runs_dir={tmp_path}", "metrics=[fid_tiny]")
        except USER_ERRORS:
            continue
        except Exception as error:
            faults.append(f"case {number}, {way}: {type(error).__name__}: {error}")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("sampling.guidance_interval", [1.0]),
        ("sampling.guidance_interval", [0.0, "low"]),
        ("autoencoder.data.scale", 0),
        ("data.buckets.max_ratio", "wide"),
    ],
)
def test_a_run_with_an_impossible_value_is_named(
    stranger_run: Path, tmp_path: Path, option: str, value: object
) -> None:
    config = OmegaConf.load(stranger_run / "config.yaml")
    OmegaConf.update(config, option, value)
    shutil.copytree(stranger_run, tmp_path / "run")
    OmegaConf.save(config, tmp_path / "run/config.yaml")
    with pytest.raises(ValueError, match=rf"config\.yaml is damaged: .*{option.rpartition('.')[2]}"):
        evaluated(f"run={tmp_path}/run", "n=2", f"runs_dir={tmp_path}", "metrics=[fid_tiny]")


@pytest.fixture(scope="session")
def stranger_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    run = prepared(
        folder, "diffusion.evaluate_every=null", "stages=[autoencoder,latents,diffusion]", "autoencoder.max_steps=2",
        "diffusion.max_steps=2", "autoencoder.loss.disc_start=1", "sampling.num_inference_steps=1",
    )  # fmt: skip
    run.folder.mkdir(parents=True, exist_ok=True)
    run.execute()
    return run.folder
