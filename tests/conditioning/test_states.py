"""Hidden states on disk: equal to newly computed ones, used for the same encoder only, even if files are damaged."""

import json
import multiprocessing
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from chains import chain, tokenizer
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from ldm_train.conditioning import states
from ldm_train.conditioning.states import KeptStates, States
from ldm_train.conditioning.text import FrozenText

SHAPE = (3, 5)
KEEP = torch.zeros(2, dtype=torch.bool)


@pytest.fixture
def clip(tmp_path: Path) -> Callable[[int], FrozenText]:
    """clip(seed) -> a conditioner with a small random encoder that depends on the seed, loaded again each time."""

    def made(seed: int = 0) -> FrozenText:
        folder = tmp_path / f"clip{seed}"
        if not folder.is_dir():
            folder.mkdir()
            tokenizer(folder).save_pretrained(folder)
            torch.manual_seed(seed)
            config = CLIPTextConfig(
                vocab_size=100, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
                max_position_embeddings=16, eos_token_id=1,
            )  # fmt: skip
            CLIPTextModel(config).save_pretrained(folder)
        return FrozenText(str(folder), 16, max_length=16)

    return made


def never(captions: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    raise AssertionError(f"asked for {captions}")


def pair(k: int) -> states.Pair:
    return torch.full(SHAPE, float(k)), torch.tensor([True, k % 2 == 0, False])


def written(folder: Path, captions: Sequence[str]) -> None:
    kept = KeptStates(folder, SHAPE)
    kept.patience = 0.0
    kept.put((caption, pair(k)) for k, caption in enumerate(captions))


def test_another_process_finds_the_states_and_asks_nobody(clip: Callable, tmp_path: Path):
    first = clip()
    first.cache_states_in(tmp_path / "kept")
    wanted = first(["a cat", "a dog"], KEEP)
    states._write(*next((k.folder, k._new) for k in first.known._folders.values()))  # as at the end of a process
    second = clip()
    second.cache_states_in(tmp_path / "kept")
    second.encode = never
    for words in (["a cat", "a dog"], ["a dog", "a cat"]):
        found = second(words, KEEP)
        order = [["a cat", "a dog"].index(word) for word in words]
        assert torch.equal(found["context"], wanted["context"][order])
        assert torch.equal(found["context_mask"], wanted["context_mask"][order])
    with pytest.raises(AssertionError, match="a bird"):
        second(["a bird", "a cat"], KEEP)


@pytest.mark.parametrize("change", ["weights", "config", "layer", "length", "precision"])
def test_states_of_another_encoder_are_not_taken(clip: Callable, tmp_path: Path, change: str):
    first = clip()
    first.cache_states_in(tmp_path / "kept")
    first(["a cat", "a dog"], KEEP)
    states._write(*next((k.folder, k._new) for k in first.known._folders.values()))
    other = clip(1) if change == "weights" else clip()
    if change == "config":
        path = Path(other.path) / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_act": "gelu"}))
    if change == "layer":
        other.layer = "penultimate"
    if change == "length":
        other.max_length = 8
    other.cache_states_in(tmp_path / "kept")
    asked: list[str] = []
    encode = other.encode
    other.encode = lambda captions: (asked.extend(captions), encode(captions))[1]
    with torch.autocast("cpu", torch.bfloat16, enabled=change == "precision"):
        other(["a cat", "a dog"], KEEP)
    assert asked == ["a cat", "a dog"]


def test_a_tokenizer_that_was_used_is_still_the_same(clip: Callable, tmp_path: Path):
    text = clip()
    before = states.identity(*text.pretrained())
    text.encode(["a cat"])
    assert states.identity(*text.pretrained()) == before


def test_what_another_process_writes_is_found_after_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    monkeypatch.setattr(states.time, "monotonic", lambda: now[0])
    mine = KeptStates(tmp_path, SHAPE)
    written(tmp_path, ["a"])
    for seconds, found in ((1.0, False), (11.0, True)):
        now[0] = seconds
        mine.look()
        assert (mine.get("a") is not None) == found


def test_a_whole_copy_stands_in_for_a_damaged_one(tmp_path: Path):
    for captions in (["a", "b"], ["a", "c"]):
        written(tmp_path, captions)
    whole = {path: path.read_bytes() for path in tmp_path.glob("*.safetensors")}
    for path in whole:
        tensors = load_file(path)
        tensors["states"][0] += 1
        save_file(tensors, path)
        assert torch.equal(KeptStates(tmp_path, SHAPE).get("a")[0], pair(0)[0])
        path.write_bytes(whole[path])


def test_where_the_encoder_changes_nothing_is_kept(clip: Callable, tmp_path: Path):
    text = clip()
    text.cache_states_in(tmp_path / "kept")
    text.clear_cache()
    text(["a cat", "a dog"], KEEP)
    assert not (tmp_path / "kept").exists()
    assert not text.known._folders


def test_many_files_and_captions_are_told_apart(tmp_path: Path):
    captions = [f"caption {k}" for k in range(700)]
    kept = KeptStates(tmp_path, SHAPE)
    kept.together = 64
    for first in range(0, 700, 50):
        kept.put((captions[k], pair(k)) for k in range(first, min(first + 50, 700)))
    assert kept.files
    for store in (kept, KeptStates(tmp_path, SHAPE)):
        found = [store.get(caption) for caption in captions]
        known = [k for k, p in enumerate(found) if p is not None]
        assert len(known) == 700
        assert all(torch.equal(found[k][0], pair(k)[0]) and torch.equal(found[k][1], pair(k)[1]) for k in known)
        assert store.get("caption 701") is None


def test_what_is_few_is_written_after_some_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    monkeypatch.setattr(states.time, "monotonic", lambda: now[0])
    known = States(10)
    known.cache_states_in(tmp_path, SHAPE, lambda: torch.device("cpu"))

    def encode(captions: Sequence[str]) -> states.Pair:
        return tuple(torch.stack(part) for part in zip(*(pair(0) for _ in captions)))

    known.of(["a"], encode)
    assert not list(tmp_path.rglob("*.safetensors"))
    now[0] = 11.0
    known.of(["a"], never)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1


def test_memory_holds_so_many(tmp_path: Path):
    known = States(3)
    known.cache_states_in(tmp_path, SHAPE, lambda: torch.device("cpu"))
    captions = [str(k) for k in range(8)]

    def encode(asked: Sequence[str]) -> states.Pair:
        return tuple(torch.stack(part) for part in zip(*(pair(int(c)) for c in asked)))

    assert [int(p[0][0, 0]) for p in known.of(captions, encode).values()] == [*range(8)]
    assert len(known.memory) == 3
    assert int(known.of(["2"], never)["2"][0][0, 0]) == 2  # from the disk


def test_states_that_are_not_what_was_written_are_named_and_asked_for_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture
):
    written(tmp_path, ["a", "b"])
    (path,) = tmp_path.glob("*.safetensors")
    tensors = load_file(path)
    tensors["states"][1, 0, 0] += 1
    save_file(tensors, path)
    store = KeptStates(tmp_path, SHAPE)
    assert [store.get(c) is not None for c in "abb"] == [True, False, False]
    assert capsys.readouterr().out.count(f"{path} is damaged (a checksum is wrong); delete it") == 1


def test_another_device_or_encoder_has_states_of_its_own(tmp_path: Path):
    """Also if a model moves between devices: it is loaded on the host, and trains on a GPU."""
    known, device, asked = States(0), [torch.device("cpu")], []

    def encode(captions: Sequence[str]) -> states.Pair:
        asked.append(device[0].type)
        return tuple(torch.stack(part) for part in zip(*(pair(0) for _ in captions)))

    known.cache_states_in(tmp_path / "one", SHAPE, lambda: device[0])
    for kind in ("cpu", "cuda", "cpu", "cuda"):
        device[0] = torch.device(kind)
        known.of(["a"], encode)
    assert asked == ["cpu", "cuda"]
    known.cache_states_in(tmp_path / "other", SHAPE, lambda: device[0])
    known.of(["a"], encode)
    assert asked == ["cpu", "cuda", "cuda"]


@pytest.mark.parametrize("damage", ["cut", "garbage", "shape", "kind", "lacking"])
def test_a_damaged_file_is_named_and_its_captions_asked_for_anew(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture
):
    written(tmp_path, ["a", "b"])
    written(tmp_path, ["c"])
    path = next(p for p in tmp_path.glob("*.safetensors") if len(load_file(p)["captions"]) == 2)
    tensors = load_file(path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-20])
    elif damage == "garbage":
        path.write_bytes(b"\xff" * 100)
    else:
        changed = {"shape": {"states": torch.zeros(2, 3, 6)}, "kind": {"seen": torch.zeros(2, 3)}, "lacking": {}}[
            damage
        ]
        kept = {k: v for k, v in tensors.items() if damage != "lacking" or k != "seen"}
        save_file(kept | changed, path)
    store = KeptStates(tmp_path, SHAPE)
    assert f"{path} is left out" in capsys.readouterr().out
    assert [store.get(c) is not None for c in "abc"] == [False, False, True]


def test_a_full_disk_leaves_the_training_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(states, "write_atomically", full)
    written(tmp_path, ["a"])
    assert "hidden states of 1 captions are not kept" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def _writing(folder: Path, number: int) -> None:
    for first in range(0, 100, 10):
        written(folder, [f"{number % 2} {k}" for k in range(first, first + 10)])


def test_processes_write_into_one_folder(tmp_path: Path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_writing, args=(tmp_path, number)) for number in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    store = KeptStates(tmp_path, SHAPE)
    for number in range(2):
        assert all(torch.equal(store.get(f"{number} {k}")[0], pair(k % 10)[0]) for k in range(100))
    assert not list(tmp_path.glob(".*.partial"))


@pytest.mark.chain
@pytest.mark.slow
def test_a_run_keeps_the_states_and_the_next_one_asks_nobody(
    clip: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = clip().path
    options = (
        "diffusion/conditioning=clip_text", "diffusion.conditioning.context_dim=16", f"text_cache={tmp_path}/kept",
        f"diffusion.conditioning.conditioners.text.path={folder}", "diffusion.conditioning.conditioners.text.max_length=16",
        "data.adherence=null",
    )  # fmt: skip
    monkeypatch.setattr(KeptStates, "patience", 0.0)
    chain(tmp_path, *options, name="first").execute()
    assert list((tmp_path / "kept").rglob("*.safetensors"))
    monkeypatch.setattr(FrozenText, "encode", lambda self, captions: never(captions))
    chain(tmp_path, *options, name="second").execute()
    weights = [
        torch.load(tmp_path / name / "diffusion" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("first", "second")
    ]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
