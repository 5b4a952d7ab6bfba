"""The conditioners of a run: their options, completed from the data or from the model that the run starts from."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from tokenizers import Tokenizer

from ldm_train.checkpoints.parts import build
from ldm_train.conditioning.text import read_tokenizer, train_tokenizer
from ldm_train.configuration import plain
from ldm_train.data.datamodule import ShardDataModule
from ldm_train.pipeline.begin import tokenizers_of
from ldm_train.pipeline.data import CONDITIONERS, FROM_DATA
from ldm_train.pipeline.run import Index, Run

READ = 100_000  # samples whose captions a tokenizer is trained on


def conditioner_tree(config: DictConfig, data: ShardDataModule | Index, rehearsal: bool = False) -> dict[str, Any]:
    """The conditioners' config, completed with the values that come from the data, as the model folder stores it.
    rehearsal: trains the tokenizer on no captions, so that the data are not read. Raises ValueError if the data name no
    classes, or for invalid tokenizer options."""
    tree = plain(config.diffusion.conditioning.conditioners)
    for name, conditioner in tree.items():
        for option in ("classes", "labels"):
            if conditioner.get(option) != FROM_DATA:
                continue
            if not data.index.get("classes"):
                raise ValueError(
                    f"{data.root}/index.json names no classes for {CONDITIONERS}.{name}; set its "
                    f"{option}=<number>, or choose diffusion/conditioning=none"
                )
            conditioner[option] = data.index["classes"]
        size, source = conditioner.get("vocab_size", 0), conditioner.get("tokenizer", "")
        if type(size) is not int or not isinstance(source, str):
            raise ValueError(f"{CONDITIONERS}.{name}: tokenizer is {FROM_DATA} or a file, vocab_size a whole number")
        if "tokenizer" in conditioner:
            conditioner.pop("vocab_size", None)  # the tokenizer has its own
            if source == FROM_DATA:
                captions = [] if rehearsal else data.some(data.train_split, READ, evenly=False).captions()
                tokenizer = train_tokenizer(captions, size)
            else:
                tokenizer = read_tokenizer(source)
            conditioner["tokenizer"] = tokenizer.to_str()
    return tree


def with_whole_vocabularies(tree: dict[str, Any], config: DictConfig) -> dict[str, Any]:
    """A rehearsal's conditioners with tokenizers filled up to vocab_size, the most that captions can fill."""
    for name, options in plain(config.diffusion.conditioning.conditioners).items():
        if options.get("tokenizer") == FROM_DATA:
            tokenizer = Tokenizer.from_str(tree[name]["tokenizer"])
            tokenizer.add_tokens([f"<{i}>" for i in range(options["vocab_size"] - tokenizer.get_vocab_size())])
            tree[name]["tokenizer"] = tokenizer  # as an object: its JSON is long
    return tree


def conditioners_of(run: Run, begun: Path | None) -> dict[str, Any]:
    """The conditioners of a run, without trained weights but with the tokenizers of the model in `begun`, if any."""
    tree = conditioner_tree(run.config, run.index("diffusion"), rehearsal=True)
    return build(tree if begun is None else tokenizers_of(begun, tree), CONDITIONERS, run.trust)
