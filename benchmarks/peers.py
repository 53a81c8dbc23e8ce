"""What a user could write instead, in PyTorch: every iteration reads the task vectors again.

Each peer is a descent on the loss with |cos| over the rows of one tensor (or over one global group as one row) that
can be continued: `step(n)` makes n iterations, `loss()` is the loss at the present d. All are float32.
"""

import itertools
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from awd_fast.measure import CannotRunError
from awd_fast.objective import SGD, Adam, Objective

OBJECTIVE = Objective()


def batched_loss(t: Tensor, d: Tensor) -> Tensor:
    """The loss of d [R, D] for task vectors t [R, K, D], all pairs in one batched product."""
    u = t - d[:, None, :]
    n = u.norm(dim=-1) + OBJECTIVE.eps
    c = (u @ u.mT) / (n[:, :, None] * n[:, None, :])
    k = t.shape[1]
    similarity = (c.abs().sum(dim=(1, 2)) - c.diagonal(dim1=1, dim2=2).abs().sum(dim=1)) / (k * (k - 1))
    return similarity.mean() + OBJECTIVE.alpha * d.norm(dim=-1).sum()


def loop_loss(t: Tensor, d: Tensor) -> Tensor:
    """The same as one would write it from the paper: a loop over the pairs."""
    pairs = list(itertools.combinations(range(t.shape[1]), 2))
    total = sum(F.cosine_similarity(t[:, i] - d, t[:, j] - d, dim=-1).abs().mean() for i, j in pairs)
    return total / len(pairs) + OBJECTIVE.alpha * d.norm(dim=-1).sum()


class Autograd:
    """A loss, its gradient by autograd, and one of torch's optimisers."""

    def __init__(self, t: Tensor, optimizer: SGD | Adam, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.t, self.function = t, loss
        self.d = torch.zeros(t.shape[0], t.shape[2], device=t.device, requires_grad=True)
        self.optimizer: torch.optim.Optimizer
        if isinstance(optimizer, SGD):
            self.optimizer = torch.optim.SGD(
                [self.d], lr=optimizer.lr, momentum=optimizer.momentum, weight_decay=optimizer.weight_decay
            )
        else:
            self.optimizer = torch.optim.Adam(
                [self.d], lr=optimizer.lr, betas=optimizer.betas, eps=optimizer.eps, fused=True
            )

    def step(self, iterations: int) -> None:
        for _ in range(iterations):
            self.optimizer.zero_grad(set_to_none=True)
            self.function(self.t, self.d).backward()
            self.optimizer.step()

    def loss(self) -> float:
        with torch.no_grad():
            return float(batched_loss(self.t, self.d))


class Pairwise:
    """The gradient written by hand: for each pair a pass for the products and norms, then a pass for the gradient."""

    def __init__(self, t: Tensor, optimizer: SGD) -> None:
        self.vectors = [vector.contiguous() for vector in t.unbind(1)]
        self.t, self.options = t, optimizer
        self.d = torch.zeros(t.shape[0], t.shape[2], device=t.device)
        self.velocity = torch.zeros_like(self.d)
        self.iterations = 0

    def gradient(self) -> Tensor:
        """dL/dd [R, D]."""
        k, rows = len(self.vectors), len(self.d)
        slope = torch.zeros_like(self.d)
        for i, j in itertools.combinations(range(k), 2):
            u, v = self.vectors[i] - self.d, self.vectors[j] - self.d
            uv, uu, vv = (u * v).sum(dim=1), (u * u).sum(dim=1), (v * v).sum(dim=1)
            nu, nv = uu.sqrt(), vv.sqrt()
            scale = 1.0 / ((nu + OBJECTIVE.eps) * (nv + OBJECTIVE.eps))
            c = uv * scale
            weight = c.sign() * (2.0 / (k * (k - 1) * rows))
            along_u, along_v = c / (nu * (nu + OBJECTIVE.eps)), c / (nv * (nv + OBJECTIVE.eps))
            slope -= (weight * (scale - along_u))[:, None] * u + (weight * (scale - along_v))[:, None] * v
        norm = self.d.norm(dim=1, keepdim=True)
        return slope + OBJECTIVE.alpha * torch.where(norm > 0, self.d / norm.clamp_min(1e-30), 0.0)

    def step(self, iterations: int) -> None:
        for _ in range(iterations):
            slope = self.gradient().add_(self.d, alpha=self.options.weight_decay)
            self.velocity.mul_(self.options.momentum if self.iterations else 0.0).add_(slope)
            self.d.sub_(self.velocity, alpha=self.options.lr)
            self.iterations += 1

    def loss(self) -> float:
        return float(batched_loss(self.t, self.d))


Peer = Autograd | Pairwise


def autograd(t: Tensor, optimizer: SGD | Adam) -> Peer:
    return Autograd(t, optimizer, batched_loss)


def cosine_loop(t: Tensor, optimizer: SGD | Adam) -> Peer:
    return Autograd(t, optimizer, loop_loss)


def pairwise(t: Tensor, optimizer: SGD | Adam) -> Peer:
    if not isinstance(optimizer, SGD):
        raise CannotRunError("the pairwise gradient is written for SGD")
    return Pairwise(t, optimizer)


def compiled(t: Tensor, optimizer: SGD | Adam) -> Peer:
    """The batched loss through torch.compile. Raises CannotRunError with the compiler's reason where it fails."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peer = Autograd(t, optimizer, torch.compile(batched_loss, dynamic=False))
            peer.step(1)
    except Exception as error:  # any: inductor, its compiler and the system each have their own
        reason = str(error).strip().splitlines()
        raise CannotRunError(f"torch.compile failed: {type(error).__name__}: {(reason or [''])[0]}") from error
    return Autograd(t, optimizer, peer.function)


PEERS: dict[str, Callable[[Tensor, SGD | Adam], Peer]] = {
    "autograd": autograd,
    "compiled": compiled,
    "cosine loop": cosine_loop,
    "pairwise": pairwise,
}


def task_arithmetic(base: Tensor, models: tuple[Tensor, ...], scale: float) -> Tensor:
    """base + scale * sum of the task vectors, as one would write it."""
    return base + scale * sum(model - base for model in models)
