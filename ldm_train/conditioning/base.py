"""The interface of conditioners: networks that turn one field of a batch into inputs of the denoising network."""

import copy
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ldm_train.data.batch import Field
from ldm_train.errors import first_line
from ldm_train.models.first_stage import FirstStage

# The network's inputs -> its options that set their widths.
SLOTS = {"context": "context_dim", "vector": "vector_dim", "concat": "concat_channels", "control": "controlled"}
SPATIAL = ("concat", "control")  # the network's inputs that have the size of the latents


class Conditioner(nn.Module):
    """Base class of conditioners. Subclasses set `field` and `widths`, and implement `forward` and `null_values`.

    field   the batch field it reads (class_label, caption, ...)
    declares    the declaration of that field, if `data/batch.py` has none
    widths  which of the network's inputs it fills and how wide: "context" (with "context_mask"), "concat", "vector",
            "control"
    dropout probability, per sample, that training replaces the condition by the null condition
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
        """Returns the network's inputs by name. values: B entries of the field, on the host; drop (B,) bool, on the
        host: True for samples whose condition is null."""
        raise NotImplementedError

    @classmethod
    def trained_options(cls, options: dict[str, Any]) -> dict[str, Any]:
        """Returns `options` as stored in a trained model's config: without files whose contents are now in its
        weights."""
        return options

    def attach(self, first_stage: FirstStage) -> None:
        """Called once by the model that holds it: spatial conditioners need the size of its latents, or its encoder."""

    def require(self) -> None:
        """Called before training: downloads or reads external files. Raises FileNotFoundError if one cannot be
        obtained."""

    def frozen_encoder(self) -> nn.Module | None:
        """Returns the pretrained network that it uses without holding it as a submodule; None if there is none or it is
        not loaded."""
        return None

    def cache_states_in(self, folder: Path) -> None:
        """Called before training: the outputs of the network of `frozen_encoder` for values of the field are cached on disk in
        `folder`, for this and other runs."""

    def clear_cache(self) -> None:
        """Called when the network of `frozen_encoder` has changed, so that its cached outputs are no longer valid."""

    def prepare_for_plan(self) -> Sequence[nn.Module]:
        """Called if a training run is only planned: from now on the null condition needs no external files. Returns the
        networks that it uses in addition to its own weights, without memory if they are not loaded. Raises
        FileNotFoundError if their size is not known on this machine."""
        return ()

    def null_values(self, count: int, latent_size: Sequence[int]) -> Any:
        """Returns `count` placeholder entries of the field, for use with drop = True."""
        raise NotImplementedError

    def null(self, count: int, latent_size: Sequence[int] = (8, 8)) -> dict[str, torch.Tensor]:
        """Returns the null condition for `count` samples with latents of size (h, w): the same as a full drop mask."""
        return self(self.null_values(count, latent_size), torch.ones(count, dtype=torch.bool))

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def parse(self, text: str) -> Any:
        """Parses one entry of the field from the command line. Raises ValueError if the text is not a valid entry."""
        raise NotImplementedError

    def picture(self, values: Any, size: Sequence[int]) -> torch.Tensor | None:
        """Returns entries as images, (B, C, H, W) in [-1, 1] of `size` (H, W), or None if they cannot be shown."""
        return None

    def describe(self, values: Sequence[Any]) -> list[str]:
        """Returns entries as readable text, for captions under images."""
        return [str(v) for v in values]


def enlarged(values: Any, size: Sequence[int]) -> torch.Tensor:
    """Resizes images or maps (B, C, h, w) to `size` (H, W) by nearest neighbour (hard edges), on the CPU."""
    return F.interpolate(torch.as_tensor(values).cpu().float(), tuple(size), mode="nearest")


def without_last_layer(encoder: nn.Module) -> nn.Module:
    """Returns a view of a model of the transformers library without its last layer, whose output is unused when the
    hidden states before it are taken. Everything else is shared, under the same names."""
    view = copy.copy(encoder)
    view._modules = dict(encoder._modules)
    for name in ("text_model", "encoder"):
        if isinstance(inner := view._modules.get(name), nn.Module):
            view._modules[name] = without_last_layer(inner)
            return view
    if isinstance(layers := view._modules.get("layers"), nn.ModuleList):
        view._modules["layers"] = nn.ModuleList(layers[:-1])
    return view


def is_word(text: str) -> bool:
    """Whether a learned word is one of letters or digits, which is found only where it stands alone."""
    return text[0].isalnum() and text[-1].isalnum()


def spelling(word: str) -> str:
    """A regular expression for a learned word in a caption, not for the further tokens of a word (<word>_<number>)."""
    return rf"(?<!\w){re.escape(word)}(?!\w)" if is_word(word) else rf"{re.escape(word)}(?!_\d)"


def place_of(path: Any) -> Any:
    """A pretrained model's folder, with a leading ~ expanded, or its name on the Hub, or the model itself, as it is."""
    return str(Path(path).expanduser()) if isinstance(path, str) and path.startswith("~") else path


@contextmanager
def loading(what: str, path: str, holds: str) -> Iterator[None]:
    """A context for loading a pretrained model with the transformers library. Raises FileNotFoundError, saying what its
    folder must hold, if it cannot be obtained."""
    try:
        if path.startswith(("/", ".")) and not Path(path).is_dir():
            raise OSError("no such folder")  # a path, not a name to download
        yield
    except Exception as error:  # the library raises many types of exceptions
        raise FileNotFoundError(
            f"cannot load the {what} {path} ({first_line(error)}); give a folder that holds {holds}"
        ) from error


# Parts of models of the transformers library that are not used here, and that files may lack.
UNUSED = ("pooler.", "decoder.", "lm_head.")


def from_pretrained(kind: Any, path: str, **options: Any) -> Any:
    """Loads a model of the transformers library, in float32 whatever type its file has. Raises OSError if its files lack
    weights, which the library would draw at random."""
    options |= {"dtype": torch.float32, "trust_remote_code": False, "output_loading_info": True}
    model, report = kind.from_pretrained(path, **options)
    if lacking := sorted(name for name in report["missing_keys"] if not name.startswith(UNUSED)):
        raise OSError(f"its files lack {len(lacking)} weights, the first is {lacking[0]}")
    return model


def merge(outputs: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Concatenates conditions: context along tokens (with masks), concat and control along channels, vector along
    features."""
    merged: dict[str, torch.Tensor] = {}
    for key in ("context", "context_mask", "concat", "vector", "control"):
        parts = [o[key] for o in outputs if key in o]
        if parts:
            merged[key] = torch.cat(parts, dim=1)
    return merged


def keep(
    condition: dict[str, torch.Tensor],
    of: Mapping[str, torch.Tensor],
    conditioners: Iterable[Conditioner],
    fields: Collection[str],
) -> None:
    """Replaces in a merged `condition` what conditioners of these fields give, except context, by what `of` has of them.
    conditioners: all of the model, in their order."""
    begin = dict.fromkeys(SLOTS, 0)
    for conditioner in conditioners:
        for slot, width in conditioner.widths.items():
            if slot != "context" and conditioner.field in fields:  # context is joined along tokens
                part = slice(begin[slot], begin[slot] + width)
                condition[slot][:, part] = of[slot][:, part]
            begin[slot] += width


def check_widths(of_network: Mapping[str, int], conditioners: Mapping[str, Conditioner]) -> None:
    """Raises ValueError if conditioners do not provide what a network takes. of_network: its `condition_widths`."""
    for slot, name in SLOTS.items():
        widths = [c.widths[slot] for c in conditioners.values() if slot in c.widths]
        got: int | list[int] = sum(widths)
        if slot == "context" and widths:  # concatenated along the tokens, which must have the same width
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
