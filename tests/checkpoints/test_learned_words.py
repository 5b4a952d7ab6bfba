"""New words for a frozen text encoder: its own embeddings stay unchanged, and diffusers reads the file."""

from pathlib import Path

import pytest
import torch
from chains import tokenizer
from diffusers.loaders import TextualInversionLoaderMixin
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

from ldm_train.checkpoints.adapters import read_word
from ldm_train.conditioning.learned_tokens import TextualInversion, add_tokens, check_rare, settle
from ldm_train.conditioning.text import FrozenText, TrainedText, train_tokenizer


def clip(folder: Path) -> FrozenText:
    folder.mkdir(exist_ok=True)
    words = tokenizer(folder)
    config = CLIPTextConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=12, pad_token_id=1, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return FrozenText("a CLIP", 16, max_length=12, pretrained=(words, CLIPTextModel(config)))


def test_a_frozen_encoder_learns_a_word_and_keeps_its_rows(tmp_path: Path) -> None:
    text = clip(tmp_path)
    drop = torch.tensor([False, False])
    embedding = text.pretrained()[1].get_input_embeddings()
    before, known = embedding.weight.detach().clone(), text(["a dog"] * 2, drop)["context"]
    parts = torch.nn.ModuleDict({"conditioners": torch.nn.ModuleDict({"text": text})})
    adapter = TextualInversion("<my-dog>", vectors=2).attach(parts)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.5)
    for _ in range(3):
        context = text(["a <my-dog> dog", "a dog"], drop)["context"]
        context[0].square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    (rows,) = adapter.parameters()
    assert not torch.equal(rows, before.mean(dim=0, keepdim=True).repeat(2, 1))
    settle(text)
    assert torch.equal(embedding.weight[: len(before)], before)
    assert torch.equal(embedding.weight[len(before) :], rows)
    torch.testing.assert_close(text(["a dog"] * 2, drop)["context"], known)
    assert not text.trains


def test_a_word_of_diffusers_file_means_there_what_it_means_here(tmp_path: Path) -> None:
    """The file goes through diffusers' own loader; both encoders then give the same hidden states."""

    class Pipeline(TextualInversionLoaderMixin):
        pass

    text = clip(tmp_path)
    theirs = Pipeline()
    theirs.tokenizer, theirs.text_encoder = clip(tmp_path / "theirs").pretrained()
    theirs.text_encoder.load_state_dict(text.pretrained()[1].state_dict())
    theirs.components, theirs.hf_device_map = {}, None
    file = tmp_path / "learned_embeds.safetensors"
    save_file({"<my-dog>": torch.randn(3, 16)}, file)
    theirs.load_textual_inversion(str(file))
    token, rows = read_word(file)
    add_tokens(text, token, rows)
    settle(text)
    prompt = theirs.maybe_convert_prompt("a <my-dog> dog", theirs.tokenizer)
    ids = theirs.tokenizer(
        [prompt], padding="max_length", max_length=12, truncation=True, return_tensors="pt"
    ).input_ids
    hidden, _ = text.encode(["a <my-dog> dog"])
    torch.testing.assert_close(theirs.text_encoder(ids).last_hidden_state, hidden)


def test_a_subject_is_not_called_by_a_word_that_the_encoder_knows_well(tmp_path: Path) -> None:
    """CLIP's vocabulary is sorted by frequency, the most frequent tokens first; here `i</w>` is in its second half."""
    text = clip(tmp_path)
    for word in ("zqx", "dog", "i"):  # "i" is a token, but one of the rare ones
        check_rare(text, word)
    for word in ("a", "c"):
        with pytest.raises(ValueError, match=f"knows {word} well, and would forget what it means; choose a rare word"):
            check_rare(text, word)
    trained = TrainedText(train_tokenizer(["a red circle"] * 9, 300).to_str(), dim=8, depth=1, heads=2, max_length=8)
    check_rare(trained, "zqx")
    for word in ("circle", "Circle"):  # the tokenizer lowercases
        with pytest.raises(ValueError, match=f"knows {word} well"):
            check_rare(trained, word)
