// All SGD iterations of 32 groups by a warp, a group to each lane.
#pragma once

#include "table.cuh"

namespace awd::cuda {

constexpr int64_t GROUPS = WARP;  // of a unit of work

// Numbers for each lane that K tasks need beside G, y and the velocity: where K is a literal they are in registers.
__host__ __device__ constexpr int64_t sgd_numbers(int64_t k) { return k * k + 6 * k; }

// Where a warp records the sum of its groups' losses: entry `at` of its history, one number from each lane in turn, so
// that 32 of them are written together. All lanes take part.
class Losses {
  public:
    __device__ Losses(double* history, int count) : history_(history), count_(count) {}
    __device__ __forceinline__ void add(int at, double loss) {
        const double sum = warp_sum(loss);
        const unsigned place = unsigned(at) % WARP;
        if (lane_index() == place) kept_ = sum;
        if (place == WARP - 1 || at == count_ - 1) {
            if (lane_index() <= place) history_[at - int(place) + int(lane_index())] = kept_;
        }
    }

  private:
    double* history_;
    int count_;
    double kept_ = 0.0;
};

// The losses [begin, end) of the groups with Gram matrices `gram`, and the steps between and after them. k: K, or the
// number of tasks where K is 0 and room holds sgd_numbers. y [2 K + 2]: room for y,
// the velocity and two numbers more, which spares registers. state [2 K]: the two before and after, where K is 0 and
// these are not all iterations. a [K]: the coefficients of d then.
template <int K, class Matrix>
static __device__ __forceinline__ void iterate_groups(const Matrix* __restrict__ gram, Interleaved* y,
                                                      Interleaved* room, int tasks, const Objective& objective,
                                                      const Sgd& options, int64_t begin, int64_t end, double* history,
                                                      Interleaved* state,
                                                      std::conditional_t<(K > 0), double, Interleaved>* a) {
    const int k = K > 0 ? K : tasks;
    using Kept = std::conditional_t<(K > 0), double, Interleaved>;
    // Arrays of their own, so that the compiler finds a register for each number.
    double matrix[K > 0 ? K * K : 1], rest[K > 0 ? 6 * K : 1];
    Kept* const basis = local_or_kept<K>(matrix, room);
    Interleaved* const velocity = y + k;
    const GroupWorkOf<Kept> work = GroupWorkOf<Kept>::at(local_or_kept<K>(rest, room + k * k), k);
    factor_gram(gram, k, basis);
    AWD_UNROLL
    for (int n = 0; n < 2 * k; ++n) y[n] = K > 0 || begin == 0 ? 0.0 : double(state[n]);
    Interleaved& lost = y[2 * k];
    lost = defect(gram, k);
    double trace = 0.0;
    for (int i = 0; i < k; ++i) trace += gram[i * k + i];
    const bool filled = trace > 0.0;
    Interleaved& weight = y[2 * k + 1];
    weight = pull_weight(k, objective.similarity, objective.total);
    const int count = int(end - begin);
    const bool closing = K > 0 || end > options.iterations;
    Losses losses(history, count);
#pragma unroll 1
    for (int index = 0; index < count; ++index) {
        const double square = span_moments(basis, y, k, work.offset);
        inverse_norms(gram, k, objective.eps, work);
        // Only before a group has moved are its vectors orthogonal but by rounding.
        const bool zeros = filled && square == 0.0;
        const double mean = similarity_of(gram, k, objective.similarity, zeros, work);
        losses.add(index, span_loss(mean, square, objective) + double(lost));
        if (closing && index == count - 1) break;
        const double along = objective.alpha * penalty_slope(square, objective.penalty) + options.weight_decay;
        span_slope(basis, y, k, double(weight), along, work, work.offset);
        sgd_step(work.offset, y, velocity, k, options);
    }
    if (K == 0 && !closing) {
        for (int n = 0; n < 2 * k; ++n) state[n] = double(y[n]);
    } else {
        span_coefficients(basis, y, k, a);
    }
}

// history [parameters, entries], entries of it from `begin` on: the sums over the units of each part of `parts` [units,
// count], in order but for every eighth apart. A block for 32 entries of a part.
static __global__ void __launch_bounds__(256)
    add_histories(const __grid_constant__ Table table, const double* __restrict__ parts, int64_t count, int64_t begin,
                  int64_t entries, double* __restrict__ history) {
    double* sums = shared_memory<double>();  // [8][32]
    const int64_t entry = int64_t(blockIdx.x) * WARP + threadIdx.x % WARP;
    const Part& part = table.part(int(blockIdx.y));
    const int64_t units = (part.groups() + GROUPS - 1) / GROUPS, slice = threadIdx.x / WARP;
    double sum = 0.0;
    if (entry < count) {
        for (int64_t unit = slice; unit < units; unit += 8) sum += parts[(part.first_unit + unit) * count + entry];
    }
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (slice != 0 || entry >= count) return;
    for (int other = 1; other < 8; ++other) sum += sums[other * WARP + threadIdx.x];
    history[part.number * entries + begin + entry] = sum;
}

inline int64_t sgd_units(const Parameter& parameter) { return divided(parameter.shape.groups(), GROUPS); }

inline void launch_add_histories(const Batch& batch, const double* parts, int64_t count, int64_t begin, int64_t entries,
                                 double* history) {
    for_each_table(batch, sgd_units, [&](const Table& table) {
        launch("add_histories", add_histories, divided(count, WARP), table.count, 256, 256 * sizeof(double),
               static_cast<Stream>(batch.stream), table, parts, count, begin, entries, history);
    });
}

// Calls the function object with the number of tasks as a literal, 0 where it is above the last.
template <class Function>
void with_tasks(int k, const Function& function) {
    switch (k) {
        case 1:
            return function(std::integral_constant<int, 1>{});
        case 2:
            return function(std::integral_constant<int, 2>{});
        case 3:
            return function(std::integral_constant<int, 3>{});
        case 4:
            return function(std::integral_constant<int, 4>{});
        case 5:
            return function(std::integral_constant<int, 5>{});
        case 6:
            return function(std::integral_constant<int, 6>{});
        case 7:
            return function(std::integral_constant<int, 7>{});
        case 8:
            return function(std::integral_constant<int, 8>{});
        default:
            return function(std::integral_constant<int, 0>{});
    }
}

}  // namespace awd::cuda
