"""The latent cache holds the autoencoder's outputs, survives interruptions, and is refused if it is stale."""

import io
import multiprocessing
import re
import shutil
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from ldm_train.data.datamodule import ShardDataModule
from ldm_train.data.encoding import write_cache, write_cache_index, written_entries
from ldm_train.data.foreign_latents import ForeignLatents
from ldm_train.data.latents import CachedLatents, LatentDataModule, places_in, verify_cache
from ldm_train.data.order import Batching
from ldm_train.data.prepare.index import write_tar_index
from ldm_train.data.shards import ENTRIES, DataError, read_index, write_shard
from ldm_train.data.statistics import latent_statistics, read_statistics
from ldm_train.models.autoencoder import AutoencoderIdentity, AutoencoderKL
from ldm_train.models.first_stage import FirstStage
from ldm_train.pipeline.latents import give_statistics
from ldm_train.storage import write_json

FIELDS = ("class_label", "caption")


def encoder(seed: int = 0, channels_last: bool = True):
    """Returns a small autoencoder's function images -> moments, by default in the memory layout that training uses."""
    torch.manual_seed(seed)
    model = AutoencoderKL(z_channels=2, channels=8, channel_mult=(1, 2), num_res_blocks=1, mid_attention=False)
    with torch.no_grad():
        model.quant_conv.bias += torch.tensor([0.5, -0.3, -4.0, -5.0])  # a mean other than zero, and a narrow posterior
    if channels_last:
        model.to(memory_format=torch.channels_last)
    return FirstStage(model).encode_moments


def images(root: Path, batching: Batching | None = None, max_steps: int = 8, **options) -> ShardDataModule:
    return ShardDataModule(
        str(root), batching or Batching(8), max_steps, **{"fields": ("image", *FIELDS), "image_size": 8} | options
    )


def cache(root: Path, folder: Path, flips: bool = False, per_shard: int = 16, encode=None, **options) -> Path:
    data = images(root, flip=flips, **options)
    entries = {
        s: write_cache(data, s, encode or encoder(), folder, per_shard, flips and s == "train")
        for s in ("train", "val")
    }
    write_cache_index(folder, entries, data.index["classes"])
    return folder


@pytest.fixture(scope="module")
def cached(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cache(data_root, tmp_path_factory.mktemp("latents"), flips=True)


def test_the_cache_holds_the_moments_of_every_image(data_root: Path, cached: Path):
    encode, latents = encoder(), CachedLatents(cached, "train", FIELDS, seed=0)
    dataset = images(data_root).fixed_loader("train").dataset
    assert len(latents) == 40
    for i in range(40):
        image = dataset[(0, i)]["image"][None]
        assert torch.allclose(torch.from_numpy(latents.moments(i)), encode(image)[0], atol=1e-5)
        assert torch.allclose(torch.from_numpy(latents.moments(i, flipped=True)), encode(image.flip(3))[0], atol=1e-5)


def test_narrow_latents_keep_their_layout(write_data: Callable, tmp_path: Path):
    # In channels_last one column of latents is Fortran-ordered; a raw memory map must not be written in that order.
    root, encode = write_data(tmp_path / "data", train=8, val=2), encoder()
    data = images(root, image_size=(8, 2))
    write_cache_index(tmp_path / "cache", {"train": write_cache(data, "train", encode, tmp_path / "cache")}, None)
    latents, dataset = CachedLatents(tmp_path / "cache", "train", (), 0), data.fixed_loader("train").dataset
    for i in range(8):
        assert torch.allclose(
            torch.from_numpy(latents.moments(i)), encode(dataset[(0, i)]["image"][None])[0], atol=1e-5
        )


def test_batches_come_in_the_order_flips_and_captions_of_the_images(data_root: Path, cached: Path):
    encode = encoder()
    batching = Batching(8, micro_batch_size=4)
    from_images = images(data_root, batching, flip=True, seed=5)
    from_cache = LatentDataModule(cached, batching, 8, FIELDS, seed=5)
    batches = list(from_cache.train_loader(0))
    assert len(batches) == len(from_cache.train_loader(0)) == 16
    for ours, theirs in zip(batches, from_images.train_loader(0)):
        assert ours["key"] == theirs["key"]
        assert ours["caption"] == theirs["caption"]
        assert torch.equal(ours["class_label"], theirs["class_label"])
        assert torch.allclose(ours["moments"], encode(theirs["image"]), atol=1e-5)
    tail = list(from_cache.train_loader(11))
    assert [b["key"] for b in tail] == [b["key"] for b in batches[11:]]
    assert all(torch.equal(a["moments"], b["moments"]) for a, b in zip(tail, batches[11:]))


def test_flips_are_used_in_training_only(cached: Path):
    latents = CachedLatents(cached, "train", (), seed=0)
    rows = [(0, i) for i in range(40)]
    flipped = [
        np.array_equal(m, latents.moments(i, flipped=True))
        for (_, i), m in zip(rows, latents.fetch(rows, True)["moments"].numpy())
    ]
    assert 10 < sum(flipped) < 30
    plain = latents.fetch(rows, random=False)["moments"].numpy()
    assert all(np.array_equal(plain[i], latents.moments(i)) for i in range(40))


def test_validation_is_complete_over_ranks(cached: Path):
    ranks = [LatentDataModule(cached, Batching(8, 2, 2, r), 8, FIELDS, 0).val_dataloader() for r in range(2)]
    assert sorted(k for loader in ranks for b in loader for k in b["key"]) == [f"val_{i:04d}" for i in range(6)]


def slow_cache(root: Path, folder: Path) -> None:
    encode = encoder()

    def slow(images: torch.Tensor) -> torch.Tensor:
        time.sleep(0.1)
        return encode(images)

    cache(root, folder, per_shard=8, encode=slow)


@pytest.mark.slow
def test_a_cache_killed_while_writing_is_completed_by_the_next_run(data_root: Path, tmp_path: Path):
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=slow_cache, args=(data_root, tmp_path / "killed"))
    process.start()
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "killed").glob(".entries/*.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    process.join()
    assert not (tmp_path / "killed" / "index.json").exists(), "it finished before it could be killed"
    finished = sorted((tmp_path / "killed").glob("*.tar"))
    assert 2 <= len(finished) < 6
    for shard in finished:  # a file with the final name is complete
        with tarfile.open(shard) as tar:
            assert len({Path(name).name.split(".")[0] for name in tar.getnames()}) == 8
    before = {shard: shard.stat().st_mtime_ns for shard in finished[:2]}
    cache(data_root, tmp_path / "killed", per_shard=8)
    assert before == {shard: shard.stat().st_mtime_ns for shard in before}
    cache(data_root, tmp_path / "calm", per_shard=8)
    names = sorted(p.name for p in (tmp_path / "calm").iterdir() if p.is_file())
    assert names == sorted(p.name for p in (tmp_path / "killed").iterdir() if p.is_file())
    assert all((tmp_path / "calm" / n).read_bytes() == (tmp_path / "killed" / n).read_bytes() for n in names)


def test_ranks_write_one_cache_together(data_root: Path, cached: Path, tmp_path: Path):
    entries = [
        e
        for rank in range(2)
        for e in write_cache(images(data_root, Batching(8, None, 2, rank)), "train", encoder(), tmp_path, 16, True)
    ]
    write_cache_index(tmp_path, {"train": entries}, None)
    ours, theirs = (CachedLatents(f, "train", (), 0) for f in (tmp_path, cached))
    assert ours.shards.keys == theirs.shards.keys
    assert all(np.allclose(ours.moments(i), theirs.moments(i), atol=1e-5) for i in range(40))


def test_an_interrupted_cache_continues(data_root: Path, tmp_path: Path):
    data, encode, calls = images(data_root), encoder(), []

    def breaks(batch: torch.Tensor) -> torch.Tensor:
        calls.append(len(batch))
        if sum(calls) > 24:  # in the middle of the second shard of 16
            raise RuntimeError("out of memory")
        return encode(batch)

    with pytest.raises(RuntimeError, match="out of memory"):
        write_cache(data, "train", breaks, tmp_path, 16)
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["train-000000.tar"]
    before = (tmp_path / "train-000000.tar").stat().st_mtime_ns
    encoded = []
    entries = write_cache(data, "train", lambda x: (encoded.append(len(x)), encode(x))[1], tmp_path, 16)
    assert sum(encoded) == 24
    assert (tmp_path / "train-000000.tar").stat().st_mtime_ns == before
    assert entries == write_cache(data, "train", encode, tmp_path / "undisturbed", 16)


def test_a_shard_that_changed_since_is_written_again(data_root: Path, tmp_path: Path):
    data = images(data_root)
    entries = write_cache(data, "val", encoder(), tmp_path)
    (tmp_path / "val-000000.tar").write_bytes(b"damaged")
    assert write_cache(data, "val", encoder(), tmp_path) == entries
    assert (tmp_path / "val-000000.tar").stat().st_size == entries[0]["bytes"]


def test_a_damaged_cache_is_named_with_its_remedy(data_root: Path, tmp_path: Path):
    folder = cache(data_root, tmp_path)
    assert len(CachedLatents(folder, "train", (), 0)) == 40
    path = folder / "train-000001.tar"
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"train-000001\.tar.*restart=latents"):
        CachedLatents(folder, "train", (), 0)
    path.unlink()
    with pytest.raises(DataError, match=r"train-000001\.tar.*restart=latents"):
        CachedLatents(folder, "train", (), 0)


def test_a_missing_cache_names_its_remedy(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="restart=latents"):
        LatentDataModule(tmp_path, Batching(8), 8, (), 0)


def test_a_stale_cache_is_refused(data_root: Path, cached: Path):
    data, latents = images(data_root), CachedLatents(cached, "train", (), 0)
    assert verify_cache(data, "train", latents, encoder(channels_last=False)) < 0.1
    with pytest.raises(DataError, match=r"stale: .* times the tolerance; run again with restart=latents"):
        verify_cache(data, "train", latents, encoder(seed=1))


def test_a_cache_of_other_data_is_refused(
    write_data: Callable, cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    other = images(write_data(tmp_path, train=80))
    monkeypatch.setattr(other.shards("train"), "key", lambda i: f"other_{i}")
    with pytest.raises(DataError, match="sample train_0000 is not in the data"):
        verify_cache(other, "train", CachedLatents(cached, "train", (), 0), encoder())


def test_unreadable_pictures_are_left_out(write_data: Callable, tmp_path: Path):
    root = write_data(tmp_path / "data", corrupt={3, 17, 39})
    with pytest.raises(DataError, match=r"3 of 40 samples could not be read, more than data.max_bad_fraction=0\.01"):
        cache(root, tmp_path / "cache")
    folder = cache(root, tmp_path / "cache", max_bad_fraction=0.1)  # continues with the shards that are there
    latents = CachedLatents(folder, "train", FIELDS, 0)
    assert latents.shards.keys == [f"train_{i:04d}" for i in range(40) if i not in (3, 17, 39)]
    assert latents.fetch([(0, 3)], False)["caption"] == ["train 4 one"]
    assert verify_cache(images(root), "train", latents, encoder()) < 1


def test_a_picture_of_another_shard_with_the_same_key_is_not_taken_for_an_unreadable_one(
    write_data: Callable, tmp_path: Path
):
    bad = range(8)  # all of the first shard
    root, intact = write_data(tmp_path / "data", corrupt=set(bad)), write_data(tmp_path / "intact")
    index = read_index(root)
    first = read_index(intact)["splits"]["train"]["shards"][0]
    for number in range(10, 30):  # their keys also in twenty other shards, of which a replacement may come
        shutil.copy(intact / first["file"], root / f"train-0001{number}.tar")
        index["splits"]["train"]["shards"].append(first | {"file": f"train-0001{number}.tar"})
        index["splits"]["train"]["count"] += first["count"]
    write_json(root / "index.json", index)
    folder = cache(root, tmp_path / "cache", max_bad_fraction=0.5)
    keys = CachedLatents(folder, "train", FIELDS, 0).shards.keys
    assert len(keys) == 32 + 20 * 8
    assert not {f"0_train_{i:04d}" for i in bad} & set(keys)


def test_two_files_of_one_key_are_no_latents_of_others(tmp_path: Path):
    for folder in ("new", "old"):
        (tmp_path / folder).mkdir()
        np.save(tmp_path / folder / "a.npy", np.zeros((4, 2, 2), np.float32))
    with pytest.raises(DataError, match=r"new/a\.npy and .*old/a\.npy both hold latents of a"):
        ForeignLatents(tmp_path, (4, 2, 2), False)
    (tmp_path / "old" / "a.npy").unlink()
    (tmp_path / "new" / "a.npy").write_bytes(b"")
    with pytest.raises(DataError, match="the latents of a cannot be read"):
        ForeignLatents(tmp_path, (4, 2, 2), False)("a")


BAD_CONDITIONS = {
    "no_utf8": {"txt": b"\xff\xfe", "json": b"{}"},
    "a_list": {"json": b"[]"},
    "null": {"json": b'{"captions": [null]}'},
    "letters": {"json": b'{"captions": "a red circle"}'},
    "half_a_pair": {"json": rb'{"captions": ["\ud800"]}'},
    "deep": {"json": b"[" * 100_000},
    "minus_one": {"cls": b"-1"},
    "unnamed_class": {"cls": b"3"},
    "far": {"cls": b"999999"},
    "huge": {"cls": b"1" + b"0" * 30},
    "word": {"cls": b"abc"},
}


@pytest.mark.parametrize("members", BAD_CONDITIONS.values(), ids=BAD_CONDITIONS)
def test_a_bad_caption_or_class_is_named_and_left_out(
    write_data: Callable, tmp_path: Path, members: dict, capsys: pytest.CaptureFixture
):
    root = write_data(tmp_path / "data", changed={5: members})
    data = images(root)
    data.check_conditions()
    assert re.search(
        r"cannot be read: train-000000\.tar:train_0005: .*(caption|json|txt|class label)", capsys.readouterr().out
    )
    folder = cache(root, tmp_path / "cache")
    assert re.search(r"leaving out unreadable train-000000\.tar:train_0005: ValueError", capsys.readouterr().out)
    latents = CachedLatents(folder, "train", FIELDS, 0)
    assert latents.shards.keys == [f"train_{i:04d}" for i in range(40) if i != 5]
    assert len(latents.fetch([(0, i) for i in range(39)], True)["caption"]) == 39
    assert all(len(caption) > 5 for caption in data.shards("train").captions())  # a tokenizer is trained on these
    streamed = images(root, Batching(4), 10, reader="streaming").train_loader(0)
    notes = [note for batch in streamed for note in batch["replaced"]]
    assert any("train-000000.tar:train_0005: ValueError" in note for note in notes)


def test_too_many_bad_captions_stop_before_training(write_data: Callable, tmp_path: Path):
    root = write_data(tmp_path / "data", changed={i: {"json": b'{"captions": [null]}'} for i in (3, 20)})
    with pytest.raises(DataError, match=r"2 of 40 samples could not be read.*max_bad_fraction"):
        images(root).check_conditions()
    images(root, max_bad_fraction=0.1).check_conditions()
    images(root, fields=("image",)).check_conditions()  # images need no captions


def test_a_bad_caption_in_a_cache_is_named(write_data: Callable, tmp_path: Path):
    root = write_data(tmp_path / "data", changed={5: {"json": b"[]"}})
    latents = CachedLatents(
        cache(root, tmp_path / "cache", fields=("image",)), "train", FIELDS, 0
    )  # made without captions
    with pytest.raises(DataError, match=r"train-000000\.tar:train_0005: its \.json is not an object.*restart=latents"):
        latents.fetch([(0, 5)], True)


NOT_AN_INDEX = [
    "", "null", "[]", "3", "{}", '{"splits": 3}', '{"splits": {"train": 3, "val": []}}', "[" * 100_000,
    '{"splits": {"train": {"count": "8", "shards": []}}}', '{"splits": {}, "stochastic": true}',
]  # fmt: skip


@pytest.mark.parametrize("text", NOT_AN_INDEX, ids=range(len(NOT_AN_INDEX)))
@pytest.mark.parametrize("name", ["index.json", "statistics.json", ".entries/train-000001.tar.json"])
def test_damaged_notes_of_a_cache_are_named_or_made_again(
    data_root: Path, cached: Path, tmp_path: Path, name: str, text: str
):
    shutil.copytree(cached, folder := tmp_path / "cache")
    (folder / name).write_text(text)
    if name == "index.json":
        with pytest.raises(DataError, match=r"index\.json.*restart=latents|no split"):
            LatentDataModule(folder, Batching(8), 8, (), 0)
        with pytest.raises(DataError, match=r"restart=latents"):
            CachedLatents(folder, "train", (), 0)
    elif name == "statistics.json":
        with pytest.raises(DataError, match=r"statistics\.json holds no statistics.*restart=latents"):
            read_statistics(folder)
    else:
        with pytest.raises(DataError, match=r"train-000001\.tar\.json is damaged.*restart=latents"):
            written_entries(folder, "train")
        entries = write_cache(images(data_root, flip=True), "train", encoder(), folder, 16, True)
        assert entries == written_entries(folder, "train")
        assert entries == read_index(cached)["splits"]["train"]["shards"]


def test_the_shards_of_a_split_are_not_those_of_one_whose_name_begins_alike(cached: Path, tmp_path: Path):
    shutil.copytree(cached, folder := tmp_path / "cache")
    own = written_entries(folder, "train")
    for path in list((folder / ENTRIES).glob("train-*.json")):
        shutil.copy(path, path.with_name(path.name.replace("train-", "train-val-")))
    assert written_entries(folder, "train") == own


@pytest.mark.parametrize("text", ['{"scale_factor": NaN, "std": [1], "mean": [0]}', '{"scale_factor": 1, "std": [1], "mean": []}',
    '{"scale_factor": "1", "std": [1], "mean": [0]}', '{"scale_factor": 0, "std": [1], "mean": [0]}', '{"scale_factor": 1}'])  # fmt: skip
def test_wrong_statistics_are_named(tmp_path: Path, text: str):
    (tmp_path / "statistics.json").write_text(text)
    with pytest.raises(DataError, match=r"statistics\.json holds no statistics.*restart=latents"):
        read_statistics(tmp_path)


def test_latents_without_a_width_have_no_statistics(data_root: Path, tmp_path: Path):
    folder = cache(data_root, tmp_path, encode=lambda x: torch.full((len(x), 4, 4, 4), float("nan")))
    with pytest.raises(DataError, match=r"standard deviation nan; look at the autoencoder"):
        latent_statistics(CachedLatents(folder, "train", (), 0))


def test_a_constant_channel_cannot_be_standardised_and_has_a_deviation_of_zero(data_root: Path, tmp_path: Path):
    shift = torch.tensor([0.0, 0.1, 0.2]).view(1, 3, 1, 1)

    def encode(images: torch.Tensor) -> torch.Tensor:
        mean = images[:, :3, ::4, ::4] * torch.tensor([1.0, 1.0, 0.0]).view(1, 3, 1, 1) + shift
        return torch.cat([mean, torch.full_like(mean, -100.0)], dim=1)

    folder = cache(data_root, tmp_path, encode=encode)
    statistics = latent_statistics(CachedLatents(folder, "train", (), 0))
    assert statistics["std"][2] < 1e-6 < min(statistics["std"][:2])
    write_json(folder / "statistics.json", statistics)
    first_stage = FirstStage(AutoencoderIdentity(3))
    give_statistics(folder, first_stage, per_channel=False)
    with pytest.raises(ValueError, match=r"channel 2 of the latents .* is constant.*latents\.per_channel=false"):
        give_statistics(folder, first_stage, per_channel=True)


def test_keys_from_foreign_tars_are_cached(tmp_path: Path, as_png: Callable):
    # tar -C folder -cf x.tar . writes ./a.png; some tars have folders with dots, or the same names in every shard.
    tars = {"train0": ["./a.png", "./b.png", "v1.0/a.png"], "train1": ["./a.png", "./b.png"], "val": ["./c.png"]}
    for tar_name, names in tars.items():
        with tarfile.open(tmp_path / f"{tar_name}.tar", "w") as tar:
            for k, name in enumerate(names):
                data = as_png(np.full((8, 8, 3), 60 * k, np.uint8))
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    write_tar_index(str(tmp_path), tmp_path)
    data = images(tmp_path, Batching(1), fields=("image",))
    write_cache_index(tmp_path / "cache", {"train": write_cache(data, "train", encoder(), tmp_path / "cache")}, None)
    latents = CachedLatents(tmp_path / "cache", "train", (), 0)
    assert len(set(latents.shards.keys)) == 5
    assert verify_cache(data, "train", latents, encoder()) < 1


def test_statistics_equal_a_direct_computation(cached: Path):
    latents = CachedLatents(cached, "train", (), 0)
    moments = np.stack([latents.moments(i) for i in range(40)]).astype(np.float64)
    mean, variance = moments[:, :2], np.exp(moments[:, 2:])
    # E z = E mean, Var z = E variance + Var mean: over everything, and per channel.
    got = latent_statistics(latents)
    assert got["count"] == 40
    assert np.allclose(got["mean"], mean.mean(axis=(0, 2, 3)), rtol=1e-12)
    assert np.allclose(got["std"], np.sqrt(variance.mean(axis=(0, 2, 3)) + mean.var(axis=(0, 2, 3))), rtol=1e-12)
    assert np.isclose(got["scale_factor"], 1 / np.sqrt(variance.mean() + mean.var()), rtol=1e-12)
    assert latent_statistics(latents, limit=10)["count"] == 10


def test_scaled_latents_have_unit_variance(cached: Path):
    latents = CachedLatents(cached, "train", (), 0)
    first_stage = FirstStage(AutoencoderKL(z_channels=2, channels=8, channel_mult=(1, 2)))
    moments = latents.fetch([(0, i) for i in range(40)], False)["moments"].repeat(50, 1, 1, 1)
    first_stage.set_statistics(latent_statistics(latents)["scale_factor"])
    assert abs(first_stage.latents(moments).std() - 1) < 0.01
    statistics = latent_statistics(latents)
    first_stage.set_statistics(1 / torch.tensor(statistics["std"]), torch.tensor(statistics["mean"]))
    z = first_stage.latents(moments)
    assert z.mean(dim=(0, 2, 3)).abs().max() < 0.02
    assert (z.std(dim=(0, 2, 3)) - 1).abs().max() < 0.01


@pytest.mark.parametrize("crop", ["random", "random_resized"])
def test_random_crops_are_not_cached(data_root: Path, tmp_path: Path, crop: str):
    with pytest.raises(ValueError, match=f"data.crop={crop} is random.*latents.cache=false or data.crop=center"):
        write_cache(images(data_root, crop=crop), "train", encoder(), tmp_path)


def test_conditions_that_the_cache_lacks_are_refused(write_data: Callable, tmp_path: Path):
    root = write_data(tmp_path / "data", leave_out=("txt", "json"))
    data = images(root, fields=("image",))
    write_cache_index(
        tmp_path / "cache", {s: write_cache(data, s, encoder(), tmp_path / "cache") for s in ("train", "val")}, None
    )
    with pytest.raises(DataError, match="not every sample has a caption"):
        LatentDataModule(tmp_path / "cache", Batching(8), 8, ("caption",), 0)


def test_a_shard_of_another_npy_version_is_refused(tmp_path: Path):
    entry = write_shard(tmp_path / "train-000000.tar", [("a", {"moments.npy": b"\x93NUMPY\x02\x00" + bytes(200)})])
    write_cache_index(tmp_path, {"train": [entry]}, None)
    with pytest.raises(DataError, match=r"npy version \(2, 0\).*restart=latents"):
        CachedLatents(tmp_path, "train", (), 0)


@pytest.mark.parametrize("gone", [[], [0], [3, 4, 39], [*range(20)]])
@pytest.mark.parametrize("repeated", [False, True])
def test_samples_are_found_in_the_data_where_some_were_left_out(
    write_data: Callable, tmp_path: Path, gone: list[int], repeated: bool, monkeypatch: pytest.MonkeyPatch
):
    """repeated: as with so many samples that keys are not compared for repeats; all keys then begin with their
    shard's number."""
    if repeated:
        monkeypatch.setattr("ldm_train.data.latents.MOST_COMPARED", 5)
    data = images(write_data(tmp_path / "data", corrupt=gone), max_bad_fraction=1.0)
    folder = cache(tmp_path / "data", tmp_path / "latents", max_bad_fraction=1.0)
    latents = CachedLatents(folder, "train", (), 0)
    wanted = [i for i in range(40) if i not in gone]
    assert [int(i) for i in places_in(data.shards("train"), latents.shards)] == wanted
    assert latents.shards.key(0) == f"{wanted[0] // 8}_train_{wanted[0]:04d}" if repeated else f"train_{wanted[0]:04d}"
    assert verify_cache(data, "train", latents, encoder(), 40) < 1e-3
