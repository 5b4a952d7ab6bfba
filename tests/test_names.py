"""Old option and weight names are still read: in command lines, configs, model folders, checkpoints and stage notes."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from chains import chain
from safetensors.torch import load_file, save_file

from ldm_train import names
from ldm_train.checkpoints.native import load_model, save_model
from ldm_train.pipeline import resume as stages
from ldm_train.pipeline.measure import load_weights
from ldm_train.storage import file_sha256
from ldm_train.training.callbacks.checkpoint import read_checkpoint


@pytest.mark.parametrize(
    ("before", "today"),
    [
        ("diffusion/unet=tiny", "diffusion/network=tiny"),
        ("diffusion.unet.channels=32", "diffusion.network.channels=32"),
        ("+diffusion.unet.dropout=0.1", "+diffusion.network.dropout=0.1"),
        ("~diffusion.unet.dropout", "~diffusion.network.dropout"),
        ("diffusion.unet.channels=32,64", "diffusion.network.channels=32,64"),
        (
            "diffusion.objective.prediction_type=v_prediction",
            "diffusion.objective.parameterisation._target_=ldm_train.diffusion.parameterisation.VPrediction",
        ),
        ("diffusion.adapter.begins=dog", "diffusion.adapter.initializer_token=dog"),
        ("x=${diffusion.unet.channels}", "x=${diffusion.network.channels}"),
        ("prompts=a diffusion.unet, seen", "prompts=a diffusion.unet, seen"),
        ("diffusion.unets=1", "diffusion.unets=1"),
        ("-m", "-m"),
    ],
)
def test_arguments(before: str, today: str) -> None:
    assert names.argument(before) == today
    assert names.argument(today) == today


def as_before(run: Path) -> None:
    """Rewrites a run's files as they were when `network` was `unet` and `parameterisation` was `prediction_type`."""
    for folder in (run / "diffusion" / "model", run / "export"):
        if not folder.is_dir():
            continue
        tree = yaml.safe_load((folder / "config.yaml").read_text())
        tree = {("unet" if k == "network" else k): v for k, v in tree.items() if k != "parameterisation"}
        (folder / "config.yaml").write_text(yaml.safe_dump(tree | {"prediction_type": "epsilon"}, sort_keys=False))
        weights = load_file(folder / "model.safetensors")
        renamed = {k.replace("network.", "unet.", 1) if k.startswith("network.") else k: v for k, v in weights.items()}
        save_file(renamed, folder / "model.safetensors")
        metadata = json.loads((folder / "metadata.json").read_text())
        metadata |= {
            "sha256": file_sha256(folder / "model.safetensors"),
            "config_sha256": file_sha256(folder / "config.yaml"),
        }
        (folder / "metadata.json").write_text(json.dumps(metadata))
    checkpoints = sorted((run / "diffusion" / "checkpoints").glob("*.ckpt"))
    assert "best.ckpt" in [c.name for c in checkpoints]
    for checkpoint in checkpoints:
        state = torch.load(checkpoint, weights_only=True)
        for tree in (state["state_dict"], state["ema"]["shadow"]):
            for key in [k for k in tree if k.startswith("network.")]:
                tree["unet." + key.removeprefix("network.")] = tree.pop(key)
        torch.save(state, checkpoint)
    note = json.loads((run / "diffusion" / "stage.json").read_text())
    section = note["key"]["diffusion"]
    section["unet"] = section.pop("network")
    section["objective"]["prediction_type"] = "epsilon"
    del section["objective"]["parameterisation"]
    (run / "diffusion" / "stage.json").write_text(json.dumps(note))


@pytest.mark.slow
def test_a_run_of_before_continues_to_the_same_weights_and_its_model_loads(tmp_path: Path) -> None:
    chain(tmp_path, "diffusion.max_steps=4", "stages=[autoencoder,latents,diffusion,export]").execute()
    run = tmp_path / "run"
    t, best = torch.tensor([3]), load_weights(run, "best").state_dict()
    as_before(run)
    assert all(torch.equal(v, best[k]) for k, v in load_weights(run, "best").state_dict().items())
    loaded = load_model(run / "export")
    x = torch.randn(1, loaded.network.in_channels, 8, 8)
    condition = loaded.null_condition(1)
    out = loaded.predict(x, t, condition)
    assert stages.read_note(run / "diffusion")["key"]["diffusion"]["network"]["channels"] == 32
    chain(tmp_path, "diffusion.max_steps=6", "stages=[autoencoder,latents,diffusion]", name="whole").execute()
    (run / "export" / "stage.json").unlink()
    chain(tmp_path, "diffusion.max_steps=6", "stages=[autoencoder,latents,diffusion]").execute()
    resumed, whole = (
        load_file(tmp_path / name / "diffusion" / "model" / "model.safetensors") for name in ("run", "whole")
    )
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[k], whole[k]) for k in whole)
    assert not torch.equal(out, load_model(run / "diffusion" / "model").predict(x, t, condition))


@pytest.mark.parametrize("odd", ["x", 5, None, []])
def test_a_place_that_is_no_section_takes_no_renamed_option(odd: object):
    """The value stays as it is, so that the code that reads the options can name it in an error."""
    section = {"prediction_type": "epsilon", "parameterisation": odd}
    assert names.options({"diffusion": {"objective": section}})["diffusion"]["objective"] == {"parameterisation": odd}


class Own(torch.nn.Module):
    """A user's own module with a part called `unet`, the old name of the network."""

    def __init__(self):
        super().__init__()
        self.unet = torch.nn.Linear(2, 2)


def test_other_modules_keep_their_names(tmp_path: Path):
    own = Own()
    save_model(tmp_path / "own", own, {"_target_": f"{__name__}.Own"}, {})
    assert load_model(tmp_path / "own", (__name__,)).state_dict().keys() == own.state_dict().keys()
    weights = own.state_dict()
    torch.save({"global_step": 1, "state_dict": weights, "ema": {"shadow": weights}}, tmp_path / "last.ckpt")
    state = read_checkpoint(tmp_path / "last.ckpt")
    assert state["state_dict"].keys() == state["ema"]["shadow"].keys() == weights.keys()
