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
    Number *gram, *basis, *y, *velocity;
    GroupWork work;

    // room: sgd_numbers.
    void place(Number* room, int k) {
        gram = room;
        basis = gram + k * k;
        y = basis + k * k;
        velocity = y + k;
        Number* rest = velocity + k;
        work = {rest, rest + k, rest + 2 * k, rest + 3 * k, rest + 4 * k};
    }

    // The start at d = 0, from `gram`.
    void start(int k) {
        factor_gram(gram, k, basis);
        for (int n = 0; n < 2 * k; ++n) y[n] = every(0.0);
    }
};

// Records the losses [begin, end), added to history [end - begin][LANES], and takes the steps between and after them up
// to options.iterations. `k` is a literal in the callers below, so that loops over tasks unroll. fetcher: fetches at
// every iteration.
AWD_INLINE void iterate_tasks(const Descent& now, int k, const Objective& objective, const Sgd& options, int64_t begin,
                              int64_t end, double* history, Fetcher& fetcher) {
    const Number lost = defect(now.gram, k);
    Number trace = every(0.0);
    for (int i = 0; i < k; ++i) trace += now.gram[i * k + i];
    const auto filled = trace > every(0.0);
    for (int64_t iteration = begin; iteration < end; ++iteration) {
        fetcher.fetch();
        const Number square = span_moments(now.basis, now.y, k, now.work.offset);
        inverse_norms(now.gram, k, objective.eps, now.work);
        // Only before a group has moved are its vectors orthogonal but by rounding.
        const bool zeros = any(filled & (square == every(0.0)));
        const Number mean = zeros ? similarity(now.gram, k, objective.similarity, true, now.work)
                                  : similarity(now.gram, k, objective.similarity, false, now.work);
        Number* entry = reinterpret_cast<Number*>(history + (iteration - begin) * LANES);
        *entry += span_loss(mean, square, objective) + lost;
        if (iteration < options.iterations) {
            sgd_step(now.basis, now.y, now.velocity, k, objective, options, now.work, square);
        }
    }
}

static inline void iterate(const Descent& now, int k, const Objective& objective, const Sgd& options, int64_t begin,
                           int64_t end, double* history, Fetcher& fetcher) {
    switch (k) {
        case 2:
            return iterate_tasks(now, 2, objective, options, begin, end, history, fetcher);
        case 3:
            return iterate_tasks(now, 3, objective, options, begin, end, history, fetcher);
        case 4:
            return iterate_tasks(now, 4, objective, options, begin, end, history, fetcher);
        case 5:
            return iterate_tasks(now, 5, objective, options, begin, end, history, fetcher);
        case 6:
            return iterate_tasks(now, 6, objective, options, begin, end, history, fetcher);
        case 8:
            return iterate_tasks(now, 8, objective, options, begin, end, history, fetcher);
        default:
            return iterate_tasks(now, k, objective, options, begin, end, history, fetcher);
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
    now.start(k);
    const size_t bytes = size_t(2 * k) * sizeof(Number);  // of y and velocity
    if (state != nullptr && job.begin != 0) std::memcpy(now.y, state, bytes);
    iterate(now, k, job.objective, job.options, job.begin, job.end, history, fetcher);
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
    for (int64_t index = 0; index < entries; ++index) {
        Number entry;
        std::memcpy(&entry, lanes + index * LANES, sizeof entry);
        history[index] = sum_of_lanes(entry);
    }
}

#endif
