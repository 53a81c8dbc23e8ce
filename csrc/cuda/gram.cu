// G of every group: a warp for a segment of a row, or for a segment of 32 columns. Segments are added in order.

#include "products.cuh"
#include "segments.cuh"

namespace awd::cuda {
namespace {

constexpr unsigned WARPS = 4;         // of a block
constexpr unsigned COLUMN_WARPS = 2;  // so that a block's tiles fit the shared memory of every GPU

// out: G, or the products of each unit [units][K][K] where `apart`. blockIdx.y: the pair of tiles of tasks.
template <Dtype D>
__global__ void __launch_bounds__(WARPS* WARP)
    gram_rows(const __grid_constant__ Table table, bool apart, double* __restrict__ out) {
    const int64_t at = int64_t(blockIdx.x) * WARPS + threadIdx.x / WARP;
    if (at >= table.units) return;
    const int64_t unit = table.first_unit + at;
    const int index = table.find(unit);
    const Part& part = table.part(index);
    const int64_t size = part.columns;
    const Cut segments = cut(size, false);
    const int64_t local = unit - part.first_unit, group = local / segments.count, segment = local % segments.count;
    const int64_t first = segment * segments.length;
    const int64_t count = size - first < segments.length ? size - first : segments.length;
    // blockIdx.y counts the lower triangle of tiles: I (I + 1) / 2 + J.
    int upper = 0;
    while ((upper + 1) * (upper + 2) / 2 <= int(blockIdx.y)) ++upper;
    const int across = int(blockIdx.y) - upper * (upper + 1) / 2;
    const int lane = int(lane_index()), k = table.k;
    const int i = upper * TILE + lane / 4, own = across * TILE + lane / 4, j = across * TILE + 2 * (lane % 4);
    const void* left = i < k ? table.model(index, i) : nullptr;
    double c[2] = {0.0, 0.0};
    if (upper == across) {
        add_row_products<D, true>(part.base, left, nullptr, group * size + first, count, part.packed, c);
    } else {
        const void* right = own < k ? table.model(index, own) : nullptr;
        add_row_products<D, false>(part.base, left, right, group * size + first, count, part.packed, c);
    }
    double* to = out + (apart ? unit : part.first_group + group) * k * k;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
        if (i < k && j + e < k) {
            to[i * k + j + e] = c[e];
            if (upper != across) to[(j + e) * k + i] = c[e];
        }
    }
}

// The same of column groups: a column for each lane, [units][32][K][K] where `apart`.
template <Dtype D>
__global__ void __launch_bounds__(COLUMN_WARPS* WARP)
    gram_columns(const __grid_constant__ Table table, bool apart, double* __restrict__ out) {
    using Raw = typename Storage<D>::Raw;
    const int64_t at = int64_t(blockIdx.x) * COLUMN_WARPS + threadIdx.x / WARP;
    if (at >= table.units) return;
    const int64_t unit = table.first_unit + at;
    const int index = table.find(unit);
    const Part& part = table.part(index);
    const Cut segments = cut(part.rows, true);
    const int64_t local = unit - part.first_unit;
    const int64_t column = local / segments.count * TILE_COLUMNS, segment = local % segments.count;
    const int64_t first = segment * segments.length;
    const int64_t last = part.rows - first < segments.length ? part.rows : first + segments.length;
    int upper = 0;
    while ((upper + 1) * (upper + 2) / 2 <= int(blockIdx.y)) ++upper;
    const int across = int(blockIdx.y) - upper * (upper + 1) / 2;
    const int k = table.k, lane = int(lane_index());
    Raw* room = shared_memory<Raw>() + threadIdx.x / WARP * 2 * COLUMN_ROOM<TILE>;
    Raw* other = upper == across ? room : room + COLUMN_ROOM<TILE>;
    const bool has_base = part.base != nullptr;
    double sums[TILE * TILE];
#pragma unroll
    for (int entry = 0; entry < TILE * TILE; ++entry) sums[entry] = 0.0;
    for (int64_t row = first; row < last; row += TILE_ROWS) {
        const int rows = int(last - row < TILE_ROWS ? last - row : TILE_ROWS);
        fetch_columns<D, TILE>(table, index, upper * TILE, row, column, room);
        if (upper != across) fetch_columns<D, TILE>(table, index, across * TILE, row, column, other);
#pragma unroll 1
        for (int down = 0; down < rows; ++down) {
            RealOf<D> left[TILE], right[TILE];
            column_differences<D, TILE>(room, down, k - upper * TILE, has_base, left);
            column_differences<D, TILE>(other, down, k - across * TILE, has_base, right);
#pragma unroll
            for (int i = 0; i < TILE; ++i) {
#pragma unroll
                for (int j = 0; j < TILE; ++j) {
                    sums[i * TILE + j] = fma(double(left[i]), double(right[j]), sums[i * TILE + j]);
                }
            }
        }
        __syncwarp();
    }
    if (column + lane >= part.columns) return;
    double* to = out + (apart ? unit * TILE_COLUMNS + lane : part.first_group + column + lane) * k * k;
#pragma unroll
    for (int i = 0; i < TILE; ++i) {
#pragma unroll
        for (int j = 0; j < TILE; ++j) {
            const int x = upper * TILE + i, y = across * TILE + j;
            if (x < k && y < k) {
                to[x * k + y] = sums[i * TILE + j];
                if (upper != across) to[y * k + x] = sums[i * TILE + j];
            }
        }
    }
}

// work: of the units with several segments.
template <Dtype D, bool BY_COLUMN, bool SEVERAL>
void run(const Batch& batch, double* work, double* out) {
    const int64_t side = divided(batch.k, TILE), pairs = side * (side + 1) / 2;
    const Stream stream = static_cast<Stream>(batch.stream);
    const int groups = BY_COLUMN ? TILE_COLUMNS : 1;
    for_each_table(batch, segment_units<BY_COLUMN, SEVERAL>, [&](const Table& table) {
        double* to = SEVERAL ? work : out;
        if constexpr (BY_COLUMN) {
            launch("gram", gram_columns<D>, divided(table.units, COLUMN_WARPS), pairs, COLUMN_WARPS * WARP,
                   COLUMN_WARPS * 2 * COLUMN_ROOM<TILE> * sizeof(typename Storage<D>::Raw), stream, table, SEVERAL, to);
        } else {
            launch("gram", gram_rows<D>, divided(table.units, WARPS), pairs, WARPS * WARP, 0, stream, table, SEVERAL,
                   to);
        }
        if (SEVERAL) {
            const int square = batch.k * batch.k;
            launch("gram", add_segments, divided(table.units * groups * square, 256), 1, 256, 0, stream, table, groups,
                   square, work, out);
        }
    });
}

int64_t row_numbers(const Batch& batch) { return units_of(batch, segment_units<false, true>) * batch.k * batch.k; }

template <Dtype D>
void run_all(const Batch& batch, double* work, double* out) {
    run<D, false, false>(batch, work, out);
    run<D, false, true>(batch, work, out);
    run<D, true, false>(batch, work, out);
    run<D, true, true>(batch, work + row_numbers(batch), out);
}

}  // namespace

int64_t gram_numbers(const Batch& batch) {
    return row_numbers(batch) + units_of(batch, segment_units<true, true>) * TILE_COLUMNS * batch.k * batch.k;
}

void gram(const Batch& batch, double* work, double* out) {
    switch (batch.dtype) {
        case Dtype::f32:
            return run_all<Dtype::f32>(batch, work, out);
        case Dtype::bf16:
            return run_all<Dtype::bf16>(batch, work, out);
        case Dtype::f16:
            return run_all<Dtype::f16>(batch, work, out);
        case Dtype::f64:
            return run_all<Dtype::f64>(batch, work, out);
    }
}

}  // namespace awd::cuda
