"""ldm-sweep: shows the runs of a sweep, finished or not, as one table and as plots."""

import sys

from ldm_train.cli.common import quoted, run_command


def main() -> None:
    sys.argv[1:] = [quoted(a, ("dir", "runs_dir")) for a in sys.argv[1:]]
    run_command("ldm_train.pipeline.sweep.sweep", "sweep")


if __name__ == "__main__":
    main()
