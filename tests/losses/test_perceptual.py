"""Perceptual distances: LPIPS equals torchmetrics', `tiny` is shipped and behaves, and the error for missing
weights says what to do."""

from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torchvision
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

from ldm_train.losses.perceptual import LPIPS, VGG16_FILE, TinyPerceptual, load_tiny, vgg16_weights


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A torchvision VGG16 state dict with random weights, where torch.hub would have put the published one."""
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in torchvision.models.vgg16(weights=None).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    state = {}
    for key, shape in shapes.items():
        if key.startswith("classifier"):
            state[key] = torch.zeros(1).expand(shape)  # never used; one stored number
        elif key.endswith("weight"):
            state[key] = torch.randn(shape, generator=generator) * (2 / shape[1:].numel()) ** 0.5
        else:
            state[key] = 0.1 * torch.randn(shape, generator=generator)
    path = tmp_path_factory.mktemp("torch_home") / "hub" / "checkpoints" / VGG16_FILE
    path.parent.mkdir(parents=True)
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def lpips(vgg_file: Path) -> LPIPS:
    return LPIPS(vgg_file)


def pair(size: int = 32, channels: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.rand(3, channels, size, size) * 2 - 1
    return images, (images + 0.3 * torch.randn_like(images)).clamp(-1, 1)


@torch.no_grad()
def test_lpips_equals_torchmetrics(lpips: LPIPS, vgg_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(vgg_file.parents[2]))
    reference = LearnedPerceptualImagePatchSimilarity(net_type="vgg", reduction="sum")
    images, targets = pair(48)
    ours = lpips(images, targets)
    theirs = torch.stack([reference(a[None], b[None]) for a, b in zip(images, targets)])
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert (ours > 0.01).all()


def test_lpips_is_frozen_in_eval_mode_and_differentiable(lpips: LPIPS) -> None:
    images, targets = pair()
    images.requires_grad_()
    distance = lpips.train()(images, targets)
    distance.sum().backward()
    assert not any(m.training for m in lpips.modules())
    assert all(p.grad is None and not p.requires_grad for p in lpips.parameters())
    assert images.grad.isfinite().all()
    assert images.grad.norm() > 0


@pytest.mark.parametrize("network", ["tiny", "lpips"])
def test_a_perceptual_distance_judges_each_image_alone(network: str, request: pytest.FixtureRequest) -> None:
    distance = TinyPerceptual() if network == "tiny" else request.getfixturevalue("lpips")
    images, targets = pair()
    together = distance(images, targets)
    assert together.shape == (3,)
    torch.testing.assert_close(together[1:2], distance(images[1:2], targets[1:2]), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(together, distance(targets, images))
    assert distance(images, images).tolist() == [0, 0, 0]


@pytest.mark.parametrize("network", ["tiny", "lpips"])
def test_identical_images_have_a_finite_gradient(network: str, request: pytest.FixtureRequest) -> None:
    distance = TinyPerceptual() if network == "tiny" else request.getfixturevalue("lpips")
    images = torch.zeros(1, 3, 32, 32, requires_grad=True)  # blank: feature maps with exact zeros
    distance(images, torch.zeros(1, 3, 32, 32)).sum().backward()
    assert images.grad.isfinite().all()


@pytest.mark.parametrize("network", ["tiny", "lpips"])
def test_one_channel_is_repeated_and_five_are_the_mean_of_two_groups(
    network: str, request: pytest.FixtureRequest
) -> None:
    distance = TinyPerceptual() if network == "tiny" else request.getfixturevalue("lpips")
    images, targets = pair(channels=1)
    grey = distance(images, targets)
    torch.testing.assert_close(grey, distance(images.expand(-1, 3, -1, -1), targets.expand(-1, 3, -1, -1)))
    images, targets = pair(channels=5)
    images.requires_grad_()
    first, last = (distance(images[:, k : k + 3], targets[:, k : k + 3]) for k in (0, 2))
    both = distance(images, targets)
    torch.testing.assert_close(both, (first + last) / 2)
    both.sum().backward()
    assert (images.grad.abs().sum(dim=(0, 2, 3)) > 0).all()  # every channel counts


@pytest.mark.parametrize("network", ["tiny", "lpips"])
@torch.no_grad()
def test_perceptual_networks_leave_autocast(network: str, request: pytest.FixtureRequest) -> None:
    distance = TinyPerceptual() if network == "tiny" else request.getfixturevalue("lpips")
    images, targets = pair()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = distance(images, targets)
    torch.testing.assert_close(inside, distance(images, targets), rtol=0, atol=0)


def test_a_damaged_download_is_named(vgg_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(vgg_file.parents[2]))
    with pytest.raises(ValueError, match=r"is damaged .* delete it and run again"):
        vgg16_weights()


def test_without_weights_and_network_the_way_out_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(FileNotFoundError) as caught:
        LPIPS()
    message = str(caught.value)
    for part in (VGG16_FILE, str(tmp_path / "hub" / "checkpoints"), "perceptual=tiny", "no route to host"):
        assert part in message


def test_a_named_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"mine\.pth"):
        LPIPS(tmp_path / "mine.pth")


def test_tiny_carries_its_gradient_to_both_images() -> None:
    images, targets = (x.requires_grad_() for x in pair())
    distance = TinyPerceptual()
    distance.train()(images, targets).sum().backward()
    assert images.grad.norm() > 0
    assert targets.grad.norm() > 0
    assert all(p.grad is None for p in distance.parameters())


@torch.no_grad()
def test_tiny_grows_with_the_distortion() -> None:
    images, noise = torch.rand(4, 3, 64, 64) * 2 - 1, torch.randn(4, 3, 64, 64)
    images = torch.nn.functional.avg_pool2d(images, 9, 1, 4)
    values = [TinyPerceptual()(images + s * noise, images).mean() for s in (0.02, 0.1, 0.5)]
    assert values[0] < values[1] < values[2]


def test_the_shipped_networks_are_there_and_differ() -> None:
    tiny, evaluation = load_tiny("tiny"), load_tiny("tiny_eval")
    assert tiny.widths != evaluation.widths
    assert not any(p.requires_grad for p in [*tiny.parameters(), *evaluation.parameters()])


def test_an_unshipped_network_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"huge\.safetensors is missing from the installation"):
        load_tiny("huge")
