"""Downloads models from the Hugging Face Hub as data files, and uploads folders to it."""

import re
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from ldm_train.errors import first_line

REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w.-]+)?")
# Files from which our models and diffusers pipelines are read: no code, and no whole pipeline in a single weights file.
DATA = ("*.json", "config.yaml", "*.txt", "model.safetensors", "diffusion_pytorch_model.safetensors", "*/*.safetensors")
OTHERS = ("*.fp16.*", "*non_ema*", "*flax*", "*openvino*")


def is_repo(path: str | Path) -> bool:
    """Returns True if a path may be a model on the Hub (org/name or org/name@revision): neither it nor its first folder
    exists here."""
    first = Path(path).parts[:1]
    return REPO.fullmatch(str(path)) is not None and not Path(path).exists() and not Path(*first).is_dir()


@cache
def downloaded(repo: str) -> Path:
    """Downloads a model from the Hub, org/name or org/name@revision, and returns its folder. Files that are already
    here are not fetched again; without a network, the newest version fetched before is used. Raises
    FileNotFoundError with a remedy."""
    from huggingface_hub import snapshot_download

    name, _, revision = repo.partition("@")
    options = {"revision": revision or None, "allow_patterns": list(DATA), "ignore_patterns": list(OTHERS)}
    try:
        return Path(snapshot_download(name, **options))
    except Exception as error:  # the library raises many types of exceptions
        with suppress(Exception):
            kept = Path(snapshot_download(name, **options, local_files_only=True))
            if any(kept.rglob("*.safetensors")):  # an interrupted download may have left configs alone
                return kept
        raise FileNotFoundError(
            f"{repo} is not a folder here, and it could not be downloaded from the Hub ({first_line(error)}); check the name and the "
            "network, or download it elsewhere and give its folder"
        ) from error


def upload(folder: Path, repo: str, private: bool, message: str) -> str:
    """Creates the repository if it does not exist, and uploads a folder. Returns its URL. Raises ConnectionError with a
    remedy."""
    from huggingface_hub import HfApi

    api: Any = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        public = private and not api.repo_info(repo).private  # one that was there keeps its visibility
        if public:
            raise ValueError("it is there and public; make it private in its settings, or leave private=true out")
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message)
    except Exception as error:  # the library raises many types of exceptions
        raise ConnectionError(
            f"{repo} could not be uploaded ({first_line(error)}); sign in with `hf auth login`, check the name and the network, then "
            "run the same command again"
        ) from error
    return f"https://huggingface.co/{repo}"
