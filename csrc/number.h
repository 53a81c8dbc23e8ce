// Numbers that hold one group per lane, so that the mathematics of a group is written once and runs on several at a
// time.
//
// The including file defines, in its own namespace, `Number` (a double, or a vector of LANES doubles) and LANES. This
// header, group.h, small_matrix.h and converge.h have no include guard: the CPU kernels include them once per
// instruction set, each time inside a namespace of its own, so that the linker can never give one set's code to
// another.
//
// Conditions are written as selects: lanes never branch, and what happens in one lane does not depend on the others.

#if defined(__CUDACC__)
#define AWD_INLINE static __host__ __device__ __forceinline__
#else
#define AWD_INLINE static inline __attribute__((always_inline))
#endif

#ifndef AWD_VECTOR_LANES  // Number is a double

AWD_INLINE Number every(double value) { return value; }
AWD_INLINE Number square_root(Number x) { return sqrt(x); }
AWD_INLINE bool any(bool mask) { return mask; }
AWD_INLINE bool opposite(bool mask) { return !mask; }

#else

using Mask = decltype(Number{} < Number{});

AWD_INLINE Number every(double value) { return Number{} + value; }

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

AWD_INLINE Mask opposite(Mask mask) { return ~mask; }

AWD_INLINE bool any(Mask mask) {
    int64_t found = 0;
    for (int lane = 0; lane < LANES; ++lane) found |= mask[lane];
    return found != 0;
}

#endif

AWD_INLINE Number larger(Number a, Number b) { return a > b ? a : b; }
AWD_INLINE Number smaller(Number a, Number b) { return a < b ? a : b; }
AWD_INLINE Number magnitude(Number x) { return x < every(0.0) ? -x : x; }

// -1, 0 or 1.
AWD_INLINE Number sign(Number x) {
    const Number zero = every(0.0), one = every(1.0);
    return (x > zero ? one : zero) - (x < zero ? one : zero);
}
