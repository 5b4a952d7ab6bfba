"""python train.py [experiment=...] [option=value ...]: from data to a trained latent diffusion model in one command.

The composition root is ldm_train/cli/train.py, so that an installed package has it too (ldm-train).
"""

from ldm_train.cli.train import main

if __name__ == "__main__":
    main()
