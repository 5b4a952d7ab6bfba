"""Small models, one for every kind of condition, with random weights that make the effect of the condition visible."""

from pathlib import Path

import torch
from hydra.utils import instantiate

from ldm_train.checkpoints.native import save_model
from ldm_train.conditioning.text import train_tokenizer

SPATIAL = "ldm_train.conditioning.spatial."
TEXT = {
    "_target_": "ldm_train.conditioning.text.TrainedText", "tokenizer": train_tokenizer(["a red circle"], 300).to_str(),
    "dim": 8, "depth": 1, "heads": 2, "max_length": 8,
}  # fmt: skip
CONDITIONERS = {
    "none": {},
    "text": {"text": TEXT},
    "class": {
        "class": {"_target_": "ldm_train.conditioning.class_label.ClassLabel", "classes": ["cat", "dog"], "dim": 8, "slot": "context"}
    },
    "layout": {
        "layout": {
            "_target_": "ldm_train.conditioning.layout.LayoutBoxes", "dim": 8, "labels": ["cat", "dog"], "max_objects": 2,
            "depth": 1, "heads": 2,
        }
    },
    "semantic": {"map": {"_target_": SPATIAL + "SemanticMap", "num_labels": 5}},
    "superres": {"lowres": {"_target_": SPATIAL + "LowResolution", "factor": 4}},
    "inpaint": {"masked": {"_target_": SPATIAL + "MaskedImageCondition"}},
    "depth": {"depth": {"_target_": SPATIAL + "DepthMap"}},
    "edges": {"edges": {"_target_": "ldm_train.conditioning.edges.EdgeMap", "factor": 4}},
    "variation": {
        "image": {
            "_target_": "ldm_train.conditioning.image_embedding.ImageEmbedding",
            "encoder": {"_target_": "ldm_train.conditioning.image_embedding.TinyVision"},
            "encoder_dim": 128, "dim": 8,
        }
    },
}  # fmt: skip
CONDITIONERS["calm"] = CONDITIONERS["text"]  # with small weights, which inversion needs
CONTEXT = {"text", "calm", "class", "layout"}
FIRST_STAGE = {
    "_target_": "ldm_train.models.first_stage.FirstStage",
    "autoencoder": {
        "_target_": "ldm_train.models.autoencoder.AutoencoderKL", "z_channels": 4, "channels": 16,
        "channel_mult": [1, 1, 1], "num_res_blocks": 1, "mid_attention": False,
    },
}  # fmt: skip
CONCAT = {"semantic": 3, "superres": 3, "inpaint": 5, "depth": 1, "edges": 16}


def small_model(kind: str, folder: Path) -> Path:
    """Returns a model folder of a kind of CONDITIONERS; makes it if it is not there."""
    if (folder / "metadata.json").is_file():
        return folder
    torch.manual_seed(0)
    tree = {
        "_target_": "ldm_train.latent_diffusion.LatentDiffusion",
        "network": {
            "_target_": "ldm_train.models.unet.UNet", "in_channels": 4, "channels": 32, "channel_mult": [1, 2],
            "num_res_blocks": 1, "attention_levels": [1], "num_heads": 2,
            "context_dim": 8 if kind in CONTEXT else None, "vector_dim": 8 if kind == "variation" else None,
            "concat_channels": CONCAT.get(kind, 0),
        },
        "first_stage": FIRST_STAGE,
        "schedule": {"_target_": "ldm_train.diffusion.schedule.NoiseSchedule"},
        "conditioners": CONDITIONERS[kind], "latent_size": [8, 8],
    }  # fmt: skip
    model = instantiate(tree, _convert_="all")
    for p in model.network.parameters():  # zero-initialised last layers would hide every condition
        if not p.any() and p.ndim > 1:
            torch.nn.init.normal_(p, std=0.01 if kind == "calm" else 0.2)
    sampling = {"num_inference_steps": 3, "guidance_scale": 2.0, "spacing": "trailing"}
    sampling["sampler"] = {"_target_": "ldm_train.samplers.ddim.ddim", "_partial_": True}
    save_model(folder, model, tree, {"sampling": sampling})
    return folder
