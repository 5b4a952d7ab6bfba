"""ldm-prepare: raw files of any kind -> shards with an index."""

from hydra.utils import get_class, instantiate
from omegaconf import DictConfig

from ldm_train.cli.common import run_command
from ldm_train.data.prepare.build import build


def prepare(config: DictConfig) -> None:
    if config.out is None:
        raise ValueError("say where the shards shall go: out=<folder>")
    if config.source._target_ == INDEX_ONLY:
        index = instantiate(config.source, out=config.out, _convert_="all")
    else:
        get_class(config.source._target_)  # a typo here must not look like bad data
        index = build(instantiate(config.source, _convert_="all"), config.out, config.per_shard, config.workers)
    counts = ", ".join(f"{part['count']} {split}" for split, part in index["splits"].items())
    classes = f", {len(index['classes'])} classes" if "classes" in index else ""
    print(
        f"{config.out}: {counts} images{classes}. Train on them with: python train.py experiment=<recipe> data.root={config.out}"
    )


INDEX_ONLY = "ldm_train.data.prepare.index.write_tar_index"


def main() -> None:
    run_command(prepare, "prepare")


if __name__ == "__main__":
    main()
