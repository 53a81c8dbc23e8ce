// What the threads of a block know of the group they work on, the sums over them, and the K x K work of an iteration.
#pragma once

#include "table.cuh"

namespace awd::cuda {

// What the threads of a block share.
struct Shared {
    double* gram;                        // [K][K]
    double* sums;                        // [K + 2]: <t_i, d>, <d, d>, sum |d|
    double* factors;                     // [K + 1]: -2 r_i, and the multiple of d
    double *offset, *inverse, *weights;  // [K] of the vectors, as in GroupWork
    double* partial;                     // [K + 2][warps]
    double* correction;  // [4]: what Adam's biases make of the step and of the mean square; beta1^t, beta2^t

    static __host__ __device__ constexpr int64_t numbers(int64_t k, int64_t warps) {
        return k * k + 2 * (k + 2) + 3 * k + (k + 2) * warps + 4;
    }
    __device__ Shared(double* room, int k, int warps) {
        gram = room;
        sums = gram + k * k;
        factors = sums + k + 2;
        offset = factors + k + 2;
        inverse = offset + k;
        weights = inverse + k;
        partial = weights + k;
        correction = partial + (k + 2) * warps;
    }
};

// From the products at the present d: the loss, added to *loss unless it is the first, and the factors of the gradient.
// For one warp; its lanes divide the vectors.
static __device__ __forceinline__ void evaluate_group(const Shared& shared, int k, const Objective& objective,
                                                      const Elementwise& options, bool first, double* loss) {
    const double square = shared.sums[k];
    const bool squared = objective.similarity == Similarity::squared;
    for (int i = int(lane_index()); i < k; i += int(WARP)) {
        const double offset = shared.sums[i] - 0.5 * square;
        double root, inverse, closing;
        inverse_norm(shared.gram[i * k + i] - 2.0 * offset, objective.eps, root, inverse, closing);
        shared.offset[i] = offset;
        shared.inverse[i] = inverse;
        shared.weights[i] = squared ? inverse * inverse : inverse;
    }
    __syncwarp();
    const double weight = pull_weight(k, objective.similarity, objective.total);
    double mean = 0.0, sum = 0.0, lost = 0.0;
    for (int i = int(lane_index()); i < k; i += int(WARP)) {
        double root, inverse, closing, across, along;
        inverse_norm(shared.gram[i * k + i] - 2.0 * shared.offset[i], objective.eps, root, inverse, closing);
        mean += row_similarity(shared.gram, i, k, objective.similarity, shared.offset, shared.weights, inverse, across,
                               along);
        const double pulled = weight * pull(inverse, closing, across, along);
        shared.factors[i] = -2.0 * pulled;
        sum += pulled;
        for (int j = 0; j < k; ++j) lost += shared.gram[i * k + j] * 0.0;
    }
    mean = warp_sum(mean);
    sum = warp_sum(sum);
    lost = warp_sum(lost);
    if (lane_index() != 0) return;
    shared.factors[k] = 2.0 * sum + objective.alpha * penalty_slope(square, objective.penalty) + options.weight_decay;
    const double found = span_loss(mean, square, objective) + options.l1 * shared.sums[k + 1] + lost;
    *loss = first ? found : *loss + found;
    double* const c = shared.correction;
    c[2] *= options.momentum;
    c[3] *= options.beta2;
    c[0] = options.adam ? options.lr / (1.0 - c[2]) : 0.0;
    c[1] = options.adam ? 1.0 / (1.0 - c[3]) : 1.0;
}

// The sums over a warp of eight numbers of each lane: lane 4 j gets that of values[j], in all four lanes from 4 j on.
static __device__ __forceinline__ double sum_eight(double (&values)[8]) {
    const unsigned lane = lane_index();
#pragma unroll
    for (int half = 4; half > 0; half /= 2) {
        const bool upper = lane & unsigned(4 * half);
#pragma unroll
        for (int j = 0; j < half; ++j) {
            const double kept = upper ? values[j + half] : values[j], sent = upper ? values[j] : values[j + half];
            values[j] = kept + __shfl_xor_sync(FULL, sent, 4 * half);
        }
    }
    double sum = values[0];
    sum += __shfl_xor_sync(FULL, sum, 2);
    return sum + __shfl_xor_sync(FULL, sum, 1);
}

// to[j] = the block's sum of values[j], for the first `count` of them, behind a barrier of all threads.
static __device__ __forceinline__ void gather_eight(double (&values)[8], int count, const Shared& shared, int place) {
    const int warps = int(blockDim.x / WARP), j = int(lane_index() / 4);
    const double sum = sum_eight(values);
    if (lane_index() % 4 == 0 && j < count) shared.partial[(place + j) * warps + int(threadIdx.x / WARP)] = sum;
}
static __device__ __forceinline__ void gather_one(double value, const Shared& shared, int place) {
    const int warps = int(blockDim.x / WARP);
    const double sum = warp_sum(value);
    if (lane_index() == 0) shared.partial[place * warps + int(threadIdx.x / WARP)] = sum;
}
// to[j] = the block's sum in place j, of `count`; before and behind it all threads wait.
static __device__ __forceinline__ void add_gathered(int count, const Shared& shared, double* to) {
    const int warps = int(blockDim.x / WARP);
    __syncthreads();
    for (int j = int(threadIdx.x); j < count; j += int(blockDim.x)) {
        double sum = 0.0;
        for (int warp = 0; warp < warps; ++warp) sum += shared.partial[j * warps + warp];
        to[j] = sum;
    }
    __syncthreads();
}

}  // namespace awd::cuda
