// All SGD iterations for a few groups side by side, one per lane, for one instruction set.

#include "../group.h"
#include "../number.h"
#include "../small_matrix.h"
#include "fetch.h"

#ifndef AWD_ITERATE
#define AWD_ITERATE

AWD_INLINE double sum_of_lanes(Number x) {
    double sum = 0.0;
    for (int lane = 0; lane < LANES; ++lane) sum += x[lane];
    return sum;
}

// Groups [first, first + LANES) of G [R, K, K], one per lane; lanes past the last group hold zeros.
static inline void gather_grams(const double* gram, int64_t first, int64_t groups, int64_t square, Number* out) {
    double* lanes = reinterpret_cast<double*>(out);
    for (int lane = 0; lane < LANES; ++lane) {
        const double* from = gram + (first + lane) * square;
        for (int64_t index = 0; index < square; ++index) {
            lanes[index * LANES + lane] = first + lane < groups ? from[index] : 0.0;
        }
    }
}

static inline void scatter_coefficients(const Number* a, int64_t first, int64_t groups, int k, double* out) {
    const double* lanes = reinterpret_cast<const double*>(a);
    for (int lane = 0; lane < LANES && first + lane < groups; ++lane) {
        for (int i = 0; i < k; ++i) out[(first + lane) * k + i] = lanes[i * LANES + lane];
    }
}

// What the iterations hold of LANES groups: [K][K] and [K]; y and velocity are next to each other.
struct Descent {
    int k;
    Number *gram, *basis, *y, *velocity;
    GroupWork work;

    // room: sgd_numbers.
    void place(Number* room, int tasks) {
        k = tasks;
        gram = room;
        basis = gram + k * k;
        y = basis + k * k;
        velocity = y + k;
        Number* rest = velocity + k;
        work = GroupWork::at(rest, k);
    }

    // The start at d = 0, from `gram`.
    void start() {
        factor_gram(gram, k, basis);
        for (int n = 0; n < 2 * k; ++n) y[n] = every(0.0);
    }
};

// Records the losses [begin, end), added to history [end - begin][LANES], and takes the steps between and after them up
// to options.iterations. K: k as a literal, so that loops over tasks unroll and what they work on stays in registers;
// 0 where it is not known. fetcher: fetches at every iteration.
template <int K>
static inline void iterate_tasks(const Descent& now, const Objective& objective, const Sgd& options, int64_t begin,
                                 int64_t end, double* history, Fetcher& fetcher) {
    const int k = K > 0 ? K : now.k;
    Number local[K > 0 ? 8 * K : 1];
    Number* const y = K > 0 ? local : now.y;
    Number* const velocity = K > 0 ? local + K : now.velocity;
    const GroupWork work = K > 0 ? GroupWork::at(local + 2 * K, K) : now.work;
    if (K > 0) std::memcpy(local, now.y, 2 * K * sizeof(Number));
    const Number lost = defect(now.gram, k);
    Number trace = every(0.0);
    for (int i = 0; i < k; ++i) trace += now.gram[i * k + i];
    const auto filled = trace > every(0.0);
    const double weight = pull_weight(k, objective.similarity, objective.total);
    for (int64_t iteration = begin; iteration < end; ++iteration) {
        fetcher.fetch();
        const Number square = span_moments(now.basis, y, k, work.offset);
        inverse_norms(now.gram, k, objective.eps, work);
        // Only before a group has moved are its vectors orthogonal but by rounding.
        const bool zeros = any(filled & (square == every(0.0)));
        const Number mean = similarity_of(now.gram, k, objective.similarity, zeros, work);
        Number* entry = reinterpret_cast<Number*>(history + (iteration - begin) * LANES);
        *entry += span_loss(mean, square, objective) + lost;
        if (iteration == options.iterations) break;
        const Number along = objective.alpha * penalty_slope(square, objective.penalty) + options.weight_decay;
        span_slope(now.basis, y, k, weight, along, work, work.offset);
        sgd_step(work.offset, y, velocity, k, options);
    }
    if (K > 0) std::memcpy(now.y, local, 2 * K * sizeof(Number));
}

static inline void iterate(const Descent& now, const Objective& objective, const Sgd& options, int64_t begin,
                           int64_t end, double* history, Fetcher& fetcher) {
    switch (now.k) {
        case 2:
            return iterate_tasks<2>(now, objective, options, begin, end, history, fetcher);
        case 3:
            return iterate_tasks<3>(now, objective, options, begin, end, history, fetcher);
        case 4:
            return iterate_tasks<4>(now, objective, options, begin, end, history, fetcher);
        case 5:
            return iterate_tasks<5>(now, objective, options, begin, end, history, fetcher);
        case 6:
            return iterate_tasks<6>(now, objective, options, begin, end, history, fetcher);
        case 7:
            return iterate_tasks<7>(now, objective, options, begin, end, history, fetcher);
        case 8:
            return iterate_tasks<8>(now, objective, options, begin, end, history, fetcher);
        default:
            return iterate_tasks<0>(now, objective, options, begin, end, history, fetcher);
    }
}

// Groups [first, first + LANES). history: [end - begin][LANES], added to. state: [2][K][LANES], from the stretch of
// iterations before to the next.
static inline void sgd_lanes(const SgdJob& job, int64_t first, double* history, double* state, double* room,
                             Fetcher& fetcher) {
    const int k = job.k;
    Descent now;
    now.place(reinterpret_cast<Number*>(room), k);
    gather_grams(job.gram, first, job.groups, int64_t(k) * k, now.gram);
    now.start();
    const size_t bytes = size_t(2 * k) * sizeof(Number);  // of y and velocity
    if (state != nullptr && job.begin != 0) std::memcpy(now.y, state, bytes);
    iterate(now, job.objective, job.options, job.begin, job.end, history, fetcher);
    if (state != nullptr && job.end <= job.options.iterations) {
        std::memcpy(state, now.y, bytes);
        return;
    }
    span_coefficients(now.basis, now.y, k, now.velocity);
    scatter_coefficients(now.velocity, first, job.groups, k, job.coefficients);
}

// Groups [first, last), and the losses [job.begin, job.end) of all of them together.
static inline void sgd_groups(const SgdJob& job, int64_t first, int64_t last, double* history, double* states,
                              double* room, Fetcher& fetcher) {
    const int64_t entries = job.end - job.begin;
    double* lanes = room + sgd_numbers(job.k) * LANES;  // [entries][LANES] of the history
    for (int64_t index = 0; index < entries * LANES; ++index) lanes[index] = 0.0;
    for (; first < last; first += LANES) {
        sgd_lanes(job, first, lanes, states, room, fetcher);
        if (states != nullptr) states += LANES * 2 * job.k;
    }
    for (int64_t index = 0; index < entries; ++index) history[index] = sum_of_lanes(load(lanes + index * LANES));
}

#endif
