// Dense K x K algebra in the lanes of a Number: symmetric eigenvalues, Cholesky factor and solve. Included as number.h is.

// Eigenvalues [k] and eigenvectors (columns of [k][k]) of a symmetric matrix [k][k], which is destroyed. Cyclic Jacobi; a
// lane whose off-diagonal is negligible stays as it is while others go on.
static inline void eigen_symmetric(Number* __restrict matrix, int k, Number* __restrict values,
                                   Number* __restrict vectors) {
    const Number zero = every(0.0), one = every(1.0);
    Number largest = zero;
    for (int i = 0; i < k; ++i) {
        for (int j = 0; j < k; ++j) vectors[i * k + j] = i == j ? one : zero;
        largest = larger(largest, magnitude(matrix[i * k + i]));
    }
    const Number negligible = 1e-20 * largest;
    bool rotated = true;
    for (int sweep = 0; rotated && sweep < 60; ++sweep) {
        rotated = false;
        for (int p = 0; p < k; ++p) {
            for (int q = p + 1; q < k; ++q) {
                const Number off = matrix[p * k + q];
                const auto needed = magnitude(off) > negligible;
                if (!any(needed)) continue;
                rotated = true;
                const Number theta = (matrix[q * k + q] - matrix[p * k + p]) / (2.0 * (needed ? off : one));
                const Number size = one / (magnitude(theta) + square_root(theta * theta + one));
                const Number tangent = needed ? (theta < zero ? -size : size) : zero;
                const Number cosine = one / square_root(tangent * tangent + one);
                const Number sine = tangent * cosine;
                matrix[p * k + p] -= tangent * off;
                matrix[q * k + q] += tangent * off;
                matrix[p * k + q] = matrix[q * k + p] = needed ? zero : off;
                for (int i = 0; i < k; ++i) {
                    if (i != p && i != q) {
                        const Number left = matrix[i * k + p], right = matrix[i * k + q];
                        matrix[i * k + p] = matrix[p * k + i] = cosine * left - sine * right;
                        matrix[i * k + q] = matrix[q * k + i] = sine * left + cosine * right;
                    }
                    const Number left = vectors[i * k + p], right = vectors[i * k + q];
                    vectors[i * k + p] = cosine * left - sine * right;
                    vectors[i * k + q] = sine * left + cosine * right;
                }
            }
        }
    }
    for (int i = 0; i < k; ++i) values[i] = matrix[i * k + i];
}

// The lower factor of matrix + shift I, both [k][k], from the lower triangle; returns in which lanes every pivot was
// positive. Where one was not, the factor means nothing.
static inline auto factor_cholesky(const Number* __restrict matrix, Number shift, int k, Number* __restrict factor) {
    const Number zero = every(0.0), one = every(1.0);
    auto positive = zero == zero;
    for (int j = 0; j < k; ++j) {
        Number pivot = matrix[j * k + j] + shift;
        for (int m = 0; m < j; ++m) pivot -= factor[j * k + m] * factor[j * k + m];
        positive = positive & (pivot > zero);
        const Number root = square_root(pivot > zero ? pivot : one);
        const Number inverse = one / root;
        factor[j * k + j] = root;
        for (int i = j + 1; i < k; ++i) {
            Number sum = matrix[i * k + j];
            for (int m = 0; m < j; ++m) sum -= factor[i * k + m] * factor[j * k + m];
            factor[i * k + j] = sum * inverse;
        }
    }
    return positive;
}

// Solves L L' out = right side, in place.
static inline void solve_cholesky(const Number* __restrict factor, int k, Number* __restrict out) {
    for (int i = 0; i < k; ++i) {
        Number sum = out[i];
        for (int m = 0; m < i; ++m) sum -= factor[i * k + m] * out[m];
        out[i] = sum / factor[i * k + i];
    }
    for (int i = k - 1; i >= 0; --i) {
        Number sum = out[i];
        for (int m = i + 1; m < k; ++m) sum -= factor[m * k + i] * out[m];
        out[i] = sum / factor[i * k + i];
    }
}
