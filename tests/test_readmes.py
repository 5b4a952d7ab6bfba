"""What the guides tell people to type is understood: every command of every README composes, every Python block compiles and
imports what it names, every link leads somewhere."""

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from ldm_train import names
from ldm_train.cli.common import null_as_none, quoted
from ldm_train.cli.sample import FREE
from ldm_train.configuration import config_folder

ROOT = Path(__file__).parents[1]
GUIDES = sorted({p for p in ROOT.rglob("*.md") if not {"runs", ".venv", ".git"} & set(p.relative_to(ROOT).parts)})
COMMANDS = {
    "train.py": "train", "ldm-sample": "sample", "ldm-evaluate": "evaluate", "ldm-prepare": "prepare", "ldm-sweep": "sweep",
    "ldm-search": "search", "ldm-bench": "bench",
}  # fmt: skip
ADDED = ("extractors.", "fields.")  # options that a command's main adds with a +


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
    """One job of a sweep: the first choice of a value that is no list."""
    name, _, value = argument.partition("=")
    return argument if value[:1] in "[{'\"" or "," not in value else f"{name}={value.split(',')[0]}"


@pytest.mark.parametrize(("guide", "line"), commands())
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
