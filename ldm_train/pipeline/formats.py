"""The formats that a model can be written in: what each writes, and how it is read again."""

import importlib
import io
import re
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml as yaml_library
from safetensors.torch import save
from torch import nn

from ldm_train.checkpoints import compvis, diffusers_export
from ldm_train.checkpoints.clip import is_openclip
from ldm_train.checkpoints.compvis_conditioners import HELD_TEXT, HELD_VISION
from ldm_train.checkpoints.compvis_describe import STATISTICS, Weights, describe
from ldm_train.checkpoints.compvis_yaml import Published, needs_of
from ldm_train.checkpoints.native import METADATA, load_model, save_model
from ldm_train.conditioning.image_embedding import ImageEmbedding, PretrainedVision
from ldm_train.conditioning.text import FrozenText
from ldm_train.latent_diffusion import LatentDiffusion
from ldm_train.models.autoencoder import AutoencoderKL
from ldm_train.models.first_stage import FirstStage, fold_statistics
from ldm_train.storage import write_atomically, write_folder
from ldm_train.unclip import ImageEmbeddings

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SD_SCALE = 0.18215
Outputs = dict[str, torch.Tensor]


@dataclass
class Model:
    """A model to be written. tree: the config that builds it. metadata: what its native folder records. folders:
    encoders in these may be copied along with the model; those elsewhere stay where they are."""

    module: nn.Module
    tree: dict[str, Any]
    metadata: dict[str, Any]
    folders: Sequence[Path] = ()

    @property
    def null_class(self) -> bool:
        """True unless the metadata say that there is no null class and the class embedding's last row is zero."""
        rows = [
            tensor[-1]
            for key, tensor in self.module.state_dict().items()
            if re.fullmatch(r"conditioners\.\w+\.embedding\.weight", key)
        ]
        return self.metadata.get("null_class") is not False or any(row.any() for row in rows)

    @property
    def frozen_text(self) -> FrozenText | None:
        conditioners = getattr(self.module, "conditioners", {}).values()
        return next((c for c in conditioners if isinstance(c, FrozenText)), None)

    @property
    def image_embedding(self) -> ImageEmbedding | None:
        conditioners = getattr(self.module, "conditioners", {}).values()
        return next((c for c in conditioners if isinstance(c, ImageEmbedding)), None)

    def encoders(self) -> list[tuple[str, FrozenText | PretrainedVision]]:
        """(name of the conditioner, encoder) for each frozen encoder."""
        parts = [(name, getattr(c, "encoder", c)) for name, c in getattr(self.module, "conditioners", {}).items()]
        return [(name, part) for name, part in parts if isinstance(part, FrozenText | PretrainedVision)]

    def has(self, encoder: FrozenText | PretrainedVision) -> bool:
        """Returns True if an encoder was given or loaded already, or lies in one of `folders`."""
        place = Path(encoder.path).resolve()
        return encoder.is_taken or any(place.is_relative_to(folder.resolve()) for folder in self.folders)

    def elsewhere(self) -> list[str]:
        """The folders on this machine of the encoders that the model uses but does not have (see `has`)."""
        named = [*(e for _, e in self.encoders()), *self.inner()]
        return [e.path for e in named if not self.has(e) and Path(e.path).is_dir()]

    def inner(self) -> list[FrozenText | PretrainedVision]:
        """The frozen encoders of the model inside an `unclip.ImageEmbeddings` autoencoder, if this model has one."""
        first = getattr(self.module, "first_stage", None)
        part = self.module if first is None else first.autoencoder
        return [e for _, e in Model(part.model, {}, {}).encoders()] if isinstance(part, ImageEmbeddings) else []

    def described(self) -> Published:
        """The model as CompVis' YAML describes it. Raises ValueError if that cannot describe it."""
        text, image = self.frozen_text, self.image_embedding
        held = text is not None and text.layer != "projected"
        says = {"null_class": self.null_class, "openclip": held and is_openclip(text.pretrained()[1])}
        if image is not None and isinstance(image.encoder, PretrainedVision):
            if (kind := type(image.encoder.loaded().model).__name__) != "CLIPVisionModelWithProjection":
                raise ValueError(
                    f"the image encoder {image.encoder.path} is a {kind}; a checkpoint of CompVis has one of CLIP"
                )
            says["openclip_images"] = is_openclip(image.encoder.model)
            says["statistics"] = not image.per_image and bool(image.mean.any() or (image.std != 1).any())
        return describe(self.tree, Weights(**says))


@dataclass
class Form:
    """A model in one format, not yet written.

    files: the paths to write. says: text for the report. again: reads what was written and returns its `outputs`.
    tolerance: of their difference from those of the model itself, in float32. hint: a message for the end
    """

    files: list[Path]
    says: str
    write: Callable[[], None]
    again: Callable[[], Outputs]
    tolerance: float = 0.0
    hint: str = ""


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def network_inputs(model: LatentDiffusion) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Inputs of the network for one sample: noisy latents and a condition, from fixed noise (the vector: ones)."""
    drawn = isinstance(model.first_stage.autoencoder, ImageEmbeddings)
    side, widths = 1 if drawn else 2 * model.network.size_multiple, model.network.condition_widths
    given = {}
    if widths["context"]:
        given["context"] = _noise(1, 4, widths["context"])
    if widths["concat"]:
        given["concat"] = _noise(1, widths["concat"], side, side)
    if widths["vector"]:
        given["vector"] = torch.ones(1, widths["vector"])
    if widths.get("control"):
        given["control"] = _noise(1, widths["control"], side, side)
    return _noise(1, model.network.in_channels, side, side), given


def autoencoder_images(autoencoder: nn.Module) -> torch.Tensor:
    side = 2 * autoencoder.downsample_factor
    return _noise(1, autoencoder.in_channels, side, side).clamp(-1, 1)


def outputs(model: nn.Module) -> Outputs:
    """What a model computes from fixed inputs: its network's prediction, decoded latents, encoded caption and image (by
    local frozen encoders) and null condition, or an autoencoder's reconstruction and image embedding."""
    conditioners = model.conditioners.values() if isinstance(model, LatentDiffusion) else ()
    encoders = [getattr(conditioner, "encoder", None) for conditioner in conditioners]
    for part in (model, *(encoder for encoder in encoders if isinstance(encoder, nn.Module))):
        for weights in part.parameters():  # cloned to aligned memory: on some processors the last bit depends on it
            weights.data = weights.data.clone()
    with torch.inference_mode():
        if isinstance(model, ImageEmbeddings):
            images = _noise(1, model.in_channels, *[model.downsample_factor] * 2).clamp(-1, 1)
            return {"embedding": model.encode(images).mean, "reconstruction": model.decode(model.encode(images).mean)}
        if not isinstance(model, LatentDiffusion):
            return {"reconstruction": model(autoencoder_images(model), sample=False)[0]}
        x, given = network_inputs(model)
        made = {"prediction": model.network(x, torch.tensor([500.0]), **given), "decoding": model.decode(x)}
        for conditioner in model.conditioners.values():
            if isinstance(conditioner, FrozenText) and conditioner.is_local:
                made["caption"] = conditioner.encode(["a"])[0]
            encoder = getattr(conditioner, "encoder", None)
            if isinstance(encoder, PretrainedVision) and encoder.is_local:
                made["picture"] = conditioner.embed(_noise(1, 3, 64, 64).clamp(-1, 1))
        if not any("concat" in conditioner.widths for conditioner in model.conditioners.values()):
            null = model.null_condition(1)
            made |= {f"null {slot}": null[slot] for slot in ("context", "vector") if slot in null}
        return made


def native(model: Model, target: Path, dtype: torch.dtype) -> Form:
    """A native model folder."""
    megabytes = 4e-6 * sum(parameter.numel() for parameter in model.module.parameters())
    tree = deepcopy(model.tree)
    along = [(name, encoder) for name, encoder in model.encoders() if model.has(encoder)]
    if [e for e in model.inner() if Path("/") in model.folders]:
        raise ValueError(
            "encoders=true copies no encoder of the model that draws a prior's embeddings; convert that model with it, and train the "
            "prior on the result"
        )

    def write() -> None:
        for name, encoder in along:
            part, vision = tree["conditioners"][name], isinstance(encoder, PretrainedVision)
            part = part["encoder"] if vision else part
            part.pop("tokenizer", None)
            part["path"] = _along(target / (HELD_VISION if vision else HELD_TEXT), encoder.savable())
        save_model(target, model.module, tree, model.metadata)

    says = f"{target}, a model folder ({megabytes:,.1f} MB of weights)"
    stay = model.elsewhere()
    hint = f"it names {' and '.join(stay)}, which stay where they are; encoders=true copies them along" if stay else ""
    return Form([target], says, write, lambda: outputs(load_model(target)), hint=hint)


def _along(folder: Path, parts: Sequence[Any]) -> str:
    """Writes a frozen encoder and its tokenizer or image processor. Returns the folder's path in the model folder."""

    def save_parts(folder: Path) -> None:
        for part in reversed(parts):
            part.save_pretrained(folder)

    write_folder(folder, save_parts)
    return f"./{folder.name}"


def of_compvis(model: Model, target: Path, dtype: torch.dtype) -> Form:
    """A CompVis checkpoint, with its YAML beside it."""
    described = model.described()
    return _checkpoint(model, target, described, compvis.state_dict(model.module, described, dtype), {"format": "pt"})


def _checkpoint(
    model: Model, target: Path, described: Published, tensors: dict[str, torch.Tensor], says: dict[str, str]
) -> Form:
    """A checkpoint file with its YAML beside it. says: metadata, for .safetensors files."""
    megabytes, dtype = sum(tensor.nbytes for tensor in tensors.values()) / 1e6, next(iter(tensors.values())).dtype
    beside, written = target.with_suffix(".yaml"), {}
    if (noise := described.yaml["model"]["params"].get("noise_aug_config", {}).get("params", {})).get(
        "clip_stats_path"
    ):
        statistics = target.with_name(f"{target.stem}.{STATISTICS}")
        image, noise["clip_stats_path"] = model.image_embedding, statistics.name
        written[statistics] = _pickled((image.mean.cpu(), image.std.cpu()))
    yaml = yaml_library.safe_dump(described.yaml, sort_keys=False).encode()

    def write() -> None:
        data = save(tensors, says) if target.suffix == ".safetensors" else _pickled({"state_dict": tensors})
        target.parent.mkdir(parents=True, exist_ok=True)
        for path, content in {**written, beside: yaml, target: data}.items():
            write_atomically(path, lambda file, content=content: file.write(content))

    def again() -> Outputs:
        needs = needs_of(model.tree) | {"null_class": model.null_class}
        if model.frozen_text is not None and model.frozen_text.layer != "projected":
            needs["tokenizer"] = model.frozen_text.pretrained()[0]
        return outputs(compvis.load(target, beside, needs=needs)[0])

    text = f"{target} and {beside.name}, {len(tensors)} tensors, {megabytes:,.1f} MB, {dtype}".replace("torch.", "")
    folded = isinstance(model.module, LatentDiffusion) and model.module.first_stage.one_scale is None
    return Form([target, beside, *written], text, write, again, 1e-4 if folded else 0.0)


def _pickled(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def single_file(model: Model, target: Path, dtype: torch.dtype) -> Form:
    """Stable Diffusion's single .safetensors file, for ComfyUI and stable-diffusion-webui, with its YAML beside it."""
    text, first = model.frozen_text, getattr(model.module, "first_stage", None)
    shaped = first is not None and first.latent_channels == 4 and first.downsample_factor == 8
    if text is None or not shaped or not isinstance(first.autoencoder, AutoencoderKL):
        raise ValueError(
            "format=single_file is for models of Stable Diffusion's shape: captions by CLIP, a KL autoencoder with f = 8 and 4 "
            "channels; format=compvis writes others"
        )
    described = model.described()
    params = described.yaml["model"]["params"]
    for option, known in (
        ("linear_start", 0.00085),
        ("linear_end", 0.012),
        ("beta_schedule", "linear"),
        ("timesteps", 1000),
    ):
        if params[option] != known:
            raise ValueError(
                f"format=single_file: programs that read it know Stable Diffusion's noise only, this model's {option} is "
                f"{params[option]}, not {known}"
            )
    if params["parameterization"] not in ("eps", "v"):
        raise ValueError("format=single_file: programs that read it know models that predict noise or velocity only")
    tensors = compvis.state_dict(model.module, described, dtype)
    del tensors["scale_factor"]
    described.yaml["model"]["params"]["scale_factor"] = SD_SCALE
    if first.one_scale is None or abs(first.one_scale - SD_SCALE) > 1e-6:  # these programs support no other
        folded = fold_statistics(first.autoencoder.state_dict(), first.scale / SD_SCALE, first.shift)
        moved = {f"first_stage_model.{k}": folded[k] for k in folded if "quant_conv" in k}
        tensors |= diffusers_export.cast(moved, dtype)
    if described.yaml["model"]["params"]["parameterization"] == "v":
        tensors["v_pred"] = torch.zeros(0)  # by which ComfyUI recognises it
    says = {
        "format": "pt", "modelspec.sai_model_spec": "1.0.0", "modelspec.title": target.stem, "modelspec.architecture":
        "stable-diffusion-v2" if is_openclip(text.pretrained()[1]) else "stable-diffusion-v1",
        "modelspec.prediction_type": described.yaml["model"]["params"]["parameterization"].replace("eps", "epsilon"),
    }  # fmt: skip
    form = _checkpoint(model, target, described, tensors, says)
    unet = model.tree["network"]
    if (unet["channels"], unet.get("context_dim")) not in ((320, 768), (320, 1024)):
        form.hint = (
            "not of Stable Diffusion's own widths, by which ComfyUI and webui tell models: they will not know it"
        )
    form.tolerance = 1e-4
    return form


def of_diffusers(model: Model, target: Path, dtype: torch.dtype) -> Form:
    """A diffusers pipeline's folder, or the diffusers folder of an autoencoder."""
    module = model.module
    if isinstance(module, LatentDiffusion):
        made = diffusers_export.pipeline(module, model.tree, model.metadata.get("sampling", {}))
        says = f"a {made.kind}, for diffusers"
        parts = {name: part for name, part in made.components.items() if part is not None}
        option = ", trust_remote_code=True" if made.own else ""
        usual = model.metadata.get("sampling", {})
        hint = "".join(f"{note}\n" for note in diffusers_export.replaced_sampling(usual))
        hint += f'open it: diffusers.DiffusionPipeline.from_pretrained("{target}"{option})'

        def write(folder: Path) -> None:
            diffusers_export.write_pipeline(folder, made, dtype)
    else:
        first = FirstStage(module, float(model.metadata.get("scale_factor", 1)))
        part = diffusers_export.autoencoder(model.tree, first)
        says, parts = f"autoencoder {part.kind}, for diffusers", {"": part}
        kind, option = (part.kind, "") if part.code is None else ("AutoModel", ", trust_remote_code=True")
        hint = f'open it: diffusers.{kind}.from_pretrained("{target}"{option})'

        def write(folder: Path) -> None:
            folder.rmdir()
            diffusers_export.write_component(folder, part, dtype)

    megabytes = sum(t.numel() for part in parts.values() for t in part.tensors.values()) * dtype.itemsize / 1e6
    says = f"{target}, {says}, {megabytes:,.1f} MB, {dtype}".replace("torch.", "")

    def replaced() -> None:
        diffusers_export.check_replaceable(target)
        write_folder(target, write)

    # The tolerance is for sums in another order: differences of about 1e-6 were measured.
    return Form([target], says, replaced, lambda: _diffusers_outputs(module, target, parts), 1e-4, hint)


def _diffusers_outputs(model: nn.Module, folder: Path, parts: Mapping[str, diffusers_export.Component]) -> Outputs:
    """Main `outputs`, computed by diffusers' networks from the written folder. Raises ValueError without diffusers."""

    def loaded(name: str, part: diffusers_export.Component) -> nn.Module:
        ours = f"ldm_train.checkpoints.for_diffusers.{part.source}"  # equal to the file in the folder, which is not run
        try:
            kinds = importlib.import_module(ours if part.code else part.source)
        except ImportError as error:
            raise ValueError("verify=true compares with diffusers: pip install diffusers") from error
        return getattr(kinds, part.kind).from_pretrained(folder / name, low_cpu_mem_usage=False).float().eval()

    with torch.inference_mode():
        if not isinstance(model, LatentDiffusion):
            vae, images = loaded("", parts[""]), autoencoder_images(model)
            encoded = vae.encode(images)
            z = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
            return {"reconstruction": vae.decode(z).sample}
        x, given = network_inputs(model)
        unet, inputs = loaded("unet", parts["unet"]), torch.cat([x, given["concat"]], 1) if "concat" in given else x
        own = {"encoder_hidden_states": given.get("context"), "class_labels": given.get("vector")}
        if "vector" in given and parts["unet"].config.get("class_embed_type") == "identity":
            own["class_labels"] = loaded("conditioners", parts["conditioners"]).projection(given["vector"])
        own = {k: v for k, v in own.items() if v is not None}
        made = _null_condition(model, loaded, parts) | {"prediction": unet(inputs, torch.tensor([500.0]), **own).sample}
        for name in {"vae", "vqvae"} & parts.keys():
            vae, first = loaded(name, parts[name]), model.first_stage
            if first.one_scale is not None or not hasattr(vae, "quantize"):
                z = x / vae.config.scaling_factor
            else:
                z = x / first.scale + first.shift
            made["decoding"] = vae.decode(z).sample.clamp(-1, 1)
        return made


def _null_condition(model: LatentDiffusion, loaded: Callable[..., nn.Module], parts: Mapping[str, Any]) -> Outputs:
    """The null condition by the exported conditioners; {} if there are none or one of them needs an image."""
    if "conditioners" not in parts or any("concat" in c.widths for c in model.conditioners.values()):
        return {}
    made = loaded("conditioners", parts["conditioners"])({}, 1, True, None)
    theirs = {"context": made.get("encoder_hidden_states")}
    if not parts["conditioners"].config.get("vector"):
        theirs["vector"] = made.get("class_labels")
    return {f"null {slot}": value for slot, value in theirs.items() if value is not None}


FORMS: dict[str, Callable[[Model, Path, torch.dtype], Form]] = {
    "native": native,
    "compvis": of_compvis,
    "diffusers": of_diffusers,
    "single_file": single_file,
}


def check_target(form: str, target: Path, dtype: torch.dtype) -> None:
    """Raises ValueError if a model cannot be written to `target` in this format. Called before the model is read."""
    if form == "native" and dtype != torch.float32:
        raise ValueError("dtype= is for other forms; native folders hold float32")
    if form == "compvis" and target.suffix not in compvis.FILES[:2]:
        raise ValueError(f"to={target}: a checkpoint of CompVis is a file, {' or '.join(compvis.FILES[:2])}")
    if form == "single_file" and target.suffix != ".safetensors":
        raise ValueError(f"to={target}: a single file is one of .safetensors")
    if form == "native" and (target / "config.yaml").is_file() and not (target / METADATA).is_file():
        raise ValueError(f"to={target} is a run, or another folder with a config.yaml; choose a new folder in it")
    if form in ("native", "diffusers") and target.is_file():
        raise ValueError(f"to={target} is a file, and format={form} is a folder; choose another to=")
    if form in ("native", "diffusers") and target.suffix in compvis.FILES:
        raise ValueError(f"to={target}: format={form} is a folder; set format=compvis or single_file for a file")
