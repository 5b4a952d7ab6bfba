"""Exports our models as folders that diffusers can load.

A model is exported as one of diffusers' own pipelines if that computes the same. Other models get the files of
`for_diffusers/` beside their weights: diffusers runs them with trust_remote_code=True; this package never runs code in
such a folder.
"""

import json
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from ldm_train.checkpoints import diffusers_describe as describe
from ldm_train.checkpoints.diffusers import INDEX, bert_key
from ldm_train.checkpoints.diffusers_networks import autoencoder_key, unet_key
from ldm_train.checkpoints.parts import cast, whole
from ldm_train.conditioning.class_label import ClassLabel
from ldm_train.conditioning.spatial import INPAINTING_FORMS, LowResolution, MaskedImageCondition, SemanticMap
from ldm_train.conditioning.text import FrozenText, NarrowTransformer, TrainedText
from ldm_train.latent_diffusion import LatentDiffusion
from ldm_train.models.autoencoder import AutoencoderIdentity, AutoencoderKL
from ldm_train.models.first_stage import FirstStage, fold_statistics
from ldm_train.storage import check_holds_only, read_record, write_json

FILES = Path(__file__).with_name("for_diffusers")
NARROW, CONDITIONERS, PIPELINE = "narrow", "conditioners", "pipeline"
WEIGHTS = "diffusion_pytorch_model.safetensors"
Tensors = dict[str, torch.Tensor]


@dataclass
class Component:
    """One folder of a pipeline.

    source: the library, or the file of `for_diffusers`, that defines its class
    save: writes the folder, for classes of transformers
    """

    source: str
    kind: str
    config: dict[str, Any] = field(default_factory=dict)
    tensors: Tensors = field(default_factory=dict)
    weights: str = WEIGHTS
    save: Callable[[Path, torch.dtype], None] | None = None

    @property
    def code(self) -> str | None:
        """The name of the code file that is written with it, if any."""
        return f"{self.source}.py" if self.source in (NARROW, CONDITIONERS) else None


@dataclass
class Pipeline:
    """A pipeline to be written. kind: its class. options: entries of model_index.json other than the components."""

    kind: str
    components: dict[str, Component | None]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def own(self) -> bool:
        """Whether it needs code files that are written with it."""
        return self.kind == "LatentDiffusionPipeline" or any(c and c.code for c in self.components.values())


def autoencoder_tensors(state: Mapping[str, torch.Tensor], levels: int) -> Tensors:
    """Renames an autoencoder's tensors to diffusers' names. Attention there has linear layers, ours 1x1
    convolutions."""
    made = {}
    for key, tensor in state.items():
        if key.startswith("quantize.") and key != "quantize.embedding.weight":
            continue  # moving-average counts of a codebook, which only training reads
        linear = tensor.ndim == 4 and (".attn." in key or ".attn_1." in key)
        made[autoencoder_key(key, levels)] = tensor[:, :, 0, 0] if linear else tensor
    return made


def unet_tensors(state: Mapping[str, torch.Tensor], per_level: int) -> Tensors:
    """Renames a U-Net's tensors to diffusers' names. The fused qkv of attention without a context is split into
    three."""
    made = {}
    for key, tensor in state.items():
        theirs = unet_key(key, per_level)
        if f"{key.rsplit('.', 2)[0]}.qkv.weight" in state:
            theirs = theirs.replace(".norm.", ".group_norm.").replace(".proj_out.", ".to_out.0.")
            tensor = tensor[:, :, 0] if tensor.ndim == 3 else tensor
        if ".qkv." in theirs:
            made |= {theirs.replace("qkv", name): part for name, part in zip(("to_q", "to_k", "to_v"), tensor.chunk(3))}
        else:
            made[theirs] = tensor
    return made


def _network(network: nn.Module, kind: str, config: dict[str, Any], tensors: Tensors) -> Component:
    narrow = describe.is_narrow(network)
    return Component(NARROW if narrow else "diffusers", f"Narrow{kind}" if narrow else kind, config, tensors)


def autoencoder(tree: Mapping[str, Any], first: FirstStage, fold: bool = False) -> Component:
    """Describes the first stage as a component. A single scale becomes diffusers' scaling_factor; a scale and a shift
    per channel are folded into the convolutions of a KL autoencoder. (With a codebook they stay separate, because
    the nearest code depends on them.) fold: fold a single scale, too."""
    state, tree = first.autoencoder.state_dict(), whole(tree)
    one = None if fold else first.one_scale
    if fold or (one is None and isinstance(first.autoencoder, AutoencoderKL)):
        state = fold_statistics(state, first.scale, first.shift)
    kind, config = describe.autoencoder_config(tree, first.autoencoder, 1.0 if one is None else one)
    return _network(first.autoencoder, kind, config, autoencoder_tensors(state, len(tree["channel_mult"])))


def _conditioner(name: str, module: nn.Module, downsample_factor: int) -> tuple[str, dict[str, Any]]:
    """Returns the name and the options of a conditioner in `for_diffusers/conditioners.py`. Raises ValueError if it has
    no counterpart there."""
    options: dict[str, Any]
    if isinstance(module, ClassLabel):
        ((slot, dim),) = module.widths.items()
        kind, options = "class_label", {"classes": module.names, "dim": dim, "slot": slot}
    elif isinstance(module, TrainedText):
        kind, options = "prompt", {"tokenizer": module.tokenizer.to_str(), "special": module.special}
        options |= {"max_length": module.max_length, "pooled": module.pooled, "masked": module.masked}
        options |= {"learned": module.learned} if module.learned else {}
    elif isinstance(module, LowResolution) and not module.noise_levels:
        kind, options = "low_resolution", {"factor": module.factor, "channels": module.channels}
    elif isinstance(module, SemanticMap):
        kind, options = "segmentation", {"num_labels": module.num_labels, "ignore": module.ignore}
        options["channels"] = module.widths["concat"]
    elif isinstance(module, MaskedImageCondition):
        form = module.form
        kind, options = "masked_image", {"hole": form.hole, "span": list(form.span), "nearest": form.nearest}
        options["first"] = form.first
    else:
        raise ValueError(
            f"the conditioner {name} is a {type(module).__name__} that has no counterpart for diffusers yet"
        )
    if kind in ("low_resolution", "segmentation", "masked_image"):
        options["downsample_factor"] = downsample_factor
    return kind, options | {"dropped": module.dropout > 0}


def conditioners(model: LatentDiffusion, trees: Mapping[str, Mapping[str, Any]], projected: bool) -> Component:
    """Describes a model's conditioners as a component. projected: it includes the projection of the vector, which the
    U-Net then lacks."""
    parts, tensors = {}, {"place": torch.zeros(1)}
    for name, module in model.conditioners.items():
        kind, options = _conditioner(name, module, model.first_stage.downsample_factor)
        if kind == "prompt":
            options |= {k: v for k, v in whole(trees[name]).items() if k in ("dim", "depth", "heads", "head_dim")}
        parts[kind] = options
        tensors |= {f"conditions.{kind}.{key}": tensor for key, tensor in module.state_dict().items()}
    config: dict[str, Any] = {"parts": parts}
    if projected:
        projection = model.network.label_emb[0].state_dict()
        config["vector"] = list(projection["0.weight"].shape[::-1])
        tensors |= {f"projection.{key}": tensor for key, tensor in projection.items()}
    return Component(CONDITIONERS, "Conditioners", config, tensors)


def pipeline(model: LatentDiffusion, tree: Mapping[str, Any], sampling: Mapping[str, Any]) -> Pipeline:
    """Describes a model, with its config tree and its usual sampling options, as a pipeline. Raises ValueError, naming
    the option, if diffusers cannot express it."""
    network, first = whole(tree["network"]), model.first_stage
    kinds = [type(conditioner).__name__ for conditioner in model.conditioners.values()]
    if twice := [kind for kind in kinds if kinds.count(kind) > 1]:
        raise ValueError(f"this model has two conditioners that are a {twice[0]}; one of a kind can be exported")
    if network.get("controlled"):
        raise ValueError(
            "a control is written apart from its model: convert the model that it steers, and ldm-convert from=<run>/diffusion/adapter "
            "to=<folder> format=diffusers"
        )
    kind, config = describe.unet_config(network, model.network, list(model.latent_size))
    identity = config.get("class_embed_type") == "identity"
    state = {k: v for k, v in model.network.state_dict().items() if not (identity and k.startswith("label_emb."))}
    prediction = f"{type(model.parameterisation).__module__}.{type(model.parameterisation).__name__}"
    schedule = describe.scheduler_config(whole(tree["schedule"]), prediction, sampling.get("spacing", "trailing"))
    parts: dict[str, Component | None] = {
        "unet": _network(model.network, kind, config, unet_tensors(state, network["num_res_blocks"])),
        "scheduler": Component("diffusers", "DDIMScheduler", schedule),
    }
    if (known := _known(model, tree, parts)) is not None:
        return known
    pixels, kl = (isinstance(first.autoencoder, kind) for kind in (AutoencoderIdentity, AutoencoderKL))
    vae = None if pixels else autoencoder(tree["first_stage"]["autoencoder"], first)
    made = conditioners(model, tree.get("conditioners") or {}, identity) if model.conditioners else None
    scale, shift = first.scale.flatten(), first.shift.flatten()
    if kl and first.one_scale is None:  # folded into the weights
        scale, shift = torch.ones(1), torch.zeros(1)
    usual = {"num_inference_steps": sampling.get("num_inference_steps", 50)}
    usual["guidance_scale"] = sampling.get("guidance_scale", 1.0)
    usual["eta"] = (sampling.get("sampler") or {}).get("eta", 0.0)
    options = {"latents": {"scale": scale.tolist(), "shift": shift.tolist()}, "sampling": usual}
    return Pipeline("LatentDiffusionPipeline", {"vae": vae} | parts | {"conditioners": made}, options)


def replaced_sampling(sampling: Mapping[str, Any]) -> list[str]:
    """Returns notes on which of the model's usual sampling options a diffusers pipeline changes, and what the model
    usually samples with."""
    notes, spacing = [], sampling.get("spacing", "trailing")
    if spacing not in describe.SPACINGS:
        notes.append(f"its usual spacing {spacing} becomes trailing: diffusers' DDIM steps otherwise there")
    sampler = str((sampling.get("sampler") or {}).get("_target_", "ddim")).rpartition(".")[2]
    if sampler != "ddim":
        notes.append(f"its usual sampler {sampler} becomes DDIM; set pipeline.scheduler for another")
    usual = {k: v for k, v in sampling.items() if k in ("num_inference_steps", "guidance_scale")}
    usual |= {k: v for k, v in (sampling.get("sampler") or {}).items() if k == "eta"}
    if sampling.get("guidance_interval") is not None:
        low, high = sampling["guidance_interval"]
        notes.append(
            f"it is usually guided between the noise levels {low} and {high} only, which the pipeline does at every step"
        )
    if usual:
        notes.append(f"it usually draws with {', '.join(f'{k}={v}' for k, v in usual.items())}")
    return notes


def _known(model: LatentDiffusion, tree: Mapping[str, Any], parts: dict[str, Component | None]) -> Pipeline | None:
    """Returns diffusers' own pipeline that computes the same as the model, or None. parts: U-Net and scheduler."""
    first, kinds = model.first_stage, {type(c): c for c in model.conditioners.values()}
    f, square = first.downsample_factor, len(set(model.latent_size)) == 1
    if isinstance(first.autoencoder, AutoencoderIdentity):
        plain = square and first.one_scale == 1 and first.latent_channels == 3
        return Pipeline("DDPMPipeline", parts) if plain and not kinds else None
    kl, one = isinstance(first.autoencoder, AutoencoderKL), first.one_scale is not None
    own = tree["first_stage"]["autoencoder"]
    if not kinds and square and (kl or one):
        return Pipeline("LDMPipeline", {"vqvae": autoencoder(own, first)} | parts)
    if FrozenText in kinds and kl and kinds.keys() <= {FrozenText, MaskedImageCondition}:
        parts = {"vae": autoencoder(own, first)} | parts | _clip(kinds[FrozenText])
        masked = kinds.get(MaskedImageCondition)
        if masked is not None and masked.form != INPAINTING_FORMS["sd2"]:
            raise ValueError("diffusers' inpainting pipeline knows the form sd2 of the masked picture only")
        kind = "StableDiffusionPipeline" if masked is None else "StableDiffusionInpaintPipeline"
        return Pipeline(kind, parts, {"requires_safety_checker": False})
    if kinds.keys() == {TrainedText} and (kl or one) and f == 8 and square:
        text = kinds[TrainedText]
        narrow = isinstance(text.encoder.transformer, NarrowTransformer)
        if narrow and not text.masked and not text.pooled and text.max_length == 77 and not text.learned:
            (own_text,) = tree["conditioners"].values()
            return Pipeline(
                "LDMTextToImagePipeline", {"vqvae": autoencoder(own, first)} | parts | _bert(text, whole(own_text))
            )
    if kinds.keys() == {LowResolution} and (kl or one):
        small = kinds[LowResolution]
        if not small.noise_levels and small.factor == f and small.channels == first.latent_channels == 3:
            return Pipeline("LDMSuperResolutionPipeline", {"vqvae": autoencoder(own, first, fold=True)} | parts)
    return None


def _clip(text: FrozenText) -> dict[str, Component | None]:
    from transformers import CLIPTextModel

    tokenizer, encoder = text.pretrained()
    if not isinstance(encoder, CLIPTextModel) or text.masked:
        raise ValueError(
            f"the text encoder {text.path} is a {type(encoder).__name__}{' with masked padding' if text.masked else ''}; Stable "
            "Diffusion's pipelines have a CLIPTextModel that sees padding"
        )

    def save_encoder(folder: Path, dtype: torch.dtype) -> None:
        config, state = deepcopy(encoder.config), encoder.state_dict()
        if text.layer == "penultimate":  # the last layer is not used, but the final norm is
            config.num_hidden_layers -= 1
            state = {k: v for k, v in state.items() if f"layers.{config.num_hidden_layers}." not in k}
        saved = CLIPTextModel(config)
        saved.to(dtype).load_state_dict(cast(state, dtype))
        saved.save_pretrained(folder)

    def save_tokenizer(folder: Path, dtype: torch.dtype) -> None:
        saved = deepcopy(tokenizer)
        saved.model_max_length = text.max_length
        if text.pad_id is not None:
            saved.pad_token = saved.convert_ids_to_tokens(text.pad_id)
        saved.save_pretrained(folder)

    return {
        "text_encoder": Component("transformers", "CLIPTextModel", save=save_encoder),
        "tokenizer": Component("transformers", "CLIPTokenizer", save=save_tokenizer),
        **dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder")),
    }


def _bert(text: TrainedText, tree: Mapping[str, Any]) -> dict[str, Component | None]:
    """Describes a `TrainedText` as an LDMBertModel and its tokenizer. tree: with all options, see `parts.whole`."""
    words, dim = text.tokenizer.get_vocab_size(), tree["dim"]
    config = {
        "model_type": "ldmbert", "architectures": ["LDMBertModel"], "vocab_size": words, "d_model": dim,
        "encoder_ffn_dim": 4 * dim, "encoder_layers": tree["depth"], "encoder_attention_heads": tree["heads"],
        "head_dim": tree["head_dim"], "max_position_embeddings": text.max_length, "activation_function": "gelu",
        "pad_token_id": text.special[0],
    }  # fmt: skip
    tensors = {bert_key(key): tensor for key, tensor in text.state_dict().items()}
    # The class has a layer for logits, which nothing reads.
    tensors |= {"to_logits.weight": torch.zeros(words, dim), "to_logits.bias": torch.zeros(words)}

    def save_tokenizer(folder: Path, dtype: torch.dtype) -> None:
        from tokenizers import Tokenizer, processors
        from transformers import PreTrainedTokenizerFast

        own = Tokenizer.from_str(text.tokenizer.to_str())
        pad, start, end = (own.id_to_token(token) for token in text.special)
        ends = [(start, text.special[1]), (end, text.special[2])]
        own.post_processor = processors.TemplateProcessing(single=f"{start} $A {end}", special_tokens=ends)
        names = {"pad_token": pad, "cls_token": start, "sep_token": end}
        length = {"model_max_length": text.max_length}
        PreTrainedTokenizerFast(tokenizer_object=own, **names, **length).save_pretrained(folder)

    return {
        "bert": Component("latent_diffusion", "LDMBertModel", config, tensors, "model.safetensors"),
        "tokenizer": Component("transformers", "PreTrainedTokenizerFast", save=save_tokenizer),
    }


def _version() -> str:
    try:
        return version("diffusers")
    except PackageNotFoundError:
        return "0.35.0"


def check_replaceable(folder: Path) -> None:
    """Raises FileExistsError if a folder holds anything that a model of diffusers does not consist of, so that no other
    files are lost when it is replaced."""
    if not folder.exists():
        return
    refused = FileExistsError(f"to={folder} is there and no folder of diffusers; it is not replaced")
    if not folder.is_dir() or not any((folder / name).is_file() for name in (INDEX, "config.json")):
        raise refused
    parts = read_record(folder / INDEX) if (folder / INDEX).is_file() else {}
    if not parts and "_class_name" not in read_record(folder / "config.json"):
        raise refused
    beside = (INDEX, "config.json", "README.md", ".gitattributes")

    def belongs(path: Path) -> bool:
        weights = path.suffix in (".safetensors", ".bin", ".py") or path.name.endswith(".index.json")
        return path.name in parts if path.is_dir() else path.name in beside or weights

    check_holds_only(folder, belongs, "a model")


def write_component(folder: Path, part: Component, dtype: torch.dtype) -> None:
    """Writes one component as a folder that `from_pretrained` of its class can read."""
    folder.mkdir(parents=True, exist_ok=True)
    if part.save is not None:
        part.save(folder, dtype)
        return
    name = "scheduler_config.json" if part.kind == "DDIMScheduler" else "config.json"
    config = {"_class_name": part.kind, "_diffusers_version": _version()} | part.config
    if part.code:
        config["auto_map"] = {"AutoModel": f"{Path(part.code).stem}.{part.kind}"}
    write_json(folder / name, config)
    if part.tensors:
        save_file(cast(part.tensors, dtype), folder / part.weights, {"format": "pt"})
    if part.code:
        (folder / part.code).write_bytes((FILES / part.code).read_bytes())


def write_pipeline(folder: Path, made: Pipeline, dtype: torch.dtype) -> None:
    """Writes all components and, last, model_index.json."""
    own = made.kind == "LatentDiffusionPipeline"
    index: dict[str, Any] = {
        "_class_name": [PIPELINE, made.kind] if own else made.kind,
        "_diffusers_version": _version(),
    }
    for name, part in made.components.items():
        index[name] = [None, None] if part is None else [part.source, part.kind]
        if part is not None:
            write_component(folder / name, part, dtype)
    if own:
        (folder / f"{PIPELINE}.py").write_bytes((FILES / f"{PIPELINE}.py").read_bytes())
    (folder / INDEX).write_text(json.dumps(index | made.options, indent=1) + "\n")
