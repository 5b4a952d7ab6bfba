"""Stage 1 from published weights (diffusers, CompVis), in one command."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from chains import chain
from diffusers import AutoencoderKL
from published_yaml import autoencoder_config, diffusion_config, tensors
from safetensors.torch import load_file, save_file

from ldm_train.checkpoints.native import load_autoencoder
from ldm_train.pipeline.adopt import adopted_autoencoder

STAGES = ("stages=[autoencoder,latents]", "data.image_size=32")
OLDER = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def sd_vae(folder: Path) -> AutoencoderKL:
    """Saves a VAE like the released ones (half precision, older attention names); returns it in float32."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(128, 128), layers_per_block=1, down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2, latent_channels=4, scaling_factor=0.18215,
    ).eval()  # fmt: skip
    vae.half().save_pretrained(folder)
    path = folder / "diffusion_pytorch_model.safetensors"
    renamed = {}
    for key, tensor in load_file(path).items():
        for new, old in OLDER.items():
            key = key.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        renamed[key] = tensor
    save_file(renamed, path)
    return vae.float()


def test_a_published_vae_is_stage_1_of_a_training(tmp_path: Path):
    vae = sd_vae(tmp_path / "sd-vae")
    run = chain(tmp_path, *STAGES, f"autoencoder.pretrained={tmp_path}/sd-vae")
    run.execute()
    ours = load_autoencoder(run.folder / "autoencoder" / "model")
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.inference_mode():
        torch.testing.assert_close(ours.encode(images).mean, vae.encode(images).latent_dist.mean, rtol=1e-4, atol=1e-4)
        latents = torch.randn(2, 4, 16, 16)
        torch.testing.assert_close(ours.decode(latents), vae.decode(latents).sample, rtol=1e-4, atol=1e-4)
    again = chain(tmp_path, *STAGES, f"autoencoder.pretrained={tmp_path}/sd-vae")
    again.execute()  # everything is finished already
    assert len(list((tmp_path / ".adopted").iterdir())) == 1


@pytest.mark.parametrize("name", ["kl-f4", "celeba256"])
def test_a_checkpoint_is_stage_1_alone_or_within_a_whole_model(name: str, tmp_path: Path):
    model = autoencoder_config(name, 32) if name == "kl-f4" else diffusion_config(name, small=True)
    state = {key: torch.randn(shape) * 0.02 for key, shape in tensors(model).items()}
    torch.save({"state_dict": state}, tmp_path / "model.ckpt")
    (tmp_path / "model.yaml").write_text(yaml.safe_dump({"model": model}))
    folder = adopted_autoencoder(tmp_path / "model.ckpt", tmp_path / "cache")
    prefix = "" if name == "kl-f4" else "first_stage_model."
    for key, tensor in load_autoencoder(folder).state_dict().items():
        assert torch.equal(tensor, state[prefix + key])
    assert json.loads((folder / "metadata.json").read_text())["downsample_factor"] == 4
    assert adopted_autoencoder(tmp_path / "model.ckpt", tmp_path / "cache") == folder


def test_another_file_or_an_incomplete_folder_is_refused_by_name(tmp_path: Path):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    (tmp_path / "model.ckpt").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match=r"model\.ckpt needs the YAML"):
        adopted_autoencoder(tmp_path / "model.ckpt", tmp_path / "cache")
    with pytest.raises(FileNotFoundError, match="vae holds no weights"):
        adopted_autoencoder(tmp_path / "vae", tmp_path / "cache")
    save_file({"a": torch.zeros(1)}, tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match=r"config\.json is for 'UNet2DModel'"):
        adopted_autoencoder(tmp_path / "vae", tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
