"""The loss of stage 1: L1 + LPIPS with a log-variance, KL, and a patch discriminator, in one backward pass."""

import torch
from torch import nn

from ldm_train.distributed import mean_over_ranks
from ldm_train.losses.adversarial import adaptive_weight, hinge_loss, vanilla_loss
from ldm_train.models.layers import full_precision
from ldm_train.models.posterior import Posterior


class RunningLogits(nn.Module):
    """Running means of a discriminator's logits for real and reconstructed images, and LeCAM's distance from them."""

    real: torch.Tensor
    fake: torch.Tensor

    def __init__(self, decay: float = 0.99):
        super().__init__()
        self.decay = decay
        for name in ("real", "fake"):
            self.register_buffer(name, torch.zeros(()))

    def forward(self, logits_real: torch.Tensor, logits_fake: torch.Tensor) -> torch.Tensor:
        """Returns E relu(D(x) - fake)^2 + E relu(real - D(G))^2, a scalar, then updates the means by 1 - decay."""
        distance = (logits_real - self.fake).relu().square().mean() + (self.real - logits_fake).relu().square().mean()
        with torch.no_grad():
            means = mean_over_ranks(torch.stack([logits_real.detach().mean(), logits_fake.detach().mean()]))
            held = torch.stack([self.real, self.fake])
            means = torch.where(means.isfinite().all(), means, held)  # a step that is not finite changes nothing
            self.real.lerp_(means[0], 1 - self.decay)
            self.fake.lerp_(means[1], 1 - self.decay)
        return distance


class AutoencoderLoss(nn.Module):
    """The published loss (Rombach et al. 2022, appendix G): a mean over the batch of, per image, sums over C, H, W (KL
    models) or means (VQ models).

    perceptual         (images, targets) -> (B,), or None
    discriminator      images -> logits, or None
    kl_weight          weight of KL(q || N(0, 1)) summed over the latents
    codebook_weight    weight of a VQ model's quantisation loss, a mean over the latents, relative to the mean
                       reconstruction error
    reduction          reduction over C, H, W of all terms of the generator's loss: "sum" (KL models) or "mean" (VQ
                       models). It sets the unit of max_adaptive_weight and of the gradients; the minimum is the same
    perceptual_weight  weight of the perceptual distance, which is broadcast over C, H, W before summing
    disc_weight        weight of the generator's adversarial term, multiplied by the adaptive weight
    disc_factor        weight of both adversarial terms
    disc_start         optimiser step at which the adversarial terms are switched on
    disc_ramp          optimiser steps over which the generator's term grows from 0 after disc_start
    disc_warmup        optimiser steps before disc_start in which only the discriminator's term is on
    disc_loss          "hinge" or "vanilla"
    max_adaptive_weight    upper limit of the adaptive weight
    learn_logvar       learn the likelihood's log-variance, a scalar that starts at 0
    lecam_weight       weight of LeCAM (Tseng et al. 2021, arXiv:2104.03310, eq. 4), for small data sets: keeps the
                       discriminator's logits near the running means of its logits for the other kind of image
    r1_weight          weight of half the squared norm over C, H, W of the discriminator's gradient at real images
                       (Mescheder et al. 2018, arXiv:1801.04406, eq. 9)
    Raises ValueError for other values of disc_loss or reduction.
    """

    def __init__(
        self,
        perceptual: nn.Module | None,
        discriminator: nn.Module | None,
        kl_weight: float = 1e-6,
        codebook_weight: float = 1.0,
        perceptual_weight: float = 1.0,
        disc_weight: float = 0.5,
        disc_factor: float = 1.0,
        disc_start: int = 50_001,
        disc_ramp: int = 0,
        disc_warmup: int = 0,
        disc_loss: str = "hinge",
        max_adaptive_weight: float = 1e4,
        learn_logvar: bool = False,
        reduction: str = "sum",
        lecam_weight: float = 0.0,
        r1_weight: float = 0.0,
    ):
        super().__init__()
        if disc_loss not in ("hinge", "vanilla"):
            raise ValueError(f"disc_loss is 'hinge' or 'vanilla', not {disc_loss!r}")
        if reduction not in ("sum", "mean"):
            raise ValueError(f"reduction is 'sum' or 'mean', not {reduction!r}")
        self.perceptual, self.discriminator = perceptual, discriminator
        self.kl_weight, self.codebook_weight, self.perceptual_weight = kl_weight, codebook_weight, perceptual_weight
        self.disc_weight, self.disc_factor, self.max_adaptive_weight = disc_weight, disc_factor, max_adaptive_weight
        self.reduction = reduction
        self.disc_start, self.disc_ramp, self.disc_warmup = disc_start, disc_ramp, disc_warmup
        self.discriminator_loss = hinge_loss if disc_loss == "hinge" else vanilla_loss
        self.logvar = nn.Parameter(torch.zeros(()), requires_grad=learn_logvar)
        self.lecam_weight, self.r1_weight = lecam_weight, r1_weight
        self.usual_logits = RunningLogits()

    def generator_factor(self, step: int) -> float:
        """Returns 0 before disc_start or without a discriminator, then a ramp to 1 over disc_ramp optimiser steps."""
        if self.discriminator is None or step < self.disc_start:
            return 0.0
        return min(1.0, (step - self.disc_start + 1) / self.disc_ramp) if self.disc_ramp else 1.0

    def reconstruction(self, images: torch.Tensor, reconstructions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns per image L1 + perceptual, summed over C, H, W (B,), and the unweighted perceptual distance (B,)."""
        l1 = (images - reconstructions).abs().flatten(1).sum(dim=1)
        if self.perceptual is None:
            return l1, torch.zeros_like(l1)
        distance = self.perceptual(reconstructions, images)
        return l1 + self.perceptual_weight * distance * images[0].numel(), distance

    def forward(
        self,
        images: torch.Tensor,
        reconstructions: torch.Tensor,
        features: torch.Tensor,
        posterior: Posterior,
        last_layer: nn.Conv2d,
        step: int,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Returns (scalar, logs). Only the scalar's gradient is meaningful, not its value; the logs hold the losses.

        images, reconstructions (B, C, H, W) in [-1, 1]; features: the input of `last_layer`; step: optimiser steps
        done. The gradients of both generator losses are taken at a detached copy of the reconstruction, so the graphs
        of generator and discriminator stay separate: neither loss reaches the other's parameters, and one backward pass
        serves both. This equals a simultaneous update in which both see the same state.
        """
        with full_precision(images.device):
            images, leaf = images.float(), reconstructions.detach().float().requires_grad_()
            size = images[0].numel()
            unit = size if self.reduction == "mean" else 1  # divisor of the generator's sums over C, H, W
            per_image, distance = self.reconstruction(images, leaf)
            nll = (per_image / self.logvar.detach().exp()).mean()
            (direction,) = torch.autograd.grad(nll / unit, leaf)
            regularisation = {name: value.mean() for name, value in posterior.regularisation().items()}
            # With a fixed log-variance this has no gradient; with a learned one it trains the log-variance.
            likelihood = (per_image.detach() / self.logvar.exp() + self.logvar * size).mean()
            logs = {
                "nll": likelihood.detach() / size,
                "l1": (images - leaf.detach()).abs().mean(),
                "perceptual": distance.detach().mean(),
            } | {name: value.detach() for name, value in regularisation.items()}
            weights = {"kl": self.kl_weight, "codebook": self.codebook_weight * size}
            loss = sum(weights[name] / unit * value for name, value in regularisation.items())
            if self.logvar.requires_grad:
                loss = loss + likelihood / unit
                logs["logvar"] = self.logvar.detach().clone()
            if self.discriminator is not None:
                extra, adversarial_loss = self._adversarial(images, leaf, features, last_layer, direction, step, logs)
                direction, loss = direction + extra, loss + adversarial_loss
            return loss + (reconstructions.float() * direction.detach()).sum(), logs

    def _adversarial(
        self,
        images: torch.Tensor,
        leaf: torch.Tensor,
        features: torch.Tensor,
        last_layer: nn.Conv2d,
        g_rec: torch.Tensor,
        step: int,
        logs: dict[str, torch.Tensor],
    ) -> tuple[torch.Tensor | float, torch.Tensor]:
        """Returns (the weighted adversarial gradient at the reconstruction, or 0; the discriminator's loss)."""
        if step < self.disc_start - self.disc_warmup:
            # Zero gradients keep every parameter in the graph, as DDP requires, at almost no cost.
            return 0.0, 0.0 * sum(p.sum() for p in self.discriminator.parameters())
        real = images.detach().requires_grad_() if self.r1_weight else images
        logits_real, logits_fake = self.discriminator(real), self.discriminator(leaf)
        disc = self.discriminator_loss(logits_real, logits_fake)
        logs |= {
            "disc": disc.detach(),
            "logits_real": logits_real.detach().mean(),
            "logits_fake": logits_fake.detach().mean(),
            "disc_accuracy": 0.5 * ((logits_real > 0).float().mean() + (logits_fake < 0).float().mean()),
        }
        if self.lecam_weight:
            disc = disc + self.lecam_weight * self.usual_logits(logits_real, logits_fake)
        if self.r1_weight:
            (slope,) = torch.autograd.grad(logits_real.mean(dim=(1, 2, 3)).sum(), real, create_graph=True)
            penalty = slope.square().sum(dim=(1, 2, 3)).mean()
            disc = disc + 0.5 * self.r1_weight * penalty
            logs["r1"] = penalty.detach()
        extra: torch.Tensor | float = 0.0
        if (factor := self.generator_factor(step)) > 0:
            generator_loss = -logits_fake.mean()
            (g_gan,) = torch.autograd.grad(generator_loss, leaf, retain_graph=True)
            weight = adaptive_weight(last_layer, features, g_rec, g_gan, self.max_adaptive_weight)
            extra = factor * self.disc_factor * self.disc_weight * weight * g_gan
            logs |= {"generator": generator_loss.detach(), "adaptive_weight": weight}
        return extra, self.disc_factor * disc
