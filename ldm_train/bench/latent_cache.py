"""The latent cache benchmark: encoding against diffusers' encoder, writing, and reading back."""

from itertools import count
from pathlib import Path

import torch

from ldm_train.bench.data import SIZES, Place, consumed, place
from ldm_train.bench.measuring import Clock, Settings, Table, check_agreement, peak_of
from ldm_train.bench.peers import diffusers_autoencoder
from ldm_train.bench.sizes import AUTOENCODERS
from ldm_train.models.first_stage import FirstStage


@torch.no_grad()
def encoding(there: Place, first: FirstStage) -> Table:
    """Measures encoding a batch of pictures to moments, in float32 as the latents stage does."""
    device = there.settings.device
    theirs = diffusers_autoencoder(first.autoencoder, AUTOENCODERS[there.name].network).eval().to(device)
    images = next(iter(there.data().train_loader(0)))["image"].to(device)
    moments = theirs.encode(images).latent_dist.parameters
    check_agreement("our encoder and diffusers'", first.encode_moments(images), moments, 1e-2)
    clock = Clock(device, there.settings.runs).run(
        {
            "ours": lambda: first.encode_moments(images),
            "diffusers, as shipped": lambda: theirs.encode(images).latent_dist.parameters,
        },
        f"encoding {there.name}",
    )
    what = f"{there.name}: encoding {there.side} px, float32, batch {there.batch}"
    return Table("latent_cache", what, clock.rows(there.batch, peak_of(there.settings.machine)[0]))


def storing(there: Place, first: FirstStage) -> Table:
    """Measures the whole cache: pictures are loaded, encoded and written; then the cache is read in training order."""
    there.cache(first)
    number = count()

    def written() -> None:
        there.cache(first, Path(there.folder) / f"again{next(number)}")

    clock = Clock(there.settings.device, there.settings.runs, observe=False, waiting=True).run(
        {
            "loaded, encoded and written": written,
            "read back": lambda: consumed(lambda: there.cached().train_loader(0)),
            "the pictures read instead": lambda: consumed(lambda: there.data().train_loader(0)),
        },
        f"cache {there.name}",
    )
    rows = clock.rows(there.images)
    for row in rows:
        row.against = None  # different work
    held = sum(path.stat().st_size for path in there.latents.glob("train-*.tar")) / there.images
    what = f"{there.name}: {there.images} pictures, {there.settings.workers} workers, {held / 1024:.1f} KiB each in the cache"
    return Table("latent_cache", what, rows)


def latent_cache(settings: Settings) -> list[Table]:
    """Measures encoding, writing and reading at each size of pictures."""
    tables = []
    for name in settings.chosen(AUTOENCODERS, **SIZES):
        with place(settings, name) as there:
            first = there.first_stage()
            tables += [encoding(there, first), storing(there, first)]
    return tables
