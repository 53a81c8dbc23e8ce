// G of every group: a warp for a segment of a row, or for a segment of 32 columns. Segments are added in order.

#include "products.cuh"

namespace awd::cuda {
namespace {

constexpr int64_t SEGMENT = 16384;      // elements of a row group for a warp
constexpr int64_t SEGMENT_ROWS = 1024;  // rows of a column group
constexpr int64_t MOST_SEGMENTS = 512;  // of a group; longer ones where they would be more
constexpr unsigned WARPS = 4;           // of a block
constexpr unsigned COLUMN_WARPS = 2;    // so that a block's tiles fit the shared memory of every GPU

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

// out: [groups][slots][K][K], or G itself where slots is 1. blockIdx.y: the pair of tiles of tasks.
template <Dtype D>
__global__ void __launch_bounds__(WARPS* WARP)
    gram_rows(const __grid_constant__ Table table, int64_t slots, double* __restrict__ out) {
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
    double* to = out + ((part.first_group + group) * slots + segment) * k * k;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
        if (i < k && j + e < k) {
            to[i * k + j + e] = c[e];
            if (upper != across) to[(j + e) * k + i] = c[e];
        }
    }
}

// The same of column groups: a column for each lane.
template <Dtype D>
__global__ void __launch_bounds__(COLUMN_WARPS* WARP)
    gram_columns(const __grid_constant__ Table table, int64_t slots, double* __restrict__ out) {
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
    double* to = out + ((part.first_group + column + lane) * slots + segment) * k * k;
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

// G from its segments: a thread for an entry. Units are groups.
__global__ void add_segments(const __grid_constant__ Table table, int64_t slots, const double* __restrict__ parts,
                             double* __restrict__ out) {
    const int square = table.k * table.k;
    const int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at >= table.units * square) return;
    const int64_t unit = table.first_unit + at / square;
    const Part& part = table.part(table.find(unit));
    const int64_t group = part.first_group + unit - part.first_unit;
    const int64_t segments = cut(part.size(), part.by_column).count;
    double sum = 0.0;
    for (int64_t segment = 0; segment < segments; ++segment)
        sum += parts[(group * slots + segment) * square + at % square];
    out[group * square + at % square] = sum;
}

int64_t slots_of(const Batch& batch) {
    int64_t most = 1;
    for (const Parameter& parameter : batch.parameters) {
        const int64_t count = cut(parameter.shape.size(), parameter.shape.by_column).count;
        if (count > most) most = count;
    }
    return most;
}

template <Dtype D>
void run(const Batch& batch, int64_t slots, double* out) {
    const int64_t side = divided(batch.k, TILE), pairs = side * (side + 1) / 2;
    const Stream stream = static_cast<Stream>(batch.stream);
    const auto rows = [](const Parameter& parameter) {
        const Matrix& shape = parameter.shape;
        return shape.by_column ? 0 : shape.rows * cut(shape.columns, false).count;
    };
    const auto columns = [](const Parameter& parameter) {
        const Matrix& shape = parameter.shape;
        return shape.by_column ? divided(shape.columns, TILE_COLUMNS) * cut(shape.rows, true).count : 0;
    };
    for_each_table(batch, rows, [&](const Table& table) {
        launch("gram", gram_rows<D>, divided(table.units, WARPS), pairs, WARPS * WARP, 0, stream, table, slots, out);
    });
    for_each_table(batch, columns, [&](const Table& table) {
        launch("gram", gram_columns<D>, divided(table.units, COLUMN_WARPS), pairs, COLUMN_WARPS * WARP,
               COLUMN_WARPS * 2 * COLUMN_ROOM<TILE> * sizeof(typename Storage<D>::Raw), stream, table, slots, out);
    });
}

}  // namespace

int64_t gram_numbers(const Batch& batch) {
    const int64_t slots = slots_of(batch);
    return slots == 1 ? 0 : groups_of(batch) * slots * batch.k * batch.k;
}

void gram(const Batch& batch, double* work, double* out) {
    const int64_t slots = slots_of(batch);
    double* to = slots == 1 ? out : work;
    switch (batch.dtype) {
        case Dtype::f32:
            run<Dtype::f32>(batch, slots, to);
            break;
        case Dtype::bf16:
            run<Dtype::bf16>(batch, slots, to);
            break;
        case Dtype::f16:
            run<Dtype::f16>(batch, slots, to);
            break;
        case Dtype::f64:
            run<Dtype::f64>(batch, slots, to);
            break;
    }
    if (slots == 1) return;
    const auto groups = [](const Parameter& parameter) { return parameter.shape.groups(); };
    for_each_table(batch, groups, [&](const Table& table) {
        launch("gram", add_segments, divided(table.units * batch.k * batch.k, 256), 1, 256, 0,
               static_cast<Stream>(batch.stream), table, slots, to, out);
    });
}

}  // namespace awd::cuda
