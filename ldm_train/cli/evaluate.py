"""ldm-evaluate: metrics with intervals for a run's samples, two sets of images, or an autoencoder alone."""

import sys

from ldm_train.cli.common import quoted, run_command


def main() -> None:
    free = ("run", "reconstruct", "images", "against", "reference", "out", "export", "runs_dir", "data.root")
    # Sections whose entries the config does not list.
    own = [f"+{a}" if a.startswith(("extractors.", "kinds.")) else a for a in sys.argv[1:]]
    sys.argv[1:] = [quoted(a, free) for a in own]
    run_command("ldm_train.pipeline.measure.evaluate", "evaluate")


if __name__ == "__main__":
    main()
