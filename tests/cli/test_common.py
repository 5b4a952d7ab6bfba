"""Free text on the command line is taken as typed."""

import random

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from ldm_train.cli.common import quoted
from ldm_train.cli.train import as_typed

SIGNS = "ab \\\"'${},=[]()#:~"
TEXTS = [
    "a \\o/ sign",
    "four\\words",
    "ends\\",
    'say "hi"',
    '\\"',
    "${not.an.option}",
    "\\${x}",
    "it's, [x]=y",
    "photo (1).png",
    "'twas a red circle",
    '"stop" on a red circle',
    "[red] circle",
]


@pytest.mark.parametrize("seed", range(3))
def test_texts_reach_a_command_as_they_were_typed(seed: int) -> None:
    dice, parser = random.Random(seed), OverridesParser.create()
    texts = ["".join(dice.choices(SIGNS, k=dice.randint(1, 10))) for _ in range(100)] + TEXTS
    for text in texts:
        if (text[0] in "'\"" and text[-1] == text[0] and len(text) > 1) or (text[0] == "[" and text[-1] == "]"):
            continue  # already quoted, or a list
        override = parser.parse_override(quoted(f"prompts={text}", ["prompts"]))
        assert OmegaConf.create({"prompts": override.value()}).prompts == text


def test_names_and_places_are_taken_as_typed_by_train() -> None:
    """Names of a sweep's runs have `=` in them; with -m, commas separate values."""
    parser = OverridesParser.create()
    for text in ("sw/lr=0.001,seed=1", "2024_01_01", "/data/My runs (v1), new"):
        for option in ("name", "runs_dir", "autoencoder.pretrained", "diffusion.init"):
            override = parser.parse_override(as_typed(f"{option}={text}", sweeping=False))
            assert override.value() == text
    assert parser.parse_override(as_typed("name=a,b", sweeping=True)).is_sweep_override()
    assert as_typed("runs_dir=${oc.env:HOME}/runs", sweeping=False) == "runs_dir=${oc.env:HOME}/runs"
