"""Minimise the objective to convergence, for many groups at once, without a step size.

The absolute similarity has a kink wherever a cosine crosses zero, and its minima sit on several kinks at once: a
method with a fixed step chatters there. The minimiser works on the K coordinates of d in the span of a group's vectors,
scaled so that their root mean square norm is 1 (cosines do not depend on that scale). The loss is not convex, and no
single way from d = 0 always finds its lower minima, so the best of these is taken:

1. *Smoothed Newton*. |c| is replaced by sqrt(c^2 + mu^2) - mu, which differs from it by at most mu. Damped Newton steps
   with the exact Hessian minimise that, while mu falls from 0.3 to tolerance / 10.
2. *Annealed descents*. Steps whose size falls geometrically wander over the kinks; the best point seen is then polished
   by the first way, started at a small mu. One descent has momentum; a second, with larger steps and none, is made
   where the loss is not yet within the tolerance of 0; and where the vectors' norms are unequal, two more have steps
   in proportion to the shortest vector, which the other steps would overrun.

Criterion of the first way: at each mu, a group goes on until a Newton step lowers its smoothed loss by less than
mu / 10, or no damping gives a lower loss; it is finished when that happens at mu = tolerance / 10, or after
max_iterations steps. What is returned is the point of lowest unsmoothed loss among all that were visited, d = 0
included, so the loss never rises.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from awd_fast import statistics
from awd_fast.objective import Converge, Objective

START_RADIUS = 0.3  # mu at which the smoothed loss has few minima
POLISH_RADIUS = 1e-3
SHRINK = 0.2
ANNEAL_STEPS = 300
UNEQUAL = 0.25  # a shortest vector whose squared norm is below this part of the mean
TINY = 1e-300


@dataclass
class _Problem:
    """The scaled groups: vectors x [R, K, N] in N coordinates, eps [R], alpha [R], and the kinds of the terms."""

    x: Tensor
    eps: Tensor
    alpha: Tensor
    objective: Objective

    def select(self, index: Tensor) -> "_Problem":
        return _Problem(self.x[index], self.eps[index], self.alpha[index], self.objective)


@dataclass
class _Pairs:
    """Cosines and the slopes and curvatures of their smoothed similarity, all [R, K, K] or [R, K]."""

    u: Tensor  # [R, K, N] the shifted vectors
    scale: Tensor  # 1 / ((n_i + eps)(n_j + eps)), 0 on the diagonal and for zero vectors
    cosine: Tensor
    value: Tensor  # [R] mean similarity
    slope: Tensor  # d value / d c_ij, one ordered pair
    bend: Tensor  # d slope / d c_ij
    inverse: Tensor  # [R, K] 1 / n_i, 0 for zero vectors
    pull: Tensor  # [R, K] 1 / (n_i (n_i + eps))


def _pairs(problem: _Problem, y: Tensor, mu: Tensor) -> _Pairs:
    u = problem.x - y[:, None, :]
    gram = u @ u.mT
    k = gram.shape[-1]
    n = statistics.norms(gram)
    alive = n > TINY
    rho = torch.where(alive, 1.0 / (n + problem.eps[:, None]).clamp_min(TINY), 0.0)
    inverse = torch.where(alive, 1.0 / n.clamp_min(TINY), 0.0)
    off = 1.0 - torch.eye(k, dtype=gram.dtype, device=gram.device)
    scale = rho[:, :, None] * rho[:, None, :] * off
    c = gram * scale
    weight = statistics.pair_weight(k)
    if problem.objective.similarity == "squared":
        value, slope, bend = c.square(), 2.0 * c, 2.0 * off.expand_as(c)
    else:
        m = mu[:, None, None]
        root = (c.square() + m.square()).sqrt().clamp_min(TINY)
        value, slope, bend = (root - m) * off, c / root, m.square() / root**3 * off
    total = weight * value.sum(dim=(1, 2))
    return _Pairs(u, scale, c, total, weight * slope, weight * bend, inverse, rho * inverse)


def _penalty(problem: _Problem, y: Tensor, mu: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """alpha R(d), p and q [R]: its gradient is p y, its Hessian p I - q y y'; the norm is smoothed by mu / 10."""
    square = y.square().sum(dim=1)
    match problem.objective.penalty:
        case "l2":
            nu = 0.1 * mu
            root = (square + nu.square()).sqrt()
            p = torch.where(root > 0, problem.alpha / root.clamp_min(TINY), 0.0)
            return problem.alpha * (root - nu), p, torch.where(root > 0, p / root.clamp_min(TINY) ** 2, 0.0)
        case "squared_l2":
            return problem.alpha * square, 2.0 * problem.alpha, torch.zeros_like(square)
        case "l1":
            return problem.alpha * y.abs().sum(dim=1), torch.zeros_like(square), torch.zeros_like(square)
        case _:
            return torch.zeros_like(square), torch.zeros_like(square), torch.zeros_like(square)


def _value(problem: _Problem, y: Tensor, mu: Tensor) -> Tensor:
    """The smoothed loss [R] at y [R, N]; mu = 0 gives the loss itself."""
    return _pairs(problem, y, mu).value + _penalty(problem, y, mu)[0]


def _gradient(problem: _Problem, y: Tensor, mu: Tensor) -> tuple[Tensor, Tensor, _Pairs]:
    """The smoothed loss [R], its gradient [R, N] (that of an l1 penalty left out), and the pairs behind them.

    grad c_ij = beta_ij u_i + beta_ji u_j with beta_ij = -scale_ij + c_ij pull_i.
    """
    pairs = _pairs(problem, y, mu)
    beta = pairs.cosine * pairs.pull[:, :, None] - pairs.scale
    weights = 2.0 * (pairs.slope * beta).sum(dim=2)
    value, p, _ = _penalty(problem, y, mu)
    return pairs.value + value, torch.einsum("ri,rin->rn", weights, pairs.u) + p[:, None] * y, pairs


def _hessian(problem: _Problem, y: Tensor, mu: Tensor, pairs: _Pairs) -> Tensor:
    """The exact Hessian [R, N, N] of the smoothed loss: U' B U + h I and the penalty's, with B [K, K].

    Every derivative of a cosine is a combination of u_i and u_j:
    hess c_ij = (2 scale - c (a_i + a_j)) I - scale (p v' + v p') + c (v v' + g_i u_i u_i' + g_j u_j u_j'),
    with a = pull, p = u_i + u_j, v = a_i u_i + a_j u_j and g = a^2 + a / n^2.
    """
    c, scale, slope, bend = pairs.cosine, pairs.scale, pairs.slope, pairs.bend
    a_i, a_j = pairs.pull[:, :, None], pairs.pull[:, None, :]
    beta = c * a_i - scale
    g_i = a_i.square() + a_i * pairs.inverse[:, :, None].square()
    diagonal = bend * beta.square() + slope * (c * (a_i.square() + g_i) - 2.0 * scale * a_i)
    across = bend * beta * beta.mT + slope * (c * a_i * a_j - scale * (a_i + a_j))
    b = 2.0 * (across + torch.diag_embed(diagonal.sum(dim=2)))
    h = (slope * (2.0 * scale - c * (a_i + a_j))).sum(dim=(1, 2))
    _, p, q = _penalty(problem, y, mu)
    eye = torch.eye(y.shape[1], dtype=y.dtype, device=y.device)
    return pairs.u.mT @ b @ pairs.u + (h + p)[:, None, None] * eye - q[:, None, None] * y[:, :, None] * y[:, None, :]


@dataclass
class _Best:
    """The point of lowest unsmoothed loss seen so far in each group, and the total of those losses step by step."""

    y: Tensor
    value: Tensor
    history: list[float]

    def offer(self, problem: _Problem, index: Tensor, y: Tensor) -> None:
        value = _value(problem, y, y.new_zeros(len(y)))
        lower = value < self.value[index]
        self.value[index[lower]] = value[lower]
        self.y[index[lower]] = y[lower]
        self.history.append(float(self.value.sum()))


def _newton(problem: _Problem, start: Tensor, radius: float, optimizer: Converge, best: _Best, where: Tensor) -> None:
    """Way 1 of the module's docstring, from `start` [R, N]; every point visited is offered to `best` at `where` [R]."""
    groups, n = start.shape
    floor = 0.1 * optimizer.tolerance
    smooth = problem.objective.similarity == "squared" and problem.objective.penalty != "l2"
    mu = start.new_full((groups,), floor if smooth else max(radius, floor))
    damping = torch.full_like(mu, 1e-3)
    y = start.clone()
    active = torch.arange(groups, device=start.device)
    eye = torch.eye(n, dtype=start.dtype, device=start.device)
    for _ in range(optimizer.max_iterations):
        if not len(active):
            break
        part, at, radius_now = problem.select(active), y[active], mu[active]
        value, slope, pairs = _gradient(part, at, radius_now)
        hessian = _hessian(part, at, radius_now, pairs)
        size = hessian.diagonal(dim1=1, dim2=2).abs().mean(dim=1) + TINY
        factor, failed = torch.linalg.cholesky_ex(hessian + (damping[active] * size)[:, None, None] * eye)
        solvable = failed == 0
        factor = torch.where(solvable[:, None, None], factor, eye)
        step = -torch.cholesky_solve(slope[:, :, None], factor)[:, :, 0]
        trial = at + step
        drop = value - _value(part, trial, radius_now)
        model = -(slope * step).sum(dim=1) - 0.5 * torch.einsum("ri,rij,rj->r", step, hessian, step)
        good = solvable & (drop > 0)
        y[active] = torch.where(good[:, None], trial, at)
        best.offer(part, where[active], y[active])

        ratio = drop / model.clamp_min(TINY)
        change = torch.where(good & (ratio > 0.5), SHRINK, torch.where(good & (ratio > 0.1), 1.0, 1.0 / SHRINK))
        damping[active] = (damping[active] * change).clamp(1e-9, 1e12)
        flat = solvable & ~good & (model.abs() < 1e-3 * radius_now)
        settled = (good & (drop < 0.1 * radius_now)) | flat | (damping[active] > 1e10)
        finished = settled & (radius_now <= floor)
        mu[active] = torch.where(settled, (radius_now * SHRINK).clamp_min(floor), radius_now)
        damping[active] = torch.where(settled, damping[active].clamp_max(1.0), damping[active])
        active = active[~finished]


@dataclass(frozen=True)
class _Schedule:
    """Step sizes of an annealed descent, from `first` to `last`, times (squared norm of the shortest vector)^power."""

    first: float
    last: float
    momentum: float
    power: float


ALWAYS = (_Schedule(0.3, 1e-4, 0.9, 0.0),)
WHERE_POSITIVE = (_Schedule(3.0, 1e-3, 0.0, 0.0),)
WHERE_UNEQUAL = (_Schedule(0.3, 1e-4, 0.9, 0.5), _Schedule(0.3, 1e-4, 0.9, 1.0))


def _anneal(problem: _Problem, shortest: Tensor, schedule: _Schedule) -> Tensor:
    """Way 2 of the module's docstring: the best points [R, N] of a descent whose steps shrink.

    shortest: squared norm [R] of each group's shortest vector other than 0. An l1 penalty enters by its proximal step
    (soft threshold), so that elements of d become exactly 0.
    """
    groups, _, n = problem.x.shape
    y = problem.x.new_zeros(groups, n)
    velocity, point = y.clone(), y.clone()
    zero = problem.x.new_zeros(groups)
    lowest = torch.full_like(zero, torch.inf)
    size = shortest**schedule.power
    for index in range(ANNEAL_STEPS):
        step = size * schedule.first * (schedule.last / schedule.first) ** (index / (ANNEAL_STEPS - 1))
        value, slope, _ = _gradient(problem, y, zero)
        lower = value < lowest
        lowest = torch.where(lower, value, lowest)
        point = torch.where(lower[:, None], y, point)
        velocity = schedule.momentum * velocity + slope
        y = y - step[:, None] * velocity
        if problem.objective.penalty == "l1":
            threshold = (step / (1.0 - schedule.momentum) * problem.alpha)[:, None]
            y = y.sign() * (y.abs() - threshold).clamp_min(0.0)
    return point


def _descend_all(problem: _Problem, tolerance: float, optimizer: Converge | None, best: _Best) -> None:
    """Every annealed descent that a group needs, each polished by Newton steps if there is an `optimizer` for them."""
    squares = problem.x.square().sum(dim=2)
    shortest = torch.where(squares > TINY, squares, torch.inf).min(dim=1).values.clamp_max(1.0)
    everywhere = torch.ones_like(shortest, dtype=torch.bool)
    for schedules, wanted in ((ALWAYS, everywhere), (WHERE_POSITIVE, everywhere), (WHERE_UNEQUAL, shortest < UNEQUAL)):
        for schedule in schedules:
            open_ = wanted if schedules is ALWAYS else wanted & (best.value > tolerance)
            index = open_.nonzero()[:, 0]
            if not len(index):
                continue
            part = problem.select(index)
            point = _anneal(part, shortest[index], schedule)
            best.offer(part, index, point)
            if optimizer is not None:
                _newton(part, point, POLISH_RADIUS, optimizer, best, index)


def _scaled(vectors: Tensor, scale: Tensor, objective: Objective, total: int) -> _Problem:
    """The problem of one group's own mean similarity, with vectors divided by `scale` [R].

    total: the mean over groups divides the similarity by it; here it multiplies the penalty instead.
    """
    power = scale.square() if objective.penalty == "squared_l2" else scale
    alpha = torch.zeros_like(scale) if objective.penalty == "none" else objective.alpha * total * power
    return _Problem(vectors / scale[:, None, None], objective.eps / scale, alpha, objective)


def minimise_span(gram: Tensor, objective: Objective, optimizer: Converge, total: int) -> tuple[Tensor, list[float]]:
    """Coefficients a [R, K] of the minimising d = sum_j a_j t_j, and the loss after each step (shares of `total`).

    gram: [R, K, K] float64. total: number of groups of the parameter, of which `gram` may hold a part. The penalty must
    be Euclidean.
    """
    basis = statistics.factor(gram)
    scale = gram.diagonal(dim1=1, dim2=2).mean(dim=1).sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    problem = _scaled(basis, scale, objective, total)
    best = _start(problem)
    everywhere = torch.arange(len(gram), device=gram.device)
    _newton(problem, torch.zeros_like(best.y), START_RADIUS, optimizer, best, everywhere)
    _descend_all(problem, optimizer.tolerance, optimizer, best)
    coefficients = statistics.coefficients(basis, best.y * scale[:, None])
    return coefficients, [value / max(total, 1) for value in best.history]


def minimise_vectors(
    vectors: Tensor, objective: Objective, optimizer: Converge, total: int
) -> tuple[Tensor, list[float]]:
    """d [R, D] for penalties that leave the span (l1), by annealed proximal descent, and the loss after each step.

    vectors: t [R, K, D]. Criterion: the fixed schedules of 300 shrinking steps each (way 2 above without the polish,
    whose Newton steps an l1 penalty does not allow); the best point seen is returned. max_iterations is not used.
    """
    t = vectors.double()
    scale = t.square().sum(dim=-1).mean(dim=1).sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    problem = _scaled(t, scale, objective, total)
    best = _start(problem)
    _descend_all(problem, optimizer.tolerance, None, best)
    return (best.y * scale[:, None]).to(vectors.dtype), [value / max(total, 1) for value in best.history]


def _start(problem: _Problem) -> _Best:
    groups, _, n = problem.x.shape
    y = problem.x.new_zeros(groups, n)
    value = _value(problem, y, y.new_zeros(groups))
    return _Best(y, value, [float(value.sum())])
