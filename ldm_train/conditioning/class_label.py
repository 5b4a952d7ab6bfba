"""Class labels as a learned embedding."""

from collections.abc import Sequence

import torch
from torch import nn

from ldm_train.conditioning.base import Conditioner
from ldm_train.devices import to_device


class ClassLabel(Conditioner):
    """An embedding per class and one for "no class", as a vector beside the timestep (ADM) or as one context token.

    classes: names of the classes, or their number
    dim: width; must equal the U-Net's vector_dim or context_dim
    slot: "vector" or "context"
    """

    field = "class_label"

    def __init__(self, classes: Sequence[str] | int, dim: int, slot: str = "vector", dropout: float = 0.1):
        super().__init__(dropout)
        if slot not in ("vector", "context"):
            raise ValueError(f"a class label goes to the slot 'vector' or 'context', not {slot!r}")
        self.names = [str(i) for i in range(classes)] if isinstance(classes, int) else list(classes)
        self.widths = {slot: dim}
        self.embedding = nn.Embedding(len(self.names) + 1, dim)

    def forward(self, values: torch.Tensor, drop: torch.Tensor) -> dict[str, torch.Tensor]:
        """values (B,) int64 -> vector (B, dim), or context (B, 1, dim) with its mask.

        Raises ValueError for a label that the model does not have.
        """
        device, values = self.embedding.weight.device, torch.as_tensor(values)
        if values.device.type == "cpu" and len(values) and not 0 <= values.min() <= values.max() < len(self.names):
            raise ValueError(
                f"class labels {values.min()} to {values.max()} in a batch, this model has {len(self.names)} classes "
                f"(0 to {len(self.names) - 1}); set diffusion.conditioning.conditioners.class_label.classes"
            )
        labels = to_device(values.masked_fill(drop.to(values.device), len(self.names)), device)
        embedded = self.embedding(labels)
        if "vector" in self.widths:
            return {"vector": embedded}
        mask = torch.ones(len(labels), 1, dtype=torch.bool, device=device)
        return {"context": embedded[:, None], "context_mask": mask}

    def null_values(self, count: int, latent_size: Sequence[int]) -> torch.Tensor:
        return torch.zeros(count, dtype=torch.long)

    def parse(self, text: str) -> int:
        """Returns the index of a class given by its name or index. Raises ValueError for an unknown class."""
        if text in self.names:
            return self.names.index(text)
        if text.isdigit() and int(text) < len(self.names):
            return int(text)
        raise ValueError(
            f"unknown class {text!r}; this model knows {', '.join(self.names)} (or 0 to {len(self.names) - 1})"
        )

    def describe(self, values: torch.Tensor) -> list[str]:
        return [self.names[int(v)] for v in values]
