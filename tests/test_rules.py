"""Rules of options: a value that a rule accepts is stored in the config as it returns it, errors name the option."""

import pytest
from omegaconf import OmegaConf

from ldm_train.rules import check, either, flag, list_of, number, numbers, one_of, optional, section, text, whole

RULES = {
    "count": whole(1, 100), "a.share": optional(number(0, 1)), "a.pair": numbers(2, whole(), "whole numbers"),
    "on": flag, "kind": one_of("x", "y", "z"), "name": text(), "names": list_of(str), "a": section(" is not a section"),
    "size": either(whole(), numbers(2, whole(), "whole numbers")),
}  # fmt: skip
GOOD = {
    "count": 3,
    "a": {"share": 0.5, "pair": [1, 2]},
    "on": True,
    "kind": "x",
    "name": "n",
    "names": ["a"],
    "size": 4,
}


def test_numbers_may_be_written_in_any_form_and_are_whole_afterwards():
    config = OmegaConf.create(GOOD | {"count": 1e1, "a": {"share": None, "pair": [4.0, 5]}, "size": [2.0, 3.0]})
    check(config, RULES)
    plain = OmegaConf.to_container(config)
    assert plain == GOOD | {"count": 10, "a": {"share": None, "pair": [4, 5]}, "size": [2, 3]}
    assert {type(v) for v in (plain["count"], *plain["a"]["pair"], *plain["size"])} == {int}


@pytest.mark.parametrize(
    ("option", "value", "sentence"),
    [
        ("count", 0, "count=0 is below 1; it must be at least that"),
        ("count", 101, "count=101 is above 100; it must be at most that"),
        ("count", True, "count=True is not a whole number"),
        ("count", None, "count=null: it needs a whole number"),
        ("count", 1.5, "count=1.5 is not a whole number"),
        ("count", float("inf"), "count=inf is not a finite number"),
        ("a.share", "{value}", "a.share='{value}' is not a number"),
        ("a.pair", [1], "a.pair=[1] is not a list of 2 whole numbers"),
        ("a.pair", [1, 2.5], "a.pair=[1, 2.5] is not a list of 2 whole numbers"),
        ("on", "maybe", "on='maybe' is neither true nor false"),
        ("kind", "w", "kind is x, y or z, not 'w'"),
        ("name", "", "name= is not text"),
        ("names", "a", "names is a list: names=[a]"),
        ("a", 5, "a=5 is not a section"),
    ],
)
def test_a_value_that_is_not_accepted_is_named(option: str, value: object, sentence: str):
    config = OmegaConf.create(GOOD)
    OmegaConf.update(config, option, value)
    with pytest.raises(ValueError) as caught:
        check(config, RULES)
    assert str(caught.value) == sentence


def test_options_that_are_absent_are_left_alone_unless_required():
    config = OmegaConf.create({"on": True})
    check(config, RULES)
    assert config == {"on": True}
    with pytest.raises(ValueError, match="name=None is not text"):
        check(config, RULES, required=("name",))
