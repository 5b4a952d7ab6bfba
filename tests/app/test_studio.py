"""The code behind the app's page: which requests are allowed; jobs are followed, cancelled and drawn again."""

import io
import json
import queue
import re
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chains import composed
from PIL import Image
from small_models import CONDITIONERS, small_model

from ldm_train import images as pictures
from ldm_train.app.asked import Limits, options_of
from ldm_train.app.offer import Adapter, Input
from ldm_train.app.studio import ERRORS, Cancelled, Progress, Studio, _Watch, without_folders, words
from ldm_train.data.files import encoded_png
from ldm_train.generation.requests import Request
from ldm_train.generation.sample import sample


def picture(width: int = 32, height: int = 32, kind: str = "PNG") -> bytes:
    rng, buffer = np.random.default_rng(0), io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (height, width, 3), np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def diagonal(value: int) -> bytes:
    return encoded_png(value * np.eye(32, dtype=np.uint8))


def claims(width: int, height: int) -> bytes:
    """Returns a small PNG whose header claims this size, without any pixels."""
    header = b"IHDR" + width.to_bytes(4) + height.to_bytes(4) + bytes([8, 2, 0, 0, 0])
    chunks = [chunk + zlib.crc32(chunk).to_bytes(4) for chunk in (header, b"IDAT")]
    return b"\x89PNG\r\n\x1a\n" + b"".join((len(chunk) - 8).to_bytes(4) + chunk for chunk in chunks)


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Studio:
    runs = tmp_path_factory.mktemp("runs")
    for kind in ("text", "class", "layout", "semantic", "superres", "edges", "none", "calm"):
        small_model(kind, runs / kind)
    return Studio(runs, Limits(pictures=6, steps=9, side=64, characters=200), "cpu")


def last(job: Iterator[Any]) -> list[Path]:
    *_, result = job
    return result


@pytest.mark.parametrize("kind", sorted(CONDITIONERS))
def test_a_model_offers_an_input_for_what_it_reads(kind: str, studio: Studio) -> None:
    """The inputs follow from the declarations of the fields, also if a conditioner declares its own (edges)."""
    small_model(kind, studio.runs_dir / kind)
    offer = studio.offer(kind)
    assert [(one.option, one.kind) for one in offer.inputs] == {
        "text": [("prompts", "text")],
        "calm": [("prompts", "text")],
        "class": [("classes", "choice")],
        "layout": [("layout", "boxes")],
        "semantic": [("map", "map")],
        "superres": [("image", "picture")],
        "variation": [("image", "picture")],
        "depth": [("depth", "picture")],
        "edges": [("fields.edges", "picture")],
        "inpaint": [],  # none: the mask is painted in a tab of its own
        "none": [],
    }[kind]
    names = {"class": ("cat", "dog"), "layout": ("cat", "dog"), "semantic": ("0", "1", "2", "3", "4")}
    assert offer.inputs == () or offer.inputs[0].choices == names.get(kind, ())
    assert ("inpaint" in offer.tabs) == (kind not in ("superres", "variation"))
    assert (offer.size, offer.multiple) == ((32, 32), 8)


ASKED = {
    "text": {"prompts": "a cat", "negative": "a dog", "sampler": "heun", "num_inference_steps": 2},
    "class": {"classes": "dog", "guidance_scale": 3.0},
    "layout": {"layout": '[[0.1, 0.2, 0.4, 0.4, "dog"]]'},
    "semantic": {"map": diagonal(1)},
    "superres": {"image": picture(8, 8, "JPEG")},
    "edges": {"fields.edges": picture(64, 64)},
    "none": {"task": "inpaint", "image": picture(), "mask": diagonal(255)},
}


@pytest.mark.parametrize("kind", sorted(ASKED))
def test_the_page_draws_what_the_command_draws(kind: str, studio: Studio, tmp_path: Path) -> None:
    """The pixels are equal to the command's, and every step is reported. Replays give equal pixels."""
    asked, offer = ASKED[kind] | {"n": 2, "seed": 5}, studio.offer(kind)
    *steps, drawn = studio.draw(offer, asked, threading.Event())
    assert [s.step for s in steps] == [1, 2, 3][: asked.get("num_inference_steps", 3)]
    assert all(isinstance(s, Progress) and (s.first, s.last) == (1, 2) for s in steps)
    assert steps[0].picture is not None
    options = options_of(offer, asked, studio.limits)
    if "sampler" in options:
        options["sampler"] = {"_target_": options["sampler"]["_target_"], "_partial_": True}
    config = composed("sample", f"run={studio.runs_dir / kind}", f"out={tmp_path / 'out'}")
    config = studio.config(
        str(studio.runs_dir / kind), {**config, **options, "out": str(tmp_path / "out"), "run": config.run}
    )
    ours = [np.asarray(Image.open(p)) for p in drawn]
    assert np.array_equal(ours, [np.asarray(Image.open(p)) for p in sample(config)])
    again = [np.asarray(Image.open(p)) for p in last(studio.replay(offer, drawn[1], threading.Event()))]
    assert np.array_equal(again, ours[1:])


REFUSED = {
    '{"out": "/tmp/x"}': "'out' is nothing that this page can be asked for",
    '{"trust": ["os"]}': "'trust' is nothing",
    '{"recipe": "/etc/passwd"}': "'recipe' is nothing",
    '{"guide.clip": "/etc"}': "'guide.clip' is nothing",
    '{"run": "other"}': "'run' is nothing",
    '{"fields.edges": "a"}': "'fields.edges' is nothing",
    '{"n": 7}': "n=7 is more than is drawn here; at most 6",
    '{"n": 1e300}': "more than is drawn here",
    '{"n": "many"}': "n='many'",
    '{"n": 4, "prompts": ["a", "b"]}': "the number of pictures of all prompts=8 is more than is drawn here; at most 6",
    '{"num_inference_steps": 10}': "num_inference_steps=10 is more",
    '{"size": [8, 1000000]}': "size=1000000 is more than is drawn here; at most 64",
    '{"extend": [0, 0, 0, 1000000]}': "size=1000000 is more",
    '{"seed": 1e20}': "seed=1e+20 is more",
    '{"seed": HUGE}': "is more than is drawn here; at most 9.0072e+15",
    '{"size": [64, 64], "extend": [64, 0, 0, 0]}': "the side of the extended picture=128 is more",
    '{"seed": -1}': "seed=-1 is below 0",
    '{"prompts": 5}': "prompts is not text",
    '{"negative": "LONG"}': "negative has 100,000 characters; at most 200",
    '{"prompts": "LONG"}': "prompts has 100,000 characters",
    '{"sampler": "../../x"}': "there is no sampler '../../x'",
    '{"sampler": {"_target_": "os.system"}}': "there is no sampler",
    '{"adapters": ["/etc/passwd:1"]}': "there is no adapter '/etc/passwd:1' of this model here",
    '{"image": "/nowhere/x.png"}': "the picture that was handed in is gone",
    '{"spacing": "odd"}': "spacing",
    '{"task": "superres"}': "no lowres conditioner",
    '{"classes": "dog"}': "no class_label conditioner",
    '{"strength": "abc"}': "strength='abc'",
    '{"strength": 7}': "strength is a share between 0 and 1",
}


@pytest.mark.parametrize("asked", REFUSED)
def test_what_a_request_may_not_say_is_refused_in_words(asked: str, studio: Studio) -> None:
    offer = studio.offer("text")
    values = {
        k: v.replace("LONG", "x" * 100_000) if isinstance(v, str) else v
        for k, v in json.loads(asked.replace("HUGE", "9" * 400)).items()
    }
    with pytest.raises(ERRORS) as error:
        list(studio.draw(offer, {"prompts": "a", "seed": 0} | values, threading.Event()))
    assert REFUSED[asked] in str(error.value)
    assert str(studio.runs_dir) not in words(error.value, [offer])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"no picture", "not a picture that can be read"),
        (b"", "not a picture that can be read"),
        (claims(20_000, 10_000), "not a picture that can be read: it claims far too many pixels"),
        (claims(8_000, 8_000), "8000 x 8000 pixels; at most 50 megapixels"),
        (picture(kind="TIFF"), "a picture is a PNG, JPEG, WEBP, BMP here, not TIFF"),
        (picture(kind="GIF"), "not GIF"),
    ],
)
def test_a_bad_upload_is_refused_and_nothing_is_kept(data: bytes, message: str, studio: Studio, tmp_path: Path) -> None:
    offer = studio.offer("none")
    kept = sorted((studio.runs_dir / "none").rglob("inputs/*"))
    with pytest.raises(ValueError) as error:
        list(studio.draw(offer, {"task": "img2img", "image": data}, threading.Event()))
    assert message in str(error.value)
    large = tmp_path / "large.png"
    large.write_bytes(bytes(21_000_000))
    with pytest.raises(ValueError, match=r"large.png is larger than 20 MB"):
        list(studio.draw(offer, {"task": "img2img", "image": str(large)}, threading.Event()))
    assert sorted((studio.runs_dir / "none").rglob("inputs/*")) == kept


def test_prompts_and_labels_name_no_files(studio: Studio, tmp_path: Path) -> None:
    """On the command line prompts=<file> reads the file's lines; in a request the text itself is the prompt."""
    (tmp_path / "prompts.txt").write_text("a secret\n")
    options = options_of(studio.offer("text"), {"prompts": f"{tmp_path}/prompts.txt"}, Limits())
    drawn = last(studio.draw(studio.offer("text"), {"prompts": f"{tmp_path}/prompts.txt", "n": 1}, threading.Event()))
    assert options["prompts"] == [f"{tmp_path}/prompts.txt"] == [pictures.read_recipe(drawn[0])["condition"]]
    with pytest.raises(ValueError, match=r"layout is not a list of boxes"):
        options_of(studio.offer("layout"), {"layout": f"{tmp_path}/layout.json"}, Limits())
    for boxes in ('[[NaN, 0.1, 0.2, 0.2, "cat"]]', '[[1e999, 0.1, 0.2, 0.2, "cat"]]', '[["x"]]', "[" * 10_000, "{}"):
        with pytest.raises(ValueError, match=r"layout is not a list of boxes|draw at least one"):
            options_of(studio.offer("layout"), {"layout": boxes}, Limits())
    boxes = '[[0.1, 0.1, 0.2, 0.2, "secret.json"]]'
    with pytest.raises(ValueError, match=r"'secret.json'"):
        list(studio.draw(studio.offer("layout"), {"layout": boxes, "n": 1}, threading.Event()))


def test_a_job_ends_at_the_next_step_when_it_is_cancelled_and_the_next_one_begins(studio: Studio) -> None:
    offer, stop = studio.offer("text"), threading.Event()
    job = studio.draw(offer, {"prompts": "cancelled", "n": 2, "num_inference_steps": 9}, stop)
    assert next(job).step == 1
    stop.set()
    with pytest.raises(Cancelled):
        list(job)
    left = studio.draw(offer, {"prompts": "left", "n": 2, "num_inference_steps": 9}, threading.Event())
    next(left)
    left.close()
    assert len(last(studio.draw(offer, {"prompts": "next", "n": 2}, threading.Event()))) == 2


def test_a_job_that_inverts_a_picture_tells_of_that_too_and_ends_in_it(studio: Studio) -> None:
    offer, stop = studio.offer("calm"), threading.Event()
    asked = {"task": "img2img", "image": picture(), "invert": True, "prompts": "a", "n": 1, "num_inference_steps": 3}
    *steps, _ = studio.draw(offer, asked, stop)
    assert [s.step for s in steps] == [1, 2, 3, 1, 2, 3]
    job = studio.draw(offer, asked | {"seed": 1}, stop)
    next(job)
    stop.set()
    with pytest.raises(Cancelled):
        list(job)


def test_jobs_of_many_take_turns_and_each_gets_its_own_pictures(studio: Studio) -> None:
    offer, results = studio.offer("text"), {}

    def one(number: int) -> None:
        results[number] = last(
            studio.draw(offer, {"prompts": f"person {number}", "n": 1, "seed": number}, threading.Event())
        )

    threads = [threading.Thread(target=one, args=(number,)) for number in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    said = {
        n: (pictures.read_recipe(p[0])["condition"], pictures.read_recipe(p[0])["seed"]) for n, p in results.items()
    }
    assert said == {n: (f"person {n}", n) for n in range(10)}


def test_previews_take_a_small_share_of_the_time(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a decoding of one second and steps of two, previews take at most a fifth of the time, and at least one step
    in three has one."""
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    updates: queue.SimpleQueue = queue.SimpleQueue()
    watch = _Watch(updates, threading.Event(), studio.config("text", {}))

    def decode(latents: torch.Tensor) -> torch.Tensor:
        clock[0] += 1
        return latents

    for step in range(21):
        watch([Request(0, {}, "", 0)], decode, step, torch.zeros(1, 3, 8, 8))
        clock[0] += 2
    seen = [updates.get_nowait().picture is not None for _ in range(21)]
    assert seen[0]
    assert (sum(seen) - 1) / clock[0] <= 0.2
    assert sum(seen) >= 7


def test_a_recipe_of_someone_else_chooses_nothing(studio: Studio, tmp_path: Path) -> None:
    offer = studio.offer("text")
    drawn = last(studio.draw(offer, {"prompts": "a cat", "n": 1}, threading.Event()))[0]
    recipe = pictures.read_recipe(drawn)
    for change, message in (
        ({"guide": {"clip": "/etc"}}, "guide.clip"),
        ({"image": "/etc/passwd"}, "this was drawn from passwd, which was not handed in here"),
        ({"adapters": ["/etc/passwd"]}, "there is no adapter"),
        ({"sampler": {"_target_": "os.system"}}, "its sampler is none of this page's"),
        ({"out": "/tmp/elsewhere"}, "it sets out"),
        ({"num_inference_steps": 900}, "num_inference_steps=900 is more than is drawn here"),
        ({"n": 200}, "n=200 is more than is drawn here"),
        ({"n": 1, "prompts": [{"prompt": "a", "n": 200}]}, "the number of pictures of all prompts=200 is more"),
        ({"n": None, "prompts": ["a"] * 900}, "the number of pictures of all prompts=3600 is more"),
        ({"n": 1, "image": ["a.png"] * 900}, "the number of pictures of all prompts=900 is more"),
        ({"n": 1, "fields": {"edges": ["a.png"] * 900}}, "the number of pictures of all prompts=900 is more"),
        (
            {"n": 1, "prompts": ["a"] * 900, "fields": {"prompts": "b"}},
            "the number of pictures of all prompts=900 is more",
        ),
        (
            {"n": 1, "prompts": [{"prompt": "a", "n": 30}], "classes": ["cat"] * 30},
            "the number of pictures of all prompts=900 is more",
        ),
        ({"size": [2048, 2048]}, "size=2048 is more than is drawn here"),
        ({"panorama": 0.99}, "panorama=0.99 is more than is drawn here; at most 0.75"),
        ({"tiles": {"cells": 8, "overlap": 7}}, "tiles.overlap=7 is more than is drawn here; at most 6"),
        ({"compile": "default"}, "compile is more than is drawn here"),
        ({"resample": {"jump_length": 10, "repeats": 1000}}, "resample.repeats is more than is drawn here"),
        ({"invert_iterations": 1000}, "invert_iterations is more than is drawn here"),
        ({"prompts": "W " * 20_000}, "a text of 40,000 characters; at most 200 are taken here"),
        ({"prompts": [{"prompt": "a", "negative": "W " * 20_000}]}, "a text of 40,000 characters"),
        ({"layout": [[0, 0, 1, 1, "cat"]] * 101}, "101 boxes; at most 100"),
        ({"tiles": {"cells": 1, "overlap": 0}}, "tiles.cells=1 makes more tiles than are decoded here"),
        ({"sampler": recipe["config"]["sampler"] | {"sampler": {"_target_": "os.system"}}}, "its sampler is none of"),
        (
            {"sampler": {"_target_": "ldm_train.samplers.resampling.resampled", "repeats": 10**6}},
            "its sampler is none of",
        ),
    ):
        path = tmp_path / "theirs.png"
        pictures.save_png(Image.open(drawn), path, recipe | {"config": recipe["config"] | change})
        with pytest.raises(ERRORS) as error:
            list(studio.replay(offer, path, threading.Event()))
        assert message in str(error.value)
        assert str(tmp_path) not in words(error.value, [])
    pictures.save_png(Image.new("L", (9000, 9000)), tmp_path / "large.png", recipe)
    with pytest.raises(ValueError, match=r"9000 x 9000 pixels; at most 50 megapixels"):
        list(studio.replay(offer, tmp_path / "large.png", threading.Event()))
    many = recipe | {"machine": recipe["machine"] | {"batch_size": 200}}
    pictures.save_png(Image.open(drawn), tmp_path / "many.png", many)
    with pytest.raises(ValueError, match=r"batch_size is more than is drawn here"):
        list(studio.replay(offer, tmp_path / "many.png", threading.Event()))
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    with pytest.raises(ValueError, match=r"plain.png carries no recipe"):
        list(studio.replay(offer, tmp_path / "plain.png", threading.Event()))
    other = studio.offer("calm")
    with pytest.raises(ValueError, match=r"does not hold the weights that drew this recipe"):
        list(studio.replay(other, drawn, threading.Event()))


def test_adapters_are_those_of_the_page_with_strengths_that_can_be(studio: Studio) -> None:
    offer = studio.offer("text")
    steered = Input("edges", "picture", "fields.edges")
    offer = type(offer)(
        **vars(offer) | {"adapters": (Adapter("style"), Adapter("word", word="<w>"), Adapter("lines", steered))}
    )
    asked = {"adapters": ["style:0.5", "word:0.3", "lines"], "fields.edges": picture()}
    options = options_of(offer, asked, Limits())
    assert options["adapters"] == ["style:0.5", "word", "lines"]
    assert Path(options["fields"]["edges"]).parent.name == "inputs"
    for wrong in ("style:3", "style:x", "style:nan", "other", "../style"):
        with pytest.raises(ValueError, match=r"adapter|strength"):
            options_of(offer, {"adapters": [wrong]}, Limits())


def test_nothing_shown_tells_where_the_machine_keeps_things(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(studio.runs_dir.resolve().parent)
    studio = Studio(Path.cwd() / studio.runs_dir.name, studio.limits, "cpu")
    offer = studio.offer("none")
    drawn = last(studio.draw(offer, {"task": "img2img", "image": picture(), "n": 1}, threading.Event()))[0]
    shown = json.dumps(without_folders(pictures.read_recipe(drawn)))
    assert "/" not in re.sub(r'"[^"]*\d{4}-\d\d[^"]*"', "", shown)
    assert str(studio.runs_dir.resolve()) not in drawn.read_bytes().decode("latin-1")
    for path in (
        "/home/john/runs/x.png",
        f"{Path.home()}/a b/x.png",
        f"{studio.runs_dir.resolve()}/none/samples/inputs/x.png",
    ):
        said = words(ValueError(f"image={path} is odd"), [offer])
        assert "x.png" in said
        assert str(Path.home()) not in said
        assert "john" not in said


def test_an_error_of_ours_is_not_told_to_strangers(studio: Studio, caplog: pytest.LogCaptureFixture) -> None:
    assert "log" in words(RuntimeError(f"{studio.runs_dir}/secret"), [])
    assert "secret" not in words(RuntimeError(f"{studio.runs_dir}/secret"), [])
    assert "secret" in caplog.text
