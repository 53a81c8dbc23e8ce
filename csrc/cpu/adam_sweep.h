// One iteration of Adam or SGD on the elements of a chunk of a group; included by adam_kernel.h, once per instruction
// set.

constexpr int SUM_LANES = 2 * LANES;  // two chains of additions per product

AWD_INLINE Number load(const float* from) {
#if AWD_VECTOR_LANES == 8  // gcc makes two conversions of one where it is left to it
    return (Number)_mm512_maskz_cvtps_pd(0xff, _mm256_loadu_ps(from));
#elif AWD_VECTOR_LANES == 4
    return (Number)_mm256_cvtps_pd(_mm_loadu_ps(from));
#else
    return Number{double(from[0]), double(from[1])};
#endif
}

AWD_INLINE void store(double* to, Number value) { std::memcpy(to, &value, sizeof value); }

AWD_INLINE double sum_of(const double* lanes) {
    const Number halves = load(lanes) + load(lanes + LANES);
    double sum = 0.0;
    for (int lane = 0; lane < LANES; ++lane) sum += halves[lane];
    return sum;
}

// slope[e] = along start[e] + sum_j factors[j] t_j[e]. stride: from vector to vector. start may be slope.
template <int COUNT, class Real>
static inline void add_slope(const Real* t, int64_t stride, const Real* factors, int64_t count, Real along,
                             const Real* start, Real* slope) {
    Real f[COUNT];
    for (int j = 0; j < COUNT; ++j) f[j] = factors[j];
#pragma GCC ivdep
    for (int64_t e = 0; e < count; ++e) {
        Real sum = along * start[e];
        for (int j = 0; j < COUNT; ++j) sum += f[j] * t[j * stride + e];
        slope[e] = sum;
    }
}

template <class Real>
static inline void add_slopes(const Real* t, int64_t stride, int k, const Real* factors, int64_t count, Real along,
                              const Real* start, Real* slope) {
    for (int j = 0; j < k;) {
        const Real* from = t + j * stride;
        if (k - j >= 8) {
            add_slope<8>(from, stride, factors + j, count, along, start, slope);
            j += 8;
        } else if (k - j >= 4) {
            add_slope<4>(from, stride, factors + j, count, along, start, slope);
            j += 4;
        } else if (k - j >= 2) {
            add_slope<2>(from, stride, factors + j, count, along, start, slope);
            j += 2;
        } else {
            add_slope<1>(from, stride, factors + j, count, along, start, slope);
            j += 1;
        }
        start = slope;
        along = Real(1);
    }
}

// sums[j][lane] += t_j[e] x[e] over e in [0, padded); `padded` is a multiple of SUM_LANES.
template <int COUNT, class Real>
static inline void add_product(const Real* t, int64_t stride, const Real* x, int64_t padded, double* sums) {
    Number sum[COUNT][2];
    for (int j = 0; j < COUNT; ++j) {
        sum[j][0] = load(sums + j * SUM_LANES);
        sum[j][1] = load(sums + j * SUM_LANES + LANES);
    }
    for (int64_t e = 0; e < padded; e += SUM_LANES) {
        const Number first = load(x + e), second = load(x + e + LANES);
        for (int j = 0; j < COUNT; ++j) {
            sum[j][0] += load(t + j * stride + e) * first;
            sum[j][1] += load(t + j * stride + e + LANES) * second;
        }
    }
    for (int j = 0; j < COUNT; ++j) {
        store(sums + j * SUM_LANES, sum[j][0]);
        store(sums + j * SUM_LANES + LANES, sum[j][1]);
    }
}

template <class Real>
static inline void add_products(const Real* t, int64_t stride, int k, const Real* x, int64_t padded, double* sums) {
    int j = 0;
    for (; j + 4 <= k; j += 4) add_product<4>(t + j * stride, stride, x, padded, sums + j * SUM_LANES);
    for (; j + 2 <= k; j += 2) add_product<2>(t + j * stride, stride, x, padded, sums + j * SUM_LANES);
    if (j < k) add_product<1>(t + j * stride, stride, x, padded, sums + j * SUM_LANES);
}

// sums[0] += x^2 and, where they are wanted, sums[1] += |x|, in lanes.
template <bool SIZES, class Real>
static inline void add_sizes(const Real* x, int64_t padded, double* sums) {
    Number square[2] = {load(sums), load(sums + LANES)};
    Number size[2] = {load(sums + SUM_LANES), load(sums + SUM_LANES + LANES)};
    for (int64_t e = 0; e < padded; e += SUM_LANES) {
        for (int half = 0; half < 2; ++half) {
            const Number value = load(x + e + half * LANES);
            square[half] += value * value;
            if (SIZES) size[half] += magnitude(value);
        }
    }
    for (int half = 0; half < 2; ++half) {
        store(sums + half * LANES, square[half]);
        if (SIZES) store(sums + SUM_LANES + half * LANES, size[half]);
    }
}

// The state of the optimiser at a chunk of elements; square is not used by SGD, nor velocity without a momentum.
template <class Real>
struct State {
    Real *shift, *velocity, *square;
};

// One step of torch.optim.Adam.
template <class Real>
static inline void adam_move(const Real* __restrict slope, int64_t count, const Elementwise& options,
                             const Correction& correction, const State<Real>& at) {
    Real* __restrict shift = at.shift;
    Real* __restrict velocity = at.velocity;
    Real* __restrict square = at.square;
    const Real keep = Real(options.momentum), add = Real(1.0 - options.momentum);
    const Real keep_square = Real(options.beta2), add_square = Real(1.0 - options.beta2);
    const Real step = Real(correction.step), unbias = Real(correction.unbias), eps = Real(options.eps);
    for (int64_t e = 0; e < count; ++e) {
        const Real g = slope[e];
        const Real m = keep * velocity[e] + add * g;
        const Real v = keep_square * square[e] + add_square * (g * g);
        const Real d = shift[e] - step * m / (Real(std::sqrt(v * unbias)) + eps);
        velocity[e] = m;
        square[e] = v;
        shift[e] = d;
    }
}

// One step of torch.optim.SGD.
template <bool MOMENTUM, bool NESTEROV, class Real>
static inline void sgd_move(const Real* __restrict slope, int64_t count, const Elementwise& options,
                            const State<Real>& at) {
    Real* __restrict shift = at.shift;
    Real* __restrict velocity = at.velocity;
    const Real momentum = Real(options.momentum), lr = Real(options.lr);
    for (int64_t e = 0; e < count; ++e) {
        Real move = slope[e];
        if (MOMENTUM) {
            const Real m = momentum * velocity[e] + move;
            velocity[e] = m;
            move = NESTEROV ? move + momentum * m : m;
        }
        const Real d = shift[e] - lr * move;
        shift[e] = d;
    }
}

template <class Real>
static inline void move(const Real* slope, int64_t count, const Elementwise& options, const Correction& correction,
                        const State<Real>& at) {
    if (options.adam) {
        adam_move(slope, count, options, correction, at);
    } else if (options.momentum == 0.0) {
        sgd_move<false, false>(slope, count, options, at);
    } else if (options.nesterov) {
        sgd_move<true, true>(slope, count, options, at);
    } else {
        sgd_move<true, false>(slope, count, options, at);
    }
}

// One step at a chunk: moves d and adds the products at the new d to sums [K + 2][SUM_LANES], sum |d| only if `sizes`.
// t [K][stride] is 0 past `count` up to the next multiple of SUM_LANES. factors [K] = -2 r.
template <class Real>
static inline void sweep(const Real* t, int64_t stride, int k, int64_t count, const Real* factors, double multiple,
                         const Elementwise& options, const Correction& correction, bool sizes, const State<Real>& at,
                         Real* slope, double* sums) {
    add_slopes(t, stride, k, factors, count, Real(multiple + options.weight_decay), at.shift, slope);
    if (options.l1 != 0.0) {
        const Real* __restrict shift = at.shift;
        const Real up = Real(options.l1);
        for (int64_t e = 0; e < count; ++e) {
            slope[e] += (shift[e] > Real(0) ? up : Real(0)) - (shift[e] < Real(0) ? up : Real(0));
        }
    }
    move(slope, count, options, correction, at);
    const int64_t padded = (count + SUM_LANES - 1) / SUM_LANES * SUM_LANES;
    const Real* moved = at.shift;
    if (padded > count) {
        for (int64_t e = 0; e < padded; ++e) slope[e] = e < count ? at.shift[e] : Real(0);
        moved = slope;
    }
    add_products(t, stride, k, moved, padded, sums);
    sizes ? add_sizes<true>(moved, padded, sums + k * SUM_LANES)
          : add_sizes<false>(moved, padded, sums + k * SUM_LANES);
}

// t[e] = model[e] - origin[e], and 0 from `count` to `padded`.
template <class Real>
static inline void subtract(const Real* __restrict model, const Real* __restrict origin, int64_t count, int64_t padded,
                            Real* __restrict t) {
    if (origin != nullptr) {
        for (int64_t e = 0; e < count; ++e) t[e] = model[e] - origin[e];
    } else {
        for (int64_t e = 0; e < count; ++e) t[e] = model[e];
    }
    for (int64_t e = count; e < padded; ++e) t[e] = Real(0);
}
