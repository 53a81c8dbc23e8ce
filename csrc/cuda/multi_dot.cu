// Inner products of the task vectors with a gradient, which is where a parameter's `out` is: a warp for a segment of a
// row, or for a segment of 32 columns, and for up to eight models. Segments are added in order.
//
// Differences of models and base are rounded once to Real, products and sums are float64.

#include "segments.cuh"

namespace awd::cuda {
namespace {

constexpr int BESIDE = 8;  // models of a warp: more are further warps', which read base and gradient again
constexpr int DOWN = 4;    // rows whose elements a lane has on the way at once
constexpr unsigned WARPS = 4;

template <int WORDS>
static __device__ __forceinline__ void load_words(const void* from, uint32_t (&words)[WORDS]) {
    if constexpr (WORDS % 4 == 0) {
#pragma unroll
        for (int index = 0; index < WORDS; index += 4) {
            const Packet packet = load_packet(static_cast<const uint32_t*>(from) + index);
            memcpy(words + index, &packet, sizeof packet);
        }
    } else {
        struct alignas(4 * WORDS) Words {
            uint32_t words[WORDS];
        } const value = *static_cast<const Words*>(from);
        memcpy(words, &value, sizeof value);
    }
}

// Elements [at, at + N) of a gradient of this dtype, which is float64 exactly where Real is; `at` is a multiple of N.
template <int N>
static __device__ __forceinline__ void gradient_at(Dtype dtype, const void* from, int64_t at, float (&values)[N]) {
    if (dtype == Dtype::f32) {
        uint32_t words[N];
        load_words(static_cast<const float*>(from) + at, words);
#pragma unroll
        for (int e = 0; e < N; ++e) values[e] = float_of(words[e]);
    } else {
        uint32_t words[N / 2];
        load_words(static_cast<const uint16_t*>(from) + at, words);
#pragma unroll
        for (int e = 0; e < N; ++e) {
            const uint16_t bits = uint16_t(words[e / 2] >> (16 * (e % 2)));
            values[e] = dtype == Dtype::bf16 ? float_of(uint32_t(bits) << 16) : float_of_half(bits);
        }
    }
}
template <int N>
static __device__ __forceinline__ void gradient_at(Dtype, const void* from, int64_t at, double (&values)[N]) {
    const Packet packet = load_packet(static_cast<const double*>(from) + at);
    memcpy(values, &packet, sizeof packet);
}

static __device__ __forceinline__ void gradient_at(Dtype dtype, const void* from, int64_t at, float& value) {
    value = dtype == Dtype::f32    ? element<Dtype::f32>(from, at)
            : dtype == Dtype::bf16 ? element<Dtype::bf16>(from, at)
                                   : element<Dtype::f16>(from, at);
}
static __device__ __forceinline__ void gradient_at(Dtype, const void* from, int64_t at, double& value) {
    value = element<Dtype::f64>(from, at);
}

// out: the products, or those of each unit [units][K] where `apart`. blockIdx.y: the models, eight by eight.
template <Dtype D>
__global__ void __launch_bounds__(WARPS* WARP)
    multi_dot_rows(const __grid_constant__ Table table, bool apart, double* __restrict__ out) {
    constexpr int PACKET = PACKET_OF<D>;
    using Real = RealOf<D>;
    using Raw = typename Storage<D>::Raw;
    const int64_t warp = int64_t(blockIdx.x) * WARPS + threadIdx.x / WARP;
    if (warp >= table.units) return;
    const int64_t unit = table.first_unit + warp;
    const int index = table.find(unit);
    const Part& part = table.part(index);
    const Cut segments = cut(part.columns, false);
    const int64_t local = unit - part.first_unit, group = local / segments.count;
    const int64_t first = local % segments.count * segments.length, begin = group * part.columns + first;
    const int64_t count = part.columns - first < segments.length ? part.columns - first : segments.length;
    const int from = int(blockIdx.y) * BESIDE, k = table.k, lane = int(lane_index());
    const int64_t packets = part.packed ? count / PACKET : 0;
    double sums[BESIDE];
#pragma unroll
    for (int j = 0; j < BESIDE; ++j) sums[j] = 0.0;
    for (int64_t packet = lane; packet < packets; packet += WARP) {
        const int64_t at = begin + packet * PACKET;
        Packet origin = {{0, 0, 0, 0}}, models[BESIDE];
        Real base[PACKET], gradient[PACKET];
        if (part.base != nullptr) origin = load_packet(static_cast<const Raw*>(part.base) + at);
#pragma unroll
        for (int j = 0; j < BESIDE; ++j) {
            if (from + j < k) models[j] = load_packet(static_cast<const Raw*>(table.model(index, from + j)) + at);
        }
        gradient_at(part.out_dtype, part.out, at, gradient);
        unpack<D>(origin, base);
#pragma unroll
        for (int j = 0; j < BESIDE; ++j) {
            if (from + j < k) {
                Real values[PACKET];
                unpack<D>(models[j], values);
#pragma unroll
                for (int e = 0; e < PACKET; ++e) {
                    sums[j] = fma(double(values[e] - base[e]), double(gradient[e]), sums[j]);
                }
            }
        }
    }
    for (int64_t rest = packets * PACKET + lane; rest < count; rest += WARP) {
        const int64_t at = begin + rest;
        const Real base = part.base != nullptr ? element<D>(part.base, at) : Real(0);
        Real gradient;
        gradient_at(part.out_dtype, part.out, at, gradient);
#pragma unroll
        for (int j = 0; j < BESIDE; ++j) {
            if (from + j < k) {
                sums[j] = fma(double(element<D>(table.model(index, from + j), at) - base), double(gradient), sums[j]);
            }
        }
    }
    double* to = out + (apart ? unit : part.first_group + group) * k + from;
#pragma unroll
    for (int j = 0; j < BESIDE; ++j) {
        const double sum = warp_sum(sums[j]);
        if (lane == j && from + j < k) to[j] = sum;
    }
}

// The same of column groups: a column for each lane, [units][32][K] where `apart`.
template <Dtype D>
__global__ void __launch_bounds__(WARPS* WARP)
    multi_dot_columns(const __grid_constant__ Table table, bool apart, double* __restrict__ out) {
    using Real = RealOf<D>;
    const int64_t warp = int64_t(blockIdx.x) * WARPS + threadIdx.x / WARP;
    if (warp >= table.units) return;
    const int64_t unit = table.first_unit + warp;
    const int index = table.find(unit);
    const Part& part = table.part(index);
    const Cut segments = cut(part.rows, true);
    const int64_t local = unit - part.first_unit, first = local % segments.count * segments.length;
    const int64_t last = part.rows - first < segments.length ? part.rows : first + segments.length;
    const int lane = int(lane_index()), from = int(blockIdx.y) * BESIDE, k = table.k;
    const int64_t column = local / segments.count * SEGMENT_COLUMNS + lane;
    if (column >= part.columns) return;
    double sums[BESIDE];
#pragma unroll
    for (int j = 0; j < BESIDE; ++j) sums[j] = 0.0;
    for (int64_t row = first; row < last; row += DOWN) {
        Real values[DOWN][BESIDE], base[DOWN], gradient[DOWN];
#pragma unroll
        for (int down = 0; down < DOWN; ++down) {
            const bool inside = row + down < last;
            const int64_t at = (inside ? row + down : row) * part.columns + column;
            base[down] = part.base != nullptr ? element<D>(part.base, at) : Real(0);
            gradient_at(part.out_dtype, part.out, at, gradient[down]);
#pragma unroll
            for (int j = 0; j < BESIDE; ++j) {
                if (from + j < k) values[down][j] = element<D>(table.model(index, from + j), at);
            }
        }
#pragma unroll
        for (int down = 0; down < DOWN; ++down) {
            if (row + down >= last) break;
#pragma unroll
            for (int j = 0; j < BESIDE; ++j) {
                if (from + j < k) {
                    sums[j] = fma(double(values[down][j] - base[down]), double(gradient[down]), sums[j]);
                }
            }
        }
    }
    double* to = out + (apart ? unit * SEGMENT_COLUMNS + lane : part.first_group + column) * k + from;
#pragma unroll
    for (int j = 0; j < BESIDE; ++j) {
        if (from + j < k) to[j] = sums[j];
    }
}

// work: of the units with several segments.
template <Dtype D, bool BY_COLUMN, bool SEVERAL>
void run(const Batch& batch, double* work, double* out) {
    const Stream stream = static_cast<Stream>(batch.stream);
    const int groups = BY_COLUMN ? SEGMENT_COLUMNS : 1, k = batch.k;
    const auto kernel = BY_COLUMN ? multi_dot_columns<D> : multi_dot_rows<D>;
    for_each_table(batch, segment_units<BY_COLUMN, SEVERAL>, [&](const Table& table) {
        launch("multi_dot", kernel, divided(table.units, WARPS), divided(k, BESIDE), WARPS * WARP, 0, stream, table,
               SEVERAL, SEVERAL ? work : out);
        if (SEVERAL) {
            launch("multi_dot", add_segments, divided(table.units * groups * k, 256), 1, 256, 0, stream, table, groups,
                   k, work, out);
        }
    });
}

int64_t row_numbers(const Batch& batch) { return units_of(batch, segment_units<false, true>) * batch.k; }

template <Dtype D>
void run_all(const Batch& batch, double* work, double* out) {
    run<D, false, false>(batch, work, out);
    run<D, false, true>(batch, work, out);
    run<D, true, false>(batch, work, out);
    run<D, true, true>(batch, work + row_numbers(batch), out);
}

}  // namespace

int64_t multi_dot_numbers(const Batch& batch) {
    return row_numbers(batch) + units_of(batch, segment_units<true, true>) * SEGMENT_COLUMNS * batch.k;
}

void multi_dot(const Batch& batch, double* work, double* out) {
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
