"""Who may import whom (DESIGN.md, section 4), read from the source; and no file grows beyond a few screens."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ldm_train"
FILES = sorted(PACKAGE.rglob("*.py"))

# part -> the parts it may import besides itself. A part is a folder or file of the package; "losses.perceptual" or
# "data.shards" name one file of it. Anyone may import rng, images, distributed and interrupts.
LIBRARY = {"models", "diffusion", "samplers", "conditioning", "losses", "metrics", "data", "checkpoints"}
LIBRARY |= {"latent_diffusion"}
ALLOWED = {
    "__init__": set(),
    "rng": set(),
    "images": set(),
    "distributed": set(),
    "interrupts": set(),
    "models": set(),
    "diffusion": set(),
    "samplers": {"diffusion"},
    "conditioning": {"models", "diffusion", "losses.perceptual"},  # the shipped network, as an image encoder
    "losses": {"models"},
    "metrics": {"losses.perceptual", "conditioning", "latent_diffusion", "models"},  # encoders; what latents are
    "latent_diffusion": {
        "models",
        "diffusion",
        "conditioning",
        "samplers.ddim",
        "checkpoints",
    },  # the last in from_pretrained
    "data": set(),
    "checkpoints": {
        "latent_diffusion",
        "models",
        "diffusion",
        "conditioning",
        "data.shards",
    },  # shards: its atomic writers
    "training": LIBRARY,
    "finetune": {"latent_diffusion", "models", "conditioning", "samplers", "data"},
}
ANYONE = {"rng", "images", "distributed", "interrupts"}
PURE = {"models", "diffusion"}  # these import nothing else of ours, not even rng


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def ours(path: Path) -> list[str]:
    """Every module of ours a file imports, dotted below ldm_train ("" for the package itself)."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import in line {node.lineno}"
            module = node.module
            # from ldm_train.data import shapes_world: the module may be the name
            folder = ROOT / module.replace(".", "/")
            names = [f"{module}.{a.name}" if folder.is_dir() else module for a in node.names]
        else:
            continue
        found += [n.removeprefix("ldm_train").removeprefix(".") for n in names if n.split(".")[0] == "ldm_train"]
    return found


def theirs(path: Path) -> set[str]:
    """Top-level packages a file imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
    return found


def may_import(part: str, module: str) -> bool:
    target = module.split(".")[0]
    if target == part or part == "cli":
        return True
    if target in ANYONE:
        return part not in PURE
    return any(module == rule or module.startswith(f"{rule}.") for rule in ALLOWED[part])


MODULES = [f for f in FILES if f.name != "__init__.py"]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_follow_the_house(path: Path) -> None:
    forbidden = [module for module in ours(path) if not may_import(part_of(path), module)]
    assert not forbidden, f"{part_of(path)} may import {sorted(ALLOWED[part_of(path)] | ANYONE)}, not {forbidden}"


def test_every_part_of_the_package_has_a_rule() -> None:
    assert {part_of(f) for f in FILES} <= ALLOWED.keys() | {"cli"}


def test_only_the_command_line_sees_a_config() -> None:
    """hydra and omegaconf stay in cli; checkpoints may build a model from the config that lies beside it."""
    users = {part_of(f) for f in FILES if {"hydra", "omegaconf"} & theirs(f)}
    assert users <= {"cli", "checkpoints"}


def test_only_training_and_its_caller_know_lightning() -> None:
    users = {part_of(f) for f in FILES if {"lightning", "pytorch_lightning"} & theirs(f)}
    assert users <= {"training", "cli", "data"}  # data: the LightningDataModule


def test_the_composition_root_is_a_door() -> None:
    assert len((ROOT / "train.py").read_text().splitlines()) <= 20


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_file_exceeds_400_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


def test_there_is_no_utils() -> None:
    assert not [f for f in FILES if f.stem in ("utils", "util", "helpers", "misc", "common_utils")]
