"""ldm-sample: draws pictures from a trained model, with one seed and one recipe per picture."""

import sys

from ldm_train import names
from ldm_train.cli.common import quoted, run_command

# Options with free text: commas, apostrophes and brackets have a meaning in Hydra, and so has `=` in a run's name.
TEXTS = ("prompts", "negative", "layout", "image_prompt")
FILES = ("out", "image", "mask", "map", "depth")
FREE = (*TEXTS, *FILES, "run", "recipe", "weaker_model", "guide.classifier", "guide.clip")


def main() -> None:
    sweeping = {"-m", "--multirun"} & {*sys.argv}  # over several files, with commas between them
    free = [option for option in FREE if not (sweeping and option in FILES)]
    arguments = [quoted(names.argument(a), free) for a in sys.argv[1:]]
    # A model's own fields, which the config does not list.
    sys.argv[1:] = [f"+{quoted(a, [a.partition('=')[0]])}" if a.startswith("fields.") else a for a in arguments]
    run_command("ldm_train.generation.sample.sample", "sample")


if __name__ == "__main__":
    main()
