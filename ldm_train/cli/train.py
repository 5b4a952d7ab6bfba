"""ldm-train, and train.py in a checkout: from data to a trained latent diffusion model."""

import sys

from ldm_train import names
from ldm_train.cli.common import quoted, run_command

FREE = ("diffusion.adapter.token", "diffusion.adapter.initializer_token")  # words of any characters


def main() -> None:
    sys.argv[1:] = [quoted(names.argument(a), FREE) for a in sys.argv[1:]]
    run_command("ldm_train.pipeline.train.train", "train")


if __name__ == "__main__":
    main()
