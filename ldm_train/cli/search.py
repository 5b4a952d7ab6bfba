"""ldm-search: finds the best values of some options, by trials."""

from ldm_train.cli.common import run_command


def main() -> None:
    run_command("ldm_train.pipeline.search.search", "search")


if __name__ == "__main__":
    main()
