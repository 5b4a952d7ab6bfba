"""ldm-train, and train.py in a checkout: from data to a trained latent diffusion model."""

import sys

from ldm_train import names
from ldm_train.cli.common import quoted, run_command

FREE = ("diffusion.adapter.token", "diffusion.adapter.initializer_token")  # words of any characters


# Names of runs and files, which may hold any characters, as those of sweeps do ("lr=0.001"). With -m, commas separate the
# values of a sweep.
PLACES = ("name", "runs_dir", *(f"{s}.{o}" for s in ("autoencoder", "diffusion") for o in ("pretrained", "init")))


def as_typed(argument: str, sweeping: bool) -> str:
    """Quotes the values of options that are taken as typed."""
    swept = "${" in argument or (sweeping and "," in argument)
    return quoted(argument, FREE if swept else (*FREE, *PLACES))


def main() -> None:
    sweeping = bool({"-m", "--multirun"} & {*sys.argv})
    sys.argv[1:] = [as_typed(names.argument(a), sweeping) for a in sys.argv[1:]]
    run_command("ldm_train.pipeline.train.train", "train")


if __name__ == "__main__":
    main()
