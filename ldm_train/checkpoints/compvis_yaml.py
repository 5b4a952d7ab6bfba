"""Converts the YAML of CompVis/latent-diffusion models and their relatives to config trees of our models.

A YAML is read as plain values: its `target`s are looked up in tables here, and nothing that they name is imported.
Every option is used, ignored because it does not change what the model computes, or refused with an error that names
it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ldm_train import names
from ldm_train.checkpoints.compvis_conditioners import BESIDE, beside, conditioners_of
from ldm_train.checkpoints.compvis_options import Options
from ldm_train.storage import shown

PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
BETAS = {"linear": "scaled_linear", "sqrt_linear": "linear", "cosine": "cosine", "sqrt": "sqrt"}  # theirs, ours


AUTOENCODERS = ("AutoencoderKL", "VQModel", "VQModelInterface")


def _autoencoder(kind: str, options: Options) -> dict[str, Any]:
    """Returns the config tree of an autoencoder."""
    if kind not in AUTOENCODERS:
        raise ValueError(f"{options.where} is of {kind!r}; {', '.join(AUTOENCODERS)} can be converted")
    options.ignore("lossconfig", "monitor", "ckpt_path", "ignore_keys", "image_key", "colorize_nlabels")
    options.ignore("batch_resize_range", "scheduler_config", "lr_g_factor", "use_ema", "learning_rate")
    vq = kind != "AutoencoderKL"
    own = {"embed_dim": options.take("embed_dim", int)}
    if vq:
        own["num_codes"] = options.take("n_embed", int)
        options.only(remap=None, sane_index_shape=False)
    dd = Options(options.take("ddconfig", dict), f"{options.where}.ddconfig")
    options.done()
    dd.only(double_z=(not vq, None), resamp_with_conv=True, use_linear_attn=False, give_pre_end=False, tanh_out=False)
    widths, resolution = dd.numbers("ch_mult"), dd.take("resolution", int)
    attention = dd.numbers("attn_resolutions", [])
    attn_type = dd.take("attn_type", str, "vanilla")
    if attn_type not in ("vanilla", "vanilla-xformers", "none"):
        raise ValueError(f"{dd.where}.attn_type is {attn_type!r}; vanilla and none can be converted")
    levels = [level for level in range(len(widths)) if resolution / 2**level in attention]
    channels = dd.take("in_channels", int)
    dd.only(out_ch=channels)
    tree = {
        "_target_": f"ldm_train.models.autoencoder.{'AutoencoderVQ' if vq else 'AutoencoderKL'}",
        "z_channels": dd.take("z_channels", int),
        "channels": dd.take("ch", int),
        "channel_mult": widths,
        "num_res_blocks": dd.take("num_res_blocks", int),
        "attention_levels": levels if attn_type != "none" else [],
        "mid_attention": attn_type != "none",
        "in_channels": channels,
        "dropout": float(dd.take("dropout", (int, float), 0.0)),
    }
    dd.done()
    return tree | own


def _unet(options: Options, latent_channels: int) -> tuple[dict[str, Any], bool]:
    """Returns (the config tree of a U-Net, whether its attention has the older order of queries, keys and values)."""
    options.ignore("image_size", "use_checkpoint", "use_fp16", "num_heads_upsample", "legacy")
    options.ignore("spatial_transformer_attn_type")
    options.only(conv_resample=True, dims=2, n_embed=None, num_attention_blocks=None)
    options.only(disable_middle_self_attn=(False, None))
    widths, in_channels = options.numbers("channel_mult"), options.take("in_channels", int)
    resolutions, channels = options.numbers("attention_resolutions"), options.take("model_channels", int)
    head_dim, heads = options.take("num_head_channels", int, -1), options.take("num_heads", int, -1)
    transformer = options.take("use_spatial_transformer", bool, False)
    tree: dict[str, Any] = {
        "_target_": "ldm_train.models.unet.UNet",
        "in_channels": latent_channels,
        "concat_channels": in_channels - latent_channels,
        "out_channels": options.take("out_channels", int),
        "channels": channels,
        "channel_mult": widths,
        "num_res_blocks": options.take("num_res_blocks", int),
        "attention_levels": [level for level in range(len(widths)) if 2**level in resolutions],
        "head_dim" if head_dim != -1 else "num_heads": head_dim if head_dim != -1 else heads,
        "scale_shift": options.take("use_scale_shift_norm", bool, False),
        "resblock_resample": options.take("resblock_updown", bool, False),
        "linear_projection": options.take("use_linear_in_transformer", bool, False),
        "dropout": float(options.take("dropout", (int, float), 0.0)),
    }
    depth, context = options.take("transformer_depth", int, 1), options.take("context_dim", int, None)
    if transformer:
        tree |= {"context_dim": context, "transformer_depth": depth}
        alone = options.take("disable_self_attentions", list, [])
        tree["cross_only_levels"] = [level for level, disabled in enumerate(alone) if disabled]
    elif context is not None:
        raise ValueError(f"{options.where}.context_dim needs use_spatial_transformer")
    classes, vector = options.take("num_classes", (int, str), None), options.take("adm_in_channels", int, None)
    if isinstance(classes, int):
        tree |= {"vector_classes": classes, "vector_dim": 1}
    elif classes == "sequential" and vector:
        tree["vector_dim"] = vector
    elif classes is not None:
        raise ValueError(f"{options.where}.num_classes is {shown(classes)}; it cannot be converted")
    older = not options.take("use_new_attention_order", bool, False)
    options.done()
    return tree, older


@dataclass
class Published:
    """A model as described by its YAML. tree: the config tree of our model. latent: True for a whole latent diffusion
    model, False for an autoencoder alone. older_attention: see `_unet`. uses_ema: whether the checkpoint also holds
    averaged weights."""

    yaml: dict[str, Any]
    tree: dict[str, Any]
    latent: bool
    older_attention: bool = True
    uses_ema: bool = False

    @property
    def class_rows(self) -> int | None:
        """The number of rows of the checkpoint's class embedding, or None for models without one."""
        if "class_label" not in self.tree.get("conditioners", {}):
            return None
        return self.yaml["model"]["params"]["cond_stage_config"]["params"].get("n_classes") or 1000


def needs_of(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the `needs` of `published` for one of our models, i.e. what it must know in addition to the YAML."""
    conditioners = list((tree.get("conditioners") or {}).values())
    needs = {option: part[option] for part in conditioners for option in ("tokenizer", "labels") if part.get(option)}
    frozen = [part["path"] for part in conditioners if "path" in part]  # a text encoder's folder has its tokenizer
    return {"tokenizer": frozen[0], "text_encoder": frozen[0]} | needs if frozen else needs


# Options that only training and logging read.
TRAINING = """
    log_every_t monitor first_stage_key image_size_key num_timesteps_cond loss_type scheduler_config original_elbo_weight
    l_simple_weight learn_logvar logvar_init ckpt_path ignore_keys load_only_unet use_positional_encodings clip_denoised
    base_learning_rate make_it_fit unconditional_guidance_scale unconditional_guidance_label v_posterior scale_by_std
"""


def published(config: Mapping[str, Any], where: str, needs: Mapping[str, Any] | None = None) -> Published:
    """Reads a model from the `model` section of its YAML. where: the file, for error messages. needs: {"tokenizer": ..,
    "labels": .., "null_class": .., "text_encoder": .., "folder": .. of the checkpoint, "statistics": ..}, which no
    YAML contains. Raises ValueError, naming the option, for what cannot be converted, and FileNotFoundError for a
    missing file that it names."""
    kind, options = Options(config, where).part("model")
    if kind in AUTOENCODERS:
        return Published({"model": config["model"]}, _autoencoder(kind, options), latent=False)
    if kind not in ("LatentDiffusion", *BESIDE):
        known = ", ".join(("LatentDiffusion", *BESIDE, *AUTOENCODERS))
        raise ValueError(f"{where}: model.target is {kind!r}; {known} can be converted")
    options.ignore(*TRAINING.split())
    options.only(given_betas=None, cosine_s=0.008)
    first_kind, first_options = options.part("first_stage_config")
    autoencoder = _autoencoder(first_kind, first_options)
    options.only(channels=autoencoder["embed_dim"])
    _, unet_options = options.part("unet_config")
    unet, older = _unet(unet_options, autoencoder["embed_dim"])
    conditioners = conditioners_of(options, needs or {}, unet.get("context_dim"))
    if kind in BESIDE:
        conditioners |= beside(kind, options, unet, needs or {})
    size = options.take("image_size", (int, list), 64)
    prediction, betas = options.take("parameterization", str, "eps"), options.take("beta_schedule", str, "linear")
    for name, value, known in (("parameterization", prediction, PREDICTIONS), ("beta_schedule", betas, BETAS)):
        if value not in known:
            raise ValueError(f"{options.where}.{name} is {value!r}; {', '.join(known)} can be converted")
    scale = float(options.take("scale_factor", (int, float), 1.0))
    tree = {
        "_target_": "ldm_train.latent_diffusion.LatentDiffusion",
        "network": unet,
        "first_stage": {
            "_target_": "ldm_train.models.first_stage.FirstStage", "autoencoder": autoencoder, "scale_factor": scale,
        },
        "schedule": {
            "_target_": "ldm_train.diffusion.schedule.NoiseSchedule",
            "kind": BETAS[betas],
            "beta_start": float(options.take("linear_start", (int, float), 1e-4)),
            "beta_end": float(options.take("linear_end", (int, float), 2e-2)),
            "num_train_timesteps": options.take("timesteps", int, 1000),
        },
        "parameterisation": {"_target_": names.PREDICTIONS[PREDICTIONS[prediction]]},
        "conditioners": conditioners,
        "latent_size": [size, size] if isinstance(size, int) else list(size),
    }  # fmt: skip
    ema = options.take("use_ema", bool, True)
    options.done()
    return Published({"model": config["model"]}, tree, True, older, ema)
