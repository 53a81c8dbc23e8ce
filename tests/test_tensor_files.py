"""Safetensors files at the level of bytes: what is written is what the library writes, whatever the order."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from awd_fast import InputError
from awd_fast.disk import OpenFiles
from awd_fast.plan import Step, TensorInfo
from awd_fast.shards import Shards
from awd_fast.tensor_files import DTYPES, TensorFile, lay_out


def every_dtype() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    state = {f"{dtype}": (torch.rand(3, 2, generator=g) * 9).to(dtype) for dtype in DTYPES.values()}
    odd = {'é\n"': torch.arange(5), "scalar": torch.tensor(1.5), "empty": torch.empty(0, 3), "Z": torch.ones(1).half()}
    return state | odd


def test_the_layout_is_that_of_the_library(tmp_path):
    state = every_dtype()
    save_file(state, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    steps = [Step(name, "base", "", TensorInfo(tuple(t.shape), t.dtype), t.dtype) for name, t in state.items()]
    shards = Shards(tmp_path, {"ours.safetensors": steps}, {"ours.safetensors": {"format": "pt"}})
    shards.make()
    assert shards.intact()
    for name, tensor in reversed(state.items()):
        half = tensor.numel() // 2
        flat = tensor.reshape(-1)
        second, first = shards.write(name, half, flat[half:]), shards.write(name, 0, flat[:half])
        assert (shards.checksum(name, 0, half), shards.checksum(name, half, tensor.numel())) == (first, second)
    shards.sync()
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
    found = load_file(tmp_path / "ours.safetensors")
    assert found.keys() == state.keys()


def test_elements_are_read_at_any_place(tmp_path):
    state = every_dtype()
    save_file(state, tmp_path / "a.safetensors", metadata={"k": "v"})
    file = TensorFile(tmp_path / "a.safetensors", OpenFiles())
    assert file.text == {"k": "v"}
    assert file.tensors == {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in state.items()}
    for name, tensor in state.items():
        for begin in range(tensor.numel() + 1):
            room = torch.empty(tensor.numel() - begin, dtype=tensor.dtype)
            file.read(name, begin, room)
            assert torch.equal(room.view(torch.uint8), tensor.reshape(-1)[begin:].view(torch.uint8))


def test_metadata_is_written_in_the_same_order_always():
    infos = {"a": TensorInfo((2,), torch.float32)}
    texts = [{"b": "1", "a": "2"}, {"a": "2", "b": "1"}]
    assert lay_out(infos, texts[0]).head == lay_out(infos, texts[1]).head


def test_a_file_that_is_replaced_after_opening_is_noticed(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(3)}, path)
    file = TensorFile(path, OpenFiles())
    file.require_unchanged()
    save_file({"a": torch.ones(3)}, tmp_path / "b.safetensors")
    (tmp_path / "b.safetensors").rename(path)
    with pytest.raises(InputError, match="was changed while it was read"):
        file.require_unchanged()
    path.unlink()
    with pytest.raises(InputError, match="can no longer be read: No such file"):
        file.require_unchanged()
