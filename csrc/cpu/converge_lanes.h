// Converge for a few groups side by side, one per lane, for one instruction set.

#include "iterate.h"

#ifndef AWD_CONVERGE_LANES
#define AWD_CONVERGE_LANES

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

static inline void converge_lanes(const ConvergeJob& job, int64_t first, Record* records, double* room) {
    const int k = job.k;
    Problem<Number> problem;
    problem.k = k;
    problem.place(reinterpret_cast<Number*>(room));
    gather_grams(job.gram, first, job.groups, int64_t(k) * k, problem.hessian);
    pose(problem, problem.hessian, job.objective);
    descend_all_ways(problem, job.options, *job.sizes, records);
    span_coefficients(problem.x, problem.best, k, problem.step);  // both are divided by the scale
    scatter_coefficients(problem.step, first, job.groups, k, job.coefficients);
}

// Groups [first, end): for each way their history [converge_entries] and its length [WAYS].
static inline void converge_groups(const ConvergeJob& job, int64_t first, int64_t end, double* history,
                                   int64_t* lengths, double* room) {
    const int64_t entries = converge_entries(job.options), capacity = entries / WAYS;
    for (int64_t index = 0; index < entries; ++index) history[index] = 0.0;
    Record records[WAYS];
    for (int way = 0; way < WAYS; ++way) records[way] = {history + way * capacity, capacity};
    for (; first < end; first += LANES) converge_lanes(job, first, records, room);
    for (int way = 0; way < WAYS; ++way) lengths[way] = records[way].used;
}

#endif
