// Gram, all SGD iterations and the combination in one launch: a warp takes 32 groups from their elements to their
// merged elements.
//
// The elements are read twice. Warps of a multiprocessor are in different phases, so that one's iterations (float64
// arithmetic) run beside another's streams (memory). Groups could be kept on the chip between the two reads only as few
// at a time as starve the arithmetic; docs/performance.md counts it.

#include "iterate.cuh"
#include "products.cuh"
#include "weighted_sum.cuh"

namespace awd::cuda {
namespace {

template <int K>
struct Factors {
    double of[K];
    double sum;
};

// Shared memory of a warp: G of its groups, where a tile of columns was before; then y and the velocity of the
// iterations, where the weights [K][32] are later.
template <int K>
constexpr size_t room_bytes(Dtype dtype) {
    const size_t gram = K * K * sizeof(Interleaved), tile = size_t(COLUMN_ROOM<K>) * size_t(size_of(dtype));
    return gram > tile ? gram : tile;
}
template <int K>
constexpr size_t weight_bytes() {
    return (2 * K + 2) * sizeof(Interleaved);
}

// G of the rows [first, first + 32), to memory and to each row's lane.
template <Dtype D, int K>
static __device__ __forceinline__ void gram_of_rows(const Table& table, int index, int64_t first, double* gram,
                                                    Interleaved* lanes) {
    const Part& part = table.part(index);
    const int lane = int(lane_index()), i = lane / 4, j = 2 * (lane % 4);
    const void* model = i < K ? table.model(index, i) : nullptr;
    for (int row = 0; row < GROUPS; ++row) {
        double c[2] = {0.0, 0.0};
        if (first + row < part.rows) {
            const int64_t at = (first + row) * part.columns;
            add_row_products<D, true>(part.base, model, nullptr, at, part.columns, part.packed, c);
        }
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            if (i < K && j + e < K) {
                lanes[i * K + j + e].lanes[row] = c[e];
                if (first + row < part.rows) gram[(part.first_group + first + row) * K * K + i * K + j + e] = c[e];
            }
        }
    }
}

// The same of columns [first, first + 32).
template <Dtype D, int K>
static __device__ __forceinline__ void gram_of_columns(const Table& table, int index, int64_t first, double* gram,
                                                       Interleaved* lanes) {
    const Part& part = table.part(index);
    double sums[K * (K + 1) / 2];
#pragma unroll
    for (int entry = 0; entry < K * (K + 1) / 2; ++entry) sums[entry] = 0.0;
    add_column_products<D, K>(table, index, 0, part.rows, first, reinterpret_cast<typename Storage<D>::Raw*>(lanes),
                              sums);
    const int64_t column = first + lane_index();
    const bool here = column < part.columns;
#pragma unroll
    for (int i = 0; i < K; ++i) {
#pragma unroll
        for (int j = 0; j < K; ++j) {
            const int low = i < j ? i : j, high = i < j ? j : i;
            const double product = here ? sums[high * (high + 1) / 2 + low] : 0.0;
            lanes[i * K + j] = product;
            if (here) gram[(part.first_group + column) * K * K + i * K + j] = product;
        }
    }
}

template <int K>
__global__ void __launch_bounds__(WARP, 8)
    merge_units(const __grid_constant__ Table table, const __grid_constant__ Factors<K> factors, Objective objective,
                Sgd options, unsigned weights_at, double* __restrict__ gram, double* __restrict__ coefficients,
                double* __restrict__ parts) {
    unsigned char* const shared = shared_memory<unsigned char>();
    Interleaved* const lanes = reinterpret_cast<Interleaved*>(shared);
    const int64_t unit = table.first_unit + blockIdx.x;
    const int index = table.find(unit);
    const Part& part = table.part(index);
    const int64_t first = (unit - part.first_unit) * GROUPS, own = first + lane_index();
    with_storage(table.dtype, [&](auto dtype) {
        constexpr Dtype D = decltype(dtype)::value;
        if (part.by_column) {
            gram_of_columns<D, K>(table, index, first, gram, lanes);
        } else {
            gram_of_rows<D, K>(table, index, first, gram, lanes);
        }
    });
    __syncwarp();
    objective.total = part.total;
    double a[K];
    const int64_t entries = options.iterations + 1;
    Interleaved* const y = reinterpret_cast<Interleaved*>(shared + weights_at);  // where the weights will be
    iterate_groups<K>(lanes, y, nullptr, K, objective, options, 0, entries, parts + unit * entries, nullptr, a);
    if (own < part.groups()) {
#pragma unroll
        for (int j = 0; j < K; ++j) coefficients[(part.first_group + own) * K + j] = a[j];
    }
    __syncwarp();  // no lane needs its y any more
    with_storage(table.dtype, [&](auto dtype) {
        constexpr Dtype D = decltype(dtype)::value;
        using Real = RealOf<D>;
        Real* const weights = reinterpret_cast<Real*>(shared + weights_at);
#pragma unroll
        for (int j = 0; j < K; ++j) weights[j * WARP + lane_index()] = Real(factors.of[j] - factors.sum * a[j]);
        __syncwarp();
        if (part.by_column) {
            combine_columns<D>(table, index, 0, part.rows, first, [&](int j, int c) { return weights[j * WARP + c]; });
        } else {
            const int64_t rows = part.rows - first < GROUPS ? part.rows - first : GROUPS;
            for (int64_t row = 0; row < rows; ++row) {
                combine_stretch<D>(table, index, (first + row) * part.columns, part.columns,
                                   [&](int j) { return weights[j * WARP + row]; });
            }
        }
    });
}

}  // namespace

int64_t merge_rows_numbers(const Batch& batch, const Sgd& options) {
    return units_of(batch, sgd_units) * (options.iterations + 1);
}

void merge_rows(const Batch& batch, const double* factors, const Objective& objective, const Sgd& options, double* work,
                double* gram, double* coefficients, double* history) {
    if (batch.k > FUSED_TASKS) throw std::invalid_argument("merge_rows takes at most 8 models in one launch");
    for_each_table(batch, sgd_units, [&](const Table& table) {
        with_tasks(batch.k, [&](auto tasks) {
            constexpr int K = decltype(tasks)::value;
            if constexpr (K > 0) {
                Factors<K> given;
                given.sum = 0.0;
                for (int j = 0; j < K; ++j) given.sum += given.of[j] = factors[j];
                const size_t room = room_bytes<K>(batch.dtype);
                launch("merge_rows", merge_units<K>, table.units, 1, WARP, room + weight_bytes<K>(),
                       static_cast<Stream>(batch.stream), table, given, objective, options, unsigned(room), gram,
                       coefficients, work);
            }
        });
    });
    const int64_t entries = options.iterations + 1;
    launch_add_histories(batch, work, entries, 0, entries, history);
}

}  // namespace awd::cuda
