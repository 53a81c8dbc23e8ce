"""The single operators, native against reference, on one weight of the MiniLM encoder with eight fine-tuned models.

`make bench` runs it. Each case first checks its result, so that no speed is reported on a wrong result.
"""

import pytest
import torch

from awd_fast import bench
from awd_fast.bench import Parameters
from awd_fast.measure import CannotRunError, Case
from awd_fast.ops import backends

GROUPS = ("row", "column", "tensor")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.fixture(scope="module")
def data() -> Parameters:
    """The base and eight models [1536, 384] float32."""
    return bench.synthetic([(1536, 384)], 1, 8)


@pytest.fixture(params=backends.PREFERENCE)
def backend(request: pytest.FixtureRequest) -> str:
    reason = backends.unavailable(request.param) or backends.refusal(request.param, "gram", [torch.ones(1)])
    if reason is not None:
        pytest.skip(reason)
    return str(request.param)


def checked(benchmark, case: Case) -> None:
    """Times a case that is right."""
    try:
        wrong = case.check()
    except CannotRunError as reason:
        pytest.skip(str(reason))
    assert wrong is None
    benchmark.extra_info.update(bytes=case.moved, note=case.note)
    slow = case.backend == "reference"
    benchmark.pedantic(case.run, rounds=3 if slow else 30, warmup_rounds=1)


@pytest.mark.parametrize("groups", GROUPS)
def test_gram(benchmark, data, backend, groups):
    checked(benchmark, bench.gram_case(data, backend, groups))


@pytest.mark.parametrize("groups", GROUPS)
def test_multi_dot(benchmark, data, backend, groups):
    checked(benchmark, bench.multi_dot_case(data, backend, groups))


@pytest.mark.parametrize("optimizer", bench.DESCENTS)
def test_descend(benchmark, data, backend, optimizer):
    checked(benchmark, bench.descend_case(data, backend, optimizer))


@pytest.mark.parametrize("dtype", DTYPES)
def test_combine(benchmark, data, backend, dtype):
    checked(benchmark, bench.combine_case(data.to(DTYPES[dtype]), backend))


@pytest.mark.parametrize("groups", GROUPS[:2])
@pytest.mark.parametrize("optimizer", bench.DESCENTS)
def test_merge_rows(benchmark, data, backend, optimizer, groups):
    checked(benchmark, bench.merge_case(data, backend, optimizer, groups))


def test_adam_rows(benchmark, data, backend):
    """300 iterations; 3 of the reference, which is slow."""
    checked(benchmark, bench.adam_rows_case(data, backend, timed=3 if backend == "reference" else 300))


def test_adam_step(benchmark, data, backend):
    checked(benchmark, bench.adam_step_case(data, backend))
