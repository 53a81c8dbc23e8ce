// Inner products of K task vectors with a gradient, for one instruction set; multi_dot.cpp includes it through
// foreach_isa.h.
//
// Every element is read once, so that memory is the limit: differences go from registers to the sums. Sums are kept in
// 8 lanes whatever the instruction set, so each set adds in the same order.

#include "products.h"
#include "weighted_sum.h"

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

AWD_INLINE Floats floats_at(const float* from) {
    Floats value;
    std::memcpy(&value, from, sizeof value);
    return value;
}
AWD_INLINE Floats floats_at(const Bf16* from) {
    Halves stored;
    std::memcpy(&stored, from, sizeof stored);
    return (Floats)(__builtin_convertvector(stored, Words) << 16);
}

template <class Stored>
AWD_INLINE Number difference_at(const Stored* model, const Stored* origin) {
    const Floats value = floats_at(model);
    return __builtin_convertvector(origin != nullptr ? value - floats_at(origin) : value, Number);
}
AWD_INLINE Number difference_at(const double* model, const double* origin) {
    return origin != nullptr ? load(model) - load(origin) : load(model);
}

// sums [COUNT][8] += the products of `count` elements of COUNT vectors with the factors, element e in lane e % 8.
template <int COUNT, bool BASE, class Stored>
static inline void add_dots(const Stored* origin, const Stored* const* models, const double* factors, int64_t count,
                            double* sums) {
    constexpr int PARTS = int(SUM_LANES) / LANES;
    const Stored* m[COUNT];
    Number total[COUNT][PARTS];
    for (int j = 0; j < COUNT; ++j) {
        m[j] = models[j];
        for (int part = 0; part < PARTS; ++part) total[j][part] = load(sums + j * SUM_LANES + part * LANES);
    }
    int64_t e = 0;
    for (; e + SUM_LANES <= count; e += SUM_LANES) {
#pragma GCC unroll 4
        for (int part = 0; part < PARTS; ++part) {
            const int64_t at = e + part * LANES;
            const Number factor = load(factors + at);
#pragma GCC unroll 4
            for (int j = 0; j < COUNT; ++j) {
                total[j][part] += difference_at(m[j] + at, BASE ? origin + at : nullptr) * factor;
            }
        }
    }
    for (int j = 0; j < COUNT; ++j) {
        for (int part = 0; part < PARTS; ++part) {
            std::memcpy(sums + j * SUM_LANES + part * LANES, &total[j][part], sizeof(Number));
        }
        for (int64_t rest = e; rest < count; ++rest) {
            const auto value = value_of(m[j][rest]);
            sums[j * SUM_LANES + rest - e] += double(BASE ? value - value_of(origin[rest]) : value) * factors[rest];
        }
    }
}

template <int COUNT, class Stored>
static inline void add_dots_of(const Stored* origin, const Stored* const* models, const double* factors, int64_t count,
                               double* sums) {
    origin != nullptr ? add_dots<COUNT, true>(origin, models, factors, count, sums)
                      : add_dots<COUNT, false>(origin, models, factors, count, sums);
}

static inline int64_t row_numbers(int64_t k) { return k * SUM_LANES + (3 + BESIDE) * CHUNK; }

// The gradient's elements as float64. room: as many, and as many of Real.
template <class Real>
AWD_INLINE void load_factors(const MultiDotJob& job, int64_t at, int64_t count, double* factors, Real* room) {
    const Real* const none = nullptr;
    widen(none, load_block(job.gradient, job.gradient_dtype, at, count, room), count, factors);
}

// out [K] = products of the elements [first, last) of memory, all of one group.
template <class Stored, class Real>
static inline void dots_of_elements(const MultiDotJob& job, int64_t first, int64_t last, double* out, double* room) {
    const Tensors& in = job.in;
    double* sums = room;                        // [K][8]
    double* factors = sums + in.k * SUM_LANES;  // [CHUNK]
    Real* gradient_room = reinterpret_cast<Real*>(factors + CHUNK);
    Stored* rooms = reinterpret_cast<Stored*>(factors + 2 * CHUNK);  // base, models
    for (int64_t index = 0; index < in.k * SUM_LANES; ++index) sums[index] = 0.0;
    for (int64_t at = first; at < last; at += CHUNK) {
        const int64_t count = last - at < CHUNK ? last - at : CHUNK;
        load_factors(job, at, count, factors, gradient_room);
        const Stored* origin = nullptr;
        if (in.base != nullptr) origin = stored_block(in.base, in.dtype, at, count, rooms);
        for (int j = 0; j < in.k; j += BESIDE) {
            const int beside = in.k - j < BESIDE ? in.k - j : BESIDE;
            const Stored* models[BESIDE] = {};
            for (int i = 0; i < beside; ++i) {
                models[i] = stored_block(in.models[j + i], in.dtype, at, count, rooms + (1 + i) * CHUNK);
            }
            double* to = sums + j * SUM_LANES;
            switch (beside) {
                case 1:
                    add_dots_of<1>(origin, models, factors, count, to);
                    break;
                case 2:
                    add_dots_of<2>(origin, models, factors, count, to);
                    break;
                case 3:
                    add_dots_of<3>(origin, models, factors, count, to);
                    break;
                default:
                    add_dots_of<BESIDE>(origin, models, factors, count, to);
            }
        }
    }
    for (int j = 0; j < in.k; ++j) out[j] = sum_of(sums + j * SUM_LANES);
}

// One item: several units, each a segment of a row group's elements.
template <class Stored, class Real>
static inline void dots_of_rows(const MultiDotJob& job, int64_t item, double* room) {
    const int64_t size = job.shape.columns, units = job.shape.rows * job.segments;
    const int64_t end = (item + 1) * job.units_per_item < units ? (item + 1) * job.units_per_item : units;
    for (int64_t unit = item * job.units_per_item; unit < end; ++unit) {
        const int64_t start = unit / job.segments * size, first = unit % job.segments * job.segment;
        const int64_t last = first + job.segment < size ? first + job.segment : size;
        dots_of_elements<Stored, Real>(job, start + first, start + last, job.partial + unit * job.in.k, room);
    }
}

// sums [count] += the products of one vector's elements with the factors, a group each.
template <class Stored>
static __attribute__((noinline)) void add_each(const Stored* __restrict origin, const Stored* __restrict model,
                                               const double* __restrict factors, int64_t count,
                                               double* __restrict sums) {
    if (origin != nullptr) {
        for (int64_t c = 0; c < count; ++c) sums[c] += double(value_of(model[c]) - value_of(origin[c])) * factors[c];
    } else {
        for (int64_t c = 0; c < count; ++c) sums[c] += double(value_of(model[c])) * factors[c];
    }
}

// Rows are too far apart for the CPU to see by itself which memory comes next.
AWD_INLINE void fetch_ahead(const void* tensor, Dtype dtype, int64_t at, int64_t count) {
    const char* const from = address(tensor, dtype, at);
    for (int64_t byte = 0; byte < count * size_of(dtype); byte += 64) __builtin_prefetch(from + byte, 0, 2);
}

static inline int64_t column_room(int64_t k) { return (k + 4) * ACROSS; }

// One item: a segment of the rows of ACROSS columns.
template <class Stored, class Real>
static inline void dots_of_columns(const MultiDotJob& job, int64_t item, double* room) {
    const Tensors& in = job.in;
    const int64_t columns = job.shape.columns, column = item / job.segments * ACROSS, segment = item % job.segments;
    const int64_t width = std::min(columns - column, ACROSS);
    const int64_t first = segment * job.segment, last = std::min(first + job.segment, job.shape.rows);
    double* sums = room;                     // [K][ACROSS]
    double* factors = sums + in.k * ACROSS;  // [ACROSS]
    Real* gradient_room = reinterpret_cast<Real*>(factors + ACROSS);
    Stored* rooms = reinterpret_cast<Stored*>(factors + 2 * ACROSS);  // base, model
    for (int64_t index = 0; index < in.k * ACROSS; ++index) sums[index] = 0.0;
    for (int64_t row = first; row < last; ++row) {
        const int64_t at = row * columns + column;
        const bool more = row + 1 < last;
        if (more) fetch_ahead(job.gradient, job.gradient_dtype, at + columns, width);
        load_factors(job, at, width, factors, gradient_room);
        const Stored* origin = nullptr;
        if (in.base != nullptr) {
            if (more) fetch_ahead(in.base, in.dtype, at + columns, width);
            origin = stored_block(in.base, in.dtype, at, width, rooms);
        }
        for (int j = 0; j < in.k; ++j) {
            if (more) fetch_ahead(in.models[j], in.dtype, at + columns, width);
            add_each(origin, stored_block(in.models[j], in.dtype, at, width, rooms + ACROSS), factors, width,
                     sums + j * ACROSS);
        }
    }
    for (int64_t c = 0; c < width; ++c) {
        double* to = job.partial + ((column + c) * job.segments + segment) * in.k;
        for (int j = 0; j < in.k; ++j) to[j] = sums[j * ACROSS + c];
    }
}

template <class Stored, class Real>
static inline void dots_of(const MultiDotJob& job, int64_t item, double* room) {
    job.shape.by_column ? dots_of_columns<Stored, Real>(job, item, room) : dots_of_rows<Stored, Real>(job, item, room);
}

static void multi_dot_item(const MultiDotJob& job, int64_t item, double* room) {
    if (job.in.dtype == Dtype::f64) return dots_of<double, double>(job, item, room);
    job.in.dtype == Dtype::bf16 ? dots_of<Bf16, float>(job, item, room) : dots_of<float, float>(job, item, room);
}
