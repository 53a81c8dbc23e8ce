// Adam and SGD on the elements of d, for one instruction set; adam.cpp includes it through foreach_isa.h.
//
// An iteration is one sweep over a group in chunks that stay in the first-level cache. Of a chunk, the K task vectors
// t give the gradient, the optimiser moves d, and the same t give the products <t_i, d>, <d, d> and sum |d| of the next
// iteration. Gradient and products are float64; what the optimiser does to an element is in Real, the type of d.

#include "../number.h"
#include "../group.h"
#include "storage.h"

constexpr int SUM_LANES = 2 * LANES;  // two chains of additions per product
typedef float Floats __attribute__((vector_size(sizeof(Number) / 2)));

AWD_INLINE Number load(const double* from) {
    Number value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

AWD_INLINE Number load(const float* from) {
    Floats value;
    std::memcpy(&value, from, sizeof value);
    return __builtin_convertvector(value, Number);
}

AWD_INLINE void store(double* to, Number value) { std::memcpy(to, &value, sizeof value); }

AWD_INLINE double sum_of(const double* lanes) {
    double sum = 0.0;
    for (int lane = 0; lane < SUM_LANES; ++lane) sum += lanes[lane];
    return sum;
}

// slope[e] += sum_j factors[j] t_j[e]. stride: from vector to vector.
template <int COUNT, class T>
static inline void add_slope(const T* __restrict t, int64_t stride, const double* factors, int64_t count,
                             double* __restrict slope) {
    double f[COUNT];
    for (int j = 0; j < COUNT; ++j) f[j] = factors[j];
    for (int64_t e = 0; e < count; ++e) {
        double sum = slope[e];
        for (int j = 0; j < COUNT; ++j) sum += f[j] * double(t[j * stride + e]);
        slope[e] = sum;
    }
}

template <class T>
static inline void add_slopes(const T* t, int64_t stride, int k, const double* factors, int64_t count, double* slope) {
    int j = 0;
    for (; j + 8 <= k; j += 8) add_slope<8>(t + j * stride, stride, factors + j, count, slope);
    for (; j + 4 <= k; j += 4) add_slope<4>(t + j * stride, stride, factors + j, count, slope);
    for (; j + 2 <= k; j += 2) add_slope<2>(t + j * stride, stride, factors + j, count, slope);
    if (j < k) add_slope<1>(t + j * stride, stride, factors + j, count, slope);
}

// sums[j][lane] += t_j[e] x[e] over e in [0, padded); `padded` is a multiple of SUM_LANES.
template <int COUNT, class T>
static inline void add_product(const T* t, int64_t stride, const double* x, int64_t padded, double* sums) {
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

template <class T>
static inline void add_products(const T* t, int64_t stride, int k, const double* x, int64_t padded, double* sums) {
    int j = 0;
    for (; j + 4 <= k; j += 4) add_product<4>(t + j * stride, stride, x, padded, sums + j * SUM_LANES);
    for (; j + 2 <= k; j += 2) add_product<2>(t + j * stride, stride, x, padded, sums + j * SUM_LANES);
    if (j < k) add_product<1>(t + j * stride, stride, x, padded, sums + j * SUM_LANES);
}

// sums[0] += x^2 and sums[1] += |x|, in lanes.
static inline void add_sizes(const double* x, int64_t padded, double* sums) {
    Number square[2] = {load(sums), load(sums + LANES)};
    Number size[2] = {load(sums + SUM_LANES), load(sums + SUM_LANES + LANES)};
    for (int64_t e = 0; e < padded; e += SUM_LANES) {
        for (int half = 0; half < 2; ++half) {
            const Number value = load(x + e + half * LANES);
            square[half] += value * value;
            size[half] += magnitude(value);
        }
    }
    for (int half = 0; half < 2; ++half) {
        store(sums + half * LANES, square[half]);
        store(sums + SUM_LANES + half * LANES, size[half]);
    }
}

// The state of the optimiser at a chunk of elements; square is not used by SGD, nor velocity without a momentum.
template <class Real>
struct State {
    Real *shift, *velocity, *square;
};

// One step of torch.optim.Adam; moved[e]: the new d.
template <class Real>
static inline void adam_move(const double* __restrict slope, int64_t count, const Elementwise& options,
                             const Correction& correction, const State<Real>& at, double* __restrict moved) {
    Real* __restrict shift = at.shift;
    Real* __restrict velocity = at.velocity;
    Real* __restrict square = at.square;
    const Real keep = Real(options.momentum), add = Real(1.0 - options.momentum);
    const Real keep_square = Real(options.beta2), add_square = Real(1.0 - options.beta2);
    const Real step = Real(correction.step), unbias = Real(correction.unbias), eps = Real(options.eps);
    for (int64_t e = 0; e < count; ++e) {
        const Real g = Real(slope[e]);
        const Real m = keep * velocity[e] + add * g;
        const Real v = keep_square * square[e] + add_square * (g * g);
        const Real d = shift[e] - step * m / (Real(std::sqrt(v * unbias)) + eps);
        velocity[e] = m;
        square[e] = v;
        shift[e] = d;
        moved[e] = double(d);
    }
}

// One step of torch.optim.SGD.
template <bool MOMENTUM, bool NESTEROV, class Real>
static inline void sgd_move(const double* __restrict slope, int64_t count, const Elementwise& options,
                            const State<Real>& at, double* __restrict moved) {
    Real* __restrict shift = at.shift;
    Real* __restrict velocity = at.velocity;
    const Real momentum = Real(options.momentum), lr = Real(options.lr);
    for (int64_t e = 0; e < count; ++e) {
        Real move = Real(slope[e]);
        if (MOMENTUM) {
            const Real m = momentum * velocity[e] + move;
            velocity[e] = m;
            move = NESTEROV ? move + momentum * m : m;
        }
        const Real d = shift[e] - lr * move;
        shift[e] = d;
        moved[e] = double(d);
    }
}

template <class Real>
static inline void move(const double* slope, int64_t count, const Elementwise& options, const Correction& correction,
                        const State<Real>& at, double* moved) {
    if (options.adam) {
        adam_move(slope, count, options, correction, at, moved);
    } else if (options.momentum == 0.0) {
        sgd_move<false, false>(slope, count, options, at, moved);
    } else if (options.nesterov) {
        sgd_move<true, true>(slope, count, options, at, moved);
    } else {
        sgd_move<true, false>(slope, count, options, at, moved);
    }
}

// One step at a chunk: moves d and adds the products at the new d to sums [K + 2][SUM_LANES]. t [K][stride], and
// `moved` past `count`, are 0 up to the next multiple of SUM_LANES. factors [K] = -2 r.
template <class T, class Real>
static inline void sweep(const T* t, int64_t stride, int k, int64_t count, const double* factors, double multiple,
                         const Elementwise& options, const Correction& correction, const State<Real>& at, double* slope,
                         double* moved, double* sums) {
    const Real* __restrict shift = at.shift;
    const double along = multiple + options.weight_decay, l1 = options.l1;
    if (l1 != 0.0) {
        for (int64_t e = 0; e < count; ++e) {
            const double d = double(shift[e]);
            slope[e] = along * d + (d > 0.0 ? l1 : 0.0) - (d < 0.0 ? l1 : 0.0);
        }
    } else {
        for (int64_t e = 0; e < count; ++e) slope[e] = along * double(shift[e]);
    }
    add_slopes(t, stride, k, factors, count, slope);
    move(slope, count, options, correction, at, moved);
    const int64_t padded = (count + SUM_LANES - 1) / SUM_LANES * SUM_LANES;
    for (int64_t e = count; e < padded; ++e) moved[e] = 0.0;
    add_products(t, stride, k, moved, padded, sums);
    add_sizes(moved, padded, sums + k * SUM_LANES);
}

// t[e] = model[e] - origin[e] rounded to Real, and 0 from `count` to `padded`.
template <class Real, class T>
static inline void subtract(const Real* __restrict model, const Real* __restrict origin, int64_t count, int64_t padded,
                            T* __restrict t) {
    if (origin != nullptr) {
        for (int64_t e = 0; e < count; ++e) t[e] = T(model[e] - origin[e]);
    } else {
        for (int64_t e = 0; e < count; ++e) t[e] = T(model[e]);
    }
    for (int64_t e = count; e < padded; ++e) t[e] = T(0);
}

AWD_INLINE void prefetch(const void* from, int64_t bytes) {
    const char* line = static_cast<const char*>(from);
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(line + at);
}

// ---- streaming: one step, a segment of elements per item ----

template <class Real>
static inline void step_segment(const StepJob& job, int64_t item, double* room) {
    const int k = job.in.k;
    const int64_t chunk = job.chunk, width = int64_t(job.in.dtype == Dtype::f64   ? 8
                                                     : job.in.dtype == Dtype::f32 ? 4
                                                                                  : 2);
    double* sums = room;                              // [K + 2][SUM_LANES]
    double* slope = sums + (k + 2) * MOST_SUM_LANES;  // [chunk], as the next
    double* moved = slope + chunk;
    Real* origin_room = reinterpret_cast<Real*>(moved + chunk);
    Real* model_room = reinterpret_cast<Real*>(moved + 2 * chunk);
    double* t = moved + 3 * chunk;  // [K][chunk]
    for (int index = 0; index < (k + 2) * SUM_LANES; ++index) sums[index] = 0.0;
    const int64_t end = (item + 1) * SEGMENT < job.size ? (item + 1) * SEGMENT : job.size;
    Real* shift = static_cast<Real*>(job.shift);
    Real* velocity = static_cast<Real*>(job.velocity);
    Real* square = static_cast<Real*>(job.square);
    for (int64_t at = item * SEGMENT; at < end; at += chunk) {
        const int64_t count = end - at < chunk ? end - at : chunk;
        const int64_t padded = (count + SUM_LANES - 1) / SUM_LANES * SUM_LANES;
        // The addresses of the next chunk are known: its lines are on their way while this one is computed.
        const int64_t ahead = at + chunk + count <= end ? at + chunk : at;
        const Real* origin = nullptr;
        if (job.in.base != nullptr) {
            prefetch(static_cast<const char*>(job.in.base) + ahead * width, count * width);
            origin = load_block(job.in.base, job.in.dtype, at, count, origin_room);
        }
        for (int j = 0; j < k; ++j) {
            prefetch(static_cast<const char*>(job.in.models[j]) + ahead * width, count * width);
            subtract(load_block(job.in.models[j], job.in.dtype, at, count, model_room), origin, count, padded,
                     t + j * chunk);
        }
        State<Real> state{shift + at, nullptr, nullptr};
        prefetch(shift + ahead, count * int64_t(sizeof(Real)));
        if (velocity != nullptr) {
            state.velocity = velocity + at;
            prefetch(velocity + ahead, count * int64_t(sizeof(Real)));
        }
        if (square != nullptr) {
            state.square = square + at;
            prefetch(square + ahead, count * int64_t(sizeof(Real)));
        }
        sweep(t, chunk, k, count, job.factors, job.multiple, job.options, job.correction, state, slope, moved, sums);
    }
    for (int index = 0; index < k + 2; ++index) job.partial[item * (k + 2) + index] = sum_of(sums + index * SUM_LANES);
}

static void step_item(const StepJob& job, int64_t item, double* room) {
    job.in.dtype == Dtype::f64 ? step_segment<double>(job, item, room) : step_segment<float>(job, item, room);
}

// ---- resident: all iterations of a few groups ----

// Room of one batch of groups. Lanes of a Number are groups; blocks of LANES of them follow each other.
template <class T, class Real>
struct Batch {
    T* t;                                // [batch][K][padded]
    Real *shift, *velocity, *square;     // [batch][padded]
    Number* gram;                        // [blocks][K][K]
    Number* vectors;                     // [blocks][6 K]: those of GroupWork, factors
    double *slope, *moved, *sums;        // [chunk], [chunk], [K + 2][SUM_LANES]
    double* factors;                     // [K], of the group that is worked on
    double *squares, *sizes, *multiple;  // [MOST_GROUPS]

    Batch(const RowsJob& job, double* room) {
        const int64_t k = job.in.k;
        slope = room;
        moved = slope + job.chunk;
        sums = moved + job.chunk;
        factors = sums + (k + 2) * MOST_SUM_LANES;
        squares = factors + round_up(k, MOST_GROUPS);
        sizes = squares + MOST_GROUPS;
        multiple = sizes + MOST_GROUPS;
        gram = reinterpret_cast<Number*>(multiple + MOST_GROUPS);
        vectors = gram + k * k * (MOST_GROUPS / LANES);
        double* rest = reinterpret_cast<double*>(vectors + 6 * k * (MOST_GROUPS / LANES));
        shift = reinterpret_cast<Real*>(rest);
        velocity = shift + job.batch * job.padded;
        square = velocity + job.batch * job.padded;
        t = reinterpret_cast<T*>(rest + 3 * job.batch * job.padded);
    }
};

// The task vectors of groups [first, first + count), each contiguous, padded with zeros.
template <class T, class Real>
static inline void read_groups(const RowsJob& job, int64_t first, int64_t count, const Batch<T, Real>& batch) {
    const int64_t size = job.shape.size(), padded = job.padded, k = job.in.k;
    Real* origin_room = reinterpret_cast<Real*>(batch.slope);
    Real* model_room = reinterpret_cast<Real*>(batch.moved);
    if (job.shape.by_column) {
        for (int j = 0; j < k; ++j) {
            for (int64_t e = 0; e < size; ++e) {
                const int64_t at = e * job.shape.columns + first;
                const Real* origin = nullptr;
                if (job.in.base != nullptr) origin = load_block(job.in.base, job.in.dtype, at, count, origin_room);
                const Real* model = load_block(job.in.models[j], job.in.dtype, at, count, model_room);
                for (int64_t c = 0; c < count; ++c) {
                    const Real value = origin != nullptr ? model[c] - origin[c] : model[c];
                    batch.t[(c * k + j) * padded + e] = T(value);
                }
            }
            for (int64_t c = 0; c < count; ++c) {
                for (int64_t e = size; e < padded; ++e) batch.t[(c * k + j) * padded + e] = T(0);
            }
        }
        return;
    }
    for (int64_t c = 0; c < count; ++c) {
        for (int64_t e = 0; e < size; e += job.chunk) {
            const int64_t here = size - e < job.chunk ? size - e : job.chunk;
            const int64_t filled = e + here == size ? padded - e : here;
            const int64_t at = (first + c) * size + e;
            const Real* origin = nullptr;
            if (job.in.base != nullptr) origin = load_block(job.in.base, job.in.dtype, at, here, origin_room);
            for (int j = 0; j < k; ++j) {
                subtract(load_block(job.in.models[j], job.in.dtype, at, here, model_room), origin, here, filled,
                         batch.t + (c * k + j) * padded + e);
            }
        }
    }
}

// d of the groups in the parameter's layout.
template <class T, class Real>
static inline void write_groups(const RowsJob& job, int64_t first, int64_t count, const Batch<T, Real>& batch) {
    const int64_t size = job.shape.size();
    Real* out = static_cast<Real*>(job.shift);
    for (int64_t c = 0; c < count && !job.shape.by_column; ++c) {
        std::memcpy(out + (first + c) * size, batch.shift + c * job.padded, size_t(size) * sizeof(Real));
    }
    for (int64_t e = 0; e < size && job.shape.by_column; ++e) {
        for (int64_t c = 0; c < count; ++c) out[e * job.shape.columns + first + c] = batch.shift[c * job.padded + e];
    }
}

// G of group c of the batch, to job.gram and to its lane.
template <class T, class Real>
static inline void group_gram(const RowsJob& job, int64_t first, int64_t c, const Batch<T, Real>& batch) {
    const int64_t k = job.in.k, padded = job.padded;
    double* out = job.gram + (first + c) * k * k;
    const T* t = batch.t + c * k * padded;
    for (int64_t i = 0; i < k; ++i) {
        for (int64_t index = 0; index < k * SUM_LANES; ++index) batch.sums[index] = 0.0;
        for (int64_t e = 0; e < padded; e += job.chunk) {
            const int64_t here = padded - e < job.chunk ? padded - e : job.chunk;
            for (int64_t n = 0; n < here; ++n) batch.slope[n] = double(t[i * padded + e + n]);
            add_products(t + i * padded + e, padded, int(k - i), batch.slope, here, batch.sums);
        }
        for (int64_t j = i; j < k; ++j) out[i * k + j] = out[j * k + i] = sum_of(batch.sums + (j - i) * SUM_LANES);
    }
    double* lanes = reinterpret_cast<double*>(batch.gram + c / LANES * k * k) + c % LANES;
    for (int64_t index = 0; index < k * k; ++index) lanes[index * LANES] = out[index];
}

// The losses of a block of LANES groups at the present b, s and sum |d|, and the factors of their gradients. `k` is a
// literal in most callers, so that loops over tasks unroll.
AWD_INLINE Number evaluate_lanes(const Number* gram, Number* vectors, int k, const Objective& objective, double l1,
                                 Number square, Number size, Number& multiple) {
    const GroupWork work{vectors, vectors + k, vectors + 2 * k, vectors + 3 * k, vectors + 4 * k};
    inverse_norms(gram, square, k, objective.eps, work);
    const Number mean = similarity(gram, square, k, objective.similarity, work);
    Number sum = every(0.0);
    for (int i = 0; i < k; ++i) {
        const Number pulled = pull(work, i, k) / objective.total;
        vectors[5 * k + i] = -2.0 * pulled;
        sum += pulled;
    }
    multiple = 2.0 * sum + objective.alpha * penalty_slope(square, objective.penalty);
    return mean / objective.total + objective.alpha * penalty(square, objective.penalty) + l1 * size;
}

static inline Number evaluate(const Number* gram, Number* vectors, int k, const Objective& objective, double l1,
                              Number square, Number size, Number& multiple) {
    switch (k) {
        case 2:
            return evaluate_lanes(gram, vectors, 2, objective, l1, square, size, multiple);
        case 4:
            return evaluate_lanes(gram, vectors, 4, objective, l1, square, size, multiple);
        case 8:
            return evaluate_lanes(gram, vectors, 8, objective, l1, square, size, multiple);
        default:
            return evaluate_lanes(gram, vectors, k, objective, l1, square, size, multiple);
    }
}

// One iteration of group c.
template <class T, class Real>
static inline void advance(const RowsJob& job, int64_t c, const Correction& correction, const Batch<T, Real>& batch) {
    const int64_t k = job.in.k, padded = job.padded, size = job.shape.size();
    double* vectors = reinterpret_cast<double*>(batch.vectors + c / LANES * 6 * k) + c % LANES;
    for (int64_t i = 0; i < k; ++i) batch.factors[i] = vectors[(5 * k + i) * LANES];
    for (int64_t index = 0; index < (k + 2) * SUM_LANES; ++index) batch.sums[index] = 0.0;
    const State<Real> state{batch.shift + c * padded, batch.velocity + c * padded, batch.square + c * padded};
    for (int64_t e = 0; e < padded; e += job.chunk) {
        const int64_t here = padded - e < job.chunk ? padded - e : job.chunk;
        const State<Real> at{state.shift + e, state.velocity + e, state.square + e};
        sweep(batch.t + c * k * padded + e, padded, int(k), here, batch.factors, batch.multiple[c], job.options,
              correction, at, batch.slope, batch.moved, batch.sums);
    }
    // Padding takes part, so that loops have no remainder; its gradient is 0, but not 0 / 0 should eps round to 0.
    for (int64_t e = size; e < padded; ++e) state.shift[e] = state.velocity[e] = state.square[e] = Real(0);
    for (int64_t i = 0; i < k; ++i) vectors[i * LANES] = sum_of(batch.sums + i * SUM_LANES);
    batch.squares[c] = sum_of(batch.sums + k * SUM_LANES);
    batch.sizes[c] = sum_of(batch.sums + (k + 1) * SUM_LANES);
}

// All iterations of groups [first, first + count); adds their losses to history.
template <class T, class Real>
static inline void descend_batch(const RowsJob& job, int64_t first, int64_t count, double* history, double* room) {
    const Batch<T, Real> batch(job, room);
    const int64_t k = job.in.k, blocks = (count + LANES - 1) / LANES;
    for (int64_t index = 0; index < blocks * k * k; ++index) batch.gram[index] = every(0.0);
    for (int64_t index = 0; index < blocks * 6 * k; ++index) batch.vectors[index] = every(0.0);
    for (int64_t c = 0; c < MOST_GROUPS; ++c) batch.squares[c] = batch.sizes[c] = 0.0;
    for (int64_t index = 0; index < 3 * job.batch * job.padded; ++index) batch.shift[index] = Real(0);
    read_groups(job, first, count, batch);
    for (int64_t c = 0; c < count; ++c) group_gram(job, first, c, batch);
    for (int64_t iteration = 0; iteration <= job.iterations; ++iteration) {
        for (int64_t block = 0; block < blocks; ++block) {
            const Number* gram = batch.gram + block * k * k;
            Number multiple;
            const Number losses =
                evaluate(gram, batch.vectors + block * 6 * k, int(k), job.objective, job.options.l1,
                         load(batch.squares + block * LANES), load(batch.sizes + block * LANES), multiple) +
                (iteration == 0 ? defect(gram, int(k)) : every(0.0));
            store(batch.multiple + block * LANES, multiple);
            double lanes[LANES];
            store(lanes, losses);
            for (int lane = 0; lane < LANES; ++lane) history[iteration] += lanes[lane];
        }
        if (iteration == job.iterations) break;
        const Correction correction = job.corrections->at(iteration + 1);
        for (int64_t c = 0; c < count; ++c) advance(job, c, correction, batch);
    }
    write_groups(job, first, count, batch);
    for (int64_t c = 0; c < count; ++c) {
        const double* vectors = reinterpret_cast<double*>(batch.vectors + c / LANES * 6 * k) + c % LANES;
        for (int64_t i = 0; i < k; ++i) job.inner[(first + c) * k + i] = vectors[i * LANES];
        job.square[first + c] = batch.squares[c];
    }
}

static void rows_item(const RowsJob& job, int64_t item, double* room) {
    double* history = job.histories + item * (job.iterations + 1);
    for (int64_t index = 0; index <= job.iterations; ++index) history[index] = 0.0;
    const int64_t groups = job.shape.groups();
    const int64_t end = (item + 1) * job.item_groups < groups ? (item + 1) * job.item_groups : groups;
    for (int64_t first = item * job.item_groups; first < end; first += job.batch) {
        const int64_t count = end - first < job.batch ? end - first : job.batch;
        if (job.in.dtype == Dtype::f64) {
            descend_batch<double, double>(job, first, count, history, room);
        } else if (job.wide) {
            descend_batch<double, float>(job, first, count, history, room);
        } else {
            descend_batch<float, float>(job, first, count, history, room);
        }
    }
}
