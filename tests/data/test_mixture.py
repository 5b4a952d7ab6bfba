"""Several roots as one data set: sampling shares, labels matched by name, exact resume, and the same order from the
latent cache."""

import json
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from ldm_train.data import order
from ldm_train.data.datamodule import ShardDataModule
from ldm_train.data.encoding import write_cache, write_cache_index
from ldm_train.data.fields import boxes_of, captions_of, label_of, relabelled_boxes
from ldm_train.data.latents import LatentDataModule
from ldm_train.data.order import Batching, Mixture, StepBatches
from ldm_train.data.shards import DataError, IndexedShards, write_shard
from ldm_train.storage import write_json

SETS = np.array([0] * 30 + [1] * 10)


def flat(batches: StepBatches) -> list[tuple[int, int]]:
    return [row for rows in batches for row in rows]


@pytest.fixture
def roots(write_data: Callable[..., Path], tmp_path: Path) -> list[str]:
    """Two roots: 40 pictures with classes a, b, c, and 12 with classes b, x, y."""
    first, second = write_data(tmp_path / "first"), write_data(tmp_path / "second", train=12, val=3)
    index = json.loads((second / "index.json").read_text())
    index["classes"] = ["b", "x", "y"]
    (second / "index.json").write_text(json.dumps(index))
    return [str(first), str(second)]


def module(root: object, **options: object) -> ShardDataModule:
    return ShardDataModule(root, Batching(4), 30, ("image", "class_label"), 8, **options)


def drawn_in(mixture: Mixture, seed: int, epoch: int) -> np.ndarray:
    """Returns (visits, indices) of an epoch of 40 samples, (2, 40)."""
    return np.array(mixture.epoch(seed, epoch, 40)(np.arange(40)))


@pytest.fixture(params=[order.IN_MEMORY, 0], ids=["in memory", "computed"])
def both(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a test with permutations in memory, as for few samples, and computed, as for very many."""
    monkeypatch.setattr(order, "IN_MEMORY", request.param)


@pytest.mark.usefixtures("both")
def test_shares_hold_to_the_sample():
    mixture = Mixture.of(SETS, (3, 2), None)
    for epoch in range(4):
        assert (SETS[drawn_in(mixture, 0, epoch)[1]] == 1).sum() == 16
    first = drawn_in(mixture, 0, 0)[1]
    assert (first != drawn_in(mixture, 0, 1)[1]).any()
    assert (first != drawn_in(mixture, 1, 0)[1]).any()


@pytest.mark.usefixtures("both")
def test_every_sample_comes_before_any_comes_again():
    mixture = Mixture.of(SETS, (1, 1), None)
    drawn = [drawn_in(mixture, 0, epoch) for epoch in range(3)]
    counts = Counter(np.concatenate([d[1] for d in drawn]).tolist())
    assert {counts[i] for i in range(30, 40)} == {6}  # 60 draws of 10 samples
    assert {counts[i] for i in range(30)} == {2}  # 60 draws of 30
    visits = {(v, i) for d in drawn for v, i in d.T.tolist()}
    assert len(visits) == 120  # no augmentation repeats: a visit is the number of earlier draws of its sample


def test_classes_are_drawn_alike():
    labels = np.array([0] * 24 + [1] * 6 + [0] * 5 + [2] * 5)
    mixture = Mixture.of(SETS, None, labels)
    _, indices = drawn_in(mixture, 0, 0)
    assert Counter(zip(SETS[indices].tolist(), labels[indices].tolist())) == {
        (0, 0): 15, (0, 1): 15, (1, 0): 5, (1, 2): 5,
    }  # fmt: skip


def test_what_is_rounded_off_in_one_epoch_comes_in_a_later_one():
    """Twenty classes of which an epoch has room for eight."""
    sets = np.repeat([0, 1], [20, 20])
    mixture = Mixture.of(sets, (4, 1), np.concatenate([np.zeros(20, int), np.arange(20)]))
    epochs = [drawn_in(mixture, 0, epoch)[1] for epoch in range(10)]
    assert all((sets[indices] == 1).sum() == 8 for indices in epochs)
    counts = Counter(np.concatenate(epochs).tolist())
    assert {counts[i] for i in range(20, 40)} == {4}
    late = Mixture.of(sets, (4, 1), np.concatenate([np.zeros(20, int), np.arange(20)]))
    assert (drawn_in(late, 0, 9)[1] == epochs[9]).all()
    assert (drawn_in(late, 0, 3)[1] == epochs[3]).all()


def test_without_weights_and_balance_nothing_changes():
    assert Mixture.of(SETS, None, None) is None
    plain = list(StepBatches(40, Batching(8), 0, 0, 5))
    assert {epoch for rows in plain for epoch, _ in rows} == {0}


def test_a_group_without_a_share_is_never_drawn():
    mixture = Mixture.of(SETS, (0, 1), None)
    assert (SETS[drawn_in(mixture, 0, 0)[1]] == 1).all()


def test_a_mixture_of_very_many_samples_takes_no_memory_beyond_their_numbers():
    """The last micro-batch of an epoch of 40 million samples is found in less than 16 MiB; three quarters of it come
    from the smaller set."""
    sets = np.repeat(np.array([0, 1], np.int32), [30_000_000, 10_000_000])
    mixture = Mixture.of(sets, (1, 3), None)
    batches = StepBatches(len(sets), Batching(4000), 0, 0, 10**6, mixture)
    tracemalloc.start()
    rows = batches.rows(9_999)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()
    assert sum(m.nbytes for m in mixture.members) == 4 * len(sets)
    assert 2850 < sum(sets[i] for _, i in rows) < 3150
    assert {visit for visit, i in rows if not sets[i]} == {0}
    assert {visit for visit, i in rows if sets[i]} <= {0, 1, 2}


@pytest.mark.usefixtures("both")
@pytest.mark.parametrize("start", [1, 5, 9, 14])
def test_a_mixture_resumes_exactly(start: int):
    mixture = Mixture.of(SETS, (1, 4), None)
    whole = list(StepBatches(40, Batching(8), 0, 0, 20, mixture))
    assert list(StepBatches(40, Batching(8), 0, start, 20, mixture)) == whole[start:]


def test_ranks_share_a_mixture_without_overlap():
    mixture = Mixture.of(SETS, (1, 4), None)
    whole = list(StepBatches(40, Batching(8), 0, 0, 10, mixture))
    parts = [list(StepBatches(40, Batching(8, 2, 2, r), 0, 0, 20, mixture)) for r in range(2)]
    for step in range(10):
        together = [row for micro in (0, 1) for rank in (0, 1) for row in parts[rank][2 * step + micro]]
        assert together == whole[step]


def test_labels_are_joined_by_name(roots: list[str]):
    data = module(roots)
    assert data.index["classes"] == ["a", "b", "c", "x", "y"]
    found: dict[int, set[int]] = {0: set(), 1: set()}
    shards, samples = data.shards("train"), data.samples("train", ("class_label",), random=False)
    for i in range(len(shards)):
        found[int(shards.sets[i])].add(samples[(0, i)]["class_label"])
    assert found == {0: {0, 1, 2}, 1: {1, 3, 4}}


def test_relative_roots(roots: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(Path(roots[0]).parent)
    data = module(["first", "second"])
    assert len(data.shards("train")) == 52
    assert len(list(data.fixed_loader("val"))) == 3


def test_boxes_keep_their_labels_too(tmp_path: Path):
    for name, classes in (("one", ["cat", "dog"]), ("two", ["dog", "cow"])):
        record = json.dumps({"boxes": [[0, 0, 1, 1, 1]]}).encode()
        entries = {
            split: [write_shard(tmp_path / name / f"{split}.tar", [(f"{name}{split}", {"json": record})])]
            for split in ("train", "val")
        }
        splits = {s: {"count": 1, "shards": e} for s, e in entries.items()}
        write_json(tmp_path / name / "index.json", {"splits": splits, "classes": classes})
    shards = IndexedShards([str(tmp_path / "one"), str(tmp_path / "two")], "train")
    assert shards.classes == ["cat", "dog", "cow"]
    assert [json.loads(shards.read(i, "json"))["boxes"][0][4] for i in range(2)] == [1, 2]


def test_roots_that_do_not_go_together(roots: list[str], write_data: Callable[..., Path], tmp_path: Path):
    index = Path(roots[1]) / "index.json"
    tree = json.loads(index.read_text())
    index.write_text(json.dumps(tree | {"classes": ["b", "x", "x"]}))
    with pytest.raises(DataError, match="names the class x twice"):
        module(roots)
    index.write_text(json.dumps({k: v for k, v in tree.items() if k != "classes"}))
    assert "classes" not in module(roots).index  # unless every root has class names, there are none
    index.write_text(json.dumps(tree | {"splits": {"train": tree["splits"]["train"]}}))
    with pytest.raises(DataError, match=r"second has no split 'val', the other data\.root do"):
        module(roots)


def test_the_first_validation_samples_stand_for_all_roots(roots: list[str]):
    shards = IndexedShards(roots, "val")
    assert len(shards) == 9
    assert shards.sets[:3].tolist().count(1) == 1  # 6 to 3
    assert Counter(shards.sets.tolist()) == {0: 6, 1: 3}


def test_validation_samples_of_equal_keys_are_told_apart(write_data: Callable[..., Path], tmp_path: Path):
    """Their keys are the seeds of evaluation; where keys are unique they stay as they are."""
    folders = [str(write_data(tmp_path / name)) for name in ("a", "b")]
    alone, both = (
        [key for batch in module(root).fixed_loader("val", repeat=False) for key in batch["key"]]
        for root in (folders[0], folders)
    )
    assert len({*both}) == len(both) == 2 * len(alone)
    assert {key.partition("_")[2] for key in both} == {*alone}


def test_a_mixture_of_shards_delivers_its_shares(roots: list[str]):
    data = module(roots, weights=[1, 3])
    sets = data.shards("train").sets
    rows = flat(StepBatches(len(sets), data.batching, 0, 0, 13, data.mixture))
    assert Counter(sets[[i for _, i in rows]].tolist()) == {0: 13, 1: 39}
    batch = next(iter(data.train_loader(0)))
    assert batch["image"].shape == (4, 3, 8, 8)


def test_latents_of_a_mixture_come_in_the_order_of_its_images(roots: list[str], tmp_path: Path):
    data = module(roots, weights=[1, 2], balance_classes=True)

    def encode(images: torch.Tensor) -> torch.Tensor:
        return torch.cat([images[:, :1, ::4, ::4], torch.zeros(len(images), 1, 2, 2)], dim=1)

    entries = {split: write_cache(data, split, encode, tmp_path / "cache", 16) for split in ("train", "val")}
    write_cache_index(tmp_path / "cache", entries, data.index["classes"])
    latents = LatentDataModule(tmp_path / "cache", data.batching, 30, ("class_label",), 0, images=data)
    pairs = list(zip(data.train_loader(3), latents.train_loader(3)))
    assert len(pairs) == 27
    for images, cached in pairs[:12]:
        assert torch.equal(images["class_label"], cached["class_label"])
        assert torch.equal(encode(images["image"]), cached["moments"])


def test_what_cannot_be_mixed(roots: list[str], write_data: Callable[..., Path], tmp_path: Path):
    for weights in ([1], [1, 0], [1, 2, 3]):
        with pytest.raises(ValueError, match=r"must be positive numbers, one per data\.root \(2\)"):
            module(roots, weights=weights)
    with pytest.raises(ValueError, match=r"need data\.reader=indexed"):
        module(roots, reader="streaming")
    plain = write_data(tmp_path / "plain", leave_out=("cls",))
    with pytest.raises(DataError, match="not every sample has a class_label"):
        ShardDataModule(str(plain), Batching(4), 1, ("image",), 8, balance_classes=True)
    with pytest.raises(FileNotFoundError, match="nothing does not exist"):
        module([roots[0], str(tmp_path / "nothing")])


def test_a_label_that_a_root_does_not_name_is_nobodys(roots: list[str], write_data: Callable, tmp_path: Path):
    """Such a label is refused: it is not taken as that of another root, and -1 is not the last name."""
    bad = [{"cls": b"7"}, {"cls": b"-1"}, {"cls": b"x"}, {"json": b'{"boxes": [[0, 0, 1, 1, 7]]}'}, {"json": b"[]"}]
    box = b'{"boxes": [[0, 0, 1, 1, 2]], "captions": ["one"]}'
    second = write_data(tmp_path / "third", train=12, val=3, changed=dict(enumerate([*bad, {"json": box}])))
    index = json.loads((second / "index.json").read_text())
    (second / "index.json").write_text(json.dumps(index | {"classes": ["y", "x", "b"]}))
    data = module([roots[1], str(second)], labels={"boxes": None})
    shards = data.shards("train")
    place = {shards.where(i): i for i in range(len(shards)) if shards.sets[i] == 1}
    fields = [shards.members(place[f"train-000000.tar:train_{k:04d}"]) for k in range(6)]
    for raw in fields[:3]:
        with pytest.raises(ValueError, match="class label"):
            label_of(raw["cls"], 3)
    for raw, match in zip(fields[3:5], ("box label 7", "not an object")):
        with pytest.raises(ValueError, match=match):
            boxes_of(raw["json"], 3)
    assert boxes_of(fields[5]["json"], 3)[0, 4] == data.index["classes"].index("b")
    assert captions_of(fields[5]) == ["one"]
    with pytest.raises(DataError, match=r"train-000000\.tar:train_000\d: class label .*balance_classes"):
        shards.labels()


def test_labels_of_cocos_objects_are_mapped_like_those_of_boxes() -> None:
    coco = {"width": 10, "height": 20, "objects": [{"bbox": [1, 2, 3, 4], "category_id": 1}]}
    ours = {"boxes": [[0.1, 0.1, 0.3, 0.2, 0]]}
    mapped = [boxes_of(relabelled_boxes(json.dumps(record).encode(), [1, 0])) for record in (coco, ours)]
    np.testing.assert_allclose(mapped[0], mapped[1], atol=1e-12)
    assert mapped[0][0, 4] == 1
