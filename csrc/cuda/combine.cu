// The weighted sum: a warp for a stretch of a row, or for a stretch of 32 columns.

#include "weighted_sum.cuh"

namespace awd::cuda {
namespace {

constexpr int64_t STRETCH = 2048;  // elements of a row
constexpr int64_t DOWN = 64;       // rows of 32 columns
constexpr unsigned WARPS = 4;

template <Dtype D>
__global__ void __launch_bounds__(WARPS* WARP, 4)
    combine_rows(const __grid_constant__ Table table, const RealOf<D>* __restrict__ weights) {
    const int64_t at = int64_t(blockIdx.x) * WARPS + threadIdx.x / WARP;
    if (at >= table.units) return;
    const int64_t unit = table.first_unit + at;
    const int index = table.find(unit);
    const Part& part = table.part(index);
    const int64_t stretches = (part.columns + STRETCH - 1) / STRETCH, local = unit - part.first_unit;
    const int64_t row = local / stretches, first = local % stretches * STRETCH;
    const int64_t count = part.columns - first < STRETCH ? part.columns - first : STRETCH;
    const RealOf<D>* w = weights + (part.first_group + row) * table.k;
    combine_stretch<D>(table, index, row * part.columns + first, count, [w](int j) { return w[j]; });
}

template <Dtype D>
__global__ void __launch_bounds__(WARPS* WARP, 4)
    combine_tiles(const __grid_constant__ Table table, const RealOf<D>* __restrict__ weights) {
    const int64_t at = int64_t(blockIdx.x) * WARPS + threadIdx.x / WARP;
    if (at >= table.units) return;
    const int64_t unit = table.first_unit + at;
    const int index = table.find(unit);
    const Part& part = table.part(index);
    const int64_t stretches = (part.rows + DOWN - 1) / DOWN, local = unit - part.first_unit;
    const int64_t column = local / stretches * 32, first = local % stretches * DOWN;
    const int64_t last = part.rows - first < DOWN ? part.rows : first + DOWN;
    const RealOf<D>* w = weights + (part.first_group + column) * table.k;
    const int k = table.k;
    combine_columns<D>(table, index, first, last, column, [w, k](int j, int c) { return w[int64_t(c) * k + j]; });
}

template <Dtype D>
void run(const Batch& batch, const void* weights) {
    const Stream stream = static_cast<Stream>(batch.stream);
    const RealOf<D>* w = static_cast<const RealOf<D>*>(weights);
    const auto rows = [](const Parameter& parameter) {
        const Matrix& shape = parameter.shape;
        return shape.by_column ? 0 : shape.rows * divided(shape.columns, STRETCH);
    };
    const auto columns = [](const Parameter& parameter) {
        const Matrix& shape = parameter.shape;
        return shape.by_column ? divided(shape.columns, 32) * divided(shape.rows, DOWN) : 0;
    };
    for_each_table(batch, rows, [&](const Table& table) {
        launch("combine", combine_rows<D>, divided(table.units, WARPS), 1, WARPS * WARP, 0, stream, table, w);
    });
    for_each_table(batch, columns, [&](const Table& table) {
        launch("combine", combine_tiles<D>, divided(table.units, WARPS), 1, WARPS * WARP, 0, stream, table, w);
    });
}

}  // namespace

void combine(const Batch& batch, const void* weights) {
    switch (batch.dtype) {
        case Dtype::f32:
            return run<Dtype::f32>(batch, weights);
        case Dtype::bf16:
            return run<Dtype::bf16>(batch, weights);
        case Dtype::f16:
            return run<Dtype::f16>(batch, weights);
        case Dtype::f64:
            return run<Dtype::f64>(batch, weights);
    }
}

}  // namespace awd::cuda
