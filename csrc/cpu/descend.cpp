#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "../kernels.h"
#include "parallel.h"

namespace awd {
namespace {

constexpr int64_t ITEM_GROUPS = 32;           // groups per item of work
constexpr int64_t HISTORY_NUMBERS = 1 << 22;  // held for items whose histories are not yet added, or somewhat more
constexpr int64_t HISTORY_ITEMS = 64;         // at least this many items run between two additions
constexpr int64_t STRETCH_ENTRIES = 1 << 14;  // losses of SGD that an item records between two additions
constexpr int64_t MAX_LANES = 8;

// Numbers of room for K tasks in a lane: the matrices and vectors of sgd_item and of Problem.
int64_t sgd_numbers(int64_t k) { return 2 * k * k + 7 * k; }
int64_t converge_numbers(int64_t k) { return 6 * k * k + 11 * k; }

struct SgdJob {
    const double* gram;
    int64_t groups;
    int k;
    Objective objective;
    Sgd options;
    double* coefficients;
    double* states;      // [items, ITEM_GROUPS, 2 K]: coordinates and velocities between stretches; null with one
    double* histories;   // [items, stretch]
    int64_t stretch;     // iterations of one
    int64_t begin, end;  // of the losses that are recorded now
    int64_t first_item;
};

struct ConvergeJob {
    const double* gram;
    int64_t groups;
    int k;
    Objective objective;
    Converge options;
    const StepSizes* sizes;
    double* coefficients;
    double* histories;  // [items, converge_entries]
    int64_t* lengths;   // [items, WAYS]
    int64_t first_item;
};

// Items that run between two additions of their histories to the total; a function of the problem alone.
int64_t items_together(int64_t items, int64_t entries) {
    const int64_t fitting = HISTORY_NUMBERS / entries;
    const int64_t together = fitting > HISTORY_ITEMS ? fitting : HISTORY_ITEMS;
    return together < items ? together : items;
}

}  // namespace
}  // namespace awd

#define AWD_KERNEL "descend_kernel.h"
#include "foreach_isa.h"

namespace awd {

// Iterations run in stretches, over many items at a time, so that the memory of their histories is bounded.
void descend_sgd(const double* gram, int64_t groups, int k, const Objective& objective, const Sgd& options,
                 double* coefficients, double* history, int threads) {
    const int64_t entries = options.iterations + 1;
    const int64_t stretch = std::min(entries, STRETCH_ENTRIES);
    const int64_t items = (groups + ITEM_GROUPS - 1) / ITEM_GROUPS;
    const int64_t together = items_together(items, stretch);
    const Scratch histories(together * stretch);
    const Scratch states(stretch < entries ? together * ITEM_GROUPS * 2 * k : 0);
    double* const kept = stretch < entries ? states.data() : nullptr;
    SgdJob job{gram, groups, k, objective, options, coefficients, kept, histories.data(), stretch, 0, 0, 0};
    const int64_t numbers = sgd_numbers(k) * MAX_LANES;
    for (int64_t index = 0; index < entries; ++index) history[index] = 0.0;
    for (; job.first_item < items; job.first_item += together) {
        const int64_t last = std::min(job.first_item + together, items);
        for (job.begin = 0; job.begin < entries; job.begin = job.end) {
            job.end = std::min(job.begin + stretch, entries);
            run_items(threads, job.first_item, last, AWD_VARIANT(sgd_item), job, numbers);
            for (int64_t item = 0; item < last - job.first_item; ++item) {
                const double* part = job.histories + item * stretch;
                for (int64_t index = job.begin; index < job.end; ++index) history[index] += part[index - job.begin];
            }
        }
    }
}

// The items with the longest ways say how many entries of them are used; the others hold their last loss in the rest.
int64_t descend_converge(const double* gram, int64_t groups, int k, const Objective& objective, const Converge& options,
                         double* coefficients, double* history, int threads) {
    const int64_t entries = converge_entries(options), capacity = entries / WAYS;
    const int64_t items = (groups + ITEM_GROUPS - 1) / ITEM_GROUPS;
    const int64_t together = items_together(items, entries);
    const Scratch histories(together * entries);
    std::vector<int64_t> lengths(size_t(together * WAYS));
    const StepSizes sizes;
    ConvergeJob job{gram, groups, k, objective, options, &sizes, coefficients, histories.data(), lengths.data(), 0};
    const int64_t numbers = converge_numbers(k) * MAX_LANES;
    int64_t used[WAYS] = {1};  // the loss at d = 0, even of no groups
    for (int64_t index = 0; index < entries; ++index) history[index] = 0.0;
    for (; job.first_item < items; job.first_item += together) {
        const int64_t end = job.first_item + together < items ? job.first_item + together : items;
        run_items(threads, job.first_item, end, AWD_VARIANT(converge_item), job, numbers);
        for (int64_t item = 0; item < end - job.first_item; ++item) {
            for (int64_t index = 0; index < entries; ++index) history[index] += job.histories[item * entries + index];
            for (int way = 0; way < WAYS; ++way) used[way] = std::max(used[way], job.lengths[item * WAYS + way]);
        }
    }
    // Losses were of each group's own mean similarity. The unused room of the ways is closed.
    int64_t length = 0;
    for (int way = 0; way < WAYS; ++way) {
        for (int64_t index = 0; index < used[way]; ++index) {
            history[length++] = history[way * capacity + index] / objective.total;
        }
    }
    return length;
}

}  // namespace awd
