"""Ray on a local cluster of two nodes: ranks on both, a node lost midway, shards written by tasks. Needs '.[ray]'."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from chains import composed
from omegaconf import OmegaConf

from ldm_train import cluster
from ldm_train.cli.prepare import prepare
from ldm_train.pipeline import ray_engine
from ldm_train.pipeline.values import check_values

ROOT = Path(__file__).parents[2]
CHAIN = [
    "logger=csv", "progress=false", "accelerator=cpu", "data.source.count=64", "data.source.val_count=17", "data.per_shard=16",
    "latents.per_shard=8", "autoencoder.batch_size=16", "autoencoder.loss.disc_start=1", "autoencoder.checkpoint_every=1",
    "autoencoder.val_every=100", "diffusion.batch_size=16", "diffusion.checkpoint_every=1", "diffusion.val_every=100",
    "diffusion.samples=2", "diffusion.network.channels=32", "sampling.num_inference_steps=2", "autoencoder.max_steps=20",
    "diffusion.max_steps=20", "evaluation.images=32", "evaluation.adherence=null", "devices=2",
]  # fmt: skip
FAILING = """
import lightning as L

class Failing(L.Callback):
    def on_train_batch_start(self, trainer, *_):
        if trainer.global_rank == 1 and trainer.global_step >= 2:
            raise ValueError("enough of this")
"""
with_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs pip install -e '.[ray]'")


def test_ray_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"pip install 'ldm-train\[ray\]'"):
        cluster.connect()
    with pytest.raises(ValueError, match="engine=spark is not known: engine=ray"):
        check_values(composed("train", "engine=spark"))
    with pytest.raises(ValueError, match="engine=spark is not known: engine=ray"):
        prepare(OmegaConf.create({"engine": "spark", "out": str(tmp_path)}))


def test_more_devices_than_the_cluster_has_are_refused(monkeypatch: pytest.MonkeyPatch):
    class Ray:
        def cluster_resources(self) -> dict[str, float]:
            return {"CPU": 32.0, "GPU": 4.0}

    monkeypatch.setattr(ray_engine, "connect", Ray)
    assert ray_engine.accelerator_of("auto", 4) == "gpu"
    assert ray_engine.accelerator_of("cpu", 32) == "cpu"
    with pytest.raises(ValueError, match="devices=8, but the cluster has 4 GPUs; use devices=4"):
        ray_engine.accelerator_of("auto", 8)
    with pytest.raises(ValueError, match="accelerator=mps does not go with engine=ray"):
        ray_engine.accelerator_of("mps", 1)


def test_the_board_keeps_what_the_first_rank_said_of_those_that_run_now():
    board = ray_engine.Board()
    board.begin("first")
    board.end("first", 1, 1, "the neighbour of one that was lost")
    board.begin("second")
    board.end("first", 1, 1, "late")
    assert (board.look("second"), board.outcome()) == ((0, False), (0, ""))
    assert not board.is_alone()
    board.end("second", 1, 1, "")  # fails because the other rank failed
    board.end("second", 0, 2, "error: the cause")
    assert (board.look("second"), board.look("first")) == ((0, True), (0, False))
    assert board.outcome() == (2, "error: the cause")


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """A Ray cluster: a head without CPUs, and two nodes with one CPU each."""
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        made.add_node(num_cpus=1)
    yield made
    made.shutdown()


def begin(folder: Path, nodes: Any, *command: str) -> subprocess.Popen:
    environment = os.environ | {"RAY_ADDRESS": nodes.address, "OMP_NUM_THREADS": "1"}
    with (folder / "log").open("a") as log:
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)


def lose_one(nodes: Any) -> None:
    """Kills a node's raylet, and with it all processes on that node, then adds another node."""
    nodes.remove_node(next(iter(nodes.worker_nodes)), allow_graceful=False)
    nodes.add_node(num_cpus=1)


def until(there: Path, process: subprocess.Popen, log: Path) -> None:
    while not there.exists():
        assert process.poll() is None, log.read_text()[-6000:]
        time.sleep(0.05)


@with_ray
@pytest.mark.slow
def test_a_chain_on_two_nodes_goes_on_exactly_after_ctrl_c_and_after_one_is_lost(nodes: Any, tmp_path: Path):
    log, own = tmp_path / "log", tmp_path / "runs" / "ray"
    command = [sys.executable, str(ROOT / "train.py"), "name=ray", "engine=ray", *CHAIN]
    process = begin(tmp_path, nodes, *command)
    until(own / "autoencoder" / "checkpoints" / "last.ckpt", process, log)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 128 + signal.SIGINT, log.read_text()[-6000:]
    assert "stopped by SIGINT after step" in log.read_text().splitlines()[-1]

    process = begin(tmp_path, nodes, *command)
    until(own / "diffusion" / "checkpoints" / "last.ckpt", process, log)
    lose_one(nodes)
    assert process.wait() == 0, log.read_text()[-6000:]
    assert not (tmp_path / "runs" / ".ray").exists()

    subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "name=local", *CHAIN],
        cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, capture_output=True,
    )  # fmt: skip
    local = own.with_name("local")
    for stage in ("autoencoder", "diffusion"):
        a, b = (
            torch.load(run / stage / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
            for run in (own, local)
        )
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    shards = sorted((local / "latents").glob("*.tar"))
    assert shards
    assert all((own / "latents" / shard.name).read_bytes() == shard.read_bytes() for shard in shards)
    assert (own / "evaluation" / "metrics.json").is_file()

    sample = [sys.executable, "-m", "ldm_train.cli.sample", "run=ray", "prompts=a red circle", "n=32", "batch_size=2"]
    process = begin(tmp_path, nodes, *sample, "accelerator=cpu", "engine=ray", "devices=2", "out=there")
    until(tmp_path / "there" / "00000_seed0.png", process, log)
    lose_one(nodes)
    assert process.wait() == 0, log.read_text()[-6000:]
    one = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*sample, "accelerator=cpu", "out=here"], cwd=tmp_path, env=one, check=True, capture_output=True)
    drawn = sorted((tmp_path / "here").iterdir())
    assert len(drawn) == 34
    assert all((tmp_path / "there" / file.name).read_bytes() == file.read_bytes() for file in drawn)


@with_ray
@pytest.mark.slow
def test_a_rank_that_fails_says_so_once_and_nothing_begins_again(nodes: Any, tmp_path: Path):
    (tmp_path / "failing.py").write_text(FAILING)
    command = [
        sys.executable,
        "-m",
        "ldm_train.cli.train",
        "name=ray",
        "engine=ray",
        *CHAIN,
    ]  # the working folder is on its path
    process = begin(tmp_path, nodes, *command, "+callbacks.own._target_=failing.Failing")
    assert process.wait() == 1
    said = (tmp_path / "log").read_text()
    assert said.count("enough of this") == 1, said[-6000:]
    assert "enough of this" in said.splitlines()[-1]


@with_ray
@pytest.mark.slow
def test_shards_are_the_same_where_a_node_is_lost_while_they_are_written(nodes: Any, tmp_path: Path):
    options = ["source=shapes", "source.count=6000", "source.val_count=200", "per_shard=100"]
    command = [sys.executable, "-m", "ldm_train.cli.prepare", *options]
    process = begin(tmp_path, nodes, *command, "out=there", "engine=ray", "workers=4")
    until(tmp_path / "there" / "train-000002.tar", process, tmp_path / "log")
    lose_one(nodes)
    assert process.wait() == 0, (tmp_path / "log").read_text()[-6000:]
    subprocess.run([*command, "out=here"], cwd=tmp_path, check=True, capture_output=True)
    here = sorted(file for file in (tmp_path / "here").iterdir() if file.is_file())
    assert len(here) == 63  # 60 + 2 shards and their index
    assert all((tmp_path / "there" / file.name).read_bytes() == file.read_bytes() for file in here)
