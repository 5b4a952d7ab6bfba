"""ldm-app: a page on which models draw, and one on which runs can be watched."""

import sys

from ldm_train.cli.common import quoted, run_command


def main() -> None:
    sys.argv[1:] = [quoted(a, ("run", "runs_dir", "password", "user")) for a in sys.argv[1:]]
    run_command("ldm_train.app.serve.serve", "app")


if __name__ == "__main__":
    main()
