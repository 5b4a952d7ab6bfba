"""ldm-prepare: turns raw files of any kind into shards with an index."""

import inspect
import sys

from hydra.utils import get_class, get_object, instantiate
from omegaconf import DictConfig

from ldm_train.cli.common import quoted, run_command
from ldm_train.data.prepare.build import build
from ldm_train.rules import check, engine, number, optional, whole

RULES = {
    "engine": optional(engine),
    "per_shard": whole(1),
    "workers": optional(whole(1)),
    "source.val_fraction": optional(number(0, 0.99)),
    **dict.fromkeys(("source.max_size", "source.count", "source.val_count"), optional(whole(1))),
}
INDEX_ONLY = "ldm_train.data.prepare.index.write_tar_index"


def _needs_path(source: DictConfig) -> bool:
    """Returns True if a source needs `path`, i.e. has no default for it; sources that can download have one."""
    parameter = inspect.signature(get_object(source._target_)).parameters["path"]
    return parameter.default is inspect.Parameter.empty


def prepare(config: DictConfig) -> None:
    check(config, RULES)
    if config.out is None:
        raise ValueError("out=<folder> is required: where the shards go, a folder or an s3://, gs:// or hf:// address")
    if config.path is None and "path" in config.source and config.source.path is None and _needs_path(config.source):
        raise ValueError("path=<folder, table or archive> is required: where the raw files are")
    if config.source._target_ == INDEX_ONLY:
        index = instantiate(config.source, out=config.out, _convert_="all")
    else:
        get_class(config.source._target_)  # so that a typo is not reported as bad data
        index = build(
            instantiate(config.source, _convert_="all"), config.out, config.per_shard, config.workers, config.engine
        )
    counts = ", ".join(f"{part['count']} {split}" for split, part in index["splits"].items())
    classes = f", {len(index['classes'])} classes" if "classes" in index else ""
    held = {c for part in index["splits"].values() for shard in part["shards"] for c in shard.get("channels", [])}
    channels = f" data.channels={held.pop()}" if len(held) == 1 else ""
    print(
        f"{config.out}: {counts} images{classes}. Train on them with: python train.py experiment=<recipe> "
        f"data.root={config.out}{channels}"
    )


def main() -> None:
    sys.argv[1:] = [quoted(argument, ("path", "out")) for argument in sys.argv[1:]]
    run_command(prepare, "prepare")


if __name__ == "__main__":
    main()
