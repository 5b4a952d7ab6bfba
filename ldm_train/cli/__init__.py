"""The commands. Imported before tqdm, so that logs that are no terminal get a line every ten seconds, not ten a second."""

import os
import sys

if not sys.stderr.isatty():
    os.environ.setdefault("TQDM_MININTERVAL", "10")
