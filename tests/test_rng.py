"""Random numbers: seeds are pure functions of their parts, each image has its own stream, only rng.py seeds
globally."""

import ast
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from ldm_train import rng
from ldm_train.rng import NoiseSource, slerp

PACKAGE = Path(rng.__file__).parent


def test_seeds_are_a_pure_function_of_their_parts_in_any_process() -> None:
    parts = (7, "autoencoder", 3, 0)
    code = f"from ldm_train.rng import derive_seed; print(derive_seed(*{parts!r}))"
    elsewhere = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    assert int(elsewhere.stdout) == rng.derive_seed(*parts)


def test_seeds_differ_with_every_part_and_fit_63_bits() -> None:
    names = [n for s in range(20) for n in ((s,), (s, 0), (0, s), (s, "a"), ("a", s), (s, 1, 1))]
    seeds = {rng.derive_seed(*parts) for parts in names}
    assert len(seeds) == 6 * 20 - 1  # (0, 0) occurs twice
    assert all(0 <= s < 2**63 for s in seeds)
    assert rng.derive_seed(1, 23) != rng.derive_seed(12, 3)


def test_reseeding_covers_every_generator_training_may_draw_from() -> None:
    def draw() -> list[float]:
        return [torch.rand(()).item(), np.random.rand(), random.random()]  # noqa: NPY002

    rng.reseed(1, "diffusion", 5)
    first = draw()
    assert draw() != first
    rng.reseed(1, "diffusion", 5)
    assert draw() == first
    rng.reseed(1, "diffusion", 6)
    assert not set(draw()) & set(first)


def test_generators_leave_the_global_stream_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    rng.NoiseSource([1, 2]).normal((2, 4), "start")
    torch.rand(2, generator=rng.generator(5))
    assert torch.equal(torch.rand(3), expected)


def test_an_image_has_the_same_noise_in_any_batch() -> None:
    together = rng.NoiseSource([5, 9, 2, 7]).normal((3, 4, 4), 11)
    assert torch.equal(together[2:3], rng.NoiseSource([2]).normal((3, 4, 4), 11))
    assert together.dtype == torch.float32
    assert together.shape == (4, 3, 4, 4)


def test_draws_differ_between_steps_and_seeds_and_are_standard_normal() -> None:
    source = rng.NoiseSource([0, 1])
    draws = torch.cat([source.normal((100, 100), step) for step in ("start", "posterior", 0, 1)]).flatten(1)
    torch.testing.assert_close(torch.corrcoef(draws), torch.eye(8), rtol=0, atol=0.05)
    torch.testing.assert_close(draws.mean(dim=1), torch.zeros(8), rtol=0, atol=0.04)
    torch.testing.assert_close(draws.std(dim=1), torch.ones(8), rtol=0, atol=0.03)


def test_global_seeding_stands_in_one_place() -> None:
    """No torch.manual_seed, np.random.seed, random.seed or seed_everything outside rng.py."""
    seeding = {"torch.manual_seed", "np.random.seed", "numpy.random.seed", "random.seed", "torch.cuda.manual_seed_all"}
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                if name in seeding or name.endswith("seed_everything"):
                    found.append(f"{path.relative_to(PACKAGE)}: {name}")
    assert {entry.split(":")[0] for entry in found} == {"rng.py"}, found


def test_a_scope_has_streams_of_its_own() -> None:
    source = NoiseSource([1, 2])
    plain, own, other = (s.normal((3,), 0) for s in (source, source.scoped("a"), source.scoped("b")))
    assert not torch.equal(plain, own)
    assert not torch.equal(own, other)
    assert torch.equal(own, NoiseSource([1, 2], ["a"]).normal((3,), 0))


def test_slerp_walks_on_the_sphere() -> None:
    a, b = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8)
    a, b = (x / x.flatten(1).norm(dim=1).view(-1, 1, 1, 1) for x in (a, b))
    t = torch.tensor([0.0, 0.25, 0.5, 1.0])
    made = slerp(a, b, t)
    torch.testing.assert_close(made.flatten(1).norm(dim=1), torch.ones(4))
    torch.testing.assert_close(made[0], a[0])
    torch.testing.assert_close(made[3], b[3])
    angle = torch.acos((a * b).flatten(1).sum(1))
    torch.testing.assert_close(torch.acos((a * made).flatten(1).sum(1))[1:], (t * angle)[1:], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(slerp(a, a, t), a)
