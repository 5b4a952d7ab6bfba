"""Text encoders. `TrainedText` is trained from scratch with the U-Net, as in latent diffusion's text-to-image model."""

from collections.abc import Iterable, Sequence

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import nn

from ldm_train.conditioning.base import Conditioner

PAD, START, END = "<pad>", "<start>", "<end>"


def train_tokenizer(captions: Iterable[str], vocab_size: int) -> Tokenizer:
    """A lower-casing byte-level BPE tokenizer of at most `vocab_size` entries, learned from captions."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    return tokenizer


class TrainedText(Conditioner):
    """Tokens, learned positions and a pre-norm transformer; its hidden states are the cross-attention context.

    tokenizer: a Tokenizer with the special tokens of `train_tokenizer`, or its JSON (as model folders keep it)
    dim: width; must equal the U-Net's context_dim
    depth, heads: of the transformer. max_length: tokens, longer captions are cut
    pooled: also fill the vector slot with the mean hidden state, which joins the timestep embedding
    The null condition is the empty caption.
    """

    field = "caption"

    def __init__(
        self,
        tokenizer: Tokenizer | str,
        dim: int,
        depth: int = 2,
        heads: int = 4,
        max_length: int = 77,
        pooled: bool = False,
        dropout: float = 0.1,
    ):
        super().__init__(dropout)
        if isinstance(tokenizer, str):
            tokenizer = Tokenizer.from_str(tokenizer)
        self.tokenizer = tokenizer
        self.special = [tokenizer.token_to_id(t) for t in (PAD, START, END)]
        if None in self.special:
            raise ValueError(f"the tokenizer lacks the special tokens {PAD}, {START}, {END}")
        self.max_length, self.pooled = max_length, pooled
        self.slots = ("context", "vector") if pooled else ("context",)
        self.token_embedding = nn.Embedding(tokenizer.get_vocab_size(), dim)
        # Unit-size tokens (nn.Embedding's own start) dominate the residual stream: the pooled vector is a readable bag
        # of words from the first step. With 0.02 the short quickstart never learned to obey positions.
        self.position_embedding = nn.Parameter(torch.randn(max_length, dim) * 0.2)
        layer = nn.TransformerEncoderLayer(
            dim, heads, 4 * dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.transformer = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(dim)

    def tokenize(self, captions: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids (B, L) and mask (B, L), L = max_length, on the CPU."""
        pad, start, end = self.special
        ids = torch.full((len(captions), self.max_length), pad, dtype=torch.long)
        mask = torch.zeros(len(captions), self.max_length, dtype=torch.bool)
        for row, encoding in enumerate(self.tokenizer.encode_batch(list(captions), add_special_tokens=False)):
            tokens = [start, *encoding.ids[: self.max_length - 2], end]
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = True
        return ids, mask

    def forward(self, values: Sequence[str], drop: torch.Tensor) -> dict[str, torch.Tensor]:
        """B captions -> context (B, L, dim), context_mask (B, L), with `pooled` also vector (B, dim)."""
        captions = ["" if dropped else text for text, dropped in zip(values, drop.tolist())]
        device = self.token_embedding.weight.device
        ids, mask = (t.to(device, non_blocking=True) for t in self.tokenize(captions))
        x = self.token_embedding(ids) + self.position_embedding
        x = self.norm(self.transformer(x, src_key_padding_mask=~mask))
        condition = {"context": x, "context_mask": mask}
        if self.pooled:
            share = mask[..., None].to(x.dtype)
            condition["vector"] = (x * share).sum(dim=1) / share.sum(dim=1)
        return condition

    def null_values(self, count: int) -> list[str]:
        return [""] * count

    def parse(self, text: str) -> str:
        return text
