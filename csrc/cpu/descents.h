// What the iterations of a descent work on, shared by the operators that run them.
#pragma once

#include <algorithm>

#include "../kernels.h"

namespace awd {

constexpr int64_t HISTORY_NUMBERS = 1 << 22;  // held for items whose histories are not yet added, or somewhat more
constexpr int64_t HISTORY_ITEMS = 64;         // at least this many items run between two additions
constexpr int64_t MAX_LANES = 8;

// Numbers of room for K tasks in a lane: the matrices and vectors of Descent and of Problem.
constexpr int64_t sgd_numbers(int64_t k) { return 2 * k * k + 8 * k; }
constexpr int64_t converge_numbers(int64_t k) { return 7 * k * k + 17 * k; }

struct SgdJob {
    const double* gram;
    int64_t groups;
    int k;
    Objective objective;
    Sgd options;
    double* coefficients;
    double* states;      // [items, groups of an item, 2 K]: coordinates and velocities between stretches, or null
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
inline int64_t items_together(int64_t items, int64_t entries) {
    const int64_t fitting = HISTORY_NUMBERS / entries;
    return std::min(fitting > HISTORY_ITEMS ? fitting : HISTORY_ITEMS, items);
}

inline void add_histories(const double* parts, int64_t items, int64_t stride, int64_t entries, double* history) {
    for (int64_t item = 0; item < items; ++item) {
        for (int64_t index = 0; index < entries; ++index) history[index] += parts[item * stride + index];
    }
}

// used [WAYS] = the longest of the items' ways.
inline void add_lengths(const int64_t* lengths, int64_t items, int64_t* used) {
    for (int64_t index = 0; index < items * WAYS; ++index) {
        used[index % WAYS] = std::max(used[index % WAYS], lengths[index]);
    }
}

// The history of Converge's ways one after the other, without the room that they did not use. Its losses were of each
// group's own mean similarity; returns the number of entries.
inline int64_t close_ways(const int64_t* used, int64_t capacity, double total, double* history) {
    int64_t length = 0;
    for (int way = 0; way < WAYS; ++way) {
        for (int64_t index = 0; index < used[way]; ++index) history[length++] = history[way * capacity + index] / total;
    }
    return length;
}

}  // namespace awd
