// base + sum_j w_j t_j by a warp. The sum runs in Real over j in order and is rounded once.
#pragma once

#include "table.cuh"

namespace awd::cuda {

constexpr int TOGETHER = 8;  // models whose packets a lane has on the way at once

// Values [at, at + N) as Real.
template <Dtype D>
static __device__ __forceinline__ void values_at(const void* tensor, int64_t at, RealOf<D> (&values)[PACKET_OF<D>]) {
    unpack<D>(load_packet(static_cast<const typename Storage<D>::Raw*>(tensor) + at), values);
}

// Elements [at, at + PACKET) of a part, and with one element at a time below. weight(j, e): w_j of the e-th element.
template <Dtype D, class Weight>
static __device__ __forceinline__ void combine_packet(const Table& table, int index, int64_t at, const Weight& weight) {
    constexpr int PACKET = PACKET_OF<D>;
    using Real = RealOf<D>;
    const Part& part = table.part(index);
    Real base[PACKET], sum[PACKET];
#pragma unroll
    for (int e = 0; e < PACKET; ++e) base[e] = sum[e] = Real(0);
    if (part.base != nullptr) values_at<D>(part.base, at, base);
    for (int first = 0; first < table.k; first += TOGETHER) {
        Packet packets[TOGETHER];
#pragma unroll
        for (int j = 0; j < TOGETHER; ++j) {
            if (first + j < table.k) {
                packets[j] =
                    load_packet(static_cast<const typename Storage<D>::Raw*>(table.model(index, first + j)) + at);
            }
        }
#pragma unroll
        for (int j = 0; j < TOGETHER; ++j) {
            if (first + j < table.k) {
                Real values[PACKET];
                unpack<D>(packets[j], values);
#pragma unroll
                for (int e = 0; e < PACKET; ++e) sum[e] += weight(first + j, e) * (values[e] - base[e]);
            }
        }
    }
#pragma unroll
    for (int e = 0; e < PACKET; ++e) sum[e] += base[e];
    store_rounded<PACKET>(part.out_dtype, part.out, at, sum);
}

template <Dtype D, class Weight>
static __device__ __forceinline__ void combine_element(const Table& table, int index, int64_t at,
                                                       const Weight& weight) {
    using Real = RealOf<D>;
    const Part& part = table.part(index);
    const Real base = part.base != nullptr ? element<D>(part.base, at) : Real(0);
    Real sum = Real(0);
    for (int j = 0; j < table.k; ++j) sum += weight(j, 0) * (element<D>(table.model(index, j), at) - base);
    store_element(part.out_dtype, part.out, at, sum + base);
}

// Elements [at, at + count), which begin a row or a packet of one, by all lanes with the weights w [K].
template <Dtype D, class Weights>
static __device__ __forceinline__ void combine_stretch(const Table& table, int index, int64_t at, int64_t count,
                                                       const Weights& weights) {
    constexpr int PACKET = PACKET_OF<D>;
    const int64_t lane = lane_index(), packets = table.part(index).packed ? count / PACKET : 0;
    const auto weight = [&](int j, int) { return weights(j); };
    for (int64_t packet = lane; packet < packets; packet += WARP) {
        combine_packet<D>(table, index, at + packet * PACKET, weight);
    }
    for (int64_t e = packets * PACKET + lane; e < count; e += WARP) combine_element<D>(table, index, at + e, weight);
}

// Rows [first, last) of columns [column, column + 32). weights(j, c): w_j of column `column` + c. Lanes share a row's
// packets, and several rows.
template <Dtype D, class Weights>
static __device__ __forceinline__ void combine_columns(const Table& table, int index, int64_t first, int64_t last,
                                                       int64_t column, const Weights& weights) {
    constexpr int PACKET = PACKET_OF<D>, ACROSS = 32 / PACKET, ROWS = int(WARP) / ACROSS;
    const Part& part = table.part(index);
    const int lane = int(lane_index());
    if (part.packed) {
        const int c = lane % ACROSS * PACKET;
        if (lane >= ACROSS * ROWS || column + c >= part.columns) return;
        const auto weight = [&](int j, int e) { return weights(j, c + e); };
        for (int64_t row = first + lane / ACROSS; row < last; row += ROWS) {
            combine_packet<D>(table, index, row * part.columns + column + c, weight);
        }
    } else if (column + lane < part.columns) {
        const auto weight = [&](int j, int) { return weights(j, lane); };
        for (int64_t row = first; row < last; ++row) {
            combine_element<D>(table, index, row * part.columns + column + lane, weight);
        }
    }
}

}  // namespace awd::cuda
