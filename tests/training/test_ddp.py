"""Two gloo processes: equal parameters after every step of both stages, disjoint samples, complete caches."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ldm_train.data.shards import IndexedShards

ROOT = Path(__file__).parents[2]
OVERRIDES = [
    "logger=csv",
    "progress=false",
    "accelerator=cpu",
    "data.source.count=64",
    "data.source.val_count=17",
    "data.per_shard=16",
    "latents.per_shard=8",
    "autoencoder.batch_size=16",
    "autoencoder.loss.disc_start=1",
    "autoencoder.loss.learn_logvar=true",
    "autoencoder.checkpoint_every=1",
    "autoencoder.val_every=3",
    "diffusion.batch_size=16",
    "diffusion.checkpoint_every=1",
    "diffusion.val_every=3",
    "diffusion.samples=2",
    "diffusion.unet.channels=32",
    "sampling.num_inference_steps=2",
    "autoencoder.max_steps=3",
    "diffusion.max_steps=3",
    "stages=[autoencoder,latents,diffusion,export]",
]

# Trains both stages as train.py does and records a digest of all trained parameters after every step, per rank.
WORKER = """
import os, sys, hashlib
import lightning as L
from ldm_train.training.callbacks.monitor import Monitor

def digest(self, trainer, task, outputs, batch, batch_idx, real=Monitor.on_train_batch_end):
    real(self, trainer, task, outputs, batch, batch_idx)
    sha = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in task.trained().parameters()))
    with open(f"{os.environ['DIGESTS']}.{trainer.global_rank}", "a") as file:
        file.write(f"{task.stage} {trainer.global_step} {sha.hexdigest()}\\n")

Monitor.on_train_batch_end = digest
from ldm_train.cli.train import main
main()
"""


def run(folder: Path, name: str, launcher: list[str], *overrides: str) -> subprocess.CompletedProcess:
    command = [
        *launcher, f"runs_dir={folder}", f"name={name}", f"data_dir={folder}/data", f"trace={folder}/{name}.trace",
        *OVERRIDES, *overrides,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment(folder, name))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def environment(folder: Path, name: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "DIGESTS": str(folder / f"{name}.digests")}


@pytest.mark.chain
def test_two_ranks_agree_and_the_chain_runs_under_devices_2_and_torchrun(tmp_path: Path):
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    run(tmp_path, "torchrun", [*torchrun, str(worker)])
    run(tmp_path, "devices", [sys.executable, str(ROOT / "train.py")], "devices=2")

    digests = [Path(f"{tmp_path}/torchrun.digests.{rank}").read_text() for rank in (0, 1)]
    assert digests[0] == digests[1]  # equal parameters, learned log-variance included, after each step
    assert len(digests[0].splitlines()) == len(set(digests[0].splitlines())) == 6

    by_step: dict[str, list[set[str]]] = {}
    for line in (tmp_path / "torchrun.trace").read_text().splitlines():
        place, _, keys = line.partition("|")
        by_step.setdefault(place.rpartition(" ")[0], []).append(set(keys.split(",")))
    assert len(by_step) == 6
    assert all(len(ranks) == 2 and not ranks[0] & ranks[1] and len(ranks[0]) == 8 for ranks in by_step.values())

    for name in ("torchrun", "devices"):
        for split, count in (("train", 64), ("val", 17)):
            keys = IndexedShards(tmp_path / name / "latents", split).keys
            assert len(keys) == len(set(keys)) == count
        assert (tmp_path / name / "export" / "model.safetensors").is_file()
    a, b = (
        torch.load(tmp_path / n / "diffusion" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for n in ("torchrun", "devices")
    )
    assert all(torch.equal(a[k], b[k]) for k in a)  # two ways to start, one result
