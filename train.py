"""python train.py [experiment=...] [option=value ...]: from data to a trained latent diffusion model in one command.

An installed package has the same command as ldm-train (ldm_train/cli/train.py).
"""

if __name__ == "__main__":
    from ldm_train import interrupts

    interrupts.install()  # before torch is imported, which takes seconds
    interrupts.during("before training")

    from ldm_train.cli.train import main

    main()
