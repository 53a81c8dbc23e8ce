// Inner products of column groups, for one instruction set: a lane of a sum is a group.

#include "products.h"

#ifndef AWD_COLUMN_PRODUCTS
#define AWD_COLUMN_PRODUCTS

constexpr int64_t STRIP = 16;  // columns that are widened at a time: a cache line of float32, two sets of lanes

// Rows that are widened at a time, so that a strip of K vectors stays in the first-level cache.
inline int64_t strip_steps(int k) { return k <= 8 ? 32 : k <= 16 ? 16 : 8; }

// Numbers of room for sum_columns with so many columns.
static inline int64_t column_numbers(int64_t k, int64_t width) {
    const int64_t blocks = (width + STRIP - 1) / STRIP * 2;
    return blocks * k * k * SUM_LANES + k * strip_steps(int(k)) * STRIP + 2 * STRIP + k + 1;
}

// The differences of up to 8 elements, one per lane.
template <class Real>
AWD_INLINE void widen_lanes(const Real* origin, const Real* model, int64_t count, double* lanes) {
    if (count >= SUM_LANES) {
        widen(origin, model, SUM_LANES, lanes);
    } else if (count > 0) {
        widen(origin, model, count, lanes);
    }
}

// out [width][K][K], `stride` numbers apart = products of the elements in rows [first, last) of each column from
// `column` on.
template <class Real>
static inline void sum_columns(const Tensors& in, const Matrix& shape, int64_t column, int64_t width, int64_t first,
                               int64_t last, double* out, int64_t stride, double* room) {
    const int k = in.k;
    const int64_t square = int64_t(k) * k, steps = strip_steps(k), strips = (width + STRIP - 1) / STRIP;
    const int64_t vector = steps * SUM_LANES, block = k * vector;  // numbers of one vector and of all, in 8 columns
    double* sums = room;                                           // [2 strips][K][K][8]
    double* vectors = sums + 2 * strips * square * SUM_LANES;      // [2][K][steps][8]
    Real* origin_room = reinterpret_cast<Real*>(vectors + 2 * block);
    Real* model_room = origin_room + STRIP;
    const char** streams = reinterpret_cast<const char**>(vectors + 2 * block + 2 * STRIP);  // [K + 1]
    for (int64_t index = 0; index < 2 * strips * square * SUM_LANES; ++index) sums[index] = 0.0;
    for (int64_t index = 0; index < 2 * block; ++index) vectors[index] = 0.0;
    for (int64_t row = first; row < last; row += steps) {
        const int64_t count = last - row < steps ? last - row : steps;
        for (int64_t strip = 0; strip < strips; ++strip) {
            const int64_t left = width - strip * STRIP, columns = left < STRIP ? left : STRIP;
            const int64_t start = row * shape.columns + column + strip * STRIP;
            for (int64_t step = 0; step < count; ++step) {
                const int64_t at = start + step * shape.columns;
                const Real* origin = nullptr;
                if (in.base != nullptr) origin = load_block(in.base, in.dtype, at, columns, origin_room);
                const Real* next = origin != nullptr ? origin + SUM_LANES : nullptr;
                for (int j = 0; j < k; ++j) {
                    const Real* model = load_block(in.models[j], in.dtype, at, columns, model_room);
                    double* to = vectors + j * vector + step * SUM_LANES;
                    widen_lanes(origin, model, columns, to);
                    widen_lanes(next, model + SUM_LANES, columns - SUM_LANES, to + block);
                }
            }
            for (int half = 0; half < 2 && half * SUM_LANES < columns; ++half) {
                // The next rows of the strip: every second one beside each half.
                const int64_t ahead = start + (steps + half) * shape.columns;
                for (int j = 0; j < k; ++j) streams[j] = address(in.models[j], in.dtype, ahead);
                if (in.base != nullptr) streams[k] = address(in.base, in.dtype, ahead);
                const int count_streams = row + steps >= last ? 0 : in.base != nullptr ? k + 1 : k;
                const Wanted wanted{streams, count_streams, shape.columns * size_of(in.dtype)};
                double* to = sums + (2 * strip + half) * square * SUM_LANES;
                add_products(vectors + half * block, k, vector, count, false, to, wanted);
            }
        }
    }
    for (int64_t c = 0; c < width; ++c) {
        double* to = out + c * stride;
        const double* lanes = sums + c / SUM_LANES * square * SUM_LANES + c % SUM_LANES;
        for (int i = 0; i < k; ++i) {
            for (int j = i; j < k; ++j) to[i * k + j] = to[j * k + i] = lanes[(i * k + j) * SUM_LANES];
        }
    }
}

#endif
