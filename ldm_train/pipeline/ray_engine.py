"""Runs the ranks of a command on a Ray cluster, and restarts them when a machine or process is lost."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch.distributed import TCPStore

from ldm_train import interrupts
from ldm_train.cluster import connect, in_shared_folder
from ldm_train.pipeline.ranks import GRACE

RUN_ID = "ray"  # TORCHELASTIC_RUN_ID of ranks on Ray
PATIENCE = 180.0  # seconds that restarted ranks wait for the old ones to release the run's folder
PASSED_ON = ("WANDB_", "HF_", "HYDRA_", "LDM_", "NCCL_", "GLOO_")  # prefixes of environment variables for the ranks
LOOK = 0.5  # seconds between a rank's polls of the board
ALONE = 10.0  # seconds without any poll after which no rank is considered alive
SECOND = 2.0  # seconds after the first signal from which another one kills all ranks at once


class Board:
    """A message board between a command and its ranks: a Ray actor on the command's machine.

    Each restart of the ranks has a new token; messages with an older token are ignored.
    """

    def __init__(self) -> None:
        self.number, self.token, self.ends, self.looked = 0, "", list[tuple[int, int, str]](), 0.0

    def ask(self, number: int) -> None:
        """Requests that this signal be sent to all ranks."""
        self.number = number

    def begin(self, token: str) -> None:
        self.token, self.ends = token, []

    def end(self, token: str, rank: int, status: int, said: str) -> None:
        """Records that a rank has failed by itself: its exit status and its final message."""
        if token == self.token:
            self.ends.append((rank, status, said))

    def look(self, token: str) -> tuple[int, bool]:
        """Returns (the requested signal or 0, True if a rank has failed), and notes the time of the call."""
        self.looked = time.monotonic()
        return self.number, token == self.token and bool(self.ends)

    def is_alone(self) -> bool:
        return time.monotonic() - self.looked > ALONE

    def outcome(self) -> tuple[int, str]:
        """Returns (exit status, final message) of the first rank that failed with a message; the others failed because
        of it."""
        spoken = [end for end in self.ends if end[2]] or self.ends
        return spoken[0][1:] if spoken else (0, "")


class Place(NamedTuple):
    """The address at which ranks meet (address, port, token) and the number of ranks on rank 0's machine."""

    address: str
    port: int
    token: str
    local_world_size: int


def accelerator_of(accelerator: str, devices: int) -> str:
    """Returns cpu or gpu: `accelerator` itself or, for auto, what the cluster has. Raises ValueError for any other
    value, and for more devices than the cluster has."""
    if accelerator not in ("auto", "cpu", "gpu"):
        raise ValueError(f"accelerator={accelerator} does not go with engine=ray; use cpu or gpu")
    there = connect().cluster_resources()
    kind = accelerator if accelerator != "auto" else "gpu" if there.get("GPU") else "cpu"
    if devices > (most := int(there.get(kind.upper(), 0))):
        raise ValueError(f"devices={devices}, but the cluster has {most} {kind.upper()}s; use devices={most}")
    return kind


# -- in the Ray process of a rank --------------------------------------------------------------------------------------


def _rank(task: dict[str, Any]) -> None:
    """Runs one rank: the command in a separate process, which has a main thread to handle signals. Raises RuntimeError
    if that process is lost, so that Ray restarts all ranks; the rank's own failures are reported to the board."""
    import ray
    from ray.train import get_context
    from ray.train.collective import broadcast_from_rank_zero

    context, board = get_context(), task["board"]
    rank, local = context.get_world_rank(), context.get_local_world_size()
    store, place = None, None
    if rank == 0:
        address = ray.util.get_node_ip_address()
        # On a free port, which stays open while the ranks need it.
        store = TCPStore(address, 0, is_master=True, wait_for_workers=False)
        place = Place(address, store.port, uuid.uuid4().hex, local)
        ray.get(board.begin.remote(place.token))
    place = Place(*broadcast_from_rank_zero(place))

    def fail(status: int, said: str) -> None:
        ray.get(board.end.remote(place.token, rank, status, said))

    try:
        if local != place.local_world_size:
            raise ValueError(
                f"Ray placed {place.local_world_size} ranks on one machine and {local} on another; choose devices= so that all have as "
                "many, or a cluster of equal machines"
            )
        in_shared_folder(task["folder"], task["witness"])
    except ValueError as error:
        fail(1, f"error: {error}")
        return
    with tempfile.TemporaryDirectory(prefix="ldm_train_") as reports:
        report = Path(reports) / "said"
        own = {
            "RANK": str(rank), "WORLD_SIZE": str(context.get_world_size()), "LOCAL_RANK": str(context.get_local_rank()),
            "LOCAL_WORLD_SIZE": str(local), "GROUP_RANK": str(context.get_node_rank()), "MASTER_ADDR": place.address,
            "MASTER_PORT": str(place.port), "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": RUN_ID,
            interrupts.PARENT: str(os.getpid()), interrupts.REPORT: str(report),
        }  # fmt: skip
        command = [sys.executable, "-u", "-m", task["module"], *task["arguments"]]
        process = subprocess.Popen(command, env=os.environ | task["environment"] | own)
        look = partial(_look, board, place.token)
        try:
            ended_here = _accompany(process, look)
        finally:
            process.kill()
        status = process.wait()
        said = report.read_text().rstrip() if report.is_file() else ""
    if status < 0 and not ended_here:
        if status == -signal.SIGABRT and _another_failed(look):  # NCCL aborts ranks whose peers are gone
            return
        name = signal.Signals(-status).name
        hint = " (the machine may be out of memory)" if name == "SIGKILL" else ""
        raise RuntimeError(f"the process of rank {rank} was ended by {name}{hint}")
    if status or said:
        fail(status if status > 0 else 128 - status if status else 1, said)


def _look(board: Any, token: str) -> tuple[int, bool]:
    import ray

    return ray.get(board.look.remote(token))


def _another_failed(look: Any) -> bool:
    """Returns True if another rank fails by itself within GRACE seconds."""
    end = time.monotonic() + GRACE
    while not (failed := look()[1]) and time.monotonic() < end:
        time.sleep(LOOK)
    return failed


def _accompany(process: subprocess.Popen, look: Any) -> bool:
    """Waits for a rank's process to end, passes on the signals requested on the board, and kills it GRACE seconds after
    another rank failed. Returns True if the process was sent any signal."""
    sent, end = 0, float("inf")
    while process.poll() is None:
        number, failed = look()
        if number != sent:
            process.send_signal(number)
            sent = number
        if failed:
            end = min(end, time.monotonic() + GRACE)
        if time.monotonic() > end:
            process.kill()
            return True
        time.sleep(LOOK)
    return bool(sent)


def _torch_config() -> Any:
    """Ray Train's settings for torch without its process group and CUDA context: the ranks' processes create their
    own."""
    from ray.train.backend import Backend
    from ray.train.torch import TorchConfig

    class Devices(Backend):
        share_cuda_visible_devices = True

    class Settings(TorchConfig):
        @property
        def backend_cls(self) -> Any:
            return Devices

        @property
        def train_func_context(self) -> Any:
            return nullcontext

    return Settings(backend="gloo")


# -- in the command's process --------------------------------------------------------------------------------------------


class _Asked:
    """The signals sent to a command. first: the first one; now: the one that its ranks should be sent now."""

    def __init__(self) -> None:
        self.first, self.now, self._since = 0, 0, 0.0

    def __call__(self, number: int) -> None:
        if not self.first:
            self.first = self.now = number
            self._since = time.monotonic()
        elif time.monotonic() - self._since > SECOND:
            self.now = signal.SIGKILL


def launch(count: int, module: str, options: dict[str, str], max_failures: int, runs_dir: Path) -> int:
    """Runs this command as `count` ranks on the cluster and returns its exit status. The ranks are restarted at most
    `max_failures` times if a machine or process is lost.

    options: override those of the command line, with what was decided here, e.g. `accelerator` gpu or cpu. runs_dir: a
    folder that all machines share.
    """
    name = f"ldm_train-{uuid.uuid4().hex[:12]}"
    storage = (runs_dir / ".ray").absolute()
    (storage / name).mkdir(parents=True)
    try:
        status, said = _run(count, module, options, max_failures, storage, name)
    finally:
        connect().shutdown()  # Ray's processes write logs until then
        shutil.rmtree(storage / name, ignore_errors=True)
        with suppress(OSError):  # not empty: another command uses it
            storage.rmdir()
    if said:
        interrupts.last_words(said)
    return status


def _run(
    count: int, module: str, options: dict[str, str], max_failures: int, storage: Path, name: str
) -> tuple[int, str]:
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    ray = connect()
    from ray import train
    from ray.train import WorkerGroupError
    from ray.train.torch import TorchTrainer
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board = ray.remote(Board).options(num_cpus=0, scheduling_strategy=here).remote()
    # restart= is dropped: the old stage is set aside already, and restarted ranks must continue the new one.
    replaced = tuple(f"{option}=" for option in ("restart", *options))
    task = {
        "board": board, "module": module, "folder": os.getcwd(), "witness": str(storage / name),
        "arguments": [a for a in sys.argv[1:] if not a.startswith(replaced)] + [f"{k}={v}" for k, v in options.items()],
        "environment": {k: v for k, v in os.environ.items() if k.startswith(PASSED_ON)},
    }  # fmt: skip
    trainer = TorchTrainer(
        partial(_rank, task),  # not train_loop_config, which Ray may record: the environment holds API keys
        torch_config=_torch_config(),
        scaling_config=train.ScalingConfig(num_workers=count, use_gpu=options["accelerator"] == "gpu"),
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

    asked, told = _Asked(), 0
    thread = threading.Thread(target=fit, name="ray", daemon=True)
    with interrupts.handled(), interrupts.answered_by(asked):  # instead of Ray's own handlers
        thread.start()
        while thread.is_alive():
            thread.join(0.2)
            if asked.now != told:
                told = asked.now
                ray.get(board.ask.remote(told))
            if told and ray.get(board.is_alone.remote()):  # the ranks wait for devices, or are gone
                break
        status, said = ray.get(board.outcome.remote())
    if lost:
        after = f" after max_failures={max_failures}" if isinstance(lost[0], WorkerGroupError) else ""
        return 1, f"error: Ray gave up{after}: {_shortly(lost[0])}; run the same command to continue"
    if asked.first and (told == signal.SIGKILL or not said) and (status or thread.is_alive()):
        return 128 + asked.first, interrupts.farewell(asked.first)
    return status, said


def _shortly(error: BaseException) -> str:
    """The last line of a Ray error, because Ray's messages contain whole tracebacks."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
