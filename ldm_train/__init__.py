"""ldm_train: train a latent diffusion model of your own, from the autoencoder up."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ldm_train.latent_diffusion import LatentDiffusion

__version__ = "0.1.0"


def load(path: str, trust: Sequence[str] = ()) -> "LatentDiffusion":
    """A trained model with its run's sampling options: path is a run, its export/ folder, any model folder, a pipeline's
    folder in diffusers' layout, or "org/name" on the Hugging Face Hub.

    The folder is data: it builds this package's models only, and parts of the packages that `trust` names.
    Raises FileNotFoundError where there is none, ValueError for damaged weights or a config that asks for more.
    """
    from ldm_train.checkpoints.native import load_latent_diffusion  # torch takes seconds, and not every use needs it

    return load_latent_diffusion(path, trust)
