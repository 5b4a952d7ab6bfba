"""ldm-convert: converts a model from one format into another."""

import sys

from ldm_train.cli.common import quoted, run_command


def main() -> None:
    sys.argv[1:] = [quoted(a, ("from", "to", "config", "tokenizer")) for a in sys.argv[1:]]
    run_command("ldm_train.pipeline.convert.convert", "convert")


if __name__ == "__main__":
    main()
