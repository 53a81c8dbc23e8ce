#include <cmath>
#include <cstdint>
#include <cstring>

#include "../kernels.h"
#include "parallel.h"

namespace awd {
namespace {

constexpr int64_t ITEM_GROUPS = 32;            // groups per item of work
constexpr int64_t HISTORY_NUMBERS = 1 << 22;   // held for items whose histories are not yet added
constexpr int64_t HISTORY_ITEMS = 64;          // at least this many items run between two additions
constexpr int64_t MAX_LANES = 8;

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

}  // namespace
}  // namespace awd

#define AWD_KERNEL "descend_kernel.h"
#include "foreach_isa.h"

namespace awd {

void descend_sgd(const double* gram, int64_t groups, int k, const Objective& objective, const Sgd& options,
                 double* coefficients, double* history, int threads) {
    const int64_t entries = options.iterations + 1;
    const int64_t items = (groups + ITEM_GROUPS - 1) / ITEM_GROUPS;
    int64_t together = HISTORY_NUMBERS / entries > HISTORY_ITEMS ? HISTORY_NUMBERS / entries : HISTORY_ITEMS;
    if (together > items) together = items;
    const Scratch histories(together * entries);
    SgdJob job{gram, groups, k, objective, options, coefficients, histories.data(), 0};
    const int64_t numbers = (int64_t(k) * k + 7 * k) * MAX_LANES;
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

}  // namespace awd
