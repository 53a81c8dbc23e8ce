"""What is wrong with a merged folder: a sentence, or None. Speeds of wrong folders are not reported."""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

import awd_fast
from awd_fast.checkpoints import Checkpoint
from awd_fast.checks import exact_vectors, first_wrong, wrong_combination
from awd_fast.objective import SGD
from awd_fast.ops import reference
from benchmarks import folder_lora, peers
from benchmarks.folder_models import Layout, linear, shards

SCALE = 0.3  # lambda, as in folder_runs.OPTIONS
BLOCK = 1 << 20  # elements that are compared at once
CLOSE = 1e-3  # of what is added: the sums of a tensor in parts may round differently
LOSS = {4: 0.02, 2: 0.1}  # of how far the loss falls, by bytes of an element: d is read off the rounded output

Read = Callable[[str], tuple[Tensor, list[Tensor]]]
"""A tensor of the base, and those of the models."""


def from_folders(base: Path, models: Sequence[Path]) -> Read:
    """From model folders."""
    sources = [Checkpoint(base), *map(Checkpoint, models)]

    def read(name: str) -> tuple[Tensor, list[Tensor]]:
        first, *others = (source.read(name) for source in sources)
        return first, others

    return read


def from_adapters(base: Path, adapters: Sequence[Path]) -> Read:
    """From a base and adapters: both in float32, so that nothing is lost."""
    source, added = Checkpoint(base), [folder_lora.factors(adapter) for adapter in adapters]

    def read(name: str) -> tuple[Tensor, list[Tensor]]:
        weight = source.read(name).float()  # of an embedding there is one copy, which no adapter changes
        return weight, [folder_lora.changed(name, weight, *factors) for factors in added]

    return read


def wrong_folder(out: Path, layout: Layout, sharded: bool = True) -> str | None:
    """Names, shapes, dtypes, finite numbers, and where it is asked for the base's files."""
    found = Checkpoint(out)
    expected = layout.shapes()
    if set(found.tensors) != set(expected):
        return f"{len(set(found.tensors) ^ set(expected))} tensors are missing or unknown"
    files = {file.name: set(names) for file, names in found.files.items()}
    if sharded and files != {file: set(names) for file, names in shards(layout).items()}:
        return f"the files are {sorted(files)}, or hold other tensors than those of the base"
    for name, info in found.tensors.items():
        if info.shape != expected[name] or info.dtype != getattr(torch, layout.dtype):
            return f"{name} is {info}; expected {layout.dtype} {list(expected[name])}"
        if not all(bool(part.isfinite().all()) for part in found.read(name).flatten().split(BLOCK)):
            return f"{name} is not finite"
    return None


def wrong_sums(out: Path, read: Read, names: Sequence[str]) -> str | None:
    """Task arithmetic, base + SCALE * sum of the task vectors, against float64, within rounding to the stored dtype."""
    found = Checkpoint(out)
    for name in names:
        base, models = read(name)
        parts = zip(rows(found.read(name)), rows(base), zip(*map(rows, models), strict=True), strict=True)
        weights = torch.full((1, len(models)), SCALE, dtype=torch.float64)
        wrong = first_wrong([wrong_combination(merged, b, m, weights, "tensor") for merged, b, m in parts])
        if wrong is not None:
            return f"{name}: {wrong}"
    return None


def rows(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor in parts of whole rows, so that float64 copies stay small."""
    each = max(1, BLOCK // max(1, math.prod(tensor.shape[1:])))
    return iter(tensor.split(each))


def wrong_awd(out: Path, read: Read, layout: Layout) -> str | None:
    """Every tensor against awd_fast.merge of that tensor in memory, the loss of two against the reference's, and what
    is not disentangled against task arithmetic."""
    found, chosen = Checkpoint(out), list(linear(layout))
    compared = {f"model.layers.{layer}.self_attn.k_proj.weight" for layer in (0, layout.layers - 1)}
    for name in chosen:
        base, models = read(name)
        wrong = wrong_merge(found.read(name), base, models)
        if wrong is None and name in compared:
            wrong = wrong_loss(found.read(name), base, models)
        if wrong is not None:
            return f"{name}: {wrong}"
    return wrong_sums(out, read, [name for name in layout.shapes() if name not in chosen])


def wrong_merge(found: Tensor, base: Tensor, models: Sequence[Tensor]) -> str | None:
    """A tensor against its merge in memory, relative to what the merge adds and to the rounding of what is stored."""
    name = "model.layers.0.self_attn.k_proj.weight"
    options = awd_fast.ROWS | {"scale": SCALE}
    exact = awd_fast.merge({name: base}, [{name: model} for model in models], **options)[name].float()
    gap = float((found.float() - exact).norm())
    added = float((exact - base.float()).norm())
    bound = CLOSE * added + torch.finfo(found.dtype).eps * float(exact.norm())
    return None if gap <= bound else f"{gap:.3g} from the merge in memory, which adds {added:.3g}; allowed {bound:.3g}"


def wrong_loss(found: Tensor, base: Tensor, models: Sequence[Tensor]) -> str | None:
    """The loss at the d that a merged tensor [R, D] was made with, against that where the reference ends.

    Rounding decides how a descent crosses the kinks of |cos|, so that d itself cannot be compared.
    """
    t = exact_vectors(base, models, "row")
    d = (t.sum(dim=1) - (found.double() - base.double()) / SCALE) / len(models)
    here = float(peers.batched_loss(t, d))
    start, end = reference.descend(reference.gram(base, models, "row"), peers.OBJECTIVE, SGD())[1][[0, -1]].tolist()
    if abs(here - end) <= LOSS[found.element_size()] * (start - end):
        return None
    return f"the loss is {here:.4g}; the reference goes from {start:.4g} to {end:.4g}"
