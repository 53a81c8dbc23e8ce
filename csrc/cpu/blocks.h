// Sizes in which the kernels work: functions of the shape alone, never of the threads or of the instruction set,
// because they fix the order of sums.
#pragma once

#include "../kernels.h"

namespace awd {

constexpr int64_t SUM_LANES = 8;        // partial sums of a product
constexpr int64_t SEGMENT = 65536;      // elements of a row group per partial sum
constexpr int64_t SEGMENT_ROWS = 1024;  // elements of a column group per partial sum
constexpr int64_t COLUMN_TILE = 64;     // columns that are worked on together
constexpr int64_t CHUNK = 384;          // elements whose weighted sums stay in the first-level cache
constexpr int TOGETHER = 8;             // models added in one pass over them
constexpr int64_t STREAMED = 65536;     // elements of an output that is written past the caches

// Elements of each of K vectors that are widened to float64 in the first-level cache.
constexpr int64_t widened(int64_t k) { return k <= 8 ? 384 : k <= 16 ? 192 : 64; }

// Elements per item of work where elements are left out: whole rows where chance depends on ranks in them.
constexpr int64_t dropped_stretch(const Drop& drop) {
    const int64_t columns = drop.chances != nullptr && drop.columns > 1 ? drop.columns : 1;
    return columns < 32768 ? 32768 / columns * columns : columns;
}

}  // namespace awd
