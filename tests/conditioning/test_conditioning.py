"""Conditioners: the null condition equals dropping every row, dropout changes dropped rows only, padding changes
nothing."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    AutoTokenizer,
    BertTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5Model,
)

from ldm_train.conditioning.base import Conditioner, merge
from ldm_train.conditioning.class_label import ClassLabel
from ldm_train.conditioning.text import FrozenText, TrainedText, read_tokenizer, train_tokenizer

CAPTIONS = [
    "a red circle in the center on a black background",
    "a large blue square at the top left over white",
    "two green triangles",
    "Äpfel, naïve: 3 pieces!",
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(CAPTIONS * 20, vocab_size=400)


def text(tokenizer, **arguments) -> TrainedText:
    return TrainedText(tokenizer, **{"dim": 16, "depth": 2, "heads": 2, "max_length": 24} | arguments).eval()


@pytest.fixture(params=["vector", "context", "text", "pooled text"])
def conditioner_and_values(request: pytest.FixtureRequest, tokenizer) -> tuple[Conditioner, object]:
    if "text" in request.param:
        return text(tokenizer, pooled="pooled" in request.param), CAPTIONS
    return ClassLabel(["cat", "dog", "owl"], 8, request.param), torch.tensor([0, 1, 2, 1])


def assert_rows(found: dict, expected: dict, rows: list[int]) -> None:
    assert found.keys() == expected.keys()
    for key in found:
        torch.testing.assert_close(found[key][rows], expected[key][rows], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_null_is_a_full_drop_mask(conditioner_and_values: tuple) -> None:
    conditioner, values = conditioner_and_values
    null = conditioner.null(4)
    assert_rows(null, conditioner(values, torch.ones(4, dtype=torch.bool)), [0, 1, 2, 3])
    for value in null.values():
        torch.testing.assert_close(value[0], value[3])  # the same for every sample
    plain = conditioner(values, torch.zeros(4, dtype=torch.bool))
    moved = [key for key in plain if key != "context_mask" and not torch.allclose(plain[key], null[key], atol=1e-3)]
    assert moved == [key for key in plain if key != "context_mask"]


@torch.no_grad()
def test_dropout_touches_dropped_rows_alone(conditioner_and_values: tuple) -> None:
    conditioner, values = conditioner_and_values
    some = conditioner(values, torch.tensor([False, True, False, True]))
    assert_rows(some, conditioner(values, torch.zeros(4, dtype=torch.bool)), [0, 2])
    assert_rows(some, conditioner.null(4), [1, 3])


def test_outputs_are_the_declared_slots(conditioner_and_values: tuple) -> None:
    conditioner, values = conditioner_and_values
    output = conditioner(values, torch.zeros(4, dtype=torch.bool))
    assert set(output) - {"context_mask"} == set(conditioner.widths)
    for slot, width in conditioner.widths.items():
        assert output[slot].shape[2 if slot == "context" else 1] == width
    if "context" in output:
        assert output["context_mask"].shape == output["context"].shape[:2]
        assert output["context_mask"].dtype == torch.bool


def test_the_null_condition_is_trained(conditioner_and_values: tuple) -> None:
    conditioner, _ = conditioner_and_values
    sum(v.square().sum() for k, v in conditioner.null(2).items() if k != "context_mask").backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in conditioner.parameters())


def test_a_class_is_parsed_by_name_or_index_and_described() -> None:
    conditioner = ClassLabel(["cat", "dog", "owl"], 8)
    assert [conditioner.parse(t) for t in ("dog", "2", "0")] == [1, 2, 0]
    assert conditioner.describe(torch.tensor([2, 0])) == ["owl", "cat"]
    assert ClassLabel(10, 8).parse("7") == 7


@pytest.mark.parametrize("unknown", ["fish", "3", "-1", "", "1.0"])
def test_an_unknown_class_is_named_with_the_known_ones(unknown: str) -> None:
    with pytest.raises(ValueError, match=rf"unknown class '{unknown}'; this model knows cat, dog, owl \(or 0 to 2\)"):
        ClassLabel(["cat", "dog", "owl"], 8).parse(unknown)


@pytest.mark.parametrize(
    ("arguments", "message"), [({"slot": "concat"}, "not 'concat'"), ({"dropout": 1.5}, "a probability, got 1.5")]
)
def test_wrong_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClassLabel(3, 8, **arguments)


def test_tokens_decode_to_the_lower_cased_caption(tokenizer) -> None:
    for caption in [*CAPTIONS, "words never seen: qxz 日本 🙂"]:
        ids = tokenizer.encode(caption, add_special_tokens=False).ids
        assert tokenizer.decode(ids).strip() == caption.lower()


def test_frequent_words_are_single_tokens(tokenizer) -> None:
    assert len(tokenizer.encode("a red circle").ids) == 3


def test_masks_cover_start_caption_and_end(tokenizer) -> None:
    conditioner = text(tokenizer)
    ids, mask = conditioner.tokenize(["", "a red circle", " ".join(["circle"] * 100)])
    pad, start, end = conditioner.special
    assert mask.sum(dim=1).tolist() == [2, 5, 24]
    assert (ids[~mask] == pad).all()
    for row, length in enumerate([2, 5, 24]):  # a long caption is cut and still ends
        assert (ids[row, 0], ids[row, length - 1]) == (start, end)


@torch.no_grad()
def test_padding_touches_no_token_that_counts(tokenizer) -> None:
    conditioner = text(tokenizer, pooled=True)
    keep = torch.zeros(4, dtype=torch.bool)
    before = conditioner(CAPTIONS, keep)
    conditioner.encoder.token_embedding.weight[conditioner.special[0]] = 10 * torch.randn(16)
    after, mask = conditioner(CAPTIONS, keep), before["context_mask"]
    torch.testing.assert_close(after["context"][mask], before["context"][mask], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(after["vector"], before["vector"], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(after["context"][~mask], before["context"][~mask], atol=1e-2)


@torch.no_grad()
def test_pooled_is_the_mean_of_the_tokens_that_count(tokenizer) -> None:
    output = text(tokenizer, pooled=True)(CAPTIONS, torch.zeros(4, dtype=torch.bool))
    for row in range(4):
        expected = output["context"][row][output["context_mask"][row]].mean(dim=0)
        torch.testing.assert_close(output["vector"][row], expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_a_caption_is_encoded_the_same_in_any_batch_and_word_order_matters(tokenizer) -> None:
    conditioner, keep = text(tokenizer), torch.zeros(4, dtype=torch.bool)
    together, alone = conditioner(CAPTIONS, keep), conditioner(CAPTIONS[1:2], keep[:1])
    torch.testing.assert_close(together["context"][1:2], alone["context"], rtol=1e-4, atol=1e-5)
    orders = conditioner(["red circle blue square", "blue circle red square"], keep[:2])
    assert not torch.allclose(orders["context"][0], orders["context"][1], atol=1e-3)


def test_the_tokenizer_travels_as_json(tokenizer) -> None:
    again = text(tokenizer.to_str())
    assert torch.equal(again.tokenize(CAPTIONS)[0], text(tokenizer).tokenize(CAPTIONS)[0])


def test_a_tokenizer_without_its_special_tokens_is_named() -> None:
    from tokenizers import Tokenizer, models

    with pytest.raises(ValueError, match="lacks special tokens: <pad>"):
        TrainedText(Tokenizer(models.BPE()), 8)


def test_a_label_beyond_the_class_count_is_named() -> None:
    conditioner = ClassLabel(["cat", "dog"], 8)
    keep = torch.zeros(2, dtype=torch.bool)
    for labels in ([0, 2], [-1, 0]):
        with pytest.raises(ValueError, match=r"this model has 2 classes \(0 to 1\); set .*class_label\.classes"):
            conditioner(torch.tensor(labels), keep)


def test_a_bert_vocabulary_tokenises_as_bert_does(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "circle", "##s", "in", "the", ",", "un", "##red"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    conditioner = text(read_tokenizer(str(tmp_path / "vocab.txt")), max_length=10)
    reference = BertTokenizer(str(tmp_path / "vocab.txt"), do_lower_case=True)
    captions = ["A red circle, unred!", "Circles in thé RED"]
    expected = reference(captions, padding="max_length", max_length=10, truncation=True, return_tensors="pt")
    ids, mask = conditioner.tokenize(captions)
    assert torch.equal(ids, expected["input_ids"])
    assert torch.equal(mask, expected["attention_mask"].bool())
    conditioner.tokenizer.save(str(tmp_path / "tokenizer.json"))
    again = text(read_tokenizer(str(tmp_path / "tokenizer.json")), max_length=10)
    assert torch.equal(again.tokenize(captions)[0], ids)


def test_a_vocabulary_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"vocab\.txt is not a file; give a vocab\.txt or tokenizer\.json"):
        read_tokenizer(str(tmp_path / "vocab.txt"))
    (tmp_path / "vocab.txt").write_text("red\ngreen\n")
    with pytest.raises(ValueError, match=r"vocab\.txt is not a tokenizer: it lacks \[PAD\]"):
        read_tokenizer(str(tmp_path / "vocab.txt"))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer"):
        read_tokenizer(str(tmp_path / "tokenizer.json"))


def x_transformer(state: dict[str, torch.Tensor], ids: torch.Tensor, heads: int, mask: torch.Tensor | None = None):
    """The text encoder that LDM copied from x-transformers: token embeddings plus unscaled position embeddings,
    pre-norm attention without q/k/v biases, feed-forward layers of four times the width with GELU, final norm."""
    norm = lambda x, key: F.layer_norm(x, x.shape[-1:], state[f"{key}.weight"], state[f"{key}.bias"])  # noqa: E731
    x = state["token_embedding.weight"][ids] + state["position_embedding"][: ids.shape[1]]
    for i in range(1 + max(int(key.split(".")[2]) for key in state if ".layers." in key)):
        layer = f"transformer.layers.{i}"
        h = norm(x, f"{layer}.norm1")
        q, k, v = (
            (h @ state[f"{layer}.attention.to_{n}.weight"].T).unflatten(2, (heads, -1)).transpose(1, 2) for n in "qkv"
        )
        scores = q @ k.transpose(2, 3) * q.shape[3] ** -0.5
        scores = scores if mask is None else scores.masked_fill(~mask[:, None, None], -torch.inf)
        mixed = (scores.softmax(dim=3) @ v).transpose(1, 2).flatten(2)
        x = x + F.linear(mixed, state[f"{layer}.attention.to_out.0.weight"], state[f"{layer}.attention.to_out.0.bias"])
        h = F.linear(norm(x, f"{layer}.norm2"), state[f"{layer}.linear1.weight"], state[f"{layer}.linear1.bias"])
        x = x + F.linear(F.gelu(h), state[f"{layer}.linear2.weight"], state[f"{layer}.linear2.bias"])
    return norm(x, "norm")


@torch.no_grad()
def test_heads_narrower_than_the_width_attend_as_in_x_transformers(tokenizer) -> None:
    torch.manual_seed(0)
    conditioner = text(tokenizer, dim=40, depth=3, heads=2, head_dim=8, masked=False)
    for p in conditioner.parameters():
        p.add_(0.1 * torch.randn_like(p))  # so that norms and biases have an effect
    ids, mask = conditioner.tokenize(CAPTIONS)
    state = conditioner.encoder.state_dict()
    output = conditioner(CAPTIONS, torch.zeros(4, dtype=torch.bool))
    torch.testing.assert_close(output["context"], x_transformer(state, ids, 2), rtol=1e-5, atol=1e-5)
    assert output["context_mask"].all()  # padding is visible to the U-Net too
    hidden = conditioner.encoder(ids, mask)
    torch.testing.assert_close(hidden[mask], x_transformer(state, ids, 2, mask)[mask], rtol=1e-5, atol=1e-5)


def test_heads_that_fill_the_width_keep_the_weights_of_older_models(tokenizer) -> None:
    plain, named = text(tokenizer), text(tokenizer, head_dim=8)
    assert list(plain.state_dict()) == list(named.state_dict())
    assert "encoder.transformer.layers.0.self_attn.in_proj_weight" in plain.state_dict()


@torch.no_grad()
def test_visible_padding_changes_the_tokens_but_not_what_is_pooled(tokenizer) -> None:
    conditioner = text(tokenizer, pooled=True, masked=False)
    output = conditioner(CAPTIONS, torch.zeros(4, dtype=torch.bool))
    _, mask = conditioner.tokenize(CAPTIONS)
    hidden = conditioner.encoder(conditioner.tokenize(CAPTIONS)[0])
    torch.testing.assert_close(output["context"], hidden)
    torch.testing.assert_close(output["vector"][2], hidden[2][mask[2]].mean(dim=0), rtol=1e-5, atol=1e-6)


def test_merge_joins_tokens_with_their_masks_and_features() -> None:
    yes, no = torch.ones(2, 3, dtype=torch.bool), torch.zeros(2, 1, dtype=torch.bool)
    one = {"context": torch.randn(2, 3, 4), "context_mask": yes, "vector": torch.ones(2, 5)}
    other = {"context": torch.randn(2, 1, 4), "context_mask": no, "vector": torch.zeros(2, 2)}
    merged = merge([one, other])
    assert {k: tuple(v.shape) for k, v in merged.items()} == {
        "context": (2, 4, 4), "context_mask": (2, 4), "vector": (2, 7)
    }  # fmt: skip
    assert torch.equal(merged["context"][:, 3:], other["context"])
    assert merged["context_mask"].tolist() == [[True, True, True, False]] * 2
    assert merge([]) == {}


@pytest.fixture(scope="module")
def pretrained_text(tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random CLIP text encoder as transformers writes it."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(1)
    size = tokenizer.get_vocab_size()
    config = CLIPTextConfig(
        vocab_size=size, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=24, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    CLIPTextModel(config).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<start>", eos_token="<end>"
    ).save_pretrained(folder)
    return folder


@torch.no_grad()
def test_an_encoder_that_is_half_of_a_model_is_written_whole_and_read_again(
    pretrained_text: Path, tmp_path: Path
) -> None:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    words = AutoTokenizer.from_pretrained(pretrained_text)
    T5Model(T5Config(**sizes, vocab_size=len(words), decoder_start_token_id=0)).save_pretrained(tmp_path / "t5")
    words.save_pretrained(tmp_path / "t5")
    text = FrozenText(str(tmp_path / "t5"), 16, max_length=24)
    for part in reversed(text.savable()):
        part.save_pretrained(tmp_path / "again")
    again = FrozenText(str(tmp_path / "again"), 16, max_length=24)
    assert torch.equal(text.encode(CAPTIONS)[0], again.encode(CAPTIONS)[0])


@torch.no_grad()
def test_projected_captions_are_clips_embeddings_of_length_one(pretrained_text: Path, tmp_path: Path) -> None:
    config = CLIPTextConfig.from_pretrained(pretrained_text, projection_dim=8)
    model = CLIPTextModelWithProjection(config).eval()
    words = AutoTokenizer.from_pretrained(pretrained_text)
    for part in (model, words):
        part.save_pretrained(tmp_path)
    text = FrozenText(str(tmp_path), 8, "projected", max_length=24)
    tokens = words(CAPTIONS, padding="max_length", truncation=True, max_length=24, return_tensors="pt")
    expected = torch.nn.functional.normalize(model(input_ids=tokens["input_ids"]).text_embeds, dim=1)
    drop = torch.tensor([False, True, False, False])
    found = text(CAPTIONS, drop)
    assert found["context_mask"].shape == (4, 1)
    torch.testing.assert_close(found["context"][~drop, 0], expected[~drop], rtol=1e-5, atol=1e-6)
    assert not found["context"][1].any()
    assert not FrozenText("nowhere", 8, "projected").null(2)["context"].any()  # needs no encoder


@torch.no_grad()
def test_frozen_text_gives_the_hidden_states_of_transformers(pretrained_text: Path) -> None:
    keep = torch.zeros(4, dtype=torch.bool)
    reference = CLIPTextModel.from_pretrained(pretrained_text).eval()
    tokens = AutoTokenizer.from_pretrained(pretrained_text)(
        CAPTIONS, padding="max_length", truncation=True, max_length=24, return_tensors="pt"
    )
    output = reference(input_ids=tokens["input_ids"], output_hidden_states=True)
    last = FrozenText(str(pretrained_text), 16, max_length=24)(CAPTIONS, keep)["context"]
    torch.testing.assert_close(last, output.last_hidden_state)
    penultimate = FrozenText(str(pretrained_text), 16, "penultimate", max_length=24)(CAPTIONS, keep)["context"]
    norm = torch.nn.LayerNorm(16)
    norm.load_state_dict(
        {k.rpartition(".")[2]: v for k, v in reference.state_dict().items() if "final_layer_norm" in k}
    )
    torch.testing.assert_close(penultimate, norm(output.hidden_states[-2]))


@torch.no_grad()
def test_padding_with_id_0_is_that_of_open_clip(pretrained_text: Path, tokenizer) -> None:
    """open_clip.tokenize gives start, caption, end, zeros. Stable Diffusion 2 then takes the last layer but one, with
    the final norm applied and only the causal mask."""
    folder = pretrained_text.with_name("end_padded")  # LAION's tokenizer pads with the end token, like OpenAI's
    shutil.copytree(pretrained_text, folder)
    ends = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<end>", eos_token="<end>")
    ends.save_pretrained(folder)
    reference = CLIPTextModel.from_pretrained(folder).eval()
    captions = [*CAPTIONS, "", " ".join(["circle"] * 100)]
    ids = torch.zeros(len(captions), 24, dtype=torch.long)
    plain = torch.full_like(ids, ends.eos_token_id)
    for row, caption in enumerate(captions):
        tokens = tokenizer.encode(caption, add_special_tokens=False).ids[:24]
        ids[row, : len(tokens)] = plain[row, : len(tokens)] = torch.tensor(tokens)
    text_model = getattr(reference, "text_model", reference)
    keep = torch.zeros(len(captions), dtype=torch.bool)
    for pad_id, expected in ((0, ids), (None, plain)):
        conditioner = FrozenText(str(folder), 16, "penultimate", max_length=24, pad_id=pad_id)
        output = conditioner(captions, keep)
        hidden = reference(input_ids=expected, output_hidden_states=True).hidden_states[-2]
        torch.testing.assert_close(output["context"], text_model.final_layer_norm(hidden))
        assert output["context_mask"].all()
    with pytest.raises(ValueError, match=rf"pad_id=9999 is not among the tokenizer's {len(ends)} tokens"):
        FrozenText(str(folder), 16, max_length=24, pad_id=9999).null(1)


def test_frozen_text_is_asked_once_per_caption_and_owns_no_weights(pretrained_text: Path) -> None:
    conditioner = FrozenText(str(pretrained_text), 16, max_length=24, masked=True, cache_size=3)
    asked = []
    encode = conditioner.encode
    conditioner.encode = lambda captions: (asked.extend(captions), encode(captions))[1]
    some = torch.tensor([False, True, False, False])
    first = conditioner(CAPTIONS, some)
    assert sorted(asked) == sorted(["", CAPTIONS[0], CAPTIONS[2], CAPTIONS[3]])
    again = conditioner([CAPTIONS[3], CAPTIONS[2]], torch.zeros(2, dtype=torch.bool))
    assert len(asked) == 4
    torch.testing.assert_close(again["context"][0], first["context"][3])
    assert not first["context_mask"].all()  # masked: padding does not count
    assert_rows(conditioner.null(4), conditioner(CAPTIONS, torch.ones(4, dtype=torch.bool)), [0, 1, 2, 3])
    assert conditioner.state_dict() == {}
    assert list(conditioner.parameters()) == []


def test_long_and_empty_captions_are_cut_and_null(pretrained_text: Path, tokenizer) -> None:
    for conditioner in (FrozenText(str(pretrained_text), 16, max_length=24), text(tokenizer)):
        output = conditioner(["word " * 500, ""], torch.tensor([False, False]))
        assert output["context"].shape == (2, 24, 16)
        torch.testing.assert_close(output["context"][1:], conditioner.null(1)["context"])


def test_a_text_encoder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"cannot load .*nowhere.*conditioners\.text\.path=<folder>"):
        FrozenText(str(tmp_path / "nowhere"), 16).null(1)


def test_code_that_comes_with_a_text_encoder_is_never_run(
    pretrained_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(pretrained_text, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine", "AutoModel": "mine.Mine"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text("raise SystemExit('the folder was run')")
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # if asked whether to run the code, the answer is yes
    with pytest.raises(FileNotFoundError, match=r"cannot load the text encoder .*model"):
        FrozenText(str(folder), 16).null(1)


def test_a_wrong_width_is_named(pretrained_text: Path) -> None:
    with pytest.raises(ValueError, match="hidden states of width 16, the config says dim=32"):
        FrozenText(str(pretrained_text), 32, max_length=24).null(1)


def test_folders_of_encoders_may_begin_with_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "clip").mkdir()
    assert FrozenText("~/clip", 8).is_local
    assert FrozenText("openai/clip-vit-large-patch14", 8).path == "openai/clip-vit-large-patch14"
    with pytest.raises(FileNotFoundError, match=rf"cannot load the text encoder {tmp_path}/none \(no such folder\)"):
        FrozenText("~/none", 8).pretrained()
