"""The compiled CUDA operators: allocates results, hands addresses to `awd_fast._C`, says what it will not take.

Calls return before the GPU has finished: nothing here waits for it, so that a call can be captured in a CUDA graph.
Launches go to PyTorch's present stream; what a call allocates for its own use is PyTorch's memory of that stream.
Everything is a list of parameters underneath: an operator on one tensor is that on a model of one.
"""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from awd_fast import statistics
from awd_fast.objective import SGD, Adam, Converge, Groups, Objective
from awd_fast.ops import native, reference
from awd_fast.ops.histories import joined_ways

DEVICE = "cuda"
MOST_MODELS = 120
"""More are refused; the kernels' arguments hold 128 addresses for each parameter."""
MOST_TENSORS = MOST_MODELS + 5
"""Of a call: the base, the models, and up to four more."""

Parameter = tuple[Tensor | None, Sequence[Tensor]]
RowsArguments = tuple[Tensor, Objective, SGD | Converge, Groups, torch.dtype]


def unavailable() -> str | None:
    """Why the CUDA operators cannot run here, or None."""
    reason = native.unavailable()
    if reason is not None:
        return reason
    if torch.version.hip is not None:
        return f"torch {torch.__version__} is built for ROCm"
    reason = _module().cuda_why_not()
    if reason:
        return reason
    return None if torch.cuda.is_available() else f"torch {torch.__version__} sees no CUDA device"


@functools.cache
def _unfit(index: int) -> str:
    """Why this GPU cannot run the binaries, or an empty string."""
    with torch.cuda.device(index):
        return str(_module().cuda_why_not_on(index))


def refusal(operator: str, tensors: list[Tensor]) -> str | None:
    """Why `operator` does not take these tensors, or None."""
    for tensor in tensors:
        if type(tensor) not in (Tensor, torch.nn.Parameter):
            return f"it takes plain tensors, not {type(tensor).__name__}"
        if tensor.device.type != DEVICE:
            return f"it takes tensors on a CUDA device, not on {tensor.device}"
        if tensor.layout != torch.strided:
            return f"it takes dense tensors, not {tensor.layout}"
        if tensor.dtype not in native.CODES:
            return f"it does not take {tensor.dtype}"
        if tensor.data_ptr() % tensor.element_size():
            return f"a tensor of {tensor.dtype} lies at an address that is no multiple of {tensor.element_size()} bytes"
    if len(tensors) > MOST_TENSORS or (operator == "descend" and tensors[0].shape[1] > MOST_MODELS):
        return f"it takes at most {MOST_MODELS} models"
    if tensors and tensors[0].device.type == "cuda":
        reason = _unfit(tensors[0].device.index)
        if reason:
            return (
                f"cuda:{tensors[0].device.index} ({torch.cuda.get_device_name(tensors[0].device)}) has none of {reason}"
            )
    return None


def machine() -> list[str]:
    """How the operators were built, one line each."""
    info = native.build_info()
    return [f"CUDA operators: toolkit {info['cuda']}, {', '.join(f'sm_{arch}' for arch in info['cuda_archs'])}"]  # type: ignore[attr-defined]


def gram(base: Tensor | None, models: Sequence[Tensor], groups: Groups) -> Tensor:
    """G [R, K, K] float64."""
    return gram_many([(base, models)], [()], groups)[0]


def gram_many(parameters: Sequence[Parameter], own: Sequence[tuple[()]], groups: Groups) -> list[Tensor]:
    """G [R, K, K] float64 of each parameter."""
    batch = _Batch(parameters, groups)
    return batch.split(batch.gram())


def descend(
    gram: Tensor, objective: Objective, optimizer: SGD | Converge, total: int | None = None
) -> tuple[Tensor, Tensor]:
    """Coefficients a [R, K] of the redundant vectors d = sum_j a_j t_j, and the loss at d_0, d_1, ... (float64).

    The history of Converge has a fixed length, which no step of the data decides: it ends with the last loss repeated.
    """
    gram = native._dense(gram)
    count = gram.shape[0]
    coefficients, history = _descend(gram, [count], [reference.total_groups(total, count)], objective, optimizer)
    return coefficients, history[0]


def _descend(
    gram: Tensor, counts: Sequence[int], totals: Sequence[int], objective: Objective, optimizer: SGD | Converge
) -> tuple[Tensor, Tensor]:
    """a [R, K] and histories [P, entries] of P parameters, from G [R, K, K] of all groups.

    counts: how many groups of each parameter are given. totals: how many the parameter has.
    """
    k, device = gram.shape[1], gram.device
    coefficients = torch.empty(gram.shape[0], k, dtype=torch.float64, device=device)
    rows = [[0, count, 1, 0, 0, 0, 0, 0, total] for count, total in zip(counts, totals, strict=True)]
    common = {**native._objective(objective), "gram": gram.data_ptr(), "coefficients": coefficients.data_ptr()}
    with _launching(device) as place:
        room = _Room(device)
        if isinstance(optimizer, SGD):
            history = torch.zeros(len(counts), optimizer.iterations + 1, dtype=torch.float64, device=device)
            _module().cuda_descend_sgd(
                k=k,
                parameters=rows,
                place=place,
                allocate=room,
                **common,
                options=_sgd(optimizer),
                history=history.data_ptr(),
            )
            return coefficients, history
        entries = native._history_size(optimizer)
        ways = native._history_size(Converge(max_iterations=0))
        history = torch.zeros(len(counts), ways, entries // ways, dtype=torch.float64, device=device)
        lengths = torch.ones(len(counts), ways, dtype=torch.int64, device=device)
        _module().cuda_descend_converge(
            k=k,
            parameters=rows,
            place=place,
            allocate=room,
            **common,
            options=_module().Converge(optimizer.tolerance, optimizer.max_iterations),
            history=history.data_ptr(),
            lengths=lengths.data_ptr(),
        )
    return coefficients, joined_ways(history, lengths)


def combine(
    base: Tensor | None, models: Sequence[Tensor], weights: Tensor, groups: Groups, dtype: torch.dtype
) -> Tensor:
    """base + sum_j w_rj t_j in the models' shape, rounded to `dtype`; without a base, sum_j w_rj t_j."""
    return combine_many([(base, models)], [(weights, groups, dtype)])[0]


def combine_many(parameters: Sequence[Parameter], own: Sequence[tuple[Tensor, Groups, torch.dtype]]) -> list[Tensor]:
    """The same of each parameter with its own weights [R, K] or [1, K], groups and dtype."""
    # One row of weights is the same for every group: then the whole tensor is one row.
    groups = [given if weights.shape[0] != 1 else "tensor" for weights, given, _ in own]
    batch = _Batch(parameters, groups, [dtype for *_, dtype in own])
    compute = reference.compute_dtype(batch.dtype)
    factors = torch.cat([weights.detach().to(batch.device, compute) for weights, *_ in own]).contiguous()
    return batch.combine(factors)


def multi_dot(base: Tensor | None, models: Sequence[Tensor], gradient: Tensor, groups: Groups) -> Tensor:
    """<g_r, t_rj> [R, K] float64."""
    return multi_dot_many([(base, models)], [(gradient,)], groups)[0]


def multi_dot_many(parameters: Sequence[Parameter], own: Sequence[tuple[Tensor]], groups: Groups) -> list[Tensor]:
    """The same of each parameter with its gradient."""
    batch = _Batch(parameters, groups)
    return batch.split(batch.multi_dot([native._dense(native.as_gradient(g, batch.dtype)) for (g,) in own]))


def merge_rows(
    base: Tensor | None,
    models: Sequence[Tensor],
    weights: Tensor,
    objective: Objective,
    optimizer: SGD | Converge,
    groups: Groups,
    dtype: torch.dtype,
    total: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """base + sum_i m_i (t_i - d) for weights m [K], G [R, K, K], a [R, K] and the history."""
    return merge_rows_many([(base, models)], [(weights, objective, optimizer, groups, dtype)], [total])[0]


def merge_rows_many(
    parameters: Sequence[Parameter], own: Sequence[RowsArguments], totals: Sequence[int | None] | None = None
) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """The same of each parameter; only the dtypes of results may differ. One launch where K and iterations allow."""
    weights, objective, optimizer, groups, _ = own[0]
    batch = _Batch(parameters, groups, [dtype for *_, dtype in own], totals=totals)
    module = _module()
    if (
        isinstance(optimizer, SGD)
        and batch.k <= module.CUDA_FUSED_TASKS
        and optimizer.iterations <= module.CUDA_MOST_FUSED_ITERATIONS
    ):
        merged, g, coefficients, history = batch.merge_rows(weights, objective, optimizer)
    else:
        g = batch.gram()
        coefficients, history = _descend(g, batch.counts, batch.totals, objective, optimizer)
        compute = reference.compute_dtype(batch.dtype)
        # Filled in one by one: a copy from the host would wait for the GPU.
        numbers = [torch.full((), one, dtype=torch.float64, device=batch.device) for one in weights.tolist()]
        factors = statistics.merge_weights(torch.stack(numbers), coefficients)
        merged = batch.combine(factors.to(compute).contiguous())
    return list(zip(merged, batch.split(g), batch.split(coefficients), history.unbind(), strict=True))


def adam_rows(
    base: Tensor | None,
    models: Sequence[Tensor],
    objective: Objective,
    optimizer: SGD | Adam,
    groups: Groups,
    total: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """d, its history, and the products at the end: the fields of `awd_fast.ops.Descent`."""
    compute = reference.compute_dtype(models[0].dtype)
    batch = _Batch([(base, models)], groups, [compute], totals=[total])
    count, k = sum(batch.counts), batch.k
    history = torch.zeros(1, optimizer.iterations + 1, dtype=torch.float64, device=batch.device)
    g, inner, square = (batch.numbers(*size) for size in ((count, k, k), (count, k), (count,)))
    with _launching(batch.device) as place:
        _module().cuda_adam_rows(
            **batch.addresses(place),
            allocate=_Room(batch.device),
            **native._objective(objective),
            optimizer=native._elementwise(optimizer, objective.alpha if objective.penalty == "l1" else 0.0),
            iterations=optimizer.iterations,
            history=history.data_ptr(),
            gram=g.data_ptr(),
            inner=inner.data_ptr(),
            square=square.data_ptr(),
        )
    return batch.outs[0], history[0], g, inner, square


def adam_step(
    base: Tensor | None,
    models: Sequence[Tensor],
    shift: Tensor,
    velocity: Tensor | None,
    square: Tensor | None,
    slope: Tensor,
    optimizer: SGD | Adam,
    step: int,
    l1: float,
) -> Tensor:
    """<t_i, d>, <d, d> and sum |d| after a step of shift, velocity and square, which are changed in place."""
    batch = _Batch([(base, models)], "tensor", states=[(shift, velocity, square)])
    moments = torch.zeros(1, batch.k + 2, dtype=torch.float64, device=batch.device)
    factors = native._dense(slope)
    with _launching(batch.device) as place:
        _module().cuda_adam_step(
            **batch.addresses(place),
            allocate=_Room(batch.device),
            optimizer=native._elementwise(optimizer, l1),
            step=step,
            slope=factors.data_ptr(),
            moments=moments.data_ptr(),
        )
    native._changed(shift, velocity, square)
    return moments[0]


def descend_stream(
    parts: Sequence[Parameter], objective: Objective, optimizer: SGD | Adam
) -> tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor]:
    """All iterations on the one group that all parts make: the fields of `awd_fast.streaming.Streamed`."""
    batch = _Batch(parts, "tensor")
    compute, device, k = reference.compute_dtype(batch.dtype), batch.device, batch.k
    shapes = [models[0].shape for _, models in parts]
    first, second, third = ([torch.zeros(size, dtype=compute, device=device) for size in shapes] for _ in range(3))
    batch.states = list(zip(first, second, third, strict=True))
    g = batch.gram()
    whole = g.sum(dim=0)
    moments = torch.zeros(len(parts), k + 2, dtype=torch.float64, device=device)
    slope, history = batch.numbers(k + 1), batch.numbers(optimizer.iterations + 1)
    with _launching(device) as place:
        _module().cuda_adam_stream(
            **batch.addresses(place),
            allocate=_Room(device),
            **native._objective(objective),
            optimizer=native._elementwise(optimizer, objective.alpha if objective.penalty == "l1" else 0.0),
            iterations=optimizer.iterations,
            gram=whole.data_ptr(),
            slope=slope.data_ptr(),
            moments=moments.data_ptr(),
            history=history.data_ptr(),
        )
    return first, g, moments[:, :k], moments[:, k], history


def _module() -> ModuleType:
    return native._module()


def _sgd(optimizer: SGD) -> object:
    options = (optimizer.lr, optimizer.momentum, optimizer.weight_decay, optimizer.nesterov, optimizer.iterations)
    return _module().Sgd(*options)


@contextmanager
def _launching(device: torch.device) -> Iterator[tuple[int, int]]:
    """Makes the device the present one and gives its number and the address of PyTorch's stream there."""
    with torch.cuda.device(device):
        yield device.index, torch.cuda.current_stream(device).cuda_stream


class _Room:
    """Gives a call its work memory, and holds it until the call's launches are on the stream."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._held = device, torch.empty(0, device=device)

    def __call__(self, numbers: int) -> int:
        self._held = torch.empty(numbers, dtype=torch.float64, device=self._device)
        return self._held.data_ptr()


class _Batch:
    """The tensors of some parameters, copied where they are not dense, and what an operator writes for each.

    groups: of all parameters, or of each. dtypes: those of a result for each. states: d and the optimiser's state.
    totals: how many groups a parameter has, where those that are given are a part.
    """

    def __init__(
        self,
        parameters: Sequence[Parameter],
        groups: Groups | Sequence[Groups],
        dtypes: Sequence[torch.dtype] | None = None,
        states: Sequence[tuple[Tensor, Tensor | None, Tensor | None]] | None = None,
        totals: Sequence[int | None] | None = None,
    ) -> None:
        self._tensors = [native._Tensors(base, models) for base, models in parameters]
        first = parameters[0][1][0]
        self.k, self.dtype, self.device = len(parameters[0][1]), first.dtype, first.device
        each = [groups] * len(parameters) if isinstance(groups, str) else list(groups)
        likes = [models[0] for _, models in parameters]
        self._shapes = [native._shape(like, of) for like, of in zip(likes, each, strict=True)]
        self.counts = [reference.group_count(like, of) for like, of in zip(likes, each, strict=True)]
        whole = [None] * len(likes) if totals is None else totals
        self.totals = [reference.total_groups(total, count) for total, count in zip(whole, self.counts, strict=True)]
        self._dtypes = dtypes
        self.outs: list[Tensor] = []
        if dtypes is not None:
            pairs = zip(likes, dtypes, strict=True)
            self.outs = [torch.empty(like.shape, dtype=dtype, device=self.device) for like, dtype in pairs]
        self.states = states

    def numbers(self, *size: int) -> Tensor:
        return torch.empty(*size, dtype=torch.float64, device=self.device)

    def split(self, by_group: Tensor) -> list[Tensor]:
        """A result [R, ...] of all groups, parameter by parameter."""
        return list(by_group.split(self.counts))

    def addresses(self, place: tuple[int, int]) -> dict[str, Any]:
        """What the compiled module is told of the parameters."""
        rows = []
        for index, (tensors, shape) in enumerate(zip(self._tensors, self._shapes, strict=True)):
            written: tuple[Tensor | None, ...] = (self.outs[index] if self.outs else None, None, None)
            if self.states is not None:
                written = self.states[index]
            out, velocity, square = (native._address(tensor) for tensor in written)
            code = native.CODES[self._dtypes[index]] if self._dtypes is not None else 0
            head = (shape["rows"], shape["columns"], int(shape["by_column"]), out, velocity, square, code)
            rows.append([tensors.base_address, *head, self.totals[index], *tensors.model_addresses])
        return {"dtype": native.CODES[self.dtype], "k": self.k, "parameters": rows, "place": place}

    def gram(self) -> Tensor:
        """G [R, K, K] of all groups."""
        found = self.numbers(sum(self.counts), self.k, self.k)
        with _launching(self.device) as place:
            arguments = self.addresses(place)
            _module().cuda_gram(**arguments, allocate=_Room(self.device), out=found.data_ptr())
        return found

    def combine(self, factors: Tensor) -> list[Tensor]:
        """The sums with weights [R, K] of all groups, in the dtype of the arithmetic."""
        with _launching(self.device) as place:
            _module().cuda_combine(**self.addresses(place), weights=factors.data_ptr())
        return self.outs

    def multi_dot(self, gradients: Sequence[Tensor]) -> Tensor:
        """The products [R, K] of all groups with gradients that lie where an operator's results would."""
        self.states, self._dtypes = [(g, None, None) for g in gradients], [g.dtype for g in gradients]
        found = self.numbers(sum(self.counts), self.k)
        with _launching(self.device) as place:
            arguments = self.addresses(place)
            _module().cuda_multi_dot(**arguments, allocate=_Room(self.device), out=found.data_ptr())
        return found

    def merge_rows(
        self, weights: Tensor, objective: Objective, optimizer: SGD
    ) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
        """The merged tensors, G [R, K, K], a [R, K] and histories [P, entries], in one launch."""
        count = sum(self.counts)
        g, coefficients = self.numbers(count, self.k, self.k), self.numbers(count, self.k)
        size = (len(self.counts), optimizer.iterations + 1)
        history = torch.zeros(*size, dtype=torch.float64, device=self.device)
        with _launching(self.device) as place:
            _module().cuda_merge_rows(
                **self.addresses(place),
                allocate=_Room(self.device),
                factors=weights.tolist(),
                **native._objective(objective),
                options=_sgd(optimizer),
                gram=g.data_ptr(),
                coefficients=coefficients.data_ptr(),
                history=history.data_ptr(),
            )
        return self.outs, g, coefficients, history
