"""Every config composes, names targets that exist, and builds models of the published sizes."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from chains import composed
from hydra import compose, initialize_config_dir
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from tiers import tiered

from ldm_train.checkpoints.parts import targets
from ldm_train.conditioning.text import TokenEncoder, train_tokenizer
from ldm_train.configuration import config_folder
from ldm_train.devices import shapes_only
from ldm_train.diffusion.objective import DiffusionObjective
from ldm_train.latent_diffusion import LatentDiffusion
from ldm_train.pipeline.autoencoder import EMBEDDINGS
from ldm_train.pipeline.diffusion import first_stage_tree, latent_size, model_tree
from ldm_train.pipeline.values import check_values

EXPERIMENTS = sorted(p.stem for p in (config_folder() / "experiment").glob("*.yaml"))
FILES = sorted(p for p in config_folder().rglob("*.yaml"))


def on_meta(section: DictConfig) -> torch.nn.Module:
    with shapes_only():
        return instantiate(section, _convert_="all")


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@tiered("experiment", EXPERIMENTS, fast=13)
def test_every_experiment_composes_whole(experiment: str):
    config = composed("train", f"experiment={experiment}")
    OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    check_values(config)


def test_no_option_of_a_command_has_the_name_of_a_group_that_it_does_not_choose_from():
    """Hydra takes `name=value` as a choice from the group `name` where there is such a folder."""
    for file in config_folder().glob("*.yaml"):
        tree = yaml.safe_load(file.read_text())
        chosen = {str(next(iter(d))).split()[-1].strip("/") for d in tree.get("defaults", []) if isinstance(d, dict)}
        groups = {path.name for path in config_folder().iterdir() if path.is_dir()}
        options = {name for name, value in tree.items() if not isinstance(value, dict)}
        assert not options & groups - chosen, file


BRIEFLY = ("quickstart", "celebahq_f8", "sd2_v", "upscaler_x4")  # the other experiments run only in the slow tier


@pytest.mark.parametrize(
    "experiment", [pytest.param(e, marks=() if e in BRIEFLY else pytest.mark.slow) for e in EXPERIMENTS]
)
def test_every_experiment_takes_a_flow(experiment: str):
    section = composed("train", f"experiment={experiment}", "diffusion/objective=flow").diffusion
    DiffusionObjective(instantiate(section.schedule), instantiate(section.objective.parameterisation))


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(config_folder())))
def test_every_target_exists(file: Path):
    for target in targets(yaml.safe_load(file.read_text())):
        get_object(target)


def model_of(config: DictConfig, network: dict[str, Any] | None = None) -> tuple[dict[str, Any], LatentDiffusion]:
    """Returns the config tree and the model, on the meta device. network: the autoencoder's, if not the config's
    own."""
    conditioners = OmegaConf.to_container(config.diffusion.conditioning.conditioners, resolve=True)
    for conditioner in conditioners.values():
        conditioner |= {option: 7 for option in ("classes", "labels") if conditioner.get(option) == "from_data"}
        if "encoder" in conditioner:  # pretrained encoders need their files; the widths stay those of the config
            conditioner["encoder"] = {"_target_": "ldm_train.conditioning.image_embedding.TinyVision"}
        if conditioner.get("tokenizer") == "from_data":
            conditioner["tokenizer"] = train_tokenizer(["a red circle"], conditioner.pop("vocab_size")).to_str()
    network = network or OmegaConf.to_container(config.autoencoder.network, resolve=True)
    first_stage = on_meta(OmegaConf.create(network))
    assert first_stage.in_channels == config.data.channels
    tree = model_tree(config, first_stage_tree(network), conditioners, latent_size(config, first_stage))
    return tree, on_meta(OmegaConf.create(tree))


@tiered("experiment", EXPERIMENTS, fast=9)
def test_every_experiment_makes_one_model(experiment: str):
    """Joins U-Net, first stage and conditioners as training does: LatentDiffusion raises an error if widths do not
    fit."""
    config, network = composed("train", f"experiment={experiment}"), None
    taken = config.autoencoder.pretrained or ""
    if taken.startswith(EMBEDDINGS):  # the prior's first stage holds the model that draws from its embeddings
        drawer, _ = model_of(composed("train", f"experiment={taken.removeprefix(EMBEDDINGS)}"))
        network = {"_target_": "ldm_train.unclip.ImageEmbeddings", "model": drawer}
    _, model = model_of(config, network)
    f, size = model.first_stage.downsample_factor, config.data.image_size
    assert model.latent_size == (size // f, size // f)
    assert model.latent_size[0] % model.network.size_multiple == 0
    DiffusionObjective(model.schedule, model.parameterisation)


@pytest.mark.parametrize(
    "experiment", ["quickstart", "shapes_layout", "cifar10_f4", "celebahq_f8", "inpainting_places_f4", "sd1"]
)
def test_another_backbone_takes_the_place_of_the_unet_in_any_recipe(experiment: str):
    config = composed("train", f"experiment={experiment}", "diffusion/network=dit", "data.root=nowhere")
    unet = on_meta(composed("train", f"experiment={experiment}", "data.root=nowhere").diffusion.network)
    dit = on_meta(config.diffusion.network)
    assert dit.condition_widths == unet.condition_widths
    assert dit.in_channels == unet.in_channels


GROUPS = {
    group: sorted(p.stem for p in (config_folder() / group).glob("*.yaml"))
    for group in (
        "autoencoder", "autoencoder/network", "autoencoder/loss", "autoencoder/loss/perceptual", "data", "diffusion/network",
        "diffusion/objective", "diffusion/schedule", "diffusion/conditioning", "sampler",
    )
}  # fmt: skip


@tiered("number", range(max(map(len, GROUPS.values()))), fast=6)
def test_every_option_of_a_group_composes(number: int):
    """Takes the option with this number in every group, all at once."""
    chosen = [f"{group}={options[number]}" for group, options in GROUPS.items() if number < len(options)]
    config = composed("train", "experiment=celebahq_f8", *chosen, "data.root=somewhere")
    OmegaConf.to_container(config, resolve=True, throw_on_missing=True)


@tiered("preset", sorted(p.stem for p in (config_folder() / "autoencoder").glob("[kv][lq]_*.yaml")), fast=4)
def test_vq_losses_are_means_as_published_and_kl_losses_sums(preset: str):
    config = composed("train", "experiment=celebahq_f8", f"autoencoder={preset}", "autoencoder/loss=l1_gan")
    assert config.autoencoder.loss.reduction == ("mean" if "VQ" in config.autoencoder.network._target_ else "sum")


@pytest.mark.parametrize("source", sorted(p.stem for p in (config_folder() / "source").glob("*.yaml")))
def test_every_source_composes(source: str):
    config = composed("prepare", f"source={source}", "path=somewhere", "out=elsewhere")
    OmegaConf.to_container(config, resolve=True, throw_on_missing=True)


def test_sampling_composes():
    OmegaConf.to_container(composed("sample", "run=somewhere"), resolve=True, throw_on_missing=True)


# The 13 published autoencoders: nine presets for the released ones, which four training configs repeat.
AUTOENCODERS = {
    "kl_f4": 55_312_063,
    "kl_f8": 83_653_863,
    "kl_f16": 69_610_963,
    "kl_f32": 103_880_131,
    "vq_f4": 55_322_782,
    "vq_f4_noattn": 53_219_486,
    "vq_f8": 67_717_295,
    "vq_f8_n256": 67_652_783,
    "vq_f16": 69_593_371,
}


@tiered(("preset", "count"), AUTOENCODERS.items(), fast=3)
def test_autoencoders_have_the_published_sizes(preset: str, count: int):
    assert parameters(on_meta(composed("train", f"autoencoder={preset}", "data=celebahq").autoencoder.network)) == count


# (U-Net, latent channels, context, concat) -> number of parameters; comments name the released configs of that size.
UNETS = {
    ("ldm4", 3, None, 0): 274_056_163,  # celeba256, ffhq256, lsun_beds256 and their three training configs
    ("ldm8_churches", 4, None, 0): 294_966_916,  # lsun_churches256 and its training config
    ("ldm8_class", 4, 512, 0): 394_984_196,  # cin256, cin-ldm-vq-f8
    ("imagenet_f8", 4, 512, 0): 394_984_196,
    ("ldm4_class", 3, 512, 0): 400_920_579,  # cin256-v2
    ("ldm4_text", 3, 640, 0): 403_623_939,  # text2img256
    ("ldm8_text", 4, 1280, 0): 872_300_484,  # txt2img-1p4B
    ("ldm4_superres", 3, None, 3): 113_622_563,  # bsr_sr
    ("ldm4_inpainting_big", 3, None, 4): 387_245_827,  # inpainting_big
    ("ldm4_inpainting", 3, None, 3): 215_229_315,  # semantic_synthesis256 and 512
    ("ldm4_layout", 3, 512, 0): 246_277_379,  # layout2img-openimages256
    ("rdm_f16", 16, 768, 0): 1_335_480_400,  # rdm-768x768
    ("sd1", 4, 768, 0): 859_520_964,
    ("sd2", 4, 1024, 0): 865_910_724,
    ("ldm8", 4, None, 0): 257_733_124,
}


def unet(name: str, in_channels: int, context_dim: int | None, concat_channels: int) -> torch.nn.Module:
    section = composed("train", "experiment=celebahq_f8", f"diffusion/network={name}").diffusion.network
    section.in_channels, section.context_dim, section.concat_channels = in_channels, context_dim, concat_channels
    return on_meta(section)


@tiered(("which", "count"), UNETS.items(), fast=4, ids=[u[0] for u in UNETS])
def test_unets_have_the_published_sizes(which: tuple, count: int):
    assert parameters(unet(*which)) == count


@pytest.mark.parametrize(
    ("experiment", "count"),
    [  # diffusers' UNet2DConditionModel with the released configs has as many
        ("sd2_inpainting", 865_925_124),
        ("sd2_depth", 865_913_604),
        ("unclip_h", 870_173_124),
        ("upscaler_x4", 473_398_020),
    ],
)
def test_sd2_variants_have_the_published_sizes(experiment: str, count: int):
    assert parameters(on_meta(composed("train", f"experiment={experiment}").diffusion.network)) == count


@pytest.mark.parametrize(("experiment", "count"), [("text2img_cc_f4", 166_590_080), ("text2img_f8", 542_895_360)])
def test_text_transformers_have_the_published_sizes(experiment: str, count: int):
    """Counts without the `to_logits` layer, which the published models contain but never use."""
    options = composed("train", f"experiment={experiment}").diffusion.conditioning.conditioners.text
    assert options.masked is False
    given = {name: options[name] for name in ("vocab_size", "dim", "depth", "heads", "max_length", "head_dim")}
    with shapes_only():
        assert parameters(TokenEncoder(**given)) == count


@pytest.mark.parametrize("experiment", ["sd2_base", "sd2_v", "sd2_inpainting", "sd2_depth", "upscaler_x4", "unclip_h"])
def test_stable_diffusion_2_pads_captions_with_id_0_and_sees_the_padding(experiment: str):
    text = composed("train", f"experiment={experiment}").diffusion.conditioning.conditioners.text
    assert (text.pad_id, text.masked) == (0, False)


def test_stable_diffusion_1_pads_captions_as_its_tokenizer_does():
    text = composed("train", "experiment=sd1").diffusion.conditioning.conditioners.text
    assert text.get("pad_id") is None
    assert text.masked is False


@pytest.mark.parametrize(
    ("experiment", "form"),
    [
        ("inpainting_places_f4", "ldm"),
        ("inpainting_places_f4_big", "ldm"),
        ("sd2_inpainting", "sd2"),
        ("shapes_inpainting", "covering"),
    ],
)
def test_published_inpainting_recipes_have_the_published_condition(experiment: str, form: str):
    conditioners = composed("train", f"experiment={experiment}").diffusion.conditioning.conditioners
    assert conditioners.masked_image.form == form


def test_unclip_takes_the_statistics_of_its_embeddings():
    assert composed("train", "experiment=unclip_h").diffusion.conditioning.conditioners.image.statistics == "unit"
    file = "diffusion.conditioning.conditioners.image.statistics=stats.safetensors"
    image = composed("train", "experiment=unclip_h", file).diffusion.conditioning.conditioners.image
    assert image.statistics == "stats.safetensors"


# The U-Nets of the paper's sweep (tables 13 and 14), in millions of parameters, recounted.
@pytest.mark.parametrize(
    ("which", "millions"),
    [
        (("imagenet_f1", 3, 512, 0), 396.8),
        (("imagenet_f2", 2, 512, 0), 390.9),
        (("imagenet_f8", 8, 512, 0), 395.0),
        (("imagenet_f8", 32, 512, 0), 395.1),
        (("celebahq_f1", 3, None, 0), 270.5),
        (("celebahq_f2", 2, None, 0), 264.5),
        (("ldm8", 8, None, 0), 257.8),
        (("ldm8", 32, None, 0), 257.9),
    ],
)
def test_unets_of_the_sweep_have_the_published_sizes(which: tuple, millions: float):
    assert round(parameters(unet(*which)) / 1e6, 1) == millions


@pytest.mark.parametrize(
    "overrides",
    [("experiment=celebahq_f8", "autoencoder=kl_f4"), ("experiment=quickstart", "autoencoder/network=kl_f4")],
)
def test_the_command_line_has_the_last_word(overrides: tuple[str, ...]):
    assert parameters(on_meta(composed("train", *overrides).autoencoder.network)) == 55_312_063


@pytest.mark.parametrize(
    "overrides",
    [
        ("experiment=celebahq_f8", "autoencoder=vq_f4", "autoencoder.lr=1e-3", "+sampler.order=3", "name=x"),
        ("experiment=shapes_f_sweep", "ablation=shapes_f8", "logger=csv", "~callbacks", "stages=[autoencoder]"),
        ("diffusion/conditioning=text", "diffusion.conditioning.conditioners.text.dim=8", "data.root='a b'"),
    ],
)
def test_the_configs_of_these_tests_are_those_that_hydra_composes(overrides: tuple[str, ...]):
    ours = composed("train", *overrides)
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        assert ours == compose("train", list(overrides))
