"""The YAML of CompVis/latent-diffusion's models and of their relatives, as trees of our models.

A YAML is read as plain values: its `target`s are looked up in tables here, and nothing that they name is imported. Every option
is used, left out because it does not change what the model computes, or refused by name.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ldm_train import names
from ldm_train.storage import shown

PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
BETAS = {"linear": "scaled_linear", "sqrt_linear": "linear", "cosine": "cosine", "sqrt": "sqrt"}  # theirs, ours


class _Options:
    """The options of one section, each of which is to be used. Errors name the file and the option."""

    def __init__(self, tree: Any, where: str):
        if not isinstance(tree, Mapping):
            raise ValueError(f"{where} is {shown(tree)}, no section with options")
        self.left, self.where = dict(tree), where

    def take(self, name: str, kinds: type | tuple[type, ...], *default: Any) -> Any:
        """An option of one of these types (None counts as left out), or its default where it has one."""
        value = self.left.pop(name, None)
        if value is None and default:
            return default[0]
        fits = isinstance(value, kinds) and (not isinstance(value, bool) or kinds is bool)
        if not fits or (isinstance(value, float) and not math.isfinite(value)):
            raise ValueError(f"{self.where}.{name} is {shown(value)}; it cannot be converted")
        return value

    def numbers(self, name: str, *default: Any) -> list[int]:
        values = self.take(name, list, *default)
        if len(values) > 16 or not all(type(v) is int and 0 < v < 1 << 20 for v in values):
            raise ValueError(f"{self.where}.{name} is {shown(values)}, no list of up to 16 whole numbers")
        return list(values)

    def only(self, **allowed: Any) -> None:
        """Options that can be converted at these values only."""
        for name, value in allowed.items():
            values = value if isinstance(value, tuple) else (value,)
            if (given := self.left.pop(name, values[0])) not in values:
                raise ValueError(
                    f"{self.where}.{name} is {shown(given)}; models with {shown(values[0])} can be converted"
                )

    def ignore(self, *names: str) -> None:
        """Options that do not change what the model computes."""
        for name in names:
            self.left.pop(name, None)

    def part(self, name: str) -> tuple[str, "_Options"]:
        """(last word of its target, its options) of a part."""
        section = _Options(self.left.pop(name, None), f"{self.where}.{name}")
        target = section.take("target", str)
        return target.rpartition(".")[2], _Options(section.left.get("params") or {}, f"{section.where}.params")

    def done(self) -> None:
        if self.left:
            name, value = next(iter(self.left.items()))
            raise ValueError(f"{self.where}.{name}={shown(value)} is unknown; it cannot be converted")


AUTOENCODERS = ("AutoencoderKL", "VQModel", "VQModelInterface")


def _autoencoder(kind: str, options: _Options) -> dict[str, Any]:
    """The tree of an autoencoder."""
    if kind not in AUTOENCODERS:
        raise ValueError(f"{options.where} is of {kind!r}; {', '.join(AUTOENCODERS)} can be converted")
    options.ignore("lossconfig", "monitor", "ckpt_path", "ignore_keys", "image_key", "colorize_nlabels")
    options.ignore("batch_resize_range", "scheduler_config", "lr_g_factor", "use_ema", "learning_rate")
    vq = kind != "AutoencoderKL"
    own = {"embed_dim": options.take("embed_dim", int)}
    if vq:
        own["num_codes"] = options.take("n_embed", int)
        options.only(remap=None, sane_index_shape=False)
    dd = _Options(options.take("ddconfig", dict), f"{options.where}.ddconfig")
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


def _unet(options: _Options, latent_channels: int) -> tuple[dict[str, Any], bool]:
    """(the tree of a U-Net, whether its attention has the older order of queries, keys and values)."""
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
    """A model as its YAML describes it. tree: of our model. latent: whether it is a whole latent diffusion model, not an
    autoencoder alone. older_attention: see `_unet`. uses_ema: whether the checkpoint holds averaged weights too."""

    yaml: dict[str, Any]
    tree: dict[str, Any]
    latent: bool
    older_attention: bool = True
    uses_ema: bool = False

    @property
    def class_rows(self) -> int | None:
        """Rows of the checkpoint's class embedding, of models that have one."""
        if "class_label" not in self.tree.get("conditioners", {}):
            return None
        return self.yaml["model"]["params"]["cond_stage_config"]["params"].get("n_classes") or 1000


def needs_of(tree: Mapping[str, Any]) -> dict[str, Any]:
    """What `published` needs to know beside the YAML, of a model of ours."""
    conditioners = list((tree.get("conditioners") or {}).values())
    needs = {option: part[option] for part in conditioners for option in ("tokenizer", "labels") if part.get(option)}
    frozen = [part["path"] for part in conditioners if "path" in part]  # a text encoder's folder has its tokenizer
    return {"tokenizer": frozen[0], "text_encoder": frozen[0]} | needs if frozen else needs


Tree = dict[str, Any]
HELD_TEXT, HELD_VISION = "text_encoder", "image_encoder"  # the path of an encoder that the checkpoint itself holds
PARTS = "ldm_train.conditioning"


def _class_embedder(own: _Options, needs: Mapping[str, Any]) -> Tree:
    rows, dim = own.take("n_classes", int, 1000), own.take("embed_dim", int)
    own.ignore("key")
    null = needs.get("null_class")  # whether the last row stands for no class, as that of ImageNet's 1,001
    classes = rows - 1 if null or (null is None and rows == 1001) else rows
    return {"_target_": f"{PARTS}.class_label.ClassLabel", "classes": classes, "dim": dim, "slot": "context"}


def _rescaler(own: _Options, needs: Mapping[str, Any]) -> Tree:
    own.ignore("n_stages", "method", "multiplier")  # the map is resized to the latents' size
    own.only(bias=False)
    sizes = {"num_labels": own.take("in_channels", int), "channels": own.take("out_channels", int)}
    return {"_target_": f"{PARTS}.spatial.SemanticMap"} | sizes


def _bert(own: _Options, needs: Mapping[str, Any]) -> Tree:
    size, length = own.take("vocab_size", int, 30522), own.take("max_seq_len", int, 77)
    common = {"dim": own.take("n_embed", int), "depth": own.take("n_layer", int), "heads": 8}
    own.ignore("device", "embedding_dropout")
    if not own.take("use_tokenizer", bool, True):
        if not needs.get("labels"):
            raise ValueError("this model reads labelled boxes; give labels=<how many labels, or [their names]>")
        boxes = {"labels": needs["labels"], "max_objects": (length - 2) // 3, "vocab_size": size}
        return {"_target_": f"{PARTS}.layout.LayoutBoxes"} | boxes | common
    if not needs.get("tokenizer"):
        raise ValueError(
            "this model reads captions with BERT's tokenizer; give tokenizer=<vocab.txt or tokenizer.json>"
        )
    words = {"tokenizer": needs["tokenizer"], "head_dim": 64, "masked": False, "max_length": length}
    return {"_target_": f"{PARTS}.text.TrainedText"} | words | common


def _frozen_text(own: _Options, needs: Mapping[str, Any], openclip: bool) -> Tree:
    own.ignore("version", "arch", "device", "freeze")
    length, layer = own.take("max_length", int, 77), own.take("layer", str, "last")
    if layer not in ("last", "penultimate"):
        raise ValueError(f"{own.where}.layer is {layer!r}; last and penultimate can be converted")
    own.only(layer_idx=None)
    if not needs.get("tokenizer"):
        raise ValueError(
            "this model reads captions with CLIP's tokenizer; give tokenizer=<folder with vocab.json and merges.txt>"
        )
    words = {"path": HELD_TEXT, "tokenizer": needs["tokenizer"]}
    padding = {"pad_id": 0} if openclip else {}  # open_clip's
    return {"_target_": f"{PARTS}.text.FrozenText", "max_length": length, "layer": layer} | words | padding


CONDITIONERS = {
    "ClassEmbedder": _class_embedder,
    "SpatialRescaler": _rescaler,
    "BERTEmbedder": _bert,
    "FrozenCLIPEmbedder": partial(_frozen_text, openclip=False),
    "FrozenOpenCLIPEmbedder": partial(_frozen_text, openclip=True),
}
NAMES = {
    "ClassLabel": "class_label",
    "SemanticMap": "segmentation",
    "LayoutBoxes": "boxes",
    "TrainedText": "text",
    "FrozenText": "text",
}


def _conditioners(options: _Options, needs: Mapping[str, Any], context_dim: int | None) -> dict[str, Tree]:
    """The conditioners' trees. needs: see `published`."""
    key, value = options.take("cond_stage_key", str, "image"), options.left.get("cond_stage_config")
    options.ignore("cond_stage_trainable", "cond_stage_forward", "conditioning_key", "concat_mode")
    if value in (None, "__is_unconditional__", "__is_first_stage__"):
        options.ignore("cond_stage_config")
        if value != "__is_first_stage__":
            return {}
        if key != "masked_image":
            raise ValueError(f"{options.where}.cond_stage_key is {key!r}; __is_first_stage__ can be of masked_image")
        return {"masked_image": {"_target_": f"{PARTS}.spatial.MaskedImageCondition", "form": "ldm"}}
    kind, own = options.part("cond_stage_config")
    if kind == "Identity" and context_dim is not None:  # RDM: CLIP's embeddings, of neighbours or of a caption
        path = needs.get("text_encoder") or "openai/clip-vit-large-patch14"
        text = {"_target_": f"{PARTS}.text.FrozenText", "path": path, "dim": context_dim, "layer": "projected"}
        return {"text": text}
    if kind == "Identity" and key in ("LR_image", "lr"):
        return {"lowres": {"_target_": f"{PARTS}.spatial.LowResolution", "factor": 4}}
    if kind not in CONDITIONERS:
        raise ValueError(f"{own.where} is of {kind!r} for {key!r}; it cannot be converted yet")
    tree = CONDITIONERS[kind](own, needs)
    own.done()
    if kind.startswith("Frozen"):
        tree["dim"] = context_dim
    return {NAMES[tree["_target_"].rpartition(".")[2]]: tree}


# Models with a picture beside the captions, and the class of its conditioner.
BESIDE = {
    "LatentInpaintDiffusion": "MaskedImageCondition",
    "LatentDepth2ImageDiffusion": "DepthMap",
    "LatentUpscaleDiffusion": "LowResolution",
    "ImageEmbeddingConditionedLatentDiffusion": "ImageEmbedding",
}
EMBEDDERS = ("ClipImageEmbedder", "FrozenOpenCLIPImageEmbedder")
UPSCALER_NOISE = {"linear_start": 1e-4, "linear_end": 0.02}


def _image_embedding(options: _Options, width: int, needs: Mapping[str, Any]) -> dict[str, Tree]:
    """The conditioner of SD 2 unCLIP. width: of its vector, the embedding and its noise level side by side."""
    options.ignore("embedding_key", "freeze_embedder")
    dropout = options.take("embedding_dropout", (int, float), 0.5)
    embedder, own = options.part("embedder_config")
    if embedder not in EMBEDDERS:
        raise ValueError(f"{own.where} is of {embedder!r}; {' and '.join(EMBEDDERS)} can be converted")
    own.ignore("model", "jit", "device", "antialias", "ucg_rate", "arch", "version", "max_length", "freeze")
    own.only(layer="pooled")
    own.done()
    noise, own = options.part("noise_aug_config")
    if noise != "CLIPEmbeddingNoiseAugmentation":
        raise ValueError(f"{own.where} is of {noise!r}; CLIPEmbeddingNoiseAugmentation can be converted")
    schedule = _Options(own.take("noise_schedule_config", dict), f"{own.where}.noise_schedule_config")
    schedule.only(beta_schedule="squaredcos_cap_v2", timesteps=1000)
    schedule.done()
    own.only(max_noise_level=1000)
    dim, statistics = own.take("timestep_dim", int, 256), own.take("clip_stats_path", str, None)
    own.done()
    if 2 * dim != width:
        raise ValueError(f"{own.where}.timestep_dim is {dim}; half of adm_in_channels={width} can be converted")
    if statistics is not None:
        statistics = needs.get("statistics") or Path(needs.get("folder", ".")) / Path(statistics).name
        if isinstance(statistics, Path) and not statistics.is_file():
            raise FileNotFoundError(
                f"{options.where} speaks of {statistics.name}; put it beside the checkpoint: {statistics}"
            )
    tree = {
        "_target_": f"{PARTS}.image_embedding.ImageEmbedding",
        "encoder": {"_target_": f"{PARTS}.image_embedding.PretrainedVision", "path": HELD_VISION},
        "encoder_dim": dim, "dim": None, "slot": "vector", "noise_levels": 1000, "dropout": float(dropout),
        "statistics": str(statistics or "unit"),
    }  # fmt: skip
    return {"image": tree}


def _beside(kind: str, options: _Options, network: Tree, needs: Mapping[str, Any]) -> dict[str, Tree]:
    """The conditioner of the picture. network: the U-Net that it conditions."""
    if kind == "ImageEmbeddingConditionedLatentDiffusion":
        return _image_embedding(options, network.get("vector_dim", 0), needs)
    options.ignore("concat_keys", "finetune_keys", "keep_finetune_dims", "c_concat_log_start", "c_concat_log_end")
    target = f"{PARTS}.spatial.{BESIDE[kind]}"
    if kind == "LatentInpaintDiffusion":
        options.ignore("masked_image_key")
        return {"masked": {"_target_": target, "form": "sd2"}}
    if kind == "LatentDepth2ImageDiffusion":
        options.ignore("depth_stage_config")  # the estimator; depth maps are given
        return {"depth": {"_target_": target}}
    options.ignore("low_scale_key")
    noise, own = options.part("low_scale_config")
    if noise != "ImageConcatWithNoiseAugmentation":
        raise ValueError(f"{own.where} is of {noise!r}; ImageConcatWithNoiseAugmentation can be converted")
    schedule = _Options(own.take("noise_schedule_config", dict, {}), f"{own.where}.noise_schedule_config")
    schedule.only(**UPSCALER_NOISE, timesteps=1000, beta_schedule="linear")
    schedule.done()
    levels = own.take("max_noise_level", int, 1000)
    own.done()
    tree = {"channels": network["concat_channels"], "factor": 4, "noise_levels": levels, "vector_dim": 1}
    return {"lowres": {"_target_": target} | tree}


# What only training and logging read.
TRAINING = """
    log_every_t monitor first_stage_key image_size_key num_timesteps_cond loss_type scheduler_config original_elbo_weight
    l_simple_weight learn_logvar logvar_init ckpt_path ignore_keys load_only_unet use_positional_encodings clip_denoised
    base_learning_rate make_it_fit unconditional_guidance_scale unconditional_guidance_label v_posterior scale_by_std
"""


def published(config: Mapping[str, Any], where: str, needs: Mapping[str, Any] | None = None) -> Published:
    """A model from the `model` section of its YAML. where: for messages. needs: {"tokenizer": .., "labels": .., "null_class":
    .., "text_encoder": .., "folder": .. of the checkpoint, "statistics": ..}, which no YAML says. Raises ValueError, naming the
    option, for what cannot be converted, FileNotFoundError for a file that it speaks of."""
    kind, options = _Options(config, where).part("model")
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
    conditioners = _conditioners(options, needs or {}, unet.get("context_dim"))
    if kind in BESIDE:
        conditioners |= _beside(kind, options, unet, needs or {})
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
