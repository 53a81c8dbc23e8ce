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
constexpr int64_t HISTORY_NUMBERS = 1 << 22;  // held for items whose histories are not yet added
constexpr int64_t HISTORY_ITEMS = 64;         // at least this many items run between two additions
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
    double* histories;  // [items, iterations + 1]
    int64_t first_item;
};

constexpr int ANNEAL_STEPS = 300;
constexpr double ANNEAL_FROM = 0.3, ANNEAL_TO = 1e-4;  // step sizes, in units of the scaled vectors

struct ConvergeJob {
    const double* gram;
    int64_t groups;
    int k;
    Objective objective;
    Converge options;
    const double* sizes;  // [ANNEAL_STEPS]
    double* coefficients;
    double* histories;  // [items, 2 recorded steps + 2]
    int64_t* lengths;   // [items, 2]
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

void descend_sgd(const double* gram, int64_t groups, int k, const Objective& objective, const Sgd& options,
                 double* coefficients, double* history, int threads) {
    const int64_t entries = options.iterations + 1;
    const int64_t items = (groups + ITEM_GROUPS - 1) / ITEM_GROUPS;
    const int64_t together = items_together(items, entries);
    const Scratch histories(together * entries);
    SgdJob job{gram, groups, k, objective, options, coefficients, histories.data(), 0};
    const int64_t numbers = sgd_numbers(k) * MAX_LANES;
    for (int64_t index = 0; index < entries; ++index) history[index] = 0.0;
    for (; job.first_item < items; job.first_item += together) {
        const int64_t end = job.first_item + together < items ? job.first_item + together : items;
        run_items(threads, job.first_item, end, AWD_VARIANT(sgd_item), job, numbers);
        for (int64_t item = job.first_item; item < end; ++item) {
            const double* part = job.histories + (item - job.first_item) * entries;
            for (int64_t index = 0; index < entries; ++index) history[index] += part[index];
        }
    }
}

// The item with the longest way says how many entries of it are used; the others hold their last loss in the rest.
int64_t descend_converge(const double* gram, int64_t groups, int k, const Objective& objective, const Converge& options,
                         double* coefficients, double* history, int threads) {
    const int64_t steps = recorded_steps(options), entries = 2 * steps + 2;
    const int64_t items = (groups + ITEM_GROUPS - 1) / ITEM_GROUPS;
    const int64_t together = items_together(items, entries);
    const Scratch histories(together * entries);
    std::vector<int64_t> lengths(size_t(2 * together));
    double sizes[ANNEAL_STEPS];
    for (int index = 0; index < ANNEAL_STEPS; ++index) {
        sizes[index] = ANNEAL_FROM * std::pow(ANNEAL_TO / ANNEAL_FROM, double(index) / (ANNEAL_STEPS - 1));
    }
    ConvergeJob job{gram, groups, k, objective, options, sizes, coefficients, histories.data(), lengths.data(), 0};
    const int64_t numbers = converge_numbers(k) * MAX_LANES;
    int64_t newton = 0, polish = 0;
    for (int64_t index = 0; index < entries; ++index) history[index] = 0.0;
    for (; job.first_item < items; job.first_item += together) {
        const int64_t end = job.first_item + together < items ? job.first_item + together : items;
        run_items(threads, job.first_item, end, AWD_VARIANT(converge_item), job, numbers);
        for (int64_t item = 0; item < end - job.first_item; ++item) {
            for (int64_t index = 0; index < entries; ++index)
                history[index] += histories.data()[item * entries + index];
            newton = std::max(newton, lengths[size_t(2 * item)]);
            polish = std::max(polish, lengths[size_t(2 * item + 1)]);
        }
    }
    // Losses were of each group's own mean similarity; then the unused room of the first way is closed.
    for (int64_t index = 0; index < entries; ++index) history[index] /= objective.total;
    std::copy(history + steps + 1, history + steps + 2 + polish, history + newton + 1);
    return newton + polish + 2;
}

}  // namespace awd
