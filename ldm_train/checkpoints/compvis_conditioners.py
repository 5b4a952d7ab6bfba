"""Converts the conditioning in the YAML of CompVis' models and their relatives to config trees of our conditioners."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ldm_train.checkpoints.compvis_options import Options

Tree = dict[str, Any]
HELD_TEXT, HELD_VISION = "text_encoder", "image_encoder"  # the `path` of an encoder inside the checkpoint itself
PARTS = "ldm_train.conditioning"


def _class_embedder(own: Options, needs: Mapping[str, Any]) -> Tree:
    rows, dim = own.take("n_classes", int, 1000), own.take("embed_dim", int)
    own.ignore("key")
    null = needs.get("null_class")  # whether the last row means "no class", e.g. in ImageNet's 1,001
    classes = rows - 1 if null or (null is None and rows == 1001) else rows
    return {"_target_": f"{PARTS}.class_label.ClassLabel", "classes": classes, "dim": dim, "slot": "context"}


def _rescaler(own: Options, needs: Mapping[str, Any]) -> Tree:
    own.ignore("n_stages", "method", "multiplier")  # the map is resized to the latents' size
    own.only(bias=False)
    sizes = {"num_labels": own.take("in_channels", int), "channels": own.take("out_channels", int)}
    return {"_target_": f"{PARTS}.spatial.SemanticMap"} | sizes


def _bert(own: Options, needs: Mapping[str, Any]) -> Tree:
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


def _frozen_text(own: Options, needs: Mapping[str, Any], openclip: bool) -> Tree:
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
    padding = {"pad_id": 0} if openclip else {}  # open_clip's padding
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


def conditioners_of(options: Options, needs: Mapping[str, Any], context_dim: int | None) -> dict[str, Tree]:
    """Returns the conditioners' config trees by name. needs: see `published`. context_dim: of the U-Net."""
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


# Models with an image condition beside the captions -> the class of our conditioner for it.
BESIDE = {
    "LatentInpaintDiffusion": "MaskedImageCondition",
    "LatentDepth2ImageDiffusion": "DepthMap",
    "LatentUpscaleDiffusion": "LowResolution",
    "ImageEmbeddingConditionedLatentDiffusion": "ImageEmbedding",
}
EMBEDDERS = ("ClipImageEmbedder", "FrozenOpenCLIPImageEmbedder")
UPSCALER_NOISE = {"linear_start": 1e-4, "linear_end": 0.02}


def _image_embedding(options: Options, width: int, needs: Mapping[str, Any]) -> dict[str, Tree]:
    """Returns the image conditioner of SD 2 unCLIP. width: of its vector, in which the embedding and that of its noise
    level are concatenated."""
    options.ignore("embedding_key", "freeze_embedder")
    dropout = options.take("embedding_dropout", (int, float), 0.5)
    embedder, own = options.part("embedder_config")
    if embedder not in EMBEDDERS:
        raise ValueError(f"{own.where} is of {embedder!r}; {' and '.join(EMBEDDERS)} can be converted")
    own.ignore("model", "jit", "device", "antialias", "ucg_rate")  # options of image embedders
    own.ignore("arch", "version", "max_length", "freeze")  # options of text embedders
    own.only(layer="pooled")
    own.done()
    noise, own = options.part("noise_aug_config")
    if noise != "CLIPEmbeddingNoiseAugmentation":
        raise ValueError(f"{own.where} is of {noise!r}; CLIPEmbeddingNoiseAugmentation can be converted")
    schedule = Options(own.take("noise_schedule_config", dict), f"{own.where}.noise_schedule_config")
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


def beside(kind: str, options: Options, network: Tree, needs: Mapping[str, Any]) -> dict[str, Tree]:
    """Returns the conditioner of the image beside the captions. network: the config tree of the U-Net that it
    conditions."""
    if kind == "ImageEmbeddingConditionedLatentDiffusion":
        return _image_embedding(options, network.get("vector_dim", 0), needs)
    options.ignore("concat_keys", "finetune_keys", "keep_finetune_dims", "c_concat_log_start", "c_concat_log_end")
    target = f"{PARTS}.spatial.{BESIDE[kind]}"
    if kind == "LatentInpaintDiffusion":
        options.ignore("masked_image_key")
        return {"masked": {"_target_": target, "form": "sd2"}}
    if kind == "LatentDepth2ImageDiffusion":
        options.ignore("depth_stage_config")  # the depth estimator; here depth maps are inputs
        return {"depth": {"_target_": target}}
    options.ignore("low_scale_key")
    noise, own = options.part("low_scale_config")
    if noise != "ImageConcatWithNoiseAugmentation":
        raise ValueError(f"{own.where} is of {noise!r}; ImageConcatWithNoiseAugmentation can be converted")
    schedule = Options(own.take("noise_schedule_config", dict, {}), f"{own.where}.noise_schedule_config")
    schedule.only(**UPSCALER_NOISE, timesteps=1000, beta_schedule="linear")
    schedule.done()
    levels = own.take("max_noise_level", int, 1000)
    own.done()
    tree = {"channels": network["concat_channels"], "factor": 4, "noise_levels": levels, "vector_dim": 1}
    return {"lowres": {"_target_": target} | tree}
