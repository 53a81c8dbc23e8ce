// Triangular K x K algebra in the lanes of a Number; matrices are row-major [k][k]. Included as number.h is.

#include "group.h"
#include "number.h"

#ifndef AWD_SMALL_MATRIX
#define AWD_SMALL_MATRIX

// L [k][k], lower triangular with G = L L': row i holds the coordinates of t_i in the orthonormal basis of Gram and
// Schmidt. A vector that depends on the earlier ones (to rounding) adds no coordinate: its column is 0.
template <class Matrix, class Stored>
AWD_INLINE void factor_gram(const Matrix* __restrict gram, int k, Stored* __restrict basis) {
    const Number zero = every(0.0);
    const double negligible = 16.0 * k * 2.220446049250313e-16;
    AWD_UNROLL_ON_DEVICE
    for (int j = 0; j < k; ++j) {
        Number pivot = gram[j * k + j];
        AWD_UNROLL_ON_DEVICE
        for (int m = 0; m < k; ++m)
            if (m < j) pivot -= basis[j * k + m] * basis[j * k + m];
        const auto adds = pivot > negligible * gram[j * k + j];
        const Number root = square_root(adds ? larger(pivot, every(SMALLEST)) : every(1.0));
        AWD_UNROLL_ON_DEVICE
        for (int i = 0; i < k; ++i)
            if (i < j) basis[i * k + j] = zero;
        const Number inverse = reciprocal(root);
        basis[j * k + j] = adds ? root : zero;
        AWD_UNROLL_ON_DEVICE
        for (int i = 0; i < k; ++i)
            if (i > j) {
                Number rest = gram[i * k + j];
                AWD_UNROLL_ON_DEVICE
                for (int m = 0; m < k; ++m)
                    if (m < j) rest -= basis[i * k + m] * basis[j * k + m];
                basis[i * k + j] = adds ? rest * inverse : zero;
            }
    }
}

// a [k] with d = sum_j a_j t_j, from L and the coordinates y = L' a of d. A vector that adds no coordinate has 0.
template <class Matrix, class Vector, class Stored>
AWD_INLINE void span_coefficients(const Matrix* __restrict basis, const Vector* __restrict coordinates, int k,
                                  Stored* __restrict a) {
    const Number zero = every(0.0), one = every(1.0);
    AWD_UNROLL_ON_DEVICE
    for (int j = k - 1; j >= 0; --j) {
        Number rest = coordinates[j];
        AWD_UNROLL_ON_DEVICE
        for (int i = 0; i < k; ++i)
            if (i > j) rest -= basis[i * k + j] * a[i];
        const Number pivot = basis[j * k + j];
        a[j] = pivot > zero ? rest * reciprocal(pivot > zero ? pivot : one) : zero;
    }
}

// The lower factor of matrix + shift I, both [k][k], from the lower triangle, with the inverses of its diagonal in the
// diagonal's place; returns in which lanes every pivot was positive. Where one was not, the factor means nothing.
template <class Stored>
AWD_INLINE auto factor_cholesky(const Stored* __restrict matrix, Number shift, int k, Stored* __restrict factor) {
    const Number zero = every(0.0);
    auto positive = zero == zero;
    AWD_UNROLL
    for (int j = 0; j < k; ++j) {
        Number pivot = matrix[j * k + j] + shift;
        AWD_UNROLL
        for (int m = 0; m < j; ++m) pivot -= factor[j * k + m] * factor[j * k + m];
        positive = positive & (pivot > every(SMALLEST));
        const Number inverse = inverse_root(larger(pivot, every(SMALLEST)));
        factor[j * k + j] = inverse;
        AWD_UNROLL
        for (int i = j + 1; i < k; ++i) {
            Number sum = matrix[i * k + j];
            AWD_UNROLL
            for (int m = 0; m < j; ++m) sum -= factor[i * k + m] * factor[j * k + m];
            factor[i * k + j] = sum * inverse;
        }
    }
    return positive;
}

// Solves L L' out = right side, in place, with the factor of factor_cholesky.
template <class Stored>
AWD_INLINE void solve_cholesky(const Stored* __restrict factor, int k, Stored* __restrict out) {
    AWD_UNROLL
    for (int i = 0; i < k; ++i) {
        Number sum = out[i];
        AWD_UNROLL
        for (int m = 0; m < i; ++m) sum -= factor[i * k + m] * out[m];
        out[i] = sum * factor[i * k + i];
    }
    AWD_UNROLL
    for (int i = k - 1; i >= 0; --i) {
        Number sum = out[i];
        AWD_UNROLL
        for (int m = i + 1; m < k; ++m) sum -= factor[m * k + i] * out[m];
        out[i] = sum * factor[i * k + i];
    }
}

#endif
