// One iteration of Adam or SGD on the elements of one group in a pass over memory, and the K x K work between passes.

#include <cmath>

#include "adam_move.cuh"
#include "weighted_sum.cuh"

namespace awd::cuda {
namespace {

constexpr unsigned THREADS = 128;
constexpr int64_t UNIT = 8192;  // elements of a block

int64_t step_units(const Parameter& parameter) { return divided(parameter.shape.rows * parameter.shape.columns, UNIT); }

// Calls write(entry, sum) with the block's sums of the first `count` numbers of each thread. room: [count][warps].
template <class Write>
static __device__ __forceinline__ void sum_block(const double (&values)[TOGETHER + 2], int count, double* room,
                                                 const Write& write) {
    const unsigned warps = THREADS / WARP, warp = threadIdx.x / WARP;
#pragma unroll
    for (int entry = 0; entry < TOGETHER + 2; ++entry) {
        if (entry < count) {
            const double sum = warp_sum(values[entry]);
            if (lane_index() == 0) room[entry * warps + warp] = sum;
        }
    }
    __syncthreads();
    if (int(threadIdx.x) >= count) return;
    double sum = 0.0;
    for (unsigned other = 0; other < warps; ++other) sum += room[threadIdx.x * warps + other];
    write(int(threadIdx.x), sum);
}

// N elements of the tensors, from `at` on, as Real; one by one where N is 1.
template <Dtype D, int N>
static __device__ __forceinline__ void read(const void* tensor, int64_t at, RealOf<D> (&values)[N]) {
    if constexpr (N == 1) {
        values[0] = element<D>(tensor, at);
    } else {
        values_at<D>(tensor, at, values);
    }
}

// N numbers of d or of the optimiser's state, as they are stored.
template <int N, class Real>
static __device__ __forceinline__ void read_state(const void* state, int64_t at, Real (&values)[N]) {
    const Real* from = static_cast<const Real*>(state) + at;
    if constexpr (N * sizeof(Real) % 16 == 0) {
#pragma unroll
        for (int part = 0; part < int(N * sizeof(Real) / 16); ++part) {
            const Packet packet = load_packet(from + part * 16 / int(sizeof(Real)));
            memcpy(values + part * 16 / int(sizeof(Real)), &packet, sizeof packet);
        }
    } else {
        values[0] = *from;
    }
}
template <int N, class Real>
static __device__ __forceinline__ void write_state(void* state, int64_t at, const Real (&values)[N]) {
    Real* to = static_cast<Real*>(state) + at;
    if constexpr (N * sizeof(Real) % 16 == 0) {
#pragma unroll
        for (int part = 0; part < int(N * sizeof(Real) / 16); ++part) {
            Packet packet;
            memcpy(&packet, values + part * 16 / int(sizeof(Real)), sizeof packet);
            store_packet(to + part * 16 / int(sizeof(Real)), packet);
        }
    } else {
        *to = values[0];
    }
}

// sums [TOGETHER + 2]: <t_j, d> of the models [first, first + TOGETHER), <d, d> and sum |d|.
template <int N, class Real>
static __device__ __forceinline__ void add_moments(const Real (&t)[TOGETHER][N], const Real (&d)[N],
                                                   double (&sums)[TOGETHER + 2]) {
#pragma unroll
    for (int e = 0; e < N; ++e) {
        const double x = double(d[e]);
#pragma unroll
        for (int j = 0; j < TOGETHER; ++j) sums[j] = fma(double(t[j][e]), x, sums[j]);
        sums[TOGETHER] = fma(x, x, sums[TOGETHER]);
        sums[TOGETHER + 1] += fabs(x);
    }
}

// Differences of up to TOGETHER models from `first` on with the base; 0 of models that are not there.
template <Dtype D, int N>
static __device__ __forceinline__ void read_differences(const Table& table, int index, int first, int64_t at,
                                                        const RealOf<D> (&base)[N], RealOf<D> (&t)[TOGETHER][N]) {
#pragma unroll
    for (int j = 0; j < TOGETHER; ++j) {
#pragma unroll
        for (int e = 0; e < N; ++e) t[j][e] = RealOf<D>(0);
        if (first + j < table.k) read<D, N>(table.model(index, first + j), at, t[j]);
    }
#pragma unroll
    for (int j = 0; j < TOGETHER; ++j) {
#pragma unroll
        for (int e = 0; e < N; ++e) {
            if (first + j < table.k) t[j][e] -= base[e];
        }
    }
}

template <Dtype D, int N>
static __device__ __forceinline__ void step_at(const Table& table, int index, int64_t at, const RealOf<D>* factors,
                                               RealOf<D> along, const Move<RealOf<D>>& move, RealOf<D> correction,
                                               RealOf<D> unbias, double (&sums)[TOGETHER + 2]) {
    using Real = RealOf<D>;
    const Part& part = table.part(index);
    Real base[N], d[N], velocity[N], square[N], slope[N], t[TOGETHER][N];
#pragma unroll
    for (int e = 0; e < N; ++e) base[e] = velocity[e] = square[e] = Real(0);
    read_state<N>(part.out, at, d);
    if (part.velocity != nullptr) read_state<N>(part.velocity, at, velocity);
    if (part.square != nullptr) read_state<N>(part.square, at, square);
    if (part.base != nullptr) read<D, N>(part.base, at, base);
#pragma unroll
    for (int e = 0; e < N; ++e) slope[e] = along * d[e];
    // The first models come last: their differences serve the products too.
    for (int first = (table.k - 1) / TOGETHER * TOGETHER; first >= 0; first -= TOGETHER) {
        read_differences<D, N>(table, index, first, at, base, t);
#pragma unroll
        for (int j = 0; j < TOGETHER; ++j) {
            const Real factor = first + j < table.k ? factors[first + j] : Real(0);
#pragma unroll
            for (int e = 0; e < N; ++e) slope[e] += factor * t[j][e];
        }
    }
#pragma unroll
    for (int e = 0; e < N; ++e) move.step(slope[e], correction, unbias, d[e], velocity[e], square[e]);
    write_state<N>(part.out, at, d);
    if (part.velocity != nullptr) write_state<N>(part.velocity, at, velocity);
    if (part.square != nullptr) write_state<N>(part.square, at, square);
    add_moments<N>(t, d, sums);
}

// sums: [units][K + 2], of which the products with the models from TOGETHER on are left to step_products.
template <Dtype D>
__global__ void __launch_bounds__(THREADS)
    step_elements(const __grid_constant__ Table table, Elementwise options, Correction correction,
                  const double* __restrict__ slope, double* __restrict__ sums) {
    using Real = RealOf<D>;
    constexpr int PACKET = PACKET_OF<D>;
    double* const room = shared_memory<double>();  // [TOGETHER + 2][warps], then the factors [K]
    Real* const factors = reinterpret_cast<Real*>(room + (TOGETHER + 2) * THREADS / WARP);
    const int64_t unit = table.first_unit + blockIdx.x;
    const int index = table.find(unit), k = table.k;
    const Part& part = table.part(index);
    for (int j = int(threadIdx.x); j < k; j += int(THREADS)) factors[j] = Real(-2.0 * slope[j]);
    __syncthreads();
    const Real along = Real(slope[k] + options.weight_decay);
    const Move<Real> move(options);
    const Real step = Real(correction.step), unbias = Real(correction.unbias);
    double own[TOGETHER + 2];
#pragma unroll
    for (int entry = 0; entry < TOGETHER + 2; ++entry) own[entry] = 0.0;
    const int64_t first = (unit - part.first_unit) * UNIT, size = part.rows * part.columns;
    const int64_t last = size - first < UNIT ? size : first + UNIT;
    const int64_t packets = part.packed ? (last - first) / PACKET : 0;
#pragma unroll 1
    for (int64_t packet = threadIdx.x; packet < packets; packet += THREADS) {
        step_at<D, PACKET>(table, index, first + packet * PACKET, factors, along, move, step, unbias, own);
    }
#pragma unroll 1
    for (int64_t at = first + packets * PACKET + threadIdx.x; at < last; at += THREADS) {
        step_at<D, 1>(table, index, at, factors, along, move, step, unbias, own);
    }
    double* to = sums + unit * (k + 2);
    sum_block(own, TOGETHER + 2, room, [&](int entry, double sum) {
        if (entry >= TOGETHER) {
            to[k + entry - TOGETHER] = sum;
        } else if (entry < k) {
            to[entry] = sum;
        }
    });
}

// The products of d with models [first, first + TOGETHER), first = (1 + blockIdx.y) TOGETHER.
template <Dtype D>
__global__ void __launch_bounds__(THREADS)
    step_products(const __grid_constant__ Table table, double* __restrict__ sums) {
    using Real = RealOf<D>;
    constexpr int PACKET = PACKET_OF<D>;
    double* const room = shared_memory<double>();
    const int64_t unit = table.first_unit + blockIdx.x;
    const int index = table.find(unit), k = table.k, model = int(1 + blockIdx.y) * TOGETHER;
    const Part& part = table.part(index);
    double own[TOGETHER + 2];
#pragma unroll
    for (int entry = 0; entry < TOGETHER + 2; ++entry) own[entry] = 0.0;
    const int64_t first = (unit - part.first_unit) * UNIT, size = part.rows * part.columns;
    const int64_t last = size - first < UNIT ? size : first + UNIT;
    const int64_t packets = part.packed ? (last - first) / PACKET : 0;
    const auto visit = [&](int64_t at, auto count) {
        constexpr int N = decltype(count)::value;
        Real base[N], d[N], t[TOGETHER][N];
#pragma unroll
        for (int e = 0; e < N; ++e) base[e] = Real(0);
        if (part.base != nullptr) read<D, N>(part.base, at, base);
        read_state<N>(part.out, at, d);
        read_differences<D, N>(table, index, model, at, base, t);
        add_moments<N>(t, d, own);
    };
#pragma unroll 1
    for (int64_t packet = threadIdx.x; packet < packets; packet += THREADS) {
        visit(first + packet * PACKET, std::integral_constant<int, PACKET>{});
    }
#pragma unroll 1
    for (int64_t at = first + packets * PACKET + threadIdx.x; at < last; at += THREADS) {
        visit(at, std::integral_constant<int, 1>{});
    }
    sum_block(own, TOGETHER, room, [&](int entry, double sum) {
        if (model + entry < k) sums[unit * (k + 2) + model + entry] = sum;
    });
}

// moments [parameters, K + 2] from the sums of their units: a warp for an entry, 32 interleaved sums of units in order.
__global__ void __launch_bounds__(256)
    add_units(const __grid_constant__ Table table, const double* __restrict__ sums, double* __restrict__ moments) {
    const Part& part = table.part(int(blockIdx.x));
    const int64_t size = part.rows * part.columns, units = (size + UNIT - 1) / UNIT;
    const int entries = table.k + 2;
    for (int entry = int(threadIdx.x / WARP); entry < entries; entry += 256 / int(WARP)) {
        double sum = 0.0;
        for (int64_t unit = lane_index(); unit < units; unit += WARP) {
            sum += sums[(part.first_unit + unit) * entries + entry];
        }
        sum = warp_sum(sum);
        if (lane_index() == 0) moments[part.number * entries + entry] = sum;
    }
}

__global__ void __launch_bounds__(256)
    evaluate_group(const double* __restrict__ gram, const double* __restrict__ moments, int64_t parameters, int k,
                   Objective objective, double l1, double* __restrict__ slope, double* __restrict__ loss) {
    double* const b = shared_memory<double>();  // <t_i, d>, <d, d> and sum |d|: [K + 2], then six times [K]
    for (int entry = int(threadIdx.x); entry < k + 2; entry += int(blockDim.x)) {
        double sum = 0.0;
        for (int64_t number = 0; number < parameters; ++number) sum += moments[number * (k + 2) + entry];
        b[entry] = sum;
    }
    __syncthreads();
    if (threadIdx.x != 0) return;
    const double square = b[k];
    const GroupWork work = GroupWork::at(b + k + 2, k);
    for (int i = 0; i < k; ++i) work.offset[i] = b[i] - 0.5 * square;
    inverse_norms(gram, k, objective.eps, work);
    const double mean = similarity(gram, k, objective.similarity, true, work);
    const double weight = pull_weight(k, objective.similarity, objective.total);
    double sum = 0.0;
    for (int i = 0; i < k; ++i) {
        const double pulled = weight * pull(work, i);
        slope[i] = pulled;
        sum += pulled;
    }
    slope[k] = 2.0 * sum + objective.alpha * penalty_slope(square, objective.penalty);
    *loss = span_loss(mean, square, objective) + l1 * b[k + 1] + defect(gram, k);
}

template <Dtype D>
void run(const Batch& batch, const Elementwise& options, const Correction& correction, const double* slope,
         double* sums) {
    const Stream stream = static_cast<Stream>(batch.stream);
    const size_t room = ((TOGETHER + 2) * THREADS / WARP + size_t(batch.k)) * sizeof(double);
    for_each_table(batch, step_units, [&](const Table& table) {
        launch("adam_step", step_elements<D>, table.units, 1, THREADS, room, stream, table, options, correction, slope,
               sums);
        launch("adam_step", step_products<D>, table.units, (batch.k - 1) / TOGETHER, THREADS, room, stream, table,
               sums);
    });
}

}  // namespace

int64_t adam_step_numbers(const Batch& batch) { return units_of(batch, step_units) * (batch.k + 2); }

void adam_step(const Batch& batch, const Elementwise& options, int64_t step, const double* slope, double* work,
               double* moments) {
    const Correction correction{options.lr / (1.0 - std::pow(options.momentum, double(step))),
                                1.0 / (1.0 - std::pow(options.beta2, double(step)))};
    switch (batch.dtype) {
        case Dtype::f32:
            run<Dtype::f32>(batch, options, correction, slope, work);
            break;
        case Dtype::bf16:
            run<Dtype::bf16>(batch, options, correction, slope, work);
            break;
        case Dtype::f16:
            run<Dtype::f16>(batch, options, correction, slope, work);
            break;
        case Dtype::f64:
            run<Dtype::f64>(batch, options, correction, slope, work);
            break;
    }
    for_each_table(batch, step_units, [&](const Table& table) {
        launch("adam_step", add_units, table.count, 1, 256, 0, static_cast<Stream>(batch.stream), table, work, moments);
    });
}

void adam_stream(const Batch& batch, const Objective& objective, const Elementwise& options, int64_t iterations,
                 const double* gram, double* work, double* slope, double* moments, double* history) {
    const int k = batch.k;
    for (int64_t iteration = 0; iteration <= iterations; ++iteration) {
        launch("adam_stream", evaluate_group, 1, 1, 256, size_t(7 * k + 2) * sizeof(double),
               static_cast<Stream>(batch.stream), gram, moments, int64_t(batch.parameters.size()), k, objective,
               options.l1, slope, history + iteration);
        if (iteration < iterations) adam_step(batch, options, iteration + 1, slope, work, moments);
    }
}

}  // namespace awd::cuda
