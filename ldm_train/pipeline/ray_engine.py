"""Ray: the ranks of a command on the machines of a cluster, begun again where one is lost."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from ldm_train import interrupts
from ldm_train.cluster import connect, in_shared_folder
from ldm_train.pipeline.ranks import GRACE

PASSED_ON = ("WANDB_", "HF_", "HYDRA_", "LDM_", "NCCL_", "GLOO_")  # of the command's environment, to its ranks
LOOK = 0.5  # seconds between a rank's looks at the board
SECOND = 2.0  # a signal that comes later than this after the first asks ranks to end at once


class Board:
    """What a command and its ranks tell each other; an actor of Ray on the command's machine."""

    def __init__(self) -> None:
        self.number = 0
        self.ends: list[tuple[int, int, str]] = []

    def ask(self, number: int) -> None:
        """Has all ranks sent this signal."""
        self.number = number

    def end(self, rank: int, status: int, said: str) -> None:
        """Notes that a rank has ended by itself with this exit status, other than 0, and what it said last."""
        self.ends.append((rank, status, said))

    def look(self) -> tuple[int, bool]:
        """(the signal asked for or 0, whether a rank has ended so)."""
        return self.number, bool(self.ends)

    def outcome(self) -> tuple[int, str]:
        """(exit status, last words) of the first rank that ended so; the others ended because of it."""
        spoken = [(status, said) for _, status, said in self.ends if said] or [
            (status, said) for _, status, said in self.ends
        ]
        return spoken[0] if spoken else (0, "")


def accelerator_of(accelerator: str, devices: int) -> str:
    """cpu or gpu, for `accelerator` or what the cluster has. Raises ValueError for more devices than it has, and for others."""
    if accelerator not in ("auto", "cpu", "gpu"):
        raise ValueError(f"accelerator={accelerator} does not go with engine=ray; use cpu or gpu")
    there = connect().cluster_resources()
    kind = accelerator if accelerator != "auto" else "gpu" if there.get("GPU") else "cpu"
    if devices > (most := int(there.get(kind.upper(), 0))):
        raise ValueError(f"devices={devices}, but the cluster has {most} {kind.upper()}s; use devices={most}")
    return kind


def _own_address() -> tuple[str, int]:
    """This machine's address within the cluster, and a free port."""
    import ray

    with socket.socket() as free:
        free.bind(("", 0))
        return ray.util.get_node_ip_address(), free.getsockname()[1]


def _rank(task: dict[str, Any]) -> None:
    """A rank, from Ray's process on its machine: the command in a process of its own, where it has a main thread for its signals.
    Raises RuntimeError where that process is lost, and Ray begins all ranks again."""
    import ray
    from ray.train import get_context
    from ray.train.collective import broadcast_from_rank_zero

    context, board = get_context(), task["board"]
    rank = context.get_world_rank()
    address, port = broadcast_from_rank_zero(_own_address() if rank == 0 else None)
    try:
        in_shared_folder(task["folder"])
    except ValueError as error:
        return ray.get(board.end.remote(rank, 1, f"error: {error}"))
    with tempfile.TemporaryDirectory(prefix="ldm_train_") as reports:
        report = Path(reports) / "said"
        own = {
            "RANK": str(rank), "WORLD_SIZE": str(context.get_world_size()),
            "LOCAL_RANK": str(context.get_local_rank()), "LOCAL_WORLD_SIZE": str(context.get_local_world_size()),
            "GROUP_RANK": str(context.get_node_rank()), "MASTER_ADDR": address, "MASTER_PORT": str(port),
            "TORCHELASTIC_RUN_ID": "ray", interrupts.PARENT: str(os.getpid()), interrupts.REPORT: str(report),
        }  # fmt: skip
        command = [sys.executable, "-u", "-m", task["module"], *task["arguments"]]
        process = subprocess.Popen(command, env=os.environ | task["environment"] | own)
        try:
            _accompany(process, board)
        finally:
            process.kill()
        status = process.wait()
        number, failed = ray.get(board.look.remote())
        if status < 0 and not number and not failed:
            raise RuntimeError(f"rank {rank} was ended by {signal.Signals(-status).name}")
        if status:
            said = report.read_text().rstrip() if report.is_file() else ""
            ray.get(board.end.remote(rank, status if status > 0 else 128 - status, said))


def _accompany(process: subprocess.Popen, board: Any) -> None:
    """Waits for a rank's end, and passes on the signals that the board has. Returns also GRACE seconds after another rank ended."""
    import ray

    sent, end = 0, float("inf")
    while process.poll() is None and time.monotonic() < end:
        number, failed = ray.get(board.look.remote())
        if number != sent:
            process.send_signal(number)
            sent = number
        if failed:
            end = min(end, time.monotonic() + GRACE)
        time.sleep(LOOK)


def launch(count: int, module: str, gpus: bool, max_failures: int, runs_dir: Path) -> int:
    """Runs this command as `count` ranks on the cluster, again (at most `max_failures` times) where a machine or process is lost,
    and returns its exit status. runs_dir: a folder that all machines share."""
    ray = connect()
    from ray import train
    from ray.train.torch import TorchConfig, TorchTrainer

    name = f"ldm_train-{uuid.uuid4().hex[:12]}"
    storage = (runs_dir / ".ray").absolute()
    storage.mkdir(parents=True, exist_ok=True)
    board = ray.remote(num_cpus=0)(Board).remote()
    environment = {k: v for k, v in os.environ.items() if k.startswith(PASSED_ON)}
    task = {
        "board": board,
        "module": module,
        "arguments": sys.argv[1:],
        "folder": os.getcwd(),
        "environment": environment,
    }
    trainer = TorchTrainer(
        _rank,
        train_loop_config=task,
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=train.ScalingConfig(num_workers=count, use_gpu=gpus),
        run_config=train.RunConfig(
            name=name, storage_path=str(storage), failure_config=train.FailureConfig(max_failures=max_failures)
        ),
    )
    lost: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            lost.append(error)

    asked = [0, 0.0]  # the signal, and when it came

    def ask(number: int) -> None:
        if not asked[0]:
            asked[:] = number, time.monotonic()
        elif time.monotonic() - asked[1] > SECOND:
            asked[0] = signal.SIGKILL

    thread = threading.Thread(target=fit, name="ray", daemon=True)
    told = 0
    with interrupts.handled(), interrupts.answered_by(ask):  # Ray has its own handlers otherwise
        thread.start()
        while thread.is_alive():
            thread.join(0.2)
            if asked[0] != told:
                told = int(asked[0])
                ray.get(board.ask.remote(told))
        status, said = ray.get(board.outcome.remote())
    shutil.rmtree(storage / name, ignore_errors=True)
    if lost and not status:
        why = f"error: Ray gave up after max_failures={max_failures}: {_shortly(lost[0])}"
        status, said = 1, f"{why}; run the same command to continue"
    if status and told and not said:
        status, said = 128 + told, interrupts.farewell(told)
    if said:
        interrupts.last_words(said)
    return status


def _shortly(error: BaseException) -> str:
    """The last line of an error of Ray, whose messages hold whole tracebacks."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
