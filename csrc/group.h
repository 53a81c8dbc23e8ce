// The mathematics of one group: everything about its loss is in G = [<t_i, t_j>], K x K. See awd_fast/statistics.py.
//
// d has coordinates y [K] in the orthonormal basis in which row i of L (G = L L', see small_matrix.h) is t_i. With b =
// L y and s = y' y, the vectors t_i - d have
//     G'_ij = G_ij - b_i - b_j + s,   n_i = sqrt(G'_ii),   c_ij = G'_ij / ((n_i + eps)(n_j + eps)), 0 where a norm is 0
//     S     = mean over pairs i < j of |c_ij| or c_ij^2
//     dL/dd = (2 sum_i r_i + alpha p) y - 2 L' r,   r = row sums of dS/dG' (over `total`),   R'(d) = p d
// Matrices are row-major [K][K]. Included as number.h is.

#include "number.h"

#ifndef AWD_GROUP
#define AWD_GROUP

constexpr double SMALLEST = 2.2250738585072014e-308;

// The weight of one unordered pair in the mean over pairs; K = 1 has none.
AWD_INLINE double pair_weight(int k) { return k > 1 ? 2.0 / (double(k) * (k - 1)) : 0.0; }

// 0, or NaN where an entry of G is not finite: added to a loss that the selects below would hide it from.
template <class Stored>
AWD_INLINE Number defect(const Stored* __restrict gram, int k) {
    Number sum = every(0.0);
    for (int index = 0; index < k * k; ++index) sum += gram[index] * 0.0;
    return sum;
}

// e = L y - s / 2, with which G'_ij = G_ij - e_i - e_j; and s = y' y as the result.
template <class Matrix, class Vector, class Stored>
AWD_INLINE Number span_moments(const Matrix* __restrict basis, const Vector* __restrict y, int k,
                               Stored* __restrict offset) {
    Number square = every(0.0);
    AWD_UNROLL
    for (int i = 0; i < k; ++i) square += y[i] * y[i];
    const Number half = 0.5 * square;
    AWD_UNROLL
    for (int i = 0; i < k; ++i) {
        Number sum = basis[i * k] * y[0] - half;
        AWD_UNROLL
        for (int m = 1; m <= i; ++m) sum += basis[i * k + m] * y[m];
        offset[i] = sum;
    }
    return square;
}

// Room for the work on one group: [K] each.
template <class Stored>
struct GroupWorkOf {
    Stored* __restrict offset;   // e
    Stored* __restrict inverse;  // 1 / (n_i + eps), 0 for a vector of norm 0
    Stored* __restrict closing;  // 1 / (n_i (n_i + eps)), the same
    Stored* __restrict across;   // sum_j slope_ij / (n_j + eps)
    Stored* __restrict along;    // sum_j slope_ij c_ij (n_i + eps)
    Stored* __restrict weight;   // 1 / (n_i + eps)^2, of squared similarities only

    // Room for 6 K numbers.
    AWD_DEVICE static GroupWorkOf at(Stored* room, int k) {
        return {room, room + k, room + 2 * k, room + 3 * k, room + 4 * k, room + 5 * k};
    }
};
using GroupWork = GroupWorkOf<Number>;

// 1 / n, 1 / (n + eps) and 1 / (n (n + eps)) of a vector with n^2 = `shifted`; 0 for one of norm 0, as which one counts
// whose square rounding made negative. Eps: double or Number.
template <class Eps>
AWD_INLINE void inverse_norm(Number shifted, const Eps& eps, Number& root, Number& inverse, Number& closing) {
    const auto alive = shifted > every(SMALLEST);
    root = inverse_root(shifted);
    inverse = where(alive, reciprocal(shifted * root + eps));
    closing = where(alive, inverse * root);
    root = where(alive, root);
}

template <class Matrix, class Stored, class Eps>
AWD_INLINE void inverse_norms(const Matrix* __restrict gram, int k, const Eps& eps, const GroupWorkOf<Stored>& work) {
    AWD_UNROLL
    for (int i = 0; i < k; ++i) {
        Number root, inverse, closing;
        inverse_norm(gram[i * k + i] - 2.0 * work.offset[i], eps, root, inverse, closing);
        work.inverse[i] = inverse;
        work.closing[i] = closing;
    }
}

// S, and the sums behind r in work.across and work.along; a squared similarity's slope is counted half. `zeros`:
// vectors may be exactly orthogonal, so that sign(0) = 0 matters.
template <class Matrix, class Stored>
AWD_INLINE Number similarity(const Matrix* __restrict gram, int k, Similarity kind, bool zeros,
                             const GroupWorkOf<Stored>& work) {
    const bool squared = kind == Similarity::squared;
    Stored* const weight = squared ? work.weight : work.inverse;
    AWD_UNROLL
    for (int i = 0; i < k; ++i) {
        work.across[i] = every(0.0);
        work.along[i] = every(0.0);
        if (squared) weight[i] = work.inverse[i] * work.inverse[i];
    }
    AWD_UNROLL
    for (int i = 1; i < k; ++i) {
        Number across = every(0.0), along = every(0.0);
        const Number offset = work.offset[i], own = weight[i];
        AWD_UNROLL
        for (int j = 0; j < i; ++j) {
            const Number product = (gram[i * k + j] - offset) - work.offset[j];
            if (squared) {  // over n_i + eps
                const Number here = weight[j] * product, there = own * product;
                across += here;
                along += here * product;
                work.across[j] += there;
                work.along[j] += there * product;
            } else {
                const Number here = zeros ? signed_as(weight[j], product) : flipped_as(weight[j], product);
                const Number there = zeros ? signed_as(own, product) : flipped_as(own, product);
                across += here;
                along += here * product;
                work.across[j] += there;
                work.along[j] += there * product;
            }
        }
        work.across[i] += across;
        work.along[i] += along;
    }
    Number sum = every(0.0);
    AWD_UNROLL
    for (int i = 0; i < k; ++i) {
        if (squared) {
            work.across[i] *= work.inverse[i];
            work.along[i] *= work.inverse[i];
        }
        sum += work.along[i] * work.inverse[i];
    }
    return sum * (0.5 * pair_weight(k));
}

// The same with literals, so that each case is free of conditions.
template <class Matrix, class Stored>
AWD_INLINE Number similarity_of(const Matrix* __restrict gram, int k, Similarity kind, bool zeros,
                                const GroupWorkOf<Stored>& work) {
    if (kind == Similarity::squared) return similarity(gram, k, Similarity::squared, false, work);
    return zeros ? similarity(gram, k, Similarity::absolute, true, work)
                 : similarity(gram, k, Similarity::absolute, false, work);
}

// The sums behind r_i alone, where every vector has a lane of its own: across and along as in GroupWork, over all
// vectors j but i. weights: 1 / (n_j + eps), squared for squared similarities. Returns the vector's share of S.
template <class Stored>
AWD_INLINE Number row_similarity(const Stored* __restrict gram, int i, int k, Similarity kind,
                                 const Stored* __restrict offset, const Stored* __restrict weights, Number inverse,
                                 Number& across, Number& along) {
    across = every(0.0);
    along = every(0.0);
    for (int j = 0; j < k; ++j) {
        const Number product = (gram[i * k + j] - offset[i]) - offset[j];
        const Number weight = j == i ? every(0.0) : Number(weights[j]);
        const Number here = kind == Similarity::squared ? weight * product : signed_as(weight, product);
        across += here;
        along += here * product;
    }
    if (kind == Similarity::squared) {
        across *= inverse;
        along *= inverse;
    }
    return along * inverse * (0.5 * pair_weight(k));
}

// R(d) of a Euclidean penalty, from s = <d, d>.
AWD_INLINE Number penalty(Number square, Penalty kind) {
    if (kind == Penalty::l2) return where(square > every(SMALLEST), square * inverse_root(square));
    return kind == Penalty::squared_l2 ? square : every(0.0);
}

// p with R'(d) = p d; 0 at d = 0, where the norm has no gradient.
AWD_INLINE Number penalty_slope(Number square, Penalty kind) {
    if (kind == Penalty::l2) return where(square > every(SMALLEST), inverse_root(square));
    return kind == Penalty::squared_l2 ? every(2.0) : every(0.0);
}

// One group's share of the loss, from S and s = <d, d>.
AWD_INLINE Number span_loss(Number mean, Number square, const Objective& objective) {
    return mean * (1.0 / objective.total) + objective.alpha * penalty(square, objective.penalty);
}

// r_i over this factor, which is left to the caller.
AWD_INLINE double pull_weight(int k, Similarity kind, double total) {
    return (kind == Similarity::absolute ? 0.5 : 1.0) * pair_weight(k) / total;
}
AWD_INLINE Number pull(Number inverse, Number closing, Number across, Number along) {
    return inverse * (across - along * closing);
}
template <class Stored>
AWD_INLINE Number pull(const GroupWorkOf<Stored>& work, int i) {
    return pull(work.inverse[i], work.closing[i], work.across[i], work.along[i]);
}

// slope [K] = the coordinates of dL/dd at y, after the functions above at the same y. weight: pull_weight; along: what
// multiplies d in the gradient beside 2 sum_i r_i.
template <class Matrix, class Vector, class Stored>
AWD_INLINE void span_slope(const Matrix* __restrict basis, const Vector* __restrict y, int k, double weight,
                           Number along, const GroupWorkOf<Stored>& work, Stored* __restrict slope) {
    Number sum = every(0.0);
    AWD_UNROLL
    for (int i = 0; i < k; ++i) {
        const Number pulled = pull(work, i);
        work.along[i] = pulled;
        sum += pulled;
    }
    const Number multiple = (2.0 * weight) * sum + along;
    AWD_UNROLL
    for (int n = 0; n < k; ++n) {
        Number pulled = every(0.0);
        AWD_UNROLL
        for (int i = n; i < k; ++i) pulled += basis[i * k + n] * work.along[i];
        slope[n] = multiple * y[n] - (2.0 * weight) * pulled;
    }
}

// One step of torch.optim.SGD on the coordinates y with the slope there. velocity starts at 0.
template <class Stored, class Vector, class Moving>
AWD_INLINE void sgd_step(const Stored* __restrict slope, Vector* __restrict y, Moving* __restrict velocity, int k,
                         const Sgd& options) {
    AWD_UNROLL
    for (int n = 0; n < k; ++n) {
        const Number moved = options.momentum * velocity[n] + slope[n];
        velocity[n] = moved;
        y[n] -= options.lr * (options.nesterov ? slope[n] + options.momentum * moved : moved);
    }
}

#endif
