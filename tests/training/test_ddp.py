"""Two gloo processes: equal parameters after every step of both stages, disjoint samples, complete caches."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from forked import descendants, end_within

from ldm_train.data.shards import IndexedShards
from ldm_train.pipeline import resume as stages

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
    "diffusion.network.channels=32",
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


@pytest.mark.slow
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


def start(folder: Path, *overrides: str) -> subprocess.Popen:
    command = [
        sys.executable, str(ROOT / "train.py"), f"runs_dir={folder}", "name=run", f"data_dir={folder}/data",
        f"trace={folder}/trace", *OVERRIDES, "autoencoder.max_steps=500", "autoencoder.checkpoint_every=50",
        "autoencoder.val_every=50", "devices=2", *overrides,
    ]  # fmt: skip
    return subprocess.Popen(
        command, cwd=folder, env=environment(folder, "run"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for_training(process: subprocess.Popen, folder: Path) -> list[int]:
    """Waits until training has begun; returns the process ids of the two ranks."""
    trace = folder / "trace"
    while not (trace.is_file() and len(trace.read_text().splitlines()) >= 6):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    return [int(p) for p in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="reads /proc")
def test_ranks_and_loading_processes_end_with_their_command_and_sigterm_saves_on_all(tmp_path: Path):
    process = start(tmp_path, "num_workers=1")
    ranks = wait_for_training(process, tmp_path)
    everyone = descendants(process.pid)
    assert len(ranks) == 2
    assert len(everyone) >= 4
    process.kill()
    assert end_within(3, everyone)
    process.communicate()

    (tmp_path / "trace").unlink()
    process = start(tmp_path)  # the run is no longer locked
    wait_for_training(process, tmp_path)
    process.terminate()
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert output.count("SIGTERM: saving at the next step") == 1
    assert re.fullmatch(r"stopped by SIGTERM after step \d+; run the same command to continue", errors.strip())
    saved = torch.load(tmp_path / "run/autoencoder/checkpoints/last.ckpt", weights_only=True)["global_step"]
    assert f"after step {saved};" in errors


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="reads /proc")
def test_a_rank_that_fails_says_so_once_and_last(tmp_path: Path):
    (tmp_path / "run").mkdir()
    with stages.run_lock(tmp_path / "run"):
        process = start(tmp_path)
        errors = process.communicate(timeout=300)[1]
    assert process.returncode == 1
    assert errors.strip().startswith("error: another process is working in")
    assert len(errors.strip().splitlines()) == 1, errors

    process = start(tmp_path)
    os.kill(wait_for_training(process, tmp_path)[1], signal.SIGKILL)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 128 + signal.SIGKILL
    assert "error: the process of device 1 was ended by SIGKILL" in errors.strip().splitlines()[-1]
    assert "Traceback" not in errors
