"""What a merge holds at a time: files that are open, and Gram matrices."""

import os
import weakref

import pytest
import torch

import awd_fast
from awd_fast import disk
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
