"""Which part of the package may import which (table in ldm_train/README.md), read from the source; no file is too
long."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ldm_train"
FILES = sorted(PACKAGE.rglob("*.py"))

# Layers, the lowest first: a part may import parts of its own layer and of those below.
FLOORS = (
    {
        "names",
        "storage",
        "distributed",
        "devices",
        "compiling",
        "rng",
        "images",
        "interrupts",
        "errors",
        "configuration",
        "rules",
        "cluster",
    },
    {"models", "diffusion"},
    {"losses", "conditioning", "metrics", "data", "samplers"},
    {"latent_diffusion", "unclip"},
    {"checkpoints"},
    {"training", "evaluation", "generation"},
    {"pipeline", "bench"},
    {"app"},
    {"cli"},
)
FLOOR = {part: number for number, parts in enumerate(FLOORS) for part in parts} | {"__init__": -1}
DOOR = {("__init__", "checkpoints.native")}  # the one import that ldm_train/__init__.py needs, for ldm_train.load
PURE = {"models", "diffusion"}  # these import nothing else from the package


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def ours(path: Path) -> list[str]:
    """Returns every module of the package that a file imports, as a dotted path below ldm_train ("" is the package)."""
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
    """Returns the top-level packages that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
    return found


def may_import(part: str, module: str) -> bool:
    target = module.split(".")[0]
    if target == part or (part, module) in DOOR or module == "":
        return True
    return FLOOR[target] <= FLOOR[part] and (part not in PURE or target in PURE)


MODULES = [f for f in FILES if f.name != "__init__.py"]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_follow_the_house(path: Path) -> None:
    forbidden = [module for module in ours(path) if not may_import(part_of(path), module)]
    assert not forbidden, f"{part_of(path)} stands on floor {FLOOR[part_of(path)]} and imports {forbidden} from above"


def test_every_part_of_the_package_has_a_floor() -> None:
    assert {part_of(f) for f in FILES} <= FLOOR.keys()


def test_only_the_upper_floors_see_a_config() -> None:
    users = {part_of(f) for f in FILES if {"hydra", "omegaconf"} & theirs(f)}
    assert users <= {"configuration", "rules", "evaluation", "generation", "pipeline", "bench", "app", "cli"}


def test_commands_are_short() -> None:
    """A command reads options, makes one call and prints; the work is done in the layers below it."""
    lines = {f.name: len(f.read_text().splitlines()) for f in (PACKAGE / "cli").glob("*.py")}
    assert max(lines.values()) <= 153, lines
    assert sum(lines.values()) <= 1400, lines


def test_only_training_and_its_caller_know_lightning() -> None:
    users = {part_of(f) for f in FILES if {"lightning", "pytorch_lightning"} & theirs(f)}
    assert users <= {"training", "pipeline", "data", "bench"}  # data: LightningDataModule; bench: times its steps


def test_the_composition_root_is_a_door() -> None:
    assert len((ROOT / "train.py").read_text().splitlines()) <= 20


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_file_exceeds_400_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


def test_there_is_no_utils() -> None:
    assert not [f for f in FILES if f.stem in ("utils", "util", "helpers", "misc", "common_utils")]
