"""ldm-sample: pictures from a trained model, one seed and one recipe per picture."""

import sys

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
    own = [f"+{a}" if a.startswith("fields.") else a for a in sys.argv[1:]]  # which the config does not list
    sys.argv[1:] = [quoted(a, FREE) for a in own]
    run_command("ldm_train.generation.sample.sample", "sample")


if __name__ == "__main__":
    main()
