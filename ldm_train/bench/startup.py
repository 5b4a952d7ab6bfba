"""The start-up benchmark: how long a user waits before a command does anything."""

import subprocess
import sys
from dataclasses import replace

from ldm_train.bench.measuring import Clock, Settings, Table
from ldm_train.bench.peers import diffusers_version

COMMANDS = {
    "python train.py --help": ["-m", "ldm_train.cli.train", "--help"],
    "ldm-sample --help": ["-m", "ldm_train.cli.sample", "--help"],
    "import what training uses": ["-c", "import ldm_train.pipeline.train"],
    "import torch": ["-c", "import torch"],
    "import lightning": ["-c", "import lightning"],
}
PEERS = {"import diffusers with its pipelines": ["-c", "from diffusers import DDIMPipeline, StableDiffusionPipeline"]}


def startup(settings: Settings) -> list[Table]:
    """Measures the seconds of commands in processes of their own; the first round reads files from the disk."""
    commands = COMMANDS | (PEERS if diffusers_version() else {})

    def started(arguments: list[str]) -> None:
        done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"python {' '.join(arguments)} fails: {done.stderr.strip().splitlines()[-1]}")

    clock = Clock(settings.device, settings.runs, observe=False, waiting=True)
    clock.run({name: lambda a=arguments: started(a) for name, arguments in commands.items()}, "startup")
    rows = [replace(row, against=None) for row in clock.rows()]
    return [Table("startup", "time until a process has ended", rows)]
