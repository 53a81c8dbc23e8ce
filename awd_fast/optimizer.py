"""The redundant vector a step at a time, for callers who want to watch or steer the descent."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from awd_fast import ops
from awd_fast.disentangling import as_vectors
from awd_fast.errors import InputError
from awd_fast.objective import SGD, Adam, Converge, Groups, Objective, Optimizer, Options, Penalty, Similarity
from awd_fast.ops import reference
from awd_fast.ops.reference import ElementwiseDescent, SpanDescent

_STATE = ("coordinates", "shift", "velocity", "square", "steps")


class RedundantVector:
    """The iterative optimisation of `disentangle`, one step per call.

    Takes the arguments of `disentangle`, with other defaults for the optimiser alone, whose `iterations` is not used:
    Converge has no steps of its own and is refused. Steps run in the reference path.
    """

    def __init__(
        self,
        task_vectors: Tensor | Sequence[Tensor],
        *,
        groups: Groups = "row",
        similarity: Similarity = "squared",
        penalty: Penalty = "l2",
        alpha: float = 1e-6,
        optimizer: Optimizer = SGD(),  # noqa: B008  frozen
        eps: float = 1e-8,
    ) -> None:
        objective = Objective(similarity=similarity, penalty=penalty, alpha=alpha, eps=eps)
        self.options = Options(groups=groups, objective=objective, optimizer=optimizer)
        self.task_vectors = as_vectors(task_vectors)
        if isinstance(optimizer, Converge):
            raise InputError("Converge has no steps; use awd_fast.disentangle, or SGD or Adam here")
        gram = ops.gram(None, self.task_vectors, groups)
        self._descent: SpanDescent | ElementwiseDescent
        if self.options.spans and not isinstance(optimizer, Adam):
            self._descent = SpanDescent(gram, objective, optimizer, len(gram))
        else:
            vectors = reference.task_vectors(None, self.task_vectors, groups)
            self._descent = ElementwiseDescent(vectors, objective, optimizer, len(gram))

    def step(self) -> float:
        """Takes one step and returns the loss before it, as a closure given to a torch optimiser would."""
        loss = float(self._descent.loss())
        self._descent.step()
        return loss

    @property
    def loss(self) -> float:
        """The loss at the present d."""
        return float(self._descent.loss())

    @property
    def coefficients(self) -> Tensor | None:
        """a [R, K] float64 with d = sum_j a_j t_j, or None where d is outside the span."""
        return self._descent.coefficients if isinstance(self._descent, SpanDescent) else None

    @property
    def redundant(self) -> Tensor:
        """The present d in the shape and dtype of a task vector."""
        first, groups = self.task_vectors[0], self.options.groups
        if isinstance(self._descent, SpanDescent):
            return ops.combine(None, self.task_vectors, self._descent.coefficients, groups)
        return reference.ungroup(self._descent.shift, first.shape, groups).to(first.dtype)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on beside the task vectors and options; tensors are copies."""
        state = {name: getattr(self._descent, name) for name in _STATE if hasattr(self._descent, name)}
        return {name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a state that `state_dict` of the same task vectors and options returned.

        Raises InputError, and changes nothing, where the state does not fit.
        """
        own = self.state_dict()
        if set(state) != set(own):
            raise InputError(f"the state holds {sorted(state)}; expected {sorted(own)}")
        at = own["coordinates"] if "coordinates" in own else own["shift"]
        for name, value in state.items():
            if isinstance(value, Tensor) and (value.shape != at.shape or value.dtype != at.dtype):
                raise InputError(f"{name} is {value.dtype} {list(value.shape)}; expected {at.dtype} {list(at.shape)}")
        for name, value in state.items():
            setattr(self._descent, name, value.clone() if isinstance(value, torch.Tensor) else value)
