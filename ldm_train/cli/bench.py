"""ldm-bench: speed compared with peers in the same process."""

import sys

from ldm_train.cli.common import run_command


def main() -> None:
    sys.argv[1:] = [f"what={a}" if a.isidentifier() else a for a in sys.argv[1:]]  # ldm-bench sampling
    run_command("ldm_train.bench.run.bench", "bench")


if __name__ == "__main__":
    main()
