"""Text encoders. `TrainedText` is trained from scratch with the U-Net, as in latent diffusion's text-to-image model;
`FrozenText` wraps a pretrained one, as in Stable Diffusion."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import nn
from torch.nn import functional as F

from ldm_train.conditioning.base import Conditioner, from_pretrained, loading, place_of, spelling, without_last_layer
from ldm_train.conditioning.states import States, identity
from ldm_train.devices import to_device
from ldm_train.models.transformer import CrossAttention


class NarrowLayer(nn.Module):
    """A pre-norm transformer layer of any head_dim, as in x-transformers: no biases on q, k, v."""

    def __init__(self, dim: int, heads: int, head_dim: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = CrossAttention(dim, None, heads, head_dim)
        self.linear1, self.linear2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """x (B, L, dim), mask (B, L) bool with True where a token counts -> (B, L, dim)"""
        x = x + self.attention(self.norm1(x), mask=mask)
        return x + self.linear2(F.gelu(self.linear1(self.norm2(x))))


class NarrowTransformer(nn.Module):
    """Has the call signature of torch's TransformerEncoder, whose attention cannot be narrower than dim."""

    def __init__(self, dim: int, depth: int, heads: int, head_dim: int):
        super().__init__()
        self.layers = nn.ModuleList(NarrowLayer(dim, heads, head_dim) for _ in range(depth))

    def forward(self, x: torch.Tensor, src_key_padding_mask: torch.Tensor | None = None) -> torch.Tensor:
        """x (B, L, dim), src_key_padding_mask (B, L) bool with True where a token does not count -> (B, L, dim)"""
        for layer in self.layers:
            x = layer(x, None if src_key_padding_mask is None else ~src_key_padding_mask)
        return x


class TokenEncoder(nn.Module):
    """Token ids -> hidden states: embedding, learned positions, pre-norm transformer, final norm.

    vocab_size, dim, depth, heads; max_length: number of positions
    head_dim: width of a head, if heads * head_dim is not dim (LDM's text models: 8 heads of 64 at any width)
    """

    def __init__(self, vocab_size: int, dim: int, depth: int, heads: int, max_length: int, head_dim: int | None = None):
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, dim)
        # Unit-size token embeddings (nn.Embedding's default) dominate the residual stream: the pooled vector is a
        # usable bag of words from the first step. With 0.02, the short quickstart never learned to follow positions.
        self.position_embedding = nn.Parameter(torch.randn(max_length, dim) * 0.2)
        if head_dim is None or heads * head_dim == dim:
            layer = nn.TransformerEncoderLayer(
                dim, heads, 4 * dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            self.transformer = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        else:
            self.transformer = NarrowTransformer(dim, depth, heads, head_dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """ids (B, L), mask (B, L) bool with True where a token counts -> (B, L, dim)"""
        x = self.token_embedding(ids) + self.position_embedding
        return self.norm(self.transformer(x, src_key_padding_mask=None if mask is None else ~mask))


def mean_of(x: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """Returns the mean hidden state (B, dim) of x (B, L, dim) over the tokens that count, (B, L) bool."""
    share = counted[..., None].to(x.dtype)
    return (x * share).sum(dim=1) / share.sum(dim=1)


PAD, START, END = "<pad>", "<start>", "<end>"
SPECIAL = ((PAD, START, END), ("[PAD]", "[CLS]", "[SEP]"))  # ours, BERT's


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


def read_tokenizer(path: str) -> Tokenizer:
    """Reads a tokenizer from a local file: BERT's vocab.txt (lower-cased WordPiece), or any tokenizer.json.

    Raises FileNotFoundError or ValueError, naming the file.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"tokenizer {path} is not a file; give a vocab.txt or tokenizer.json, or from_data")
    try:
        if file.suffix == ".json":
            return Tokenizer.from_file(path)
        words = file.read_text(encoding="utf-8").splitlines()
        if missing := [t for t in (*SPECIAL[1], "[UNK]") if t not in words]:
            raise ValueError(f"it lacks {', '.join(missing)}")
        vocabulary = {word: i for i, word in enumerate(words)}
        tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        return tokenizer
    except Exception as error:  # the library raises plain Exceptions
        raise ValueError(f"{path} is not a tokenizer: {error}") from error


def families(words: Iterable[str]) -> dict[str, list[str]]:
    """Maps learned words with several vectors to their tokens: <x> -> <x>, <x>_1, <x>_2, named as in diffusers."""
    known, found = set(words), {}
    for word in sorted(known):
        family = [word]
        while f"{word}_{len(family)}" in known:
            family.append(f"{word}_{len(family)}")
        if len(family) > 1:
            found[word] = family
    return found


class Captions(Conditioner):
    """Base class of conditioners on captions. The null condition is the empty caption.

    learned: learned words (see `learned_tokens`) that stand for several tokens -> these tokens
    """

    field = "caption"

    def __init__(self, dropout: float):
        super().__init__(dropout)
        self.learned: dict[str, list[str]] = {}

    def spelled(self, captions: Sequence[str]) -> list[str]:
        """Returns captions with every learned word replaced by its tokens; one of letters only where it stands alone."""
        if not self.learned:
            return list(captions)
        longest_first = sorted(self.learned, key=len, reverse=True)
        known = re.compile("|".join(map(spelling, longest_first)))
        return [known.sub(lambda found: " ".join(self.learned[found[0]]), caption) for caption in captions]

    def null_values(self, count: int, latent_size: Sequence[int]) -> list[str]:
        return [""] * count

    def parse(self, text: str) -> str:
        return text


class TrainedText(Captions):
    """A text encoder: tokens, learned positions and a pre-norm transformer, whose hidden states are the context.

    tokenizer: a Tokenizer with the special tokens of `train_tokenizer` or of BERT, or its JSON (as in model folders)
    dim: width; must equal the U-Net's context_dim
    depth, heads, head_dim: of the transformer (see TokenEncoder). max_length: in tokens, longer captions are cut
    masked: attention, here and in the U-Net, ignores padding. LDM's published text models attend to it
    pooled: also fill the vector slot with the mean hidden state, which is added to the timestep embedding
    """

    def __init__(
        self,
        tokenizer: Tokenizer | str,
        dim: int,
        depth: int = 2,
        heads: int = 4,
        max_length: int = 77,
        pooled: bool = False,
        dropout: float = 0.1,
        head_dim: int | None = None,
        masked: bool = True,
    ):
        super().__init__(dropout)
        if isinstance(tokenizer, str):
            tokenizer = Tokenizer.from_str(tokenizer)
        self.tokenizer = tokenizer
        known = [[tokenizer.token_to_id(t) for t in names] for names in SPECIAL]
        self.special = next((ids for ids in known if None not in ids), None)
        if self.special is None:
            raise ValueError(f"the tokenizer lacks special tokens: {' or '.join(map(', '.join, SPECIAL))}")
        self.max_length, self.pooled, self.masked = max_length, pooled, masked
        self.widths = {"context": dim} | ({"vector": dim} if pooled else {})
        self.encoder = TokenEncoder(tokenizer.get_vocab_size(), dim, depth, heads, max_length, head_dim)
        self.learned = families(token.content for token in tokenizer.get_added_tokens_decoder().values())

    def tokenize(self, captions: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns token ids (B, L) and mask (B, L), L = max_length, on the CPU."""
        pad, start, end = self.special
        ids = torch.full((len(captions), self.max_length), pad, dtype=torch.long)
        mask = torch.zeros(len(captions), self.max_length, dtype=torch.bool)
        for row, encoding in enumerate(self.tokenizer.encode_batch(self.spelled(captions), add_special_tokens=False)):
            tokens = [start, *encoding.ids[: self.max_length - 2], end]
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = True
        return ids, mask

    def forward(self, values: Sequence[str], drop: torch.Tensor) -> dict[str, torch.Tensor]:
        """B captions -> context (B, L, dim), context_mask (B, L), with `pooled` also vector (B, dim)."""
        captions = ["" if dropped else text for text, dropped in zip(values, drop.tolist())]
        ids, mask = (to_device(t, self.device) for t in self.tokenize(captions))
        x = self.encoder(ids, mask if self.masked else None)
        condition = {"context": x, "context_mask": mask if self.masked else torch.ones_like(mask)}
        if self.pooled:
            condition["vector"] = mean_of(x, mask)
        return condition


class FrozenText(Captions):
    """Hidden states of a pretrained text encoder (CLIP, OpenCLIP in transformers' layout, T5, BERT, any AutoModel).

    path: a local folder, or a name that transformers can download
    dim: width of its hidden states; must equal the U-Net's context_dim
    layer: "last"; "penultimate" with the encoder's final norm applied, as in Stable Diffusion 2; or "projected": CLIP's
        embedding of a caption (L = 1, null condition 0), as text for retrieval-augmented models (Blattmann et al. 2022)
    max_length: in tokens, longer captions are cut. masked: attention ignores padding (CLIP was trained with it visible)
    cache_size: number of captions whose hidden states are kept in memory
    tokenizer: its folder, if it is not that of the encoder
    pad_id: the padding token, if it is not the tokenizer's own (Stable Diffusion 2: 0, as in open_clip; a caption's own
        tokens stay unchanged)
    pretrained: (tokenizer, encoder), if they are already loaded
    The encoder is not part of the model's weights; the model folder names it.
    """

    def __init__(
        self,
        path: str,
        dim: int,
        layer: str = "last",
        max_length: int = 77,
        masked: bool = False,
        cache_size: int = 20_000,
        dropout: float = 0.1,
        tokenizer: str | None = None,
        pad_id: int | None = None,
        pretrained: tuple[Any, nn.Module] | None = None,
    ):
        super().__init__(dropout)
        if layer not in ("last", "penultimate", "projected"):
            raise ValueError(f"layer is 'last', 'penultimate' or 'projected', not {layer!r}")
        self.path, self.dim, self.layer, self.max_length, self.masked = place_of(path), dim, layer, max_length, masked
        self.pad_id, self.widths, self.tokenizer_path = pad_id, {"context": dim}, place_of(tokenizer or path)
        self.known = States(cache_size)
        self._pretrained: tuple[Any, nn.Module] | None = None  # a tuple hides it from state_dict and optimisers
        self._whole: tuple[nn.Module, ...] = ()  # the model that the encoder is part of
        if pretrained is not None:
            self.take(*pretrained)
        self.register_buffer("_place", torch.zeros(()), persistent=False)

    @property
    def device(self) -> torch.device:
        return self._place.device

    def take(self, tokenizer: Any, encoder: nn.Module) -> None:
        """Uses this tokenizer and this encoder instead of loading them."""
        self._pretrained = (tokenizer, encoder.eval().requires_grad_(False))
        self._whole = (encoder,)

    def pretrained(self) -> tuple[Any, nn.Module]:
        """Returns tokenizer and encoder, loaded at first use. Raises FileNotFoundError if they cannot be obtained."""
        if self._pretrained is None:
            from transformers import AutoConfig, AutoModel, AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection

            holds = "config.json, weights and tokenizer as diffusion.conditioning.conditioners.text.path=<folder>"
            with loading("text encoder", self.path, holds):

                def loaded(kind: type, path: str) -> Any:
                    return kind.from_pretrained(path, local_files_only=Path(path).is_dir(), trust_remote_code=False)

                tokenizer = loaded(AutoTokenizer, self.tokenizer_path)
                clip = loaded(AutoConfig, self.path).model_type.startswith("clip")
                if self.layer == "projected" and not clip:
                    raise ValueError("layer=projected is for models of CLIP")
                kind = CLIPTextModelWithProjection if self.layer == "projected" else CLIPTextModel
                local = Path(self.path).is_dir()  # a local folder needs no network
                model = from_pretrained(kind if clip else AutoModel, self.path, local_files_only=local)
            if self.pad_id is not None and not 0 <= self.pad_id < len(tokenizer):
                raise ValueError(f"pad_id={self.pad_id} is not among the tokenizer's {len(tokenizer)} tokens")
            self._whole = (model,)
            model = model.get_encoder() if model.config.is_encoder_decoder else model
            self._pretrained = (tokenizer, model.eval().requires_grad_(False))
        tokenizer, model = self._pretrained
        return tokenizer, model.to(self.device)

    def savable(self) -> tuple[Any, nn.Module]:
        """Returns tokenizer and model (the whole of an encoder-decoder like T5), for a folder that `path` can name."""
        tokenizer, _ = self.pretrained()
        return tokenizer, self._whole[0]

    @property
    def trains(self) -> bool:
        """Whether any part of the encoder is trained: learned words, or an adapter."""
        return self._pretrained is not None and any(p.requires_grad for p in self._pretrained[1].parameters())

    @property
    def is_taken(self) -> bool:
        """Whether the encoder was already given or loaded."""
        return self._pretrained is not None

    @property
    def is_local(self) -> bool:
        """Whether the encoder can be loaded without network access."""
        return self._pretrained is not None or Path(self.path).is_dir()

    def require(self) -> None:
        self.pretrained()

    def prepare_for_plan(self) -> Sequence[nn.Module]:
        self.known.memory[""] = torch.zeros(self._length, self.dim), torch.ones(self._length, dtype=torch.bool)
        if self._pretrained is not None:
            return [self._pretrained[1]]
        from transformers import AutoConfig, AutoModel, CLIPTextModel

        with loading("text encoder", self.path, "config.json"), torch.device("meta"):
            config = AutoConfig.from_pretrained(self.path, local_files_only=True, trust_remote_code=False)
            if config.model_type.startswith("clip"):
                return [CLIPTextModel(getattr(config, "text_config", config))]
            return [AutoModel.from_config(config, trust_remote_code=False)]

    def frozen_encoder(self) -> nn.Module | None:
        encoder = None if self._pretrained is None else self.pretrained()[1]
        return without_last_layer(encoder) if encoder is not None and self.layer == "penultimate" else encoder

    @property
    def _length(self) -> int:
        """The number of hidden states per caption."""
        return 1 if self.layer == "projected" else self.max_length

    def cache_states_in(self, folder: Path) -> None:
        tokenizer, encoder = self.pretrained()
        own = identity(tokenizer, encoder, self.layer, self.max_length, self.masked, self.pad_id)
        self.known.cache_states_in(folder / own, (self._length, self.dim), lambda: self.device)

    def clear_cache(self) -> None:
        self.known.clear_cache()

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """B captions -> hidden states (B, L, dim) and attention mask (B, L) on the CPU; L = 1 for `projected`."""
        hidden, seen = self.states(captions)
        return hidden.cpu(), seen.cpu()

    def states(self, captions: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the same as `encode`, but on the device, and with gradients if any part of the encoder is trained."""
        tokenizer, model = self.pretrained()
        tokens = tokenizer(
            self.spelled(captions),
            padding="max_length",
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        )
        ids, attention = (to_device(tokens[name], self.device) for name in ("input_ids", "attention_mask"))
        if self.pad_id is not None:
            ids = ids.masked_fill(attention == 0, self.pad_id)
        arguments = {"attention_mask": attention} if self.masked else {}
        output = model(input_ids=ids, output_hidden_states=self.layer == "penultimate", **arguments)
        seen = attention.bool()
        if self.layer == "projected":
            hidden, seen = F.normalize(output.text_embeds, dim=1)[:, None], seen[:, :1]
        else:
            hidden = output.last_hidden_state
        if self.layer == "penultimate":
            hidden = output.hidden_states[-2]
            text = getattr(model, "text_model", model)
            if hasattr(text, "final_layer_norm"):
                hidden = text.final_layer_norm(hidden)
        if hidden.shape[2] != self.dim:
            raise ValueError(
                f"{self.path} gives hidden states of width {hidden.shape[2]}, the config says dim={self.dim}"
            )
        return hidden.float(), seen

    def forward(self, values: Sequence[str], drop: torch.Tensor) -> dict[str, torch.Tensor]:
        """B captions -> context (B, L, dim), context_mask (B, L)."""
        empty = None if self.layer == "projected" else ""
        captions = [empty if dropped else text for text, dropped in zip(values, drop.tolist())]
        if self.trains:  # cached states would be those of an earlier step
            if self.layer == "projected":
                raise ValueError("layer=projected knows one embedding of a caption, and learns nothing")
            context, mask = self.states([c or "" for c in captions])
        else:
            states = self.known.of([c for c in captions if c is not None], self.encode)
            zero = torch.zeros(1, self.dim), torch.ones(1, dtype=torch.bool)
            pairs = [zero if c is None else states[c] for c in captions]
            context, mask = (to_device(torch.stack(part), self.device) for part in zip(*pairs))
        return {"context": context, "context_mask": mask if self.masked else torch.ones_like(mask)}
