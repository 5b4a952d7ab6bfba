"""Training that begins from earlier models: an autoencoder, only its decoder, or a whole U-Net."""

import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from chains import chain, composed
from hydra.utils import instantiate
from published_yaml import autoencoder_config, tensors
from safetensors.torch import save_file

from ldm_train.checkpoints.native import load_autoencoder, load_latent_diffusion, load_model, save_model
from ldm_train.checkpoints.parts import build
from ldm_train.configuration import plain
from ldm_train.data.foreign_latents import ForeignLatents
from ldm_train.data.latents import CachedLatents
from ldm_train.latent_diffusion import LatentDiffusion
from ldm_train.models.autoencoder import AutoencoderIdentity, AutoencoderVQ
from ldm_train.pipeline import latents
from ldm_train.pipeline.autoencoder import give_discriminator
from ldm_train.pipeline.begin import begin_from, what_grows
from ldm_train.pipeline.convert import adopted_model, convert
from ldm_train.pipeline.diffusion import same_latents
from ldm_train.pipeline.resume import read_note
from ldm_train.pipeline.run import Run
from ldm_train.pipeline.values import check_values

SHORT = ("stages=[autoencoder,latents,diffusion]",)
BRIEF = ("autoencoder.max_steps=3", "diffusion.max_steps=2", "diffusion.evaluate_every=null")
DECODER = ("autoencoder.train=decoder", "autoencoder.lr=1e-2")


@pytest.fixture(scope="module")
def first(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("start")
    shutil.copytree(trained / "data", folder / "data")
    shutil.copytree(trained / "run", folder / "first")
    return chain(folder, *SHORT, name="first")


def following(first: Run, name: str, *options: str) -> Run:
    return chain(first.folder.parent, *SHORT, *BRIEF, "autoencoder.init=first", *options, name=name)


def encoding(folder: Path) -> dict[str, torch.Tensor]:
    parts = load_autoencoder(folder / "autoencoder" / "model").encoding_parts()
    return {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}


@pytest.mark.slow
def test_a_decoder_is_trained_on_while_latents_and_unet_stay(first: Run):
    before = {path: path.read_bytes() for path in first.folder.rglob("*") if path.is_file()}
    run = following(first, "decoder", *DECODER, "diffusion.pretrained=first", "autoencoder.ema_decay=0.9")
    run.execute()
    old, new = encoding(first.folder), encoding(run.folder)
    assert old.keys() == new.keys()
    assert all(torch.equal(old[key], new[key]) for key in old)
    models = [load_latent_diffusion(r.folder / "diffusion" / "model") for r in (first, run)]
    for key, value in models[0].network.state_dict().items():
        assert torch.equal(models[1].network.state_dict()[key], value)
    assert torch.equal(models[0].first_stage.scale, models[1].first_stage.scale)
    trained = load_autoencoder(run.folder / "autoencoder" / "model")
    for name, value in models[1].first_stage.autoencoder.state_dict().items():
        assert torch.equal(value, trained.state_dict()[name])
    assert not torch.equal(models[0].decode(torch.ones(1, 4, 8, 8)), models[1].decode(torch.ones(1, 4, 8, 8)))
    assert not (run.folder / "latents" / "index.json").exists()  # nothing trains on them
    assert {path: path.read_bytes() for path in before} == before
    again = following(first, "decoder", *DECODER, "diffusion.pretrained=first", "autoencoder.ema_decay=0.9")
    again.execute()  # everything is finished already


@pytest.mark.slow
def test_the_cache_of_a_kept_encoder_is_taken_over(first: Run, capsys: pytest.CaptureFixture):
    run = following(first, "cached", *DECODER)
    run.execute()
    assert f"latents: those of {first.folder}" in capsys.readouterr().out
    notes = [read_note(r.folder / "latents") for r in (first, run)]
    assert notes[0]["key"] == notes[1]["key"]
    assert notes[0]["result"] == notes[1]["result"]
    shards = sorted((run.folder / "latents").rglob("*.tar"))
    assert shards
    assert all(s.samefile(first.folder / "latents" / s.relative_to(run.folder / "latents")) for s in shards)
    # A further run from this one still shares the shards, because the encoder is still the first one.
    other = chain(first.folder.parent, *SHORT, *BRIEF, *DECODER, "autoencoder.init=cached", name="further")
    other.execute()
    assert read_note(other.folder / "latents")["key"] == notes[0]["key"]


def test_a_whole_autoencoder_goes_on_with_its_own_network(first: Run):
    # The config chooses another network, but the one of `init` is trained on.
    run = following(first, "on", "stages=[autoencoder]", "autoencoder/network=vq_f4_tiny", "autoencoder.lr=1e-5")
    run.execute()
    trained, source = (load_autoencoder(r.folder / "autoencoder" / "model") for r in (run, first))
    assert type(trained) is type(source)
    old, new = encoding(first.folder), encoding(run.folder)
    assert old.keys() == new.keys()
    moved = max(float((old[key] - new[key]).abs().max()) for key in old)
    assert 0 < moved < 1e-2


def test_the_discriminator_comes_along_or_is_new(first: Run, tmp_path: Path, capsys: pytest.CaptureFixture):
    run = following(first, "with", "stages=[autoencoder]")
    state = torch.load(first.folder / "autoencoder/checkpoints/last.ckpt", weights_only=False)["state_dict"]
    loss, other = (instantiate(plain(run.config.autoencoder.loss), _convert_="all") for _ in range(2))
    give_discriminator(run, loss)
    theirs = loss.discriminator.state_dict()
    assert all(torch.equal(theirs[k], state[f"discriminator.{k}"]) for k in theirs)
    run.config.autoencoder.init_discriminator = False
    before = {k: v.clone() for k, v in other.discriminator.state_dict().items()}
    give_discriminator(run, other)
    assert all(torch.equal(other.discriminator.state_dict()[k], v) for k, v in before.items())
    run.config.autoencoder.init_discriminator = None
    run.config.autoencoder.init = str(first.folder / "autoencoder" / "model")
    give_discriminator(run, other)  # init is a model folder within its run
    wide = following(first, "wide", "stages=[autoencoder]", "autoencoder.loss.discriminator.channels=8")
    mine = instantiate(plain(wide.config.autoencoder.loss), _convert_="all")
    give_discriminator(wide, mine)
    assert "discriminator: a new one, that of autoencoder.init does not fit" in capsys.readouterr().out
    wide.config.autoencoder.init_discriminator = True
    with pytest.raises(ValueError, match=r"autoencoder.init_discriminator=true, but that of autoencoder.init does not"):
        give_discriminator(wide, mine)


@pytest.mark.slow
def test_a_checkpoint_of_compvis_brings_its_discriminator_and_log_variance(tmp_path: Path):
    model = autoencoder_config("kl-f4", 32)
    state = {key: torch.randn(shape) * 0.02 for key, shape in tensors(model).items()}
    options = (
        "stages=[autoencoder]",
        *BRIEF,
        f"autoencoder.init={tmp_path}/model.ckpt",
        "autoencoder.loss.learn_logvar=true",
    )
    run = chain(tmp_path, *options)
    loss = instantiate(plain(run.config.autoencoder.loss), _convert_="all")
    weights = {
        k: torch.randn_like(v) if v.is_floating_point() else v for k, v in loss.discriminator.state_dict().items()
    }
    state |= {f"loss.discriminator.{k}": v for k, v in weights.items()} | {"loss.logvar": torch.tensor(-1.5)}
    torch.save({"state_dict": state}, tmp_path / "model.ckpt")
    (tmp_path / "model.yaml").write_text(yaml.safe_dump({"model": model}))
    give_discriminator(run, loss)
    assert all(torch.equal(loss.discriminator.state_dict()[k], v) for k, v in weights.items())
    assert float(loss.logvar) == -1.5
    run.execute()
    trained = load_autoencoder(run.folder / "autoencoder" / "model").state_dict()
    assert all(
        0 < (trained[k] - state[k]).abs().max() < 0.1 for k in ("encoder.conv_in.weight", "decoder.conv_in.weight")
    )


def test_a_frozen_codebook_stays_in_training_mode_too():
    torch.manual_seed(0)
    network = AutoencoderVQ(3, 8, [1, 2], 16, codebook_ema=0.5, restart_after=1, dropout=0.5)
    network.freeze_encoder()
    network.train()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    latents = [network.encode_moments(images) for _ in range(2)]
    network(images)[0].sum().backward()
    assert torch.equal(*latents)  # without dropout
    assert all(torch.equal(network.state_dict()[k], v) for k, v in before.items())
    assert all(p.grad is None for part in network.encoding_parts().values() for p in part.parameters())
    assert network.decoder.conv_in.weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("autoencoder.train=decoder", "autoencoder.init=null"),
            r"autoencoder.train=decoder needs autoencoder.init=<the run",
        ),
        (
            ("autoencoder.pretrained=first",),
            "takes an autoencoder as it is, autoencoder.init trains it on; give one of them",
        ),
        (("autoencoder.init=nowhere",), r"autoencoder.init=nowhere is not a run with a finished autoencoder"),
        (("autoencoder.train=encoder",), "autoencoder.train is all or decoder"),
        (("diffusion.pretrained=nowhere",), r"diffusion.pretrained=nowhere is not a run with a trained model"),
    ],
)
def test_options_that_do_not_go_together_are_named_before_anything_runs(options: tuple, message: str, first: Run):
    run = following(first, "wrong", *options)

    def checked() -> None:
        check_values(run.config)
        run.prepare()

    with pytest.raises((ValueError, FileNotFoundError), match=message):
        checked()
    assert not list((first.folder.parent / "wrong").iterdir())


def test_a_unet_on_other_latents_or_conditions_is_refused(first: Run):
    with pytest.raises(ValueError, match="was trained on the latents of another autoencoder than this run's"):
        following(first, "moved", "diffusion.pretrained=first").execute()
    other = following(first, "uncaptioned", *DECODER, "diffusion.pretrained=first", "diffusion/conditioning=none")
    with pytest.raises(
        ValueError, match="is conditioned on class_label, caption, this run on nothing; choose the same"
    ):
        other.execute()
    assert load_model(first.folder / "diffusion" / "model") is not None


def latent_model(classes: list[str], labels: int = 0, vector: bool = True) -> tuple[LatentDiffusion, dict]:
    """Returns a small model and its config tree. labels: those of a label map that is a condition too (0: no map)."""
    network = {
        "_target_": "ldm_train.models.unet.UNet", "in_channels": 3, "channels": 16, "channel_mult": [1, 2], "num_res_blocks": 1,
        "attention_levels": [1], "num_heads": 2, "context_dim": 8, "concat_channels": 2 * bool(labels),
    }  # fmt: skip
    parts = "ldm_train.conditioning"
    text = {"_target_": f"{parts}.class_label.ClassLabel", "classes": ["x", "y", "z"], "dim": 8, "slot": "context"}
    conditioners = {"other": text}
    if vector:
        conditioners["class_label"] = {"_target_": f"{parts}.class_label.ClassLabel", "classes": classes, "dim": 4}
        network["vector_dim"] = 4
    if labels:
        conditioners["map"] = {"_target_": f"{parts}.spatial.SemanticMap", "num_labels": labels, "channels": 2}
    autoencoder = {
        "_target_": "ldm_train.models.autoencoder.AutoencoderKL", "z_channels": 3, "channels": 8, "channel_mult": [1, 2],
        "num_res_blocks": 1,
    }  # fmt: skip
    tree = {
        "_target_": "ldm_train.latent_diffusion.LatentDiffusion", "network": network, "conditioners": conditioners,
        "first_stage": {"_target_": "ldm_train.models.first_stage.FirstStage", "autoencoder": autoencoder},
        "schedule": {"_target_": "ldm_train.diffusion.schedule.NoiseSchedule"}, "latent_size": [8, 8],
    }  # fmt: skip
    model = build(tree, "test")
    for p in model.parameters():
        p.data = torch.randn(p.shape) * 0.1
    return model.eval(), tree


def test_a_network_with_more_inputs_computes_what_the_first_did(tmp_path: Path):
    torch.manual_seed(0)
    first, tree = latent_model(["cat", "dog"])
    save_model(tmp_path / "first", first, tree, {})
    more, _ = latent_model(["bird", "dog", "cat"], labels=3)
    assert what_grows(more.network, tmp_path / "first") == ["channels of pictures or maps 3 -> 5 (zeros)"]
    begin_from(more, tmp_path / "first", [])
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 700.0])
    old = first.condition({"class_label": torch.tensor([0, 1])})  # cat, dog; the next line has their new numbers
    new = more.condition({"class_label": torch.tensor([2, 1]), "segmentation": torch.randint(0, 3, (2, 16, 16))})
    new["context"] = old["context"]
    with torch.no_grad():
        torch.testing.assert_close(more.predict(x, t, new), first.predict(x, t, old), rtol=0, atol=1e-6)
    table = more.conditioners["class_label"].embedding.weight
    assert torch.equal(table[3], first.conditioners["class_label"].embedding.weight[2])  # the row for no class
    assert not table[0].any()
    # A new vector condition: its projection begins as zeros.
    bare, tree = latent_model([], vector=False)
    save_model(tmp_path / "bare", bare, tree, {})
    with_vector, _ = latent_model(["cat"])
    assert what_grows(with_vector.network, tmp_path / "bare") == ["a vector beside the timestep new (zeros)"]
    begin_from(with_vector, tmp_path / "bare", [])
    with torch.no_grad():
        given = {"context": torch.randn(2, 1, 8)}
        expected = bare.predict(x, t, given)
        torch.testing.assert_close(with_vector.predict(x, t, given | {"vector": torch.randn(2, 4)}), expected)
    with pytest.raises(
        ValueError, match=r"diffusion.init=.*first has label_emb.0.0.bias, which this run's network lacks"
    ):
        what_grows(bare.network, tmp_path / "first")
    wider = build(tree["network"] | {"channels": 32}, "test")
    with pytest.raises(ValueError, match=r"has shape \(64, 16\), this run's network has \(128, 32\); choose"):
        what_grows(wider, tmp_path / "bare")


def test_training_begins_from_another_runs_unet(first: Run, capsys: pytest.CaptureFixture):
    run = chain(
        first.folder.parent,
        *SHORT,
        "autoencoder.pretrained=first",
        "diffusion.init=first",
        "diffusion.lr=1e-6",
        *BRIEF,
        name="tuned",
    )
    run.execute()
    assert "begins from first" in capsys.readouterr().out
    models = [load_latent_diffusion(r.folder / "diffusion" / "model") for r in (first, run)]
    assert models[0].conditioners["text"].tokenizer.to_str() == models[1].conditioners["text"].tokenizer.to_str()
    assert torch.equal(models[0].first_stage.scale, models[1].first_stage.scale)
    old, new = (m.network.state_dict() for m in models)
    assert 0 < max(float((old[k] - new[k]).abs().max()) for k in old) < 1e-3
    whole = chain(
        first.folder.parent, "stages=[autoencoder]", f"autoencoder.pretrained={run.folder}/diffusion/model", name="of"
    )
    whole.execute()  # the autoencoder within a whole model
    trained = load_autoencoder(whole.folder / "autoencoder" / "model").state_dict()
    theirs = models[0].first_stage.autoencoder.state_dict()
    assert all(torch.equal(trained[k], theirs[k]) for k in theirs)


@pytest.mark.parametrize("form", ["compvis", pytest.param("diffusers", marks=pytest.mark.slow)])
def test_training_begins_from_a_whole_model_of_others_in_one_command(form: str, tmp_path: Path):
    plain = (
        "diffusion/network=tiny_4x4_plain",
        "diffusion/conditioning=none",
        "diffusion.network.transformer_depth=0",
        "latents.per_channel=false",
        "data.adherence=null",
        *BRIEF,
    )
    if form == "diffusers":  # widths whose norms have as many groups as diffusers'
        plain += ("autoencoder.network.channels=128", "autoencoder.network.channel_mult=[1,1,1]", "autoencoder.network.num_res_blocks=1",
                  "diffusion.network.channels=128", "diffusion.network.channel_mult=[1,1]", "diffusion.network.num_res_blocks=1",
                  "autoencoder.max_steps=2", "autoencoder.batch_size=4", "autoencoder.val_every=2")  # fmt: skip
    other = chain(tmp_path, *SHORT, *plain, name="other")
    other.execute()
    path = tmp_path / ("other.safetensors" if form == "compvis" else "pipeline")
    convert(composed("convert", f"from={other.folder}", f"to={path}", f"format={form}"))
    options = (f"autoencoder.pretrained={path}", f"diffusion.init={path}", "diffusion.lr=1e-6", "diffusion.max_steps=2")
    run = chain(tmp_path, *SHORT, *plain, *options, name="mine")
    run.execute()
    models = [load_latent_diffusion(r.folder / "diffusion" / "model") for r in (other, run)]
    old, new = (m.network.state_dict() for m in models)
    assert 0 < max(float((old[k] - new[k]).abs().max()) for k in old) < 1e-3
    taken = chain(
        tmp_path, *SHORT, *plain, f"autoencoder.pretrained={path}", f"diffusion.pretrained={path}", name="taken"
    )
    taken.execute()
    again = load_latent_diffusion(taken.folder / "diffusion" / "model").network.state_dict()
    assert all(torch.equal(again[k], old[k]) for k in old)
    path.with_suffix(".yaml").unlink(missing_ok=True)
    if form == "compvis":
        with pytest.raises(FileNotFoundError, match=r"needs the YAML that describes its model"):
            adopted_model.__wrapped__(path, tmp_path)


@pytest.fixture(scope="module")
def others(first: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's latents as another program may provide them: scaled, half in .npy files, half in one safetensors file."""
    folder, tensors = tmp_path_factory.mktemp("others"), {}
    for split in ("train", "val"):
        latents = CachedLatents(first.folder / "latents", split, (), 0)
        for i in range(len(latents)):
            key, moments = latents.shards.key(i), torch.from_numpy(latents.moments(i).copy())
            channels = len(moments) // 2
            moments[:channels] *= 0.5
            moments[channels:] += 2 * math.log(0.5)
            if i % 2:
                tensors[key] = moments
            else:
                (folder / split).mkdir(exist_ok=True)
                np.save(folder / split / f"{key}.npy", moments.numpy())
    save_file(tensors, folder / "rest.safetensors")
    return folder


def test_latents_that_others_have_made_fill_the_cache(first: Run, others: Path, monkeypatch: pytest.MonkeyPatch):
    # They are compared when they are cached, within the rounding of other programs; later stages take them as they are.
    monkeypatch.setattr(latents, "verify_cache", lambda *_: pytest.fail("compared again, to the last digit"))
    options = (
        "stages=[autoencoder,latents,diffusion]",
        "diffusion.max_steps=1",
        "diffusion.evaluate_every=null",
        "autoencoder.pretrained=first",
        f"latents.source={others}",
        "data.flip=false",
    )
    run = chain(first.folder.parent, *options, "latents.source_scale=0.5", name="given")
    run.execute()
    ours, theirs = (CachedLatents(r.folder / "latents", "train", (), 0) for r in (first, run))
    assert len(ours) == len(theirs)
    for i in range(len(ours)):
        np.testing.assert_allclose(theirs.moments(i), ours.moments(i), rtol=1e-5, atol=1e-5)
    wrong = chain(first.folder.parent, *options, "latents.source_scale=0.25", name="wrong_scale")
    with pytest.raises(ValueError, match=r"are not this autoencoder's .* check the autoencoder, latents.source_scale"):
        wrong.execute()
    flipped = chain(first.folder.parent, *options, "data.flip=true", name="flipped")
    with pytest.raises(ValueError, match=r"knows no mirror images: latents.cache=true data.flip=false"):
        flipped.prepare()


def test_latents_that_are_missing_or_unfit_are_named(others: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"latents.source=.*holds no .npy and no .safetensors files"):
        ForeignLatents(tmp_path, (4, 8, 8), True)
    np.save(tmp_path / "a.npy", np.zeros((3, 8, 8)))
    np.save(tmp_path / "b.npy", np.full((4, 8, 8), np.nan))
    np.save(tmp_path / "c.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.save(tmp_path / "d.npy", np.ones((1, 4, 8, 8)))
    latents = ForeignLatents(tmp_path, (4, 8, 8), True, scale=2.0)
    with pytest.raises(ValueError, match=r"has no latents for the sample x \(x.npy, or that key\)"):
        latents("x")
    for key in "ab":
        with pytest.raises(
            ValueError, match=rf"{key}.npy: the latents of {key} have shape .*; this autoencoder's are \(4, 8, 8\) or"
        ):
            latents(key)
    with pytest.raises(ValueError, match=r"c.npy: the latents of c cannot be read"):
        latents("c")  # a pickle is not executed
    mean, logvar = latents("d").chunk(2)  # only a mean
    assert torch.equal(mean, torch.full((4, 8, 8), 0.5))
    assert torch.equal(logvar, torch.full((4, 8, 8), -30.0))
    (tmp_path / "e.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(ValueError, match=r"e.safetensors cannot be read"):
        ForeignLatents(tmp_path, (4, 8, 8), True)


def test_the_stage_of_another_decoder_is_not_shared(first: Run):
    short = (*DECODER, "stages=[autoencoder,latents]")
    runs = [following(first, "usual", *short), following(first, "another", *short, "autoencoder.lr=2e-2")]
    for run in runs:
        run.execute()
    keys = [run.stages["diffusion"].key(run) for run in runs]
    assert keys[0] != keys[1]
    assert keys[0]["latents"] == keys[1]["latents"]


class Reached(Exception):
    """Raised in the place of training."""


@pytest.mark.parametrize("trains", ["all", "decoder"])
def test_an_autoencoder_that_is_trained_on_is_in_train_mode(
    trains: str, first: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A codebook learns by running averages in that mode alone; a frozen encoder stays in eval mode."""

    def reached(run: Run, stage: str, task: torch.nn.Module, *arguments: object, **options: object) -> None:
        assert task.autoencoder.decoder.training
        assert task.autoencoder.encoder.training == (trains == "all")
        raise Reached

    monkeypatch.setattr("ldm_train.pipeline.autoencoder.training.train", reached)
    options = ("stages=[autoencoder]", f"autoencoder.train={trains}")
    with pytest.raises(Reached):
        following(first, f"mode_{trains}", *options).execute()


def test_fewer_validation_images_than_devices_are_named(first: Run) -> None:
    run = following(first, "devices", "diffusion.val_images=2")
    run.machine = replace(run.machine, world_size=4)
    with pytest.raises(ValueError, match=r"4 devices need at least as many validation images, and diffusion has 2"):
        run.enough_images("diffusion", ("image",))


def test_a_restarted_stage_is_made_anew_beside_runs_that_have_it(first: Run) -> None:
    folder = first.folder.parent
    short = ("stages=[autoencoder,latents]", "autoencoder.pretrained=first")
    (folder / "beside").mkdir()
    shards = {}
    for name, options in (("one", ()), ("two", ()), ("again", ("restart=latents",))):
        run = chain(folder, *short, *options, name=f"beside/{'one' if name == 'again' else name}")
        run.share = True
        run.execute()
        shards[name] = sorted((run.folder / "latents").rglob("*.tar"))[0].stat().st_ino
    assert shards["one"] == shards["two"]
    assert shards["again"] != shards["two"]


def test_other_autoencoders_have_the_same_latents_only_if_they_are_the_same():
    a, b = torch.nn.Conv2d(3, 3, 1), torch.nn.Conv2d(3, 3, 1)
    assert not same_latents(a, b)
    assert same_latents(a, a)
    assert same_latents(AutoencoderIdentity(), AutoencoderIdentity())
