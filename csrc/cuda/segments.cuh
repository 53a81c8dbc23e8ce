// Groups in segments, each the work of one warp, whose results are added in order.
#pragma once

#include "table.cuh"

namespace awd::cuda {
namespace {

constexpr int64_t SEGMENT = 16384;      // elements of a row group for a warp
constexpr int64_t SEGMENT_ROWS = 1024;  // rows of a column group
constexpr int64_t MOST_SEGMENTS = 512;  // of a group; longer ones where they would be more
constexpr int SEGMENT_COLUMNS = 32;     // column groups of a unit

struct Cut {
    int64_t length, count;
};

// The segments of a group: a function of the shape alone, for it fixes the order of sums.
__host__ __device__ Cut cut(int64_t size, bool by_column) {
    const int64_t usual = by_column ? SEGMENT_ROWS : SEGMENT;
    int64_t length = usual;
    if (size > usual * MOST_SEGMENTS) length = (size + usual * MOST_SEGMENTS - 1) / (usual * MOST_SEGMENTS) * usual;
    return {length, size > length ? (size + length - 1) / length : 1};
}

// The results of groups from those of their segments, which are units behind each other: a thread for a number of a
// unit's first segment. groups: of a unit, one row or 32 columns. each: numbers of a group.
__global__ void add_segments(const __grid_constant__ Table table, int groups, int each,
                             const double* __restrict__ parts, double* __restrict__ out) {
    const int numbers = groups * each;
    const int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at >= table.units * numbers) return;
    const int64_t unit = table.first_unit + at / numbers;
    const Part& part = table.part(table.find(unit));
    const int64_t segments = cut(part.size(), part.by_column).count, local = unit - part.first_unit;
    const int64_t group = local / segments * groups + at % numbers / each;
    if (local % segments != 0 || group >= part.groups()) return;
    double sum = 0.0;
    for (int64_t segment = 0; segment < segments; ++segment) sum += parts[(unit + segment) * numbers + at % numbers];
    out[(part.first_group + group) * each + at % each] = sum;
}

// The units of a parameter, if its groups are rows (or columns) and in one segment (or in several).
template <bool BY_COLUMN, bool SEVERAL>
int64_t segment_units(const Parameter& parameter) {
    const Matrix& shape = parameter.shape;
    const int64_t count = cut(shape.size(), shape.by_column).count;
    if (shape.by_column != BY_COLUMN || (count > 1) != SEVERAL) return 0;
    return (BY_COLUMN ? divided(shape.columns, SEGMENT_COLUMNS) : shape.rows) * count;
}

}  // namespace
}  // namespace awd::cuda
