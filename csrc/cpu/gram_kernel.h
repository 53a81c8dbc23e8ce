// G of one unit of work, for one instruction set; gram.cpp includes it through foreach_isa.h.
//
// A block of the K task vectors is widened to float64 in the first-level cache, and all K (K + 1) / 2 products are
// taken from there. Sums are kept in 8 lanes whatever the instruction set, so each set adds in the same order. In row
// groups a lane holds every eighth element of the group, and the lanes are added at the end; in column groups a lane is
// a group.

#include "../number.h"
#include "storage.h"

AWD_INLINE Number load(const double* from) {
    Number value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

// sums[i][j][lane] += sum over steps of left[i][step][lane] * right[j][step][lane]. stride: from vector to vector.
template <int I, int J>
static inline void add_tile(const double* left, const double* right, int64_t stride, int64_t steps, double* sums,
                            int64_t row) {
    for (int lane = 0; lane < SUM_LANES; lane += LANES) {
        Number tile[I][J];
        for (int i = 0; i < I; ++i) {
            for (int j = 0; j < J; ++j) tile[i][j] = load(sums + i * row + j * SUM_LANES + lane);
        }
        for (int64_t step = lane; step < steps * SUM_LANES; step += SUM_LANES) {
            Number factors[J];
            for (int j = 0; j < J; ++j) factors[j] = load(right + j * stride + step);
            for (int i = 0; i < I; ++i) {
                const Number factor = load(left + i * stride + step);
                for (int j = 0; j < J; ++j) tile[i][j] += factor * factors[j];
            }
        }
        for (int i = 0; i < I; ++i) {
            for (int j = 0; j < J; ++j) {
                std::memcpy(sums + i * row + j * SUM_LANES + lane, &tile[i][j], sizeof(Number));
            }
        }
    }
}

// The same for all pairs i <= j of K vectors; entries below the diagonal are left undefined.
static inline void add_products(const double* vectors, int k, int64_t stride, int64_t steps, double* sums) {
    const int64_t row = int64_t(k) * SUM_LANES;
    for (int i = 0; i < k; i += 2) {
        const double* left = vectors + i * stride;
        for (int j = i; j < k; j += 4) {
            const double* right = vectors + j * stride;
            double* tile = sums + i * row + j * SUM_LANES;
            switch ((k - i > 1 ? 4 : 0) + (k - j < 4 ? k - j : 4)) {
                case 1:
                    add_tile<1, 1>(left, right, stride, steps, tile, row);
                    break;
                case 5:
                    add_tile<2, 1>(left, right, stride, steps, tile, row);
                    break;
                case 6:
                    add_tile<2, 2>(left, right, stride, steps, tile, row);
                    break;
                case 7:
                    add_tile<2, 3>(left, right, stride, steps, tile, row);
                    break;
                default:
                    add_tile<2, 4>(left, right, stride, steps, tile, row);
            }
        }
    }
}

// Row groups: adds the K vectors' elements [first, last) of the matrix's memory to the lanes.
template <class Real>
static inline void add_elements(const GramJob& job, int64_t first, int64_t last, double* sums, double* room) {
    const int k = job.in.k;
    double* vectors = room;                                                     // [K][chunk]
    Real* origin_room = reinterpret_cast<Real*>(vectors + k * job.chunk);       // [chunk]
    Real* model_room = reinterpret_cast<Real*>(vectors + (k + 1) * job.chunk);  // [chunk]
    for (int64_t at = first; at < last; at += job.chunk) {
        const int64_t count = last - at < job.chunk ? last - at : job.chunk;
        const int64_t steps = (count + SUM_LANES - 1) / SUM_LANES;
        const Real* origin = nullptr;
        if (job.in.base != nullptr) origin = load_block(job.in.base, job.in.dtype, at, count, origin_room);
        for (int j = 0; j < k; ++j) {
            double* vector = vectors + j * job.chunk;
            const Real* model = load_block(job.in.models[j], job.in.dtype, at, count, model_room);
            if (origin != nullptr) {
                for (int64_t index = 0; index < count; ++index) vector[index] = double(model[index] - origin[index]);
            } else {
                for (int64_t index = 0; index < count; ++index) vector[index] = double(model[index]);
            }
            for (int64_t index = count; index < steps * SUM_LANES; ++index) vector[index] = 0.0;
        }
        add_products(vectors, k, job.chunk, steps, sums);
    }
}

// One item: several units, each a segment of a group's elements.
template <class Real>
static inline void gram_of_rows(const GramJob& job, int64_t item, double* room) {
    const int k = job.in.k;
    const int64_t square = int64_t(k) * k;
    const int64_t size = job.shape.columns;
    double* sums = room;  // [K][K][8]
    const int64_t units = job.shape.rows * job.segments;
    const int64_t end = (item + 1) * job.units_per_item < units ? (item + 1) * job.units_per_item : units;
    for (int64_t unit = item * job.units_per_item; unit < end; ++unit) {
        const int64_t group = unit / job.segments;
        const int64_t first = unit % job.segments * job.segment;
        const int64_t last = first + job.segment < size ? first + job.segment : size;
        for (int64_t index = 0; index < square * SUM_LANES; ++index) sums[index] = 0.0;
        add_elements<Real>(job, group * size + first, group * size + last, sums, room + square * SUM_LANES);
        double* out = job.partial + unit * square;
        for (int i = 0; i < k; ++i) {
            for (int j = i; j < k; ++j) {
                const double* s = sums + (i * k + j) * SUM_LANES;
                out[i * k + j] = out[j * k + i] = ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]));
            }
        }
    }
}

// `count` differences from element `at` on, one per lane.
template <class Real>
AWD_INLINE void spread(const Real* origin, const Real* model, int64_t at, int64_t count, double* lanes) {
    if (origin != nullptr) {
        for (int64_t lane = 0; lane < count; ++lane) lanes[lane] = double(model[at + lane] - origin[at + lane]);
    } else {
        for (int64_t lane = 0; lane < count; ++lane) lanes[lane] = double(model[at + lane]);
    }
}

// Column groups: one item is a segment of the rows of a tile of columns.
template <class Real>
static inline void gram_of_columns(const GramJob& job, int64_t item, double* room) {
    const int k = job.in.k;
    const int64_t square = int64_t(k) * k;
    const int64_t column = item / job.segments * job.tile;
    const int64_t segment = item % job.segments;
    const int64_t left = job.shape.columns - column;
    const int64_t width = left < job.tile ? left : job.tile;
    const int64_t full = width / SUM_LANES, blocks = (width + SUM_LANES - 1) / SUM_LANES;
    const int64_t last = (segment + 1) * job.segment < job.shape.rows ? (segment + 1) * job.segment : job.shape.rows;
    const int64_t stride = TILE_STEPS * SUM_LANES;  // of one vector of one block
    double* sums = room;                            // [block][K][K][8]
    double* vectors = sums + job.tile * square;     // [block][K][step][8]
    Real* origin_room = reinterpret_cast<Real*>(vectors + k * job.chunk);
    Real* model_room = origin_room + job.tile;
    for (int64_t index = 0; index < job.tile * (square + k * TILE_STEPS); ++index) sums[index] = 0.0;
    for (int64_t row = segment * job.segment; row < last;) {
        int64_t step = 0;
        for (; step < TILE_STEPS && row < last; ++step, ++row) {
            const int64_t at = row * job.shape.columns + column;
            const Real* origin = nullptr;
            if (job.in.base != nullptr) origin = load_block(job.in.base, job.in.dtype, at, width, origin_room);
            for (int j = 0; j < k; ++j) {
                const Real* model = load_block(job.in.models[j], job.in.dtype, at, width, model_room);
                double* to = vectors + j * stride + step * SUM_LANES;
                for (int64_t block = 0; block < full; ++block) {
                    spread(origin, model, block * SUM_LANES, SUM_LANES, to + block * k * stride);
                }
                if (full < blocks) spread(origin, model, full * SUM_LANES, width % SUM_LANES, to + full * k * stride);
            }
        }
        for (int64_t block = 0; block < blocks; ++block) {
            add_products(vectors + block * k * stride, k, stride, step, sums + block * square * SUM_LANES);
        }
    }
    for (int64_t c = 0; c < width; ++c) {
        double* out = job.partial + ((column + c) * job.segments + segment) * square;
        const double* lanes = sums + c / SUM_LANES * square * SUM_LANES + c % SUM_LANES;
        for (int i = 0; i < k; ++i) {
            for (int j = i; j < k; ++j) out[i * k + j] = out[j * k + i] = lanes[(i * k + j) * SUM_LANES];
        }
    }
}

static void gram_item(const GramJob& job, int64_t item, double* room) {
    const bool wide = job.in.dtype == Dtype::f64;
    if (job.shape.by_column) {
        wide ? gram_of_columns<double>(job, item, room) : gram_of_columns<float>(job, item, room);
    } else {
        wide ? gram_of_rows<double>(job, item, room) : gram_of_rows<float>(job, item, room);
    }
}
