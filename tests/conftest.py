"""Settings and fixtures that all tests share: one thread, no progress bars, the folder of real images if it exists."""

import copy
import gc
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported
# Sums depend on the number of threads. The processes that tests start get one too, as results are compared bit for bit.
os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

import pytest
import yaml
from hydra._internal import defaults_list
from hydra._internal.config_repository import ConfigRepository
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString

# torch and ldm_train are imported in the fixtures that use them: the process that distributes the tests needs neither.

ROOT = Path(__file__).parents[1]
# Local servers ask a name server for their full name, which can take 20 s if it does not answer.
socket.getfqdn = lambda name="": name or "localhost"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz", type=int, default=40, help="cases of each fuzz test; 1000 looks closely")
    parser.addoption("--kills", type=int, default=2, help="times that each run of test_exactness.py is killed")
    parser.addoption(
        "--full-size", action="store_true", help="parity at the published widths too; needs 20 GB of memory"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts files with long tests first, so that no process is left running one alone at the end. The tests of a file
    run in one process, so that what they share is trained once."""
    long: dict[str, int] = {}
    for item in items:
        marks = {mark.name for mark in item.iter_markers()}
        long[item.path.name] = long.get(item.path.name, 0) + ("chain" in marks) + 10 * ("slow" in marks)
    items.sort(key=lambda item: -long[item.path.name])


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def configs_are_read_once() -> Iterator[None]:
    """Caches what Hydra otherwise does again for every command, which takes most of the time of a short one: reading
    and parsing each file of conf/ and each override."""
    read, kept = ConfigRepository.load_config, dict[tuple[str, str, int], Any]()

    def load_config(repository: ConfigRepository, config_path: str) -> Any:
        source = repository._find_object_source(config_path, ObjectType.CONFIG)
        file = Path(str(getattr(source, "path", ""))) / f"{config_path}.yaml"
        if not file.is_file():
            return read(repository, config_path)
        key = (source.provider, str(file), file.stat().st_mtime_ns)
        if key not in kept:
            with pytest.MonkeyPatch.context() as patch:  # libyaml gives the same result as PyYAML, ten times as fast
                patch.setattr(yaml, "SafeLoader", getattr(yaml, "CSafeLoader", yaml.SafeLoader))
                kept[key] = read(repository, config_path)
        result = copy.copy(kept[key])
        result.config = copy.deepcopy(result.config)  # Hydra sets options in it
        return result

    mapped = defaults_list._create_interpolation_map

    def create_interpolation_map(overrides: Any, defaults: list[Any], self_added: bool) -> Any:
        """Skips the map, a fifth of the time of composing, unless an entry of `defaults` has a ${} and needs it."""
        return mapped(overrides, defaults, self_added) if any(d.is_interpolation() for d in defaults) else None

    parsed, rules = OverridesParser.parse_rule, dict[tuple[str, str], Override]()

    def parse_rule(parser: OverridesParser, text: str, rule: str) -> Any:
        if (text, rule) not in rules:
            result = parsed(parser, text, rule)
            if not isinstance(result, Override) or not isinstance(
                result._value, str | int | float | QuotedString | None
            ):
                return result
            rules[text, rule] = result
        return copy.copy(rules[text, rule])  # Hydra sets its loader

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OverridesParser, "parse_rule", parse_rule)
        patch.setattr(ConfigRepository, "load_config", load_config)
        patch.setattr(defaults_list, "_create_interpolation_map", create_interpolation_map)
        gc.freeze()  # what is imported by now stays, and scanning it in every collection is slow
        usual = gc.get_threshold()
        gc.set_threshold(20_000, 20, 50)
        yield
        gc.set_threshold(*usual)
        gc.unfreeze()


class Rehearsed(dict[str, Any]):
    """A cache of the memory of rehearsed training steps. Its keys leave out what the memory does not depend on: where
    files are, and how often something is written or measured. (A rehearsal takes as long as a test's few steps.)"""

    CADENCE = ("val_every", "val_images", "checkpoint_every", "log_every", "samples", "evaluate_every", "evaluate_images",
               "best_by", "pretrained", "init", "init_discriminator", "lr", "disc_lr")  # fmt: skip

    @classmethod
    def simple(cls, key: str) -> str:
        known, _, choice = key.rpartition(" micro-batch ")
        *setting, tree = json.loads(known)
        stage = setting[0]
        parts = {
            name: dict(tree[name]) for name in dict.fromkeys(("autoencoder", "diffusion", stage)) if tree.get(name)
        }
        for name, part in parts.items():
            for option in (*cls.CADENCE, *([] if name == stage == "autoencoder" else ["max_steps"])):
                part.pop(option, None)
        data = {k: v for k, v in tree["data"].items() if k not in ("root", "source", "adherence")}
        return json.dumps([*setting, parts, data, choice])

    def __contains__(self, key: object) -> bool:
        return super().__contains__(self.simple(str(key)))

    def __getitem__(self, key: str) -> Any:
        return super().__getitem__(self.simple(key))

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(self.simple(key), value)


@pytest.fixture(scope="session", autouse=True)
def steps_are_rehearsed_once_and_few_pictures_judged() -> Iterator[None]:
    """Shares rehearsals between tests (`Rehearsed`), and draws 2 instead of 12 pictures of each incomplete prompt,
    which would take a sixth of a small run's time."""
    from ldm_train.evaluation import impression
    from ldm_train.pipeline import budget

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(budget, "_KNOWN", Rehearsed())
        patch.setattr(impression, "PARTIAL_SEEDS", 2)
        yield


@pytest.fixture(autouse=True)
def seeded() -> None:
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session")
def datasets() -> Path:
    """The folder with the tars of real images: $LDM_TRAIN_TEST_DATA, or shared/datasets beside the repository. Skips
    the test if it is not there."""
    folder = Path(os.environ.get("LDM_TRAIN_TEST_DATA", ROOT.parent / "shared" / "datasets"))
    if not folder.is_dir():
        pytest.skip(f"no real images at {folder}; set LDM_TRAIN_TEST_DATA to the folder that holds cifar10/")
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished small run, run/, and its data, data/, trained once for all processes. A test that
    changes anything in it must work on a copy."""
    from chains import chain
    from filelock import FileLock

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "trained"
    with FileLock(f"{folder}.lock"):
        if not (folder / "run" / "export" / "stage.json").is_file():
            folder.mkdir(exist_ok=True)
            chain(folder).execute()
    return folder


@pytest.fixture(scope="session")
def count(request: pytest.FixtureRequest) -> int:
    """The number of cases of a fuzz test (--fuzz)."""
    return request.config.getoption("--fuzz")


@pytest.fixture(scope="session")
def kills(request: pytest.FixtureRequest) -> int:
    """The number of times that a training is killed (--kills)."""
    return request.config.getoption("--kills")
