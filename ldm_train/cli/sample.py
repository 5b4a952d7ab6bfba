"""ldm-sample: pictures from a trained model, one seed and one recipe per picture."""

import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from ldm_train import images as pictures
from ldm_train.checkpoints.native import find_model, load_latent_diffusion, read_metadata
from ldm_train.cli.common import run_command
from ldm_train.cli.inputs import Request, chosen_task, latent_mask, picture_size, requests
from ldm_train.data.masks import known_colour
from ldm_train.data.samples import collate
from ldm_train.data.shards import write_json
from ldm_train.diffusion.guidance import classifier_free
from ldm_train.latent_diffusion import LatentDiffusion

# For models that do not say how they are sampled.
DEFAULTS = {
    "num_inference_steps": 50,
    "guidance_scale": 1.0,
    "spacing": "trailing",
    "sampler": {"_target_": "ldm_train.samplers.ddim.ddim", "_partial_": True},
}


def model_folder(run: str | None, runs_dir: str) -> Path:
    """A run (by name or folder) or a model folder -> the folder with its weights.

    Raises FileNotFoundError naming the runs there are.
    """
    if run is None:
        raise ValueError("say which model: run=<run or model folder>")
    for base in (Path(run), Path(runs_dir) / run):
        if folder := find_model(base):
            return folder
    known = sorted(str(p.parent.parent.relative_to(runs_dir)) for p in Path(runs_dir).rglob("diffusion/model"))
    raise FileNotFoundError(
        f"run={run} has no trained model (export/ or diffusion/model/); finished runs in {runs_dir}: {', '.join(known) or 'none'}"
    )


def draw(
    model: LatentDiffusion, part: list[Request], task: str, config: DictConfig, options: dict[str, Any]
) -> torch.Tensor:
    """The pictures of some requests (B, C, H, W), on the CPU."""
    batch = collate([dict(r.fields) for r in part]) if part[0].fields else {}
    batch.pop("replaced", None)
    images = None if part[0].image is None else torch.stack([r.image for r in part])
    if task == "reconstruct":
        return model.decode(model.encode(images)).cpu()
    f = model.first_stage.downsample_factor
    height, width = picture_size(model, config.size)
    extra: dict[str, Any] = {"latent_size": (height // f, width // f)}
    if config.negative is not None:
        extra["negative"] = {"caption": [str(config.negative)] * len(part)}
    mask = None
    if task == "img2img":
        extra |= {"start": model.encode(images), "strength": config.strength}
    if task == "inpaint":
        mask = torch.stack([r.mask for r in part])
        if "masked_image" not in model.fields:
            # Not the hidden pixels: latents beside the hole would show them. Their mean colour disturbs the encoder least.
            filled = images * (1 - mask) + known_colour(images, mask) * mask
            extra["known"] = (model.encode(filled), latent_mask(mask, f).to(model.device))
    drawn = model.sample(batch, [r.seed for r in part], **options, **extra).cpu()
    # The known pixels as they were: decoding cannot give them back exactly.
    return drawn if mask is None else drawn * mask + images * (1 - mask)


def sample(config: DictConfig) -> list[Path]:
    source = model_folder(config.run, config.runs_dir)
    if config.n < 1 or config.batch_size < 1:
        raise ValueError("n and batch_size must be at least 1")
    if config.accelerator == "gpu" and not torch.cuda.is_available():
        raise ValueError("accelerator=gpu, but no GPU is visible; use accelerator=cpu")
    trained = DEFAULTS | (read_metadata(source).get("sampling") or {})
    tree = OmegaConf.to_container(config.sampler) if config.get("sampler") else trained["sampler"]
    for option in ("num_inference_steps", "guidance_scale", "spacing"):
        if config[option] is None:
            config[option] = trained[option]
    device = "cuda" if torch.cuda.is_available() and config.accelerator != "cpu" else "cpu"
    model = load_latent_diffusion(source).to(device, memory_format=torch.channels_last)
    model.schedule.timesteps(config.num_inference_steps, config.spacing)  # complains before any work is done
    if config.negative is not None and "caption" not in model.fields:
        raise ValueError("this model takes no captions, so negative= means nothing to it")
    guidance = {k: v for k, v in OmegaConf.to_container(config.guidance).items() if v}
    if config.guidance_scale == 1 and (guidance or config.negative is not None):
        named = ["negative"] * (config.negative is not None) + [f"guidance.{k}" for k in guidance]
        raise ValueError(f"{', '.join(named)} need guidance: set guidance_scale above 1")
    if not 0 <= config.strength <= 1:
        raise ValueError(f"strength is a share between 0 and 1, not {config.strength}")
    task, wanted = chosen_task(model, config), requests(model, config)
    folder = Path(config.out) if config.out else (source.parent if source.name == "export" else source) / "samples"
    recipe = {
        "model": str(source),
        "task": task,
        **{k: config[k] for k in ("num_inference_steps", "guidance_scale", "spacing")},
        "sampler": tree,
        **({"guidance": guidance} if guidance else {}),
        **({"strength": config.strength} if task == "img2img" else {}),
        **({"negative": config.negative} if config.negative is not None else {}),
    }
    options = {k: config[k] for k in ("num_inference_steps", "guidance_scale", "spacing")}
    options |= {"sampler": instantiate(tree, _convert_="all"), "guidance": partial(classifier_free, **guidance)}
    if config.guidance_scale != 1:  # wrong options are named before any work is done
        options["guidance"](model.denoiser({}), model.denoiser({}), config.guidance_scale)
    paths, drawn, begin = [], [], time.perf_counter()
    with tqdm(total=len(wanted), unit="img") as progress:
        for k in range(0, len(wanted), config.batch_size):
            part = wanted[k : k + config.batch_size]
            for request, image in zip(part, made := draw(model, part, task, config, options)):
                metadata = recipe | {"seed": request.seed, "condition": request.text}
                name = f"{request.number:05d}_seed{request.seed}.png"
                paths.append(pictures.save_png(image, folder / name, metadata))
            drawn.append(made)
            progress.update(len(part))
    captions = [r.text for r in wanted] if wanted[0].text else None
    columns = config.n if captions else None
    grid = pictures.save_png(pictures.grid(torch.cat(drawn), columns, captions), folder / "grid.png", recipe)
    write_json(folder / "recipe.json", recipe | {"images": [{"seed": r.seed, "condition": r.text} for r in wanted]})
    print(
        f"{len(paths)} pictures in {folder}, {len(paths) / (time.perf_counter() - begin):.2f} images/s; all of them: {grid}"
    )
    return paths


def quoted(argument: str) -> str:
    """Captions as people type them: commas, apostrophes and brackets mean something to Hydra, `=` in a run's name too."""
    option, _, value = argument.partition("=")
    if option not in ("prompts", "run", "negative", "layout") or not value or value[0] in "'\"":
        return argument
    if value[0] == "[" and (option != "layout" or ".json" in value):
        return argument
    return f'{option}="' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def main() -> None:
    sys.argv[1:] = [quoted(a) for a in sys.argv[1:]]
    run_command(sample, "sample")


if __name__ == "__main__":
    main()
