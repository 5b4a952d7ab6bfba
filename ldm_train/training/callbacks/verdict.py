"""The summary at the end of training: what limited its speed, and which option to change."""

WAITING = 0.15  # share of time spent waiting for data above which data loading is the bottleneck
BUSY = 0.35  # MFU above which arithmetic is the bottleneck; the best diffusion training runs reach about half


def verdict(stage: str, rate: float, waits: float, mfu: float | None, accelerated: bool) -> str:
    """Returns the summary as text. stage: its name. rate: images/s. waits: share of time spent waiting for data. mfu:
    of the network's own FLOPs, None if unknown. accelerated: trained on an accelerator."""
    used = "" if mfu is None else f", {mfu:.0%} of the peak in the network's own arithmetic"
    begin = f"{stage}: {rate:.3g} images/s, {waits:.0%} of the time waiting for data{used}. "
    if waits >= WAITING:
        return begin + (
            "Data loading is the bottleneck: raise num_workers, keep the shards on a local disk, or prepare them at the training size."
        )
    if mfu is None:
        return begin + "Data loading is not the bottleneck; trainer.profiler=pytorch shows what is."
    if mfu >= BUSY:
        faster = "more devices or a smaller network" if accelerated else "a GPU or a smaller network"
        return begin + f"Training is compute-bound: {faster} will speed it up, other options barely."
    if accelerated:
        return begin + (
            f"Neither data loading nor compute is the bottleneck; kernel launches or memory bandwidth are: try {stage}.compile=true and a "
            f"larger {stage}.micro_batch_size; trainer.profiler=pytorch tells the two apart."
        )
    return begin + (
        "Neither data loading nor compute is the bottleneck; memory bandwidth is, or other work on the machine: trainer.profiler=pytorch "
        "shows where the time goes. (The networks of losses are not counted as compute.)"
    )
