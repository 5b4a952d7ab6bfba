"""Adherence is judged of drawn shapes alone."""

import json
from pathlib import Path

import pytest
from chains import composed

from ldm_train.pipeline.data import ensure_data
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


def test_drawing_into_a_folder_that_is_not_there_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = composed("train", "experiment=quickstart", "data.source.count=4", "data.source.val_count=2").data
    data.root = str(tmp_path / "misspelt")
    ensure_data(data)
    assert (
        f"data.root={tmp_path}/misspelt holds no shards yet; they are drawn by data.source" in capsys.readouterr().out
    )
    assert _may_be_shapes(data.root)
    ensure_data(data)  # they are there now
    assert "drawn by" not in capsys.readouterr().out
