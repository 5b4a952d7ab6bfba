"""The verdict says, from a training's own figures, what limited its speed and which option to change."""

import pytest

from ldm_train.training.callbacks.verdict import verdict


@pytest.mark.parametrize(
    ("waits", "mfu", "accelerated", "said"),
    [
        (0.4, 0.5, True, "Data loading is the bottleneck: raise num_workers"),
        (0.02, 0.5, True, "Training is compute-bound: more devices"),
        (0.02, 0.5, False, "Training is compute-bound: a GPU"),
        (0.02, 0.1, True, "diffusion.compile=true and a larger diffusion.micro_batch_size"),
        (0.02, 0.1, False, "memory bandwidth is, or other work on the machine"),
        (0.02, None, True, "trainer.profiler=pytorch shows what is"),
    ],
)
def test_the_verdict_names_the_limit_and_the_option(
    waits: float, mfu: float | None, accelerated: bool, said: str
) -> None:
    text = verdict("diffusion", 123.0, waits, mfu, accelerated)
    assert said in text
    assert text.startswith(f"diffusion: 123 images/s, {waits:.0%} of the time waiting for data")
