#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "../kernels.h"
#include "parallel.h"

namespace awd {
namespace {

constexpr int64_t SEGMENT = 65536;            // elements of a streaming item, a multiple of every chunk
constexpr int64_t CHUNK_NUMBERS = 2048;       // of task vectors in the first-level cache
constexpr int64_t MOST_GROUPS = 8;            // groups whose K x K work is done side by side
constexpr int64_t MOST_SUM_LANES = 16;        // two of the widest vectors
constexpr int64_t BATCH_BYTES = 896 << 10;    // batches shrink to this, if they can
constexpr int64_t FEW_ITEMS = 16;             // items at least, where there are that many groups
constexpr int64_t HISTORY_NUMBERS = 1 << 22;  // of the items' histories at most, or FEW_ITEMS of them
constexpr int64_t CORRECTIONS = 1 << 16;      // iterations whose corrections are kept

// What Adam's bias corrections make of the step size and of the mean square at an iteration; SGD ignores them.
struct Correction {
    double step, unbias;

    static Correction of(const Elementwise& options, int64_t iteration) {
        return {options.lr / (1.0 - std::pow(options.momentum, double(iteration))),
                1.0 / (1.0 - std::pow(options.beta2, double(iteration)))};
    }
};

class Corrections {
  public:
    Corrections(const Elementwise& options, int64_t iterations) : options_(options) {
        if (!options.adam) return;
        for (int64_t index = 1; index <= std::min(iterations, CORRECTIONS); ++index) {
            kept_.push_back(Correction::of(options, index));
        }
    }
    // iteration: from 1 on.
    Correction at(int64_t iteration) const {
        if (!options_.adam) return {};
        return iteration <= CORRECTIONS ? kept_[size_t(iteration - 1)] : Correction::of(options_, iteration);
    }

  private:
    Elementwise options_;
    std::vector<Correction> kept_;
};

struct StepJob {
    Tensors in;
    int64_t size;
    Elementwise options;
    Correction correction;
    const double* slope;  // [K + 1]: r, and the multiple of d
    void *shift, *velocity, *square;
    int64_t chunk;
    double* partial;  // [items, K + 2]
};

// Everything here depends on the problem alone, never on the threads: it fixes the order of the sums.
struct RowsJob {
    Tensors in;
    Matrix shape;
    Objective objective;
    Elementwise options;
    int64_t iterations;
    const Corrections* corrections;
    void* shift;
    double *gram, *inner, *square;
    int64_t padded;       // elements of a group, rounded up to whole vectors
    int64_t chunk;        // elements in the first-level cache
    int64_t batch;        // groups whose iterations run side by side
    int64_t item_groups;  // groups of an item, one batch after the other
    double* histories;    // [items, iterations + 1]
};

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// A power of two, at least two of the widest vectors.
int64_t chunk_of(int k) {
    int64_t chunk = 512;
    while (chunk > MOST_SUM_LANES && chunk * k > CHUNK_NUMBERS) chunk /= 2;
    return chunk;
}

}  // namespace
}  // namespace awd

#define AWD_KERNEL "adam_kernel.h"
#include "foreach_isa.h"

namespace awd {

void adam_step(const Tensors& in, int64_t size, const Elementwise& options, int64_t step, const double* slope,
               void* shift, void* velocity, void* square, double* moments, int threads) {
    const int64_t entries = in.k + 2, items = (size + SEGMENT - 1) / SEGMENT;
    const Scratch partial(items * entries);
    const Correction correction = Correction::of(options, step);
    const StepJob job{in, size, options, correction, slope, shift, velocity, square, chunk_of(in.k), partial.data()};
    const int64_t numbers = entries * MOST_SUM_LANES + round_up(in.k, MOST_SUM_LANES) + (3 + in.k) * job.chunk;
    run_items(threads, 0, items, AWD_VARIANT(step_item), job, numbers);
    for (int64_t index = 0; index < entries; ++index) {
        moments[index] = 0.0;
        for (int64_t item = 0; item < items; ++item) moments[index] += partial.data()[item * entries + index];
    }
}

void adam_rows(const Tensors& in, const Matrix& shape, const Objective& objective, const Elementwise& options,
               int64_t iterations, void* shift, double* history, double* gram, double* inner, double* square,
               int threads) {
    const int64_t k = in.k, groups = shape.groups(), entries = iterations + 1;
    const Corrections corrections(options, iterations);
    RowsJob job{in,     shape, objective, options, iterations, &corrections, shift, gram, inner,
                square, 0,     0,         0,       0,          nullptr};
    job.padded = round_up(shape.size(), MOST_SUM_LANES);
    job.chunk = chunk_of(in.k);
    // Few groups are spread over items, and a batch that would not fit the second-level cache is made smaller.
    const int64_t bytes = job.padded * (k + 3) * (in.dtype == Dtype::f64 ? 8 : 4);  // of a group
    job.batch = std::max<int64_t>(1, std::min(MOST_GROUPS, groups / FEW_ITEMS));
    while (job.batch > 1 && job.batch * bytes > BATCH_BYTES) job.batch /= 2;
    const int64_t most_items = std::max(FEW_ITEMS, HISTORY_NUMBERS / entries);
    const int64_t batches = (groups + job.batch - 1) / job.batch;
    job.item_groups = job.batch * std::max<int64_t>(1, (batches + most_items - 1) / most_items);
    const int64_t items = (groups + job.item_groups - 1) / job.item_groups;
    const Scratch histories(items * entries);
    job.histories = histories.data();
    const int64_t numbers = (k + 2) * MOST_SUM_LANES + 3 * MOST_GROUPS + MOST_GROUPS * (k * k + 7 * k) +
                            job.batch * job.padded * (3 + k) + 3 * job.chunk + k;
    run_items(threads, 0, items, AWD_VARIANT(rows_item), job, numbers);
    for (int64_t index = 0; index < entries; ++index) {
        history[index] = 0.0;
        for (int64_t item = 0; item < items; ++item) history[index] += job.histories[item * entries + index];
    }
}

}  // namespace awd
