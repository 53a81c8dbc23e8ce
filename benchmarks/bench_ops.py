"""The operators, native against reference, on one weight of the MiniLM encoder with eight fine-tuned models.

`make bench` runs it. Each case first checks its result against float64, so that no speed is reported on a wrong result.
"""

import pytest
import torch

from awd_fast import ops, statistics
from awd_fast.objective import SGD, Converge, Objective
from awd_fast.ops import backends, reference

ROWS, COLUMNS, TASKS = 1536, 384, 8
SQUARED = Objective(similarity="squared")  # without kinks, so that results can be compared number by number
OPTIMIZERS = {"sgd": SGD(iterations=300), "converge": Converge()}


@pytest.fixture(scope="module")
def models() -> list[torch.Tensor]:
    """The base and eight models [1536, 384] float32; task vectors of the size that fine-tuning gives."""
    generator = torch.Generator().manual_seed(0)
    base = 0.04 * torch.randn(ROWS, COLUMNS, generator=generator)
    common = 1e-4 * torch.randn(ROWS, COLUMNS, generator=generator)
    tuned = [base + common + 3e-4 * torch.randn(ROWS, COLUMNS, generator=generator) for _ in range(TASKS)]
    return [base, *tuned]


@pytest.fixture(params=backends.PREFERENCE)
def backend(request: pytest.FixtureRequest) -> str:
    reason = backends.unavailable(request.param)
    if reason is not None:
        pytest.skip(reason)
    return str(request.param)


def test_gram(benchmark, models, backend):
    base, *tuned = models
    found = ops.gram(base, tuned, "row", backend=backend)
    exact = statistics.gram(torch.stack([m.double() - base.double() for m in tuned], dim=1))
    # A difference is rounded to float32 once; base and models are near 0.04, task vectors near 3e-4.
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-9)
    benchmark.extra_info["bytes"] = (TASKS + 1) * base.numel() * 4
    benchmark(ops.gram, base, tuned, "row", backend=backend)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_descend(benchmark, models, backend, optimizer):
    gram = reference.gram(models[0], models[1:], "row")
    found, history = ops.descend(gram, SQUARED, OPTIMIZERS[optimizer], backend=backend)
    expected, losses = reference.descend(gram, SQUARED, OPTIMIZERS[optimizer])
    assert abs(float(history[-1] - losses[-1])) <= 1e-7 * float(losses[-1])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    benchmark.pedantic(ops.descend, (gram, SQUARED, OPTIMIZERS[optimizer]), {"backend": backend}, rounds=3)


def test_combine(benchmark, models, backend):
    base, *tuned = models
    weights = 0.3 * torch.rand(ROWS, TASKS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = ops.combine(base, tuned, weights, "row", backend=backend)
    exact = base.double() + sum(weights[:, i, None] * (m.double() - base.double()) for i, m in enumerate(tuned))
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=TASKS * 2.0**-24)
    benchmark.extra_info["bytes"] = (TASKS + 2) * base.numel() * 4
    benchmark(ops.combine, base, tuned, weights, "row", backend=backend)
