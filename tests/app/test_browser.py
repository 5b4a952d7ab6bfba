"""The app in a real headless browser, as people use it: with the mouse, with the keyboard and on a phone.

These tests need Chromium: one in PATH, or LDM_TRAIN_CHROMIUM=<its file>.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from small_models import small_model

from ldm_train import images as pictures

sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[dev]'")
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = os.environ.get("LDM_TRAIN_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None, reason="no Chromium here: apt install chromium, or LDM_TRAIN_CHROMIUM=<its file>"
    ),
]
WAIT = 60_000  # milliseconds; long, as other processes may keep the cores busy


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for kind in ("text", "calm", "layout", "semantic"):
        small_model(kind, folder / kind)
    return folder


def served(*options: str) -> tuple[subprocess.Popen, str]:
    """Starts the app in a process of its own; returns the process and the app's address."""
    command = [sys.executable, "-m", "ldm_train.cli.app", "port=0", "accelerator=cpu", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GRADIO_SERVER_PORT": ""}
    environment.pop("GRADIO_SERVER_PORT")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if found := re.match(r"open (http://\S+?)/?[; (]", line):
            threading.Thread(target=process.stdout.read, daemon=True).start()
            return process, found[1]
    raise AssertionError("".join(lines))


@pytest.fixture(scope="module")
def app(runs_dir: Path) -> Iterator[str]:
    process, address = served(f"runs_dir={runs_dir}", "run=[text,calm,layout,semantic]", "limits.upload=1")
    yield address
    process.terminate()
    process.wait(30)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens pages, each as another person: with cookies and storage of its own. Fails at the end if a page asked
    another host for anything or had an uncaught JavaScript error."""
    contexts, strange, wrong = [], [], []

    def open_page(address: str, **options: Any) -> Any:
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.set_default_timeout(WAIT)
        page.on("request", lambda r: strange.append(r.url) if re.match(r"https?://(?!127\.0\.0\.1)", r.url) else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(address)
        page.locator("button").first.wait_for()
        page.wait_for_timeout(1000)  # time for the page to settle, as a person would take
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not strange
    assert not wrong


def prompt(page: Any) -> Any:
    return page.get_by_label("Prompt", exact=True)


def draw(page: Any, button: str = "Draw") -> None:
    page.get_by_role("button", name=button, exact=True).click()


def told(page: Any) -> Any:
    return page.locator("[id^=status-]").first


def drawn(page: Any, status: str = r"\d pictures?; choose one") -> list[str]:
    """Waits until the page says that the pictures are drawn; returns their addresses."""
    sync.expect(told(page)).to_have_text(re.compile(status), timeout=WAIT)
    return [image.get_attribute("src") for image in page.locator(".pictures img").all()]


def number(page: Any, label: str, value: int) -> None:
    field = page.get_by_label(f"number input for {label}")
    for _ in range(20):  # a page that is still loading resets the value
        field.fill(str(value))
        field.press("Tab")
        page.wait_for_timeout(300)
        if field.input_value() == str(value):
            return
    raise AssertionError(f"{label} stays {field.input_value()}")


def recipes(runs_dir: Path, run: str, task: str) -> list[dict]:
    paths = sorted((runs_dir / run / "samples").glob(f"{task}-*/*_seed*.png"), key=lambda p: p.stat().st_mtime)
    return [pictures.read_recipe(path) for path in paths]


def drag(page: Any, canvas: Any, *points: tuple[float, float]) -> None:
    """Drags the mouse between points, given as (x, y) in shares of the canvas."""
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*place, steps=6)
    page.mouse.up()


def test_text_becomes_pictures_with_a_recipe_that_is_drawn_again(
    app: str, opened: Callable, runs_dir: Path, tmp_path: Path
):
    page = opened(app)
    prompt(page).fill("a red circle")
    number(page, "Number of pictures", 3)
    draw(page)
    assert len(drawn(page, "3 pictures")) == 3
    page.locator(".pictures button.thumbnail-item, .pictures .thumbnail-lg").nth(1).click()
    with page.expect_download() as download:
        page.get_by_role("button", name="Download it").click()
    download.value.save_as(tmp_path / "mine.png")
    recipe = pictures.read_recipe(tmp_path / "mine.png")
    assert (recipe["seed"], recipe["condition"]) == (1, "a red circle")
    draw(page, "Draw it again")
    drawn(page, r"Drawn again: identical to the pixel\.")
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    for name, answer in (
        ("plain.png", "plain.png carries no recipe"),
        ("mine.png", r"Drawn again: identical to the pixel\."),
    ):
        with page.expect_file_chooser() as chooser:
            page.get_by_role("button", name="Draw the picture of a file again").click()
        chooser.value.set_files(tmp_path / name)
        drawn(page, answer)


def test_what_was_typed_and_drawn_survives_a_reload(app: str, opened: Callable):
    page = opened(app)
    prompt(page).fill("typed")
    page.get_by_role("tab", name="Inpaint").click()
    canvas = page.locator("#mask-text canvas")
    drag(page, canvas, (0.3, 0.3), (0.6, 0.6))
    before = canvas.evaluate("c => c.toDataURL()")
    page.wait_for_timeout(500)
    page.reload()
    sync.expect(prompt(page)).to_have_value("typed")
    page.get_by_role("tab", name="Inpaint").click()
    page.wait_for_function("before => document.querySelector('#mask-text canvas').toDataURL() === before", arg=before)


def test_a_hole_that_was_painted_is_filled_and_the_rest_stays(
    app: str, opened: Callable, runs_dir: Path, tmp_path: Path
):
    """The photo is not square (48x80): picture and painted mask both have the size that the model sees, 32x32."""
    page = opened(app)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (48, 80, 3), np.uint8)).save(tmp_path / "photo.png")
    page.get_by_role("tab", name="Inpaint").click()
    panel = page.get_by_role("tabpanel").filter(has=page.locator("#mask-text"))
    draw(page, "Fill the hole")
    drawn(page, "hand in a picture first")
    panel.locator("input[type=file]").first.set_input_files(tmp_path / "photo.png")
    page.wait_for_function(
        "JSON.stringify(1) && document.querySelector('#mask-text canvas').getContext('2d').getImageData(5,5,1,1).data[0] !== 128"
    )
    draw(page, "Fill the hole")
    drawn(page, "paint the mask first")
    drag(page, page.locator("#mask-text canvas"), (0.5, 0.25), (0.5, 0.75))
    number(page, "Number of pictures", 1)
    draw(page, "Fill the hole")
    drawn(page, "1 picture;")
    recipe = recipes(runs_dir, "text", "inpaint")[-1]["config"]
    mask, image = (np.asarray(Image.open(recipe[name]).convert("L")) for name in ("mask", "image"))
    assert mask.shape == image.shape == (32, 32)
    assert 0 < (mask > 0).mean() < 0.5
    assert mask[16, 16] == 255
    made = Image.open(sorted((runs_dir / "text" / "samples").glob("inpaint-*/*_seed*.png"))[-1])
    known = np.asarray(Image.open(recipe["image"]).convert("RGB"))[mask == 0]
    assert np.array_equal(np.asarray(made)[mask == 0], known)


def test_boxes_are_drawn_by_hand_and_by_keys(app: str, opened: Callable, runs_dir: Path):
    page = opened(f"{app}/model2")
    canvas = page.locator("#boxes-layout canvas")
    canvas.wait_for()
    draw(page)
    drawn(page, "draw at least one box first")
    page.locator("#boxes-layout select").select_option(label="dog")
    drag(page, canvas, (0.1, 0.2), (0.5, 0.6))
    canvas.focus()
    for key in ("ArrowRight", "ArrowUp", "Enter", *["ArrowRight"] * 8, *["ArrowDown"] * 4, "Enter"):
        page.keyboard.press(key)
    draw(page)
    drawn(page)
    boxes = json.loads(recipes(runs_dir, "layout", "layout")[-1]["config"]["layout"])
    assert [box[4] for box in boxes] == ["dog", "dog"]
    assert np.allclose(boxes[0][:4], [0.1, 0.2, 0.4, 0.4], atol=0.05)
    assert np.allclose(boxes[1][2:4], [8 / 32, 4 / 32], atol=0.01)
    canvas.focus()
    page.keyboard.press("Delete")
    sync.expect(page.locator("#boxes-layout .said")).to_have_text("1 boxes")


def test_label_maps_are_painted_with_the_labels_chosen(app: str, opened: Callable, runs_dir: Path):
    page = opened(f"{app}/model3")
    canvas = page.locator("#map-semantic canvas")
    canvas.wait_for()
    for label, y in (("2", 0.2), ("4", 0.8)):
        page.locator("#map-semantic select").select_option(label=label)
        drag(page, canvas, (0.05, y), (0.95, y))
    drag(page, canvas, (0.5, 0.5), (0.6, 0.5))
    page.locator("#map-semantic .undo").click()
    number(page, "Number of pictures", 1)
    draw(page)
    drawn(page)
    labels = np.asarray(Image.open(recipes(runs_dir, "semantic", "semantic")[-1]["config"]["map"]))
    assert set(np.unique(labels)) == {0, 2, 4}
    assert (labels[6, 16], labels[16, 16], labels[26, 16]) == (2, 0, 4)


def test_a_job_is_cancelled_in_the_middle_and_the_next_one_runs(app: str, opened: Callable):
    page, other = opened(app), opened(app)
    prompt(page).fill("a long one")
    number(page, "Number of pictures", 64)
    page.get_by_role("button", name="Settings").click()
    number(page, "Steps", 250)
    draw(page)
    sync.expect(told(page)).to_have_text(re.compile(r"Step \d+ of 250, pictures 1 to 16"), timeout=WAIT)
    prompt(other).fill("a short one")
    number(other, "Number of pictures", 1)
    draw(other)
    page.get_by_role("button", name="Cancel").click()
    sync.expect(told(page)).to_have_text("Cancelled.")
    drawn(other, "1 picture")


def test_ten_people_wait_and_each_gets_their_own(app: str, opened: Callable, runs_dir: Path):
    people = [opened(app) for _ in range(10)]
    for k, page in enumerate(people):
        prompt(page).fill(f"person {k}")
        number(page, "Number of pictures", 1)
        draw(page)
    for k, page in enumerate(people):
        drawn(page, "1 picture")
        page.get_by_role("button", name="Recipe of the chosen picture").click()
        sync.expect(page.get_by_text(f'"person {k}"').first).to_be_visible()


def test_bad_uploads_and_long_texts_are_refused_in_words(app: str, opened: Callable, tmp_path: Path):
    page = opened(app)
    (tmp_path / "text.png").write_bytes(b"no picture")
    Image.fromarray(np.zeros((20_000, 10_000), np.uint8)).save(tmp_path / "giant.png", compress_level=9)
    for name, message in (("text.png", "not a picture"), ("giant.png", "pixels")):
        page.reload()
        page.get_by_role("tab", name="Picture to picture").click()
        panel = page.get_by_role("tabpanel").filter(has=page.get_by_role("button", name="Change it"))
        panel.locator("input[type=file]").first.set_input_files(tmp_path / name)
        page.wait_for_timeout(1000)
        draw(page, "Change it")
        drawn(page, message)
    page.get_by_role("tab", name="Text to picture").click()
    prompt(page).evaluate("area => area.removeAttribute('maxlength')")
    prompt(page).fill("x" * 1_000_000)
    draw(page)
    drawn(page, "at most 2,000|too long|longer")


def test_the_keyboard_alone_is_enough(app: str, opened: Callable):
    page = opened(app)
    prompt(page).wait_for()
    page.wait_for_timeout(500)
    seen = []
    for _ in range(60):
        page.keyboard.press("Tab")
        seen.append(
            page.evaluate(
                "[document.activeElement.tagName, document.activeElement.ariaLabel || document.activeElement.innerText]"
            )
        )
    reached = {text.split()[0] for tag, text in seen if tag == "BUTTON" and text}
    assert {"Draw", "Cancel", "Settings", "Side", "Random"} <= reached, seen
    prompt(page).focus()
    page.keyboard.type("by keys")
    page.keyboard.press("Enter")  # draws
    drawn(page)
    missing = page.evaluate(
        "[...document.querySelectorAll('img')].filter(i => !i.hasAttribute('alt')).length"
        " + [...document.querySelectorAll('canvas')].filter(c => !c.ariaLabel).length"
    )
    assert missing == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_it_in_one_column(scheme: str, app: str, opened: Callable):
    page = opened(app, viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True, color_scheme=scheme)
    prompt(page).fill("on a phone")
    number(page, "Number of pictures", 1)
    draw(page)
    drawn(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 391
    left, right = prompt(page).bounding_box(), told(page).bounding_box()
    assert right["y"] > left["y"] + left["height"]
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    shade = max(map(int, re.findall(r"\d+", background)[:3]))
    assert shade < 80 if scheme == "dark" else shade > 200
    page.locator(".overflow-menu > button").first.click()
    page.locator(".overflow-dropdown").get_by_text("Inpaint").click()
    canvas = page.locator("#mask-text canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    assert box["x"] + box["width"] <= 390
    page.touchscreen.tap(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    middle = "c => c.getContext('2d').getImageData(c.width / 2, c.height / 2, 1, 1).data[0]"
    assert canvas.evaluate(middle) == 255


def test_two_settings_stand_side_by_side_on_the_same_seeds(app: str, opened: Callable, runs_dir: Path):
    page = opened(app)
    prompt(page).fill("both ways")
    number(page, "Number of pictures", 2)
    page.get_by_role("button", name="Side by side").click()
    page.get_by_label("Draw twice, from the same seeds").check()
    number(page, "Steps of the second", 7)
    draw(page)
    drawn(page)
    sync.expect(page.get_by_text("The same seeds, the second way")).to_be_visible()
    said = [
        (r["seed"], r["config"]["num_inference_steps"])
        for r in recipes(runs_dir, "text", "txt2img")
        if r["condition"] == "both ways"
    ]
    assert sorted(said) == [(0, 3), (0, 7), (1, 3), (1, 7)]


def test_the_page_of_runs_follows_a_training(app: str, opened: Callable, runs_dir: Path):
    command = [
        *(sys.executable, "-m", "ldm_train.cli.train", "experiment=quickstart", "name=live", f"runs_dir={runs_dir}"),
        *(f"data.root={runs_dir}/data", "data.source.count=64", "data.per_shard=32", "logger=csv", "progress=false"),
        *("stages=[autoencoder]", "autoencoder.max_steps=400", "autoencoder.batch_size=2", "autoencoder.log_every=5"),
        *("autoencoder.val_every=400", "autoencoder.checkpoint_every=100"),
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    try:
        page = opened(f"{app}/runs")
        table = page.locator("#runs-table")
        sync.expect(table).to_contain_text(re.compile(r"autoencoder: step \d+"), timeout=3 * WAIT)
        first = int(re.search(r"autoencoder: step (\d+)", table.inner_text())[1])
        page.wait_for_function(
            "first => { const m = document.querySelector('#runs-table').innerText.match(/autoencoder: step (\\d+)/);"
            " return m && Number(m[1]) > first }",
            arg=first,
        )
        page.locator("#runs-stage").get_by_text("autoencoder").click()
        page.locator("#runs-curve canvas, #runs-curve svg").first.wait_for()
    finally:
        process.terminate()
        process.wait(60)


def posted(address: str, path: str, body: Any, cookie: str = "") -> tuple[int, str]:
    request = urllib.request.Request(
        address + path, json.dumps(body).encode(), {"Content-Type": "application/json", "Cookie": cookie}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def got(address: str, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(address + path, timeout=60) as answer:
            return answer.status, answer.read().decode(errors="replace")
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(errors="replace")


def test_requests_behind_the_page_reach_no_files_and_set_no_options(app: str, runs_dir: Path):
    """Sends the events that the page would send, with values that its controls do not allow."""
    Image.new("RGB", (32, 32)).save(runs_dir / "a_secret.png")
    config = json.loads(got(app, "/config")[1])
    at = {c["id"]: c for c in config["components"]}
    clicks = [
        d for d in config["dependencies"] if d["targets"] and d["targets"][0][1] == "click" and d["targets"][0][0] in at
    ]
    first = {at[d["targets"][0][0]]["props"].get("value"): d["id"] for d in reversed(clicks)}  # of the first page
    follows = {d["trigger_after"]: d for d in config["dependencies"]}
    by_button = {name: follows[begin] for name, begin in first.items() if begin in follows}

    begins = {d["id"]: d for d in config["dependencies"]}

    def asked(button: str = "Draw", **changed: Any) -> str:
        event = by_button[button]
        ticket = posted(
            app, "/gradio_api/run/predict", {"data": [""], "fn_index": begins[first[button]]["id"], "session_hash": "x"}
        )
        changed["ticket"] = json.loads(ticket[1])["data"][0]
        labels = [(at[i]["props"].get("label") or "-").split()[0].lower() for i in event["inputs"]]
        usual = [at[i]["props"].get("value") for i in event["inputs"]]
        data = [changed.get(label, value) for label, value in zip(labels, usual)]
        session = f"s{time.monotonic_ns()}"
        body = {"data": data, "fn_index": event["id"], "session_hash": session}
        status, answer = posted(app, "/gradio_api/queue/join", body)
        if status != 200:
            return answer
        with urllib.request.urlopen(f"{app}/gradio_api/queue/data?session_hash={session}", timeout=60) as stream:
            for line in stream:
                answer += line.decode()
                if b"process_completed" in line:
                    return answer
        return answer

    assert "1 picture;" in asked(prompt="fine", number=1)
    for button, changed in (
        ("Draw", {"sampler": "../../../etc/passwd"}),
        ("Draw", {"number": 10**9}),
        ("Draw", {"steps": 10**9}),
        ("Draw", {"height": 10**9}),
        ("Draw", {"seed": -5}),
        ("Draw", {"prompt": "x" * 1_000_000}),
        ("Change it", {"picture": {"path": "/etc/passwd"}}),
        ("Reconstruct", {"picture": {"path": str(runs_dir / "a_secret.png")}}),
        ("Change it", {"picture": {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}}),
        ("Change it", {"picture": {"path": str(Path(__file__).resolve()), "meta": {"_type": "gradio.FileData"}}}),
        (
            "Change it",
            {"picture": {"path": "x.png", "url": "file:///etc/passwd", "meta": {"_type": "gradio.FileData"}}},
        ),
        ("Fill the hole", {"picture": "/etc/passwd"}),
    ):
        answer = asked(button, **changed)
        assert "choose one for its recipe" not in answer, changed
        assert "Traceback" not in answer
        assert "root:" not in answer
    for path in (
        "/etc/passwd",
        str(runs_dir / "text" / "model.safetensors"),
        str(runs_dir / "text" / "config.yaml"),
        str(Path(__file__).resolve()),
        f"{runs_dir}/../../../etc/passwd",
        str(Path(sys.executable)),
    ):
        status, answer = got(app, f"/gradio_api/file={path}")
        assert status in (403, 404), path
        assert "root:" not in answer
    assert "1 picture;" in asked(prompt="still there", number=1)


def test_a_password_is_asked_for_before_anything_is_shown(runs_dir: Path, opened: Callable):
    process, address = served(f"runs_dir={runs_dir}", "run=text", "password=four words", "user=lab")
    try:
        assert got(address, "/config")[0] == 401
        assert got(address, f"/gradio_api/file={runs_dir}/text/config.yaml")[0] == 401
        page = opened(address)
        for password, fine in (("wrong", False), ("four words", True)):
            page.get_by_label("username").fill("lab")
            page.get_by_label("password").fill(password)
            page.get_by_role("button", name="Login").click()
            if fine:
                prompt(page).wait_for()
            else:
                page.get_by_text(re.compile("incorrect", re.IGNORECASE)).first.wait_for()
        page.context.close()
    finally:
        process.terminate()
        process.wait(30)
