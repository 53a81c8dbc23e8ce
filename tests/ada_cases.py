"""Small models with unlabelled data, and the plain way to learn coefficients: the merge written out for autograd."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from awd_fast import disentangle
from awd_fast.plan import StateDict, make_plan
from awd_fast.recipe import make_recipe

State = dict[str, Tensor]


@dataclass
class Case:
    """A model, its base and tuned state dicts, and batches for each of three tasks."""

    model: nn.Module
    base: State
    models: list[State]
    batches: list[list[Any]]

    def logits(self, model: nn.Module, batch: Any, index: int) -> Tensor:
        found = model(**batch) if isinstance(batch, dict) else model(batch)
        return getattr(found, "logits", found)


def mlp() -> tuple[nn.Module, Callable[[], Any]]:
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5), nn.Tanh(), nn.Linear(5, 4))
    return model, lambda: torch.randn(7, 6, dtype=torch.float64)


def conv() -> tuple[nn.Module, Callable[[], Any]]:
    """With batch norm, whose statistics are floating buffers and whose count is an integer one."""
    layers = [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.Flatten(), nn.Linear(12, 3)]
    return nn.Sequential(*layers).eval(), lambda: torch.randn(5, 2, 6, 6, dtype=torch.float64)


def bert() -> tuple[nn.Module, Callable[[], Any]]:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=8,
        num_labels=3,
    )
    return BertForSequenceClassification(config).eval(), lambda: {"input_ids": torch.randint(20, (4, 6))}


MAKERS = {"mlp": mlp, "conv": conv, "bert": bert}


def make(name: str, seed: int = 0, size: float = 0.3) -> Case:
    """A case in float64; task vectors share a part."""
    torch.manual_seed(seed)
    model, batch = MAKERS[name]()
    model = model.double()
    base = {key: value.detach().clone() for key, value in model.state_dict().items()}
    common = {key: torch.randn_like(value) for key, value in base.items() if value.is_floating_point()}

    def tuned(value: Tensor, key: str) -> Tensor:
        moved = value + size * (0.5 * common[key] + torch.randn_like(value))
        return moved.abs() if "running_var" in key else moved

    models = [{key: tuned(v, key) if key in common else v.clone() for key, v in base.items()} for _ in range(3)]
    return Case(model, base, models, [[batch() for _ in range(2)] for _ in range(3)])


def redundant(case: Case, names: list[str], options: dict[str, Any]) -> dict[str, Tensor]:
    """d of each tensor of `names`, by `disentangle`."""
    vectors = {name: [state[name] - case.base[name] for state in case.models] for name in names}
    if options["groups"] != "global":
        return {name: disentangle(own, **options).redundant for name, own in vectors.items()}
    flat = [torch.cat([vectors[name][j].flatten() for name in names]) for j in range(len(case.models))]
    whole = disentangle(flat, **options).redundant
    parts = whole.split([case.base[name].numel() for name in names])
    return {name: part.view_as(case.base[name]) for name, part in zip(names, parts, strict=True)}


def plain_entropy(case: Case, coefficients: Tensor, method: str, options: dict[str, Any], number: int) -> Tensor:
    """The sum of mean entropies at step `number`, differentiable in C [K, N] or c [K]."""
    recipe = make_recipe(len(case.models), method=method, **options)
    sources = [StateDict(str(j), state) for j, state in enumerate(case.models)]
    plan = [step for step in make_plan(StateDict("base", case.base), sources, recipe) if step.action != "base"]
    chosen = [step.name for step in plan if step.action == "awd"]
    shifts = redundant(case, chosen, options) if chosen else {}
    buffers = dict(case.model.named_buffers())  # from which nothing flows back: batch norm refuses it
    merged = dict(case.base)
    for column, step in enumerate(plan):
        own = coefficients if coefficients.ndim == 1 else coefficients[:, column]
        total = case.base[step.name]
        for j, state in enumerate(case.models):
            total = total + own[j] * (state[step.name] - case.base[step.name] - shifts.get(step.name, 0.0))
        merged[step.name] = total.detach() if step.name in buffers else total
    found = torch.zeros((), dtype=torch.float64)
    for stream in case.batches:
        batch = stream[number % len(stream)]
        given = ((), batch) if isinstance(batch, dict) else ((batch,), {})
        out = functional_call(case.model, merged, *given)
        p = getattr(out, "logits", out).softmax(dim=1)
        found = found - (p * p.log()).sum(dim=1).mean()
    return found


def plain_descent(
    case: Case, start: Tensor, method: str, options: dict[str, Any], steps: int, lr: float
) -> tuple[Tensor, list[float]]:
    """The coefficients after Adam through autograd, and the entropies before each step."""
    coefficients = start.clone().requires_grad_(True)
    adam = torch.optim.Adam([coefficients], lr=lr)
    history = []
    for number in range(steps):
        loss = plain_entropy(case, coefficients, method, options, number)
        adam.zero_grad()
        loss.backward()
        adam.step()
        history.append(float(loss.detach()))
    return coefficients.detach(), history
