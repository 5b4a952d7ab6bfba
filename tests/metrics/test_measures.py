"""Metrics by name: agreement with torch-fidelity on equal features; ranks, batches, files and errors."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from torch import nn
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from torchmetrics.functional.classification import multiclass_accuracy

from ldm_train.evaluation.evaluator import parse_metrics
from ldm_train.metrics.distribution import (
    Estimate,
    Frechet,
    frechet_at_infinity,
    frechet_estimate,
    gaussian,
    inception_score,
    kernel_estimate,
    mean_estimate,
    precision_estimate,
    recall_estimate,
)
from ldm_train.metrics.features import DinoV2, Inception, TinyEval, weights_hash
from ldm_train.metrics.measures import Collected, measure, read_reference, write_reference
from ldm_train.metrics.metric import REFERENCE, Metric
from ldm_train.metrics.sets import FLUSH, FeatureSet, Moments, group_of

QUIET = {"verbose": False}


def features(n: int, dim: int = 16, seed: int = 0, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return shift + scale * torch.randn(n, dim, generator=generator)


A, B = features(500, seed=1), features(400, seed=2, scale=1.2, shift=0.3)


class Classes(nn.Module):
    """An extractor whose features are the first 16 values of an image, with a head of 10 classes."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)[:, :16]

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        return features[:, :10]


EXTRACTORS = {"mine": Classes()}
NAMES = ["fid_mine", "kid_mine", "is_mine", "precision_mine", "recall_mine", "fid_inf_mine", "cmmd_mine"]


def pictures(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, 1, 4, 4)


# -- agreement ---------------------------------------------------------------------------------------------------------


def test_fid_is_torch_fidelitys() -> None:
    expected = fid_statistics_to_metric(fid_features_to_statistics(B), fid_features_to_statistics(A), False)
    found = frechet_estimate(Moments.of([A]), FeatureSet.of(B)).value
    assert found == pytest.approx(expected["frechet_inception_distance"], rel=1e-3)


def test_kid_is_torch_fidelitys_over_one_full_subset() -> None:
    expected = kid_features_to_metric(B, A[:400], kid_subsets=1, kid_subset_size=400, **QUIET)
    found = kernel_estimate(A[:400], B).value
    assert found == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-3)


def test_the_inception_score_is_torch_fidelitys_over_one_split() -> None:
    logits = features(600, 10, seed=5, scale=2.0)
    made = FeatureSet(10)
    made.add(logits, torch.arange(600), logits)
    expected = isc_features_to_metric(logits.double(), splits=1, shuffle=False)
    found = inception_score(made)
    assert found.value == pytest.approx(expected["inception_score_mean"], rel=1e-6)
    assert found.low < found.value < found.high


def test_precision_and_recall_are_torch_fidelitys() -> None:
    expected = prc_features_to_metric(B, A, prc_neighborhood=3, prc_batch_size=1000, save_cpu_ram=False, **QUIET)
    assert precision_estimate(A, B).value == pytest.approx(expected["precision"], abs=1e-6)
    assert recall_estimate(A, B, torch.arange(400)).value == pytest.approx(expected["recall"], abs=1e-6)


def test_recall_without_a_group_is_recall_of_the_others() -> None:
    """The interval's half-width equals that of leaving out each group by hand."""
    a, b, indices = A[:150], B[:120], torch.arange(120)
    left = []
    for k in range(20):
        rest = prc_features_to_metric(
            b[group_of(indices) != k], a, prc_neighborhood=3, prc_batch_size=1000, save_cpu_ram=False, **QUIET
        )
        left.append(rest["recall"])
    found = recall_estimate(a, b, indices)
    spread = 2.0930240544083 * (19 / 20 * np.square(np.array(left) - np.mean(left)).sum()) ** 0.5
    assert found.high - found.value == pytest.approx(spread, rel=1e-5)


def test_cmmd_is_the_mean_of_a_gaussian_kernel() -> None:
    a, b = (nn.functional.normalize(x, dim=1) for x in (A, B))
    gaps = (a[:, None] - b[None]).square().sum(dim=2), (a[:, None] - a[None]).square().sum(dim=2)
    own = (b[:, None] - b[None]).square().sum(dim=2)
    off = [torch.exp(-g / 200).fill_diagonal_(0).sum() / (len(g) * (len(g) - 1)) for g in (gaps[1], own)]
    expected = 1000 * (off[0] + off[1] - 2 * torch.exp(-gaps[0] / 200).mean())
    assert kernel_estimate(a, b, gaussian, 1000.0).value == pytest.approx(expected.item(), rel=1e-3)


# -- infinite n --------------------------------------------------------------------------------------------------------


def test_the_distance_at_infinity_has_lost_its_bias() -> None:
    """On Gaussians the truth is |mu|^2 + sum (a - 1)^2. At least 88 % of the intervals hold it, fewer of the
    plain ones."""
    dim, scale, shift = 12, 1.2, 0.1
    reference = Moments.stated(torch.zeros(dim), torch.eye(dim), 10**6)
    truth = dim * shift**2 + dim * (scale - 1) ** 2
    inside, plainly = 0, 0
    for k in range(120):
        made = FeatureSet.of(features(400, dim, 100 + k, scale, shift).double())
        found, plain = frechet_at_infinity(reference, made), frechet_estimate(reference, made)
        inside += found.low <= truth <= found.high
        plainly += plain.low <= truth <= plain.high
    assert 0.88 <= inside / 120 <= 1.0
    assert plainly < inside
    with pytest.raises(ValueError, match="at least 120 samples, got 100"):
        frechet_at_infinity(reference, FeatureSet.of(features(100, dim)))


# -- the stream --------------------------------------------------------------------------------------------------------


def collected(x: torch.Tensor, batch: int, names: list[str] = NAMES, reference: bool = False) -> Collected:
    into, position = Collected(parse_metrics(names, ["mine"]), EXTRACTORS, REFERENCE if reference else None), 0
    for part in x.split(batch):
        into.add(pictures(part), torch.arange(position, position + len(part)))
        position += len(part)
    return into


def test_batches_do_not_matter() -> None:
    reference = {REFERENCE: collected(A, 500, reference=True).sets}
    one, many = (measure(parse_metrics(NAMES, ["mine"]), reference, collected(B, size)) for size in (400, 7))
    for name in NAMES:
        assert (many[name].value, many[name].low) == pytest.approx((one[name].value, one[name].low), rel=1e-9)


def _rank(rank: int, file: str, out: str) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    from ldm_train.evaluation.measurement import indices_of

    sets = []
    for x, reference in ((A, True), (B, False)):
        into, position = Collected(parse_metrics(NAMES, ["mine"]), EXTRACTORS, REFERENCE if reference else None), 0
        for part in x[rank::2].split(64):  # as evaluation batches are split over ranks
            into.add(pictures(part), indices_of(position, len(part)))
            position += len(part)
        sets.append(into.gathered())
    found = measure(parse_metrics(NAMES, ["mine"]), {REFERENCE: sets[0].sets}, sets[1])
    if rank == 1:
        torch.save({k: (e.value, e.low, e.high, e.n) for k, e in found.items()}, out)
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_measure_what_one_does(tmp_path: Path) -> None:
    mp.spawn(_rank, (str(tmp_path / "group"), str(tmp_path / "out.pt")), nprocs=2)
    two = torch.load(tmp_path / "out.pt")
    one = measure(parse_metrics(NAMES, ["mine"]), {REFERENCE: collected(A, 64, reference=True).sets}, collected(B, 64))
    for name, estimate in one.items():
        expected = (estimate.value, estimate.low, estimate.high, estimate.n)
        assert two[name] == pytest.approx(expected, rel=1e-9, abs=1e-12), name


def test_the_kept_part_is_random_in_order_and_bounded() -> None:
    made = FeatureSet(1, keep=200)
    for part in torch.arange(3 * FLUSH).split(300):
        made.add(part[:, None].float(), part)
    kept, indices = made.kept()
    assert len(kept) == 200
    assert torch.equal(kept[:, 0].long(), indices)
    assert abs(indices.double().mean().item() / (1.5 * FLUSH) - 1) < 0.15  # neither only the first nor only the last
    assert made.count == 3 * FLUSH


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_reference_survives_its_file(tmp_path: Path) -> None:
    reference = collected(A, 500, reference=True).sets["mine"]
    with open(tmp_path / "a.npz", "wb") as file:
        write_reference(reference, file)
    metrics, made = parse_metrics(NAMES, ["mine"]), collected(B, 100)
    before, after = (
        measure(metrics, {REFERENCE: {"mine": r}}, made) for r in (reference, read_reference(tmp_path / "a.npz"))
    )
    for name in NAMES:
        assert after[name].value == pytest.approx(before[name].value, rel=1e-6)


def test_statistics_of_others_serve_for_frechet_distances_only(tmp_path: Path) -> None:
    np.savez(tmp_path / "b.npz", mu=A.double().mean(0).numpy(), sigma=np.cov(A.double().numpy().T))
    reference, made = {REFERENCE: {"mine": read_reference(tmp_path / "b.npz")}}, collected(B, 100)
    found = measure(parse_metrics(["fid_mine", "is_mine"], ["mine"]), reference, made)
    assert found["fid_mine"].value == pytest.approx(Frechet(Moments.of([A]))(made.sets["mine"].moments), rel=1e-6)
    with pytest.raises(ValueError, match="kid_mine needs features; this reference holds mean and covariance only"):
        measure(parse_metrics(["kid_mine"], ["mine"]), reference, made)
    (tmp_path / "c.npz").write_bytes(b"nonsense")
    np.savez(tmp_path / "d.npz", mean=np.zeros(3))
    for name in ("c.npz", "d.npz"):
        with pytest.raises(ValueError, match=r"not a file of reference statistics \(.npz with mu"):
            read_reference(tmp_path / name)


# -- names and extractors ----------------------------------------------------------------------------------------------


def test_names_say_kind_and_extractor() -> None:
    found = parse_metrics(
        ["fid", "fd_dinov2", "cmmd", "fid_inf_tiny", "precision_my_net"],
        ["tiny", "inception", "dinov2", "clip", "my_net"],
    )
    assert [(m.kind, m.extractor) for m in found] == [
        ("fid", "inception"), ("fd", "dinov2"), ("cmmd", "clip"), ("fid_inf", "tiny"), ("precision", "my_net"),
    ]  # fmt: skip
    assert [m.sign for m in found] == [1, 1, 1, 1, -1]
    for name in ("fidd", "fid_other", "tiny", "fid_"):
        with pytest.raises(ValueError, match=f"unknown metric '{name}'; choose from .*fid, fid_inf"):
            parse_metrics([name], ["tiny", "inception"])


class Spread(Metric):
    """A user's own metric: collects one number per image and compares with nothing."""

    compared_with, higher_is_better = (), True

    def __init__(self, *named: str, power: int = 1):
        super().__init__(*named)
        self.power = power

    def collect(self, extractor: nn.Module, features: torch.Tensor, conditions: object) -> torch.Tensor:
        return features.norm(dim=1) ** self.power

    def measure(self, made: FeatureSet, values: torch.Tensor, *others: FeatureSet) -> Estimate:
        return mean_estimate(values)


def test_a_metric_of_ones_own_is_measured_beside_the_others() -> None:
    kinds = {"spread": {"_target_": f"{__name__}.Spread", "power": 2}}
    metrics = parse_metrics(["fid_mine", "spread_mine"], ["mine"], kinds)
    made, position = Collected(metrics, EXTRACTORS), 0
    for part in B.split(70):
        made.add(pictures(part), torch.arange(position, position + len(part)))
        position += len(part)
    reference = {REFERENCE: collected(A, 500, ["fid_mine"], reference=True).sets}
    found = measure(metrics, reference, made)
    assert found["spread_mine"].value == pytest.approx(float((B.norm(dim=1) ** 2).double().mean()))
    assert metrics[1].sign == -1
    with pytest.raises(ValueError, match=r"a kind of .*recall, spread and an extractor of mine"):
        parse_metrics(["spread"], ["mine"], kinds)


class Judge(nn.Module):
    """A classifier whose features are its logits."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)[:, :10]

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        return features


def test_class_accuracy_is_torchmetrics() -> None:
    images, labels = features(500, 3 * 4 * 4, seed=8).reshape(500, 3, 4, 4), torch.arange(500) % 10
    images.flatten(1)[torch.arange(400), labels[:400]] += 3.0  # most logits favour the right class
    made = Collected(parse_metrics(["class_accuracy_judge"], ["judge"]), {"judge": Judge()})
    for part in torch.arange(500).split(130):
        made.add(images[part], part, {"class_label": labels[part].tolist()})
    found = measure(made.metrics, {}, made)["class_accuracy_judge"]
    expected = multiclass_accuracy(images.flatten(1)[:, :10], labels, 10, average="micro")
    assert found.value == pytest.approx(float(expected))
    assert found.low < found.value < found.high < 1
    with pytest.raises(ValueError, match="this model takes none"):
        made.add(images, torch.arange(500))


class Describer(nn.Module):
    """Features are an image's first two values, and those of a text its length and 1, all of length 1."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(images.flatten(1)[:, :2], dim=1)

    def texts(self, captions: list[str]) -> torch.Tensor:
        return nn.functional.normalize(torch.tensor([[float(len(text)), 1.0] for text in captions]), dim=1)


def test_samples_without_a_caption_have_no_clip_score() -> None:
    images, captions = torch.rand(6, 3, 8, 8), ["a", "", "abc", "", "", ""]
    scores = []
    for chosen in (torch.arange(6), torch.tensor([0, 2])):
        made = Collected(parse_metrics(["clip_score_mine"], ["mine"]), {"mine": Describer()})
        for part in chosen.split(3):  # the last batch of six has no caption at all
            made.add(images[part], part, {"caption": [captions[i] for i in part]})
        scores.append(measure(made.metrics, {}, made)["clip_score_mine"])
    assert scores[0].value == pytest.approx(scores[1].value)
    assert scores[0].n == scores[1].n == 2


def test_what_an_extractor_lacks_is_named() -> None:
    images, classes = torch.zeros(2, 3, 8, 8), {"class_label": [0, 1]}
    for name, message in (
        ("is_tiny", "needs class probabilities"),
        ("clip_score_tiny", "this model takes none"),
        ("class_accuracy_tiny", "no `logits`"),
    ):
        with pytest.raises(ValueError, match=message):
            Collected(parse_metrics([name], ["tiny"]), {"tiny": TinyEval()}).add(images, torch.arange(2), classes)
    with pytest.raises(ValueError, match="features are not finite"):
        Collected(parse_metrics(["fid_mine"], ["mine"]), EXTRACTORS).add(images * float("nan"), torch.arange(2))


def test_inception_without_network_says_which_file_goes_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def unreachable(*args: object, **kwargs: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    with pytest.raises(
        FileNotFoundError, match=r"Put weights-inception-2015-12-05-6726825d.pth .* into .*checkpoints.*fid_tiny"
    ):
        Inception()


def test_inception_features_and_logits_are_torch_fidelitys(tmp_path: Path) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    torch.manual_seed(0)
    reference = FeatureExtractorInceptionV3.__new__(FeatureExtractorInceptionV3)
    blank = tmp_path / "random.pth"
    with pytest.MonkeyPatch.context() as patch:  # random weights of the right shapes
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        patch.setattr(torch, "load", lambda *a, **k: {})
        reference.__init__("inception", ["2048", "logits_unbiased"], feature_extractor_weights_path="x")
    torch.save(reference.state_dict(), blank)
    ours = Inception(blank)
    images = torch.rand(2, 3, 40, 40) * 2 - 1
    pooled, logits = reference(((images + 1) * 127.5).round().to(torch.uint8))
    found = ours(images)
    torch.testing.assert_close(found, pooled)
    torch.testing.assert_close(ours.logits(found), logits, rtol=1e-4, atol=1e-4)


def test_dinov2_is_the_class_token_of_transformers(tmp_path: Path) -> None:
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    config = Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    model = Dinov2Model(config).eval()
    model.save_pretrained(tmp_path)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    BitImageProcessor(crop_size=28, image_mean=mean, image_std=std, do_center_crop=True).save_pretrained(tmp_path)
    images = torch.rand(2, 3, 28, 28) * 2 - 1
    pixels = ((images + 1) / 2 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.no_grad():
        expected = model(pixel_values=pixels).last_hidden_state[:, 0]
    torch.testing.assert_close(DinoV2(str(tmp_path))(images), expected, rtol=1e-4, atol=1e-4)
    five = torch.rand(2, 5, 28, 28) * 2 - 1
    halves = [DinoV2(str(tmp_path))(five[:, k : k + 3]) for k in (0, 2)]
    torch.testing.assert_close(DinoV2(str(tmp_path))(five), (halves[0] + halves[1]) / 2, rtol=1e-4, atol=1e-5)
    with pytest.raises(FileNotFoundError, match=r"extractors.dinov2.path=<folder>.*fid_tiny"):
        DinoV2(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("channels", [2, 4, 5])
def test_tiny_features_of_many_channels_are_the_mean_over_groups(channels: int) -> None:
    extractor, images = TinyEval(), torch.rand(2, channels, 32, 48) * 2 - 1
    groups = {2: [[0, 1, 1]], 4: [[0, 1, 2], [1, 2, 3]], 5: [[0, 1, 2], [2, 3, 4]]}[channels]
    expected = torch.stack([extractor(images[:, group]) for group in groups]).mean(dim=0)
    torch.testing.assert_close(extractor(images), expected, rtol=1e-4, atol=1e-6)


def test_the_hash_of_weights_sees_every_value() -> None:
    a, b = nn.Linear(3, 2), nn.Linear(3, 2)
    b.load_state_dict(a.state_dict())
    assert weights_hash(a) == weights_hash(b)
    with torch.no_grad():
        b.bias[1] += 1e-6
    assert weights_hash(a) != weights_hash(b)
