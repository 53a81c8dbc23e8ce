// Converge on the Gram matrices: a warp for 32 groups, a group to each lane, which waits once it has finished.
//
// What a group needs is in the caller's work memory, a lane's numbers side by side with those of its neighbours, so
// that a warp's accesses are whole cache lines.

#include "../schedule.h"
#include "iterate.cuh"

namespace awd::cuda {
namespace {

constexpr int64_t MOST_WARPS = 2048;     // that run at a time
constexpr int64_t CONVERGE_ROWS = 17;    // [K] numbers of Problem
constexpr int64_t CONVERGE_SQUARES = 7;  // [K][K] numbers

// The best loss after each point that one of the ways offers, added over the lanes.
struct Record {
    double* entries;  // [capacity]
    int64_t capacity;
    int64_t taken;

    __device__ void add(double value) {
        const double sum = warp_sum(value);
        if (taken < capacity - 1 && lane_index() == 0) entries[taken] = sum;
        ++taken;
    }
    // Points beyond the capacity replace the last; the groups hold their last loss behind theirs.
    __device__ void close(double value) {
        const double sum = warp_sum(value);
        const int64_t from = taken < capacity - 1 ? taken : capacity - 1;
        for (int64_t at = from + lane_index(); at < capacity; at += WARP) entries[at] = sum;
    }
    __device__ int64_t used() const { return taken < capacity ? taken : capacity; }
};

#include "../converge.h"

__global__ void fill_steps(StepSizes* sizes) {
    const int way = int(blockIdx.x);
    const Schedule schedule = schedule_of(way);
    for (int index = int(threadIdx.x); index < ANNEAL_STEPS; index += int(blockDim.x)) {
        const double passed = double(index) / (ANNEAL_STEPS - 1);
        sizes->of[way][index] = schedule.first * pow(schedule.last / schedule.first, passed);
    }
}

// histories: [units][WAYS][capacity]; lengths: [units][WAYS].

__global__ void __launch_bounds__(WARP, 1)
    converge_units(const __grid_constant__ Table table, const double* __restrict__ gram, Objective objective,
                   Converge options, const StepSizes* __restrict__ sizes, int64_t capacity,
                   double* __restrict__ histories, int64_t* __restrict__ lengths, Interleaved* __restrict__ rooms,
                   double* __restrict__ coefficients) {
    const int k = table.k;
    Problem<Interleaved> problem;
    problem.k = k;
    problem.place(rooms + blockIdx.x * (CONVERGE_SQUARES * k * k + CONVERGE_ROWS * k));
    for (int64_t at = blockIdx.x; at < table.units; at += gridDim.x) {
        const int64_t unit = table.first_unit + at;
        const Part& part = table.part(table.find(unit));
        const int64_t local = (unit - part.first_unit) * GROUPS + lane_index(), group = part.first_group + local;
        const bool here = local < part.groups();
        for (int index = 0; index < k * k; ++index) {
            problem.hessian[index] = here ? gram[group * k * k + index] : 0.0;
        }
        objective.total = part.total;
        pose(problem, problem.hessian, objective);
        Record records[WAYS];
        for (int way = 0; way < WAYS; ++way) records[way] = {histories + (unit * WAYS + way) * capacity, capacity, 0};
        descend_ways<0, 0>(problem, options, *sizes, records);
        span_coefficients(problem.x, problem.best, k, problem.step);
        if (here) {
            for (int j = 0; j < k; ++j) coefficients[group * k + j] = problem.step[j];
        }
        if (lane_index() == 0) {
            for (int way = 0; way < WAYS; ++way) lengths[unit * WAYS + way] = records[way].used();
        }
        __syncwarp();
    }
}

// used [parameters, WAYS]: the longest of the units' ways. Losses were of each group's own mean similarity.
__global__ void close_ways(const __grid_constant__ Table table, const int64_t* __restrict__ lengths, int64_t entries,
                           double* __restrict__ history, int64_t* __restrict__ used) {
    const Part& part = table.part(int(blockIdx.x));
    const int64_t units = (part.groups() + GROUPS - 1) / GROUPS;
    for (int64_t at = threadIdx.x; at < entries; at += blockDim.x) history[part.number * entries + at] /= part.total;
    if (threadIdx.x >= WAYS) return;
    int64_t most = 0;
    for (int64_t unit = 0; unit < units; ++unit) {
        const int64_t length = lengths[(part.first_unit + unit) * WAYS + threadIdx.x];
        if (length > most) most = length;
    }
    used[part.number * WAYS + threadIdx.x] = most;
}

struct Sizes {
    int64_t units, warps, entries, steps, histories, lengths, room;  // the last four in doubles
};

Sizes sizes_of(const Batch& batch, const Converge& options) {
    Sizes sizes;
    sizes.units = units_of(batch, sgd_units);
    sizes.warps = std::min(sizes.units, MOST_WARPS);
    sizes.entries = converge_entries(options);
    sizes.steps = DESCENTS * ANNEAL_STEPS;
    sizes.room = sizes.warps * (CONVERGE_SQUARES * batch.k * batch.k + CONVERGE_ROWS * batch.k) * WARP;
    sizes.histories = sizes.units * sizes.entries;
    sizes.lengths = sizes.units * WAYS;
    return sizes;
}

}  // namespace

int64_t descend_converge_numbers(const Batch& batch, const Converge& options) {
    const Sizes sizes = sizes_of(batch, options);
    return sizes.room + sizes.steps + sizes.lengths + sizes.histories;
}

void descend_converge(const Batch& batch, const double* gram, const Objective& objective, const Converge& options,
                      double* work, double* coefficients, double* history, int64_t* lengths) {
    const Sizes sizes = sizes_of(batch, options);
    const Stream stream = static_cast<Stream>(batch.stream);
    Interleaved* rooms = reinterpret_cast<Interleaved*>(work);
    StepSizes* steps = reinterpret_cast<StepSizes*>(work + sizes.room);
    int64_t* used = reinterpret_cast<int64_t*>(work + sizes.room + sizes.steps);
    double* histories = work + sizes.room + sizes.steps + sizes.lengths;
    launch("descend", fill_steps, DESCENTS, 1, 128, 0, stream, steps);
    for_each_table(batch, sgd_units, [&](const Table& table) {
        launch("descend", converge_units, std::min(table.units, sizes.warps), 1, WARP, 0, stream, table, gram,
               objective, options, steps, sizes.entries / WAYS, histories, used, rooms, coefficients);
    });
    launch_add_histories(batch, histories, sizes.entries, 0, sizes.entries, history);
    for_each_table(batch, sgd_units, [&](const Table& table) {
        launch("descend", close_ways, table.count, 1, 128, 0, stream, table, used, sizes.entries, history, lengths);
    });
}

}  // namespace awd::cuda
