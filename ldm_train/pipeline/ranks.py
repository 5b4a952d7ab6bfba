"""Runs one command on several devices of this machine, with one process per device; all end together, with one
message."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from torch.distributed import TCPStore

from ldm_train import interrupts

GRACE = 30.0  # seconds that the other ranks have to end once one has failed or exited on a signal


class Ranks:
    """The processes of one command: `python -m module`, `count` times, with this process's arguments and torchrun's
    environment variables.

    Each writes its final message to the folder `reports`, and is ended by the kernel when this process ends.
    """

    def __init__(self, count: int, module: str, reports: Path):
        self.reports, self.signal, self._signal_time = reports, 0, 0.0
        self.fallen: int | None = None  # the first rank that was killed by a signal from outside
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # on a free port
        common = {
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self._store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "GROUP_RANK": "0",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), interrupts.PARENT: str(os.getpid()),
        }  # fmt: skip
        command = [sys.executable, "-u", "-m", module, *sys.argv[1:]]
        sys.stdout.flush()
        self.processes: list[subprocess.Popen] = []
        for rank in range(count):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), interrupts.REPORT: str(reports / str(rank))}
            self.processes.append(subprocess.Popen(command, env=os.environ | common | own))

    def pass_on(self, number: int) -> None:
        """Passes a signal to all ranks. A second signal after more than 2 s kills them; earlier it counts as a repeat
        of the first."""
        if self.signal and time.monotonic() - self._signal_time > 2:
            self.kill()
        if not self.signal:
            self.signal, self._signal_time = number, time.monotonic()
            for process in self.processes:
                process.send_signal(number)

    def kill(self) -> None:
        for process in self.processes:
            process.kill()

    def wait(self) -> None:
        """Waits until all ranks have ended. Those still running GRACE seconds after the first failure are killed."""
        end = float("inf")
        while True:
            running = [p for p in self.processes if p.poll() is None]
            failed = [rank for rank, p in enumerate(self.processes) if p.returncode]
            if failed and end == float("inf"):
                end = time.monotonic() + GRACE
                self.fallen = next((rank for rank in failed if self.processes[rank].returncode < 0), None)
            if not running:
                return
            if time.monotonic() > end:
                self.kill()
            time.sleep(0.1)

    def outcome(self) -> tuple[int, str]:
        """Returns (exit status, final message) of the first rank that failed, because the others fail as a consequence.
        A rank killed by a signal from outside leaves no message, and counts as the first to fail."""
        if not any(p.returncode for p in self.processes):
            return 0, ""
        if self.fallen is not None and not self.signal:
            name = signal.Signals(-self.processes[self.fallen].returncode).name
            hint = " (the machine may be out of memory)" if name == "SIGKILL" else ""
            said = f"error: the process of device {self.fallen} was ended by {name}{hint}; run the same command to continue"
            return 128 - self.processes[self.fallen].returncode, said
        if spoken := sorted(self.reports.iterdir(), key=lambda p: p.stat().st_mtime_ns):
            status = self.processes[int(spoken[0].name)].returncode
            return (status if status > 0 else 1), spoken[0].read_text().rstrip()
        if self.signal:
            return 128 + self.signal, interrupts.farewell(self.signal)
        return max(p.returncode for p in self.processes), ""  # the failed rank has printed its message


def launch(count: int, module: str) -> int:
    """Runs this command on `count` devices of this machine and returns its exit status."""
    with tempfile.TemporaryDirectory(prefix="ldm_train_") as reports:
        ranks = Ranks(count, module, Path(reports))
        try:
            with interrupts.answered_by(ranks.pass_on):
                ranks.wait()
        finally:
            ranks.kill()
        status, said = ranks.outcome()
    if said:
        interrupts.last_words(said)
    return status
