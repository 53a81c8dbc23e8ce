"""Finding and opening checkpoints: local paths first, Hub names by huggingface_hub, and what a lone file means."""

import sys
import types

import pytest
import torch
from safetensors.torch import save_file

from awd_fast import InputError
from awd_fast.checkpoints import Checkpoint, resolve
from tests.conftest import write_checkpoint


def fake_hub(monkeypatch, download) -> None:
    module = types.ModuleType("huggingface_hub")
    module.snapshot_download = download
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)


def test_a_hub_name_is_downloaded_with_its_revision_and_without_pickles(tmp_path, monkeypatch, base_state):
    folder, calls = write_checkpoint(tmp_path / "snapshot", base_state), []

    def download(name, revision, allow_patterns):
        calls.append((name, revision, allow_patterns))
        return str(folder)

    fake_hub(monkeypatch, download)
    assert set(Checkpoint("owner/model.v2@refs/pr/3").tensors) == set(base_state)
    assert resolve("owner/model") == folder
    assert [call[:2] for call in calls] == [("owner/model.v2", "refs/pr/3"), ("owner/model", None)]
    assert "*.safetensors" in calls[0][2]
    assert not any("bin" in pattern or pattern == "*" for pattern in calls[0][2])


def test_a_local_folder_comes_before_a_hub_name(tmp_path, monkeypatch, base_state):
    def download(*args, **kwargs):
        raise AssertionError("the Hub was asked")

    fake_hub(monkeypatch, download)
    write_checkpoint(tmp_path / "owner" / "model", base_state)
    monkeypatch.chdir(tmp_path)
    assert set(Checkpoint("owner/model").tensors) == set(base_state)


@pytest.mark.parametrize("path", ["nowhere", "/no/such/folder", "./owner/model", "a/b/c"])
def test_what_cannot_be_a_hub_name_is_not_asked_for(monkeypatch, path):
    def download(*args, **kwargs):
        raise AssertionError("the Hub was asked")

    fake_hub(monkeypatch, download)
    with pytest.raises(InputError, match=f"there is no file or folder {path}"):
        resolve(path)


def test_a_hub_that_fails_and_a_hub_that_is_not_installed_are_named(monkeypatch):
    def download(*args, **kwargs):
        raise ConnectionError("no route")

    fake_hub(monkeypatch, download)
    with pytest.raises(InputError, match=r"there is no file or folder owner/model, and the Hub gave: .*no route"):
        resolve("owner/model")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r"pip install 'awd-fast\[hub\]'"):
        resolve("owner/model")


def test_a_lone_file_brings_its_config_only_under_the_usual_name(tmp_path, base_state):
    folder = write_checkpoint(tmp_path / "model", base_state)
    assert Checkpoint(folder / "model.safetensors").folder == folder
    save_file(base_state, folder / "other.safetensors")
    assert Checkpoint(folder / "other.safetensors").folder is None


def test_only_headers_are_read_on_opening(tmp_path, base_state):
    checkpoint = Checkpoint(write_checkpoint(tmp_path / "model", base_state))
    for name, tensor in base_state.items():
        assert checkpoint.tensors[name].shape == tuple(tensor.shape)
        assert checkpoint.tensors[name].dtype == tensor.dtype
        assert torch.equal(checkpoint.read(name), tensor)
