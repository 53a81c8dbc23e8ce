#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "../kernels.h"
#include "descents.h"
#include "parallel.h"

namespace awd {
namespace {

constexpr int64_t ITEM_GROUPS = 32;           // groups per item of work
constexpr int64_t STRETCH_ENTRIES = 1 << 12;  // losses of SGD that an item records between two additions

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
    const int64_t numbers = (sgd_numbers(k) + stretch) * MAX_LANES;
    for (int64_t index = 0; index < entries; ++index) history[index] = 0.0;
    for (; job.first_item < items; job.first_item += together) {
        const int64_t last = std::min(job.first_item + together, items);
        for (job.begin = 0; job.begin < entries; job.begin = job.end) {
            job.end = std::min(job.begin + stretch, entries);
            run_items(threads, job.first_item, last, AWD_VARIANT(sgd_item), job, numbers);
            add_histories(job.histories, last - job.first_item, stretch, job.end - job.begin, history + job.begin);
        }
    }
}

// The items with the longest ways say how many entries of them are used; the others hold their last loss in the rest.
int64_t descend_converge(const double* gram, int64_t groups, int k, const Objective& objective, const Converge& options,
                         double* coefficients, double* history, int threads) {
    const int64_t entries = converge_entries(options);
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
        const int64_t end = std::min(job.first_item + together, items);
        run_items(threads, job.first_item, end, AWD_VARIANT(converge_item), job, numbers);
        add_histories(job.histories, end - job.first_item, entries, entries, history);
        add_lengths(job.lengths, end - job.first_item, used);
    }
    return close_ways(used, entries / WAYS, objective.total, history);
}

}  // namespace awd
