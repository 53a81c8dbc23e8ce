"""The operators as cases to measure: synthetic parameters, counted bytes, runs and checks; and `awd-fast bench`.

A check looks at one tensor of each shape, or at the first groups of each where the reference takes long.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from awd_fast import measure, ops, statistics, streaming
from awd_fast.checks import (
    beyond,
    exact_vectors,
    first_wrong,
    gentle,
    wrong_combination,
    wrong_end,
    wrong_gram,
    wrong_losses,
    wrong_multi_dot,
    wrong_shift,
)
from awd_fast.errors import InputError
from awd_fast.measure import Case, Result
from awd_fast.objective import SGD, Adam, Converge, Groups, Objective
from awd_fast.ops import backends, reference

OBJECTIVE = Objective(similarity="absolute", penalty="l2", alpha=1e-6)  # as the rows preset; merges default to cos^2
SQUARED = Objective(similarity="squared")  # without kinks: results can be compared number by number
DESCENTS: dict[str, SGD | Converge] = {"sgd300": SGD(iterations=300), "converge": Converge()}
SLICE = 48  # groups of a tensor in a check of what the reference takes long for


@dataclass(frozen=True)
class Parameters:
    """A model's tensors [rows, columns], and K fine-tuned versions of each; layers of as many tensors are alike."""

    bases: tuple[Tensor, ...]
    models: tuple[tuple[Tensor, ...], ...]
    layer: int

    @property
    def elements(self) -> int:
        """Of the base."""
        return sum(base.numel() for base in self.bases)

    @property
    def tasks(self) -> int:
        """K."""
        return len(self.models[0])

    @property
    def dtype(self) -> torch.dtype:
        """As stored."""
        return self.bases[0].dtype

    def pairs(self) -> list[tuple[Tensor, tuple[Tensor, ...]]]:
        """Base and models, tensor by tensor."""
        return list(zip(self.bases, self.models, strict=True))

    def part(self) -> "Parameters":
        """The first tensor of each shape."""
        first = {base.shape: index for index, base in reversed(list(enumerate(self.bases)))}
        chosen = sorted(first.values())
        return Parameters(tuple(self.bases[i] for i in chosen), tuple(self.models[i] for i in chosen), len(chosen))

    def first_layer(self) -> "Parameters":
        """The first of the layers: what is slow is timed on it and scaled up."""
        return Parameters(self.bases[: self.layer], self.models[: self.layer], self.layer)

    def few(self, groups: Groups = "row") -> "Parameters":
        """The part, with the first groups of each tensor alone."""

        def cut(tensor: Tensor) -> Tensor:
            return tensor[:, :SLICE] if groups == "column" else tensor[:SLICE]

        part = self.part()
        models = tuple(tuple(cut(model) for model in models) for models in part.models)
        return Parameters(tuple(map(cut, part.bases)), models, part.layer)

    def first_tasks(self, k: int) -> "Parameters":
        """With the first k models alone."""
        return Parameters(self.bases, tuple(models[:k] for models in self.models), self.layer)

    def to(self, dtype: torch.dtype) -> "Parameters":
        """Stored as `dtype`."""
        return Parameters(
            tuple(base.to(dtype) for base in self.bases),
            tuple(tuple(model.to(dtype) for model in models) for models in self.models),
            self.layer,
        )


def synthetic(shapes: Sequence[tuple[int, int]], layers: int, k: int, seed: int = 0, device: str = "cpu") -> Parameters:
    """`layers` times tensors of these shapes, as fine-tuning leaves them, made on `device`.

    The base is normal of size 0.04, the task vectors have 1e-4 in common and 3e-4 of their own.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(shape: tuple[int, int], size: float) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).mul_(size)

    bases, models = [], []
    for shape in [*shapes] * layers:
        base = normal(shape, 0.04)
        start = base + normal(shape, 1e-4)
        bases.append(base)
        models.append(tuple(normal(shape, 3e-4).add_(start) for _ in range(k)))
    return Parameters(tuple(bases), tuple(models), len(shapes))


# Bytes that an operation must move, for the whole of `data`: everything once, results included.


def read_bytes(data: Parameters) -> float:
    """The base and the K models."""
    return (data.tasks + 1.0) * data.elements * data.dtype.itemsize


def combine_bytes(data: Parameters) -> float:
    """The base, the K models and the result: (K + 2) elements for each of the base. A fused merge needs no more."""
    return (data.tasks + 2.0) * data.elements * data.dtype.itemsize


def adam_step_bytes(data: Parameters) -> float:
    """The base and the K models, and d and its two moments read and written in float32."""
    return read_bytes(data) + 6.0 * 4.0 * data.elements


def wrong_descent(
    gram: Tensor, found: Tensor, history: Tensor, objective: Objective, optimizer: SGD | Converge, backend: str
) -> str | None:
    """Coefficients and losses; the reference's trajectory need not be compared with itself."""
    end = wrong_end(gram, found, history, objective)
    return end if end or backend == "reference" else wrong_losses(gram, history, objective, optimizer)


# Cases: one operation on all tensors of `data`.


def gram_case(data: Parameters, backend: str, groups: Groups, peer: str = "") -> Case:
    """All Gram matrices."""

    def run() -> object:
        return [ops.gram(base, models, groups, backend=backend) for base, models in data.pairs()]

    def check() -> str | None:
        pairs = data.part().pairs()
        return first_wrong([wrong_gram(ops.gram(b, m, groups, backend=backend), b, m, groups) for b, m in pairs])

    return _case(data, f"gram {groups}", backend, run, check, read_bytes(data), peer)


def multi_dot_case(data: Parameters, backend: str, groups: Groups, peer: str = "") -> Case:
    """The products of all task vectors with gradients like the base."""
    gradients = [base.flip(0).contiguous() for base in data.bases]

    def run() -> object:
        together = zip(data.pairs(), gradients, strict=True)
        return [ops.multi_dot(base, models, g, groups, backend=backend) for (base, models), g in together]

    def check() -> str | None:
        wrong = []
        for base, models in data.part().pairs():
            found = ops.multi_dot(base, models, base.flip(0), groups, backend=backend)
            wrong.append(wrong_multi_dot(found, base, models, base.flip(0), groups))
        return first_wrong(wrong)

    return _case(data, f"multi_dot {groups}", backend, run, check, combine_bytes(data), peer)  # which writes as much


def descend_case(data: Parameters, backend: str, name: str, peer: str = "") -> Case:
    """A descent on the Gram matrices of all row groups."""
    optimizer = DESCENTS[name]
    grams = [ops.gram(base, models, "row") for base, models in data.pairs()]

    def run() -> object:
        return [ops.descend(gram, OBJECTIVE, optimizer, backend=backend) for gram in grams]

    def check() -> str | None:
        for base, models in (
            data.few() if isinstance(optimizer, Converge) or backend == "reference" else data.part()
        ).pairs():
            gram = reference.gram(base, models, "row")
            tried = gentle(optimizer, gram)
            for objective in (OBJECTIVE, SQUARED):
                found, history = ops.descend(gram, objective, tried, backend=backend)
                wrong = wrong_descent(gram, found, history, objective, tried, backend)
                if wrong is not None:
                    return f"{objective.similarity}: {wrong}"
        return None

    return _case(data, f"descend {name}", backend, run, check, 0.0, peer)


def combine_case(data: Parameters, backend: str, peer: str = "") -> Case:
    """base + sum_j w_rj t_j with weights for every row, in the models' dtype."""
    generator = torch.Generator().manual_seed(1)
    weights = [0.3 * torch.rand(len(base), data.tasks, generator=generator).double() for base in data.bases]

    def run() -> object:
        together = zip(data.pairs(), weights, strict=True)
        return [ops.combine(base, models, w, "row", backend=backend) for (base, models), w in together]

    def check() -> str | None:
        wrong = []
        for base, models in data.part().pairs():
            w = 0.3 * torch.rand(len(base), data.tasks, generator=generator).double()
            found = ops.combine(base, models, w, "row", backend=backend)
            wrong.append(wrong_combination(found, base, models, w, "row"))
        return first_wrong(wrong)

    return _case(data, "combine", backend, run, check, combine_bytes(data), peer)


Merge = Callable[..., Sequence[Tensor]]
"""The signature of `ops.merge_rows` without `dtype`; gives merged, gram, coefficients and history."""


def merge_rows(*arguments: Any, backend: str) -> Sequence[Tensor]:
    """The operator that does it in one pass."""
    return ops.merge_rows(*arguments, backend=backend)


def three_calls(
    base: Tensor,
    models: Sequence[Tensor],
    weights: Tensor,
    objective: Objective,
    optimizer: SGD | Converge,
    groups: Groups,
    backend: str,
) -> Sequence[Tensor]:
    """The same by the operators that read the data once each."""
    gram = ops.gram(base, models, groups, backend=backend)
    found, history = ops.descend(gram, objective, optimizer, backend=backend)
    plain = statistics.merge_weights(weights, found)
    return ops.combine(base, models, plain, groups, backend=backend), gram, found, history


def merge_case(
    data: Parameters, backend: str, name: str, groups: Groups, peer: str = "", merge: Merge = merge_rows
) -> Case:
    """The whole merge of every tensor."""
    optimizer = DESCENTS[name]
    weights = torch.full((data.tasks,), 0.3, dtype=torch.float64)

    def run() -> object:
        pairs = data.pairs()
        return [merge(base, models, weights, OBJECTIVE, optimizer, groups, backend=backend) for base, models in pairs]

    def check() -> str | None:
        slow = isinstance(optimizer, Converge) or data.tasks > 8 or backend == "reference"
        for base, models in (data.few(groups) if slow else data.part()).pairs():
            exact = reference.gram(base, models, groups)
            tried = gentle(optimizer, exact)
            for objective in (OBJECTIVE, SQUARED):
                merged, gram, found, history = merge(base, models, weights, objective, tried, groups, backend=backend)
                plain = statistics.merge_weights(weights, found)
                wrong = first_wrong(
                    [
                        wrong_gram(gram, base, models, groups),
                        wrong_descent(exact, found, history, objective, tried, backend),
                        wrong_combination(merged, base, models, plain, groups),
                    ]
                )
                if wrong is not None:
                    return f"{objective.similarity}: {wrong}"
        return None

    called = backend if merge is merge_rows else f"{backend}, three calls"
    return _case(data, f"merge_rows {groups} {name}", called, run, check, combine_bytes(data), peer)


def adam_rows_case(data: Parameters, backend: str, peer: str = "", timed: int = 300) -> Case:
    """300 iterations of Adam on the rows of every tensor, of which `timed` are timed."""
    optimizer = Adam(iterations=300)

    def run() -> object:
        short = replace(optimizer, iterations=timed)
        return [ops.adam_rows(b, m, OBJECTIVE, short, backend=backend) for b, m in data.pairs()]

    def check() -> str | None:
        tried = optimizer if backend == "native" else replace(optimizer, iterations=20)
        for base, models in data.few().pairs():
            shift, history = ops.adam_rows(base, models, SQUARED, tried, backend=backend)
            exact, losses = ops.descend_elements(exact_vectors(base, models, "row"), SQUARED, tried)
            wrong = wrong_shift(shift, exact) or beyond("the loss", history, losses, 1e-3 * losses)
            if wrong is not None:
                return wrong
        return None

    case = _case(data, "adam_rows 300", backend, run, check, combine_bytes(data), peer)
    return part_timed(case, timed, 300)


class AdamStream:
    """Adam on one group over all tensors: a pass over the data for each iteration, K numbers between two passes."""

    def __init__(self, data: Parameters, objective: Objective, backend: str) -> None:
        self.data, self.objective, self.backend = data, objective, backend
        self.gram = torch.stack([ops.gram(base, models, "tensor") for base, models in data.pairs()]).sum(dim=0)
        self.states = [[torch.zeros(base.shape) for _ in range(3)] for base in data.bases]
        self.moments = torch.zeros(data.tasks + 2, dtype=torch.float64)
        self.steps = 0

    def step(self) -> None:
        """One iteration of torch.optim.Adam's semantics."""
        self.steps += 1
        _, slope = streaming.evaluate(self.gram, self.moments, self.objective)
        parts = []
        for (base, models), (d, m, v) in zip(self.data.pairs(), self.states, strict=True):
            parts.append(ops.adam_step(base, models, d, m, v, slope, Adam(), self.steps, backend=self.backend))
        self.moments = torch.stack(parts).sum(dim=0)


def adam_step_case(data: Parameters, backend: str, peer: str = "") -> Case:
    """One iteration of Adam on one group over all tensors."""
    stream: list[AdamStream] = []

    def run() -> None:
        stream[0].step()

    def check() -> str | None:
        part = data.few()
        tried = AdamStream(part, SQUARED, backend)
        for _ in range(10):
            tried.step()
        vectors = torch.cat([exact_vectors(base, models, "tensor") for base, models in part.pairs()], dim=2)
        exact = ops.descend_elements(vectors, SQUARED, Adam(iterations=10))[0]
        shift = torch.cat([state[0].flatten() for state in tried.states]).double()
        inner, square = tried.moments[: data.tasks], tried.moments[data.tasks, None]
        stream.append(AdamStream(data, OBJECTIVE, backend))
        return first_wrong(
            [
                wrong_shift(shift, exact),
                beyond("<d, d>", square, shift.square().sum()[None], 1e-6 * square),
                beyond("<t, d>", inner, vectors[0] @ shift, 1e-6 * vectors[0].norm(dim=1) * shift.norm()),
            ]
        )

    return _case(data, "adam_step", backend, run, check, adam_step_bytes(data), peer)


def part_timed(case: Case, timed: int, iterations: int) -> Case:
    """The case of `iterations` of which its run makes `timed`."""
    if iterations == timed:
        return case
    return replace(case, repeats=iterations / timed, note=f"{timed} of {iterations} iterations timed")


def scaled_up(case: Case, layers: int) -> Case:
    """The case of one layer as that of all."""
    note = "; ".join([*filter(None, [case.note]), f"1 of {layers} layers timed"])
    return replace(case, repeats=case.repeats * layers, moved=case.moved * layers, note=note)


def operator_cases(data: Parameters, backend: str, peer: str = "") -> list[Case]:
    """Every operator in one backend. The reference is slow: one layer and few iterations are timed, and scaled up."""
    slow = backend == "reference"
    layers = len(data.bases) // data.layer
    data = data.first_layer() if slow else data
    merged: tuple[Groups, ...] = ("row",) if slow else ("row", "column")
    cases = [gram_case(data, backend, groups, peer) for groups in ("row", "column", "tensor")]
    cases += [multi_dot_case(data, backend, groups, peer) for groups in merged]
    cases += [combine_case(data, backend, peer), adam_step_case(data, backend, peer)]
    cases += [descend_case(data, backend, name, peer) for name in DESCENTS]
    cases += [merge_case(data, backend, name, groups, peer) for groups in merged for name in DESCENTS]
    cases.append(adam_rows_case(data, backend, peer, timed=3 if slow else 300))
    return [replace(scaled_up(case, layers), most_rounds=3) for case in cases] if slow else cases


def _case(
    data: Parameters,
    operation: str,
    backend: str,
    run: Callable[[], object],
    check: Callable[[], str | None],
    moved: float,
    peer: str,
) -> Case:
    return Case(
        operation=operation,
        backend=backend,
        run=run,
        check=check,
        moved=moved,
        dtype=str(data.dtype).removeprefix("torch."),
        tasks=data.tasks,
        peer=peer,
    )


def compare(
    rows: int, columns: int, tensors: int, models: int, rounds: int, say: Callable[[str], None]
) -> list[Result]:
    """Every operator in every backend on `tensors` of [rows, columns] and K models, and the memory limit.

    Raises InputError for counts below 1, or 2 models.
    """
    counts = {"rows": (rows, 1), "columns": (columns, 1), "tensors": (tensors, 1), "models": (models, 2)}
    for name, (count, least) in {**counts, "rounds": (rounds, 1)}.items():
        if count < least:
            raise InputError(f"{name} is {count}; expected {least} or more")
    data = synthetic([(rows, columns)], tensors, models)
    cases = measure.triad_cases(max(1, int(read_bytes(data)) // 12))  # three arrays as large as the models together
    ready = [name for name, reason in backends.available().items() if reason is None]
    for backend in (name for name in ready if not backends.only_by_name(name)):
        cases += operator_cases(data, backend, "" if backend == "reference" else "reference")
    return measure.measure(cases, rounds, say=say)
