"""Textual inversion (Gal et al. 2022, arXiv:2208.01618): learns new words of a text encoder, whose other weights stay
frozen."""

from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import AddedToken
from torch import nn
from torch.nn.utils import parametrize

from ldm_train.conditioning.base import is_word
from ldm_train.conditioning.text import Captions, FrozenText, TrainedText, families


class NewRows(nn.Module):
    """The parametrisation of an embedding's weight (N, dim) that appends rows (K, dim). The rows before them are the
    same tensor as before."""

    def __init__(self, rows: torch.Tensor):
        super().__init__()
        self.rows = nn.Parameter(rows.detach().clone())

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return torch.cat([weight, self.rows.to(weight.dtype)])


def _known(tokenizer: Any) -> dict[str, int]:
    return tokenizer.get_vocab()  # for tokenizers of both `tokenizers` and `transformers`


def _ids(conditioner: Captions, text: str) -> list[int]:
    """Returns a text's token ids, without start and end tokens."""
    if isinstance(conditioner, FrozenText):
        return conditioner.pretrained()[0](text, add_special_tokens=False)["input_ids"]
    return conditioner.tokenizer.encode(text, add_special_tokens=False).ids  # type: ignore[attr-defined]


def embedding_of(conditioner: Captions) -> nn.Embedding:
    """The token embedding of a conditioner's encoder."""
    if isinstance(conditioner, FrozenText):
        return conditioner.pretrained()[1].get_input_embeddings()
    return conditioner.encoder.token_embedding  # type: ignore[union-attr,return-value]


def parts_of(token: str, vectors: int) -> list[str]:
    """Returns the tokens of a word with several vectors: <x>, <x>_1, <x>_2, named as in diffusers."""
    return [token, *(f"{token}_{k}" for k in range(1, vectors))]


def _tokenizer(conditioner: Captions) -> Any:
    return conditioner.pretrained()[0] if isinstance(conditioner, FrozenText) else conditioner.tokenizer  # type: ignore[attr-defined]


def check_new(conditioner: Captions, token: str, vectors: int) -> None:
    """Raises ValueError for a word that the conditioner's tokenizer already has as a token, plain or marked as the
    beginning or end of a word."""
    known = _known(_tokenizer(conditioner))
    for word in parts_of(token, vectors):
        if taken := [form for form in (word, f"{word}</w>", f"\u0120{word}", f"\u2581{word}") if form in known]:
            raise ValueError(
                f"the text encoder knows {word} already (as {taken[0]}), and would forget what it means; choose a word that means "
                f"nothing, <my-{word.strip('<>')}> for example"
            )


def check_rare(conditioner: Captions, word: str) -> None:
    """Raises ValueError for a word that a text encoder knows well: as one token, in the first half of the vocabulary of
    a pretrained tokenizer (which is sorted by frequency), or anywhere in that of a trained one."""
    known, ids = len(_known(_tokenizer(conditioner))), _ids(conditioner, word)
    most = known // 2 if isinstance(conditioner, FrozenText) else known
    if len(ids) == 1 and ids[0] < most:
        raise ValueError(
            f"the text encoder knows {word} well, and would forget what it means; choose a rare word, zqx for example"
        )


def add_tokens(conditioner: Captions, token: str, rows: torch.Tensor) -> NewRows:
    """Adds a word with its vectors (K, dim) to a conditioner's tokenizer and embedding. Returns the new rows, which can
    be trained. Raises ValueError for a word that is already known, or that does not fit the encoder."""
    tokenizer = _tokenizer(conditioner)
    embedding, words = embedding_of(conditioner), parts_of(token, len(rows))
    check_new(conditioner, token, len(rows))
    if parametrize.is_parametrized(embedding) or rows.shape[1] != embedding.weight.shape[1]:
        had = (
            "learned words already" if parametrize.is_parametrized(embedding) else f"width {embedding.weight.shape[1]}"
        )
        raise ValueError(f"{token} has vectors of width {rows.shape[1]}; this model's text encoder has {had}")
    if len(_known(tokenizer)) > len(embedding.weight):
        raise ValueError("the tokenizer has more words than the encoder's embedding has rows")
    first = len(embedding.weight)
    # Rows without a word get unused tokens first, so that the new tokens match the new rows.
    tokenizer.add_tokens([f"<unused{k}>" for k in range(len(_known(tokenizer)), first)])
    # A word that begins and ends with a letter or digit is not matched inside other words.
    joined = not isinstance(conditioner, FrozenText)  # byte-level tokenizers make a token of the space before a word
    tokenizer.add_tokens(
        [AddedToken(word, normalized=False, lstrip=joined, single_word=is_word(word)) for word in words]
    )
    known = _known(tokenizer)
    if [known[word] for word in words] != list(range(first, first + len(words))):
        raise ValueError(
            "the numbers of the tokenizer's words are not those of the embedding's rows; it cannot learn one"
        )
    parametrize.register_parametrization(embedding, "weight", NewRows(rows.to(embedding.weight.device)), unsafe=True)
    embedding.num_embeddings = first + len(words)
    conditioner.learned |= families(words)
    if isinstance(conditioner, FrozenText):
        conditioner.clear_cache()
    return embedding.parametrizations.weight[0]  # type: ignore[union-attr,index,return-value]


def settle(conditioner: Captions) -> None:
    """Makes learned rows part of the embedding's weight, which becomes a plain, frozen parameter again."""
    embedding = embedding_of(conditioner)
    if parametrize.is_parametrized(embedding):
        parametrize.remove_parametrizations(embedding, "weight")
        embedding.weight.requires_grad_(False)


def reader_of(conditioners: nn.ModuleDict) -> Captions:
    """Returns the conditioner that reads captions. Raises ValueError if there is none."""
    for conditioner in conditioners.values():
        if isinstance(conditioner, TrainedText | FrozenText):
            return conditioner
    raise ValueError("this model reads no captions, so it can learn no word")


@dataclass(frozen=True)
class TextualInversion:
    """How a word is learned.

    token: the word, as prompts will use it. vectors: how many tokens it stands for. initializer_token: a known word whose vectors
        are the initial values; None: the mean of all vectors
    Raises ValueError for invalid values.
    """

    token: str = "<subject>"
    vectors: int = 1
    initializer_token: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.token, str) or not self.token.strip() or any(c.isspace() for c in self.token):
            raise ValueError(f"token={self.token!r} is not a single word; <my-dog> is one")
        if type(self.vectors) is not int or not 1 <= self.vectors <= 64:
            raise ValueError(f"vectors={self.vectors} is not a whole number from 1 to 64")

    def first_rows(self, conditioner: Captions) -> torch.Tensor:
        """Returns the initial vectors (vectors, dim). Raises ValueError if the encoder does not know the word
        `initializer_token`."""
        weight = embedding_of(conditioner).weight.detach()
        if self.initializer_token is None:
            return weight.mean(dim=0, keepdim=True).repeat(self.vectors, 1)
        ids = _ids(conditioner, self.initializer_token)
        if not ids:
            raise ValueError(f"initializer_token={self.initializer_token!r} is not a word of the text encoder")
        return weight[[ids[min(k, len(ids) - 1)] for k in range(self.vectors)]]

    def attach(self, parts: nn.ModuleDict, name: str = "adapter") -> nn.ModuleDict:
        """Adds the word to a model's text encoder and freezes everything but its vectors, which are returned."""
        parts.requires_grad_(False)
        conditioner = reader_of(parts["conditioners"])  # type: ignore[arg-type]
        return nn.ModuleDict({"rows": add_tokens(conditioner, self.token, self.first_rows(conditioner))})
