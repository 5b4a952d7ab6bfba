"""No code waits for an accelerator, mixes devices or needs float64 there: the steps of every family run on the meta
device, which has no values and, in these tests, no float64, like Apple's GPUs.

No waits in a training step and in sampling; one per batch if pictures are encoded or measured. The table in
ldm_train/README.md under "Devices" says what the host still reads, and why.
"""

import copy
from collections.abc import Iterator
from contextlib import suppress
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from chains import composed
from devices import Watched, without_float64
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from tiers import tiered

from ldm_train.conditioning.control import ControlNet
from ldm_train.conditioning.image_embedding import ImageEmbedding
from ldm_train.conditioning.text import train_tokenizer
from ldm_train.configuration import config_folder
from ldm_train.data.encoding import both_encoded
from ldm_train.devices import Uninitialised, device_of, to_device
from ldm_train.diffusion.guidance import classifier_free, classifier_guidance, score_guidance
from ldm_train.diffusion.objective import DiffusionObjective
from ldm_train.diffusion.schedule import NoiseSchedule
from ldm_train.evaluation.evaluator import parse_metrics
from ldm_train.evaluation.report import measure_reconstructions
from ldm_train.latent_diffusion import Guidance, LatentDiffusion, Sampling, Start
from ldm_train.losses.autoencoder import AutoencoderLoss
from ldm_train.losses.perceptual import TinyPerceptual
from ldm_train.metrics.features import TinyEval
from ldm_train.metrics.measures import Collected
from ldm_train.models.autoencoder import AutoencoderKL, AutoencoderVQ
from ldm_train.models.classifier import NoisyClassifier
from ldm_train.models.discriminator import PatchDiscriminator
from ldm_train.models.first_stage import FirstStage
from ldm_train.models.lora import LoRA
from ldm_train.models.tiling import Tiles
from ldm_train.pipeline.diffusion import first_stage_tree, latent_size, model_tree
from ldm_train.pipeline.latents import encoded_on
from ldm_train.pipeline.machine import machine_of
from ldm_train.training.autoencoder_task import AutoencoderTask
from ldm_train.training.classifier_task import ClassifierTask
from ldm_train.training.diffusion_task import DiffusionTask
from ldm_train.training.distillation import DistillationTask
from ldm_train.training.fit import Machine
from ldm_train.training.task import NotFinite, Task
from ldm_train.unclip import ImageEmbeddings

CONTROL = "diffusion.conditioning.conditioners.control"
RECIPES = {
    "nothing": ("shapes_unconditional",),
    "classes and captions": ("quickstart",),
    "classes": ("shapes_class",),
    "captions": ("shapes_text",),
    "layouts": ("shapes_layout",),
    "label maps": ("shapes_semantic",),
    "small pictures": ("shapes_superres",),
    "masked pictures": ("shapes_inpainting",),
    "pictures": ("shapes_image",),
    "edges": ("shapes_unconditional", "diffusion/conditioning=edges"),
    "depth": ("shapes_unconditional", "diffusion/conditioning=depth"),
    "edges that steer": ("shapes_control",),
    "depth that steers": ("shapes_control", f"{CONTROL}._target_=ldm_train.conditioning.control.DepthControl"),
    "label maps that steer": ("shapes_control", f"{CONTROL}._target_=ldm_train.conditioning.control.SegmentationControl",
                              f"+{CONTROL}.num_labels=7"),
    "a flow": ("shapes_class", "diffusion/objective=flow"),
    "velocity": ("shapes_class", "diffusion/objective=v"),
    "learned uncertainty": ("shapes_class", "diffusion/objective=epsilon_learned"),
    "a transformer": ("shapes_text", "diffusion/network=dit"),
    "noised small pictures": ("shapes_superres", "diffusion.conditioning.conditioners.lowres.noise_levels=100",
                              "diffusion.conditioning.vector_dim=256"),
}  # fmt: skip
# A batch of two for every field, as the loader gives it: on the host.
FIELDS: dict[str, Any] = {
    "class_label": torch.tensor([1, 0]), "caption": ["a red circle", "a blue square"],
    "boxes": [torch.tensor([[0.1, 0.1, 0.5, 0.5, 1.0]]), torch.zeros(0, 5)],
    "segmentation": torch.ones(2, 32, 32, dtype=torch.long), "lowres": torch.zeros(2, 3, 8, 8),
    "masked_image": torch.zeros(2, 4, 32, 32), "edges": torch.rand(2, 1, 32, 32), "depth": torch.rand(2, 1, 32, 32),
    "reference": torch.zeros(2, 3, 32, 32),
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _without_float64() -> Iterator[None]:
    with without_float64():
        yield


def shallow(network: DictConfig) -> None:
    """Reduces a network to as few layers as have one of each kind; a kind of layer that waits does so at any depth."""
    if "depth" in network:
        network.depth = 2
    else:
        network.channel_mult, network.num_res_blocks = network.channel_mult[:2], 1
        network.attention_levels = [1] if network.attention_levels else []


@cache
def model_of(recipe: str) -> tuple[LatentDiffusion, DiffusionObjective]:
    """Returns a recipe's model, on the meta device, and its objective."""
    experiment, *options = RECIPES[recipe]
    config = composed("train", f"experiment={experiment}", *options)
    shallow(config.diffusion.network)
    conditioners = OmegaConf.to_container(config.diffusion.conditioning.conditioners, resolve=True)
    for conditioner in conditioners.values():
        conditioner |= {option: 7 for option in ("classes", "labels") if conditioner.get(option) == "from_data"}
        if conditioner.get("tokenizer") == "from_data":
            conditioner["tokenizer"] = train_tokenizer(["a red circle"], conditioner.pop("vocab_size")).to_str()
    network = OmegaConf.to_container(config.autoencoder.network, resolve=True)
    size = latent_size(config, instantiate(network, _convert_="all"))
    model = instantiate(model_tree(config, first_stage_tree(network), conditioners, size), _convert_="all")
    options = OmegaConf.to_container(config.diffusion.objective, resolve=True)
    options = {k: v for k, v in options.items() if k not in ("_target_", "parameterisation")}
    objective = DiffusionObjective(model.schedule, model.parameterisation, **options).to("meta")
    for conditioner in model.conditioners.values():
        if isinstance(conditioner, ImageEmbedding):
            conditioner.encoder.to("meta")  # otherwise the first batch would move it there
    return model.to("meta"), objective


def stepped(task: Task, batch: dict[str, Any]) -> list[str]:
    """Returns the waits of one training step: forward, backward, clipping, averaging. batch: as the loader gives it."""
    task._trainer = SimpleNamespace(
        world_size=1, global_rank=0, global_step=100, log_every_n_steps=50, precision_plugin=None
    )
    logged: dict[str, Any] = {}
    task.log_training = logged.update
    task.to("meta").train()
    batch = task.transfer_batch_to_device(batch, torch.device("meta"), 0)
    task.setup("fit")  # creates the averaged weights
    optimizer = task.optimizer(task.groups())
    optimizer._step_supports_amp_scaling = True  # like a fused optimizer, which does not exist for this device
    with Watched() as watched:
        task.training_step(batch, 0).backward()
        task.configure_gradient_clipping(optimizer)
        task.ema.update()
    assert optimizer.found_inf.is_meta
    assert "loss" in logged or "nll" in logged
    assert all(p.grad is not None for group in task.groups() for p in group["params"])
    return watched.waits


OPTIMISATION = {"seed": 0, "optimizer": partial(torch.optim.Adam, lr=1e-3), "lr_factor": lambda step: 1.0,
                "ema_decay": 0.9, "clip_norm": 1.0}  # fmt: skip


@tiered("recipe", RECIPES, fast=5)
def test_a_step_of_the_denoiser_waits_for_nothing(recipe: str):
    model, objective = model_of(recipe)
    batch = {k: FIELDS[k] for k in model.fields} | {"key": ["a", "b"], "loss_weight": torch.ones(2)}
    batch["moments"] = torch.zeros(2, 2 * model.first_stage.latent_channels, *model.latent_size)
    assert stepped(DiffusionTask(model, objective, **OPTIMISATION), batch) == []


@pytest.mark.parametrize("targets", ["attention", "all"])
def test_a_step_of_an_adapter_waits_for_nothing(targets: str):
    model, objective = copy.deepcopy(model_of("classes"))  # a copy: other tests use the cached model unchanged
    with torch.device("meta"):
        model.adapt(LoRA(rank=2, targets=targets), "adapter")
    batch = {k: FIELDS[k] for k in model.fields} | {"key": ["a", "b"]}
    batch["moments"] = torch.zeros(2, 2 * model.first_stage.latent_channels, *model.latent_size)
    assert stepped(DiffusionTask(model, objective, **OPTIMISATION), batch) == []


def test_a_step_of_a_control_waits_for_nothing():
    model, objective = copy.deepcopy(model_of("edges that steer"))
    model.adapt(ControlNet(), "adapter")
    batch = {k: FIELDS[k] for k in model.fields} | {"key": ["a", "b"]}
    batch["moments"] = torch.zeros(2, 2 * model.first_stage.latent_channels, *model.latent_size)
    assert stepped(DiffusionTask(model, objective, **OPTIMISATION), batch) == []


def test_embeddings_are_made_and_drawn_without_a_wait():
    model, _ = model_of("pictures")
    options = {"num_inference_steps": 3, "sampler": SAMPLERS["ddim"], "guidance_scale": 3.0, "spacing": "trailing"}
    first_stage = FirstStage(ImageEmbeddings(model.eval(), options)).to("meta")
    with Watched() as watched:
        latents = first_stage.scaled(first_stage.encode_moments(torch.zeros(2, 3, 32, 32, device="meta")))
        assert first_stage.decode(latents, seeds=[0, 1]).is_meta
    assert watched.waits == []


def test_a_step_of_a_student_waits_for_nothing():
    model, objective = model_of("classes")
    batch = {k: FIELDS[k] for k in model.fields} | {"key": ["a", "b"], "loss_weight": torch.ones(2)}
    batch["moments"] = torch.zeros(2, 2 * model.first_stage.latent_channels, *model.latent_size)
    for share in (0.0, 1.0):
        options = {"guidance_scale": 2.0, "guidance_interval": [0.5, 5.0], "own_states": share}
        task = DistillationTask(model, objective, **options, **OPTIMISATION)
        torch.manual_seed(5)  # selects the last of the student's steps
        assert stepped(task, batch) == []


SAMPLERS = {
    path.stem: instantiate(OmegaConf.load(path), _convert_="all")
    for path in sorted((config_folder() / "sampler").glob("*.yaml"))
}


def drawn(model: LatentDiffusion, how: Sampling, start: Start | None = None, **guidance: Any) -> list[str]:
    """Returns the waits of sampling one batch of pictures."""
    with Watched() as watched:
        images = model.sample({k: FIELDS[k] for k in model.fields}, [0, 1], how, start, Guidance(**guidance))
    assert images.is_meta
    return watched.waits


@tiered("recipe", RECIPES, fast=4)
def test_sampling_waits_for_nothing(recipe: str):
    model, _ = model_of(recipe)
    rule = partial(classifier_free, interval=(0.5, 5.0), rescale=0.5, threshold=99.0)
    assert drawn(model.eval(), Sampling(partial(SAMPLERS["ddim"], eta=1.0), 4, 3.0), rule=rule) == []


@pytest.mark.parametrize("process", ["classes", "a flow"])
@tiered("sampler", SAMPLERS, fast=3)
def test_no_sampler_waits(sampler: str, process: str):
    model, _ = model_of(process)
    assert (
        drawn(model.eval(), Sampling(SAMPLERS[sampler], 4, 3.0, "trailing" if process == "classes" else "linspace"))
        == []
    )


def test_pictures_to_begin_from_and_holes_are_not_waited_for():
    model, _ = model_of("classes")
    model.eval()
    given = torch.zeros(2, model.first_stage.latent_channels, *model.latent_size)
    how = Sampling(SAMPLERS["ddim"], 4, 1.0)
    assert drawn(model, how, Start(latents=given, strength=0.5)) == []
    assert drawn(model, how, Start(known=given, mask=given[:, :1])) == []
    with Watched() as watched:
        model.invert(given, {"class_label": FIELDS["class_label"]}, how)
    assert watched.waits == []


def test_guides_are_not_waited_for():
    model, _ = model_of("classes")
    classifier = NoisyClassifier(
        model.first_stage.latent_channels, model.latent_size, 3, channels=32, channel_mult=(1, 2)
    ).to("meta")
    labels = torch.zeros(2, dtype=torch.long, device="meta")

    def log_probability(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return classifier(x, t).log_softmax(dim=1).gather(1, labels[:, None])[:, 0]

    outer = (partial(classifier_guidance, log_probability=log_probability, schedule=model.schedule, guidance_scale=2.0),
             partial(score_guidance, score=lambda x0: model.first_stage.decoded(x0).mean(dim=(1, 2, 3)), schedule=model.schedule,
                     guidance_scale=2.0))  # fmt: skip
    assert drawn(model.eval(), Sampling(SAMPLERS["ddim"], 4, 2.0), outer=outer) == []


def test_a_step_of_the_classifier_waits_for_nothing():
    model, _ = model_of("classes")
    network = NoisyClassifier(model.first_stage.latent_channels, model.latent_size, 3, channels=32, channel_mult=(1, 2))
    batch = {"class_label": FIELDS["class_label"], "image": torch.zeros(2, 3, 32, 32)}
    assert stepped(ClassifierTask(network, model.first_stage, model.schedule, **OPTIMISATION), batch) == []


SIZES = {"z_channels": 4, "channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1}
AUTOENCODERS = {
    "kl": partial(AutoencoderKL, **SIZES),
    "vq": partial(AutoencoderVQ, **SIZES, num_codes=16),
    "vq averaged and restarted": partial(AutoencoderVQ, **SIZES, num_codes=16, codebook_ema=0.9, restart_after=2),
}


@pytest.mark.parametrize("step", [0, 60, 100], ids=["alone", "discriminator", "both"])
@pytest.mark.parametrize("kind", AUTOENCODERS)
def test_a_step_of_the_autoencoder_waits_for_nothing(kind: str, step: int):
    loss = AutoencoderLoss(
        TinyPerceptual(), PatchDiscriminator(channels=8, num_layers=2), disc_start=200 - step, disc_warmup=40,
        reduction="sum" if kind == "kl" else "mean", learn_logvar=True,
    )  # fmt: skip
    assert (
        stepped(AutoencoderTask(AUTOENCODERS[kind](), loss, **OPTIMISATION), {"image": torch.zeros(2, 3, 32, 32)}) == []
    )


MEASURED = (
    "nothing",
    "classes and captions",
    "a flow",
)  # sampling with the other recipes is tested above; in the slow tier they are measured too


@pytest.mark.parametrize("recipe", [r if r in MEASURED else pytest.param(r, marks=pytest.mark.slow) for r in RECIPES])
def test_a_measured_batch_of_samples_is_waited_for_once(recipe: str):
    model, _ = model_of(recipe)
    metrics = parse_metrics(["fid_tiny", "kid_tiny", "precision_tiny", "recall_tiny"], ["tiny"])
    made = Collected(metrics, {"tiny": TinyEval().to("meta")})
    how = Sampling(SAMPLERS["ddim"], 2, 3.0)
    with Watched() as watched:
        images = model.eval().sample({k: FIELDS[k] for k in model.fields}, [0, 1], how)
        made.add(images, torch.arange(2), FIELDS["caption"])
    assert len(watched.waits) == 1
    assert not made.sets["tiny"].kept()[0].is_meta


@pytest.mark.parametrize("kind", AUTOENCODERS)
def test_a_measured_batch_of_reconstructions_is_waited_for_once(kind: str):
    first_stage = FirstStage(AUTOENCODERS[kind]()).to("meta")
    evaluator = SimpleNamespace(
        device=torch.device("meta"), paired=["psnr", "ssim", "perceptual"], metrics=parse_metrics(["fid_tiny"], ["tiny"]),
        extractors={"tiny": TinyEval().to("meta")}, networks={"perceptual": TinyPerceptual().to("meta")},
    )  # fmt: skip
    values: dict[str, list[torch.Tensor]] = {name: [] for name in evaluator.paired}
    rebuilt = Collected(evaluator.metrics, evaluator.extractors)
    with Watched() as watched, torch.no_grad():
        latents, _ = measure_reconstructions(
            first_stage, torch.zeros(2, 3, 32, 32), torch.arange(2), evaluator, values, rebuilt
        )
        latents.cpu()
    assert len(watched.waits) == 1
    assert not any(v[0].is_meta for v in values.values())


@pytest.mark.parametrize("kind", AUTOENCODERS)
def test_a_cached_batch_is_waited_for_once(kind: str):
    first_stage = FirstStage(AUTOENCODERS[kind]()).to("meta")
    images = torch.zeros(2, 3, 32, 32)
    with Watched() as watched:
        moments, mirrored = both_encoded(partial(encoded_on, first_stage, torch.device("meta")), images, flips=True)
    assert len(watched.waits) == 1
    assert moments.shape == mirrored.shape
    assert not moments.is_meta


@pytest.mark.parametrize("kind", AUTOENCODERS)
def test_tiled_decoding_mixes_no_devices(kind: str):
    first_stage = FirstStage(AUTOENCODERS[kind]()).to("meta")
    with Watched():  # it waits for each tile, which is kept on the host
        first_stage.decode(torch.zeros(1, 4, 24, 24, device="meta"), tiles=Tiles(16, 4))


def test_metrics_are_waited_for_once_where_they_are_written():
    model, objective = model_of("classes")
    task = DiffusionTask(model, objective, **OPTIMISATION).to("meta")
    task._trainer = SimpleNamespace(global_step=49, log_every_n_steps=50, precision_plugin=None)
    task.log_dict = lambda logs: None
    optimizer = task.optimizer(task.groups())
    optimizer._step_supports_amp_scaling = True
    for p in (p for group in task.groups() for p in group["params"]):
        p.grad = torch.zeros_like(p)
    with Watched() as watched, suppress(NotFinite):  # the norm is not a real value on the meta device
        task.configure_gradient_clipping(optimizer)
    assert len(watched.waits) == 1


def test_ranks_leave_what_is_on_the_host_there():
    strategy = Machine("gpu", "32", world_size=2, local_world_size=2).strategy()
    assert strategy.determine_ddp_device_ids() is None  # DDP would move the inputs to these devices


def test_apples_device_is_chosen_where_it_is_there_and_named_where_it_is_not(monkeypatch: pytest.MonkeyPatch):
    config = OmegaConf.create({"accelerator": "auto", "precision": "auto"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    machine = machine_of(config, {})
    assert (machine.accelerator, machine.device.type, machine.precision) == ("mps", "mps", "32")
    with pytest.raises(ValueError, match="devices=2, but mps is one device; use devices=1"):
        machine_of(config, {"WORLD_SIZE": "2"})
    with pytest.raises(ValueError, match="precision=16-mixed needs a CUDA GPU; use precision=32 on mps"):
        Machine("mps", "16-mixed")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert device_of("auto").type == "cpu"
    with pytest.raises(ValueError, match=r"accelerator=mps, but .* is there.*; use accelerator=cpu"):
        device_of("mps")


def test_what_is_uploaded_becomes_float32_where_there_is_no_float64():
    assert to_device(torch.zeros(2, dtype=torch.float64), "meta").dtype == torch.float32
    assert to_device(torch.zeros(2, dtype=torch.float64), "cpu").dtype == torch.float64


def test_parameters_that_are_read_next_are_not_drawn_and_buffers_are_made():
    state = torch.get_rng_state()
    with Uninitialised():
        torch.nn.Linear(64, 64), torch.nn.Embedding(9, 64)
        made = [NoiseSchedule(), torch.nn.BatchNorm2d(8)]
    assert torch.equal(torch.get_rng_state(), state)
    for module, usual in zip(made, (NoiseSchedule(), torch.nn.BatchNorm2d(8))):
        assert all(torch.equal(a, b) for a, b in zip(module.buffers(), usual.buffers(), strict=True))


def test_what_waits_and_what_mixes_is_seen():
    x, mask = torch.zeros(3, device="meta"), torch.zeros(3, dtype=torch.bool, device="meta")
    waiting = [
        lambda: float(x.sum()), lambda: bool(mask.any()), lambda: x.tolist(), lambda: x.cpu(), lambda: x[mask], lambda: mask.nonzero(),
        lambda: torch.zeros(3).to("meta"), lambda: x.copy_(torch.zeros(3)), lambda: torch.zeros(3).copy_(x),
        lambda: x[torch.tensor([0])],
    ]  # fmt: skip
    for act in waiting:
        with Watched() as watched:
            act()
        assert len(watched.waits) == 1
    with Watched() as watched:
        to_device(torch.zeros(3), "meta")
        assert (x + torch.tensor(1.0)).is_meta
    assert watched.waits == []
    with Watched(), pytest.raises(AssertionError, match="mixes devices"):
        x + torch.zeros(3)
    with Watched(), pytest.raises(AssertionError, match="float64 on the device"):
        x.double()
    with Watched() as watched:
        (x + 1).cpu(), x.cpu(), x[:1].cpu()
    assert len(watched.waits) == 1  # the device had finished everything at the first read
    with Watched() as watched:
        (x + 1).cpu(), (x + 2).cpu()
    assert len(watched.waits) == 2
