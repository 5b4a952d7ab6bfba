"""What every test shares: one thread, no progress bars, and the way to the real images where they are present."""

import os
from pathlib import Path

os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported
# Sums depend on the number of threads: the processes that tests start, and compare to the bit, have one as well.
os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

import pytest
import torch

ROOT = Path(__file__).parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz", type=int, default=60, help="cases of each fuzz test; 1000 looks closely")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def datasets() -> Path:
    """The folder with the tars of real images: $LDM_TRAIN_TEST_DATA, or shared/datasets beside the repository."""
    folder = Path(os.environ.get("LDM_TRAIN_TEST_DATA", ROOT.parent / "shared" / "datasets"))
    if not folder.is_dir():
        pytest.skip(f"no real images at {folder}; set LDM_TRAIN_TEST_DATA to the folder that holds cifar10/")
    return folder


@pytest.fixture(scope="session")
def count(request: pytest.FixtureRequest) -> int:
    """Cases of a fuzz test."""
    return request.config.getoption("--fuzz")
