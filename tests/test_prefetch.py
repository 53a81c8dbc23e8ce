"""Jobs: in order to the caller, beside each other for the workers, within the memory, and ended by what they raise."""

import threading
import time

import pytest
import torch

from awd_fast.plan import StateDict
from awd_fast.prefetch import Job, Read, carry_out


class OnDisk(StateDict):
    """As if its tensors were read."""

    def in_memory(self, name):
        return False

    def elements(self, name, begin, end, room):
        room.copy_(super().elements(name, begin, end, None))
        return room


DISK = OnDisk("d", {"a": torch.arange(1000.0)})


def read(begin: int, count: int = 10, dtype: torch.dtype = torch.float32) -> Read:
    return Read(DISK, "a", begin, begin + count, (count,), dtype)


@pytest.fixture(params=[1, 2, 7])
def threads(request):
    torch.set_num_threads(request.param)  # put back by the fixture of all tests
    return request.param


def test_results_come_in_the_order_of_the_jobs(threads):
    def job(index: int) -> Job:
        def run(tensors):
            time.sleep(0.002 * (index % 3))
            return tensors[0].sum().item(), torch.is_grad_enabled()

        return Job([read(index)], run)

    found = [result for _, result in carry_out(map(job, range(30)), 1 << 20)]
    assert found == [(float(sum(range(index, index + 10))), False) for index in range(30)]
    assert torch.get_num_threads() == threads


def test_a_fresh_job_begins_when_all_before_are_done(threads):
    done = []

    def job(index: int) -> Job:
        def run(tensors):
            if index % 5 == 0:
                assert done == list(range(index))
            time.sleep(0.001)
            return index

        return Job([read(index)], run, then=done.append, fresh=index % 5 == 0)

    assert len(list(carry_out(map(job, range(20)), 1 << 20))) == 20
    assert done == list(range(20))


def test_no_more_is_under_way_than_the_memory_holds(threads):
    lock, now, most = threading.Lock(), 0, 0

    def job(index: int) -> Job:
        def run(tensors):
            return index

        return Job([read(index, 100, torch.float64)], run, beside=1000)

    cost = job(0).cost
    assert cost == 512 + 800 + 1000

    def counted():
        nonlocal now, most
        for index in range(20):
            with lock:
                now, most = now + 1, max(most, now + 1)
            yield job(index)

    for _ in carry_out(counted(), 2 * cost + 1):
        with lock:
            now -= 1
    assert most <= 4  # two under way, the one that is handed over, and the one that waits to begin
    assert [result for _, result in carry_out(map(job, range(5)), 1)] == list(range(5))


@pytest.mark.parametrize("where", ["reading", "run", "then"])
def test_what_is_raised_anywhere_ends_it(threads, where):
    def run(tensors):
        if where == "run":
            raise ValueError("no")

    def then(result):
        if where == "then":
            raise ValueError("no")

    bad = Read(DISK, "a", 0, 2000, (2000,), torch.float32) if where == "reading" else read(0)
    jobs = [*(Job([read(index)], lambda tensors: None) for index in range(3)), Job([bad], run, then=then)]
    before = threading.active_count()
    with pytest.raises((ValueError, RuntimeError)):
        list(carry_out([*jobs, *jobs], 1 << 20))
    assert threading.active_count() == before
    assert torch.get_num_threads() == threads


def test_memory_is_used_again_only_when_a_job_is_done(threads):
    def job(index: int) -> Job:
        def run(tensors):
            before = tensors[0].clone()
            time.sleep(0.003)
            assert torch.equal(tensors[0], before)
            return before

        return Job([read(index), read(index + 500)], run)

    for index, (_, result) in enumerate(carry_out(map(job, range(40)), 1 << 20)):
        assert torch.equal(result, torch.arange(float(index), float(index + 10)))


def test_a_job_that_takes_long_ends_with_the_others(threads):
    def endless(tensors):
        while True:
            pass

    jobs = carry_out([Job([read(0)], lambda tensors: 1), *[Job([read(0)], endless)] * 3], 1 << 20)
    before = threading.active_count()
    assert next(jobs)[1] == 1
    jobs.close()
    assert threading.active_count() == before


def test_a_generator_that_is_closed_leaves_no_threads(threads):
    before = threading.active_count()
    jobs = carry_out((Job([read(index)], lambda tensors: tensors) for index in range(50)), 1 << 20)
    next(jobs)
    jobs.close()
    assert threading.active_count() == before
    assert torch.get_num_threads() == threads
