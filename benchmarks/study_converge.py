"""How often Converge ends above the best of SGD, group by group, on random vectors.

    python -m benchmarks.study_converge [--groups 100] [--backend reference]

For each kind of vectors it prints how many groups end more than 1e-4 above the lowest loss that any of ten SGD runs
(step sizes from 1e-4 to 0.8 of the mean squared norm, momentum 0.9) reaches at any of 300 iterations, the largest such
gap, and the mean difference over all groups (negative: Converge is lower).
"""

import argparse

import torch
from torch import Tensor

from awd_fast import ops, statistics
from awd_fast.objective import SGD, Converge, Objective, Similarity
from awd_fast.ops.reference import SpanDescent

STEP_SIZES = [1e-4 * 2.7**power for power in range(10)]
ITERATIONS = 300
TOLERANCE = 1e-4


def group_losses(gram: Tensor, basis: Tensor, coordinates: Tensor, objective: Objective) -> Tensor:
    """The loss [R] of each group taken alone."""
    return statistics.span_loss(gram, basis, coordinates, objective, 1)


def best_of_sgd(gram: Tensor, objective: Objective) -> Tensor:
    """The lowest loss [R] that each group reaches in any run at any iteration."""
    size = gram.diagonal(dim1=1, dim2=2).mean(dim=1).sqrt()
    scaled = gram / size.square()[:, None, None]  # one step size means the same for every group
    best = torch.full((len(gram),), torch.inf, dtype=torch.float64)
    for lr in STEP_SIZES:
        descent = SpanDescent(scaled, objective, SGD(lr=lr, momentum=0.9, weight_decay=0.0), 1)
        for _ in range(ITERATIONS + 1):
            best = torch.minimum(best, group_losses(scaled, descent.basis, descent.coordinates, objective))
            descent.step()
    return best


def converged(gram: Tensor, objective: Objective, backend: str | None) -> Tensor:
    """The loss [R] of each group after Converge."""
    found, _ = ops.descend(gram, objective, Converge(), backend=backend)
    inner, square = statistics.span_moments(gram, found)
    return statistics.similarity(statistics.shifted_gram(gram, inner, square), objective)


def study(groups: int, backend: str | None) -> None:
    """Prints one row per similarity, kind of norms, K and D."""
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    similarities: tuple[Similarity, ...] = ("absolute", "squared")
    print(f"{'similarity':>10} {'norms':>8} {'K':>3} {'D':>4} {'above':>6} {'largest':>9} {'mean':>9}")
    for similarity in similarities:
        objective = Objective(similarity=similarity, penalty="none", alpha=0.0)
        for norms in ("alike", "unequal"):
            for k in (3, 5, 8):
                for d in (3, 16, 64, 400):
                    vectors = normal(groups, k, d) + 0.4 * normal(groups, 1, d)
                    if norms == "unequal":
                        vectors = vectors * torch.exp(1.2 * normal(groups, k, 1))
                    gram = statistics.gram(vectors)
                    gap = converged(gram, objective, backend) - best_of_sgd(gram, objective)
                    above, largest, mean = int((gap > TOLERANCE).sum()), float(gap.max()), float(gap.mean())
                    print(
                        f"{similarity:>10} {norms:>8} {k:>3} {d:>4} {above:>6} {largest:>9.5f} {mean:>9.5f}", flush=True
                    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=100)
    parser.add_argument("--backend", default=None)
    arguments = parser.parse_args()
    study(arguments.groups, arguments.backend)
