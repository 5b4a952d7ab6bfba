"""Adapters of a sampling job: `adapters=[subject,style:0.5]`, each a run's name, a folder or a file, with an optional
strength."""

from collections.abc import Sequence

from ldm_train.checkpoints.adapters import CONTROL, adapter_sha256, find_adapter, read_adapter, read_word
from ldm_train.checkpoints.control import take_control
from ldm_train.conditioning.control import NAME as CONDITIONER
from ldm_train.conditioning.learned_tokens import add_tokens, reader_of, settle
from ldm_train.latent_diffusion import LatentDiffusion
from ldm_train.models import lora

STRONGEST = 2.0


def with_strength(entry: str) -> tuple[str, float]:
    """Splits name:0.5 into name and strength, which is 1 if not given. Raises ValueError if the strength is 0 or
    larger than STRONGEST in magnitude."""
    name, colon, text = entry.rpartition(":")
    try:
        strength = float(text) if colon else 1.0
    except ValueError:  # the colon is part of the path
        name, strength, colon = entry, 1.0, ""
    name = name if colon else entry
    if strength == 0:
        raise ValueError(f"adapters: {entry} has no effect; leave {name} out")
    if not abs(strength) <= STRONGEST:
        raise ValueError(
            f"adapters: {entry} is far stronger than anything that was trained; 1 is as trained, {STRONGEST:g} the most, and "
            "a negative one leads away from it"
        )
    return name, strength


def take_adapters(model: LatentDiffusion, entries: Sequence[str], runs_dir: str) -> list[str]:
    """Applies adapters to a model. Returns "sha256:strength" of each, for the recipe. Raises FileNotFoundError or
    ValueError, naming the adapter, if one does not exist, is damaged or belongs to another architecture."""
    recorded, weights = dict[str, str](), False
    found = [(entry, *with_strength(entry)) for entry in entries]
    paths = {entry: find_adapter(name, runs_dir) for entry, name, _ in found}
    # Controls first: each copies the encoder before other adapters change it.
    for entry, name, strength in sorted(found, key=lambda one: not (paths[one[0]] / CONTROL).is_file()):
        path = paths[entry]
        digest = adapter_sha256(path)
        if (word := read_word(path)) is not None:
            token, rows = word
            if strength != 1:
                raise ValueError(
                    f"adapters: {entry} is a word that was learned, which has no strength; leave :{strength:g} out"
                )
            reader = reader_of(model.conditioners)
            try:
                add_tokens(reader, token, rows)
            except ValueError as error:
                raise ValueError(f"adapters: {name}: {error}") from error
            settle(reader)
            print(f"  adapter {name}: prompts may say {token}", flush=True)
            recorded[entry] = f"{digest}:1"
            continue
        if (path / CONTROL).is_file():
            take_control(path, model, strength)
            field = model.conditioners[CONDITIONER].field
            print(f"  adapter {name}: steered by {field}", flush=True)
            recorded[entry] = f"{digest}:{strength:g}"
            continue
        weights = True
        pairs, left = read_adapter(path, model)
        for what in left:
            print(f"  adapter {name}: {what} left out, the text encoder of this model stays as it is", flush=True)
        lora.attach(model.adaptable(), pairs, digest)
        lora.set_strength(model.adaptable(), digest, strength)
        recorded[entry] = f"{digest}:{strength:g}"
    if weights:
        model.merge_adapters()
    return [recorded[entry] for entry in entries]
