"""ldm_train: train a latent diffusion model of your own, from the autoencoder up."""

__version__ = "0.1.0"
