"""The streaming reader: reads shards front to back, local or remote, and resumes exactly by skipping samples."""

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from ldm_train.data.files import DataError
from ldm_train.data.offsets import ShardFile
from ldm_train.data.remote import is_remote
from ldm_train.data.samples import SampleDecoder, collate, note_unreadable, sample_rng
from ldm_train.data.shards import shard_paths
from ldm_train.data.tars import StreamedTar


class StreamingBatches(IterableDataset):
    """The `micro_batches` of one rank, read as a stream.

    Each epoch permutes the shards by (seed, epoch) before they are split by rank and worker, then shuffles their
    samples through a buffer. Every worker delivers the same number of batches per epoch on every rank, so ranks never
    wait for each other; a worker that runs out of shards starts over with them. A resumed run skips the samples already
    consumed, without decoding them.

    Raises DataError if there are fewer shards than ranks x workers, too few images for one batch per worker, or a local
    shard is truncated; and, while streaming, if a shard does not match its index entry.
    """

    def __init__(
        self,
        root: str,
        shards: list[dict],  # entries of index.json, whose `file` may be an address (https://, s3://, ...)
        decoder: SampleDecoder,
        batching: Any,
        seed: int,
        micro_batches: range,  # numbered from the start of training
        shuffle_buffer: int,
        workers: int,
    ):
        shards = [s for s in shards if s["count"]]
        readers = batching.world_size * workers
        if len(shards) < readers:
            raise DataError(
                f"{len(shards)} shards cannot feed {batching.world_size} ranks x {workers} workers; lower num_workers, "
                "prepare more shards (ldm-prepare per_shard=...) or use data.reader=indexed"
            )
        self.shards, self.counts = shards, [s["count"] for s in shards]
        # Local shards are checked before training; their paths are absolute so that none can be taken for an address.
        local = [s for s in shards if not is_remote(s["file"])]
        paths = {s["file"]: path for s, path in zip(local, shard_paths(root, local))}
        for shard in local:
            ShardFile(shard, root, None).check_size()
        self.urls = [str(paths[s["file"]].absolute()) if s["file"] in paths else s["file"] for s in shards]
        self.decoder, self.batching, self.seed = decoder, batching, seed
        self.start, self.stop = micro_batches.start, micro_batches.stop
        self.shuffle_buffer, self.workers = shuffle_buffer, workers
        # A multiple of accumulate x workers, so that every epoch begins at the same worker and at an optimiser step.
        whole = sum(self.counts) // batching.batch_size * batching.accumulate
        self.batches_per_epoch = whole // (batching.accumulate * workers) * (batching.accumulate * workers)
        if self.batches_per_epoch == 0:
            raise DataError(
                f"{sum(self.counts)} images do not fill one batch_size {batching.batch_size} for each of {workers} "
                "workers; lower batch_size or num_workers, or use data.reader=indexed"
            )

    def __len__(self) -> int:
        return self.stop

    def _raw(self, mine: list[int]) -> Iterator[dict[str, Any]]:
        """The raw samples of the shards `mine`, in order, with their key ("__key__") and shard ("__url__")."""
        for i in mine:
            entry, tar = self.shards[i], StreamedTar(self.urls[i], self.shards[i]["bytes"])
            for key, fields in tar:
                yield fields | {"__key__": key, "__url__": tar.file}
            for what in ("bytes", "sha256", "count", "fields"):
                if (actual := tar.entry[what]) != entry[what]:
                    raise DataError(
                        f"{tar.file} does not match its index.json: {what} {actual}, there {entry[what]}; copy or prepare it "
                        "again, or rebuild the index with: ldm-prepare source=index"
                    )

    def _shuffled(self, epoch: int, worker: int) -> Iterator[dict[str, Any]]:
        """Endless raw samples of one worker in one epoch: round after round over its shards, each round shuffled
        through a buffer that is empty at first."""
        b = self.batching
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.urls)).tolist()
        mine = order[b.rank * self.workers + worker :: b.world_size * self.workers]
        rng = np.random.default_rng([self.seed, epoch, b.rank, worker])
        buffer: list[dict[str, Any]] = []

        def drawn() -> dict[str, Any]:
            i = int(rng.integers(len(buffer)))
            buffer[i], buffer[-1] = buffer[-1], buffer[i]
            return buffer.pop()

        while True:
            for sample in self._raw(mine):
                buffer.append(sample)
                if len(buffer) >= self.shuffle_buffer:
                    yield drawn()
            while buffer:
                yield drawn()

    def _decoded(self, raw: Iterator[dict[str, Any]], epoch: int, positions: Iterable[int]) -> Iterator[dict[str, Any]]:
        """A sample for each position: the next one, or the next readable one instead. The substitute is not consumed
        but comes again in its own turn, so that skipping raw samples after a resume leads to the same position."""
        ahead: deque[dict[str, Any]] = deque()  # samples from this position on that were already read
        for position in positions:
            replaced: list[str] = []
            while True:
                if len(ahead) == len(replaced):
                    ahead.append(next(raw))
                sample = ahead[len(replaced)]
                fields = {k: v for k, v in sample.items() if not k.startswith("__")}
                rng = sample_rng(self.seed, epoch, position * self.batching.world_size + self.batching.rank)
                try:
                    decoded = self.decoder(sample["__key__"].rpartition("/")[2], fields, rng)
                    break
                except Exception as error:  # on damaged data decoders raise errors of any type
                    note_unreadable(replaced, f"{sample['__url__']}:{sample['__key__']}", error)
            ahead.popleft()
            yield decoded | ({"replaced": replaced} if replaced else {})

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        own, micro = info.id if info else 0, self.batching.micro
        # The loader always asks worker 0 first; after a resume batch `start` must come from it.
        turn = (self.start + own) % self.workers
        position = self.start + own
        while position < self.stop:
            epoch, within = divmod(position, self.batches_per_epoch)
            raw = self._shuffled(epoch, turn)
            for _ in range(within // self.workers * micro):
                next(raw)
            mine = range(position, min(self.stop, (epoch + 1) * self.batches_per_epoch), self.workers)
            samples = self._decoded(raw, epoch, (batch * micro + k for batch in mine for k in range(micro)))
            for _ in mine:
                yield collate(list(islice(samples, micro)), self.decoder.known)
            position = mine[-1] + self.workers
