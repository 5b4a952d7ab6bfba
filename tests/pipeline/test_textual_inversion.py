"""Textual inversion: a word is learned, and nothing else changes."""

import json
from pathlib import Path

import pytest
import torch
from chains import chain, composed
from PIL import Image
from safetensors.torch import load_file, save_file

from ldm_train.checkpoints.adapters import read_word
from ldm_train.checkpoints.native import load_latent_diffusion
from ldm_train.conditioning.learned_tokens import add_tokens
from ldm_train.generation.sample import sample
from ldm_train.pipeline.convert import convert
from ldm_train.pipeline.run import Run
from ldm_train.storage import file_sha256

STAGES = ("stages=[autoencoder,latents,diffusion]", "diffusion.evaluate_every=null")
TEXT = (
    "diffusion/conditioning=text", "diffusion.conditioning.context_dim=32",
    "diffusion.conditioning.conditioners.text={vocab_size:300,depth:1,max_length:16}",
)  # fmt: skip
EMBEDDING = "conditioners.text.encoder.token_embedding.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = chain(tmp_path_factory.mktemp("inversion"), *STAGES, *TEXT, name="base")
    run.execute()
    return run


def learning(base: Run, name: str, *options: str) -> Run:
    begun = ("autoencoder.pretrained=base", "diffusion.init=base", "diffusion/adapter=inversion", "diffusion.lr=1e-2")
    return chain(base.folder.parent, *STAGES, *TEXT, *begun, "diffusion.max_steps=4", *options, name=name)


@pytest.fixture(scope="module")
def learned(base: Run) -> Run:
    run = learning(base, "word", "diffusion.adapter.token=circle-like", "diffusion.adapter.vectors=2")
    run.execute()
    return run


@pytest.mark.chain
def test_only_the_rows_of_the_word_are_new(base: Run, learned: Run) -> None:
    before, after = (load_latent_diffusion(run.folder).state_dict() for run in (base, learned))
    assert before.keys() == after.keys()
    for key, value in before.items():
        if key != EMBEDDING:
            assert torch.equal(after[key], value), key
    known = len(before[EMBEDDING])
    assert torch.equal(after[EMBEDDING][:known], before[EMBEDDING])
    token, rows = read_word(learned.folder / "diffusion" / "adapter")
    assert token == "circle-like"
    assert torch.equal(after[EMBEDDING][known:], rows)
    assert rows.shape == (2, 32)


def job(base: Run, out: str, *options: str) -> list[Path]:
    folder = base.folder.parent
    given = ("run=base", f"runs_dir={folder}", f"out={folder / out}", "n=2", "num_inference_steps=2", *options)
    return sample(composed("sample", "prompts=a circle-like on black", "accelerator=cpu", *given))


@pytest.mark.chain
def test_the_base_with_the_word_draws_what_the_run_draws(
    base: Run, learned: Run, capsys: pytest.CaptureFixture
) -> None:
    apart = job(base, "apart", "adapters=word")
    assert "prompts may say circle-like" in capsys.readouterr().out
    whole = job(base, "whole", f"run={learned.folder}")
    assert [Image.open(p).tobytes() for p in apart] == [Image.open(p).tobytes() for p in whole]
    with pytest.raises(ValueError, match="a word that was learned, which has no strength"):
        job(base, "strong", "adapters=[word:0.5]")
    with pytest.raises(ValueError, match="adapters: word: the text encoder knows circle-like already"):
        job(base, "twice", f"run={learned.folder}", "adapters=word")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("diffusion.adapter.token=a",), "knows a already"),
        (("diffusion.adapter.token='two words'",), "is not a single word"),
        (("diffusion.adapter.vectors=0",), "vectors=0 is not a whole number"),
        (("diffusion/conditioning=class",), "base has the conditioners text, this run class_label"),
    ],
)
@pytest.mark.chain
def test_a_word_that_cannot_be_learned_is_named(base: Run, options: tuple[str, ...], message: str) -> None:
    begun = ("autoencoder.pretrained=base", "diffusion.init=base", "diffusion/adapter=inversion")
    text = () if "diffusion/conditioning=class" in options else TEXT
    with pytest.raises(ValueError, match=message):
        chain(base.folder.parent, *STAGES, *text, *begun, *options, name="wrong").execute()


def test_a_damaged_word_is_named(learned: Run, tmp_path: Path) -> None:
    folder = learned.folder / "diffusion" / "adapter"
    record = json.loads((folder / "adapter.json").read_text())
    for name, tensors, message in (
        ("changed", {"circle-like": torch.ones(2, 32)}, "is damaged"),
        ("several", {"a": torch.ones(2), "b": torch.ones(2)}, "holds 2 words"),
        ("deep", {"a": torch.ones(2, 2, 2)}, "is not a learned word"),
        ("infinite", {"a": torch.tensor([torch.inf])}, "not finite"),
    ):
        place = tmp_path / name
        place.mkdir()
        save_file(tensors, place / "learned_embeds.safetensors")
        sha256 = record["sha256"] if name == "changed" else file_sha256(place / "learned_embeds.safetensors")
        (place / "adapter.json").write_text(json.dumps(record | {"sha256": sha256}))
        with pytest.raises(ValueError, match=message):
            read_word(place)
    assert load_file(folder / "learned_embeds.safetensors").keys() == {"circle-like"}


@pytest.mark.chain
def test_a_word_is_not_found_inside_other_words(base: Run) -> None:
    reader = load_latent_diffusion(base.folder).conditioners["text"]
    known = {text: reader.tokenize([text])[0] for text in ("a mzqx zebra", "zqq", "a zq_b")}
    add_tokens(reader, "zq", torch.zeros(2, 32))
    for text, ids in known.items():
        assert torch.equal(reader.tokenize([text])[0], ids)
    assert reader.spelled(["a zq, zq_b mzqx"]) == ["a zq zq_1, zq_b mzqx"]
    reader.learned = reader.learned | {"<x>": ["<x>", "<x>_1"]}
    assert reader.spelled(["a<x>s zq <x>_1"]) == ["a<x> <x>_1s zq zq_1 <x>_1"]
    first = 3 + 297  # the number of rows before it
    assert reader.tokenize(["zq"])[0][0, 1:3].tolist() == [first, first + 1]


@pytest.mark.chain
def test_a_learned_word_is_no_adapter_to_convert(learned: Run, tmp_path: Path) -> None:
    folder = learned.folder / "diffusion" / "adapter"
    with pytest.raises(ValueError, match="is a learned word; diffusers loads its"):
        convert(composed("convert", f"from={folder}", f"to={tmp_path}/x.safetensors", "format=kohya"))
