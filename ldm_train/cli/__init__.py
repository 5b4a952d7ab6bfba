"""The commands. Set up before their imports: how they handle signals, and, where the output is no terminal, a line of progress every
ten seconds instead of ten a second."""

import os
import sys
from pathlib import Path

from ldm_train import interrupts

if not sys.stderr.isatty():
    os.environ.setdefault("TQDM_MININTERVAL", "10")

# As `python -m ldm_train.cli.<command>` (whose place in sys.argv holds "-m" until its packages are imported), or installed.
_command = Path(sys.argv[0])
if sys.argv[0] == "-m" or _command.name.startswith("ldm-") or _command.parent == Path(__file__).parent:
    interrupts.install()
