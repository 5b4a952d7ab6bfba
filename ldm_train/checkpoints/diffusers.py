"""Reads pipeline folders of diffusers, without diffusers itself: Stable Diffusion 1 and 2 (including inpainting),
latent diffusion (text-to-image, super-resolution and unconditional), DDPM.

Such a folder may come from an untrusted source. Its files are treated as data: no code in it is run, no module that it
names is imported, and nothing outside it is read.
"""

import re
from pathlib import Path
from typing import Any

import torch

from ldm_train import names
from ldm_train.checkpoints import diffusers_options as rules
from ldm_train.checkpoints.diffusers_networks import (
    built,
    check_folder_links,
    first_stage_tree,
    load_first_stage,
    load_unet,
    load_weights,
    read_weights,
    unet_tree,
    weight_files,
)
from ldm_train.checkpoints.parts import build
from ldm_train.conditioning.base import Conditioner
from ldm_train.conditioning.text import FrozenText, read_tokenizer
from ldm_train.diffusion import parameterisation
from ldm_train.diffusion.parameterisation import Parameterisation
from ldm_train.errors import first_line
from ldm_train.latent_diffusion import LatentDiffusion
from ldm_train.models.autoencoder import AutoencoderIdentity
from ldm_train.models.first_stage import FirstStage
from ldm_train.storage import files_sha256, read_record

INDEX = "model_index.json"
PIPELINES = (
    "StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline", "LDMTextToImagePipeline",
    "LDMSuperResolutionPipeline", "LDMPipeline", "DDPMPipeline",
)  # fmt: skip
# Sampling options of models that record none.
DEFAULT_SAMPLING = {
    "num_inference_steps": 50,
    "guidance_scale": 1.0,
    "spacing": "trailing",
    "sampler": {"_target_": "ldm_train.samplers.ddim.ddim", "_partial_": True},
}
CAPTIONED = 7.5  # the usual guidance scale of models of captions
CONDITIONING = "ldm_train.conditioning"
# Our names in LDM's text encoder -> those of diffusers' LDMBertModel.
BERT = {
    "encoder.token_embedding": "model.embed_tokens",
    "encoder.norm": "model.layer_norm",
    "norm1": "self_attn_layer_norm",
    "norm2": "final_layer_norm",
    "attention.to_q": "self_attn.q_proj",
    "attention.to_k": "self_attn.k_proj",
    "attention.to_v": "self_attn.v_proj",
    "attention.to_out.0": "self_attn.out_proj",
    "linear1": "fc1",
    "linear2": "fc2",
}


def is_diffusers(folder: str | Path) -> bool:
    return (Path(folder) / INDEX).is_file()


def bert_key(key: str) -> str:
    """Returns diffusers' name for a tensor of a `TrainedText` whose heads do not fill its width."""
    if key == "encoder.position_embedding":
        return "model.embed_positions.weight"
    module, leaf = key.rsplit(".", 1)
    if layer := re.match(r"encoder\.transformer\.layers\.(\d+)\.(.*)", module):
        return f"model.layers.{layer[1]}.{BERT[layer[2]]}.{leaf}"
    return f"{BERT[module]}.{leaf}"


def _clip(folder: Path, dim: int) -> tuple[FrozenText, dict[str, Any]]:
    """Loads CLIP's text encoder and tokenizer; returns the conditioner and its config tree. transformers builds the
    encoder from the options checked here, not from the folder's own config."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    encoder, words = folder / "text_encoder", folder / "tokenizer"
    path = encoder / "config.json"
    options = rules.read_options(path, rules.CLIP, known=False)
    if options["hidden_size"] != dim:
        raise rules.refused(path, "hidden_size", options["hidden_size"], f"={dim}, as the U-Net asks,")
    rules.read_options(words / "tokenizer_config.json", rules.TOKENIZER)
    if not (words / "tokenizer.json").is_file() and not all(
        (words / n).is_file() for n in ("vocab.json", "merges.txt")
    ):
        raise FileNotFoundError(f"{words} holds no vocab.json and merges.txt; download the whole model")
    config, weights = CLIPTextConfig(**options), read_weights(encoder)
    try:
        tokenizer = CLIPTokenizer.from_pretrained(words, local_files_only=True, trust_remote_code=False)
        model, told = CLIPTextModel.from_pretrained(
            None, config=config, state_dict=weights, dtype=torch.float32, output_loading_info=True
        )
        if told["missing_keys"]:
            raise ValueError(f"the encoder lacks {sorted(told['missing_keys'])[0]}")
        if (most := max(tokenizer.get_vocab().values())) >= options["vocab_size"]:
            raise ValueError(f"token {most} has no embedding")
    except Exception as error:  # the library raises many types of exceptions
        raise ValueError(
            f"{encoder} and {words} are not a CLIP text encoder ({first_line(error)}); download them again"
        ) from error
    own = {"path": str(encoder.resolve()), "dim": dim, "max_length": options["max_position_embeddings"]}
    tree = {"_target_": f"{CONDITIONING}.text.FrozenText", "tokenizer": str(words.resolve())} | own
    return FrozenText(**own, tokenizer=tree["tokenizer"], pretrained=(tokenizer, model)), tree


def _bert(folder: Path, dim: int) -> tuple[Conditioner, dict[str, Any]]:
    """Loads the text encoder and tokenizer of a latent diffusion text-to-image model; returns the conditioner and its
    config tree."""
    path, words = folder / "bert" / "config.json", folder / "tokenizer"
    options = rules.read_options(path, rules.BERT, known=False)
    heads, head_dim = options["encoder_attention_heads"], options["head_dim"]
    for name, wanted in (("d_model", dim), ("encoder_ffn_dim", 4 * dim)):
        if options[name] != wanted:
            raise rules.refused(path, name, options[name], f"={wanted}, as the U-Net asks,")
    if heads * head_dim == dim:
        raise rules.refused(path, "head_dim", head_dim, f" with which {heads} heads do not fill the width {dim}")
    vocabulary = next(
        (words / n for n in ("vocab.txt", "tokenizer.json") if (words / n).is_file()), words / "vocab.txt"
    )
    tree = {
        "_target_": f"{CONDITIONING}.text.TrainedText", "tokenizer": read_tokenizer(str(vocabulary)).to_str(), "dim": dim,
        "depth": options["encoder_layers"], "heads": heads, "head_dim": head_dim, "masked": False,
        "max_length": options["max_position_embeddings"],
    }  # fmt: skip
    text = built(path, tree)
    load_weights(text, folder / "bert", bert_key, unused=("to_logits.",))
    return text, tree


PREDICTIONS: dict[str, type[Parameterisation]] = {
    kind: getattr(parameterisation, path.rpartition(".")[2]) for kind, path in names.PREDICTIONS.items()
}


def schedule_tree(folder: Path) -> tuple[dict[str, Any], str]:
    """Returns the config tree of the noise schedule, and diffusers' name for what the U-Net predicts."""
    path = folder / "scheduler_config.json"
    _, options = rules.read_class(path, rules.SCHEDULERS)
    prediction, zero_snr = options["prediction_type"], options["rescale_betas_zero_snr"]
    if zero_snr and prediction == "epsilon":  # pure noise holds no information about the image
        raise rules.refused(path, "rescale_betas_zero_snr", zero_snr, "=False, or with prediction_type='v_prediction',")
    own = {name: options[name] for name in ("beta_start", "beta_end", "num_train_timesteps")}
    tree = {
        "_target_": "ldm_train.diffusion.schedule.NoiseSchedule",
        "kind": rules.BETAS[options["beta_schedule"]],
    } | own
    return tree | {"zero_terminal_snr": zero_snr}, prediction


def _part(folder: Path, index: dict[str, Any], libraries: tuple[str, ...], *names: str) -> str:
    """Returns the first of these component names that a pipeline has. Raises ValueError if it has none, or if the
    component's class is not from one of `libraries`."""
    for name in names:
        value = index.get(name)
        if isinstance(value, list) and len(value) == 2 and value[0] is not None:
            if value[0] not in libraries:
                raise ValueError(
                    f"{folder / INDEX} takes its {name} from {value[0]!r}; {libraries[0]}' own can be loaded, and nothing that "
                    "a folder names is imported"
                )
            return name
    raise ValueError(f"{folder / INDEX} names no {' or '.join(names)}; it is not a latent diffusion pipeline")


def _conditioner(
    folder: Path, index: dict[str, Any], kind: str, widths: dict[str, int], f: int
) -> dict[str, tuple[Conditioner, dict[str, Any]]]:
    """Returns the conditioners of a pipeline and their config trees, by name. f: downsampling factor of the first
    stage."""
    made: dict[str, tuple[Conditioner, dict[str, Any]]] = {}
    if width := widths["context"]:
        if kind == "LDMTextToImagePipeline":
            _part(folder, index, ("latent_diffusion", "transformers"), "bert")
            made["text"] = _bert(folder, width)
        else:
            for name in ("text_encoder", "tokenizer"):
                _part(folder, index, ("transformers",), name)
            made["text"] = _clip(folder, width)
    if kind == "StableDiffusionInpaintPipeline":
        tree = {"_target_": f"{CONDITIONING}.spatial.MaskedImageCondition", "form": "sd2"}
        made["masked"] = build(tree, folder), tree
    if kind == "LDMSuperResolutionPipeline":  # its input images have the size of the latents
        tree = {"_target_": f"{CONDITIONING}.spatial.LowResolution", "channels": widths["concat"], "factor": f}
        made["lowres"] = build(tree, folder), tree
    return made


def read_pipeline(folder: str | Path) -> tuple[LatentDiffusion, dict[str, Any]]:
    """Loads the model in a pipeline folder (U-Net, KL or VQ autoencoder, text encoder, noise schedule) and returns it
    with its config tree.

    Raises FileNotFoundError if a part is missing, and ValueError, naming file and option, if one is not supported here.
    """
    folder = Path(folder)
    check_folder_links(folder)
    index = read_record(folder / INDEX)
    if (kind := index.get("_class_name")) not in PIPELINES:
        hint = f"; {rules.EXPORTED}" if isinstance(kind, list) else ""
        raise ValueError(f"{folder / INDEX} is for {kind!r}; {', '.join(PIPELINES)} can be loaded{hint}")
    library = ("diffusers",)
    if kind == "DDPMPipeline":
        autoencoder = {"_target_": "ldm_train.models.autoencoder.AutoencoderIdentity"}
        first_stage = FirstStage(AutoencoderIdentity())
        first_tree = {"_target_": "ldm_train.models.first_stage.FirstStage", "autoencoder": autoencoder}
    else:
        vae = folder / _part(folder, index, library, "vae", "vqvae")
        first_stage, first_tree = load_first_stage(vae), first_stage_tree(vae)
        if kind == "LDMSuperResolutionPipeline":  # this pipeline ignores the scaling factor
            first_stage.set_statistics(1.0)
            first_tree["scale_factor"] = 1.0
    concat = {"StableDiffusionInpaintPipeline": first_stage.latent_channels + 1, "LDMSuperResolutionPipeline": 3}
    unet = folder / _part(folder, index, library, "unet")
    network, size = load_unet(unet, first_stage.latent_channels, concat.get(kind, 0))
    f = first_stage.downsample_factor
    made = _conditioner(folder, index, kind, network.condition_widths, f)
    schedule, prediction = schedule_tree(folder / _part(folder, index, library, "scheduler"))
    tree = {
        "_target_": "ldm_train.latent_diffusion.LatentDiffusion",
        "network": unet_tree(unet, first_stage.latent_channels, concat.get(kind, 0))[0],
        "first_stage": first_tree,
        "schedule": schedule,
        "parameterisation": {"_target_": names.PREDICTIONS[prediction]},
        "conditioners": {name: own for name, (_, own) in made.items()},
        "latent_size": size,
    }
    conditioners = {name: module for name, (module, _) in made.items()}
    noise = build(schedule, folder / "scheduler" / "scheduler_config.json")
    model = LatentDiffusion(network, first_stage, noise, conditioners, PREDICTIONS[prediction](), size)
    return model.eval(), tree


def load_diffusers(folder: str | Path) -> LatentDiffusion:
    """Loads the model in a pipeline folder. Raises the same errors as `read_pipeline`."""
    return read_pipeline(folder)[0]


def usual_sampling(captions: bool) -> dict[str, Any]:
    """Returns the sampling options of published models that record none. captions: whether they draw from captions."""
    return DEFAULT_SAMPLING | ({"guidance_scale": CAPTIONED} if captions else {})


def diffusers_metadata(folder: str | Path) -> dict[str, Any]:
    """Returns what metadata.json holds in a native folder: the sha256 of weights and configs, and the usual sampling
    options of such models."""
    folder = Path(folder)
    check_folder_links(folder)
    parts = [folder / n for n in ("unet", "vae", "vqvae", "text_encoder", "bert") if (folder / n).is_dir()]
    configs = [folder / INDEX, *sorted(folder.glob("*/*config.json"))]
    digest = files_sha256((*configs, *(p for part in parts for p in weight_files(part))))
    captions = any((folder / name).is_dir() for name in ("text_encoder", "bert"))
    return {"sha256": digest, "sampling": usual_sampling(captions)}
