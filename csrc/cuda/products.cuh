// Gram matrices by a warp: of one row, by the tensor cores' float64 products of 8 x 8; of 32 columns, a column a lane.
//
// Differences of models and base are rounded once to Real, products and sums are float64.
#pragma once

#include "table.cuh"

namespace awd::cuda {

constexpr int TILE = 8;     // vectors on a side of a tile of products
constexpr int STREAMS = 6;  // packets of each of its two or three streams that a lane has on the way
constexpr int TILE_COLUMNS = 32;
constexpr int TILE_ROWS = 8;  // of a tile of columns in shared memory
constexpr Packet NOTHING = {{0, 0, 0, 0}};

// c += the products, over elements [at, at + count) of a row, of eight vectors with eight: lane 4 i + e gives vector i
// of either side (`left`, `right`: its model, or null for a vector of zeros) and gets the products of left vector i
// with right vectors 2 e and 2 e + 1.
template <Dtype D, bool SAME>
static __device__ __forceinline__ void add_row_products(const void* base, const void* left, const void* right,
                                                        int64_t at, int64_t count, bool packed, double (&c)[2]) {
    constexpr int PACKET = PACKET_OF<D>;
    using Real = RealOf<D>;
    const int quarter = int(lane_index() % 4);
    const int64_t packets = packed ? count / PACKET : 0;
    const auto from = [at](const void* tensor, int64_t packet) {
        return static_cast<const typename Storage<D>::Raw*>(tensor) + at + packet * PACKET;
    };
    for (int64_t first = 0; first < packets; first += 4 * STREAMS) {
        Packet origin[STREAMS], one[STREAMS], other[SAME ? 1 : STREAMS];
#pragma unroll
        for (int step = 0; step < STREAMS; ++step) {
            const int64_t packet = first + 4 * step + quarter;
            const bool inside = packet < packets;
            one[step] = inside && left != nullptr ? load_packet(from(left, packet)) : NOTHING;
            if constexpr (!SAME) other[step] = inside && right != nullptr ? load_packet(from(right, packet)) : NOTHING;
            origin[step] = inside && base != nullptr ? load_packet(from(base, packet)) : NOTHING;
        }
#pragma unroll
        for (int step = 0; step < STREAMS; ++step) {
            Real b[PACKET], l[PACKET], r[PACKET];
            unpack<D>(origin[step], b);
            unpack<D>(one[step], l);
            if constexpr (!SAME) unpack<D>(other[step], r);
#pragma unroll
            for (int index = 0; index < PACKET; ++index) {
                const double x = left != nullptr ? double(l[index] - b[index]) : 0.0;
                if constexpr (SAME) {
                    multiply_tile(x, c);
                } else {
                    multiply_tiles(x, right != nullptr ? double(r[index] - b[index]) : 0.0, c);
                }
            }
        }
    }
    for (int64_t first = packets * PACKET; first < count; first += 4) {
        const bool inside = first + quarter < count;
        const int64_t index = at + first + quarter;
        const Real b = inside && base != nullptr ? element<D>(base, index) : Real(0);
        const double x = inside && left != nullptr ? double(element<D>(left, index) - b) : 0.0;
        if constexpr (SAME) {
            multiply_tile(x, c);
        } else {
            multiply_tiles(x, inside && right != nullptr ? double(element<D>(right, index) - b) : 0.0, c);
        }
    }
}

// Rows [row, row + TILE_ROWS) and columns [column, column + 32) of the base and of up to K models from `first` on, as
// they are stored, in `room` [K + 1][TILE_ROWS][32]: for all lanes of the warp. Models beyond the last are left out.
template <Dtype D, int K>
static __device__ __forceinline__ void fetch_columns(const Table& table, int index, int first, int64_t row,
                                                     int64_t column, typename Storage<D>::Raw* room) {
    using Raw = typename Storage<D>::Raw;
    constexpr int PACKET = PACKET_OF<D>, ACROSS = TILE_COLUMNS / PACKET;  // packets in a row of the tile
    constexpr int TOGETHER = WARP / ACROSS;                               // rows that the warp fetches at once
    const Part& part = table.part(index);
    const int lane = int(lane_index()), width = lane % ACROSS, height = lane / ACROSS;
    const int64_t at = column + width * PACKET;
    if (part.packed) {
        if (lane < ACROSS * TOGETHER) {
#pragma unroll
            for (int j = 0; j <= K; ++j) {
                const void* tensor = j == K ? part.base : first + j < table.k ? table.model(index, first + j) : nullptr;
#pragma unroll
                for (int down = 0; down < TILE_ROWS; down += TOGETHER) {
                    const int64_t r = row + down + height;
                    Raw* to = room + (j * TILE_ROWS + down + height) * TILE_COLUMNS + width * PACKET;
                    if (down + height < TILE_ROWS && tensor != nullptr && r < part.rows && at < part.columns) {
                        *reinterpret_cast<Packet*>(to) =
                            load_packet(static_cast<const Raw*>(tensor) + r * part.columns + at);
                    }
                }
            }
        }
    } else {
        for (int j = 0; j <= K; ++j) {
            const void* tensor = j == K ? part.base : first + j < table.k ? table.model(index, first + j) : nullptr;
            for (int down = 0; down < TILE_ROWS; ++down) {
                if (tensor != nullptr && row + down < part.rows && column + lane < part.columns) {
                    room[(j * TILE_ROWS + down) * TILE_COLUMNS + lane] =
                        static_cast<const Raw*>(tensor)[(row + down) * part.columns + column + lane];
                }
            }
        }
    }
    __syncwarp();
}

// The K task vectors' elements of this lane's column in one row of a fetched tile; 0 of models that are not there.
template <Dtype D, int K>
static __device__ __forceinline__ void column_differences(const typename Storage<D>::Raw* room, int down, int models,
                                                          bool has_base, RealOf<D> (&t)[K]) {
    const int lane = int(lane_index());
    const auto at = [&](int j) { return Storage<D>::widened(room[(j * TILE_ROWS + down) * TILE_COLUMNS + lane]); };
    const RealOf<D> base = has_base ? at(K) : RealOf<D>(0);
#pragma unroll
    for (int j = 0; j < K; ++j) t[j] = j < models ? at(j) - base : RealOf<D>(0);
}

// Raw elements of shared memory that a warp needs for a tile of columns.
template <int K>
constexpr int COLUMN_ROOM = (K + 1) * TILE_ROWS * TILE_COLUMNS;

// sums [K (K + 1) / 2] += the products of this lane's column over rows [first, last), the lower triangle by rows.
template <Dtype D, int K>
static __device__ __forceinline__ void add_column_products(const Table& table, int index, int64_t first, int64_t last,
                                                           int64_t column, typename Storage<D>::Raw* room,
                                                           double (&sums)[K * (K + 1) / 2]) {
    const bool has_base = table.part(index).base != nullptr;
    for (int64_t row = first; row < last; row += TILE_ROWS) {
        fetch_columns<D, K>(table, index, 0, row, column, room);
        const int rows = int(last - row < TILE_ROWS ? last - row : TILE_ROWS);
        for (int down = 0; down < rows; ++down) {
            RealOf<D> t[K];
            column_differences<D, K>(room, down, K, has_base, t);
#pragma unroll
            for (int i = 0; i < K; ++i) {
#pragma unroll
                for (int j = 0; j <= i; ++j) {
                    sums[i * (i + 1) / 2 + j] = fma(double(t[i]), double(t[j]), sums[i * (i + 1) / 2 + j]);
                }
            }
        }
        __syncwarp();
    }
}

}  // namespace awd::cuda
