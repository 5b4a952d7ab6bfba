"""Describes our models as CompVis YAML."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from ldm_train import names
from ldm_train.checkpoints.compvis_conditioners import BESIDE, EMBEDDERS, UPSCALER_NOISE
from ldm_train.checkpoints.compvis_yaml import BETAS, PREDICTIONS, Published, needs_of, published
from ldm_train.checkpoints.parts import whole
from ldm_train.storage import shown

BERT_WORDS = 30522  # in bert-base-uncased, the tokenizer of BERTEmbedder
KNOWN = ("AutoencoderKL", "AutoencoderVQ", "UNet", "NoiseSchedule")
# Our option -> theirs, for numbers, flags and lists that mean the same.
DDCONFIG = {
    "z_channels": "z_channels", "channels": "ch", "channel_mult": "ch_mult", "num_res_blocks": "num_res_blocks",
    "in_channels": "in_channels", "dropout": "dropout",
}  # fmt: skip
UNET = {
    "out_channels": "out_channels", "channels": "model_channels", "channel_mult": "channel_mult", "dropout": "dropout",
    "num_res_blocks": "num_res_blocks", "scale_shift": "use_scale_shift_norm", "resblock_resample": "resblock_updown",
    "linear_projection": "use_linear_in_transformer", "context_dim": "context_dim", "transformer_depth": "transformer_depth",
}  # fmt: skip


def _autoencoder_yaml(tree: Mapping[str, Any]) -> dict[str, Any]:
    vq, levels = tree["_target_"].endswith("VQ"), len(tree["channel_mult"])
    dd = {theirs: tree[ours] for ours, theirs in DDCONFIG.items()} | {"out_ch": tree["in_channels"], "double_z": not vq}
    dd |= {"resolution": 2**levels, "attn_resolutions": [2 ** (levels - level) for level in tree["attention_levels"]]}
    if not tree["mid_attention"]:
        dd["attn_type"] = "none"
    params = {"embed_dim": tree["embed_dim"], "ddconfig": dd, "lossconfig": {"target": "torch.nn.Identity"}}
    kind = "AutoencoderKL"
    if vq:
        params["n_embed"], kind = tree["num_codes"], "VQModelInterface"
    return {"target": f"ldm.models.autoencoder.{kind}", "params": params}


def _unet_yaml(tree: Mapping[str, Any], size: int) -> dict[str, Any]:
    params: dict[str, Any] = {"image_size": size}
    params |= {theirs: tree[ours] for ours, theirs in UNET.items() if tree[ours] is not None}
    params["in_channels"] = tree["in_channels"] + tree["concat_channels"]
    params["attention_resolutions"] = [2**level for level in tree["attention_levels"]]
    params |= {"num_head_channels": tree["head_dim"]} if tree["head_dim"] else {"num_heads": tree["num_heads"]}
    if tree["context_dim"] or tree["transformer_depth"]:
        params["use_spatial_transformer"] = True
    if tree["cross_only_levels"]:
        params["disable_self_attentions"] = [n in tree["cross_only_levels"] for n in range(len(tree["channel_mult"]))]
    if tree["vector_classes"]:
        params["num_classes"] = tree["vector_classes"]
    elif tree["vector_dim"]:
        params |= {"num_classes": "sequential", "adm_in_channels": tree["vector_dim"]}
    return {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": params}


def beside_captions(conditioners: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Returns the CompVis class of a model with CLIP captions and one image condition, like some Stable Diffusion
    models; None for other models."""
    kinds = {tree["_target_"].rpartition(".")[2] for tree in conditioners.values()}
    others = kinds - {"FrozenText"}
    known = {part: name for name, part in BESIDE.items()}
    return known.get(others.pop()) if len(kinds) == len(conditioners) == 2 and len(others) == 1 else None


@dataclass(frozen=True)
class Weights:
    """Properties of a model that its weights show and its config tree does not. null_class: its class embedding has a
    "no class" row. openclip: its frozen text encoder is an OpenCLIP model. openclip_images: its image encoder is
    one. statistics: its image embeddings have a mean and standard deviation other than 0 and 1."""

    null_class: bool = True
    openclip: bool = False
    openclip_images: bool = False
    statistics: bool = False


STATISTICS = "clip_stats.th"  # name of the file with an image embedding's mean and standard deviation


def _image_embedding_yaml(tree: Mapping[str, Any], weights: Weights) -> dict[str, Any]:
    module = "ldm.modules.encoders.modules"
    if not tree["encoder"]["_target_"].endswith(".PretrainedVision"):
        raise ValueError(
            "the image embedding is of no pretrained vision encoder, a checkpoint of CompVis has one of CLIP"
        )
    if tree["encoder"].get("hidden") or tree["statistics"] is None:
        raise ValueError(
            "the image embedding is of hidden states, or normalised by itself; a checkpoint of CompVis has neither"
        )
    noise = {"timestep_dim": tree["encoder_dim"]}
    noise |= {"noise_schedule_config": {"timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"}}
    noise |= {"clip_stats_path": STATISTICS} if weights.statistics else {}
    return {
        "embedding_dropout": tree["dropout"],
        "embedder_config": {"target": f"{module}.{EMBEDDERS[weights.openclip_images]}"}
        | ({} if weights.openclip_images else {"params": {"model": "ViT-L/14"}}),
        "noise_aug_config": {"target": f"{module}.CLIPEmbeddingNoiseAugmentation", "params": noise},
    }


def _beside_yaml(kind: str, tree: Mapping[str, Any], weights: Weights) -> dict[str, Any]:
    if kind == "ImageEmbeddingConditionedLatentDiffusion":
        return _image_embedding_yaml(tree, weights)
    if kind == "LatentDepth2ImageDiffusion":
        return {
            "depth_stage_config": {
                "target": "ldm.modules.midas.api.MiDaSInference",
                "params": {"model_type": "dpt_hybrid"},
            }
        }
    if kind == "LatentInpaintDiffusion":
        return {"finetune_keys": None}
    module = "ldm.modules.diffusionmodules.upscaling.ImageConcatWithNoiseAugmentation"
    noise = {"noise_schedule_config": dict(UPSCALER_NOISE), "max_noise_level": tree["noise_levels"]}
    return {"low_scale_key": "lr", "low_scale_config": {"target": module, "params": noise}}


def _bert_words(name: str, tokenizer: str) -> dict[str, int]:
    """Returns BERTEmbedder's options for a tokenizer. Raises ValueError if it is not one of BERT, which that class
    always uses, so that it would misread every caption."""
    words = Tokenizer.from_str(tokenizer)
    if any(words.token_to_id(token) is None for token in ("[PAD]", "[CLS]", "[SEP]")):
        raise ValueError(
            f"the conditioner {name} reads captions with a tokenizer made from its data, and a checkpoint of CompVis only with "
            "BERT's; format=native and format=diffusers keep it"
        )
    count = words.get_vocab_size()
    return {} if count == BERT_WORDS else {"vocab_size": count}


def _conditioner_yaml(conditioners: Mapping[str, Mapping[str, Any]], levels: int, weights: Weights) -> dict[str, Any]:
    """Returns the YAML options for a model's conditioning. levels: how often the first stage halves the resolution.
    Raises ValueError for conditioners that no CompVis checkpoint can hold."""
    made: Any = None
    if (beside := beside_captions(conditioners)) is not None:
        parts = {tree["_target_"].rpartition(".")[2]: (name, tree) for name, tree in conditioners.items()}
        own = _beside_yaml(beside, parts[BESIDE[beside]][1], weights)
        name, tree = parts["FrozenText"]
        return own | _conditioner_yaml({name: tree}, levels, weights)
    if not conditioners:
        return {"cond_stage_config": "__is_unconditional__"}
    if len(conditioners) > 1:
        raise ValueError(f"this model has the conditioners {', '.join(conditioners)}; a checkpoint of CompVis has one")
    ((name, tree),) = conditioners.items()
    kind, modules = tree["_target_"].rpartition(".")[2], "ldm.modules.encoders.modules"
    if kind == "ClassLabel":
        rows = (tree["classes"] if isinstance(tree["classes"], int) else len(tree["classes"])) + weights.null_class
        key, made = (
            "class_label",
            {"target": f"{modules}.ClassEmbedder", "params": {"n_classes": rows, "embed_dim": tree["dim"]}},
        )
    elif kind == "SemanticMap":
        params = {"n_stages": levels, "in_channels": tree["num_labels"], "out_channels": tree["channels"]}
        key, made = "segmentation", {"target": f"{modules}.SpatialRescaler", "params": params}
    elif kind == "LowResolution":
        key, made = "LR_image", {"target": "torch.nn.Identity"}
    elif kind == "MaskedImageCondition":
        key, made = "masked_image", "__is_first_stage__"
    elif kind == "FrozenText" and tree["layer"] == "projected":
        key, made = "nix", {"target": "torch.nn.Identity"}
    elif kind == "FrozenText":
        part = "FrozenOpenCLIPEmbedder" if weights.openclip else "FrozenCLIPEmbedder"
        key, made = "txt", {"target": f"{modules}.{part}", "params": {k: tree[k] for k in ("max_length", "layer")}}
    elif kind in ("TrainedText", "LayoutBoxes"):
        params = {"n_embed": tree["dim"], "n_layer": tree["depth"]}
        if kind == "LayoutBoxes":
            params |= {
                "use_tokenizer": False,
                "vocab_size": tree["vocab_size"],
                "max_seq_len": 3 * tree["max_objects"] + 2,
            }
        else:
            params |= {"max_seq_len": tree["max_length"]} | _bert_words(name, tree["tokenizer"])
        key = "coordinates_bbox" if kind == "LayoutBoxes" else "caption"
        made = {"target": f"{modules}.BERTEmbedder", "params": params}
    else:
        raise ValueError(f"the conditioner {name} is a {kind}, which no checkpoint of CompVis can hold")
    return {"cond_stage_key": key, "cond_stage_config": made}


# Options that only training reads, and options that a weights file does not hold: not compared.
UNHELD = (
    *("initial_logvar", "commitment_weight", "codebook_weight", "codebook_ema", "restart_after", "dropout"),
    *("activation_checkpointing", "tokenizer", "labels", "classes", "ignore"),
    *("path", "cache_size", "pretrained", "pad_id", "encoder", "statistics"),
)


def _check_same(ours: Mapping[str, Any], theirs: Mapping[str, Any], name: str) -> None:
    """Raises ValueError if an option of ours has another value when it is read back from the YAML that describes it."""
    ours, theirs = whole(ours), whole(theirs)
    for option in sorted(ours.keys() - set(UNHELD)):
        if ours[option] != theirs.get(option):
            raise ValueError(
                f"{name}.{option} is {shown(ours[option])}; a checkpoint of CompVis can hold {shown(theirs.get(option))} only"
            )


def describe(tree: Mapping[str, Any], weights: Weights = Weights()) -> Published:
    """Describes one of our models as CompVis YAML, from its config tree and what its weights show. Raises ValueError,
    naming the option, for a model that no such YAML can describe."""
    kind = tree["_target_"].rpartition(".")[2]
    if kind in ("AutoencoderKL", "AutoencoderVQ"):
        described = published({"model": _autoencoder_yaml(whole(tree))}, "the autoencoder")
        _check_same(tree, described.tree, "autoencoder.network")
        return described
    if kind != "LatentDiffusion":
        raise ValueError(f"a {kind} has no form in CompVis' code")
    autoencoder, network, schedule = tree["first_stage"]["autoencoder"], tree["network"], whole(tree["schedule"])
    prediction = (tree.get("parameterisation") or {"_target_": names.PREDICTIONS["epsilon"]})["_target_"]
    theirs = {names.PREDICTIONS[kind]: word for word, kind in PREDICTIONS.items()}
    named = [part["_target_"].rpartition(".")[2] for part in (autoencoder, network, schedule)]
    named += [] if prediction in theirs else [prediction]
    if unknown := [name for name in named if name not in KNOWN]:
        raise ValueError(f"a {unknown[0]} has no form in CompVis' code")
    network = whole(network)
    concat, context = network["concat_channels"], network["context_dim"]
    params = {
        "linear_start": schedule["beta_start"],
        "linear_end": schedule["beta_end"],
        "timesteps": schedule["num_train_timesteps"],
        "beta_schedule": {ours: word for word, ours in BETAS.items()}[schedule["kind"]],
        "parameterization": theirs[prediction],
        "channels": network["in_channels"],
        "image_size": tree["latent_size"][0] if len(set(tree["latent_size"])) == 1 else list(tree["latent_size"]),
        "use_ema": False,  # the exported weights are already the averaged ones
        "first_stage_config": _autoencoder_yaml(whole(autoencoder)),
        "unet_config": _unet_yaml(network, max(tree["latent_size"])),
    }
    if concat or context:
        params["conditioning_key"] = "hybrid" if concat and context else "concat" if concat else "crossattn"
    conditioners = {name: whole(part) for name, part in (tree.get("conditioners") or {}).items()}
    params |= _conditioner_yaml(conditioners, len(autoencoder["channel_mult"]) - 1, weights)
    kind = beside_captions(conditioners) or "LatentDiffusion"
    yaml = {"model": {"target": f"ldm.models.diffusion.ddpm.{kind}", "params": params}}
    described = published(yaml, "the model", needs_of(tree) | {"null_class": weights.null_class, "statistics": "unit"})
    again = described.tree
    if schedule["zero_terminal_snr"]:
        raise ValueError("diffusion.schedule.zero_terminal_snr is true, which CompVis' code does not know")
    _check_same(network, again["network"], "diffusion.network")
    _check_same(autoencoder, again["first_stage"]["autoencoder"], "autoencoder.network")
    for (name, part), other in zip(conditioners.items(), again["conditioners"].values()):
        _check_same(part, other, f"diffusion.conditioning.conditioners.{name}")
    return described
