// Adam and SGD on the elements of d, for one instruction set; adam.cpp includes it through foreach_isa.h.
//
// An iteration is one sweep over a group in chunks that stay in the first-level cache. Of a chunk, the K task vectors
// t give the gradient, the optimiser moves d, and the same t give the products <t_i, d>, <d, d> and sum |d| of the next
// iteration. Elements are Real, the type of t and d; products and their sums
// are float64.

#include "../number.h"
#include "../group.h"
#include "storage.h"
#include "adam_sweep.h"

AWD_INLINE void prefetch(const void* from, int64_t bytes) {
    const char* line = static_cast<const char*>(from);
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(line + at);
}

// ---- streaming: one step, a segment of elements per item ----

template <class Real>
static inline void step_segment(const StepJob& job, int64_t item, double* room) {
    const int k = job.in.k;
    const int64_t chunk = job.chunk, width = size_of(job.in.dtype);
    double* sums = room;                                                       // [K + 2][SUM_LANES]
    Real* factors = reinterpret_cast<Real*>(sums + (k + 2) * MOST_SUM_LANES);  // [K]
    Real* slope = factors + round_up(k, MOST_SUM_LANES);                       // [chunk], as the next
    Real* origin_room = slope + chunk;
    Real* model_room = origin_room + chunk;
    Real* t = model_room + chunk;  // [K][chunk]
    for (int j = 0; j < k; ++j) factors[j] = Real(-2.0 * job.slope[j]);
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
        sweep(t, chunk, k, count, factors, job.slope[k], job.options, job.correction, true, state, slope, sums);
    }
    for (int index = 0; index < k + 2; ++index) job.partial[item * (k + 2) + index] = sum_of(sums + index * SUM_LANES);
}

static void step_item(const StepJob& job, int64_t item, double* room) {
    job.in.dtype == Dtype::f64 ? step_segment<double>(job, item, room) : step_segment<float>(job, item, room);
}

// ---- resident: all iterations of a few groups ----

// Room of one batch of groups. Lanes of a Number are groups; blocks of LANES of them follow each other.
template <class Real>
struct Batch {
    Real* t;                             // [batch][K][padded]
    Real *shift, *velocity, *square;     // [batch][padded]
    Number* gram;                        // [blocks][K][K]
    Number* vectors;                     // [blocks][7 K]: b, four of GroupWork, factors, e
    double* sums;                        // [K + 2][SUM_LANES]
    Real *factors, *slope, *rooms;       // [K] and [chunk], of the group that is worked on; [2][chunk]
    double *squares, *sizes, *multiple;  // [MOST_GROUPS]

    Batch(const RowsJob& job, double* room) {
        const int64_t k = job.in.k;
        sums = room;
        squares = sums + (k + 2) * MOST_SUM_LANES;
        sizes = squares + MOST_GROUPS;
        multiple = sizes + MOST_GROUPS;
        gram = reinterpret_cast<Number*>(multiple + MOST_GROUPS);
        vectors = gram + k * k * (MOST_GROUPS / LANES);
        shift = reinterpret_cast<Real*>(vectors + 7 * k * (MOST_GROUPS / LANES));
        velocity = shift + job.batch * job.padded;
        square = velocity + job.batch * job.padded;
        t = square + job.batch * job.padded;
        slope = t + job.batch * k * job.padded;
        rooms = slope + job.chunk;
        factors = rooms + 2 * job.chunk;
    }
};

// The task vectors of groups [first, first + count), each contiguous, padded with zeros.
template <class Real>
static inline void read_groups(const RowsJob& job, int64_t first, int64_t count, const Batch<Real>& batch) {
    const int64_t size = job.shape.size(), padded = job.padded, k = job.in.k;
    Real* origin_room = batch.rooms;
    Real* model_room = origin_room + job.chunk;
    if (job.shape.by_column) {
        for (int j = 0; j < k; ++j) {
            for (int64_t e = 0; e < size; ++e) {
                const int64_t at = e * job.shape.columns + first;
                const Real* origin = nullptr;
                if (job.in.base != nullptr) origin = load_block(job.in.base, job.in.dtype, at, count, origin_room);
                const Real* model = load_block(job.in.models[j], job.in.dtype, at, count, model_room);
                for (int64_t c = 0; c < count; ++c) {
                    batch.t[(c * k + j) * padded + e] = origin != nullptr ? model[c] - origin[c] : model[c];
                }
            }
            for (int64_t c = 0; c < count; ++c) {
                for (int64_t e = size; e < padded; ++e) batch.t[(c * k + j) * padded + e] = Real(0);
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
template <class Real>
static inline void write_groups(const RowsJob& job, int64_t first, int64_t count, const Batch<Real>& batch) {
    const int64_t size = job.shape.size();
    Real* out = static_cast<Real*>(job.shift);
    if (size == 0) return;  // and no memory either
    for (int64_t c = 0; c < count && !job.shape.by_column; ++c) {
        std::memcpy(out + (first + c) * size, batch.shift + c * job.padded, size_t(size) * sizeof(Real));
    }
    for (int64_t e = 0; e < size && job.shape.by_column; ++e) {
        for (int64_t c = 0; c < count; ++c) out[e * job.shape.columns + first + c] = batch.shift[c * job.padded + e];
    }
}

// G of group c of the batch, to job.gram and to its lane.
template <class Real>
static inline void group_gram(const RowsJob& job, int64_t first, int64_t c, const Batch<Real>& batch) {
    const int64_t k = job.in.k, padded = job.padded;
    double* out = job.gram + (first + c) * k * k;
    const Real* t = batch.t + c * k * padded;
    for (int64_t i = 0; i < k; ++i) {
        for (int64_t index = 0; index < k * SUM_LANES; ++index) batch.sums[index] = 0.0;
        add_products(t + i * padded, padded, int(k - i), t + i * padded, padded, batch.sums);
        for (int64_t j = i; j < k; ++j) out[i * k + j] = out[j * k + i] = sum_of(batch.sums + (j - i) * SUM_LANES);
    }
    double* lanes = reinterpret_cast<double*>(batch.gram + c / LANES * k * k) + c % LANES;
    for (int64_t index = 0; index < k * k; ++index) lanes[index * LANES] = out[index];
}

// The losses of a block of LANES groups at the present b, s and sum |d|, and the factors of their gradients. `k` is a
// literal in most callers, so that loops over tasks unroll.
AWD_INLINE Number evaluate_lanes(const Number* gram, Number* vectors, int k, const Objective& objective, double l1,
                                 Number square, Number size, Number& multiple) {
    const GroupWork work{vectors + 6 * k, vectors + k,    vectors + 2 * k, vectors + 3 * k,
                         vectors + 4 * k, vectors + 5 * k};  // the factors come last, where the weights were
    for (int i = 0; i < k; ++i) work.offset[i] = vectors[i] - 0.5 * square;
    inverse_norms(gram, k, objective.eps, work);
    const Number mean = similarity(gram, k, objective.similarity, true, work);
    const double weight = pull_weight(k, objective.similarity, objective.total);
    Number sum = every(0.0);
    for (int i = 0; i < k; ++i) {
        const Number pulled = weight * pull(work, i);
        vectors[5 * k + i] = -2.0 * pulled;
        sum += pulled;
    }
    multiple = 2.0 * sum + objective.alpha * penalty_slope(square, objective.penalty);
    return span_loss(mean, square, objective) + l1 * size;
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
template <class Real>
static inline void advance(const RowsJob& job, int64_t c, const Correction& correction, const Batch<Real>& batch) {
    const int64_t k = job.in.k, padded = job.padded, size = job.shape.size();
    double* vectors = reinterpret_cast<double*>(batch.vectors + c / LANES * 7 * k) + c % LANES;
    for (int64_t i = 0; i < k; ++i) batch.factors[i] = Real(vectors[(5 * k + i) * LANES]);
    for (int64_t index = 0; index < (k + 2) * SUM_LANES; ++index) batch.sums[index] = 0.0;
    const State<Real> state{batch.shift + c * padded, batch.velocity + c * padded, batch.square + c * padded};
    // Padding takes part, so that loops have no remainder: its gradient is 0, and so is its step, but not 0 / 0 where
    // eps rounds to 0.
    const int64_t end = job.options.adam && Real(job.options.eps) == Real(0) ? size : padded;
    for (int64_t e = 0; e < end; e += job.chunk) {
        const int64_t here = end - e < job.chunk ? end - e : job.chunk;
        const State<Real> at{state.shift + e, state.velocity + e, state.square + e};
        sweep(batch.t + c * k * padded + e, padded, int(k), here, batch.factors, batch.multiple[c], job.options,
              correction, job.options.l1 != 0.0, at, batch.slope, batch.sums);
    }
    for (int64_t i = 0; i < k; ++i) vectors[i * LANES] = sum_of(batch.sums + i * SUM_LANES);
    batch.squares[c] = sum_of(batch.sums + k * SUM_LANES);
    batch.sizes[c] = sum_of(batch.sums + (k + 1) * SUM_LANES);
}

// All iterations of groups [first, first + count); adds their losses to history.
template <class Real>
static inline void descend_batch(const RowsJob& job, int64_t first, int64_t count, double* history, double* room) {
    const Batch<Real> batch(job, room);
    const int64_t k = job.in.k, blocks = (count + LANES - 1) / LANES;
    for (int64_t index = 0; index < blocks * k * k; ++index) batch.gram[index] = every(0.0);
    for (int64_t index = 0; index < blocks * 7 * k; ++index) batch.vectors[index] = every(0.0);
    for (int64_t c = 0; c < MOST_GROUPS; ++c) batch.squares[c] = batch.sizes[c] = 0.0;
    for (int64_t index = 0; index < 3 * job.batch * job.padded; ++index) batch.shift[index] = Real(0);
    read_groups(job, first, count, batch);
    for (int64_t c = 0; c < count; ++c) group_gram(job, first, c, batch);
    for (int64_t iteration = 0; iteration <= job.iterations; ++iteration) {
        for (int64_t block = 0; block < blocks; ++block) {
            const Number* gram = batch.gram + block * k * k;
            Number multiple;
            const Number losses =
                evaluate(gram, batch.vectors + block * 7 * k, int(k), job.objective, job.options.l1,
                         load(batch.squares + block * LANES), load(batch.sizes + block * LANES), multiple) +
                defect(gram, int(k));
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
        const double* vectors = reinterpret_cast<double*>(batch.vectors + c / LANES * 7 * k) + c % LANES;
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
            descend_batch<double>(job, first, count, history, room);
        } else {
            descend_batch<float>(job, first, count, history, room);
        }
    }
}
