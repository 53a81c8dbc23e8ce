// All iterations of SGD for a few groups side by side, for one instruction set; descend.cpp includes it.

#include "../number.h"
#include "../group.h"

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

AWD_INLINE double sum_of_lanes(Number x) {
    double sum = 0.0;
    for (int lane = 0; lane < LANES; ++lane) sum += x[lane];
    return sum;
}

// `k` is a literal in the callers below, so that loops over tasks unroll.
AWD_INLINE void descend_lanes(const SgdJob& job, int64_t first, int k, double* history, double* room) {
    Number* gram = reinterpret_cast<Number*>(room);  // [K][K]
    Number* a = gram + k * k;                        // [K], as all below
    Number* velocity = a + k;
    Number* vectors = velocity + k;
    const GroupWork work{vectors, vectors + k, vectors + 2 * k, vectors + 3 * k, vectors + 4 * k};
    gather_grams(job.gram, first, job.groups, int64_t(k) * k, gram);
    for (int i = 0; i < k; ++i) a[i] = velocity[i] = every(0.0);
    const Objective objective = job.objective;
    const Sgd options = job.options;
    for (int64_t iteration = 0;; ++iteration) {
        Number square;
        history[iteration] += sum_of_lanes(span_loss(gram, a, k, objective, work, square));
        if (iteration == options.iterations) break;
        sgd_step(a, velocity, k, objective, options, work, square);
    }
    scatter_coefficients(a, first, job.groups, k, job.coefficients);
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
