"""ldm-sample: pictures from a trained model, one seed and one recipe per picture."""

import sys
import time
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf
from tqdm import tqdm

from ldm_train import images as pictures
from ldm_train.checkpoints.native import check_targets, load_model, read_metadata
from ldm_train.cli.common import run_command
from ldm_train.data.samples import collate
from ldm_train.data.shards import write_json
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
        for folder in (base / "export", base / "diffusion" / "model", base):
            if (folder / "model.safetensors").is_file() and (folder / "metadata.json").is_file():
                return folder
    known = sorted(str(p.parent.parent.relative_to(runs_dir)) for p in Path(runs_dir).rglob("diffusion/model"))
    raise FileNotFoundError(
        f"run={run} has no trained model (export/ or diffusion/model/); finished runs in {runs_dir}: {', '.join(known) or 'none'}"
    )


def as_list(value: Any) -> list[str]:
    """One string, a list, or the non-empty lines of a text file."""
    if value is None:
        return []
    if isinstance(value, ListConfig | list):
        return [str(v) for v in value]
    path = Path(str(value))
    if path.suffix == ".txt":
        if not path.is_file():
            raise FileNotFoundError(f"prompts={value}: there is no such file")
        return [line.strip() for line in path.read_text().splitlines() if line.strip()]
    return [str(value)]


def requests(model: LatentDiffusion, config: DictConfig) -> list[dict[str, Any]]:
    """One entry per picture: its seed, the fields it is conditioned on, and how people read them.

    Raises ValueError where the model does not take what is asked.
    """
    asked = {"caption": as_list(config.prompts), "class_label": as_list(config.classes)}
    by_field = {c.field: c for c in model.conditioners.values()}
    for field, option in (("caption", "prompts"), ("class_label", "classes")):
        if asked[field] and field not in by_field:
            takes = {"caption": "prompts=", "class_label": "classes="}
            known = " or ".join(takes[f] for f in by_field if f in takes) or "no condition (leave both out)"
            raise ValueError(
                f"this model has no {field} conditioner, so {option}= means nothing to it; it takes {known}"
            )
    lengths = {len(v) for v in asked.values() if v}
    if len(lengths) > 1:
        raise ValueError("prompts and classes must be equally many when both are given: they are paired")
    rows = [
        {field: by_field[field].parse(values[j]) for field, values in asked.items() if values}
        for j in range(max(lengths, default=1))
    ]
    texts = [" / ".join(values[j] for values in asked.values() if values) for j in range(len(rows))]
    return [
        {"seed": config.seed + j * config.n + i, "fields": row, "text": text}
        for j, (row, text) in enumerate(zip(rows, texts))
        for i in range(config.n)
    ]


def sample(config: DictConfig) -> list[Path]:
    source = model_folder(config.run, config.runs_dir)
    if config.n < 1 or config.batch_size < 1:
        raise ValueError("n and batch_size must be at least 1")
    if config.accelerator == "gpu" and not torch.cuda.is_available():
        raise ValueError("accelerator=gpu, but no GPU is visible; use accelerator=cpu")
    trained = DEFAULTS | (read_metadata(source).get("sampling") or {})
    check_targets(trained, source)
    tree = OmegaConf.to_container(config.sampler) if config.get("sampler") else trained["sampler"]
    for option in ("num_inference_steps", "guidance_scale", "spacing"):
        if config[option] is None:
            config[option] = trained[option]
    device = "cuda" if torch.cuda.is_available() and config.accelerator != "cpu" else "cpu"
    model = load_model(source).to(device, memory_format=torch.channels_last)
    model.schedule.timesteps(config.num_inference_steps, config.spacing)  # complains before any work is done
    wanted = requests(model, config)
    folder = Path(config.out) if config.out else (source.parent if source.name == "export" else source) / "samples"
    recipe = {
        "model": str(source),
        **{k: config[k] for k in ("num_inference_steps", "guidance_scale", "spacing")},
        "sampler": tree,
    }
    sampler = instantiate(tree, _convert_="all")
    paths, drawn, begin = [], [], time.perf_counter()
    with tqdm(total=len(wanted), unit="img") as progress:
        for k in range(0, len(wanted), config.batch_size):
            part = wanted[k : k + config.batch_size]
            batch = collate([dict(row["fields"]) for row in part]) if part[0]["fields"] else {}
            batch.pop("replaced", None)
            made = model.sample(
                batch, [row["seed"] for row in part], sampler,
                config.num_inference_steps, config.guidance_scale, config.spacing,
            ).cpu()  # fmt: skip
            for row, image in zip(part, made):
                metadata = recipe | {"seed": row["seed"], "condition": row["text"]}
                paths.append(pictures.save_png(image, folder / f"{len(paths):05d}_seed{row['seed']}.png", metadata))
            drawn.append(made)
            progress.update(len(part))
    captions = [row["text"] for row in wanted] if wanted[0]["text"] else None
    columns = config.n if captions else None
    grid = pictures.save_png(pictures.grid(torch.cat(drawn), columns, captions), folder / "grid.png", recipe)
    write_json(
        folder / "recipe.json", recipe | {"images": [{"seed": r["seed"], "condition": r["text"]} for r in wanted]}
    )
    print(
        f"{len(paths)} pictures in {folder}, {len(paths) / (time.perf_counter() - begin):.2f} images/s; all of them: {grid}"
    )
    return paths


def quoted(argument: str) -> str:
    """Captions as people type them: commas, apostrophes and brackets mean something to Hydra, `=` in a run's name too."""
    option, _, value = argument.partition("=")
    if option not in ("prompts", "run") or not value or value[0] in "['\"":
        return argument
    return f'{option}="' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def main() -> None:
    sys.argv[1:] = [quoted(a) for a in sys.argv[1:]]
    run_command(sample, "sample")


if __name__ == "__main__":
    main()
