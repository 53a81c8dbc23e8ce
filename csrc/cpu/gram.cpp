#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../kernels.h"
#include "blocks.h"
#include "parallel.h"

namespace awd {
namespace {

constexpr int64_t ITEM = 12288;               // elements of row groups per item of work, or one group
constexpr int64_t PARTIAL_NUMBERS = 1 << 25;  // of partial sums at most; longer segments where they would be more

struct GramJob {
    Tensors in;
    Matrix shape;
    int64_t segment;         // elements of a group per unit of work
    int64_t segments;        // units per group
    int64_t units_per_item;  // row groups only
    double* partial;         // [R, segments, K, K]
};

}  // namespace
}  // namespace awd

#define AWD_KERNEL "gram_kernel.h"
#include "foreach_isa.h"

namespace awd {

void gram(const Tensors& in, const Matrix& shape, double* out, int threads) {
    const int64_t square = int64_t(in.k) * in.k;
    const int64_t groups = shape.groups(), size = shape.size();
    GramJob job{in, shape, shape.by_column ? SEGMENT_ROWS : SEGMENT, 1, 1, out};
    const int64_t sums = groups * square > 0 ? groups * square : 1;
    const int64_t most = PARTIAL_NUMBERS / sums > 1 ? PARTIAL_NUMBERS / sums : 1;
    if (size > job.segment * most) job.segment = (size + most - 1) / most;
    job.segments = size > job.segment ? (size + job.segment - 1) / job.segment : 1;
    int64_t items, numbers;
    if (shape.by_column) {
        items = (groups + COLUMN_TILE - 1) / COLUMN_TILE * job.segments;
        numbers = base::column_numbers(in.k, COLUMN_TILE);
    } else {
        job.units_per_item = size < ITEM ? ITEM / (size > 0 ? size : 1) : 1;
        items = (groups * job.segments + job.units_per_item - 1) / job.units_per_item;
        numbers = base::element_numbers(in.k);
    }
    const Scratch partial(job.segments > 1 ? groups * job.segments * square : 0);
    if (job.segments > 1) job.partial = partial.data();
    run_items(threads, 0, items, AWD_VARIANT(gram_item), job, numbers);
    if (job.segments == 1) return;
    for (int64_t group = 0; group < groups; ++group) {
        for (int64_t index = 0; index < square; ++index) {
            double sum = 0.0;
            for (int64_t segment = 0; segment < job.segments; ++segment) {
                sum += job.partial[(group * job.segments + segment) * square + index];
            }
            out[group * square + index] = sum;
        }
    }
}

}  // namespace awd
