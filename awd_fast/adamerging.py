"""AdaMerging (arXiv 2310.02575): merging coefficients learned from unlabelled data, with or without AWD.

The coefficients minimise the mean Shannon entropy of the merged model's predictions. `awd_fast.mixture` has the merge
as a function of the coefficients and its gradient; here are the model, the data and the descent.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from awd_fast.errors import InputError
from awd_fast.merger import finite, overflow
from awd_fast.mixture import Mixture
from awd_fast.objective import MOST_ITERATIONS, Adam, Converge, Groups, Optimizer, Penalty, Similarity, real
from awd_fast.plan import StateDict, Step, make_plan
from awd_fast.recipe import DEFAULT_EXCLUDE, Missing, Others, make_recipe

Per = Literal["task", "tensor"]
AdaMethod = Literal["awd", "task_arithmetic"]
Logits = Callable[[nn.Module, Any, int], Tensor]


@dataclass(frozen=True)
class AdaMerged:
    """What `adamerge` found.

    state_dict: the merged tensors, which are those of the model now, and what the base has beside them. coefficients:
    float64 on the CPU, [K] of each task or [K, N] of each task and tensor. names: the N merged tensors in the order of
    the coefficients. history: [steps, streams] float64, the mean entropy of each stream's batch before each step.
    """

    state_dict: dict[str, Tensor]
    coefficients: Tensor
    names: tuple[str, ...]
    history: Tensor


def adamerge(
    model: nn.Module,
    base: Mapping[str, Tensor],
    models: Sequence[Mapping[str, Tensor]],
    batches: Sequence[Iterable[Any]],
    *,
    logits: Logits | None = None,
    per: Per = "tensor",
    initial: float | Sequence[float] | Tensor = 0.3,
    steps: int = 500,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    bounds: tuple[float, float] | None = None,
    on_step: Callable[[int, float, Tensor], Any] | None = None,
    method: AdaMethod = "awd",
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] = DEFAULT_EXCLUDE,
    others: Others = "task_arithmetic",
    missing: Missing = "error",
    groups: Groups = "row",
    similarity: Similarity = "squared",
    penalty: Penalty = "l2",
    alpha: float = 1e-6,
    optimizer: Optimizer | str = Converge(),  # noqa: B008  frozen
    eps: float = 1e-8,
    backend: str | None = None,
) -> AdaMerged:
    """Learns c in theta = theta_0 + sum_i c_i (t_i - d) by the entropy of predictions on unlabelled data.

    model: a module whose parameters and buffers have the names of the state dicts; it computes in its own dtypes and on
        its own devices, in the mode (`train` or `eval`) that it is in. What only it has, as task heads, stays as it is.
    base, models: state dicts as `awd_fast.merge` takes them; they are not changed. What lies on another device than the
        model's tensors is copied there, once.
    batches: streams of unlabelled data, an iterable each (a DataLoader, a list), mostly one for each task. A step takes
        a batch of every stream; a stream that ends begins anew.
    logits: (model, batch, index of the stream) -> logits [n, C] of any floating dtype, C as the task likes: heads that
        differ from task to task are applied there. By default model(batch), or model(**batch) for a mapping, brought to
        the model's device; of what comes back, `.logits` where it is there.
    per: "tensor", coefficients for each task and merged tensor (the paper's layer-wise); "task", for each task.
    initial: the coefficients to begin with: a number, K numbers, or [K, N], as of an earlier result.
    steps, lr, betas: of Adam on the coefficients (arXiv 1412.6980), in float64.
    bounds: (low, high) to which coefficients are clamped where they are used, as the authors' code does with (0, 1);
        beyond them the gradient is 0.
    on_step: called with the number of each step, from 0 on, the sum over the streams of the mean entropy, and the
        coefficients that gave it. What it raises ends the descent.
    method: "awd", or "task_arithmetic", d = 0. include, exclude, others, missing, and all that follow: as in
        `awd_fast.merge`, once before the descent. Tensors that are not disentangled have coefficients too, unless
        others="base". Floating buffers are merged, but nothing flows back from them.

    On return the model holds the merged weights, as new tensors; its `grad` and `requires_grad` are as they were. Where
    anything is raised, it holds what it held before. Parameters that the model ties, under two names, are one tensor,
    named and disentangled as the first of the names in the base; the state dicts must hold the same under both.
    With the same batches, device and thread count results are the same to the bit, if those of the model are.

    Raises InputError in one sentence for what does not fit: tensors, patterns, coefficients, a stream that is empty or
    cannot begin anew, logits of another shape, an entropy that is not finite.
    """
    recipe = make_recipe(
        len(models),
        method=_chosen("method", method, AdaMethod),
        include=include,
        exclude=exclude,
        others=others,
        missing=missing,
        groups=groups,
        similarity=similarity,
        penalty=penalty,
        alpha=alpha,
        optimizer=optimizer,
        eps=eps,
        backend=backend,
    )
    _chosen("per", per, Per)
    if isinstance(steps, bool) or not isinstance(steps, int) or not 0 <= steps <= MOST_ITERATIONS:
        raise InputError(f"steps is {steps!r}; expected an integer from 0 to {MOST_ITERATIONS}")
    descent = Adam(lr=lr, betas=betas)  # which checks them
    limits = _limits(bounds)
    streams = _streams(batches)
    source = StateDict("base", base)
    sources = [StateDict(f"models[{index}]", state) for index, state in enumerate(models)]
    plan = make_plan(source, sources, recipe)
    tensors = _tensors(model, plan)
    _check_ties(tensors, plan, source, sources)
    first = {id(tensors[step.name]): step for step in reversed(plan) if step.name in tensors}
    merged = [step for step in plan if step.action != "base" and first[id(tensors[step.name])] is step]
    targets = [tensors[step.name] for step in merged]
    raw = _initial(initial, len(models), len(merged), per)
    raw.grad = torch.zeros_like(raw)
    adam = torch.optim.Adam([raw], lr=descent.lr, betas=descent.betas)
    history = torch.zeros(steps, len(streams), dtype=torch.float64)
    ask = _logits if logits is None else logits
    kept = [
        step
        for step in plan
        if step.action == "base" and step.name in tensors and first[id(tensors[step.name])] is step
    ]
    lent = _Lent(targets, [tensors[step.name] for step in kept])
    mixture = Mixture(source, sources, merged, recipe, [(target.device, target.dtype) for target in targets])

    def load() -> Tensor:
        """Has the model hold the merge for the present coefficients, and gives those."""
        used = raw.clone() if limits is None else raw.clamp(*limits)
        for column, tensor in mixture.merged(used if used.ndim == 2 else used[:, None].expand(-1, len(merged))):
            targets[column].data = tensor
        return used

    with lent:
        for step in kept:
            target = tensors[step.name]
            target.data = source.read(step.name).to(target.device, target.dtype, copy=True)
        for number in range(steps):
            used = load()
            for index, stream in enumerate(streams):
                with torch.enable_grad():
                    entropy = _entropy(ask(model, next(stream), index), number, index)
                    lent.backward(entropy)
                history[number, index] = entropy.detach()
            if on_step is not None:
                on_step(number, float(history[number].sum()), used.clone())
            slopes = mixture.slopes(lent.taken_gradients())
            if not torch.isfinite(slopes).all():
                raise InputError(f"step {number}: the gradient of the entropy is not finite; use a wider dtype")
            raw.grad.copy_(slopes if raw.ndim == 2 else slopes.sum(dim=1))
            if limits is not None:
                raw.grad[(raw < limits[0]) | (raw > limits[1])] = 0.0
            adam.step()
        used = load()
        for step, target in zip(merged, targets, strict=True):
            if not finite(target.detach()):
                raise overflow(replace(step, dtype=target.dtype))
    state = {step.name: tensors[step.name].detach() if step.name in tensors else base[step.name] for step in plan}
    return AdaMerged(state, used, tuple(step.name for step in merged), history)


class _Lent:
    """A model's tensors while a merge has them: put back as they were where it fails, their gradients in any case.

    Other tensors take the place of the old ones, which therefore stay whole, even where they are the base's own.
    """

    def __init__(self, learned: Sequence[Tensor], others: Sequence[Tensor]) -> None:
        self._parameters = [tensor for tensor in learned if isinstance(tensor, nn.Parameter)]
        self._learned = learned
        every = {id(tensor): tensor for tensor in (*learned, *others)}
        self._before = [(tensor, tensor.data) for tensor in every.values()]
        if not self._parameters:
            raise InputError(
                "no parameter of the model is merged; expected one at least whose coefficients can be learned"
            )
        self._gradients = [(tensor, tensor.grad, tensor.requires_grad) for tensor in self._parameters]

    def __enter__(self) -> "_Lent":
        for parameter in self._parameters:
            parameter.grad = None
            parameter.requires_grad_(True)
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        if kind is not None:
            for tensor, data in self._before:
                tensor.data = data
        for parameter, gradient, required in self._gradients:
            parameter.grad = None
            parameter.requires_grad_(required)
            parameter.grad = gradient

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of a loss to that of each learned parameter, and to nothing else."""
        torch.autograd.backward(loss, inputs=self._parameters)

    def taken_gradients(self) -> list[Tensor | None]:
        """What has been added up for each learned tensor, and is forgotten by this."""
        found = [tensor.grad if isinstance(tensor, nn.Parameter) else None for tensor in self._learned]
        for parameter in self._parameters:
            parameter.grad = None
        return found


def _chosen(name: str, value: Any, allowed: Any) -> Any:
    if value not in get_args(allowed):
        raise InputError(f"{name} is {value!r}; expected one of {', '.join(get_args(allowed))}")
    return value


def _limits(bounds: Any) -> tuple[float, float] | None:
    if bounds is None:
        return None
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
        raise InputError(f"bounds is {bounds!r}; expected two numbers, low and high")
    low, high = (real("bounds", bound) for bound in bounds)
    if low > high:
        raise InputError(f"bounds is {bounds!r}; expected the lower one first")
    return low, high


def _initial(initial: Any, k: int, n: int, per: Per) -> Tensor:
    """The coefficients to begin with, [K] or [K, N] float64."""
    size = [k, n] if per == "tensor" else [k]
    try:
        given = torch.as_tensor(initial, dtype=torch.float64, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"initial is {type(initial).__name__}; expected a number, {k} numbers or {size}") from error
    if not torch.isfinite(given).all():
        raise InputError("initial holds NaN or Inf; expected finite coefficients")
    if given.ndim == 0:
        return given.expand(size).clone()
    if list(given.shape) == [k] and per == "tensor":
        return given[:, None].expand(size).clone()
    if list(given.shape) != size:
        raise InputError(
            f"initial has the shape {list(given.shape)}; expected a number, [{k}], one of each model"
            + (f", or [{k}, {n}], one of each model and merged tensor" if per == "tensor" else "")
        )
    return given.clone()


def _tensors(model: nn.Module, plan: Sequence[Step]) -> dict[str, Tensor]:
    """The model's tensors under the names of the plan. Raises InputError where one is missing or does not fit."""
    if not isinstance(model, nn.Module):
        raise InputError(f"model is {type(model).__name__}; expected a torch.nn.Module")
    held: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    held |= dict(model.named_buffers(remove_duplicate=False))
    found = {}
    for step in plan:
        tensor = held.get(step.name)
        floating = step.info.dtype.is_floating_point
        if tensor is None:
            if floating:
                raise InputError(f"the model has no parameter or buffer {step.name!r}, which the base has")
            continue
        if tuple(tensor.shape) != step.info.shape or tensor.is_floating_point() != floating:
            raise InputError(
                f"the model's {step.name!r} is {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}; "
                f"expected {step.info} as in the base"
            )
        if tensor.device.type == "meta":
            raise InputError(f"the model's {step.name!r} is on meta; expected a tensor with values")
        found[step.name] = tensor
    return found


def _check_ties(
    tensors: Mapping[str, Tensor], plan: Sequence[Step], base: StateDict, models: Sequence[StateDict]
) -> None:
    """Raises InputError where the model ties tensors that a state dict holds different values for."""
    seen: dict[int, str] = {}
    for step in plan:
        if step.name not in tensors:
            continue
        first = seen.setdefault(id(tensors[step.name]), step.name)
        if first == step.name:
            continue
        for source in (base, *models):
            both = first in source.tensors and step.name in source.tensors
            if both and not torch.equal(source.read(first), source.read(step.name)):
                raise InputError(
                    f"the model ties {first!r} and {step.name!r}, but {source.where(step.name)} "
                    "has different values there"
                )


def _streams(batches: Any) -> list[Iterator[Any]]:
    if isinstance(batches, (str, Mapping, Tensor)) or not isinstance(batches, Iterable):
        raise InputError(f"batches is {type(batches).__name__}; expected a list of iterables, one for each task")
    several = list(batches)
    if not several:
        raise InputError("batches is empty; expected at least one stream of batches")
    for index, stream in enumerate(several):
        if not isinstance(stream, Iterable):
            raise InputError(f"batches[{index}] is {type(stream).__name__}; expected an iterable of batches")
    return [_endless(index, stream) for index, stream in enumerate(several)]


def _endless(index: int, stream: Iterable[Any]) -> Iterator[Any]:
    """The batches of a stream over and over."""
    rounds = 0
    while True:
        count = 0
        for batch in stream:
            count += 1
            yield batch
        if count == 0:
            raise InputError(
                f"batches[{index}] has no batch"
                + ("" if rounds == 0 else " left; expected an iterable that can begin anew, not an iterator")
            )
        rounds += 1


def _logits(model: nn.Module, batch: Any, index: int) -> Tensor:
    """The logits of a model for a batch of a common form."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    if isinstance(batch, (list, tuple)) and len(batch) == 1:  # of a TensorDataset
        batch = batch[0]
    if isinstance(batch, Mapping):
        moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
        found = model(**moved)
    elif isinstance(batch, Tensor):
        found = model(batch.to(device))
    else:
        raise InputError(
            f"batches[{index}] gives a {type(batch).__name__}; expected a tensor or a mapping, or logits=..."
        )
    return getattr(found, "logits", found)


def _entropy(logits: Any, step: int, index: int) -> Tensor:
    """The mean Shannon entropy of softmax(logits), in nats; float32 at least."""
    if not isinstance(logits, Tensor) or logits.ndim != 2 or not logits.is_floating_point() or 0 in logits.shape:
        what = f"{logits.dtype} {list(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError(f"step {step}: the logits of batches[{index}] are {what}; expected a floating tensor [n, C]")
    if not logits.requires_grad:
        raise InputError(f"step {step}: the logits of batches[{index}] do not depend on the merged tensors")
    numbers = torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=1)
    entropy = -(numbers.exp() * numbers).sum(dim=1).mean()
    if not torch.isfinite(entropy):
        raise InputError(
            f"step {step}: the entropy of batches[{index}] is {entropy.item()}; "
            "expected a finite one: lower lr, or use a wider dtype"
        )
    return entropy
