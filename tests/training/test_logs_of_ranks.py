"""What is logged of a step is the mean over the micro-batches of all ranks, whichever of them have the number."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from forked import begun
from test_autoencoder_task import build

from ldm_train.training.autoencoder_task import AutoencoderTask

LOSSES = [[1.0, 2.0], [4.0, 9.0]]  # by rank, of two micro-batches
RARE = [[None, None], [None, 6.0]]


class Logging(AutoencoderTask):
    """A task that keeps what it logs, without a trainer."""

    logs_now, global_step = True, 0
    trainer = SimpleNamespace(optimizers=[SimpleNamespace(param_groups=[{"lr": 0.1}])])

    def log(self, name: str, value: Any, **options: Any) -> None:
        self.seen[name] = float(value)

    def log_dict(self, values: dict[str, Any], **options: Any) -> None:
        for name, value in values.items():
            self.log(name, value)


def rank(index: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=index, world_size=2)
    task = build(accumulate=2)
    task.__class__, task.seen = Logging, {}
    for micro, (loss, rare) in enumerate(zip(LOSSES[index], RARE[index])):
        task._micro = micro
        task.log_training({"loss": torch.tensor(loss)} | ({} if rare is None else {"rare": torch.tensor(rare)}))
        assert bool(task.seen) == (micro == 1)
    torch.save(task.seen, f"{folder}/{index}.pt")
    dist.destroy_process_group()


def test_logs_are_means_over_ranks(tmp_path: Path) -> None:
    processes = [begun(rank, index, str(tmp_path)) for index in range(2)]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    for index in range(2):
        seen = torch.load(tmp_path / f"{index}.pt")
        assert seen["train/loss"] == 4.0
        assert seen["train/rare"] == 6.0
