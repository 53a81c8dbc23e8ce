// All iterations for a few groups side by side, one per lane, for one instruction set; descend.cpp includes it through
// foreach_isa.h.

#include "../number.h"
#include "../group.h"
#include "../small_matrix.h"

AWD_INLINE double sum_of_lanes(Number x) {
    double sum = 0.0;
    for (int lane = 0; lane < LANES; ++lane) sum += x[lane];
    return sum;
}

// The best loss after each step of one of Converge's ways, added over lanes and over the batches of an item of work.
struct Record {
    double* entries;  // [capacity]
    int64_t capacity;
    int64_t used = 0;  // by the longest batch

    void add(int64_t step, Number value) {
        if (step < capacity - 1) entries[step] += sum_of_lanes(value);
    }
    // Groups that have finished hold their last loss.
    void close(int64_t steps, Number value) {
        const int64_t recorded = steps < capacity ? steps : capacity;
        if (recorded > used) used = recorded;
        if (capacity == 0) return;
        const double sum = sum_of_lanes(value);
        for (int64_t step = steps < capacity - 1 ? steps : capacity - 1; step < capacity; ++step) entries[step] += sum;
    }
};

#include "../converge.h"

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

// `k` is a literal in the callers below, so that loops over tasks unroll.
AWD_INLINE void descend_lanes(const SgdJob& job, int64_t first, int k, double* history, double* room) {
    Number* gram = reinterpret_cast<Number*>(room);  // [K][K], as the next
    Number* basis = gram + k * k;
    Number* y = basis + k * k;  // [K], as all below
    Number* velocity = y + k;
    Number* vectors = velocity + k;
    const GroupWork work{vectors, vectors + k, vectors + 2 * k, vectors + 3 * k, vectors + 4 * k};
    gather_grams(job.gram, first, job.groups, int64_t(k) * k, gram);
    factor_gram(gram, k, basis);
    for (int n = 0; n < k; ++n) y[n] = velocity[n] = every(0.0);
    const Objective objective = job.objective;
    const Sgd options = job.options;
    for (int64_t iteration = 0;; ++iteration) {
        Number square;
        history[iteration] += sum_of_lanes(span_loss(gram, basis, y, k, objective, work, square));
        if (iteration == options.iterations) break;
        sgd_step(basis, y, velocity, k, objective, options, work, square);
    }
    span_coefficients(basis, y, k, velocity);
    scatter_coefficients(velocity, first, job.groups, k, job.coefficients);
}

// One item: ITEM_GROUPS groups and their history.
static void sgd_item(const SgdJob& job, int64_t item, double* room) {
    double* history = job.histories + (item - job.first_item) * (job.options.iterations + 1);
    for (int64_t index = 0; index <= job.options.iterations; ++index) history[index] = 0.0;
    const int64_t end = (item + 1) * ITEM_GROUPS < job.groups ? (item + 1) * ITEM_GROUPS : job.groups;
    for (int64_t first = item * ITEM_GROUPS; first < end; first += LANES) {
        switch (job.k) {
            case 2:
                descend_lanes(job, first, 2, history, room);
                break;
            case 3:
                descend_lanes(job, first, 3, history, room);
                break;
            case 4:
                descend_lanes(job, first, 4, history, room);
                break;
            case 5:
                descend_lanes(job, first, 5, history, room);
                break;
            case 8:
                descend_lanes(job, first, 8, history, room);
                break;
            default:
                descend_lanes(job, first, job.k, history, room);
        }
    }
}

static inline void converge_lanes(const ConvergeJob& job, int64_t first, double* start, double* annealed,
                                  Record& newton, Record& polish, double* room) {
    const int k = job.k;
    Problem problem;
    problem.k = k;
    problem.place(reinterpret_cast<Number*>(room));
    gather_grams(job.gram, first, job.groups, int64_t(k) * k, problem.hessian);
    pose(problem, problem.hessian, job.objective);
    for (int n = 0; n < k; ++n) problem.y[n] = problem.best[n] = every(0.0);
    smoothed_loss(problem, problem.y, every(0.0), problem.best_value);
    *start += sum_of_lanes(problem.best_value);
    descend_newton(problem, START_RADIUS, job.options, newton);
    descend_annealed(problem, job.sizes, ANNEAL_STEPS);
    *annealed += sum_of_lanes(problem.best_value);
    descend_newton(problem, POLISH_RADIUS, job.options, polish);
    span_coefficients(problem.x, problem.best, k, problem.step);  // both are divided by the scale
    scatter_coefficients(problem.step, first, job.groups, k, job.coefficients);
}

// One item: ITEM_GROUPS groups, their history and its two lengths.
static void converge_item(const ConvergeJob& job, int64_t item, double* room) {
    const int64_t steps = recorded_steps(job.options), entries = 2 * steps + 2;
    double* history = job.histories + (item - job.first_item) * entries;
    for (int64_t index = 0; index < entries; ++index) history[index] = 0.0;
    Record newton{history + 1, steps}, polish{history + steps + 2, steps};
    const int64_t end = (item + 1) * ITEM_GROUPS < job.groups ? (item + 1) * ITEM_GROUPS : job.groups;
    for (int64_t first = item * ITEM_GROUPS; first < end; first += LANES) {
        converge_lanes(job, first, history, history + steps + 1, newton, polish, room);
    }
    job.lengths[2 * (item - job.first_item)] = newton.used;
    job.lengths[2 * (item - job.first_item) + 1] = polish.used;
}
