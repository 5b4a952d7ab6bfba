"""ldm_train: train your own latent diffusion model, starting with the autoencoder."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ldm_train.latent_diffusion import LatentDiffusion

__version__ = "0.1.0"


def load(path: str, trust: Sequence[str] = ()) -> "LatentDiffusion":
    """Returns a trained model with the sampling options of its run.

    path: a run, its export/ folder, any model folder, a pipeline folder in diffusers' layout, or "org/name" on the
    Hugging Face Hub.
    The folder is treated as data: only models of this package, and parts of the packages named in `trust`, are built.
    Raises FileNotFoundError if there is no model, ValueError for damaged weights or a config that asks for other parts.
    """
    from ldm_train.checkpoints.native import load_latent_diffusion  # imported late: importing torch takes seconds

    return load_latent_diffusion(path, trust)
