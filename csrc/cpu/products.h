// Inner products of K task vectors: the block that is in the first-level cache, for one instruction set.
//
// The vectors are widened to float64 there, and all K (K + 1) / 2 products are taken from it. Sums are kept in 8 lanes
// whatever the instruction set, so each set adds in the same order.

#include "../number.h"
#include "fetch.h"
#include "storage.h"

#ifndef AWD_PRODUCTS
#define AWD_PRODUCTS

// Vectors on a side of a tile of products: as many as keep its sums in registers.
constexpr int SIDE = LANES == 8 ? 4 : 3;

template <int I, int J, bool DIAGONAL>
AWD_INLINE void add_step(const double* left, const double* right, int64_t stride, Number (&tile)[I][J]) {
    Number factors[J];
#pragma GCC unroll 4
    for (int j = 0; j < J; ++j) factors[j] = load(right + j * stride);
#pragma GCC unroll 4
    for (int i = 0; i < I; ++i) {
        const Number factor = DIAGONAL ? factors[i] : load(left + i * stride);
#pragma GCC unroll 4
        for (int j = DIAGONAL ? i : 0; j < J; ++j) tile[i][j] += factor * factors[j];
    }
}

// sums[i][j][lane] (+)= sum over steps of left[i][step][lane] * right[j][step][lane], where `diagonal` only for i <= j.
// stride: from vector to vector. fresh: the sums start from 0.
template <int I, int J, bool DIAGONAL>
static inline void add_tile(const double* left, const double* right, int64_t stride, int64_t steps, bool fresh,
                            double* sums, int64_t row, const Wanted& wanted) {
    for (int lane = 0; lane < SUM_LANES; lane += LANES) {
        Number tile[I][J];
#pragma GCC unroll 4
        for (int i = 0; i < I; ++i) {
#pragma GCC unroll 4
            for (int j = DIAGONAL ? i : 0; j < J; ++j) {
                tile[i][j] = fresh ? every(0.0) : load(sums + i * row + j * SUM_LANES + lane);
            }
        }
        const double *a = left + lane, *b = right + lane;
        const double* const end = b + steps * SUM_LANES;
        for (int64_t byte = 0; b + 3 * SUM_LANES < end; byte += 4 * wanted.bytes) {
            for (int stream = 0; stream < wanted.count; ++stream) {
                __builtin_prefetch(wanted.streams[stream] + byte, 0, 2);
                __builtin_prefetch(wanted.streams[stream] + byte + 2 * wanted.bytes, 0, 2);
            }
#pragma GCC unroll 4
            for (int step = 0; step < 4; ++step, a += SUM_LANES, b += SUM_LANES) {
                add_step<I, J, DIAGONAL>(a, b, stride, tile);
            }
        }
        for (; b < end; a += SUM_LANES, b += SUM_LANES) add_step<I, J, DIAGONAL>(a, b, stride, tile);
#pragma GCC unroll 4
        for (int i = 0; i < I; ++i) {
#pragma GCC unroll 4
            for (int j = DIAGONAL ? i : 0; j < J; ++j) {
                std::memcpy(sums + i * row + j * SUM_LANES + lane, &tile[i][j], sizeof(Number));
            }
        }
    }
}

// The same for all pairs i <= j of K vectors; entries below the diagonal are left undefined.
static inline void add_products(const double* vectors, int k, int64_t stride, int64_t steps, bool fresh, double* sums,
                                const Wanted& wanted) {
    const int64_t row = int64_t(k) * SUM_LANES;
    const int sides = (k + SIDE - 1) / SIDE, tiles = sides * (sides + 1) / 2;
    int tile = 0;
    for (int i = 0; i < k; i += SIDE) {
        const double* left = vectors + i * stride;
        for (int j = i; j < k; j += SIDE, ++tile) {
            const double* right = vectors + j * stride;
            double* to = sums + i * row + j * SUM_LANES;
            const int first = int(int64_t(wanted.count) * tile / tiles);
            const int last = int(int64_t(wanted.count) * (tile + 1) / tiles);
            const Wanted part{wanted.streams + first, last - first, wanted.bytes};
            const int width = k - j < SIDE ? k - j : SIDE;
            switch (i == j ? -width : width) {
                case -4:
                    add_tile<SIDE, SIDE, true>(left, right, stride, steps, fresh, to, row, part);
                    break;
                case -3:
                    add_tile<3, 3, true>(left, right, stride, steps, fresh, to, row, part);
                    break;
                case -2:
                    add_tile<2, 2, true>(left, right, stride, steps, fresh, to, row, part);
                    break;
                case -1:
                    add_tile<1, 1, true>(left, right, stride, steps, fresh, to, row, part);
                    break;
                case 1:
                    add_tile<SIDE, 1, false>(left, right, stride, steps, fresh, to, row, part);
                    break;
                case 2:
                    add_tile<SIDE, 2, false>(left, right, stride, steps, fresh, to, row, part);
                    break;
                case 3:
                    add_tile<SIDE, 3, false>(left, right, stride, steps, fresh, to, row, part);
                    break;
                default:
                    add_tile<SIDE, SIDE, false>(left, right, stride, steps, fresh, to, row, part);
            }
        }
    }
}

// The differences of `count` elements, rounded in their own type.
template <class Real>
static __attribute__((noinline)) void widen(const Real* __restrict origin, const Real* __restrict model, int64_t count,
                                            double* __restrict vector) {
    if (origin != nullptr) {
        for (int64_t index = 0; index < count; ++index) vector[index] = double(model[index] - origin[index]);
    } else {
        for (int64_t index = 0; index < count; ++index) vector[index] = double(model[index]);
    }
}

AWD_INLINE double sum_of(const double* s) { return ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7])); }

// Numbers of room for sum_elements.
static inline int64_t element_numbers(int64_t k) { return k * k * SUM_LANES + (k + 2) * widened(k) + k + 1; }

// out [K][K] = products of the K vectors' elements [first, last) of memory, all of one group. A lane holds every eighth
// element, and the lanes are added at the end. ahead: elements from the present one to one that will be wanted, or 0.
template <class Real>
static inline void sum_elements(const Tensors& in, int64_t first, int64_t last, int64_t ahead, double* out,
                                double* room) {
    const int k = in.k;
    const int64_t chunk = widened(k);
    double* sums = room;                                                               // [K][K][8]
    double* vectors = sums + k * k * SUM_LANES;                                        // [K][chunk]
    Real* origin_room = reinterpret_cast<Real*>(vectors + k * chunk);                  // [chunk]
    Real* model_room = reinterpret_cast<Real*>(vectors + (k + 1) * chunk);             // [chunk]
    const char** streams = reinterpret_cast<const char**>(vectors + (k + 2) * chunk);  // [K + 1]
    if (first == last) {
        for (int index = 0; index < k * k; ++index) out[index] = 0.0;
        return;
    }
    const Wanted wanted{streams, ahead == 0 ? 0 : in.base != nullptr ? k + 1 : k, SUM_LANES * size_of(in.dtype)};
    for (int64_t at = first; at < last; at += chunk) {
        const int64_t count = last - at < chunk ? last - at : chunk;
        const int64_t steps = (count + SUM_LANES - 1) / SUM_LANES;
        const Real* origin = nullptr;
        if (in.base != nullptr) {
            streams[k] = address(in.base, in.dtype, at + ahead);
            origin = load_block(in.base, in.dtype, at, count, origin_room);
        }
        for (int j = 0; j < k; ++j) {
            double* vector = vectors + j * chunk;
            streams[j] = address(in.models[j], in.dtype, at + ahead);
            widen(origin, load_block(in.models[j], in.dtype, at, count, model_room), count, vector);
            for (int64_t index = count; index < steps * SUM_LANES; ++index) vector[index] = 0.0;
        }
        add_products(vectors, k, chunk, steps, at == first, sums, wanted);
    }
    for (int i = 0; i < k; ++i) {
        for (int j = i; j < k; ++j) out[i * k + j] = sum_of(sums + (i * k + j) * SUM_LANES);
        for (int j = 0; j < i; ++j) out[i * k + j] = out[j * k + i];
    }
}

#endif
