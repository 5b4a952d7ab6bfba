"""The commands. Before their imports, this sets up how they handle signals and, if the output is not a terminal, one
line of progress every ten seconds instead of ten per second."""

import os
import sys
from pathlib import Path

from ldm_train import interrupts

if not sys.stderr.isatty():
    os.environ.setdefault("TQDM_MININTERVAL", "10")

# Run as `python -m ldm_train.cli.<command>` (sys.argv[0] is "-m" while packages are imported), or by its installed name.
_command = Path(sys.argv[0])
if sys.argv[0] == "-m" or _command.name.startswith("ldm-") or _command.parent == Path(__file__).parent:
    interrupts.install()
