"""Muon: steps of orthogonal matrices for a network's weights, AdamW for all else."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

NARROW = 16  # a matrix with fewer rows or columns is left to AdamW: the layers from and to pixels or latents, small embeddings
QUINTIC = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


def orthogonalised(matrices: torch.Tensor) -> torch.Tensor:
    """(..., M, N) -> the same with singular values near 1 (most in 0.7 to 1.2), by Newton-Schulz iterations with the coefficients of
    Jordan et al. In bfloat16 on a GPU, which they were chosen for; processors are slow at that."""
    rows, columns = matrices.shape[-2:]
    if rows > columns:
        return orthogonalised(matrices.mT).mT
    x = matrices.to(torch.bfloat16 if matrices.device.type == "cuda" else torch.float32)
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    a, b, c = QUINTIC
    if columns < 2 * rows or x.dtype == torch.bfloat16:
        for _ in range(ITERATIONS):
            gram = x @ x.mT
            x = a * x + (b * gram + c * gram @ gram) @ x
        return x.to(matrices.dtype)
    # The same of wide matrices with a third of the work: every iteration multiplies x by a polynomial in x x^T, so that only the
    # small square matrices are iterated. It needs float32.
    gram = x @ x.mT
    product = unit = torch.eye(rows, dtype=x.dtype, device=x.device)
    for _ in range(ITERATIONS):
        factor = a * unit + b * gram + c * gram @ gram
        product, gram = factor @ product, factor @ gram @ factor
    return product @ x


def split_matrices(groups: list[dict], module: nn.Module) -> list[dict]:
    """The groups, each split in two: the weights of the module's linear layers and 2D convolutions (but for narrow ones) in a group
    of their own, marked "matrices": True and named "<name>_matrices", and everything else, to which the fused projections of
    attention without a context and of the text transformer belong."""
    matrices = {
        layer.weight
        for layer in module.modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and min(layer.weight.flatten(1).shape) >= NARROW
    }
    result = []
    for group in groups:
        mine = [p for p in group["params"] if p in matrices]
        result.append({**group, "params": [p for p in group["params"] if p not in matrices], "matrices": False})
        if mine:
            result.append({**group, "params": mine, "name": f"{group['name']}_matrices", "matrices": True})
    return result


class Muon(torch.optim.AdamW):
    """Muon for weight matrices, AdamW for all other parameters.

    Muon replaces a matrix's momentum by the nearest orthogonal matrix before it takes the step, so that all directions of the
    gradient are followed at the same speed (Jordan et al. 2024, kellerjordan.github.io/posts/muon). The weight of a convolution
    counts as a matrix (output channels, input channels x kernel).

    params: parameters, all of them for AdamW, or groups as `split` makes them; one with "matrices": True holds matrices alone
    lr: of AdamW's parameters. That of matrices is lr x matrix_scale: the largest singular value of a step is
        lr x matrix_scale x sqrt(max(1, rows / columns))
    momentum: Nesterov's, of matrices
    All other options are AdamW's. weight_decay is decoupled, for both: a step shrinks a weight by the lr of its group x
    weight_decay, so matrices by matrix_scale times as much. Raises ValueError for a negative matrix_scale, or a momentum outside [0, 1).
    """

    split = staticmethod(split_matrices)

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        matrix_scale: float = 20.0,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        **adamw: Any,
    ):
        if matrix_scale < 0 or not 0 <= momentum < 1:
            raise ValueError(f"matrix_scale={matrix_scale} is at least 0, and momentum={momentum} in [0, 1)")
        groups = list(params)
        if groups and isinstance(groups[0], dict):
            groups = [
                {**g, "lr": matrix_scale * g.get("lr", lr), "momentum": momentum} if g.get("matrices") else {**g}
                for g in groups
            ]
        super().__init__(groups, lr=lr, weight_decay=weight_decay, **adamw)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        with torch.enable_grad():
            loss = None if closure is None else closure()
        gradients: dict[torch.Tensor, torch.Tensor] = {}
        for group in self.param_groups:
            if group.get("matrices"):
                mine = {p: p.grad for p in group["params"] if p.grad is not None}
                self._step_matrices(group, mine)
                gradients |= mine
        for p in gradients:
            p.grad = None  # AdamW passes over what has none
        super().step()
        for p, gradient in gradients.items():
            p.grad = gradient
        return loss

    def _step_matrices(self, group: dict[str, Any], gradients: dict[torch.Tensor, torch.Tensor]) -> None:
        skipped = getattr(self, "found_inf", None)  # a tensor, above 0 where the gradient is not finite
        alike: dict[torch.Size, list[tuple[torch.Tensor, torch.Tensor]]] = defaultdict(list)
        for p, gradient in gradients.items():
            state = self.state[p]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)  # which AdamW looks for when it is loaded
                state["momentum_buffer"] = torch.zeros_like(p)
            momentum = state["momentum_buffer"]
            moved = momentum.lerp(gradient, 1 - group["momentum"])
            momentum.copy_(moved if skipped is None else torch.where(skipped > 0, momentum, moved))
            update = gradient.lerp(momentum, group["momentum"]).flatten(1)
            alike[update.shape].append((p, update))
        for (rows, columns), pairs in alike.items():
            updates = orthogonalised(torch.stack([update for _, update in pairs]))
            rate = group["lr"] * max(1.0, rows / columns) ** 0.5
            for (p, _), update in zip(pairs, updates):
                moved = p * (1 - group["lr"] * group["weight_decay"]) - rate * update.reshape(p.shape)
                p.copy_(moved if skipped is None else torch.where(skipped > 0, p, moved))
