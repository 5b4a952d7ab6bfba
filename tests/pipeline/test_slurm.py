"""SLURM: ranks from srun's variables, and requeued jobs, also on a real SLURM if its packages are installed."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from ldm_train import interrupts
from ldm_train.pipeline import slurm

ROOT = Path(__file__).parents[2]
TASK = {
    "SLURM_JOB_ID": "1204", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_PROCID": "6", "SLURM_LOCALID": "2", "SLURM_NODEID": "1", "SLURM_STEP_NODELIST": "node[03-04,17]",
}  # fmt: skip
DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch")


def test_a_task_of_srun_has_torchruns_variables():
    known = slurm.ranks(TASK)
    assert {name: known[name] for name in ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")} == {
        "RANK": "6", "LOCAL_RANK": "2", "GROUP_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"
    }  # fmt: skip
    assert known["MASTER_ADDR"] == "node03"
    assert int(known["MASTER_PORT"]) in slurm.PORTS
    assert known["MASTER_PORT"] != slurm.ranks(TASK | {"SLURM_JOB_ID": "1205"})["MASTER_PORT"]


def test_ports_and_addresses_that_are_set_stay():
    assert slurm.ranks(TASK | {"MASTER_PORT": "555"})["MASTER_PORT"] == "555"
    assert slurm.ranks(TASK | {"RANK": "0"})["RANK"] == "6"  # a rank that is set does not


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"},  # a batch script, not a task
        TASK | {"SLURM_STEP_NUM_TASKS": "1"},
        TASK | {"WORLD_SIZE": "2", "RANK": "1"},  # torchrun within a job
    ],
)
def test_other_processes_keep_their_own_ranks(environment: dict[str, str]):
    assert slurm.ranks(environment) == {}


def test_uneven_nodes_are_refused():
    with pytest.raises(ValueError, match=r"4\(x2\),3 tasks .* --ntasks-per-node"):
        slurm.ranks(TASK | {"SLURM_STEP_TASKS_PER_NODE": "4(x2),3"})


def test_tasks_that_see_one_gpu_each_are_refused():
    with pytest.raises(ValueError, match="--gpu-bind=none"):
        slurm.ranks(TASK | {"CUDA_VISIBLE_DEVICES": "2"})
    assert slurm.ranks(TASK | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"})["LOCAL_RANK"] == "2"


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """Installs a fake scontrol that logs its arguments; returns a function that gives the logged calls."""
    log, tool = tmp_path / "asked", tmp_path / "scontrol"
    tool.write_text(f'#!/bin/sh\necho "$@" >> {log}\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    for name in ("SLURM_RESTART_COUNT", "SLURM_ARRAY_JOB_ID", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    return lambda: log.read_text().splitlines() if log.exists() else []


def test_a_requeued_job_does_not_restart_a_stage_again(
    tmp_path: Path, asked: Callable, monkeypatch: pytest.MonkeyPatch
):
    slurm.note_restart(tmp_path, "diffusion")
    assert not slurm.has_restarted(tmp_path, "diffusion")  # the same job, typed once more
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert slurm.has_restarted(tmp_path, "diffusion")
    assert not slurm.has_restarted(tmp_path, "latents")
    monkeypatch.setenv("SLURM_JOB_ID", "78")
    assert not slurm.has_restarted(tmp_path, "diffusion")


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_a_job_that_is_told_of_its_end_is_requeued(number: int, asked: Callable):
    slurm.run_again(number, 3)
    assert asked() == ["requeue 77"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_cancelled_job_is_not_requeued(number: int, asked: Callable):
    slurm.run_again(number, 3)
    assert asked() == []


def test_requeues_are_counted(asked: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    slurm.run_again(signal.SIGUSR1, 3)
    assert asked() == []
    assert "requeues=3" in capsys.readouterr().out


def test_a_task_of_an_array_is_requeued_by_itself(asked: Callable, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "70")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "4")
    slurm.run_again(signal.SIGUSR1, 3)
    assert asked() == ["requeue 70_4"]


def test_a_job_that_cannot_be_requeued_says_why(asked: Callable, tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho Requested operation is disabled >&2\nexit 1\n")
    slurm.run_again(signal.SIGUSR1, 3)
    assert "scontrol requeue 77: Requested operation is disabled" in capsys.readouterr().out


def test_other_ranks_leave_the_asking_to_the_first(asked: Callable, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(slurm, "ASKING", 0.0)
    slurm.run_again(signal.SIGUSR1, 3)
    assert asked() == []


def test_outside_slurm_nothing_is_asked(asked: Callable, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("SLURM_JOB_ID")
    slurm.run_again(signal.SIGUSR1, 3)
    assert asked() == []


def test_submitit_requeues_by_its_own_handler(asked: Callable, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    called: list[int] = []
    before = {n: signal.signal(n, lambda number, frame: called.append(number)) for n in interrupts.SIGNALS}
    try:
        with interrupts.handled():  # as in training: we handle the signals that announce the end, submitit SIGTERM
            assert not interrupts.handled_outside(signal.SIGUSR2)
            assert interrupts.handled_outside(signal.SIGTERM)
        slurm.run_again(signal.SIGUSR2, 3)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert called == [signal.SIGUSR2]
    assert asked() == []


# -- a real SLURM ---------------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Starts a SLURM whose only node is this machine; yields the folder of its slurm.conf. Skips if it cannot."""
    if missing := [name for name in DAEMONS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]:
        pytest.skip(f"no {', '.join(missing)} here (Debian: slurmctld, slurmd, slurm-client, munge)")
    if os.getuid() != 0:
        pytest.skip("slurmctld and slurmd are started by root")
    folder, host = tmp_path_factory.mktemp("slurm"), socket.gethostname().split(".")[0]
    options = {
        "ClusterName": "test", "SlurmctldHost": f"{host}(127.0.0.1)", "SlurmUser": "root", "AuthType": "auth/munge",
        "AuthInfo": f"socket={folder}/munge", "MpiDefault": "none", "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none", "SelectType": "select/cons_tres", "SchedulerType": "sched/builtin",
        "StateSaveLocation": folder / "state", "SlurmdSpoolDir": folder / "spool", "SlurmctldPidFile": folder / "ctld.pid",
        "SlurmdPidFile": folder / "d.pid", "SlurmctldPort": free_port(), "SlurmdPort": free_port(), "KillWait": 5,
        "NodeName": f"{host} NodeAddr=127.0.0.1 CPUs={max(2, os.cpu_count() or 1)} State=UNKNOWN",
        "PartitionName": "main Nodes=ALL Default=YES MaxTime=INFINITE State=UP",
    }  # fmt: skip
    (folder / "slurm.conf").write_text("".join(f"{name}={value}\n" for name, value in options.items()))
    key = folder / "key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    for path in (folder, *folder.parents[:2]):
        path.chmod(0o755)
    environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{os.environ['PATH']}:/usr/sbin"}
    munge = [
        f"--socket={folder}/munge",
        f"--key-file={key}",
        f"--pid-file={folder}/m.pid",
        f"--seed-file={folder}/seed",
    ]
    commands = (
        ["munged", "--foreground", "--force", f"--log-file={folder}/m.log", *munge], ["slurmctld", "-D"], ["slurmd", "-D"]
    )  # fmt: skip
    daemons = []
    try:
        for command in commands:
            log = (folder / f"{command[0]}.log").open("w")
            daemons.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
            time.sleep(2)
        if "idle" not in (state := asked_of(folder, "sinfo", "-h", "-o", "%t")):
            logs = "\n".join((folder / f"{c[0]}.log").read_text()[-500:] for c in commands)
            pytest.skip(f"SLURM does not start here ({state.strip()}): {logs}")
        yield folder
    finally:
        asked_of(folder, "scancel", "--full", "-p", "main")
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(30)


def asked_of(cluster: Path, *command: str) -> str:
    environment = os.environ | {"SLURM_CONF": str(cluster / "slurm.conf")}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60).stdout


def wait_for(condition: Callable[[], bool], seconds: float, what: Callable[[], str]) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what()
        time.sleep(0.5)


@pytest.mark.slow
def test_two_tasks_told_of_their_end_save_run_again_and_end_as_if_undisturbed(cluster: Path, tmp_path: Path):
    small = [
        "logger=csv", "progress=false", "accelerator=cpu", "data.source.count=64", "data.source.val_count=16",
        "autoencoder.max_steps=80", "autoencoder.batch_size=8", "autoencoder.checkpoint_every=1000", "autoencoder.val_every=40",
        "autoencoder.val_images=8", "autoencoder.loss.disc_start=40", "stages=[autoencoder,latents]", f"data_dir={tmp_path}/data",
        f"runs_dir={tmp_path}",
    ]  # fmt: skip
    train, one = [sys.executable, str(ROOT / "train.py"), *small], {"OMP_NUM_THREADS": "1"}
    undisturbed = subprocess.run(
        [*train, "name=whole", "devices=2"], env=os.environ | one, capture_output=True, text=True
    )
    assert undisturbed.returncode == 0, undisturbed.stderr[-2000:]

    trace, said = tmp_path / "trace", tmp_path / "said"
    script = tmp_path / "job.sh"
    script.write_text(f"#!/bin/sh\nsrun {' '.join(train)} name=told trace={trace}\n")
    options = ["--ntasks=2", "--requeue", "--open-mode=append", f"--output={said}", "--export=ALL,OMP_NUM_THREADS=1"]
    job = asked_of(cluster, "sbatch", "--parsable", *options, str(script)).strip()

    def told() -> str:
        return said.read_text() if said.exists() else f"job {job} has said nothing"

    wait_for(lambda: trace.exists() and len(trace.read_text().splitlines()) >= 10, 120, told)
    asked_of(cluster, "scancel", "--signal=USR1", job)  # as `sbatch --signal=USR1@120` does two minutes before the end
    wait_for(lambda: f"SLURM runs job {job} again" in told(), 60, told)
    assert (tmp_path / "told" / "autoencoder" / "checkpoints" / "last.ckpt").is_file()

    def begun_again() -> bool:
        asked_of(cluster, "scontrol", "update", f"JobId={job}", "StartTime=now")  # SLURM itself waits two minutes
        return "latents: done" in told()

    wait_for(begun_again, 400, told)
    assert "stopped by SIGUSR1 after step" in told()
    weights = [
        torch.load(tmp_path / name / "autoencoder" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("whole", "told")
    ]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


@pytest.mark.slow
def test_a_sweep_of_submitit_trains_on_two_tasks_each_and_survives_being_preempted(cluster: Path, tmp_path: Path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    small = [
        "logger=csv", "progress=false", "accelerator=cpu", "data.source.count=64", "data.source.val_count=16",
        "autoencoder.batch_size=8", "autoencoder.checkpoint_every=1000", "autoencoder.val_every=40", "autoencoder.val_images=8",
        "autoencoder.loss.disc_start=40", "stages=[autoencoder]", f"data_dir={tmp_path}/data", f"runs_dir={tmp_path}", "name=s",
        "autoencoder.max_steps=60",
    ]  # fmt: skip
    launcher = [
        "hydra/launcher=submitit_slurm", "hydra.launcher.tasks_per_node=2", "hydra.launcher.cpus_per_task=1",
        "hydra.launcher.timeout_min=30", "hydra.launcher.max_num_timeout=3", f"hydra.launcher.submitit_folder={tmp_path}/jobs/%j",
        f"trace={tmp_path}/trace",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "SLURM_CONF": str(cluster / "slurm.conf")}
    with (tmp_path / "said").open("w") as said:
        sweep = subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), "-m", *small, *launcher], env=environment, stdout=said, stderr=said
        )
    trace = tmp_path / "trace"

    def told() -> str:
        outputs = [
            p.read_text()[-1500:] for p in sorted((tmp_path / "jobs").glob("*/*.*")) if p.suffix in (".out", ".err")
        ]
        return "\n".join([(tmp_path / "said").read_text()[-1500:], *outputs])

    try:
        wait_for(lambda: trace.exists() and len(trace.read_text().splitlines()) >= 10, 150, told)
        job = asked_of(cluster, "squeue", "-h", "-t", "RUNNING", "-o", "%i").split()[0]
        asked_of(cluster, "scancel", "--signal=USR2", job)
        wait_for(lambda: "stopped" in told() or "preempted" in told(), 60, told)

        def ended() -> bool:
            for waiting in asked_of(cluster, "squeue", "-h", "-t", "PENDING", "-o", "%i").split():
                asked_of(cluster, "scontrol", "update", f"JobId={waiting}", "StartTime=now")
            return sweep.poll() is not None

        wait_for(ended, 300, told)
    finally:
        sweep.kill()
    assert sweep.returncode == 0, told()
    (last,) = (tmp_path / "s").rglob("last.ckpt")
    assert torch.load(last, weights_only=True)["global_step"] == 60
    assert len(trace.read_text().splitlines()) == 2 * 60  # for two ranks: no step was repeated
