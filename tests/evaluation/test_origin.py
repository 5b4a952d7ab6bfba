"""Adherence is judged of drawn shapes alone."""

import json
from pathlib import Path

import pytest

from ldm_train.pipeline.evaluation import _may_be_shapes


@pytest.mark.parametrize(
    ("origin", "wanted"),
    [
        ({"source": {"source": "shapes", "size": 32}}, True),
        ({"source": {"source": "image_folder"}}, False),
        ({"source": {"without_duplicates": "abc"}}, True),
        ({}, True),
        ([], True),
    ],
)
def test_data_that_say_they_are_no_shapes_are_not_judged_as_shapes(
    origin: object, wanted: bool, tmp_path: Path
) -> None:
    (tmp_path / ".entries").mkdir()
    (tmp_path / ".entries" / "source.json").write_text(json.dumps(origin))
    assert _may_be_shapes(str(tmp_path)) == wanted
    assert _may_be_shapes([str(tmp_path)])
    assert _may_be_shapes("s3://bucket/data")
