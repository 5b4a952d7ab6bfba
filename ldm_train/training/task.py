"""The base class of all training tasks: reseeding, weight averaging, clipping, checkpoints, validation means."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from PIL import Image
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from ldm_train import images, rng
from ldm_train.devices import to_device
from ldm_train.distributed import gathered, world_size
from ldm_train.training.optim import EMA, clip_by_group

BINS = 4  # equal parts of the schedule for which validation is reported separately
SKIPS = 10  # consecutive steps without a finite gradient before training returns to the last checkpoint
SCALER_SKIPS = 50  # the same in 16-mixed, where the gradient scaler needs some skipped steps to find its scale


class NotFinite(FloatingPointError):
    """Raised if gradients stay non-finite or weights have become so; the message says what to change."""

    def __init__(self, stage: str, what: str, step: int):
        super().__init__(
            f"the {stage} {what} not finite at step {step}. Run the stage again with a lower {stage}.lr, gradient clipping or "
            f"precision=32: restart={stage} {stage}.clip_norm=1 (what is there goes to .replaced)"
        )


class Task(L.LightningModule):
    """One training stage, with Lightning's automatic optimisation and one optimiser.

    stage       the stage's name; part of the seed of every micro-batch
    seed        the run's seed
    optimizer   partial: parameter groups -> optimiser (its lr is the one that reaches the optimiser)
    lr_factor   step -> factor on the learning rate
    ema_decay   decay of the averaged weights; None: no averaging. ema_width: another averaging profile, see `EMA`
    clip_norm   gradient norm limit per parameter group; None: no clipping
    accumulate  micro-batches per optimiser step

    A step whose gradient is not finite changes no weights (counted in train/skipped_steps). After SKIPS of them in a
    row (SCALER_SKIPS in 16-mixed) the task raises NotFinite, and `fit` returns to the last checkpoint with `attempt`
    increased by one, which changes all random numbers.
    """

    shown: tuple[str, ...] = ("loss",)  # names of the logged training metrics that the progress bar shows

    def __init__(
        self,
        stage: str,
        seed: int,
        optimizer: partial,
        lr_factor: Callable[[int], float],
        ema_decay: float | None = None,
        ema_width: float | None = None,
        clip_norm: float | None = None,
        accumulate: int = 1,
    ):
        super().__init__()
        self.stage, self.seed, self.optimizer, self.lr_factor = stage, seed, optimizer, lr_factor
        self.ema_decay, self.ema_width = ema_decay, ema_width
        self.clip_norm, self.accumulate = clip_norm, accumulate
        self.ema: EMA | None = None
        self.attempt = self.skipped = self._skipped_in_row = 0
        # On an accelerator: steps skipped since the last read, the current run of skipped steps, the longest run.
        self._skips: torch.Tensor | None = None
        self._most_skips = SKIPS
        self._sums: dict[str, tuple[float, int]] = {}
        self._micro = 0  # the number of this micro-batch in its step
        self._logs: dict[str, list[torch.Tensor]] = {}
        self._clocked: int | None = None

    def trained(self) -> nn.ModuleDict:
        """The parts that this stage trains. Its checkpoints hold exactly these and are loaded strictly."""
        raise NotImplementedError

    def averaged(self) -> nn.Module:
        """The module whose weights are averaged and saved as the model."""
        raise NotImplementedError

    def groups(self) -> list[dict]:
        """Parameter groups, each with a "name"."""
        raise NotImplementedError

    # -- optimisation ------------------------------------------------------------------------------------------------

    def new_optimizer(self) -> torch.optim.Optimizer:
        """Returns a new optimiser for the parameter groups. If the optimiser has a `split`, it is called as (groups,
        the averaged module) and returns the groups to use: such an optimiser treats the weights of layers specially."""
        groups, split = self.groups(), getattr(self.optimizer.func, "split", None)
        return self.optimizer(groups if split is None else split(groups, self.averaged()))

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = self.new_optimizer()
        factor = LambdaLR(optimizer, lambda step: self.lr_factor(step if self._clocked is None else self._clocked))
        schedule = {"scheduler": factor, "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    @property
    def schedule_step(self) -> int:
        """The step at which schedules are evaluated: the optimiser step, or the one set by the `Clock`."""
        return self.global_step if self._clocked is None else self._clocked

    @schedule_step.setter
    def schedule_step(self, step: int) -> None:
        self._clocked = step

    def setup(self, stage: str) -> None:
        if self.ema_decay is not None and self.ema is None:
            self.ema = EMA(self.averaged(), self.ema_decay, self.ema_width)

    def on_train_start(self) -> None:
        # A checkpoint holds the learning rate of its own schedule, which another max_steps has changed.
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = group["initial_lr"] * self.lr_factor(self.schedule_step)

    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
        # Everything random in a micro-batch depends on this seed only, so a resumed run equals an uninterrupted one.
        again = (self.attempt,) if self.attempt else ()
        self._micro = batch_idx % self.accumulate
        rng.reseed(self.seed, self.stage, self.global_step, self._micro, self.global_rank, *again)
        # The step under which Lightning logs. A training that continues after a validation has counted one too many.
        self.trainer.fit_loop.epoch_loop._batches_that_stepped = self.global_step

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, *options: Any, **named: Any) -> None:
        # Lightning lets fused optimisers unscale 16-mixed gradients themselves, but after clipping.
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            scaler.unscale_(optimizer)
        norms = clip_by_group(optimizer.param_groups, self.clip_norm)
        if self.logs_now:
            self.log_dict({f"train/grad_norm_{name}": norm for name, norm in norms.items()})
        finite, most = torch.stack(list(norms.values())).isfinite().all(), SKIPS if scaler is None else SCALER_SKIPS
        if self._leaves_skipping_to(optimizer):
            if scaler is None:
                optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
            return self._count_on_device(finite, most)
        if finite:
            self._skipped_in_row = 0
            return
        self.skipped += 1
        self._skipped_in_row += 1
        if self._skipped_in_row >= most:
            self._skipped_in_row = 0
            raise NotFinite(self.stage, "gradient is", self.global_step)
        if scaler is None:  # the scaler skips such steps itself
            optimizer.zero_grad(set_to_none=True)  # an optimiser skips parameters without a gradient

    def _leaves_skipping_to(self, optimizer: torch.optim.Optimizer) -> bool:
        """Returns True if the optimiser itself skips a step when its `found_inf` tensor says that a gradient is not
        finite, so that the host need not wait for the device: true of fused optimisers on an accelerator."""
        return self.device.type != "cpu" and getattr(optimizer, "_step_supports_amp_scaling", False)

    def _count_on_device(self, finite: torch.Tensor, most: int) -> None:
        """Counts a step on the device. The counts are read, and NotFinite is raised if there were too many, when
        metrics are written and before checkpoints are saved."""
        total, row, longest = torch.zeros(3, device=finite.device) if self._skips is None else self._skips
        bad = (~finite).float()
        row = (row + 1) * bad
        self._skips = torch.stack([total + bad, row, torch.maximum(longest, row)])
        self._most_skips = most
        if self.logs_now:
            self.check_skips()

    def check_skips(self) -> None:
        """Reads the counts of skipped steps from the device. Raises NotFinite if there were too many in a row."""
        if self._read_skips() >= self._most_skips:
            self._skips = None
            raise NotFinite(self.stage, "gradient is", self.global_step)

    def _read_skips(self) -> int:
        """Adds the device's count of skipped steps to `skipped`; returns the longest run of consecutive ones."""
        if self._skips is None:
            return 0
        (total, row, longest), device = self._skips.tolist(), self._skips.device
        self.skipped += int(total)
        self._skips = to_device(torch.tensor([0.0, row, longest]), device)
        return int(longest)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.ema is not None:
            self.ema.update()

    # Lightning uses a logged "step" as the x-axis of the metrics logged with it; its own step counts from 0.

    @property
    def logs_now(self) -> bool:
        """True if this step's metrics are written. Those of other steps are not logged at all, since Lightning copies
        each number to the device and waits for the copy."""
        return (self.global_step + 1) % self.trainer.log_every_n_steps == 0

    def log_training(self, logs: Mapping[str, torch.Tensor]) -> None:
        """Logs numbers of a micro-batch: the mean over the micro-batches of the step, on all ranks, that have them."""
        if not self.logs_now:
            return
        if self._micro == 0:
            self._logs = {}
        for name, value in logs.items():
            self._logs.setdefault(name, []).append(torch.as_tensor(value).detach())
        if self._micro + 1 < self.accumulate:
            return
        means = {name: torch.stack(values).float().mean() for name, values in self._logs.items()}
        if world_size() > 1:  # the names differ between ranks
            parts = gathered({name: (float(mean), len(self._logs[name])) for name, mean in means.items()})
            for name in dict.fromkeys(name for part in parts for name in part):
                own = [part[name] for part in parts if name in part]
                means[name] = torch.tensor(sum(m * n for m, n in own) / sum(n for _, n in own))
        self.log("step", float(self.global_step + 1))
        self.log_dict({f"train/{k}": v for k, v in means.items()}, on_step=True)
        self.log("train/lr", self.trainer.optimizers[0].param_groups[0]["lr"])
        if self.skipped:
            self.log("train/skipped_steps", float(self.skipped))

    def log_picture(self, name: str, picture: Image.Image, folder: Path, caption: str) -> None:
        """Saves a picture as <name>_<step>.png and passes it to the loggers."""
        path = images.save_png(picture, folder / f"{name}_{self.global_step:07d}.png")
        for logger in self.loggers:
            logger.log_picture(name, path, self.global_step, caption)

    def with_ema(self) -> AbstractContextManager:
        """Returns a context in which the model has its averaged weights; it does nothing without averaging."""
        return self.ema.applied() if self.ema is not None else nullcontext()

    # -- validation: means over samples, the same for any batch size and number of ranks -------------------------------

    def on_validation_epoch_start(self) -> None:
        self._sums = defaultdict(lambda: (0.0, 0))
        self._ema_context = self.with_ema()
        self._ema_context.__enter__()

    def add(self, name: str, values: torch.Tensor) -> None:
        """Adds per-sample values (B,) to the validation mean `name`."""
        total, count = self._sums[name]
        self._sums[name] = (total + float(values.detach().cpu().double().sum()), count + values.numel())

    def add_by_timestep(self, name: str, values: torch.Tensor, bins: torch.Tensor) -> None:
        """Like `add`, and also adds to the means per quarter of the schedule. values (B,); bins (B,): each sample's
        quarter, 0 to BINS - 1."""
        self.add(name, values)
        for k in range(BINS):
            self.add(f"{name}_t{k}", values[bins == k])

    def finish_validation(self) -> dict[str, float]:
        """Logs and returns the validation means over all ranks, after restoring the raw weights."""
        self._ema_context.__exit__(None, None, None)
        totals, counts = defaultdict(float), defaultdict(int)
        for sums in gathered(dict(self._sums)):  # a rank without samples may lack names
            for name, (total, count) in sums.items():
                totals[name] += total
                counts[name] += count
        means = {name: totals[name] / counts[name] if counts[name] else math.nan for name in sorted(totals)}
        self.log("step", float(self.global_step), rank_zero_only=False)
        self.log_dict({f"val/{k}": v for k, v in means.items()}, rank_zero_only=False)
        return means

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        return self.trained().state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        return self.trained().load_state_dict(state_dict, strict=True, assign=assign)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._read_skips()
        checkpoint["health"] = {"attempt": self.attempt, "skipped": self.skipped}
        if self.ema is not None:
            checkpoint["ema"] = self.ema.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        health = checkpoint.get("health", {})
        self.attempt, self.skipped = max(self.attempt, health.get("attempt", 0)), health.get("skipped", 0)
        # Lightning counts micro-batches; their number per step may have changed since (another micro_batch_size).
        fit_loop = checkpoint.get("loops", {}).get("fit_loop", {})
        for counters in (fit_loop.get("epoch_loop.batch_progress") or {}).values():
            if isinstance(counters, dict):
                counters.update(dict.fromkeys(counters, checkpoint["global_step"] * self.accumulate))
        if "epoch_loop.state_dict" in fit_loop:
            # The step under which Lightning logs. A checkpoint saved at the end of a batch holds one too few, which
            # would shift later rows.
            fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] = checkpoint["global_step"]
        if self.ema is not None:
            self.ema.load_state_dict(checkpoint["ema"])
