// Numbers that hold one group per lane, so that the mathematics of a group is written once and runs on several at a
// time.
//
// The including file defines, in its own namespace, `Number` (a double, or a vector of LANES doubles) and LANES; for a
// double also any_lane, near_reciprocal, near_inverse_root and with_sign_of. What is kept in memory may be another
// type, `Stored`, that converts to a Number and takes one. This header and those that include it are included once per
// instruction set by the CPU kernels, each time inside a namespace of its own, so that the linker can never give one
// set's code to another; foreach_isa.h lifts their guards in between.
//
// Conditions are written as selects: lanes never branch, and what happens in one lane does not depend on the others.

#ifndef AWD_NUMBER
#define AWD_NUMBER

#if defined(__CUDACC__)
#define AWD_INLINE static __device__ __forceinline__
#define AWD_OUTLINE static __device__ __forceinline__
#define AWD_DEVICE __device__
#define AWD_UNROLL _Pragma("unroll")
#define AWD_UNROLL_ON_DEVICE AWD_UNROLL
#else
#define AWD_INLINE static inline __attribute__((always_inline))
#define AWD_OUTLINE static inline
#define AWD_DEVICE
#define AWD_UNROLL _Pragma("GCC unroll 8")
#define AWD_UNROLL_ON_DEVICE
#endif

#ifndef AWD_VECTOR_LANES  // a GPU: Number is a double, and the lanes of a warp are the groups side by side

AWD_INLINE Number every(double value) { return value; }
AWD_INLINE bool any(bool mask) { return any_lane(mask); }
AWD_INLINE bool opposite(bool mask) { return !mask; }
AWD_INLINE Number where(bool mask, Number x) { return mask ? x : 0.0; }

// 1 / x and 1 / sqrt(x) of positive normal numbers, to about an ulp; anything for others. From 20 bits, steps of third
// order take a third of the instructions of a division or a root that minds every case.
AWD_INLINE Number reciprocal(Number x) {
    const Number y = near_reciprocal(x);
    const Number error = fma(-x, y, 1.0);
    return fma(y, fma(error, error, error), y);
}
AWD_INLINE Number inverse_root(Number x) {
    const Number y = near_inverse_root(x);
    const Number error = fma(-(x * y), y, 1.0);
    return fma(y * error, fma(0.375, error, 0.5), y);
}

AWD_INLINE Number square_root(Number x) { return x < 2.2250738585072014e-308 ? 0.0 : x * inverse_root(x); }

// x > 0 with the sign of `by`; where that is 0, signed_as is 0, and flipped_as is x.
AWD_INLINE Number flipped_as(Number x, Number by) { return with_sign_of(x, by); }
AWD_INLINE Number signed_as(Number x, Number by) { return by != 0.0 ? with_sign_of(x, by) : 0.0; }

#else

using Mask = decltype(Number{} < Number{});

AWD_INLINE Number every(double value) { return Number{} + value; }

AWD_INLINE Number load(const double* from) {
    Number value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

AWD_INLINE Number square_root(Number x) {
#if AWD_VECTOR_LANES == 8
    return (Number)_mm512_maskz_sqrt_pd(0xff, (__m512d)x);  // gcc warns inside the unmasked one
#elif AWD_VECTOR_LANES == 4
    return (Number)_mm256_sqrt_pd((__m256d)x);
#else
    Number y = x;
    for (int lane = 0; lane < LANES; ++lane) y[lane] = __builtin_sqrt(x[lane]);
    return y;
#endif
}

// 1 / x and 1 / sqrt(x) of positive normal numbers, to about an ulp; anything for others.
#if AWD_VECTOR_LANES == 8
// From 14 bits, steps of third and of fourth order take a third of the time of a division or a root.
AWD_INLINE Number reciprocal(Number x) {
    const Number y = (Number)_mm512_maskz_rcp14_pd(0xff, (__m512d)x);
    const Number error = 1.0 - x * y, nearer = y + y * error;
    return nearer + nearer * (error * error);
}
AWD_INLINE Number inverse_root(Number x) {
    const Number y = (Number)_mm512_maskz_rsqrt14_pd(0xff, (__m512d)x);
    const Number error = 1.0 - (x * y) * y;
    return y + (y * error) * ((0.3125 * error + 0.375) * error + 0.5);
}
#else
AWD_INLINE Number reciprocal(Number x) { return 1.0 / x; }
AWD_INLINE Number inverse_root(Number x) { return 1.0 / square_root(x); }
#endif

// x where the mask is, else 0, whatever x is.
AWD_INLINE Number where(Mask mask, Number x) { return (Number)((Mask)x & mask); }

// x > 0 with the sign of `by`; where that is 0, signed_as is 0, and flipped_as is x.
AWD_INLINE Number flipped_as(Number x, Number by) {
#if AWD_VECTOR_LANES == 8
    const __m512i top = _mm512_set1_epi64(INT64_MIN);
    return (Number)_mm512_ternarylogic_epi64((__m512i)x, (__m512i)by, top, 0x78);  // x ^ (by & top)
#else
    return (Number)((Mask)x ^ ((Mask)by & (Mask{} + INT64_MIN)));
#endif
}
AWD_INLINE Number signed_as(Number x, Number by) { return where(by != Number{}, flipped_as(x, by)); }

AWD_INLINE Mask opposite(Mask mask) { return ~mask; }

AWD_INLINE bool any(Mask mask) {
#if AWD_VECTOR_LANES == 8
    return _mm512_test_epi64_mask((__m512i)mask, (__m512i)mask) != 0;
#elif AWD_VECTOR_LANES == 4
    return _mm256_movemask_pd((__m256d)mask) != 0;
#else
    int64_t found = 0;
    for (int lane = 0; lane < LANES; ++lane) found |= mask[lane];
    return found != 0;
#endif
}

#endif

// Registers, where the compiler sees how many tasks there are; else what is kept.
template <int K, class Stored>
AWD_INLINE auto* local_or_kept(Number* local, Stored* kept) {
    if constexpr (K > 0) {
        return local;
    } else {
        return kept;
    }
}

AWD_INLINE Number larger(Number a, Number b) { return a > b ? a : b; }
AWD_INLINE Number smaller(Number a, Number b) { return a < b ? a : b; }
AWD_INLINE Number magnitude(Number x) { return x < every(0.0) ? -x : x; }

#endif
