"""Whether two states of the code compute the same to the last bit: before and after a rebuilding.

    python .ci/same_results.py record results.json [--checkout <folder>]    trains and samples; about ten minutes on one core
    python .ci/same_results.py compare before.json after.json

The command lines are those of before the house was rebuilt, so this also tests that old names of options still work.
Weights are compared tensor by tensor whatever they are called, metrics by their values, pictures by their pixels.
"""

import argparse
import csv
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import load_file

COMMON = [
    "logger=csv", "progress=false", "accelerator=cpu", "data.source.count=640", "data.source.val_count=96",
    "autoencoder.val_images=32", "autoencoder.checkpoint_every=20", "autoencoder.log_every=5", "autoencoder.batch_size=8",
    "diffusion.val_images=32", "diffusion.checkpoint_every=20", "diffusion.log_every=5", "diffusion.samples=4",
    "evaluation.images=32", "evaluation.batch_size=32", "evaluation.predictors=16", "sampling.num_inference_steps=4",
    "data.obedience.scenes=8", "data.obedience.held_out=4", "data.obedience.seeds=1",
]  # fmt: skip
SHORT = ["diffusion.max_steps=20", "diffusion.val_every=10", "diffusion.batch_size=8"]
TRAININGS = {
    "quickstart": [
        "autoencoder.max_steps=60", "autoencoder.loss.disc_start=20", "autoencoder.loss.disc_ramp=10",
        "autoencoder.loss.disc_warmup=10", "autoencoder.val_every=30", "diffusion.max_steps=60", "diffusion.val_every=30",
        "diffusion.unet.channels=32", "diffusion.evaluate_every=30", "diffusion.evaluate_images=32",
        "evaluation.metrics=[fid_tiny,kid_tiny,precision_tiny,recall_tiny]",
    ],
    "vq": [
        "autoencoder=vq_f4_tiny", "autoencoder/loss/perceptual=tiny", "autoencoder.max_steps=30", "autoencoder.val_every=15",
        "autoencoder.loss.disc_start=10", "diffusion/objective=v", "diffusion/conditioning=class", *SHORT,
    ],
    "streaming": [
        "data.reader=streaming", "latents.cache=false", "autoencoder.max_steps=20", "autoencoder.val_every=10",
        "num_workers=1", "diffusion/objective=sample", *SHORT,
    ],
    "shapes_unconditional": ["experiment=shapes_unconditional", "autoencoder.pretrained=quickstart", *SHORT],
    "shapes_layout": ["experiment=shapes_layout", "autoencoder.pretrained=quickstart", *SHORT],
    "shapes_superres": ["experiment=shapes_superres", "autoencoder.pretrained=quickstart", *SHORT],
    "classifier_shapes": [
        "experiment=classifier_shapes", "autoencoder.pretrained=quickstart", "classifier.max_steps=20",
        "classifier.batch_size=8", "classifier.val_every=10", "classifier.val_images=32",
    ],
}  # fmt: skip
PICTURE = "runs/quickstart/samples/first/00000_seed0.png"
SAMPLINGS = {
    "first": ["run=quickstart", "prompts=a red circle in the top left on a white background", "n=2"],
    "class": ["run=quickstart", "classes=[red circle,green square]", "n=1", "sampler=heun"],
    "negative": [
        "run=quickstart", "prompts=a red circle", "negative=a white background", "sampler=dpm_solver",
        "guidance.rescale=0.5", "guidance.interval=[0.1,9]",
    ],
    "inpaint": ["run=quickstart", f"image={PICTURE}", "mask=hole.png", "prompts=a green square", "resample.repeats=2"],
    "outpaint": ["run=quickstart", f"image={PICTURE}", "extend=[0,32,0,0]"],
    "img2img": ["run=quickstart", f"image={PICTURE}", "strength=0.6", "prompts=a red circle", "sampler=euler"],
    "invert": [
        "run=quickstart", f"image={PICTURE}", "invert=true", "image_prompt=a red circle", "prompts=a blue circle",
    ],
    "walk": ["run=quickstart", "task=interpolate", "prompts=[a red circle,a blue square]", "n=3"],
    "mixed": ["run=quickstart", "task=interpolate", "prompts=[+a red circle in the top left,-a red circle,+a blue circle]"],
    "panorama": ["run=quickstart", "size=[32,64]", "panorama=0.5", "prompts=a red circle", "n=1", "sampler=unipc"],
    "weak": ["run=quickstart", "prompts=a red circle", "weak=quickstart", "guidance_scale=2"],
    "layout": ["run=shapes_layout", 'layout=[[0.1,0.5,0.4,0.4,"red circle"]]', "sampler=plms"],
    "guided": [
        "run=shapes_unconditional", "guide.classifier=classifier_shapes", "classes=[red circle]", "guide.classifier_scale=6",
    ],
    "superres": ["run=shapes_superres", "image=small.png", "sampler=ddpm"],
    "reconstruct": ["run=quickstart", "task=reconstruct", f"image={PICTURE}", "tiles.cells=4", "tiles.overlap=2"],
}  # fmt: skip
# Numbers that depend on the machine and the moment.
MEASURED_TIME = re.compile(r"second|per_s|time|mfu|flop|wait|memory|rate", re.IGNORECASE)


def _numbers(tree: object, prefix: str = "") -> dict[str, float]:
    if isinstance(tree, dict):
        return {k: v for name, value in tree.items() for k, v in _numbers(value, f"{prefix}{name}.").items()}
    if isinstance(tree, list):
        return {k: v for i, value in enumerate(tree) for k, v in _numbers(value, f"{prefix}{i}.").items()}
    number = isinstance(tree, int | float) and not isinstance(tree, bool) and not MEASURED_TIME.search(prefix)
    return {prefix[:-1]: tree} if number else {}


def _rows(path: Path) -> dict[str, float]:
    numbers = {}
    for row in csv.DictReader(path.read_text().splitlines()):
        for name, value in row.items():
            if value and not MEASURED_TIME.search(name):
                numbers[f"{row.get('step')}.{name}"] = float(value)
    return numbers


def outcome(folder: Path) -> dict[str, object]:
    """What a run or a job has left in its folder."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".safetensors":
            found[name] = sorted(
                hashlib.sha256(np.ascontiguousarray(t).tobytes() + str(t.shape).encode()).hexdigest()[:16]
                for t in load_file(path).values()
            )
        elif path.name == "metrics.json":
            found[name] = _numbers(json.loads(path.read_text()))
        elif path.name == "metrics.csv":
            found[name] = _rows(path)
        elif path.suffix == ".png" and "samples/" not in name:
            found[name] = hashlib.sha256(np.asarray(Image.open(path)).tobytes()).hexdigest()[:16]
    return found


def record(checkout: Path) -> dict[str, dict]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(checkout)}
    environment["WANDB_MODE"] = "offline"
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        hole = np.zeros((32, 32), np.uint8)
        hole[8:24, 4:20] = 255
        Image.fromarray(hole).save(work / "hole.png")
        ramp = np.linspace(0, 255, 16 * 16 * 3).reshape(16, 16, 3).astype(np.uint8)
        Image.fromarray(ramp[:8, :8]).save(work / "small.png")

        def call(*command: str) -> str:
            done = subprocess.run(
                [sys.executable, *command], cwd=work, env=environment, capture_output=True, text=True, check=False
            )
            if done.returncode:
                print(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-3000:]}", file=sys.stderr)
            return done.stdout if done.returncode == 0 else ""

        for name, options in TRAININGS.items():
            call(str(checkout / "train.py"), f"name={name}", *COMMON, *options)
            results[name] = outcome(work / "runs" / name)
            print(name, len(results[name]), "files", flush=True)
        for name, options in SAMPLINGS.items():
            folder = f"runs/{options[0].removeprefix('run=')}/samples/{name}"
            call("-m", "ldm_train.cli.sample", *options, f"out={folder}", "accelerator=cpu")
            results[f"sample {name}"] = outcome(work / folder)
            print("sample", name, len(results[f"sample {name}"]), "files", flush=True)
        replayed = call("-m", "ldm_train.cli.sample", "recipe=runs/quickstart/samples/first/recipe.json", "out=again")
        results["replay"] = {"said": re.findall(r"\d+ of \d+", replayed)}
    return results


def compare(before: dict[str, dict], after: dict[str, dict]) -> int:
    """Prints one line per run and job. Returns how many files differ."""
    wrong = 0
    for name in before:
        was, now = before[name], after.get(name, {})
        bad = []
        for file, value in was.items():
            other = now.get(file)
            if isinstance(value, dict) and isinstance(other, dict):  # metrics may be called otherwise
                missing = sorted(value.values())
                for number in other.values():
                    if number in missing:
                        missing.remove(number)
                if missing:
                    bad.append(f"{file}: {[k for k, v in value.items() if v in missing][:6]}")
            elif value != other:
                bad.append(f"{file}: {'not there' if other is None else 'differs'}")
        print(f"{name:<28}{len(was):>4} files, " + ("equal to the bit" if not bad else "; ".join(bad)))
        wrong += len(bad) + (not was)
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("record", "compare"))
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--checkout", type=Path, default=Path(__file__).resolve().parents[1])
    arguments = parser.parse_args()
    if arguments.action == "record":
        results = record(arguments.checkout.resolve())
        arguments.files[0].write_text(json.dumps(results, indent=1))
    else:
        before, after = (json.loads(file.read_text()) for file in arguments.files)
        sys.exit(compare(before, after) > 0)


if __name__ == "__main__":
    main()
