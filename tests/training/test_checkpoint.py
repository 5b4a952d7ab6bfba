"""Checkpoints: damage is named before training resumes, the previous one is kept, a full disk loses nothing."""

import io
import os
import random
import resource
import signal
from pathlib import Path

import pytest
import torch

from ldm_train.data.shards import DataError
from ldm_train.pipeline.measure import load_weights
from ldm_train.storage import partial_of
from ldm_train.training import fit
from ldm_train.training.callbacks import checkpoint as checkpoints
from ldm_train.training.callbacks.checkpoint import AtomicCheckpointIO, read_checkpoint


def state(step: int) -> dict:
    generator = torch.Generator().manual_seed(step)
    tensors = {f"layer{i}.weight": torch.randn(64, 33, generator=generator) for i in range(12)}
    return {"state_dict": tensors, "global_step": step, "loops": {"fit_loop": {"done": step}}}


def equal(a: dict, b: dict) -> bool:
    rest = all(a[k] == b[k] for k in ("global_step", "loops"))
    return rest and all(torch.equal(v, b["state_dict"][k]) for k, v in a["state_dict"].items())


@pytest.fixture
def last(tmp_path: Path) -> Path:
    """diffusion/checkpoints/last.ckpt of step 2; the previous checkpoint, beside it, is of step 1."""
    path = tmp_path / "diffusion" / "checkpoints" / "last.ckpt"
    for step in (1, 2):
        AtomicCheckpointIO().save_checkpoint(state(step), path)
    return path


def damaged(content: bytes, dice: random.Random) -> bytes:
    kind, place, data = dice.randrange(4), dice.randrange(len(content)), bytearray(content)
    if kind < 2:
        data[place] ^= 1 << dice.randrange(8)
    elif kind == 2:
        data[place : place + 512] = bytes(len(data[place : place + 512]))
    return bytes(data[:place] if kind == 3 else data)


def test_damage_is_refused_by_name_or_harmless(last: Path):
    content, dice, named = last.read_bytes(), random.Random(0), []
    for case in range(200):
        last.write_bytes(damaged(content, dice) if case else b"")
        try:
            found = read_checkpoint(last)
        except DataError as error:
            named.append(str(last) in str(error))
        else:
            assert equal(found, state(2)), case
    assert all(named)
    assert len(named) > 150


def test_a_damaged_checkpoint_offers_the_one_before(last: Path):
    data = bytearray(last.read_bytes())
    data[data.index(state(2)["state_dict"]["layer5.weight"].numpy().tobytes()) + 100] ^= 4
    last.write_bytes(data)
    previous = last.with_name("last-previous.ckpt")
    with pytest.raises(DataError, match=f"mv {previous} {last}.*run the same command"):
        fit.steps_done(last)
    os.replace(previous, last)
    assert fit.steps_done(last) == 1
    last.write_bytes(b"")
    with pytest.raises(DataError, match="restart=diffusion"):
        fit.steps_done(last)


def test_a_missing_checkpoint_beside_the_one_before_does_not_begin_anew_in_silence(last: Path):
    last.unlink()
    with pytest.raises(DataError, match=r"last\.ckpt is missing.*mv .*last-previous\.ckpt"):
        fit.steps_done(last)


def test_checkpoints_of_before_still_load(tmp_path: Path):
    torch.save(state(3), tmp_path / "last.ckpt")
    assert equal(read_checkpoint(tmp_path / "last.ckpt"), state(3))
    assert fit.steps_done(tmp_path / "last.ckpt") == 3


def test_the_one_before_is_kept_also_where_files_cannot_be_linked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuses(*names: str) -> None:
        raise PermissionError

    monkeypatch.setattr(checkpoints.os, "link", refuses)
    for step in (1, 2, 3):
        AtomicCheckpointIO().save_checkpoint(state(step), tmp_path / "last.ckpt")
    assert equal(read_checkpoint(tmp_path / "last.ckpt"), state(3))
    assert equal(read_checkpoint(tmp_path / "last-previous.ckpt"), state(2))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last-previous.ckpt", "last.ckpt"]


def test_checkpoints_are_written_through_no_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    victim = tmp_path / "victim"
    victim.write_text("years of work")
    monkeypatch.setattr(checkpoints.os, "link", lambda *names: (_ for _ in ()).throw(PermissionError))
    for name in ("last.ckpt", "last.ckpt.previous"):
        partial_of(tmp_path / name).symlink_to(victim)
    for step in (1, 2):
        AtomicCheckpointIO().save_checkpoint(state(step), tmp_path / "last.ckpt")
    assert victim.read_text() == "years of work"
    assert equal(read_checkpoint(tmp_path / "last-previous.ckpt"), state(1))


class Runs:
    """An object whose pickle creates a file when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.path}",)


def test_reading_a_checkpoint_runs_nothing(tmp_path: Path):
    torch.save(state(1) | {"callbacks": Runs(tmp_path / "ran")}, tmp_path / "last.ckpt")
    with pytest.raises(DataError, match=r"last\.ckpt"):
        read_checkpoint(tmp_path / "last.ckpt")
    assert not (tmp_path / "ran").exists()


def test_a_damaged_best_checkpoint_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ldm_train.pipeline.measure.find_model", lambda folder: folder)
    monkeypatch.setattr("ldm_train.pipeline.measure.load_latent_diffusion", lambda *_: torch.nn.Identity())
    best = tmp_path / "diffusion" / "checkpoints" / "best.ckpt"
    AtomicCheckpointIO().save_checkpoint(state(1), best)
    best.write_bytes(best.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"best\.ckpt is damaged.*weights=last"):
        load_weights(tmp_path, "best")


def test_a_full_disk_is_one_message_and_loses_nothing(last: Path):
    """File size is limited to n bytes, for about 60 values of n up to just below a checkpoint's size."""
    content, whole = last.read_bytes(), io.BytesIO()
    torch.save(state(3), whole)
    size = len(whole.getvalue())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for n in [*range(0, size, size // 60), size - 1]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (n, before[1]))
        try:
            with pytest.raises(OSError, match=r"could not write .*last\.ckpt: File too large; nothing half-written"):
                AtomicCheckpointIO().save_checkpoint(state(3), last)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert sorted(p.name for p in last.parent.iterdir()) == ["last-previous.ckpt", "last.ckpt"], n
        assert last.read_bytes() == content
    AtomicCheckpointIO().save_checkpoint(state(3), last)
    assert fit.steps_done(last) == 3
