"""The commands. What has to stand before their imports: how they end, and for logs that are no terminal a line of progress
every ten seconds, not ten a second."""

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
