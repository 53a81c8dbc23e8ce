"""What docs/mergekit.md shows runs, and what it says of mergekit itself is so."""

from pathlib import Path

import pytest
import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import TensorWriterTask
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

import awd_fast
from tests.documents import blocks, run_python
from tests.integrations.families import SHAPE, WEIGHTS, Family, make, same, tensors, written
from tests.test_cli import run


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Family:
    family = make(tmp_path_factory.mktemp("llama"), "llama", torch.float32, False)
    words = {f"w{index}": index for index in range(SHAPE["vocab_size"] - 1)} | {"<unk>": SHAPE["vocab_size"] - 1}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<unk>")), unk_token="<unk>"
    )
    for folder in (family.base, *family.models):
        tokenizer.save_pretrained(folder)
    return family


def shown(family: Family) -> dict:
    """The page's configuration, of models that there are."""
    text = blocks("mergekit.md", "yaml")[0]
    for name, path in zip(("base", "one", "two"), (family.base, *family.models[:2]), strict=True):
        text = text.replace(f"/models/{name}", str(path))
    config: dict = yaml.safe_load(text)
    return config


def test_the_configuration(tmp_path: Path, llama: Family) -> None:
    config = written(tmp_path, shown(llama))
    code, out, error = run("mergekit", config, tmp_path / "out", "--quiet", "--out-shard-size", "20K")
    assert (code, out, error) == (0, "", "")
    merged = tensors(tmp_path / "out")
    name = "model.layers.1.mlp.up_proj.weight"
    assert merged[name].dtype == torch.bfloat16
    awd_fast.merge_checkpoints(
        str(llama.base), llama.paths[:2], str(tmp_path / "ours"), scale=0.6, dtype="bfloat16", weights=(1.0, 1.0)
    )
    assert torch.equal(merged[name], tensors(tmp_path / "ours")[name])
    assert (tmp_path / "out" / "README.md").exists()
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_the_program(tmp_path: Path, llama: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base, one, two = (tensors(folder) for folder in (llama.base, *llama.models[:2]))
    names = {"config": llama.config(), "base": base, "one": one, "two": two}
    run_python("mergekit.md", names, slice(1))
    same(names["merged"], awd_fast.merge(base, [one, two], groups="column", weights=(1.0, 0.5)))
    awd_fast.merge_checkpoints(str(llama.base), llama.paths, "ours", weights=WEIGHTS)
    same(tensors(tmp_path / "OUT"), tensors(tmp_path / "ours"))


def test_tokenizers(tmp_path: Path, llama: Family) -> None:
    """With one vocabulary for all, that tokenizers are looked at changes nothing."""
    config = MergeConfiguration.model_validate(llama.config(tokenizer={"source": "union"}))
    run_merge(config, str(tmp_path / "out"), MergeOptions(quiet=True, write_model_card=False))
    awd_fast.merge_checkpoints(str(llama.base), llama.paths, str(tmp_path / "ours"), weights=WEIGHTS)
    same(tensors(tmp_path / "out"), tensors(tmp_path / "ours"))


def test_pitfalls(tmp_path: Path, llama: Family) -> None:
    """Those that the other tests do not hold; of mergekit 0.1.5, the pinned version."""
    bert = make(tmp_path / "bert", "bert", torch.float32, False)
    config = bert.config("linear")
    del config["base_model"]
    with pytest.raises(TypeError, match=r"can only concatenate list \(not \"tuple\"\) to list"):
        run_merge(MergeConfiguration.model_validate(config), str(tmp_path / "out"), MergeOptions(quiet=True))
    task = TensorWriterTask(out_path="OUT", max_shard_size=1, use_async=True, max_write_threads=4)
    assert task.write_threads == 1
    options = MergeOptions(quiet=True, write_model_card=False, copy_tokenizer=False, out_shard_size=20_000)
    run_merge(MergeConfiguration.model_validate(llama.config()), str(tmp_path / "shards"), options)
    assert all(file.stat().st_size < 25_000 for file in (tmp_path / "shards").glob("*.safetensors"))
