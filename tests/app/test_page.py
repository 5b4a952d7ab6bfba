"""The app's pages without a browser: the requests that their parts make, how runs are read, and who may reach them."""

import base64
import json
import os
import threading
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import pytest
from chains import composed
from gradio.data_classes import ImageData
from gradio.utils import get_upload_folder
from PIL import Image
from small_models import CONDITIONERS, small_model
from tiers import tiered

from ldm_train import images as pictures
from ldm_train.app import runs, serve
from ldm_train.app.asked import Limits, options_of, sampler_tree
from ldm_train.app.blocks import build
from ldm_train.app.form import OWN, _entry_of
from ldm_train.app.offer import MAIN, Adapter, Input
from ldm_train.app.page import ModelPage
from ldm_train.app.runs_page import RunsPage
from ldm_train.app.sketch import boxed, painted, with_background
from ldm_train.app.studio import Studio
from ldm_train.data.files import encoded_png


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Studio:
    folder = tmp_path_factory.mktemp("runs")
    for kind in CONDITIONERS:
        small_model(kind, folder / kind)
    return Studio(folder, Limits(), "cpu")


def page_of(studio: Studio, kind: str, *others: str, adapters: tuple[Adapter, ...] = ()) -> ModelPage:
    offers = [studio.offer(name) for name in (kind, *others)]
    offers[0] = type(offers[0])(**vars(offers[0]) | {"adapters": adapters})
    with gr.Blocks():
        return ModelPage(studio, offers[0], offers)


def canvas(array: np.ndarray | None = None, boxes: list | None = None) -> str:
    png = "" if array is None else "data:image/png;base64," + base64.b64encode(encoded_png(array)).decode()
    return json.dumps({"background": "", "png": png, "boxes": boxes or []})


def values(page: ModelPage, **given: Any) -> dict[str, Any]:
    usual = {name: part.value for name, part in page.form.parts.all.items()}
    return usual | {name.replace("__", ": "): value for name, value in given.items()}


@tiered("kind", sorted(CONDITIONERS), fast=4)
def test_every_tab_of_every_model_asks_for_what_can_be_drawn(kind: str, studio: Studio, tmp_path: Path) -> None:
    page = page_of(studio, kind)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 32, 3), np.uint8)).save(tmp_path / "photo.png")
    photo, given = str(tmp_path / "photo.png"), dict[str, Any]()
    for one in page.offer.inputs:
        given[one.option] = {
            "text": "a red circle",
            "choice": "dog",
            "picture": photo,
            "boxes": canvas(boxes=[[0.1, 0.1, 0.5, 0.5, "dog"]]),
            "map": canvas(np.eye(32, dtype=np.uint8)),
        }[one.kind]
    given |= {name: photo for name in page.form.parts.all if name.endswith(": image")}
    given |= {"inpaint: mask": canvas(255 * np.eye(32, dtype=np.uint8)), "extend right": 8, "n": 1, "walk: n": 2}
    for task in page.offer.tabs:
        asked = page.form.asked(task, values(page) | given)
        *_, drawn = page.studio.draw(page.offer, asked, threading.Event())
        assert len(drawn) == {"interpolate": 2}.get(task, 1), task
        assert (task == MAIN) == (asked.get("task") is None)


def test_what_a_task_lacks_is_said(studio: Studio) -> None:
    for kind, task, message in (
        ("layout", MAIN, "draw at least one box first"),
        ("semantic", MAIN, "paint a label map first"),
        ("superres", MAIN, "hand in a picture first"),
        ("text", "img2img", "hand in a picture first"),
        ("text", "inpaint", "hand in a picture first"),
    ):
        page = page_of(studio, kind)
        with pytest.raises(ValueError, match=message):
            page.form.asked(task, values(page))
    page = page_of(studio, "text")
    with pytest.raises(ValueError, match=r"paint the mask first"):
        page.form.asked("inpaint", values(page, inpaint__image="x.png"))


def test_settings_are_asked_for_as_they_stand(studio: Studio) -> None:
    control = Input("edges", "picture", "fields.edges")
    page = page_of(studio, "text", "calm", adapters=(Adapter("style"), Adapter("lines", control)))
    asked = page.form.asked(
        MAIN, values(page, prompts="a cat", negative="a dog", sampler="heun", seed=7, n=3, height=64)
    )
    assert {k: v for k, v in asked.items() if v is not None} == {
        "prompts": "a cat", "negative": "a dog", "sampler": "heun", "seed": 7, "n": 3, "size": [64, 32],
        "num_inference_steps": 3, "guidance_scale": 2.0,
    }  # fmt: skip
    given = values(page, prompts="a cat") | {"adapter: lines": 0.5, "fields.edges": "edges.png"}
    assert page.form.asked(MAIN, given)["adapters"] == ["lines:0.5"]
    assert page.form.asked(MAIN, given)["fields.edges"] == "edges.png"
    inverted = page.form.asked(
        "img2img", values(page, img2img__image="a.png", invert=True, image_prompt="a dog", sampler="heun")
    )
    assert (inverted["invert"], inverted["image_prompt"], inverted["sampler"]) == (True, "a dog", None)
    assert "strength" not in inverted
    walk = page.form.asked("interpolate", values(page, walk__prompts="a cat\n\na dog\n"))
    assert (walk["prompts"], walk["n"]) == (["a cat", "a dog"], 8)
    second = page._jobs(
        MAIN, threading.Event(), *values(page, prompts="a", beside__on=True, beside__model="calm").values()
    )
    assert [place for place, _ in second] == ["gallery", "beside"]


def test_a_recipes_settings_are_taken_over(studio: Studio, tmp_path: Path) -> None:
    """The form takes the settings of the picture's own prompt, so that Draw would draw the picture again."""
    page = page_of(studio, "text", adapters=(Adapter("style"),))
    kept = [page.form.parts.all[name].value for name in page.form.parts.kept]

    def taken(**config: Any) -> dict[str, Any]:
        recipe = {"seed": 9, "number": 3, "config": {"n": 2, "sampler": page.offer.usual["sampler"]} | config}
        pictures.save_png(Image.new("RGB", (4, 4)), tmp_path / "picture.png", recipe)
        return dict(zip(page.form.parts.kept, page.form.taken(str(tmp_path / "picture.png"), *kept)))

    found = taken(prompts=["a cat", "a dog"], size=[64, 32], adapters=["style:0.5"], negative="x")
    assert (found["prompts"], found["seed"], found["n"], found["sampler"]) == ("a dog", 9, 2, OWN)
    assert (found["height"], found["width"], found["adapter: style"], found["negative"]) == (64, 32, 0.5, "x")
    assert taken(sampler=sampler_tree("heun"))["sampler"] == "heun"
    for tree in ({"_target_": "os.system"}, page.offer.usual["sampler"] | {"eta": 0.37}):
        with pytest.raises(gr.Error, match=r"options of its sampler, which this page does not offer"):
            taken(sampler=tree)
    for option, value in (
        ("guidance", {"rescale": 0.7}),
        ("guidance", {"interval": [0.1, 1.0]}),
        ("spacing", "leading"),
        ("resample", {"repeats": 3}),
        ("panorama", 0.5),
        ("precision", "bf16-mixed"),
        ("tiles", {"cells": 8, "overlap": 2}),
        ("task", "interpolate"),
    ):
        with pytest.raises(gr.Error, match=option):
            taken(**{option: value})
    entries = ["a cat", {"prompt": "a bird", "n": 1, "negative": "blue"}, {"prompt": "a dog", "n": 4}]
    found = taken(prompts=entries, negative="x")  # picture 3 is the first of the dog's
    assert (found["prompts"], found["negative"]) == ("a dog", "x")
    found = taken(prompts=["a cat", {"prompt": "a bird", "n": 9, "negative": "blue"}], negative="x")
    assert (found["prompts"], found["negative"]) == ("a bird", "blue")
    paired = {"prompts": [{"prompt": "a", "n": 1}, "b"], "classes": ["cat", "dog"], "n": 3}
    assert [(_entry_of(paired, "prompts", k)["prompt"], _entry_of(paired, "classes", k)["prompt"]) for k in (0, 1, 3)] == [
        ("a", "cat"), ("b", "dog"), ("b", "dog"),
    ]  # fmt: skip
    alone = {"classes": ["cat", "dog"], "prompts": ["x"], "n": 2}
    assert [_entry_of(alone, name, 3)["prompt"] for name in ("classes", "prompts")] == ["dog", "x"]
    assert page.form.taken("", *kept) == kept


@pytest.mark.parametrize("kind", ["layout", "semantic", "class"])
def test_drawn_conditions_and_the_size_are_taken_over(kind: str, studio: Studio, tmp_path: Path) -> None:
    """What the form then asks for is what the picture was drawn from, whatever stood there before."""
    page = page_of(studio, kind)
    drawn = {
        "layout": {"layout": canvas(boxes=[[0.1, 0.2, 0.4, 0.4, "dog"]])},
        "semantic": {"map": canvas(np.eye(32, dtype=np.uint8))},
        "class": {"classes": ""},
    }[kind]
    asked = page.form.asked(MAIN, values(page, **drawn))
    *_, (picture, *_) = studio.draw(page.offer, asked, threading.Event())
    other = {"layout": {"layout": ""}, "semantic": {"map": ""}, "class": {"classes": "dog"}}[kind]
    before = values(page, height=64, width=64, **other)
    taken = page.form.taken(str(picture), *(before[name] for name in page.form.parts.kept))
    again = page.form.asked(MAIN, before | dict(zip(page.form.parts.kept, taken)))
    wanted = options_of(page.offer, {k: v for k, v in asked.items() if k != "seed"}, studio.limits)
    assert options_of(page.offer, {k: v for k, v in again.items() if k != "seed"}, studio.limits) == wanted


def test_a_request_hands_in_what_was_uploaded_and_nothing_else(studio: Studio, tmp_path: Path) -> None:
    page = page_of(studio, "none")
    image = page.form.parts.all["img2img: image"]
    (tmp_path / "secret.png").write_bytes(b"x")
    for path in ("/etc/passwd", str(tmp_path / "secret.png"), "../../etc/passwd", ""):
        with pytest.raises(gr.Error, match=r"hand the picture in first"):
            image.preprocess(ImageData(path=path))
    uploaded = Path(get_upload_folder()) / "of-a-test.png"
    uploaded.parent.mkdir(exist_ok=True, parents=True)
    uploaded.write_bytes(b"x")
    assert image.preprocess(ImageData(path=str(uploaded))) == str(uploaded.resolve())
    uploaded.unlink()


def test_one_job_at_a_time_is_waited_for_and_can_be_cancelled(studio: Studio) -> None:
    page = page_of(studio, "text")
    ticket, said = page._begin("")
    assert said == "Waiting for its turn."
    with pytest.raises(gr.Error, match=r"one job at a time"):
        page._begin(ticket)
    assert page._cancel(ticket) == "Cancelled."
    second, _ = page._begin(ticket)  # while the first may still be in the queue
    handler = page._drawing(partial(page._jobs, MAIN))
    assert len(list(handler(ticket, *values(page, prompts="first").values()))) == 1  # cancelled: nothing is drawn
    *_, finished = handler(second, *values(page, prompts="second", n=1).values())
    assert finished[0].startswith("1 picture;")
    assert page._stops == {}
    assert page._failed(second) == gr.skip()  # the job has already reported its end
    third, _ = page._begin("")
    assert page._failed(third).startswith("⚠")
    with pytest.raises(gr.Error, match=r"&lt;b"):
        list(handler(page._begin("")[0], *values(page, prompts="a", sampler="<b>").values()))


@pytest.mark.parametrize("name", ["n", "seed", "height", "num_inference_steps"])
def test_an_empty_field_is_named(name: str, studio: Studio) -> None:
    page = page_of(studio, "text")
    with pytest.raises(ValueError, match=rf"{name} is empty; type a number"):
        page.form.asked(MAIN, values(page, prompts="a") | {name: None})


@pytest.mark.parametrize(
    "value",
    [
        "nothing", "[]", "3", '{"png": 5}', '{"png": "data:image/png;base64,%%%"}', '{"png": "data:image/png;base64,AAAA"}', "{}",
        '{"png": "data:image/svg+xml,<svg/>"}', "[" * 100_000, canvas(np.zeros((8, 9), np.uint8)),
    ],
)  # fmt: skip
def test_what_no_canvas_sends_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match=r"the mask is nothing that the canvas of this page has sent"):
        painted(value, "mask", (8, 8))


def test_what_was_painted_comes_back() -> None:
    labels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    assert np.array_equal(
        np.array(Image.open(__import__("io").BytesIO(painted(canvas(labels), "map", (8, 8))))), labels
    )
    assert painted("", "mask", (8, 8)) is None is painted(canvas(), "mask", (8, 8))
    assert json.loads(boxed(canvas(boxes=[[0, 0, 1, 1, "cat"]]))) == [[0, 0, 1, 1, "cat"]]
    assert boxed("") is None is boxed(canvas())
    assert json.loads(with_background(Image.new("RGB", (4, 4))))["background"].startswith("data:image/png;base64,")


def test_names_of_a_model_stand_in_no_markup(studio: Studio, tmp_path: Path) -> None:
    """Class names come from whoever made the model, and the browser runs the canvas' template as code: no names in
    it."""
    from ldm_train.app.sketch import sketch

    evil = "`${alert(1)}{{x}}<img onerror=alert(1)>`"
    with gr.Blocks():
        made = sketch("boxes", "Boxes", (32, 32), ["cat", evil])
    assert "alert" not in made.html_template + made.css_template + made.js_on_load
    assert made.get_config()["props"]["labels"] == ["cat", evil]


def test_the_app_has_a_page_for_each_model_and_one_for_the_runs(
    studio: Studio, capsys: pytest.CaptureFixture[str]
) -> None:
    config = composed("app", f"runs_dir={studio.runs_dir}", "run=[text,layout]", "accelerator=cpu")
    demo = build(config)
    assert [name for _, name, *_ in demo.pages] == ["Home", "layout", "Runs"]
    nothing = studio.runs_dir / "empty"
    nothing.mkdir()
    demo = build(composed("app", f"runs_dir={nothing}"))
    assert [name for _, name, *_ in demo.pages] == ["Home"]
    damaged = small_model("text", studio.runs_dir / "damaged") / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"damaged"):
        build(composed("app", f"runs_dir={studio.runs_dir}", "run=damaged"))
    run = studio.runs_dir / "unnamed"
    small_model("text", run / "export")
    (run / "config.yaml").write_text("stages: [diffusion]\n")
    (run / "export" / "stage.json").write_text(json.dumps({"key": {}, "finished": True, "steps": 0, "result": {}}))
    assert [name for _, name, *_ in build(composed("app", f"runs_dir={studio.runs_dir}")).pages] == ["Home", "Runs"]
    (run / "export" / "model.safetensors").write_bytes(b"x")
    assert [name for _, name, *_ in build(composed("app", f"runs_dir={studio.runs_dir}")).pages] == ["Home"]
    assert "unnamed gets no page" in capsys.readouterr().out
    for folder in ("a/one", "b/one"):
        small_model("text", studio.runs_dir / folder)
    demo = build(composed("app", f"runs_dir={studio.runs_dir}", "run=[a/one,b/one]"))
    assert [name for _, name, *_ in demo.pages][1] == "b/one"
    with pytest.raises(FileNotFoundError, match=r"run=nowhere has no trained model"):
        build(composed("app", f"runs_dir={studio.runs_dir}", "run=nowhere"))


def a_run(folder: Path) -> Path:
    for stage, rows in (
        ("autoencoder", "step,val/psnr\n10,20\n20,25\n"),
        ("diffusion", "step,train/loss,val/loss\n25,0.5,\n50,0.4,0.6\n"),
    ):
        (folder / stage / "images").mkdir(parents=True)
        (folder / stage / "stage.json").write_text(json.dumps({"key": {}, "finished": True, "steps": 50, "result": {}}))
        (folder / stage / "metrics.csv").write_text(rows)
        Image.new("RGB", (4, 4)).save(folder / stage / "images" / "grid.png")
    (folder / "evaluation").mkdir()
    psnr = {"value": 25.123456, "interval": [24, 26.5], "n": 128}
    (folder / "evaluation" / "metrics.json").write_text(
        json.dumps({"reconstruction": {"psnr": psnr}, "adherence": {"mean": 0.9}})
    )
    (folder / "config.yaml").write_text("stages: [diffusion]\n")
    return folder


def test_runs_are_read_as_they_stand(tmp_path: Path) -> None:
    run, other = a_run(tmp_path / "one"), a_run(tmp_path / "sweep" / "seed=1")
    table = runs.table(tmp_path)
    assert sorted(table.run) == ["one", "sweep/seed=1"]
    assert set(table.state) == {"finished"}
    assert runs.stages(run) == ["autoencoder", "diffusion"]
    assert "- diffusion" in runs.recipe_of(run)
    assert runs.columns([run], "diffusion") == ["train/loss", "val/loss"]
    curves = runs.curves([run, other], tmp_path, "diffusion", "train/loss")
    assert curves.to_dict("list") == {
        "step": [25, 50] * 2,
        "value": [0.5, 0.4] * 2,
        "run": ["one"] * 2 + ["sweep/seed=1"] * 2,
    }
    assert runs.evaluations(run).to_dict("records") == [
        {"what": "reconstruction psnr", "value": "25.12", "95 % interval": "24 to 26.5", "n": "128"},
        {"what": "adherence mean", "value": "0.9", "95 % interval": "", "n": ""},
    ]
    assert {what for _, what in runs.media(run)} == {"autoencoder: grid", "diffusion: grid"}


def test_a_strangers_run_shows_no_other_files_and_damage_only_itself(tmp_path: Path) -> None:
    run = a_run(tmp_path / "one")
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "numbers.json").write_text('{"salary": 5}')
    (secret / "rows.csv").write_text("step,secret\n1,2\n2,3\n")
    (secret / "config.yaml").write_text("password: x\n")
    shown = runs.media(run), runs.evaluations(run).to_dict(), runs.columns([run], "diffusion")
    (run / "diffusion" / "images" / "stolen.png").symlink_to(secret / "config.yaml")
    (run / "diffusion" / "images" / "nowhere.png").symlink_to(secret / "nothing")
    (run / "diffusion" / "images" / "folder.png").mkdir()
    (run / "evaluations").mkdir()
    (run / "evaluations" / "stolen.json").symlink_to(secret / "numbers.json")
    assert (runs.media(run), runs.evaluations(run).to_dict(), runs.columns([run], "diffusion")) == shown
    (run / "diffusion" / "metrics.csv").unlink()
    (run / "diffusion" / "metrics.csv").symlink_to(secret / "rows.csv")
    assert runs.columns([run], "diffusion") == []
    (run / "evaluation" / "metrics.json").write_text('{"fid": {"value": 1' + 400 * "0" + "}}")
    assert runs.evaluations(run)["value"].tolist() == ["too large"]
    (run / "config.yaml").unlink()
    (run / "config.yaml").symlink_to(secret / "config.yaml")
    assert runs.run_folders(tmp_path) == []


def test_a_run_that_is_being_written_is_read_as_far_as_it_is(tmp_path: Path) -> None:
    stage = tmp_path / "sweep" / "seed=1" / "diffusion"
    stage.mkdir(parents=True)
    (stage.parent / "config.yaml").write_text("name: x\n")
    note = {"key": {}, "finished": False, "steps": 100, "result": {}}
    (stage / "stage.json").write_text(json.dumps(note))
    (stage / "metrics.csv").write_text("step,train/loss\n25,0.5\n50,0.4\n75,0.")  # the last line is half written
    (stage / "health.json").write_text(
        json.dumps({"x": {"step": 5, "name": "_x_<b>", "what": "is <odd>", "remedy": "mend"}})
    )
    (tmp_path / "sweep" / "evaluation.txt").write_text("no run")
    folder = tmp_path / "sweep" / "seed=1"
    assert runs.run_folders(tmp_path) == [folder]
    assert runs.curves([folder], tmp_path, "diffusion", "train/loss")["value"].tolist() == [0.5, 0.4]
    page = RunsPage.__new__(RunsPage)
    page.runs_dir = tmp_path
    assert "\\_x\\_\\<b\\>" in page._findings(folder)
    with gr.Blocks():
        page = RunsPage(tmp_path)
        seen = page.follow("", [], "diffusion", None)
        assert page.follow(seen[0], ["sweep/seed=1"], "diffusion", None) == [gr.skip()] * len(seen)  # nothing new
        assert page._folders(["../../etc", "sweep/seed=1", "/etc"]) == [folder]
        os.utime(stage / "metrics.csv", (1, 1))
        (stage / "metrics.csv").write_text("step,train/loss\n25,0.5\n50,0.4\n75,0.3\n")
        assert page.follow(seen[0], ["sweep/seed=1"], "diffusion", None)[0] not in (seen[0], gr.skip())


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "example.org"])
def test_other_machines_need_a_password(host: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is reached from other machines: set password="):
        serve.start(composed("app", f"runs_dir={tmp_path}", f"host='{host}'"))
    assert serve.is_loopback("127.0.0.1")
    assert serve.is_loopback("::1")
    assert serve.is_loopback("localhost")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("port=99999", "port"),
        ("limits.pictures=0", "limits.pictures"),
        ("limits.upload=nan", "limits.upload"),
        ("queue=0", "queue"),
        ("password=[1]", "password"),
        ("open_browser=3", "open_browser"),
    ],
)
def test_an_option_that_cannot_be_is_named(option: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        serve.start(composed("app", f"runs_dir={tmp_path}", option))
