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

// The best loss after each point that one of Converge's ways offers, added over lanes and over the batches of an item
// of work.
struct Record {
    double* entries;    // [capacity]
    int64_t capacity;   // at least 1
    int64_t taken = 0;  // points of the present batch
    int64_t used = 0;   // entries of the longest batch

    void add(Number value) {
        if (taken < capacity - 1) entries[taken] += sum_of_lanes(value);
        ++taken;
    }
    // Ends a batch: its groups hold their last loss. Points beyond the capacity replace the last.
    void close(Number value) {
        const double sum = sum_of_lanes(value);
        for (int64_t at = taken < capacity - 1 ? taken : capacity - 1; at < capacity; ++at) entries[at] += sum;
        const int64_t recorded = taken < capacity ? taken : capacity;
        if (recorded > used) used = recorded;
        taken = 0;
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
//
// history: of the losses [job.begin, job.end). state [2][K][LANES]: from the stretch of iterations before to the next.
AWD_INLINE void descend_lanes(const SgdJob& job, int64_t first, int k, double* history, double* state, double* room) {
    Number* gram = reinterpret_cast<Number*>(room);  // [K][K], as the next
    Number* basis = gram + k * k;
    Number* y = basis + k * k;  // [K], as all below
    Number* velocity = y + k;
    Number* vectors = velocity + k;
    const GroupWork work{vectors, vectors + k, vectors + 2 * k, vectors + 3 * k, vectors + 4 * k};
    gather_grams(job.gram, first, job.groups, int64_t(k) * k, gram);
    factor_gram(gram, k, basis);
    const size_t bytes = size_t(2 * k) * sizeof(Number);  // of y and velocity
    if (job.begin == 0) {
        for (int n = 0; n < k; ++n) y[n] = velocity[n] = every(0.0);
    } else {
        std::memcpy(y, state, bytes);
    }
    const Number lost = defect(gram, k);
    const Objective objective = job.objective;
    const Sgd options = job.options;
    for (int64_t iteration = job.begin; iteration < job.end; ++iteration) {
        Number square;
        const Number loss = span_loss(gram, basis, y, k, objective, work, square) + lost;
        history[iteration - job.begin] += sum_of_lanes(loss);
        if (iteration < options.iterations) sgd_step(basis, y, velocity, k, objective, options, work, square);
    }
    if (job.end <= options.iterations) {
        std::memcpy(state, y, bytes);
        return;
    }
    span_coefficients(basis, y, k, velocity);
    scatter_coefficients(velocity, first, job.groups, k, job.coefficients);
}

// One item: ITEM_GROUPS groups, their history and their states.
static void sgd_item(const SgdJob& job, int64_t item, double* room) {
    double* history = job.histories + (item - job.first_item) * job.stretch;
    for (int64_t index = 0; index < job.end - job.begin; ++index) history[index] = 0.0;
    const int64_t end = (item + 1) * ITEM_GROUPS < job.groups ? (item + 1) * ITEM_GROUPS : job.groups;
    for (int64_t first = item * ITEM_GROUPS; first < end; first += LANES) {
        double* state = nullptr;
        if (job.states != nullptr) state = job.states + (first - job.first_item * ITEM_GROUPS) * 2 * job.k;
        switch (job.k) {
            case 2:
                descend_lanes(job, first, 2, history, state, room);
                break;
            case 3:
                descend_lanes(job, first, 3, history, state, room);
                break;
            case 4:
                descend_lanes(job, first, 4, history, state, room);
                break;
            case 5:
                descend_lanes(job, first, 5, history, state, room);
                break;
            case 8:
                descend_lanes(job, first, 8, history, state, room);
                break;
            default:
                descend_lanes(job, first, job.k, history, state, room);
        }
    }
}

static inline void converge_lanes(const ConvergeJob& job, int64_t first, Record* records, double* room) {
    const int k = job.k;
    Problem problem;
    problem.k = k;
    problem.place(reinterpret_cast<Number*>(room));
    gather_grams(job.gram, first, job.groups, int64_t(k) * k, problem.hessian);
    pose(problem, problem.hessian, job.objective);
    descend_all_ways(problem, job.options, *job.sizes, records);
    span_coefficients(problem.x, problem.best, k, problem.step);  // both are divided by the scale
    scatter_coefficients(problem.step, first, job.groups, k, job.coefficients);
}

// One item: ITEM_GROUPS groups, and for each way their history and its length.
static void converge_item(const ConvergeJob& job, int64_t item, double* room) {
    const int64_t entries = converge_entries(job.options), capacity = entries / WAYS;
    double* history = job.histories + (item - job.first_item) * entries;
    for (int64_t index = 0; index < entries; ++index) history[index] = 0.0;
    Record records[WAYS];
    for (int way = 0; way < WAYS; ++way) records[way] = {history + way * capacity, capacity};
    const int64_t end = (item + 1) * ITEM_GROUPS < job.groups ? (item + 1) * ITEM_GROUPS : job.groups;
    for (int64_t first = item * ITEM_GROUPS; first < end; first += LANES) {
        converge_lanes(job, first, records, room);
    }
    for (int way = 0; way < WAYS; ++way) job.lengths[(item - job.first_item) * WAYS + way] = records[way].used;
}
