"""ldm-sample: pictures from a trained model, one seed and one recipe per picture."""

import sys

from ldm_train import names
from ldm_train.cli.common import quoted, run_command

# Options whose values people type freely: commas, apostrophes and brackets mean something to Hydra, `=` in a run's name too.
FREE = (
    "prompts",
    "run",
    "negative",
    "layout",
    "image_prompt",
    "recipe",
    "weaker_model",
    "guide.classifier",
    "guide.clip",
)


def main() -> None:
    arguments = [quoted(names.argument(a), FREE) for a in sys.argv[1:]]
    # Fields of a model's own, which the config does not list.
    own = [f"+{quoted(a, [a.partition('=')[0]])}" if a.startswith("fields.") else a for a in arguments]
    sys.argv[1:] = own
    run_command("ldm_train.generation.sample.sample", "sample")


if __name__ == "__main__":
    main()
