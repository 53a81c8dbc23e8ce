// Descents on the Gram matrices: a warp for 32 groups, a group to each lane.
//
// Up to FUSED_TASKS everything but G is in registers, and G in shared memory. Beyond, all of it is in the caller's work
// memory, a lane's numbers side by side with those of its neighbours.

#include "iterate.cuh"

namespace awd::cuda {
namespace {

constexpr int64_t STRETCH = 4096;      // losses that are recorded between two additions
constexpr int64_t MOST_WARPS = 2048;   // that run at a time where their room is in memory
constexpr int64_t RECORDED = 1 << 24;  // losses of all units in a stretch, where it can be so short

// G of the lane's group, zeros where there is none.
static __device__ __forceinline__ void gather_gram(const double* __restrict__ gram, int64_t group, bool here, int k,
                                                   Interleaved* to) {
    for (int index = 0; index < k * k; ++index) to[index] = here ? gram[group * k * k + index] : 0.0;
    __syncwarp();
}

// The group of this lane in a unit, and what of it is asked.
struct Lane {
    int64_t unit, group;
    double total;
    bool here;

    __device__ __forceinline__ Lane(const Table& table, unsigned at) : unit(table.first_unit + at) {
        const Part& part = table.part(table.find(unit));
        const int64_t local = (unit - part.first_unit) * GROUPS + lane_index();
        group = part.first_group + local;
        total = part.total;
        here = local < part.groups();
    }
};

// parts: [units, end - begin]. states: [units][2 K] or null. room: [warps][K^2 + 2 K + 2 + sgd_numbers] where K is 0.
template <int K>
__global__ void __launch_bounds__(WARP, K > 0 ? 8 : 1)
    sgd_units_kernel(const __grid_constant__ Table table, const double* __restrict__ gram, Objective objective,
                     Sgd options, int64_t begin, int64_t end, double* __restrict__ parts, Interleaved* states,
                     Interleaved* room, double* __restrict__ coefficients) {
    const int k = K > 0 ? K : table.k;
    Interleaved* const square =
        K > 0 ? shared_memory<Interleaved>() : room + blockIdx.x * (k * k + 2 * k + 2 + sgd_numbers(k));
    Interleaved* const y = square + k * k;
    for (unsigned at = blockIdx.x; at < table.units; at += gridDim.x) {
        Interleaved* state = nullptr;  // with K as a literal all iterations are made at once
        double* history = nullptr;
        {
            const Lane lane(table, at);
            gather_gram(gram, lane.group, lane.here, k, square);
            objective.total = lane.total;
            history = parts + lane.unit * (end - begin);
            if (K == 0 && states != nullptr) state = states + lane.unit * 2 * k;
        }
        std::conditional_t<(K > 0), double, Interleaved>* a;
        double local[K > 0 ? K : 1];
        a = local_or_kept<K>(local, y + k);  // where the velocity was
        iterate_groups<K>(square, y, y + 2 * k + 2, k, objective, options, begin, end, history, state, a);
        unsigned again = at;
        keep_unknown(again);  // found anew rather than kept in registers meanwhile
        const Lane lane(table, again);
        if (lane.here && (K > 0 || end > options.iterations)) {
            AWD_UNROLL
            for (int j = 0; j < k; ++j) coefficients[lane.group * k + j] = a[j];
        }
        __syncwarp();
    }
}

struct Sizes {
    int64_t units, warps, stretch, parts, states, room;  // the last three in doubles
};

Sizes sizes_of(const Batch& batch, const Sgd& options) {
    Sizes sizes;
    const int64_t k = batch.k, entries = options.iterations + 1;
    sizes.units = units_of(batch, sgd_units);
    sizes.warps = std::min(sizes.units, MOST_WARPS);
    const int64_t fitting = std::max<int64_t>(RECORDED / std::max<int64_t>(sizes.units, 1), 64);
    sizes.stretch = std::min(entries, std::min(STRETCH, fitting));
    sizes.parts = (sizes.units * sizes.stretch + 1) / 2 * 2;
    sizes.states = sizes.stretch < entries ? sizes.units * 2 * k * WARP : 0;
    sizes.room = k > FUSED_TASKS || sizes.states > 0 ? sizes.warps * (k * k + 2 * k + 2 + sgd_numbers(k)) * WARP : 0;
    return sizes;
}

}  // namespace

int64_t descend_sgd_numbers(const Batch& batch, const Sgd& options) {
    const Sizes sizes = sizes_of(batch, options);
    return sizes.parts + sizes.states + sizes.room;
}

void descend_sgd(const Batch& batch, const double* gram, const Objective& objective, const Sgd& options, double* work,
                 double* coefficients, double* history) {
    const Sizes sizes = sizes_of(batch, options);
    const int64_t entries = options.iterations + 1;
    Interleaved* states = sizes.states > 0 ? reinterpret_cast<Interleaved*>(work + sizes.parts) : nullptr;
    Interleaved* room = reinterpret_cast<Interleaved*>(work + sizes.parts + sizes.states);
    for (int64_t begin = 0; begin < entries; begin += sizes.stretch) {
        const int64_t end = std::min(begin + sizes.stretch, entries);
        for_each_table(batch, sgd_units, [&](const Table& table) {
            with_tasks(sizes.states > 0 ? 0 : batch.k, [&](auto tasks) {
                constexpr int K = decltype(tasks)::value;
                const int64_t blocks = K > 0 ? table.units : std::min(table.units, sizes.warps);
                launch("descend", sgd_units_kernel<K>, blocks, 1, WARP, (K * K + 2 * K + 2) * sizeof(Interleaved),
                       static_cast<Stream>(batch.stream), table, gram, objective, options, begin, end, work, states,
                       room, coefficients);
            });
        });
        launch_add_histories(batch, work, end - begin, begin, entries, history);
    }
}

}  // namespace awd::cuda
