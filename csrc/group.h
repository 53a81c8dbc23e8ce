// The mathematics of one group: everything about its loss is in G = [<t_i, t_j>], K x K. See awd_fast/statistics.py.
//
// d has coordinates y [K] in the orthonormal basis in which row i of L (G = L L', see small_matrix.h) is t_i. With b =
// L y and s = y' y, the vectors t_i - d have
//     G'_ij = G_ij - b_i - b_j + s,   n_i = sqrt(G'_ii),   c_ij = G'_ij / ((n_i + eps)(n_j + eps)), 0 where a norm is 0
//     S     = mean over pairs i < j of |c_ij| or c_ij^2
//     dL/dd = (2 sum_i r_i + alpha p) y - 2 L' r,   r = row sums of dS/dG' (over `total`),   R'(d) = p d
// Matrices are row-major [K][K]. Included as number.h is.

constexpr double SMALLEST = 2.2250738585072014e-308;

// The weight of one unordered pair in the mean over pairs; K = 1 has none.
AWD_INLINE double pair_weight(int k) { return k > 1 ? 2.0 / (double(k) * (k - 1)) : 0.0; }

// 0, or NaN where an entry of G is not finite: added to a loss that the selects below would hide it from.
AWD_INLINE Number defect(const Number* __restrict gram, int k) {
    Number sum = every(0.0);
    for (int index = 0; index < k * k; ++index) sum += gram[index] * 0.0;
    return sum;
}

// b = L y, and s = y' y as the result.
AWD_INLINE Number span_moments(const Number* __restrict basis, const Number* __restrict y, int k,
                               Number* __restrict inner) {
    Number square = every(0.0);
    for (int i = 0; i < k; ++i) {
        Number sum = every(0.0);
        for (int m = 0; m <= i; ++m) sum += basis[i * k + m] * y[m];
        inner[i] = sum;
        square += y[i] * y[i];
    }
    return square;
}

// Room for the work on one group: [K] each.
struct GroupWork {
    Number* __restrict inner;    // b
    Number* __restrict inverse;  // 1 / (n_i + eps), 0 for a vector of norm 0
    Number* __restrict closing;  // 1 / (n_i (n_i + eps))
    Number* __restrict across;   // sum_j slope_ij / (n_j + eps)
    Number* __restrict along;    // sum_j slope_ij c_ij
};

// Inverses of the norms of t_i - d; a diagonal that rounding made negative counts as 0.
AWD_INLINE void inverse_norms(const Number* __restrict gram, Number square, int k, double eps, const GroupWork& work) {
    const Number zero = every(0.0), one = every(1.0), tiny = every(SMALLEST);
    for (int i = 0; i < k; ++i) {
        const Number shifted = gram[i * k + i] - work.inner[i] - work.inner[i] + square;
        const Number norm = square_root(larger(shifted, zero));
        const Number inverse = one / larger(norm + eps, tiny);
        work.inverse[i] = norm > zero ? inverse : zero;
        work.closing[i] = norm > zero ? inverse / larger(norm, tiny) : zero;
    }
}

// S, and the sums behind r in work.across and work.along.
AWD_INLINE Number similarity(const Number* __restrict gram, Number square, int k, Similarity kind,
                             const GroupWork& work) {
    for (int i = 0; i < k; ++i) work.across[i] = work.along[i] = every(0.0);
    Number sum = every(0.0);
    for (int i = 1; i < k; ++i) {
        Number across = every(0.0), along = every(0.0);
        const Number inner = work.inner[i], inverse = work.inverse[i];
        for (int j = 0; j < i; ++j) {
            const Number cosine = (gram[i * k + j] - inner - work.inner[j] + square) * inverse * work.inverse[j];
            const Number slope = kind == Similarity::absolute ? sign(cosine) : 2.0 * cosine;
            const Number product = slope * cosine;
            across += slope * work.inverse[j];
            work.across[j] += slope * inverse;
            along += product;
            work.along[j] += product;
        }
        work.across[i] += across;
        work.along[i] += along;
        sum += along;
    }
    // slope * c is |c| or 2 c^2.
    return sum * (kind == Similarity::absolute ? pair_weight(k) : 0.5 * pair_weight(k));
}

// r_i, before the division by the number of groups.
AWD_INLINE Number pull(const GroupWork& work, int i, int k) {
    return 0.5 * pair_weight(k) * (work.across[i] * work.inverse[i] - work.along[i] * work.closing[i]);
}

// R(d) of a Euclidean penalty, from s = <d, d>.
AWD_INLINE Number penalty(Number square, Penalty kind) {
    if (kind == Penalty::l2) return square_root(square);
    return kind == Penalty::squared_l2 ? square : every(0.0);
}

// p with R'(d) = p d; 0 at d = 0, where the norm has no gradient.
AWD_INLINE Number penalty_slope(Number square, Penalty kind) {
    const Number zero = every(0.0);
    if (kind == Penalty::l2) return square > zero ? 1.0 / square_root(larger(square, every(SMALLEST))) : zero;
    return kind == Penalty::squared_l2 ? every(2.0) : zero;
}

// One group's share of the loss at the d with coordinates y; fills `work` for sgd_step, and `square` with s.
AWD_INLINE Number span_loss(const Number* __restrict gram, const Number* __restrict basis, const Number* __restrict y,
                            int k, const Objective& objective, const GroupWork& work, Number& square) {
    square = span_moments(basis, y, k, work.inner);
    inverse_norms(gram, square, k, objective.eps, work);
    const Number mean = similarity(gram, square, k, objective.similarity, work);
    return mean / objective.total + objective.alpha * penalty(square, objective.penalty);
}

// One step of torch.optim.SGD on the coordinates y, after span_loss at the same y. velocity starts at 0.
AWD_INLINE void sgd_step(const Number* __restrict basis, Number* __restrict y, Number* __restrict velocity, int k,
                         const Objective& objective, const Sgd& options, const GroupWork& work, Number square) {
    Number sum = every(0.0);
    for (int i = 0; i < k; ++i) {
        work.along[i] = pull(work, i, k) / objective.total;
        sum += work.along[i];
    }
    const Number multiple = 2.0 * sum + objective.alpha * penalty_slope(square, objective.penalty);
    for (int n = 0; n < k; ++n) {
        Number pulled = every(0.0);
        for (int i = n; i < k; ++i) pulled += basis[i * k + n] * work.along[i];
        Number move = multiple * y[n] - 2.0 * pulled + options.weight_decay * y[n];
        if (options.momentum != 0.0) {
            velocity[n] = options.momentum * velocity[n] + move;
            move = options.nesterov ? move + options.momentum * velocity[n] : velocity[n];
        }
        y[n] -= options.lr * move;
    }
}
