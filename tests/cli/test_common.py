"""Free text on the command line is taken as typed."""

import random

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from ldm_train.cli.common import quoted

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
]


@pytest.mark.parametrize("seed", range(3))
def test_texts_reach_a_command_as_they_were_typed(seed: int) -> None:
    dice, parser = random.Random(seed), OverridesParser.create()
    texts = ["".join(dice.choices(SIGNS, k=dice.randint(1, 10))) for _ in range(100)] + TEXTS
    for text in texts:
        if text[0] in "'\"[":  # already quoted, or a list
            continue
        override = parser.parse_override(quoted(f"prompts={text}", ["prompts"]))
        assert OmegaConf.create({"prompts": override.value()}).prompts == text
