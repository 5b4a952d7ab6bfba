"""A stage that trains an adapter: small, on a model that stays unchanged, and usable with that model anywhere."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from chains import chain, composed, tokenizer
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from ldm_train.checkpoints.adapters import read_adapter
from ldm_train.checkpoints.control import save_control
from ldm_train.checkpoints.native import load_latent_diffusion, read_metadata
from ldm_train.conditioning.base import without_last_layer
from ldm_train.errors import Refused
from ldm_train.generation.adapters import take_adapters, with_strength
from ldm_train.generation.sample import sample
from ldm_train.models import lora
from ldm_train.models.lora import LoRA
from ldm_train.pipeline.convert import convert
from ldm_train.pipeline.run import Run

# With a scale per latent channel, the output of a U-Net trained for few steps shows in the images.
STAGES = ("stages=[autoencoder,latents,diffusion]", "diffusion.evaluate_every=null", "latents.per_channel=true")
OPTIONS = (
    "diffusion/adapter=lora",
    "diffusion.adapter.rank=2",
    "diffusion.adapter.targets=all",
    "diffusion.lr=1e-2",
    "diffusion.max_steps=4",
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = chain(tmp_path_factory.mktemp("adapters"), *STAGES, name="base")
    run.execute()
    return run


def tuned(base: Run, name: str, *options: str, how: Sequence[str] = OPTIONS) -> Run:
    begun = ("autoencoder.pretrained=base", "diffusion.init=base")
    return chain(base.folder.parent, *STAGES, *begun, *how, *options, name=name)


@pytest.fixture(scope="module")
def subject(base: Run) -> Run:
    run = tuned(base, "subject")
    run.execute()
    return run


@pytest.mark.chain
@pytest.mark.slow
def test_the_merged_model_is_the_base_with_the_adapter(base: Run, subject: Run) -> None:
    before, after = (load_latent_diffusion(run.folder) for run in (base, subject))
    folder = subject.folder / "diffusion" / "adapter"
    pairs, left = read_adapter(folder, before)
    assert left == []
    assert any(pair.up.abs().max() > 0 for pair in pairs.values())
    lora.attach(before.parts(), pairs, "subject")
    before.merge_adapters()
    for key, value in after.state_dict().items():
        torch.testing.assert_close(value, before.state_dict()[key], atol=1e-6, rtol=0)
    record = json.loads((folder / "adapter.json").read_text())
    assert record["base"] == "base"
    assert record["base_sha256"] == read_metadata(base.folder / "diffusion" / "model")["sha256"]
    assert (folder / "adapter.safetensors").stat().st_size < 400_000


@pytest.mark.slow
@pytest.mark.chain
def test_a_checkpoint_holds_the_adapter_alone_and_training_goes_on_from_it(base: Run, subject: Run) -> None:
    """4 steps end at the same weights as 2 steps and then 2 more."""
    run = tuned(base, "stopped", "diffusion.max_steps=2", "diffusion.lr_schedule.schedule=constant")
    run.execute()
    checkpoint = run.folder / "diffusion" / "checkpoints" / "last.ckpt"
    assert all(key.startswith("adapter.") for key in torch.load(checkpoint, weights_only=True)["state_dict"])
    run = tuned(base, "stopped", "diffusion.lr_schedule.schedule=constant")
    run.execute()
    whole = tuned(base, "whole", "diffusion.lr_schedule.schedule=constant")
    whole.execute()
    first, second = (load_file(r.folder / "diffusion" / "adapter" / "adapter.safetensors") for r in (run, whole))
    assert all(torch.equal(first[key], second[key]) for key in second)


@pytest.mark.chain
@pytest.mark.slow
def test_frozen_conditioners_stay_to_the_bit_while_the_network_trains(base: Run) -> None:
    begun = ("autoencoder.pretrained=base", "diffusion.init=base", "diffusion.max_steps=2", "diffusion.frozen=[text]")
    run = chain(base.folder.parent, *STAGES, *begun, name="frozen")
    run.execute()
    before, after = (load_latent_diffusion(r.folder) for r in (base, run))
    same = {name: parts_equal(before.conditioners[name], after.conditioners[name]) for name in before.conditioners}
    assert same == {"class_label": False, "text": True}
    assert not parts_equal(before.network, after.network)


def parts_equal(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    return all(torch.equal(v, second.state_dict()[k]) for k, v in first.state_dict().items())


@pytest.mark.chain
@pytest.mark.slow
def test_an_adapter_is_of_the_model_as_it_is(base: Run) -> None:
    """Training it on other latents, other classes or other conditions is refused."""
    folder, begun = base.folder.parent, ("diffusion.init=base", *OPTIONS)
    for name, options, message in (
        ("latents", ("autoencoder.lr=2e-3",), "knows the latents of another autoencoder"),
        ("conditions", ("autoencoder.pretrained=base", "diffusion/conditioning=class"), "the conditioners class_label, text"),
        ("classes", ("autoencoder.pretrained=base", "diffusion.conditioning.conditioners.class_label.classes=[a,b]"),
         "an adapter knows those of its model"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            chain(folder, *STAGES, *begun, *options, name=f"other_{name}").execute()


def job(base: Run, out: str, *options: str) -> list[Path]:
    folder = base.folder.parent
    given = ("run=base", f"runs_dir={folder}", f"out={folder / out}", "n=2", "num_inference_steps=2", *options)
    return sample(composed("sample", "prompts=a red circle", "accelerator=cpu", *given))


def pixels(paths: list[Path]) -> list[bytes]:
    return [Image.open(path).tobytes() for path in paths]


@pytest.mark.chain
def test_pictures_are_drawn_with_adapters_and_drawn_again(base: Run, subject: Run) -> None:
    plain, strong = job(base, "plain"), job(base, "strong", "adapters=[subject:2]")
    assert pixels(plain) != pixels(strong)
    recipe = json.loads((strong[0].parent / "recipe.json").read_text())
    assert recipe["config"]["adapters"] == ["subject:2"]
    folder = base.folder.parent
    again = composed("sample", f"recipe={strong[0].parent}", f"runs_dir={folder}", "accelerator=cpu")
    with pytest.raises(ValueError, match=r"name them in the command.*adapters=subject:2"):
        sample(again)
    again = composed(
        "sample", f"recipe={strong[0].parent}", f"runs_dir={folder}", "accelerator=cpu", "adapters=subject:2"
    )
    assert pixels(sample(again)) == pixels(strong)
    again = composed(
        "sample", f"recipe={strong[0].parent}", f"runs_dir={folder}", "accelerator=cpu", "adapters=subject:1"
    )
    with pytest.raises(ValueError, match="adapters= does not hold the weights that drew this recipe"):
        sample(again)
    with pytest.raises(Refused, match="adapters"):
        job(base, "strong", "adapters=[subject:0.5]")


@pytest.mark.chain
def test_a_run_with_an_adapter_draws_as_the_base_with_it(base: Run, subject: Run) -> None:
    merged = job(base, "merged", f"run={subject.folder}")
    apart = job(base, "apart", f"adapters={subject.folder / 'diffusion' / 'adapter'}")
    assert pixels(merged) == pixels(apart)


@pytest.mark.chain
@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_an_adapter_is_converted_and_back(base: Run, subject: Run, layout: str, tmp_path: Path) -> None:
    own, file, folder = subject.folder / "diffusion" / "adapter", tmp_path / "s.safetensors", tmp_path / "again"
    convert(composed("convert", f"from={own}", f"to={file}", f"format={layout}"))
    with pytest.raises(FileExistsError, match="overwrite=true"):
        convert(composed("convert", f"from={own}", f"to={file}", f"format={layout}"))
    with pytest.raises(FileNotFoundError, match="name the model that"):
        convert(composed("convert", f"from={file}", f"to={folder}"))
    convert(composed("convert", f"from={file}", f"to={folder}", f"base={base.folder}"))
    model = load_latent_diffusion(base.folder)
    first, second = (read_adapter(path, model)[0] for path in (own, folder))
    for key, pair in first.items():
        torch.testing.assert_close(second[key](), pair())
    assert pixels(job(base, f"own_{layout}", f"adapters={own}")) == pixels(job(base, f"{layout}", f"adapters={folder}"))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("subject:0", "subject:0 has no effect; leave subject out"),
        ("subject:5", "far stronger than anything that was trained"),
        ("subject:nan", "far stronger"),
    ],
)
def test_strengths_that_cannot_be_are_named(entry: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_strength(entry)


def test_a_path_may_hold_a_colon() -> None:
    assert with_strength("C:/models/a.safetensors") == ("C:/models/a.safetensors", 1.0)
    assert with_strength("runs/subject:-0.5") == ("runs/subject", -0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("diffusion.init=null",), "set diffusion.init="),
        (("diffusion.adapter.rank=0",), "diffusion.adapter: rank=0 is not a whole number"),
        (("diffusion.adapter.targets=nothing",), "diffusion.adapter: targets=nothing names no layer"),
        (("diffusion.adapter.rank=four",), "diffusion.adapter: rank=four is not a whole number"),
        (("diffusion.task.alignment=0.5",), "not for an adapter"),
        (("diffusion.identifier=circle",), "diffusion.identifier=circle: the text encoder knows circle well"),
        (("diffusion.identifier=two words",), "is not a single word"),
        (("diffusion.frozen=[text]",), "diffusion.frozen has no effect beside diffusion/adapter"),
    ],
)
def test_an_adapter_that_cannot_be_is_named_before_anything_is_trained(
    base: Run, options: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tuned(base, "wrong", *options).execute()


CONTROL = ("technique=[adam]", "diffusion/adapter=control", "diffusion.lr=1e-2", "diffusion.max_steps=4")


def steered(base: Run, name: str, *options: str) -> Run:
    return tuned(base, name, *options, how=CONTROL)


@pytest.fixture(scope="module")
def edges(base: Run) -> Run:
    run = steered(base, "edges")
    run.execute()
    return run


@pytest.mark.chain
@pytest.mark.slow
def test_a_control_trains_beside_a_model_that_stays_as_it_is(base: Run, edges: Run) -> None:
    before, after = (load_latent_diffusion(run.folder) for run in (base, edges))
    weights = after.state_dict()
    assert all(torch.equal(weights[key], value) for key, value in before.state_dict().items())
    new = {key for key in weights if key not in before.state_dict()}
    assert {key.split(".")[1] for key in new} == {"control"}
    assert weights["network.control.middle_zero_conv.weight"].abs().max() > 0
    checkpoint = edges.folder / "diffusion" / "checkpoints" / "last.ckpt"
    assert all(key.startswith("adapter.") for key in torch.load(checkpoint, weights_only=True)["state_dict"])
    record = json.loads((edges.folder / "diffusion" / "adapter" / "adapter.json").read_text())
    assert record["field"] == "edges"
    assert record["base_sha256"] == read_metadata(base.folder / "diffusion" / "model")["sha256"]


@pytest.mark.chain
@pytest.mark.slow
def test_a_stopped_training_of_a_control_goes_on_exactly(base: Run, edges: Run) -> None:
    constant = "diffusion.lr_schedule.schedule=constant"
    steered(base, "half", "diffusion.max_steps=2", constant).execute()
    run, whole = steered(base, "half", constant), steered(base, "entire", constant)
    run.execute()
    whole.execute()
    first, second = (load_file(r.folder / "diffusion" / "adapter" / "control.safetensors") for r in (run, whole))
    assert all(torch.equal(first[key], second[key]) for key in second)


@pytest.mark.chain
@pytest.mark.slow
def test_pictures_are_steered_by_a_control_beside_the_base(base: Run, edges: Run, tmp_path: Path) -> None:
    """The run and the base with its adapter draw the same; another control image or less strength draws others."""
    for name, box in (("one", (4, 4, 12, 12)), ("other", (0, 0, 6, 6))):
        picture = Image.new("RGB", (16, 16))
        picture.paste((255, 255, 255), box)
        picture.save(tmp_path / f"{name}.png")
    given, weights = f"+fields.edges={tmp_path / 'one.png'}", edges.folder / "diffusion" / "adapter"
    own = pixels(job(base, "steered_own", f"run={edges.folder}", given))
    assert pixels(job(base, "steered_beside", f"adapters={weights}", given)) == own
    model = load_latent_diffusion(edges.folder)  # after 4 steps of training the control changes little
    torch.nn.init.normal_(model.conditioners["control"].conv_out.weight)
    torch.nn.init.normal_(model.network.control.middle_zero_conv.weight)
    weights = tmp_path / "strong"
    save_control(weights, model, {})
    own = pixels(job(base, "steered_strongly", f"adapters={weights}", given))
    other = f"+fields.edges={tmp_path / 'other.png'}"
    assert pixels(job(base, "steered_otherwise", f"adapters={weights}", other)) != own
    assert pixels(job(base, "steered_less", f"adapters={weights}:0.2", given)) != own
    with pytest.raises(ValueError, match=r"no edges conditioner, so fields.edges= has no effect"):
        job(base, "steered_by_nothing", given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("diffusion.init=null",), "set diffusion.init="),
        (("diffusion.conditioning.conditioners.control.factor=8",), "the control has factor 8, the autoencoder 4"),
        (("diffusion.conditioning.conditioners.control.hidden=[16,32]",), "latents of f = 4 need 3 widths"),
        (
            ("diffusion.conditioning.conditioners.control.width=8",),
            "the network takes a control of width 32, .* give 8",
        ),
        (
            ("diffusion.conditioning.conditioners.control._target_=ldm_train.conditioning.control.DepthControl",),
            "depth",
        ),
        (("diffusion.network.controlled=false",), "choose diffusion/adapter=control"),
    ],
)
def test_a_control_that_cannot_be_is_named_before_anything_is_trained(
    base: Run, options: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        steered(base, "wrong", *options).execute()


@pytest.mark.chain
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("diffusion/objective=v",), r"diffusion\.objective\.parameterisation: "),
        (("betas.end=0.03",), r"diffusion\.schedule: .*0\.0195.*here .*0\.03"),
        (("diffusion.network.head_dim=16",), r"diffusion\.network\..*heads: \d+, here \d+"),
    ],
)
def test_an_adapter_is_of_the_model_as_it_is_read_there(base: Run, options: tuple[str, ...], said: str) -> None:
    """Options that change no shape but the meaning of the weights are refused by name."""
    with pytest.raises(ValueError, match=r"(?s)reads its weights differently; choose the same:.*" + said):
        tuned(base, "wrong", *options).execute()


@pytest.mark.chain
def test_options_beside_a_model_that_is_taken_as_it_is_are_refused(base: Run) -> None:
    with pytest.raises(
        ValueError, match=r"diffusion\.pretrained takes a model as it is, so diffusion\.init has no effect"
    ):
        tuned(base, "wrong", f"diffusion.pretrained={base.folder}").execute()


@torch.no_grad()
@pytest.mark.parametrize("projected", [False, True])
def test_a_layer_that_does_not_run_is_not_adapted(projected: bool) -> None:
    """E.g. the last layer of Stable Diffusion 2's text encoder does not run: its adapter would never get a gradient."""
    kind = CLIPTextModelWithProjection if projected else CLIPTextModel
    encoder = kind(CLIPTextConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2))
    view = without_last_layer(encoder)
    adapter = LoRA(rank=1, targets="attention", text_encoder=True).attach(
        nn.ModuleDict({"encoders": nn.ModuleDict({"text": view})})
    )
    layers = {key.split("layers/")[1][0] for key in adapter}
    assert layers == {"0", "1"}
    assert len(encoder.get_submodule("text_model.encoder.layers" if projected else "encoder.layers")) == 3
    assert any("parametrizations" in key for key in encoder.state_dict())  # the view shares its layers
    lora.merge(view)
    assert not any("parametrizations" in key for key in encoder.state_dict())


@pytest.mark.parametrize(
    ("layer", "options", "said"),
    [
        ("projected", {}, "layer=projected learns nothing"),
        (
            "last",
            {"diffusion.task._target_": "ldm_train.training.distillation.DistillationTask"},
            "a student and its teacher",
        ),
        ("last", {"diffusion.adapter.targets": "no_such_layer"}, "names no layer"),
    ],
)
def test_a_frozen_encoder_that_cannot_learn_is_named_at_once(
    base: Run, tmp_path: Path, layer: str, options: dict[str, str], said: str
) -> None:
    words = tokenizer(tmp_path)
    config = CLIPTextConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    CLIPTextModel(config).save_pretrained(tmp_path / "clip")
    words.save_pretrained(tmp_path / "clip")
    text = "diffusion.conditioning.conditioners.text"
    clip = (
        "diffusion/conditioning=clip_text", "diffusion.conditioning.context_dim=32", f"{text}.path={tmp_path / 'clip'}",
        f"{text}.layer={layer}", "diffusion.adapter.text_encoder=true",
    )  # fmt: skip
    with pytest.raises(ValueError, match=said):
        tuned(base, "wrong", *clip, *(f"{k}={v}" for k, v in options.items())).execute()


@pytest.mark.chain
@pytest.mark.slow
def test_a_frozen_text_encoder_is_adapted_beside_the_network(tmp_path: Path) -> None:
    """The encoder's part is in the adapter only: the run's merged model encodes text without it."""
    words = tokenizer(tmp_path)
    config = CLIPTextConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    CLIPTextModel(config).save_pretrained(tmp_path / "clip")
    words.save_pretrained(tmp_path / "clip")
    text = "diffusion.conditioning.conditioners.text"
    clip = (
        "diffusion/conditioning=clip_text", "diffusion.conditioning.context_dim=32", f"{text}.path={tmp_path / 'clip'}",
        f"{text}.max_length=16",
    )  # fmt: skip
    first = chain(tmp_path, *STAGES, *clip, name="base")
    first.execute()
    options = ("diffusion.adapter.text_encoder=true", "diffusion.lr=0.1", "diffusion.max_steps=8")
    tuned(first, "words", *clip, *options).execute()
    folder = tmp_path / "words" / "diffusion" / "adapter"
    keys = load_file(folder / "adapter.safetensors").keys()
    assert any(key.startswith("encoders.text.encoder.layers.0.self_attn.q_proj") for key in keys)
    assert any(key.startswith("network.") for key in keys)
    beside, merged = load_latent_diffusion(first.folder), load_latent_diffusion(tmp_path / "words")
    take_adapters(beside, [str(folder)], "runs")
    for key, value in merged.network.state_dict().items():
        torch.testing.assert_close(beside.network.state_dict()[key], value, atol=1e-6, rtol=0)
    models = (beside, merged, load_latent_diffusion(first.folder))
    adapted, without, begun = (model.conditioners["text"].encode(["a red circle"])[0] for model in models)
    assert (adapted - without).abs().max() > 0.01
    assert torch.equal(without, begun)


def test_frozen_conditioners_are_those_of_the_model(base: Run) -> None:
    with pytest.raises(ValueError, match=r"diffusion.frozen=\['words'\]: the conditioners are class_label, text"):
        tuned(base, "wrong", "diffusion.frozen=[words]", how=()).execute()
