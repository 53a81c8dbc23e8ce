"""What a merge holds at a time: files that are open, and Gram matrices."""

import os
import weakref

import pytest
import torch

import awd_fast
from awd_fast import blocks, disk
from awd_fast.plan import StateDict, make_plan
from awd_fast.recipe import make_recipe
from awd_fast.stream import StreamMerger
from tests.conftest import tuned, write_checkpoint
from tests.test_resume import inputs  # noqa: F401


def test_many_models_of_many_shards_do_not_open_too_many_files(tmp_path, monkeypatch):
    base = {f"layer{i}.weight": torch.randn(3, 2) for i in range(30)}
    states = [base, *(tuned(base, seed) for seed in range(6))]
    paths = [write_checkpoint(tmp_path / f"m{i}", state, shards=30) for i, state in enumerate(states)]
    read, before, most = disk._read, len(os.listdir("/proc/self/fd")), 0

    def counting(*given):
        nonlocal most
        most = max(most, len(os.listdir("/proc/self/fd")) - before)
        return read(*given)

    monkeypatch.setattr(disk, "_read", counting)
    awd_fast.merge_checkpoints(paths[0], paths[1:], tmp_path / "out")
    assert 0 < most < 90


@pytest.mark.parametrize("memory", [1.0, 1e-5], ids=["whole", "by blocks"])
def test_gram_matrices_of_a_tensors_blocks_are_not_kept(tmp_path, inputs, monkeypatch, memory):  # noqa: F811
    alive: list[weakref.ref] = []
    most = 0

    gram = StreamMerger._gram
    monkeypatch.setattr(StreamMerger, "_gram", lambda self, block, tensors: keep(gram(self, block, tensors)))

    def keep(found):
        nonlocal most
        alive.append(weakref.ref(found))
        most = max(most, sum(each() is not None for each in alive))
        return found

    awd_fast.merge_checkpoints(*inputs, tmp_path / "out", groups="column", memory=memory)
    assert len(alive) > 10
    assert most <= 3


def test_gram_matrices_of_narrow_rows_fit_the_memory(monkeypatch):
    base = {"narrow.weight": torch.randn(1 << 15, 1)}
    models = [tuned(base, seed) for seed in range(32)]
    options = awd_fast.ROWS | {"optimizer": awd_fast.SGD(iterations=5)}
    whole = awd_fast.merge(base, models, **options)
    recipe = make_recipe(32, memory=0.05, **options)
    sources = [StateDict(str(index), state) for index, state in enumerate((base, *models))]
    merger = StreamMerger(sources[0], sources[1:], recipe)
    plan = make_plan(sources[0], sources[1:], recipe)
    monkeypatch.setattr(blocks, "NUMBERS", 1 << 20)
    jobs = list(merger._jobs(blocks.cut(plan, recipe)))
    assert len(jobs) == 128
    assert all(1 << 10 < job.cost / (8 * 32**2) < 1 << 11 for job in jobs)
    assert torch.equal(awd_fast.merge(base, models, **options)["narrow.weight"], whole["narrow.weight"])


@pytest.mark.parametrize("most", [1 << 30, 1 << 25], ids=["new", "old"])
def test_an_old_glibc_is_asked_for_what_it_takes(monkeypatch, most):
    taken = {}

    class Library:
        def mallopt(self, option, value):
            if option != -3 or value <= most:
                taken[option] = value
                return 1
            return 0

    monkeypatch.setattr(disk.ctypes, "CDLL", lambda name: Library())
    disk.keep_freed_memory()
    assert taken == {-3: most, -1: 1 << 30}
