// All iterations of Adam or SGD on the elements of row or column groups: a block for a group.
//
// Resident: a thread keeps its elements of the K task vectors, of d and of the optimiser's state in registers over all
// iterations; between two of them only K + 2 sums cross the block. Roaming, where a group has too many elements or
// models for that: d and the state are in memory, and the task vectors are read again in every iteration.

#include <cmath>

#include "adam_group.cuh"
#include "adam_move.cuh"

namespace awd::cuda {
namespace {

constexpr int RESIDENT_TASKS = 8;
constexpr unsigned ROAMING_THREADS = 256;
constexpr int64_t MOST_BLOCKS = 1024;  // of the roaming kernel, each with a state of its own
constexpr int64_t RECORDED = 1 << 24;  // losses of all units together; where there are more, units are several groups

struct RowsJob {
    Objective objective;
    Elementwise options;
    int64_t iterations, span;  // span: groups of a unit
    double *histories, *gram, *inner, *square;
};

// The beginning and the end of a block's work on a group, the same for both kernels.
struct Group {
    int64_t number, element, stride, size;  // its first element, the distance of two, how many
};
static __device__ __forceinline__ Group group_of(const Part& part, int64_t local) {
    return {part.first_group + local, part.by_column ? local : local * part.columns, part.by_column ? part.columns : 1,
            part.size()};
}
static __device__ __forceinline__ void start_group(const Shared& shared, int k) {
    for (int entry = int(threadIdx.x); entry < k + 2; entry += int(blockDim.x)) shared.sums()[entry] = 0.0;
    if (threadIdx.x == 0) shared.correction()[2] = shared.correction()[3] = 1.0;
}
static __device__ __forceinline__ void finish_group(const RowsJob& job, const Shared& shared, int k, int64_t group) {
    double* const gram = job.gram + group * k * k;
    for (int entry = int(threadIdx.x); entry < k * k && shared.gram() != gram; entry += int(blockDim.x)) {
        gram[entry] = shared.gram()[entry];
    }
    for (int i = int(threadIdx.x); i < k; i += int(blockDim.x)) job.inner[group * k + i] = shared.sums()[i];
    if (threadIdx.x == 0) job.square[group] = shared.sums()[k];
}

// Else the compiler converts all floats to doubles before a loop, and has no registers left.
template <int K, int ELEMENTS, class Hold>
static __device__ __forceinline__ void forget(Hold (&t)[K][ELEMENTS]) {
    if constexpr (std::is_same_v<Hold, float>) {
#pragma unroll
        for (int j = 0; j < K; ++j) {
#pragma unroll
            for (int e = 0; e < ELEMENTS; ++e) keep_unknown(t[j][e]);
        }
    }
}

// K: at least the number of tasks; task vectors of zeros fill it up. Hold: the type in which task vectors are kept.
// ELEMENTS: of a thread; THREADS: at most.
template <int K, class Real, class Hold, int ELEMENTS, int THREADS>
__global__ void __launch_bounds__(THREADS, 1)
    resident(const __grid_constant__ Table table, const __grid_constant__ RowsJob job) {
    const int k = table.k, threads = int(blockDim.x);
    const Shared shared{shared_memory<double>(), nullptr, k, threads / int(WARP)};
    const int64_t entries = job.iterations + 1;
    Objective objective = job.objective;
    const Move<Real> move(job.options);
    for (int64_t at = blockIdx.x; at < table.units; at += gridDim.x) {
        const int64_t unit = table.first_unit + at;
        const int index = table.find(unit);
        const Part& part = table.part(index);
        const int64_t begin = (unit - part.first_unit) * job.span;
        const int64_t end = part.groups() - begin < job.span ? part.groups() : begin + job.span;
        objective.total = part.total;
        for (int64_t local = begin; local < end; ++local) {
            const Group group = group_of(part, local);
            const int size = int(group.size);
            Hold t[K][ELEMENTS];
            Real d[ELEMENTS], velocity[ELEMENTS], square[ELEMENTS];
            with_storage(table.dtype, [&](auto dtype) {
                constexpr Dtype D = decltype(dtype)::value;
#pragma unroll
                for (int e = 0; e < ELEMENTS; ++e) {
                    const int place = int(threadIdx.x) + e * threads;
                    const bool inside = place < size;
                    const int64_t from = group.element + place * group.stride;
                    const RealOf<D> base = inside && part.base != nullptr ? element<D>(part.base, from) : RealOf<D>(0);
#pragma unroll
                    for (int j = 0; j < K; ++j) {
                        t[j][e] = inside && j < k ? Hold(element<D>(table.model(index, j), from) - base) : Hold(0);
                    }
                }
            });
            start_group(shared, k);
#pragma unroll
            for (int i = 0; i < K; ++i) {
                if (i >= k) break;
                forget<K, ELEMENTS>(t);
                double products[8] = {};
#pragma unroll
                for (int j = 0; j < K; ++j) {
#pragma unroll
                    for (int e = 0; e < ELEMENTS; ++e) products[j] += double(t[i][e]) * double(t[j][e]);
                }
                gather_eight(products, k, shared, 0);
                add_gathered(k, shared, shared.gram() + i * k);
            }
#pragma unroll
            for (int e = 0; e < ELEMENTS; ++e) d[e] = velocity[e] = square[e] = Real(0);
            double* const history = job.histories + unit * entries;
            __syncthreads();
#pragma unroll 1
            for (int64_t iteration = 0; iteration < entries; ++iteration) {
                if (threadIdx.x < WARP) {
                    evaluate_group(shared, k, objective, job.options, local == begin, history + iteration);
                }
                __syncthreads();
                if (iteration == job.iterations) break;
                forget<K, ELEMENTS>(t);
                double factors[K + 1], sums[8] = {}, own = 0.0, sizes = 0.0;
#pragma unroll
                for (int j = 0; j < K; ++j) factors[j] = j < k ? shared.factors()[j] : 0.0;
                factors[K] = shared.factors()[k];
                const Real correction = Real(shared.correction()[0]), unbias = Real(shared.correction()[1]);
#pragma unroll
                for (int e = 0; e < ELEMENTS; ++e) {
                    double slope = factors[K] * double(d[e]);
#pragma unroll
                    for (int j = 0; j < K; ++j) slope += factors[j] * double(t[j][e]);
                    if (int(threadIdx.x) + e * threads < size) {
                        move.step(Real(slope), correction, unbias, d[e], velocity[e], square[e]);
                    }
                    const double x = double(d[e]);
#pragma unroll
                    for (int j = 0; j < K; ++j) sums[j] += double(t[j][e]) * x;
                }
                gather_eight(sums, k, shared, 0);
#pragma unroll
                for (int e = 0; e < ELEMENTS; ++e) {
                    own += double(d[e]) * double(d[e]);
                    sizes += fabs(double(d[e]));
                }
                gather_one(own, shared, k);
                if (job.options.l1 != 0.0) gather_one(sizes, shared, k + 1);
                add_gathered(job.options.l1 != 0.0 ? k + 2 : k + 1, shared, shared.sums());
            }
#pragma unroll
            for (int e = 0; e < ELEMENTS; ++e) {
                const int place = int(threadIdx.x) + e * threads;
                if (place < size) static_cast<Real*>(part.out)[group.element + place * group.stride] = d[e];
            }
            finish_group(job, shared, k, group.number);
            __syncthreads();
        }
    }
}

// The same with d and the state in memory: part.out, and states [blocks][2][longest group].
template <class Real>
__global__ void __launch_bounds__(ROAMING_THREADS, 1)
    roaming(const __grid_constant__ Table table, const __grid_constant__ RowsJob job, Real* __restrict__ states,
            int64_t longest) {
    const int k = table.k, threads = int(blockDim.x);
    const int64_t entries = job.iterations + 1;
    Objective objective = job.objective;
    const Move<Real> move(job.options);
    Real* const velocity = states + blockIdx.x * 2 * longest;
    Real* const square = velocity + longest;
    for (int64_t at = blockIdx.x; at < table.units; at += gridDim.x) {
        const int64_t unit = table.first_unit + at;
        const int index = table.find(unit);
        const Part& part = table.part(index);
        const int64_t begin = (unit - part.first_unit) * job.span;
        const int64_t end = part.groups() - begin < job.span ? part.groups() : begin + job.span;
        objective.total = part.total;
        for (int64_t local = begin; local < end; ++local) {
            const Group group = group_of(part, local);
            const Shared shared{shared_memory<double>(), job.gram + group.number * k * k, k, threads / int(WARP)};
            Real* const d = static_cast<Real*>(part.out) + group.element;
            for (int64_t e = threadIdx.x; e < group.size; e += threads) {
                d[e * group.stride] = velocity[e] = square[e] = Real(0);
            }
            start_group(shared, k);
            // Eight products or sums at a time, whatever the number of tasks.
            const auto difference = [&](int j, int64_t e) {
                double found = 0.0;
                const int64_t from = group.element + e * group.stride;
                with_storage(table.dtype, [&](auto dtype) {
                    constexpr Dtype D = decltype(dtype)::value;
                    const RealOf<D> base = part.base != nullptr ? element<D>(part.base, from) : RealOf<D>(0);
                    found = double(element<D>(table.model(index, j), from) - base);
                });
                return found;
            };
            for (int i = 0; i < k; ++i) {
                for (int first = 0; first < k; first += 8) {
                    double products[8] = {};
                    for (int64_t e = threadIdx.x; e < group.size; e += threads) {
                        const double own = difference(i, e);
#pragma unroll
                        for (int j = 0; j < 8; ++j) {
                            if (first + j < k) products[j] += own * difference(first + j, e);
                        }
                    }
                    const int count = k - first < 8 ? k - first : 8;
                    gather_eight(products, count, shared, 0);
                    add_gathered(count, shared, shared.gram() + i * k + first);
                }
            }
            double* const history = job.histories + unit * entries;
            __syncthreads();
            for (int64_t iteration = 0; iteration < entries; ++iteration) {
                if (threadIdx.x < WARP) {
                    evaluate_group(shared, k, objective, job.options, local == begin, history + iteration);
                }
                __syncthreads();
                if (iteration == job.iterations) break;
                const Real correction = Real(shared.correction()[0]), unbias = Real(shared.correction()[1]);
                double sizes[2] = {0.0, 0.0};
                for (int64_t e = threadIdx.x; e < group.size; e += threads) {
                    double slope = shared.factors()[k] * double(d[e * group.stride]);
                    for (int j = 0; j < k; ++j) slope += shared.factors()[j] * difference(j, e);
                    Real x = d[e * group.stride];
                    move.step(Real(slope), correction, unbias, x, velocity[e], square[e]);
                    d[e * group.stride] = x;
                    sizes[0] += double(x) * double(x);
                    sizes[1] += fabs(double(x));
                }
                for (int first = 0; first < k; first += 8) {
                    double sums[8] = {};
                    for (int64_t e = threadIdx.x; e < group.size; e += threads) {
                        const double x = double(d[e * group.stride]);
#pragma unroll
                        for (int j = 0; j < 8; ++j) {
                            if (first + j < k) sums[j] += difference(first + j, e) * x;
                        }
                    }
                    gather_eight(sums, k - first < 8 ? k - first : 8, shared, first);
                }
                gather_one(sizes[0], shared, k);
                gather_one(sizes[1], shared, k + 1);
                add_gathered(k + 2, shared, shared.sums());
            }
            finish_group(job, shared, k, group.number);
            __syncthreads();
        }
    }
}

// history [parameters, entries]: the sums over each part's units, in order.
__global__ void __launch_bounds__(128)
    add_units(const __grid_constant__ Table table, const double* __restrict__ histories, int64_t span, int64_t entries,
              double* __restrict__ history) {
    const Part& part = table.part(int(blockIdx.y));
    const int64_t entry = int64_t(blockIdx.x) * 128 + threadIdx.x, units = (part.groups() + span - 1) / span;
    if (entry >= entries) return;
    double sum = 0.0;
    for (int64_t unit = 0; unit < units; ++unit) sum += histories[(part.first_unit + unit) * entries + entry];
    history[part.number * entries + entry] = sum;
}

int64_t longest_of(const Batch& batch) {
    int64_t longest = 0;
    for (const Parameter& parameter : batch.parameters) longest = std::max(longest, parameter.shape.size());
    return longest;
}

// How the registers hold a group: as float64, which spares conversions, where they are enough.
struct Holding {
    int64_t elements, threads;
    bool doubles;

    bool fits(int64_t size) const { return size <= elements * threads; }
};
constexpr Holding SHORT{4, 384, true}, LONG{12, 256, false}, WIDE{4, 256, true};  // WIDE: of float64 storage

const Holding* holding_of(const Batch& batch) {
    const int64_t longest = longest_of(batch);
    if (batch.k > RESIDENT_TASKS) return nullptr;
    if (batch.dtype == Dtype::f64) return WIDE.fits(longest) ? &WIDE : nullptr;
    return SHORT.fits(longest) ? &SHORT : LONG.fits(longest) ? &LONG : nullptr;
}

struct Sizes {
    int64_t span, units, blocks, histories, states;  // blocks: of the roaming kernel; the last two in doubles
};

Sizes sizes_of(const Batch& batch, int64_t iterations) {
    Sizes sizes;
    const int64_t entries = iterations + 1, groups = groups_of(batch);
    sizes.span = std::max<int64_t>(divided(groups * entries, RECORDED), 1);
    const int64_t span = sizes.span;
    sizes.units = units_of(batch, [span](const Parameter& p) { return divided(p.shape.groups(), span); });
    sizes.blocks = std::min(sizes.units, MOST_BLOCKS);
    sizes.histories = sizes.units * entries;
    sizes.states = holding_of(batch) != nullptr ? 0 : sizes.blocks * 2 * longest_of(batch);
    return sizes;
}

template <class Real, class Hold, int ELEMENTS, int THREADS>
void launch_resident(const Table& table, const RowsJob& job, unsigned threads, Stream stream) {
    const size_t bytes = size_t(table.k * table.k + Shared::numbers(table.k, threads / WARP)) * sizeof(double);
    const auto kernel = table.k <= 2   ? resident<2, Real, Hold, ELEMENTS, THREADS>
                        : table.k <= 4 ? resident<4, Real, Hold, ELEMENTS, THREADS>
                                       : resident<8, Real, Hold, ELEMENTS, THREADS>;
    launch("adam_rows", kernel, table.units, 1, threads, bytes, stream, table, job);
}

}  // namespace

int64_t adam_rows_numbers(const Batch& batch, int64_t iterations) {
    const Sizes sizes = sizes_of(batch, iterations);
    return sizes.histories + sizes.states;
}

void adam_rows(const Batch& batch, const Objective& objective, const Elementwise& options, int64_t iterations,
               double* work, double* history, double* gram, double* inner, double* square) {
    const Sizes sizes = sizes_of(batch, iterations);
    const Stream stream = static_cast<Stream>(batch.stream);
    const RowsJob job{objective, options, iterations, sizes.span, work, gram, inner, square};
    const int64_t longest = longest_of(batch);
    const Holding* const holding = holding_of(batch);
    const int64_t of_warp = (holding != nullptr ? holding->elements : 1) * WARP;
    const unsigned threads = unsigned(divided(std::max<int64_t>(longest, 1), of_warp)) * WARP;
    const auto units = [&](const Parameter& p) { return divided(p.shape.groups(), sizes.span); };
    for_each_table(batch, units, [&](const Table& table) {
        if (holding == nullptr) {
            const size_t bytes = size_t(Shared::numbers(batch.k, ROAMING_THREADS / WARP)) * sizeof(double);
            double* const states = work + sizes.histories;
            const int64_t blocks = std::min(table.units, sizes.blocks);
            if (batch.dtype == Dtype::f64) {
                launch("adam_rows", roaming<double>, blocks, 1, ROAMING_THREADS, bytes, stream, table, job, states,
                       longest);
            } else {
                launch("adam_rows", roaming<float>, blocks, 1, ROAMING_THREADS, bytes, stream, table, job,
                       reinterpret_cast<float*>(states), longest);
            }
        } else if (holding == &WIDE) {
            launch_resident<double, double, WIDE.elements, WIDE.threads>(table, job, threads, stream);
        } else if (holding == &SHORT) {
            launch_resident<float, double, SHORT.elements, SHORT.threads>(table, job, threads, stream);
        } else {
            launch_resident<float, float, LONG.elements, LONG.threads>(table, job, threads, stream);
        }
        launch("adam_rows", add_units, divided(iterations + 1, 128), table.count, 128, 0, stream, table, work,
               sizes.span, iterations + 1, history);
    });
}

}  // namespace awd::cuda
