"""Three adapters of a small base, merges of them, and what these should be."""

from pathlib import Path

import torch

import awd_fast
from tests.adapter_folders import PREFIX, embedding, linear, random, write_adapter_folder
from tests.conftest import write_checkpoint

EMBED, Q, V, C, O = (  # noqa: E741
    "model.embed_tokens.weight",
    "model.layers.0.q_proj.weight",
    "model.layers.0.v_proj.weight",
    "model.layers.0.c_attn.weight",
    "model.layers.0.o_proj.weight",
)
HEAD, HEAD_BIAS, NORM = "classifier.weight", "classifier.bias", "model.norm.weight"
SHAPES = {EMBED: (11, 6), Q: (8, 6), V: (5, 6), C: (6, 9), O: (6, 8), HEAD: (3, 6), HEAD_BIAS: (3,), NORM: (6,)}
SGD = awd_fast.SGD(lr=0.05, iterations=30)
ALL = {"exclude": ("*bias", "*norm*")}
EVERYTHING = {"include": "*", "exclude": ()}
CASES = {
    "rows": {"optimizer": SGD, "similarity": "squared", **ALL},
    "rows converge": {"optimizer": "converge", "similarity": "squared", "scale": 0.7, **ALL},
    "rows adam": {"optimizer": awd_fast.Adam(lr=1e-3, iterations=20), "similarity": "squared", **ALL},
    "rows l1": {"optimizer": SGD, "penalty": "l1", "similarity": "squared", "include": "*q_proj*"},
    "columns": {"optimizer": SGD, "groups": "column", "similarity": "squared", **ALL},
    "tensors": {"optimizer": SGD, "groups": "tensor", "similarity": "squared", **ALL},
    "tensors converge": {"optimizer": "converge", "groups": "tensor", "similarity": "squared", "penalty": "none"} | ALL,
    "global": {"optimizer": SGD, "groups": "global", "similarity": "squared", "alpha": 0.1} | EVERYTHING,
    "default exclusion": {"optimizer": SGD, "similarity": "squared"},
    "others base": {"optimizer": SGD, "similarity": "squared", "others": "base"},
    "negative": {"optimizer": SGD, "similarity": "squared", "weights": [1.0, -0.5, 2.0], **ALL},
    "no weight": {"optimizer": SGD, "similarity": "squared", "weights": [1.0, -1.5, 0.5], **ALL},
    "arithmetic": {"method": "task_arithmetic", "scale": 0.5, "weights": [1.0, 0.3, -0.2]},
    "average": {"method": "average", "weights": [1.0, 2.0, 0.5]},
}  # fmt: skip
SPANS = [name for name in CASES if name not in ("rows adam", "rows l1")]


def base_state(dtype=torch.float32):
    state = {name: random(*shape, seed=i + 50, dtype=dtype) for i, (name, shape) in enumerate(SHAPES.items())}
    return state | {"model.position_ids": torch.arange(4)}


def head(seed: int, dtype=torch.float32):
    return {
        HEAD: random(3, 6, seed=seed, dtype=dtype),
        HEAD_BIAS: random(3, seed=seed + 1, dtype=dtype),
    }


def folders(path: Path, base) -> tuple[Path, list[Path], list[dict[str, torch.Tensor]]]:
    """A base, three adapters, and the models that they mean in float64.

    Mixed ranks, alphas and kinds; q_proj in all, v_proj in two, the embedding in one, a head stored whole in two.
    """
    dtype = base[Q].dtype
    q, v, c, e = (name.removesuffix(".weight") for name in (Q, V, C, EMBED))
    parts = [
        linear(q, 4, 6, 8, seed=1) | linear(v, 4, 6, 5, seed=2) | linear(c, 4, 6, 9, seed=3),
        linear(q, 2, 6, 8, seed=4, dtype=torch.bfloat16) | linear(c, 2, 6, 9, seed=5) | embedding(e, 2, 11, 6, seed=6),
        linear(q, 5, 6, 8, seed=7) | linear(v, 3, 6, 5, seed=8),
    ]
    heads = [head(20, dtype), {}, head(30, dtype)]
    configs = [
        {"modules_to_save": ["classifier"]},
        {"r": 2, "lora_alpha": 3, "use_rslora": True},
        {"r": 3, "lora_alpha": 6, "rank_pattern": {"q_proj": 5}, "alpha_pattern": {"q_proj": 2},
         "modules_to_save": ["classifier"]},
    ]  # fmt: skip
    scales = [{Q: 2.0, V: 2.0, C: 2.0}, {Q: 3 / 2**0.5, C: 3 / 2**0.5, EMBED: 3 / 2**0.5}, {Q: 2 / 5, V: 2.0}]
    models, written = [], []
    for index, (factors, whole, config, scale) in enumerate(zip(parts, heads, configs, scales, strict=True)):
        factors = {name: 0.4 * tensor for name, tensor in factors.items()}
        stored = factors | {PREFIX + name: tensor for name, tensor in whole.items()}
        written.append(write_adapter_folder(path / f"adapter{index}", stored, **config))
        model = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in base.items()}
        for name, factor in scale.items():
            module = PREFIX + name.removesuffix("weight")
            kind = "lora_embedding_{}" if name == EMBED else "lora_{}.weight"
            a, b = (factors[module + kind.format(side)].double() for side in "AB")
            product = factor * (b @ a)
            model[name] = model[name] + (product.T if name in (EMBED, C) else product)
        models.append(model | {name: tensor.double() for name, tensor in whole.items()})
    return write_checkpoint(path / "base", base, shards=2), written, models


def wanted(base, models, **options):
    wide = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in base.items()}
    return awd_fast.merge(wide, models, **options)


def require_close(found, expected, dtype=torch.float32):
    """One rounding to the dtype, and sums of at most 16 products in float32 whose terms are below 16."""
    for name, tensor in expected.items():
        if not tensor.is_floating_point():
            assert torch.equal(found[name], tensor)
            continue
        assert found[name].dtype == dtype
        error = (found[name].double() - tensor).abs()
        bound = torch.finfo(dtype).eps / 2 * tensor.abs() + 16 * torch.finfo(torch.float32).eps * 16
        assert (error <= bound).all(), (name, error.max())
