"""Distillation to few steps: a student's step is trained towards the result of several steps of its teacher."""

import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from chains import chain

from ldm_train.checkpoints.native import load_latent_diffusion
from ldm_train.conditioning.class_label import ClassLabel
from ldm_train.diffusion.guidance import classifier_free
from ldm_train.diffusion.objective import DiffusionObjective
from ldm_train.diffusion.schedule import NoiseSchedule
from ldm_train.latent_diffusion import LatentDiffusion, Sampling, Start
from ldm_train.models.autoencoder import AutoencoderIdentity
from ldm_train.models.first_stage import FirstStage
from ldm_train.models.unet import UNet
from ldm_train.samplers.ddim import ddim
from ldm_train.training.distillation import DistillationTask

BATCH = {"class_label": torch.tensor([0, 1, 1])}
LATENTS, NOISE = torch.randn(3, 3, 8, 8), torch.randn(3, 3, 8, 8)


def model() -> LatentDiffusion:
    network = UNet(3, 16, (1, 2), 1, (1,), head_dim=8, vector_dim=8)
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(torch.randn_like(p) * (0.5 / p[0].numel() ** 0.5 if p.ndim > 1 else 0.1))
    made = LatentDiffusion(
        network,
        FirstStage(AutoencoderIdentity()),
        NoiseSchedule(),
        {"c": ClassLabel(["a", "b"], 8)},
        latent_size=(8, 8),
    )
    made.first_stage.set_statistics(torch.ones(3), torch.zeros(3))
    return made.eval()


def task(of: LatentDiffusion, **options: object) -> DistillationTask:
    made = DistillationTask(
        of, DiffusionObjective(of.schedule), seed=0, optimizer=partial(torch.optim.Adam, lr=1e-3),
        lr_factor=lambda step: 1.0, **options,
    )  # fmt: skip
    made._trainer = SimpleNamespace(world_size=1, global_rank=0, global_step=0, log_every_n_steps=10**6)
    return made


def test_a_student_of_an_unguided_teachers_steps_has_nothing_to_learn() -> None:
    student = task(model(), steps=3, teacher_steps=1)
    assert all(float(student.distance(BATCH, student.noised(LATENTS, NOISE, k), k).max()) == 0 for k in range(3))


@torch.no_grad()
def test_the_distance_is_that_of_one_step_and_the_teachers_several() -> None:
    """Compared with DDIM's formula and guidance, a mixture of two evaluations, written out."""
    of = model()
    student, schedule = task(of, steps=4, teacher_steps=2, guidance_scale=3.0), of.schedule
    for p in of.network.parameters():  # the teacher keeps its own weights
        p.mul_(0.9)
    times = schedule.timesteps(4, "trailing")

    def step(network: LatentDiffusion, x: torch.Tensor, t: float, s: float, scale: float) -> torch.Tensor:
        (a, b), (c, d) = schedule.numbers(t), schedule.numbers(s)
        conditions = [network.condition(BATCH), network.null_condition(3)]
        eps, away = (network.network(x, torch.full((3,), t), **given) for given in conditions)
        eps = away + scale * (eps - away)
        return c * (x - b * eps) / a + d * eps

    for k in range(4):
        t, s = float(times[k]), float(times[k + 1])
        a, b = schedule.numbers(t)
        x = a * LATENTS + b * NOISE
        half = (t + s) / 2
        target = step(student.teacher, step(student.teacher, x, t, half, 3.0), half, s, 3.0)
        expected = (step(of, x, t, s, 1.0) - target).square().mean(dim=(1, 2, 3))
        torch.testing.assert_close(
            student.distance(BATCH, student.noised(LATENTS, NOISE, k), k), expected, rtol=1e-3, atol=1e-5
        )


def test_only_the_student_learns_and_the_teacher_stays_in_evaluation() -> None:
    of = model()
    student = task(of, steps=2, teacher_steps=2, guidance_scale=2.0)
    with torch.no_grad():
        for p in student.teacher.network.parameters():
            p.mul_(1.3)
    before = copy.deepcopy(student.teacher.state_dict())
    student.train()
    assert not any(m.training for m in student.teacher.modules())
    student.log_training = lambda logs: None
    optimizer = torch.optim.Adam(of.trainable().parameters(), lr=2e-3)
    torch.manual_seed(0)
    first = sum(float(student.distance(BATCH, student.noised(LATENTS, NOISE, k), k).mean()) for k in range(2))
    for _ in range(60):
        optimizer.zero_grad()
        student.training_step(BATCH | {"moments": LATENTS}, 0).backward()
        optimizer.step()
    assert (
        sum(float(student.distance(BATCH, student.noised(LATENTS, NOISE, k), k).mean()) for k in range(2)) < 0.7 * first
    )
    assert all(torch.equal(value, before[key]) for key, value in student.teacher.state_dict().items())
    assert not any("teacher" in key for key in student.state_dict())


@torch.no_grad()
def test_the_students_steps_are_those_of_its_sampler() -> None:
    """Sampling in as many steps visits the times that the student was trained at."""
    of = model()
    student, sampling = task(of, steps=3), Sampling(ddim, 3, 1.0, "trailing")
    x = NOISE
    for k in range(3):
        assert torch.equal(student.reached(BATCH, NOISE, k), x)  # also the states that it learns from
        x = student._step(of.denoiser(of.condition(BATCH)), x, k, 1)
    torch.testing.assert_close(of.sample(BATCH, [0, 1, 2], sampling, Start(noise=NOISE)), of.decode(x))


def test_student_and_teacher_see_the_same_conditions() -> None:
    """What conditioners add in training alone is left out, and their weights train all the same."""
    student = task(model())
    assert not any(part.training for part in (student.teacher, student.model.conditioners))
    assert student.model.network.training
    assert any(p.requires_grad for p in student.model.conditioners.parameters())


def test_the_teacher_is_guided_as_sampling_guides() -> None:
    student = task(model(), guidance_scale=2.0, guidance_interval=[0.5, 3.0])
    assert student.guide.func is classifier_free
    assert student.guide.keywords == {"guidance_scale": 2.0, "interval": (0.5, 3.0)}


STAGES = ("stages=[autoencoder,latents,diffusion]", "diffusion.evaluate_every=null")
STUDENT = (
    "diffusion.task._target_=ldm_train.training.distillation.DistillationTask", "+diffusion.task.steps=2",
    "+diffusion.task.teacher_steps=2", "+diffusion.task.guidance_scale=2", "sampling.guidance_scale=1",
    "sampling.guidance_interval=null", "sampling.num_inference_steps=2", "sampler.eta=0",
)  # fmt: skip


@pytest.mark.chain
@pytest.mark.slow
def test_a_student_is_a_run_like_any_other(tmp_path) -> None:
    chain(tmp_path, *STAGES, name="teacher").execute()
    with pytest.raises(ValueError, match=r"learns from a trained model; set diffusion\.init="):
        chain(tmp_path, *STAGES, *STUDENT, name="student").execute()
    begun = ("autoencoder.pretrained=teacher", "diffusion.init=teacher", "diffusion.max_steps=3")
    for wrong, message in (
        (
            ("sampler.eta=0.5", "sampling.guidance_scale=2"),
            r"set sampling\.guidance_scale=1 sampler=ddim sampler\.eta=0",
        ),
        (
            ("diffusion/objective=v",),
            r"reads its weights differently; choose the same:\n  diffusion\.objective\.parameterisation",
        ),
        (("betas.end=0.03",), r"choose the same:\n  diffusion\.schedule: "),
    ):
        with pytest.raises(ValueError, match=message):
            chain(tmp_path, *STAGES, *STUDENT, *begun, *wrong, name="other").execute()
    run = chain(tmp_path, *STAGES, *STUDENT, *begun, name="student")
    run.execute()
    drawn = load_latent_diffusion(run.folder)
    assert (drawn.sampling.num_inference_steps, drawn.sampling.guidance_scale) == (2, 1)
    assert torch.isfinite(drawn.sample({"class_label": torch.tensor([0])}, [0])).all()
    assert (run.folder / "diffusion" / "images").is_dir()


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_share_of_batches_starts_from_the_students_own_states(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    student, asked = task(model(), steps=3, own_states=share), []
    student.log_training = lambda logs: None
    monkeypatch.setattr(student, "distance", lambda batch, x_t, step: asked.append((x_t, step)) or torch.zeros(3))
    monkeypatch.setattr(student.objective, "draw_noise", lambda latents: NOISE)
    torch.manual_seed(0)
    for _ in range(8):
        student.training_step(BATCH | {"moments": LATENTS}, 0)
    assert {step for _, step in asked} == {0, 1, 2}
    for x_t, step in asked:
        expected = student.reached(BATCH, NOISE, step) if share else student.noised(LATENTS, NOISE, step)
        torch.testing.assert_close(x_t, expected)


def test_a_share_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="own_states is a share from 0 to 1, not 2"):
        task(model(), own_states=2.0)


def test_a_student_has_no_loss_beside_its_own() -> None:
    of = model()
    with pytest.raises(ValueError, match="a student has a loss of its own"):
        DistillationTask(
            of, DiffusionObjective(of.schedule, weighting="learned"), seed=0, optimizer=partial(torch.optim.Adam, lr=1e-3),
            lr_factor=lambda step: 1.0,
        )  # fmt: skip
