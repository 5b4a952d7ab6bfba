"""Models are uploaded to the Hub with a card, and downloaded as data only. No network is used: calls are replaced."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from chains import chain, composed
from published_yaml import diffusion_config
from test_compvis import checkpoint, clip_words

import ldm_train
from ldm_train.checkpoints.hub import DATA, downloaded, is_repo, upload
from ldm_train.data.batch import FIELDS
from ldm_train.pipeline.card import EXAMPLES, _without_folders
from ldm_train.pipeline.convert import convert
from ldm_train.pipeline.run import Run


@pytest.fixture(scope="module")
def run(trained: Path) -> Run:
    return chain(trained)


def card(folder: Path) -> tuple[dict[str, Any], str]:
    _, head, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(head), text


def test_an_export_is_a_complete_folder_with_its_card(run: Run):
    folder = run.folder / "export"
    head, text = card(folder)
    assert head["library_name"] == "ldm_train"
    assert head["pipeline_tag"] == "text-to-image"
    assert head["license"] == "unknown"
    measured = json.loads((run.folder / "evaluation/metrics.json").read_text())
    named = {m["type"]: m["value"] for m in head["model-index"][0]["results"][0]["metrics"]}
    assert named == {name: entry["value"] for name, entry in measured["samples"].items()}
    low, high = measured["reconstruction"]["psnr"]["interval"]
    assert f"{low:.4g} to {high:.4g}" in text
    assert "64 training images" in text
    assert (folder / "samples.png").read_bytes() == (run.folder / "evaluation/samples.png").read_bytes()
    recipe = (folder / "training.yaml").read_text()
    assert yaml.safe_load(recipe)["diffusion"]["max_steps"] == 6
    assert str(run.folder.parent) not in recipe + text  # no paths of this machine
    assert ldm_train.load(str(folder)).sample({}, [0]).shape == (1, 3, 32, 32)


class Uploads:
    """Replaces the Hub library's client: copies uploads to `keep`. fails: the message of create_repo's error. public: the
    repository is there, and public."""

    def __init__(self, keep: Path, fails: str = "", public: bool = False):
        self.keep, self.fails, self.public, self.made = keep, fails, public, {}

    def __call__(self) -> "Uploads":
        return self

    def create_repo(self, repo: str, **options: Any) -> None:
        if self.fails:
            raise RuntimeError(self.fails)
        self.made[repo] = options

    def repo_info(self, repo: str) -> SimpleNamespace:
        return SimpleNamespace(private=self.made[repo]["private"] and not self.public)

    def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> None:
        shutil.copytree(folder_path, self.keep / repo_id)


def test_nothing_private_goes_to_a_public_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.HfApi", Uploads(tmp_path / "kept", public=True))
    with pytest.raises(ConnectionError, match="it is there and public; make it private in its settings"):
        upload(tmp_path, "me/shapes", True, "x")
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize("form", ["native", "diffusers"])
def test_a_model_is_uploaded_whole_and_comes_back(
    form: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    uploads = Uploads(tmp_path)
    monkeypatch.setattr("huggingface_hub.HfApi", uploads)
    options = (f"from={run.folder}", "to=hub", "repo=me/shapes", f"format={form}", "private=true")
    convert(composed("convert", *options, "dry_run=true"))
    assert "dry run: this and its card would go to me/shapes (private)" in capsys.readouterr().out
    assert not uploads.made
    convert(composed("convert", *options))
    assert uploads.made == {"me/shapes": {"private": True, "exist_ok": True}}
    head, text = card(tmp_path / "me/shapes")
    assert head["model-index"][0]["results"]
    assert head["library_name"] == ("ldm_train" if form == "native" else "diffusers")
    assert head["pipeline_tag"] == "text-to-image"
    assert ("ldm-sample" in text) == (form == "native")
    assert ("trust_remote_code=True" in text) == (form == "diffusers")
    if form == "native":
        asked = {}

        def snapshot(repo: str, **options: Any) -> str:
            asked.update(options)
            return str(tmp_path / repo)

        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
        monkeypatch.chdir(run.folder)
        first = ldm_train.load("me/shapes").network.out[2].weight
        assert torch.equal(first, ldm_train.load(str(run.folder)).network.out[2].weight)
        assert asked["allow_patterns"] == list(DATA)
        assert ldm_train.load("me/shapes@main").latent_size == (8, 8)
        assert asked["revision"] == "main"
        assert not any(pattern.endswith(".py") for pattern in DATA)


@pytest.mark.parametrize("whole", [False, True])
def test_without_a_network_a_whole_download_of_before_is_used_and_no_part_of_one(
    whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "config.yaml").touch()
    if whole:
        (tmp_path / "model.safetensors").touch()

    def snapshot(repo: str, local_files_only: bool = False, **options: Any) -> str:
        if not local_files_only:
            raise ConnectionError("no route to host")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    if whole:
        assert downloaded("me/whole") == tmp_path
    else:
        with pytest.raises(FileNotFoundError, match=r"me/part is not a folder here, and it could not be downloaded"):
            downloaded("me/part")


def test_what_cannot_be_reached_is_said(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)

    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(
        FileNotFoundError, match=r"me/nowhere is not a folder here, and it could not be downloaded .*no route"
    ):
        ldm_train.load("me/nowhere")
    (tmp_path / "runs").mkdir()
    assert not is_repo("runs/typing-error")
    with pytest.raises(FileNotFoundError, match="runs/typing-error holds no trained model"):
        ldm_train.load("runs/typing-error")
    monkeypatch.setattr("huggingface_hub.HfApi", Uploads(tmp_path, "401 Unauthorized"))
    with pytest.raises(
        ConnectionError, match=r"could not be uploaded \(401 Unauthorized\); sign in with `hf auth login`"
    ):
        convert(composed("convert", f"from={run.folder}", "to=hub", "repo=me/shapes"))
    for repo in ("null", "shapes", "../x/y"):
        with pytest.raises(ValueError, match="to=hub needs repo=<organisation or user>/<name>"):
            convert(composed("convert", f"from={run.folder}", "to=hub", f"repo={repo}"))


def test_a_card_says_nothing_of_this_machine():
    tree = {
        "logger": {"wandb": {"entity": "me"}}, "runs_dir": "/home/me/runs", "data": {"root": ["~/photos/a", "../b/c"]},
        "path": "file:///home/me/clip", "n": 3, "_target_": "ldm_train.models.unet.UNet",
    }  # fmt: skip
    # Names on the Hub, addresses and texts are of no machine.
    public = {
        "text": "openai/clip-vit-large-patch14",
        "from": "https://host.org/data/cc3m",
        "prompt": "a cat and/or a dog",
    }
    assert _without_folders(tree | public) == {
        "data": {"root": ["a", "c"]}, "path": "clip", "n": 3, "_target_": "ldm_train.models.unet.UNet", **public
    }  # fmt: skip


def test_a_licence_that_was_filled_in_is_published(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.HfApi", Uploads(tmp_path))
    shutil.copytree(run.folder / "export", tmp_path / "mine")
    text = (tmp_path / "mine/README.md").read_text()
    (tmp_path / "mine/README.md").write_text(text.replace("license: unknown", "license: cc-by-4.0"))
    convert(composed("convert", f"from={tmp_path}/mine", "to=hub", "repo=me/licensed"))
    head, text = card(tmp_path / "me/licensed")
    assert head["license"] == "cc-by-4.0"
    assert text.rstrip().endswith("## Licence\ncc-by-4.0")


def test_a_text_encoder_travels_with_its_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    uploads = Uploads(tmp_path)
    monkeypatch.setattr("huggingface_hub.HfApi", uploads)
    source, _ = checkpoint(tmp_path, diffusion_config("sd-v1", small=True))
    convert(composed("convert", f"from={source}", f"tokenizer={clip_words(tmp_path)}", "to=hub", "repo=me/sd"))
    config = (tmp_path / "me/sd/config.yaml").read_text()
    assert "path: ./text_encoder" in config
    assert str(tmp_path) not in config
    (tmp_path / "me/sd").rename(tmp_path / "moved")
    text = ldm_train.load(str(tmp_path / "moved")).conditioners["text"]
    assert text.path == str((tmp_path / "moved/text_encoder").resolve())
    assert text.encode(["a"])[0].shape == (1, 77, 64)
    changed = (tmp_path / "moved/config.yaml").read_text().replace("./text_encoder", "./../words")
    (tmp_path / "moved/config.yaml").write_text(changed)
    record = json.loads((tmp_path / "moved/metadata.json").read_text())
    record.pop("config_sha256")
    (tmp_path / "moved/metadata.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"words"):
        ldm_train.load(str(tmp_path / "moved"))


def test_an_encoder_elsewhere_on_this_machine_is_copied_where_the_command_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr("huggingface_hub.HfApi", Uploads(tmp_path))
    source, _ = checkpoint(tmp_path, diffusion_config("sd-v1", small=True))
    convert(composed("convert", f"from={source}", f"tokenizer={clip_words(tmp_path)}", f"to={tmp_path}/model"))
    (tmp_path / "model/text_encoder").rename(tmp_path / "private")
    config = (tmp_path / "model/config.yaml").read_text().replace("./text_encoder", str(tmp_path / "private"))
    (tmp_path / "model/config.yaml").write_text(config)
    record = json.loads((tmp_path / "model/metadata.json").read_text())
    (tmp_path / "model/metadata.json").write_text(json.dumps({k: v for k, v in record.items() if k != "config_sha256"}))
    options = (f"from={tmp_path}/model",)
    for form in ("native", "compvis", "diffusers"):
        with pytest.raises(
            ValueError, match=r"names the encoder .*private of this machine; encoders=true publishes it"
        ):
            convert(composed("convert", *options, "to=hub", "repo=me/sd", f"format={form}"))
    convert(composed("convert", *options, f"to={tmp_path}/plain"))
    assert "private, which stay where they are; encoders=true copies them along" in capsys.readouterr().out
    assert not (tmp_path / "plain/text_encoder").exists()
    convert(composed("convert", *options, f"to={tmp_path}/whole", "encoders=true"))
    assert str(tmp_path) not in (tmp_path / "whole/config.yaml").read_text()
    (tmp_path / "private").rename(tmp_path / "gone")
    assert ldm_train.load(str(tmp_path / "whole")).conditioners["text"].encode(["a"])[0].shape == (1, 77, 64)


@pytest.mark.parametrize("field", EXAMPLES)
def test_the_cards_command_composes_and_gives_the_field_as_declared(field: str):
    options = EXAMPLES[field].replace("'a few words'", "words").split()
    composed("sample", "run=x", "n=8", *options)
    declared = FIELDS[field].option
    assert declared is None or any(option.startswith(f"{declared}=") for option in options)
