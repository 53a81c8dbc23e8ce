// The annealed descents of Converge: ALWAYS, WHERE_POSITIVE and WHERE_UNEQUAL of awd_fast/converge.py, in their order.
#pragma once

#include <cmath>

namespace awd {

// Which groups make a descent: all; those whose loss is above the tolerance; of these, those of unequal norms.
enum class Needed { always, where_positive, where_unequal };

// Step sizes from `first` to `last`, times (squared norm of the shortest vector)^power.
struct Schedule {
    double first, last, momentum, power;
    Needed needed;
};

constexpr int ANNEAL_STEPS = 300;
constexpr int DESCENTS = 4;

#if defined(__CUDACC__)
__host__ __device__
#endif
    constexpr Schedule schedule_of(int way) {
    return way == 0   ? Schedule{0.3, 1e-4, 0.9, 0.0, Needed::always}
           : way == 1 ? Schedule{3.0, 1e-3, 0.0, 0.0, Needed::where_positive}
           : way == 2 ? Schedule{0.3, 1e-4, 0.9, 0.5, Needed::where_unequal}
                      : Schedule{0.3, 1e-4, 0.9, 1.0, Needed::where_unequal};
}

// The step sizes of every schedule, before the power. Filled by the caller of the kernels, once.
struct StepSizes {
    double of[DESCENTS][ANNEAL_STEPS];

    StepSizes() {
        for (int way = 0; way < DESCENTS; ++way) {
            const Schedule schedule = schedule_of(way);
            for (int index = 0; index < ANNEAL_STEPS; ++index) {
                const double passed = double(index) / (ANNEAL_STEPS - 1);
                of[way][index] = schedule.first * std::pow(schedule.last / schedule.first, passed);
            }
        }
    }
};

}  // namespace awd
