"""Distillation into few-step students: a model learns to do in one step what its guided teacher does in several."""

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from ldm_train.conditioning.text import FrozenText
from ldm_train.devices import to_device
from ldm_train.diffusion.guidance import Denoise, classifier_free
from ldm_train.diffusion.objective import DiffusionObjective
from ldm_train.latent_diffusion import LatentDiffusion
from ldm_train.rng import NoiseSource
from ldm_train.samplers.ddim import ddim
from ldm_train.training.diffusion_task import DiffusionTask, validation_draws


class DistillationTask(DiffusionTask):
    """Progressive distillation (Salimans and Ho 2022, arXiv:2202.00512, section 3) in a single round, of the guided
    teacher (Meng et al. 2023, arXiv:2210.03142). From noised training latents at one of the student's timesteps, the
    student's DDIM step to its next timestep is trained towards the result of `teacher_steps` guided DDIM steps. The
    loss is the mean squared distance of the two results, so an error counts by how far it moves the sample, whatever
    the network predicts.

    model: starts with the teacher's weights; the teacher is a frozen copy, sharing first stage and frozen text encoders
    steps, spacing: of the student when it is sampled afterwards (with eta 0, guidance scale 1)
    teacher_steps: steps of the teacher per student step
    guidance_scale, guidance_interval: of the teacher, see `classifier_free`
    own_states: share of batches that start from states the student itself reached from noise, as in sampling, instead
        of from noised latents (cf. the multi-step training of Yin et al. 2024, arXiv:2405.14867, section 4.4)
    Other arguments as in `DiffusionTask`. Raises ValueError for counts below 1, own_states outside [0, 1], a non-zero
    alignment, or an objective with learned weights.
    """

    needs_init = True  # requires a trained model to start from

    def __init__(
        self,
        model: LatentDiffusion,
        objective: DiffusionObjective,
        *,
        steps: int = 4,
        teacher_steps: int = 4,
        guidance_scale: float = 1.0,
        guidance_interval: Sequence[float] | None = None,
        spacing: str = "trailing",
        own_states: float = 0.5,
        **options: Any,
    ):
        if steps < 1 or teacher_steps < 1:
            raise ValueError(f"a student takes at least one step, and for each the teacher: {steps}, {teacher_steps}")
        if not 0 <= own_states <= 1:
            raise ValueError(f"own_states is a share from 0 to 1, not {own_states}")
        super().__init__(model, objective, **options)
        self.own_states = own_states
        if self.alignment is not None or list(objective.parameters()):
            raise ValueError(
                "a student has a loss of its own: diffusion.task.alignment=0, and an objective without learned weights"
            )
        shared = [model.first_stage, *(c for c in model.conditioners.values() if isinstance(c, FrozenText))]
        self.teacher = copy.deepcopy(model, {id(part): part for part in shared}).eval().requires_grad_(False)
        self.times, self.teacher_steps = model.schedule.timesteps(steps, spacing), teacher_steps
        interval = {} if guidance_interval is None else {"interval": tuple(guidance_interval)}
        self.guide = partial(classifier_free, guidance_scale=guidance_scale, **interval)
        self.train()  # Lightning keeps the mode that a module has when training begins

    @staticmethod
    def check_sampling(options: Mapping[str, Any], sampling: Mapping[str, Any], sampler: Mapping[str, Any]) -> None:
        """Raises ValueError if a student with these options of its task is sampled differently than it is trained for.
        sampling, sampler: as the run records them."""
        steps, spacing = options.get("steps", 4), options.get("spacing", "trailing")
        wanted = {"num_inference_steps": steps, "guidance_scale": 1, "spacing": spacing}
        wrong = [f"sampling.{name}={value}" for name, value in wanted.items() if sampling.get(name) != value]
        if not str(sampler["_target_"]).endswith(".ddim") or sampler.get("eta"):
            wrong.append("sampler=ddim sampler.eta=0")
        if wrong:
            raise ValueError(
                f"a student of {steps} steps is sampled as it is trained; set {' '.join(wrong)} (steps and spacing are "
                "those of diffusion.task)"
            )

    def train(self, mode: bool = True) -> "DistillationTask":
        super().train(mode)
        # What conditioners add in training alone, such as noise on low-resolution images, would be the student's only.
        for part in (self.teacher, self.model.conditioners):
            part.eval()
        return self

    def _step(self, denoise: Denoise, x_t: torch.Tensor, step: int, parts: int) -> torch.Tensor:
        """Takes `parts` equal DDIM steps from the student's timestep `step` (an index) to its next."""
        first, last = self.times[step : step + 2].tolist()
        times = torch.linspace(first, last, parts + 1, dtype=torch.float64)
        return ddim(denoise, x_t, times, self.model.schedule, NoiseSource([0] * len(x_t)))  # eta 0: no noise

    @torch.no_grad()
    def reached(self, batch: dict[str, Any], noise: torch.Tensor, step: int) -> torch.Tensor:
        """Returns the state (B, C, h, w) that the student's own steps reach from noise at its timestep `step`."""
        denoise, x_t = self.model.denoiser(self.model.condition(batch)), noise
        for earlier in range(step):
            x_t = self._step(denoise, x_t, earlier, 1)
        return x_t

    def distance(self, batch: dict[str, Any], x_t: torch.Tensor, step: int) -> torch.Tensor:
        """Returns the mean squared distance (B,) of the student's result from the teacher's, given x_t (B, C, h, w)."""
        with torch.no_grad():
            known = self.teacher.denoiser(self.teacher.condition(batch))
            guided = known
            if self.teacher.conditioners:
                null = self.teacher.sampled_condition({}, len(x_t), x_t.shape[2:], batch)
                guided = self.guide(known, self.teacher.denoiser(null))
            target = self._step(guided, x_t, step, self.teacher_steps)
        reached = self._step(self.model.denoiser(self.model.condition(batch)), x_t, step, 1)
        return (reached - target).square().mean(dim=(1, 2, 3))

    def noised(self, latents: torch.Tensor, noise: torch.Tensor, step: int) -> torch.Tensor:
        """Returns latents noised to the student's timestep `step`."""
        alpha, sigma = self.model.schedule.numbers(float(self.times[step]))
        return alpha * latents + sigma * noise

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        latents = self.model.latents_from(batch)
        step, own = int(torch.randint(len(self.times) - 1, ())), float(torch.rand(())) < self.own_states
        noise = self.objective.draw_noise(latents)
        x_t = self.reached(batch, noise, step) if own else self.noised(latents, noise, step)
        loss = self.distance(batch, x_t, step)
        weighted = loss
        if "loss_weight" in batch:
            weighted = weighted * to_device(batch["loss_weight"], weighted.device)
        self.log_training({"loss": loss.detach().mean(), f"loss_step{step}": loss.detach().mean()})
        return weighted.mean()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        source, _ = validation_draws(batch["key"], self.model.schedule)
        latents = self.validation_latents(batch, source)
        noise = source.normal(latents.shape[1:], "noise", latents.device)
        states = [self.noised(latents, noise, step) for step in range(len(self.times) - 1)]
        distances = torch.stack([self.distance(batch, x_t, step) for step, x_t in enumerate(states)])
        self.add("loss", distances.mean(dim=0))
        if batch_idx == 0:
            self.remember(batch, latents)
