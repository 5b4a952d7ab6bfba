"""ldm-train, and train.py in a checkout: from data to a trained latent diffusion model."""

from ldm_train.cli.common import run_command


def main() -> None:
    run_command("ldm_train.pipeline.train.train", "train")


if __name__ == "__main__":
    main()
