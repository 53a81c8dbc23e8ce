"""The cases of `benchmarks.fuzz`: a spoilt input of some kind, what the package makes of it, and what is right.

Each function of `KINDS` runs one case and gives its outcome in a word or two; a `Violation` of
`benchmarks.fuzz_checks` says what is wrong.
"""

import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from random import Random
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

import awd_fast
from awd_fast import sidefiles
from awd_fast.adapters import Adapter, BoundAdapter
from awd_fast.checkpoints import Checkpoint
from awd_fast.config import PARAMETERS, Config, load_config
from awd_fast.plan import TensorInfo
from awd_fast.recipe import make_recipe
from benchmarks import fuzz_files
from benchmarks.fuzz_checks import attempt, load, require, same
from benchmarks.fuzz_files import ADAPTER_CONFIG, CONFIG, Good, State
from benchmarks.fuzz_mutations import garble, garble_yaml, spoil, text, tree

REFUSED = "refused"
_NOT_TAKEN = ("is not supported", "holds no tensors", "characters", "dimension", "as fields", "levels deep")
"""Words of sentences that refuse what safetensors itself can read."""


def case_safetensors(good: Good, random: Random) -> str:
    role = random.choice(("base", "m0", "m1"))
    file = good.folder / role / "model.safetensors"
    with good.spoil(file, fuzz_files.safetensors(good.states[role], random)):
        expected = load(file)
        opened, words = attempt(lambda: Checkpoint(file), role)
        if opened is None:
            ours = expected is None or any(reason in str(words) for reason in _NOT_TAKEN)
            require(ours, f"safetensors reads it, but: {words}")
            return REFUSED if expected is None else "refused, read by safetensors"
        require_equal(opened, expected)
        if random.random() < 0.25:
            return merged(good, random, {role: expected})
        return "opened"


def require_equal(opened: Checkpoint, expected: State | None) -> None:
    """A checkpoint that opens holds what safetensors finds in it."""
    require(expected is not None, "opened, though safetensors does not read it")
    assert expected is not None
    require(set(opened.tensors) == set(expected), f"tensors {sorted(opened.tensors)} of {sorted(expected)}")
    for name, tensor in expected.items():
        require(same(opened.read(name), tensor), f"tensor {name!r} was read wrong")


def merged(good: Good, random: Random, states: dict[str, State | None], places: dict[str, Path] | None = None) -> str:
    """Merges base, m0 and m1, of which some are other `states`, from folders and from memory."""
    options: dict[str, Any] = {
        "method": random.choice(("task_arithmetic", "average", "awd")),
        "weights": [1.0, random.choice((1.0, 0.5, -0.25))],
        "missing": random.choice(("error", "base", "base")),
        "dtype": random.choice((None, None, None, "float32", "bfloat16", "float16", "float64")),
        "scale": random.choice((0.3, 1.0)),
    }
    if options["method"] == "awd":
        options |= {"iterations": 2, "groups": random.choice(("row", "column", "tensor", "global"))}
    return compare(good, random, options, states, places or {})


def compare(
    good: Good, random: Random, options: dict[str, Any], states: dict[str, State | None], places: dict[str, Path]
) -> str:
    base, *models = (states.get(role) or good.states[role] for role in ("base", "m0", "m1"))
    folders = [places.get(role, good.folder / role) for role in ("base", "m0", "m1")]
    out = good.folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    expected, refused = attempt(lambda: in_memory(base, models, options))
    _, words = attempt(lambda: awd_fast.merge_checkpoints(folders[0], folders[1:], out, **options))
    left = [path.name for path in good.folder.iterdir() if path.name.startswith(".out")]
    require(not left, f"left behind: {left}")
    if words is not None:
        require(not out.exists(), "an output beside an error")
        require(refused is not None, f"the state dicts merge, but: {words}")
        return "opened, merge refused"
    require(refused is None, f"the folders merge, but of the state dicts: {refused}")
    found: State = {}
    for file in out.glob("*.safetensors"):
        found |= load_file(file)
    require(set(found) == set(expected), f"merged tensors {sorted(found)} of {sorted(expected)}")
    for name, tensor in expected.items():
        require(same(found[name], tensor), f"merged tensor {name!r} differs from that of the state dicts")
        if options["method"] == "task_arithmetic":
            require_arithmetic(name, tensor, base, models, options)
    return "merged"


def in_memory(base: State, models: list[State], options: dict[str, Any]) -> State:
    """The merge of the state dicts; their function takes the options of an optimiser as an object."""
    recipe = make_recipe(len(models), **options)
    named = {"method", "scale", "weights", "include", "exclude", "others", "missing", "dtype", "backend"}
    direct = {name: getattr(recipe, name) for name in named}
    objective = {
        field.name: getattr(recipe.options.objective, field.name) for field in fields(recipe.options.objective)
    }
    optimizer, groups = recipe.options.optimizer, recipe.options.groups
    return awd_fast.merge(base, models, optimizer=optimizer, groups=groups, **direct, **objective)


def require_arithmetic(
    name: str, found: torch.Tensor, base: State, models: list[State], options: dict[str, Any], size: Any = 0.0
) -> None:
    """theta_0 + scale * sum_i w_i (theta_i - theta_0), in float64. size: of terms that cancel in the models."""
    inputs = [base[name], *(model[name] for model in models if name in model)]
    if len(inputs) <= len(models) or not all(t.is_floating_point() for t in inputs) or not found.numel():
        return
    start, *tuned = (t.double() for t in inputs)
    factors = [options["scale"] * weight for weight in options["weights"]]
    exact = start + sum(f * (t - start) for f, t in zip(factors, tuned, strict=True))
    size = size + start.abs() + sum(abs(f) * (t.abs() + start.abs()) for f, t in zip(factors, tuned, strict=True))
    kinds = [torch.finfo(t.dtype) for t in (*inputs, found)]
    within = size < min(min(kind.max for kind in kinds), torch.finfo(torch.float32).max) / 4
    eps = max(torch.finfo(found.dtype).eps, torch.finfo(torch.float32).eps)
    tiny = max(torch.finfo(found.dtype).smallest_normal, torch.finfo(torch.float32).smallest_normal)
    wrong = ((found.double() - exact).abs() > 4 * eps * size + tiny) & within
    require(not wrong.any(), f"merged tensor {name!r} is not what the formula gives")


def spoilt_json(value: Any, random: Random) -> bytes:
    """A JSON file that is spoilt, now and then in its bytes."""
    document = [tree(value)]
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        spoil(document if random.random() < 0.05 or not document else document[0], random)
        if not document:
            break
    written = ",".join(text(part, random) for part in document).encode("utf-8", "surrogatepass")
    return garble(written, random) if random.random() < 0.15 else written


def case_index(good: Good, random: Random) -> str:
    file = good.folder / "sharded" / "model.safetensors.index.json"
    with good.spoil(file, spoilt_json(good.index, random)):
        opened, _ = attempt(lambda: Checkpoint(file.parent), "sharded")
        if opened is None:
            return REFUSED
        expected: State = {}
        for name, shard in json.loads(file.read_bytes())["weight_map"].items():
            expected[name] = load_file(file.parent / shard)[name]
        require_equal(opened, expected)
        if random.random() < 0.15:
            role = random.choice(("base", "m0"))
            return merged(good, random, {role: expected}, {role: file.parent})
        return "opened"


def case_config(good: Good, random: Random) -> str:
    role, dtype = random.choice(("base", "base", "m0")), random.choice(("float32", "bfloat16", None))
    file, out, whole = good.folder / role / "config.json", good.folder / "copied", random.random() < 0.1

    def copy() -> None:
        source = Checkpoint(good.folder / role)
        sidefiles.require_unquantised(source)
        config = sidefiles.read_config(source)
        config = None if config is None or dtype is None else sidefiles.with_dtype(config, dtype)
        out.mkdir()
        sidefiles.copy_side_files(source, out, config)

    def merge() -> None:
        models = [good.folder / name for name in ("m0", "m1")]
        awd_fast.merge_checkpoints(good.folder / "base", models, out, dtype=dtype, method="average")

    with good.spoil(file, spoilt_json(CONFIG, random)):
        shutil.rmtree(out, ignore_errors=True)
        if attempt(merge if whole else copy, role)[1] is not None:
            return REFUSED
        if role != "base" and whole:
            return "merged"
        given, found = file.read_bytes(), (out / "config.json").read_bytes()
        if dtype is None:
            require(found == given, "config.json is not a copy")
        else:
            require(repr(json.loads(found)) == repr(with_dtype(json.loads(given), dtype)), "config.json differs")
        return "merged" if whole else "copied"


def with_dtype(config: Any, dtype: str) -> Any:
    """What `awd_fast.sidefiles.with_dtype` should give."""
    if not isinstance(config, dict):
        return config
    return {
        key: dtype if key in ("torch_dtype", "dtype") and isinstance(value, str) else with_dtype(value, dtype)
        for key, value in config.items()
    }


VALUES = (
    *(0, 1, -1, 0.5, 3, 1e-8, 1e8, 1e300, "1e-3", True, None, [], [0.9, 0.99], [1, 2, 3], "x", {"a": 1}, 10**400),
    *(
        "sgd",
        "adam",
        "converge",
        "paper",
        "rows",
        "row",
        "column",
        "tensor",
        "global",
        "squared",
        "absolute",
        "l1",
        "l2",
    ),
    *("none", "native", "reference", "cuda", "*", "h.*", ["*q*", "norm*"], "", "base", "task_arithmetic", "error"),
)


def case_yaml(good: Good, random: Random) -> str:
    choice = random.random()
    if choice < 0.25:
        parameters = {random.choice(PARAMETERS): random.choice(VALUES) for _ in range(random.choice((1, 1, 3)))}
        recipe = {"merge_method": random.choice(("awd", "average", "task_arithmetic")), "parameters": parameters}
        written = json.dumps(good.recipe | recipe).encode()
    elif choice < 0.6:
        written = spoilt_json(good.recipe, random)
    else:
        document = yaml.safe_dump(good.recipe, sort_keys=False)
        for _ in range(random.choice((1, 1, 2))):
            document = garble_yaml(document, random)
        written = document.encode("utf-8", "surrogatepass")
        written = garble(written, random) if random.random() < 0.15 else written
    file = good.folder / "merge.yml"
    with good.spoil(file, written):
        config, _ = attempt(lambda: load_config(file), file.name)
        if config is None:
            return REFUSED
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
        require(config.base == data["base_model"], "another base")
        named = [each if isinstance(each, str) else each["model"] for each in data["models"]]
        require([name for name in named if name in config.models] == list(config.models), "other models")
        require(config.options["method"] == data.get("merge_method", "awd"), "another method")
        most = max(config.options.get(key) or 0 for key in ("iterations", "max_iterations"))
        return "loaded" if random.random() < 0.7 or most > 1000 else _merge_config(good, config)


def _merge_config(good: Good, config: Config) -> str:
    out = good.folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    _, words = attempt(lambda: awd_fast.merge_checkpoints(config.base, config.models, out, **config.options))
    if words is not None:
        require(not out.exists(), "an output beside an error")
        return "loaded, merge refused"
    found = [load(Path(name) / "model.safetensors" if Path(name).is_dir() else Path(name)) for name in config.models]
    states = [state for state in found if state is not None]
    if len(states) < len(found) or config.base != str(good.folder / "base"):
        return "merged"
    expected, words = attempt(lambda: in_memory(good.states["base"], states, config.options))
    require(words is None, f"the folders merge, but of the state dicts: {words}")
    written = load_file(out / "model.safetensors")
    require(all(same(written[name], tensor) for name, tensor in expected.items()), "a merge of other numbers")
    return "merged"


PATTERNS = (
    *("(a+)+$", "(.*a){20}", "(x+x+)+y", "(.*)*", "((h|h.)+)+z", ".*" * 12 + "z", "(a?){40}a{40}", "h.0.q", ".*", "("),
    *(
        r"h\.(0|1)\.q",
        "(?i)H.0.Q",
        r"(?P<n>h)(?P=n)",
        "(?<=h).*",
        "[",
        "x{999999999999}",
        "\\",
        "(?R)",
        "q|v",
        "|" * 40,
    ),
    *(
        "(h|h|h)" * 20,
        "(.|.)" * 30 + "!",
        r"\w*\w*\w*\w*\w*\w*!",
        "",
        "\x00",
        "(" * 150 + ")" * 150,
        "(h*?)*?z",
        "((.*)?)*z",
    ),
)


def case_adapter_config(good: Good, random: Random) -> str:
    file = good.folder / "adapter" / "adapter_config.json"
    given = dict(ADAPTER_CONFIG)
    if random.random() < 0.3:
        kind = random.choice(("rank_pattern", "alpha_pattern"))
        given[kind] = {random.choice(PATTERNS): random.choice((2, 2, 3, 10**400)) for _ in range(2)} | given[kind]
    written = json.dumps(given).encode() if random.random() < 0.4 else spoilt_json(given, random)
    with good.spoil(file, written):
        return adapted(good, good.states["adapter"], random)


def case_adapter_weights(good: Good, random: Random) -> str:
    file = good.folder / "adapter" / "adapter_model.safetensors"
    with good.spoil(file, fuzz_files.safetensors(good.states["adapter"], random)):
        return adapted(good, load(file), random)


def adapted(good: Good, expected: State | None, random: Random) -> str:
    """Opens the adapter, binds it to a base, and multiplies its factors."""
    folder = good.folder / "adapter"
    opened, _ = attempt(lambda: Adapter(folder), "adapter")
    if opened is None:
        return REFUSED
    base = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in good.states["base"].items()}
    bound, _ = attempt(lambda: opened.bind(base, "the base"), "adapter")
    if bound is None:
        return "opened, not bound"
    require(expected is not None, "opened, though safetensors does not read it")
    assert expected is not None
    config = json.loads((folder / "adapter_config.json").read_bytes())
    refused = False
    for name, placement in bound.placements.items():
        module = placement.module
        factors, words = attempt(lambda name=name: bound.factors(name), "adapter")
        if factors is None:
            a, b = expected[module.a].float(), expected[module.b].float()
            require(not (a.isfinite().all() and b.isfinite().all()), f"finite, but: {words}")
            refused = True
            continue
        a, b = expected[module.a].double(), expected[module.b].double()
        delta = scale(config, module.name) * (b @ a)
        ours = factors.scale * (factors.left.double() @ factors.right.double())
        fits = ours if not placement.transposed else ours.T
        require(fits.shape == delta.shape and torch.allclose(fits, delta), f"the task vector of {name!r} is wrong")
    for name in bound.tensors:
        tensor, words = attempt(lambda name=name: bound.read(name), "adapter")
        whole = expected[opened.full[bound.full[name]]]
        require(tensor is None or same(tensor, whole), f"tensor {name!r} was read wrong")
        refused = refused or tensor is None
    if random.random() < 0.25:
        return _merge_adapter(good, bound, expected, config)
    return "bound, not finite" if refused else "bound"


def _merge_adapter(good: Good, bound: BoundAdapter, expected: State, config: dict[str, Any]) -> str:
    """Merges the adapter into its base, by task arithmetic, which float64 checks."""
    options = {"method": "task_arithmetic", "scale": 0.5, "weights": [1.0]}
    out = good.folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    folders = [good.folder / "adapter"]
    _, words = attempt(lambda: awd_fast.merge_checkpoints(good.folder / "base", folders, out, **options))
    if words is not None:
        require(not out.exists(), "an output beside an error")
        return "bound, merge refused"
    found, model, sizes = load_file(out / "model.safetensors"), dict(good.states["base"]), {}
    for name, placement in bound.placements.items():
        a, b = (expected[each].double() for each in (placement.module.a, placement.module.b))
        factor = scale(config, placement.module.name)
        delta, size = factor * (b @ a), abs(factor) * (b.abs() @ a.abs())
        model[name] = model[name].double() + (delta.T if placement.transposed else delta)
        sizes[name] = size.T if placement.transposed else size
    model |= {name: expected[bound.adapter.full[own]] for name, own in bound.full.items()}
    require(set(found) == set(good.states["base"]), "other tensors")
    for name, tensor in found.items():
        require_arithmetic(name, tensor, good.states["base"], [model], options, sizes.get(name, 0.0))
    return "merged"


def scale(config: dict[str, Any], module: str) -> float:
    """alpha / r, as PEFT finds them."""

    def value(kind: str, default: Any) -> Any:
        for pattern, number in (config.get(kind) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return number
        return default

    rank, alpha = value("rank_pattern", config["r"]), value("alpha_pattern", config["lora_alpha"])
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


KINDS: dict[str, tuple[Callable[[Good, Random], str], float]] = {
    "safetensors": (case_safetensors, 0.45),
    "index": (case_index, 0.12),
    "config.json": (case_config, 0.08),
    "YAML": (case_yaml, 0.13),
    "adapter_config.json": (case_adapter_config, 0.1),
    "adapter weights": (case_adapter_weights, 0.12),
}
"""Each kind of case with its share."""
