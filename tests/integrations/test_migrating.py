"""docs/migrating.md: the lines before and after run as they stand, each with the library that it is about."""

from pathlib import Path

import peft
import pytest
import torch
from fusion_bench.method import TaskArithmeticAlgorithm
from torch import nn

import awd_fast
from awd_fast.integrations.fusion_bench import AWDAlgorithm
from awd_fast.integrations.peft import add_weighted_adapter
from tests.conftest import tiny_state, tuned
from tests.documents import blocks, commands, run_python
from tests.integrations.families import make, tensors
from tests.integrations.fusion_cases import nets, pool_of
from tests.test_cli import run

PAGE = "migrating.md"


def test_mergekit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = make(tmp_path / "models", "llama", torch.float32, False)
    text = blocks(PAGE, "yaml")[0]
    for name, path in zip(("base", "one", "two"), (family.base, *family.models[:2]), strict=True):
        text = text.replace(f"/models/{name}", str(path))
    (tmp_path / "CONFIG.yml").write_text(text)
    monkeypatch.chdir(tmp_path)
    inside, alone = (line for line in commands(PAGE) if line.startswith("awd-fast m"))
    found = []
    for command in (inside, alone, f"{inside} --accelerate"):
        out = tmp_path / f"out{len(found)}"
        code, _, error = run(*command.replace("OUT", str(out)).split()[1:])
        assert code == 0, error
        found.append(tensors(out))
    for other in found[1:]:
        assert all(torch.equal(other[name], tensor) for name, tensor in found[0].items())


def test_peft() -> None:
    network = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    lora = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    model = peft.get_peft_model(network, lora, adapter_name="news")
    model.add_adapter("films", lora)
    before, after = blocks(PAGE, "python")[0].splitlines()
    x = torch.randn(3, 8)
    outputs = []
    for line in (before, after):
        exec(line, {"model": model, "add_weighted_adapter": add_weighted_adapter})
        model.set_adapter("both")
        outputs.append(model(x))
        model.delete_adapter("both")
    assert not torch.equal(outputs[0], outputs[1])


def test_state_dicts_and_modules() -> None:
    base = {name: tensor for name, tensor in tiny_state().items() if tensor.is_floating_point()}
    models = [tuned(base, seed) for seed in range(2)]
    modules = list(nets().values())
    names = {"base": base, "models": models, "merged": dict(base), "awd_fast": awd_fast}
    names |= {"base_module": modules[0], "modules": modules[1:]}
    lines = blocks(PAGE, "python")[1].split("\n\n")
    exec(lines[0], names)
    by_hand = dict(names["merged"])
    plain = awd_fast.merge(base, models, method="task_arithmetic", scale=0.3)
    assert all(torch.allclose(by_hand[name], plain[name], atol=1e-6) for name in plain)
    run_python(PAGE, names, slice(1, 2))
    assert isinstance(names["merged"], nn.Module)


def test_fusion_bench() -> None:
    names = {"pool": pool_of(nets()), "TaskArithmeticAlgorithm": TaskArithmeticAlgorithm, "AWDAlgorithm": AWDAlgorithm}
    run_python(PAGE, names, slice(2, 3))
    assert isinstance(names["merged"], nn.Module)
