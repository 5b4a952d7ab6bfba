"""unCLIP: a prior draws image embeddings from text, and a model that is conditioned on them draws the pictures."""

from pathlib import Path

import numpy as np
import pytest
import torch
from chains import chain, composed
from PIL import Image

import ldm_train
from ldm_train.generation.sample import sample
from ldm_train.latent_diffusion import Sampling
from ldm_train.models.prior import EmbeddingPrior
from ldm_train.pipeline.convert import convert
from ldm_train.pipeline.run import Run
from ldm_train.rng import derive_seed
from ldm_train.samplers.ddim import ddim
from ldm_train.unclip import ImageEmbeddings

STAGES = ("stages=[autoencoder,latents,diffusion,evaluation,export]", "diffusion.evaluate_every=null")
PRIOR = (
    "diffusion/network=prior", "diffusion/objective=sample", "diffusion/conditioning=text", "diffusion.schedule.kind=cosine",
    "diffusion.network.dim=32", "diffusion.network.depth=2", "diffusion.network.num_heads=2", "evaluation.predictors=0",
)  # fmt: skip


@pytest.fixture(scope="module")
def drawer(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = chain(
        tmp_path_factory.mktemp("unclip"),
        "stages=[autoencoder,latents,diffusion]",
        "diffusion.evaluate_every=null",
        "diffusion/conditioning=image_embedding",
        name="drawer",
    )
    run.execute()
    return run


def prior_of(drawer: Run, name: str, *options: str) -> Run:
    return chain(drawer.folder.parent, *STAGES, *PRIOR, "autoencoder.pretrained=embeddings:drawer", *options, name=name)


@pytest.fixture(scope="module")
def prior(drawer: Run) -> Run:
    run = prior_of(drawer, "prior")
    run.execute()
    return run


@pytest.mark.chain
def test_an_embedding_is_drawn_as_its_picture_is_varied(drawer: Run) -> None:
    model = ldm_train.load(str(drawer.folder))
    options = {"num_inference_steps": 3, "sampler": ddim, "guidance_scale": 2.0, "spacing": "trailing"}
    embeddings, f = ImageEmbeddings(model, options), 4
    side = model.latent_size[0] * f
    images = torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = embeddings.encode(images).mean
    assert latents.shape == (3, 128, 1, 1)
    assert embeddings.downsample_factor == side
    drawn = embeddings.decode(latents, seeds=[5, 6, 7])
    seeds = [derive_seed("unclip", seed) for seed in (5, 6, 7)]
    torch.testing.assert_close(
        drawn, model.sample({"reference": images}, seeds, Sampling(**options)), atol=1e-5, rtol=0
    )
    alone = embeddings.decode(latents[1:2], seeds=[6])
    torch.testing.assert_close(alone, drawn[1:2], atol=1e-4, rtol=0)
    longer = embeddings.decode(3 * latents, seeds=[5, 6, 7])  # the length of an embedding has no effect
    torch.testing.assert_close(longer, drawn, atol=1e-4, rtol=0)


@pytest.mark.chain
def test_a_prior_is_trained_evaluated_and_drawn_from_text(drawer: Run, prior: Run) -> None:
    model = ldm_train.load(str(prior.folder))
    assert isinstance(model.first_stage.autoencoder, ImageEmbeddings)
    assert isinstance(model.network, EmbeddingPrior)
    assert (prior.folder / "evaluation" / "samples.png").is_file()
    nested, own = model.first_stage.autoencoder.model.state_dict(), ldm_train.load(str(drawer.folder)).state_dict()
    assert all(torch.equal(nested[key], value) for key, value in own.items())
    fields = {"caption": ["a red circle", "a blue square"]}
    pictures = model.sample(fields, [0, 1])
    assert pictures.shape[1:] == (3, *[side * 4 for side in own_size(drawer)])
    other = model.sample({"caption": ["a red circle"]}, [1])
    assert not torch.equal(other, pictures[:1])  # the result depends on the seed
    given = ("run=prior", f"runs_dir={prior.folder.parent}", f"out={prior.folder.parent / 'drawn'}", "n=2")
    drawn = sample(composed("sample", "prompts=a red circle", "accelerator=cpu", *given))
    assert len(drawn) == 2


@pytest.mark.chain
def test_the_film_of_a_prior_ends_with_its_picture(prior: Run, tmp_path: Path) -> None:
    given = ("run=prior", f"runs_dir={prior.folder.parent}", f"out={tmp_path / 'drawn'}", "n=2", "film=strip")
    drawn = sample(composed("sample", "prompts=a red circle", "accelerator=cpu", "seed=3", *given))
    for path, film in zip(drawn, sorted((tmp_path / "drawn").glob("*strip.png")), strict=True):
        with Image.open(path) as picture, Image.open(film) as strip:
            assert picture.size == (32, 32)
            assert np.array_equal(np.asarray(strip)[4:132:4, -132:-4:4], np.asarray(picture))


@pytest.mark.chain
def test_a_prior_is_written_and_read_again_in_our_form_alone(prior: Run, tmp_path: Path) -> None:
    convert(composed("convert", f"from={prior.folder}", f"to={tmp_path / 'again'}", "verify=true"))
    embeddings = next((prior.folder.parent / ".adopted").glob("embeddings-*"))
    for source, said in (
        (prior.folder, "EmbeddingPrior, which has no counterpart"),
        (embeddings, "draws its latents through"),
    ):
        with pytest.raises(ValueError, match=said):
            convert(composed("convert", f"from={source}", f"to={tmp_path / 'theirs'}", "format=diffusers"))
    convert(composed("convert", f"from={embeddings}", f"to={tmp_path / 'embeddings'}", "verify=true"))


@pytest.mark.chain
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("size=[32,64]", "panorama=0.5"), "a prior draws pictures of 32 pixels alone"),
        (("size=64",), "take the image size of the model that draws"),
    ],
)
def test_a_prior_draws_one_size(prior: Run, tmp_path: Path, options: tuple[str, ...], said: str) -> None:
    given = ("run=prior", f"runs_dir={prior.folder.parent}", f"out={tmp_path / 'drawn'}", "n=1", "accelerator=cpu")
    with pytest.raises(ValueError, match=said):
        sample(composed("sample", "prompts=a red circle", *given, *options))


def own_size(run: Run) -> tuple[int, int]:
    return ldm_train.load(str(run.folder)).latent_size


@pytest.mark.chain
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ("autoencoder.pretrained=embeddings:nobody",),
            "autoencoder.pretrained=nobody is not a run with a trained model",
        ),
        (("autoencoder.pretrained=embeddings:prior",), "this model has 0 conditioners of image embeddings"),
        (("diffusion.network.in_channels=64",), "in_channels is 64, the first stage's latents have 128"),
        (("diffusion.network.num_heads=3",), "width 32 does not split into 3 heads"),
    ],
)
def test_a_prior_that_cannot_be_is_named_before_anything_is_trained(
    drawer: Run, prior: Run, options: tuple[str, ...], said: str
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        prior_of(drawer, "wrong", *options).execute()


@torch.no_grad()
def test_the_prior_reads_context_vector_and_time_and_begins_at_zero() -> None:
    torch.manual_seed(0)
    network = EmbeddingPrior(8, 16, 2, 2, context_dim=6, vector_dim=5).eval()
    x, times = torch.randn(2, 8, 1, 1), torch.tensor([3.0, 700.0])
    given = {"context": torch.randn(2, 4, 6), "context_mask": torch.tensor([[True] * 4, [True, True, False, False]])}
    given["vector"] = torch.randn(2, 5)
    assert torch.equal(network(x, times, **given), torch.zeros(2, 8, 1, 1))
    torch.nn.init.normal_(network.out.weight)
    out = network(x, times, **given)
    assert out.shape == (2, 8, 1, 1)
    torch.testing.assert_close(network(x, times, **given | {"context": network.projected(given["context"])}), out)
    hidden = given["context"].clone()
    hidden[1, 2:] += 1  # tokens that the mask excludes
    torch.testing.assert_close(network(x, times, **given | {"context": hidden}), out)
    for changed in ({"context": given["context"] + 1}, {"vector": given["vector"] + 1}):
        assert (network(x, times, **given | changed) - out).abs().max() > 1e-3
    assert (network(x, times + 100, **given) - out).abs().max() > 1e-4
    assert (network(x + 1, times, **given) - out).abs().max() > 1e-3


def test_a_prior_denoises_one_embedding_alone() -> None:
    network = EmbeddingPrior(8, 16, 1, 2)
    assert network.condition_widths == {"context": 0, "concat": 0, "vector": 0}
    assert network(torch.randn(1, 8, 1, 1), torch.tensor([1.0])).shape == (1, 8, 1, 1)
    with pytest.raises(ValueError, match=r"one embedding, not latents of \(2, 2\)"):
        network(torch.randn(1, 8, 2, 2), torch.tensor([1.0]))
