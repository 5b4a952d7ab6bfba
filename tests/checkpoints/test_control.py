"""Controls of U-Nets as files: in our folder, and as diffusers' ControlNetModel, which draws the same."""

import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from chains import composed
from diffusers import ControlNetModel, DDIMScheduler, StableDiffusionControlNetPipeline, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from test_diffusers import randomised, text_pipeline
from test_diffusers_export import TREES
from tiers import tiered

import ldm_train
from ldm_train.checkpoints.adapters import save_adapter
from ldm_train.checkpoints.control import drop_control, parts_of, save_control, take_control
from ldm_train.checkpoints.parts import build
from ldm_train.conditioning.control import NAME, DepthControl, EdgesControl
from ldm_train.generation.adapters import take_adapters
from ldm_train.latent_diffusion import LatentDiffusion, Sampling, Start
from ldm_train.models.lora import LoRA
from ldm_train.pipeline.convert import convert
from ldm_train.samplers.ddim import ddim

__all__ = ["text_pipeline"]  # a fixture


def steered(model: LatentDiffusion, kind: type = EdgesControl, random: bool = True) -> LatentDiffusion:
    """Gives a model a control. random: with random weights, unlike a new control, which changes nothing."""
    f = model.first_stage.downsample_factor
    picture = kind(model.network.skip_widths[0], f)
    picture.attach(model.first_stage)
    model.network.add_control()
    model.conditioners[NAME] = picture.eval()
    if random:
        randomised(model.network.control)
        randomised(picture)
    return model.eval()


def small(name: str = "classes and captions") -> LatentDiffusion:
    torch.manual_seed(0)
    return randomised(build(TREES[name], "here"))


def draw(model: LatentDiffusion, guidance_scale: float = 2.0, **more: Any) -> torch.Tensor:
    fields = {"caption": ["a red circle", "blue"]} | more
    fields = {k: v for k, v in fields.items() if k in model.fields}
    return model.sample(fields, [0, 1], Sampling(ddim, 3, guidance_scale, "trailing"))


EDGES = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("name", ["classes and captions", "classes as a vector", "nothing", "label maps"])
def test_a_new_control_changes_nothing_to_the_bit(name: str) -> None:
    model = small(name)
    # A model without conditions has no guidance; with it the batch doubles, and some processors then round differently.
    scale = 1.0 if name == "nothing" else 2.0
    before = draw(model, scale)
    steered(model, random=False)
    assert torch.equal(draw(model, scale, edges=EDGES), before)
    torch.testing.assert_close(draw(model, edges=EDGES), before, rtol=0, atol=1e-5)
    steered_much = steered(small(name))
    assert (draw(steered_much, scale, edges=EDGES) - before).abs().max() > 1e-2
    assert not torch.equal(draw(steered_much, edges=EDGES.flip(0)), draw(steered_much, edges=EDGES))


@pytest.mark.parametrize("kind", [EdgesControl, DepthControl])
def test_a_control_comes_back_from_its_folder(kind: type, tmp_path: Path) -> None:
    first, second = steered(small(), kind), small()
    save_control(tmp_path / "c", first, {})
    take_control(tmp_path / "c", second)
    field = {kind.field: EDGES}
    assert torch.equal(draw(first, **field), draw(second, **field))
    half = small()
    take_adapters(half, [f"{tmp_path / 'c'}:0.5"], "runs")
    assert half.network.control.strength == 0.5
    assert not torch.equal(draw(half, **field), draw(second, **field))


def test_a_control_that_was_trained_without_pictures_too_guides_away_from_none(tmp_path: Path) -> None:
    """The trained model and the base with its saved control draw the same with guidance; dropout 0 differs."""
    first, second = steered(small()), small()
    first.conditioners[NAME].dropout = 0.25
    save_control(tmp_path / "c", first, {})
    take_control(tmp_path / "c", second)
    assert torch.equal(draw(first, edges=EDGES), draw(second, edges=EDGES))
    always = small()
    change(tmp_path / "c" / "adapter.json", dropout=0.0)
    take_control(tmp_path / "c", always)
    assert not torch.equal(draw(always, edges=EDGES), draw(second, edges=EDGES))


def test_a_control_and_a_lora_are_taken_in_any_order(tmp_path: Path) -> None:
    save_control(tmp_path / "c", steered(small()), {})
    adapted = small()
    adapted.adapt(LoRA(rank=2), "adapter")
    randomised(adapted.adapter)
    save_adapter(tmp_path / "lora", adapted.adaptable(), "adapter", {})
    names = [str(tmp_path / "c"), f"{tmp_path / 'lora'}:0.5"]
    made, again = small(), small()
    recorded = take_adapters(made, names, "runs")
    assert take_adapters(again, names[::-1], "runs") == recorded[::-1]
    assert torch.equal(draw(made, edges=EDGES), draw(again, edges=EDGES))
    alone = small()
    take_adapters(alone, names[:1], "runs")
    assert not torch.equal(draw(made, edges=EDGES), draw(alone, edges=EDGES))


def test_a_control_is_converted_as_it_is_beside_a_base_with_another(text_pipeline: Callable, tmp_path: Path) -> None:
    folder, _ = text_pipeline("1")
    save_control(tmp_path / "ours", steered(ldm_train.load(str(folder))), {})
    other = steered(ldm_train.load(str(folder)), DepthControl, random=False)
    drop_control(other)
    drop_control(other)  # does nothing if there is none
    assert other.network.condition_widths.keys() == {"context", "concat", "vector"}
    take_control(tmp_path / "ours", other)
    assert other.conditioners[NAME].field == "edges"


def test_a_record_of_another_size_is_refused_before_it_takes_memory(tmp_path: Path) -> None:
    save_control(tmp_path / "c", steered(small()), {})
    vast = {"width": 32, "factor": 4, "channels": 3, "hidden": [16384, 16384, 16384]}
    change(tmp_path / "c" / "adapter.json", control=vast)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="describes another picture than its weights hold"):
        take_control(tmp_path / "c", small())
    assert (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000
    )  # kB; the weights would take 9.7 GB each


def test_the_picture_is_kept_under_guidance() -> None:
    """As in the published pipelines, both sides of guidance have the control's picture: only the text differs."""
    model = steered(small())
    given = model.sampled_condition({"caption": ["a", "b"], "edges": EDGES}, 2, None)
    away = model.sampled_condition({}, 2, None, {"edges": EDGES})
    assert torch.equal(given["control"], away["control"])
    assert given["control"].abs().max() > 0
    assert model.null_condition(2)["control"].abs().max() == 0


@pytest.mark.slow
@tiered("version", ["1", "2"], fast=1)
def test_diffusers_draws_what_we_draw_with_a_control(version: str, text_pipeline: Callable, tmp_path: Path) -> None:
    folder, _ = text_pipeline(version)
    convert(composed("convert", f"from={folder}", f"to={tmp_path / 'native'}"))
    convert(composed("convert", f"from={tmp_path / 'native'}", f"to={tmp_path / 'exported'}", "format=diffusers"))
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "exported", low_cpu_mem_usage=False)
    model = steered(ldm_train.load(str(tmp_path / "native")))
    save_control(tmp_path / "ours", model, {})
    convert(
        composed(
            "convert", f"from={tmp_path / 'ours'}", f"to={tmp_path / 'theirs'}", f"base={folder}", "format=diffusers"
        )
    )
    control = ControlNetModel.from_pretrained(tmp_path / "theirs", low_cpu_mem_usage=False)
    parts = {k: v for k, v in pipeline.components.items() if k != "image_encoder"}
    theirs = StableDiffusionControlNetPipeline(
        **parts, controlnet=control, requires_safety_checker=False
    )  # fmt: skip
    theirs.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    theirs.set_progress_bar_config(disable=True)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    words = ["a red dog", "cat"]
    drawing = ([0, 1], Sampling(ddim, 4, 3.0), Start(noise=noise))
    plain = ldm_train.load(str(folder)).sample({"caption": words}, *drawing)
    for strength in (1.0, 0.5):
        model.network.control.strength = strength
        drawn = theirs(
            words, image=EDGES.expand(-1, 3, -1, -1), latents=noise, num_inference_steps=4, guidance_scale=3.0,
            controlnet_conditioning_scale=strength, output_type="pt",
        ).images * 2 - 1  # fmt: skip
        ours = model.sample({"caption": words, "edges": EDGES}, *drawing)
        assert (ours - plain).abs().max() > 0.05
        torch.testing.assert_close(ours, drawn, rtol=1e-3, atol=2e-3)  # the documented limit is 2/255 of [0, 1]
    # And back: the weights return to our form and names unchanged.
    convert(
        composed(
            "convert", f"from={tmp_path / 'theirs'}", f"to={tmp_path / 'again'}", f"base={folder}", "control=edges"
        )
    )
    first, second = (load_file(tmp_path / name / "control.safetensors") for name in ("ours", "again"))
    assert all(torch.equal(first[key], second[key]) for key in first.keys() | second.keys())
    # It replaces controls, and nothing else.
    asked = f"from={tmp_path / 'ours'}", f"base={folder}", "format=diffusers", "overwrite=true"
    convert(composed("convert", *asked, f"to={tmp_path / 'theirs'}"))
    (tmp_path / "theirs" / "thesis.txt").write_text("three years")
    with pytest.raises(FileExistsError, match=r"theirs holds thesis\.txt, which is no part of such an adapter"):
        convert(composed("convert", *asked, f"to={tmp_path / 'theirs'}"))
    assert (tmp_path / "theirs" / "thesis.txt").is_file()


def change(path: Path, **options: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | options))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: save_file({"copy.x": torch.ones(1)}, f / "control.safetensors"), "is damaged: its sha256"),
        (lambda f: change(f / "adapter.json", field="os.system"), "describes no control"),
        (lambda f: change(f / "adapter.json", control={"width": 64}), "describes no control"),
        (lambda f: change(f / "adapter.json", control={"width": 2**40, "factor": 2, "hidden": [1, 1]}), "not numbers of channels"),
        (lambda f: change(f / "adapter.json", control=[]), "describes no control"),
        (lambda f: change(f / "adapter.json", control={"width": 32, "factor": 4, "channels": 3, "hidden": [16, 32]}), "need 3 widths"),
    ],
)  # fmt: skip
def test_a_damaged_control_is_named(damage: Callable[[Path], None], said: str, tmp_path: Path) -> None:
    save_control(tmp_path / "c", steered(small()), {})
    damage(tmp_path / "c")
    with pytest.raises(ValueError, match=said):
        take_control(tmp_path / "c", small())


def test_a_control_of_another_architecture_is_named(tmp_path: Path) -> None:
    save_control(tmp_path / "c", steered(small()), {})
    for name in ("nothing", "classes as a vector"):
        with pytest.raises(ValueError, match=r"does not fit|another architecture"):
            take_control(tmp_path / "c", small(name))
    with pytest.raises(ValueError, match="take one at a time"):
        take_control(tmp_path / "c", steered(small(), DepthControl))


def test_a_model_without_a_control_has_none_to_write() -> None:
    with pytest.raises(ValueError, match="has no control; train one with diffusion/adapter=control"):
        parts_of(small())


@tiered(
    ("options", "said"),
    [
        ({"block_out_channels": [128, 512]}, "its block_out_channels is"),
        ({"cross_attention_dim": 768}, "its cross_attention_dim is 768"),
        ({"attention_head_dim": 8}, "its attention_head_dim is 8"),
        ({"global_pool_conditions": True}, "global_pool_conditions"),
        ({"conditioning_embedding_out_channels": [16, 32, 96, 256]}, "need 2 widths"),
        ({"conditioning_embedding_out_channels": [4096, 4096]}, "describes another picture than its weights hold"),
        ({"addition_embed_type": "text"}, "addition_embed_type"),
        ({"unheard_of": 1}, "unheard_of"),
    ],
)
def test_a_control_of_diffusers_that_does_not_fit_is_named(
    options: dict[str, Any], said: str, text_pipeline: Callable, tmp_path: Path
) -> None:
    folder, _ = text_pipeline("1")
    save_control(tmp_path / "ours", steered(ldm_train.load(str(folder))), {})
    theirs = tmp_path / "theirs"
    convert(composed("convert", f"from={tmp_path / 'ours'}", f"to={theirs}", f"base={folder}", "format=diffusers"))
    change(theirs / "config.json", **options)
    again = ("convert", f"from={theirs}", f"to={tmp_path / 'again'}", f"base={folder}")
    with pytest.raises(ValueError, match=said):
        convert(composed(*again, "control=edges"))
    with pytest.raises(ValueError, match="control=null: set it to what its picture shows, one of edges, depth"):
        convert(composed(*again))
    assert not (tmp_path / "again").exists()
