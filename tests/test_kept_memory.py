"""A process that trains on the CPU keeps freed memory, and returns it to the system afterwards."""

import sys

import psutil
import pytest
import torch

from ldm_train.devices import kept_memory

MIB = 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_stays_while_training_and_returns_afterwards() -> None:
    process = psutil.Process()
    with kept_memory(torch.device("cpu")):
        held = [torch.ones(2 * MIB) for _ in range(40)]  # 8 MiB each
        full = process.memory_info().rss
        held.clear()
        kept = process.memory_info().rss
    left = process.memory_info().rss
    assert full - kept < 40 * MIB
    assert kept - left > 200 * MIB


def test_nothing_happens_for_accelerators() -> None:
    with kept_memory(torch.device("meta")):
        pass
