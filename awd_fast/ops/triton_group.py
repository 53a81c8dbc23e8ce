"""The K x K mathematics of groups in Triton: awd_fast/statistics.py for blocks [B, KP, KP] float64 in registers.

Rows and columns behind the K-th are padding: their entries of G and L are 0, and no pair has them.
"""

import triton
import triton.language as tl


@triton.jit
def pairs(B: tl.constexpr, K: tl.constexpr, KP: tl.constexpr):
    """Which entries [1, KP, KP] are a pair of two vectors, which the mean over pairs counts twice."""
    i = tl.arange(0, KP)[None, :, None]
    j = tl.arange(0, KP)[None, None, :]
    return (i != j) & (i < K) & (j < K)


@triton.jit
def similarity(gram, inner, square, eps, K: tl.constexpr, KP: tl.constexpr, SQUARED: tl.constexpr):
    """S [B], and r [B, KP] = M 1, of the vectors t_i - d: from G, b_i = <t_i, d> [B, KP] and s = <d, d> [B]."""
    after = gram - inner[:, :, None] - inner[:, None, :] + square[:, None, None]
    pair = pairs(1, K, KP)
    diagonal = (tl.arange(0, KP)[:, None] == tl.arange(0, KP)[None, :])[None, :, :]
    norm = tl.sum(tl.where(diagonal, after, 0.0), 2)
    alive = norm > 0.0  # rounding may make the square of a norm negative, which counts as 0
    norm = tl.sqrt(tl.where(alive, norm, 1.0))
    inverse = tl.where(alive, 1.0 / (norm + eps), 0.0)
    closing = tl.where(alive, inverse / norm, 0.0)
    cosine = tl.where(pair, after * inverse[:, :, None] * inverse[:, None, :], 0.0)
    if SQUARED:
        value = cosine * cosine
        slope = 2.0 * cosine
    else:
        value = tl.abs(cosine)
        slope = tl.where(cosine > 0.0, 1.0, tl.where(cosine < 0.0, -1.0, cosine))  # sign(0) = 0, sign(NaN) = NaN
    across = tl.sum(slope * inverse[:, None, :], 2) * inverse
    along = tl.sum(slope * cosine, 2) * closing
    # Dividing by a whole number is exact about the number: Triton 3.0 rounds its fraction to float32.
    COUNT: tl.constexpr = K * (K - 1) if K > 1 else 1
    return tl.sum(tl.sum(value, 2), 1) / (1.0 * COUNT), (across - along) / (1.0 * COUNT)


@triton.jit
def defect(gram):
    """0, or NaN where an entry of G is not finite: added to a loss that the choices above would hide it from."""
    return tl.sum(tl.sum(gram * 0.0, 2), 1)


@triton.jit
def penalty(square, PENALTY: tl.constexpr):
    """R(d) of no penalty, the norm, its square; and p with R'(d) = p d, 0 at d = 0, where the norm has no gradient."""
    if PENALTY == 1:
        alive = square > 0.0
        root = tl.sqrt(tl.where(alive, square, 1.0))
        value = tl.where(alive, root, square * 0.0)
        slope = tl.where(alive, 1.0 / root, 0.0)
    elif PENALTY == 2:
        value = square
        slope = square * 0.0 + 2.0
    else:
        value = square * 0.0
        slope = square * 0.0
    return value, slope


@triton.jit
def factor(gram, K: tl.constexpr, KP: tl.constexpr):
    """L [B, KP, KP], lower triangular with G = L L', by Gram and Schmidt: see `statistics.factor`."""
    i = tl.arange(0, KP)[None, :, None]
    k = tl.arange(0, KP)[None, None, :]
    row = tl.arange(0, KP)[None, :]
    basis = gram * 0.0
    for j in range(K):
        own = tl.sum(tl.where(i == j, basis, 0.0), 1)  # row j
        rest = tl.sum(tl.where(k == j, gram, 0.0), 2) - tl.sum(basis * own[:, None, :], 2)
        pivot = tl.sum(tl.where(row == j, rest, 0.0), 1)
        first = tl.sum(tl.sum(tl.where((i == j) & (k == j), gram, 0.0), 2), 1)
        adds = pivot > (16.0 * K * 2.220446049250313e-16) * first
        scale = tl.where(adds, 1.0 / tl.sqrt(tl.where(adds, pivot, 1.0)), 0.0)
        found = tl.where((row >= j) & adds[:, None], rest * scale[:, None], 0.0)
        basis = tl.where(k == j, found[:, :, None], basis)
    return basis


@triton.jit
def coefficients(basis, coordinates, K: tl.constexpr, KP: tl.constexpr):
    """a [B, KP] with d = sum_j a_j t_j, from L and the coordinates of d; 0 for a vector that adds no coordinate."""
    k = tl.arange(0, KP)[None, None, :]
    row = tl.arange(0, KP)[None, :]
    found = coordinates * 0.0
    for step in range(K):
        j = K - 1 - step
        column = tl.sum(tl.where(k == j, basis, 0.0), 2)
        pivot = tl.sum(tl.where(row == j, column, 0.0), 1)
        rest = tl.sum(tl.where(row == j, coordinates, 0.0), 1) - tl.sum(tl.where(row > j, column * found, 0.0), 1)
        value = tl.where(pivot > 0.0, rest / tl.where(pivot > 0.0, pivot, 1.0), 0.0)
        found = tl.where(row == j, value[:, None], found)
    return found
