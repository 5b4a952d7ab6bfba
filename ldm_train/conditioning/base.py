"""The contract of conditioners: networks that turn one field of a batch into inputs of the denoising network."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ldm_train.data.batch import Field
from ldm_train.models.first_stage import FirstStage

# The network's inputs, and its options that say how wide they are.
SLOTS = {"context": "context_dim", "vector": "vector_dim", "concat": "concat_channels", "control": "controlled"}
SPATIAL = ("concat", "control")  # the network's inputs that have the latents' size


class Conditioner(nn.Module):
    """Subclasses set `field`, `widths` and implement `forward`.

    field   the batch field it reads (class_label, caption, ...)
    declares    that field, where `data/batch.py` does not know it
    widths  which of the network's inputs it fills and how wide: "context" (with "context_mask"), "concat", "vector", "control"
    dropout probability per sample that training replaces the condition by the null condition
    """

    field: str
    declares: Field | None = None
    widths: dict[str, int]

    def __init__(self, dropout: float):
        super().__init__()
        if not 0 <= dropout <= 1:
            raise ValueError(f"conditioning dropout is a probability, got {dropout}")
        self.dropout = dropout

    def forward(self, values: Any, drop: torch.Tensor) -> dict[str, torch.Tensor]:
        """values: B entries of the field, on the host; drop (B,) bool, on the host: True where the condition is null."""
        raise NotImplementedError

    @classmethod
    def trained_options(cls, options: dict[str, Any]) -> dict[str, Any]:
        """`options` as a trained model's config has them: without the files whose contents are now in its weights."""
        return options

    def attach(self, first_stage: FirstStage) -> None:
        """Called once by the model that holds it: spatial conditioners need the size, or the encoder, of its latents."""

    def require(self) -> None:
        """Called before training: downloads or reads external files. Raises FileNotFoundError where one cannot be
        obtained."""

    def beside(self) -> nn.Module | None:
        """The pretrained network that it asks and that is not one of its parts, where it has been loaded."""
        return None

    def keep_in(self, folder: Path) -> None:
        """Called before training: what that network says of the values of its field is kept on the disk in `folder`, for this and
        other runs."""

    def forget(self) -> None:
        """Called where that network has changed."""

    def rehearse(self) -> Sequence[nn.Module]:
        """Called where a training is only planned: from now on the null condition asks for no external files. Returns the
        networks that it holds beside its own weights, without memory where they are not loaded. Raises FileNotFoundError
        where their size is not known here."""
        return ()

    def null_values(self, count: int, latent_size: Sequence[int]) -> Any:
        """`count` placeholder entries, for use with drop = True."""
        raise NotImplementedError

    def null(self, count: int, latent_size: Sequence[int] = (8, 8)) -> dict[str, torch.Tensor]:
        """The null condition for `count` samples of latents (h, w): the same as a full drop mask."""
        return self(self.null_values(count, latent_size), torch.ones(count, dtype=torch.bool))

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def parse(self, text: str) -> Any:
        """One entry of the field from the command line. Raises ValueError if it is none."""
        raise NotImplementedError

    def picture(self, values: Any, size: Sequence[int]) -> torch.Tensor | None:
        """Entries as pictures, (B, C, H, W) in [-1, 1] of `size` (H, W); None where they cannot be shown."""
        return None

    def describe(self, values: Sequence[Any]) -> list[str]:
        """Entries as readable text, for captions under pictures."""
        return [str(v) for v in values]


def enlarged(values: Any, size: Sequence[int]) -> torch.Tensor:
    """Pictures or maps (B, C, h, w) at `size` (H, W) on the CPU, with hard edges."""
    return F.interpolate(torch.as_tensor(values).cpu().float(), tuple(size), mode="nearest")


def without_last_layer(encoder: nn.Module) -> nn.Module:
    """A view of a transformer of transformers without its last layer, which does not run where the state before it is asked for.
    All else is shared, under the same names."""
    view = copy.copy(encoder)
    view._modules = dict(encoder._modules)
    for name in ("text_model", "encoder"):
        if isinstance(inner := view._modules.get(name), nn.Module):
            view._modules[name] = without_last_layer(inner)
            return view
    if isinstance(layers := view._modules.get("layers"), nn.ModuleList):
        view._modules["layers"] = nn.ModuleList(layers[:-1])
    return view


@contextmanager
def loading(what: str, path: str, holds: str) -> Iterator[None]:
    """A context in which transformers loads a pretrained model: raises FileNotFoundError, saying what its folder holds,
    where it cannot be obtained."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"the {what} {path} is not there ({str(error).splitlines()[0]}); give a folder that holds {holds}"
        ) from error


def merge(outputs: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Joins conditions: context along tokens (with masks), concat and control along channels, vector along features."""
    merged: dict[str, torch.Tensor] = {}
    for key in ("context", "context_mask", "concat", "vector", "control"):
        parts = [o[key] for o in outputs if key in o]
        if parts:
            merged[key] = torch.cat(parts, dim=1)
    return merged


def check_widths(of_network: Mapping[str, int], conditioners: Mapping[str, Conditioner]) -> None:
    """Raises ValueError where conditioners do not give what a network takes. of_network: its `condition_widths`."""
    for slot, name in SLOTS.items():
        widths = [c.widths[slot] for c in conditioners.values() if slot in c.widths]
        got: int | list[int] = sum(widths)
        if slot == "context" and widths:  # joined along the tokens, which are therefore equally wide
            got = widths[0] if len(set(widths)) == 1 else sorted(set(widths))
        if (width := of_network.get(slot, 0)) != got:
            if slot == "control":
                raise ValueError(
                    f"the network takes a control of width {width}, the conditioners {list(conditioners)} give {got}; choose "
                    "diffusion/adapter=control"
                )
            raise ValueError(
                f"diffusion.network.{name} is {width}, the conditioners {list(conditioners)} give {got}; set "
                f"diffusion.conditioning.{name}"
            )
