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
constexpr int64_t ACROSS = 256;               // columns that are worked on together: longer runs of memory than gram's
constexpr int BESIDE = 4;                     // models whose sums stay in registers
constexpr int64_t PARTIAL_NUMBERS = 1 << 25;  // of partial sums at most; longer segments where they would be more

struct MultiDotJob {
    Tensors in;
    Matrix shape;
    const void* gradient;
    Dtype gradient_dtype;
    int64_t segment;         // elements of a group per unit of work
    int64_t segments;        // units per group
    int64_t units_per_item;  // row groups only
    double* partial;         // [R, segments, K]
};

}  // namespace
}  // namespace awd

#define AWD_KERNEL "multi_dot_kernel.h"
#include "foreach_isa.h"

namespace awd {

void multi_dot(const Tensors& in, const Matrix& shape, const void* gradient, Dtype gradient_dtype, double* out,
               int threads) {
    const int64_t groups = shape.groups(), size = shape.size(), sums = std::max<int64_t>(groups * in.k, 1);
    MultiDotJob job{in, shape, gradient, gradient_dtype, shape.by_column ? SEGMENT_ROWS : SEGMENT, 1, 1, out};
    const int64_t most = std::max<int64_t>(PARTIAL_NUMBERS / sums, 1);
    if (size > job.segment * most) job.segment = (size + most - 1) / most;
    job.segments = size > job.segment ? (size + job.segment - 1) / job.segment : 1;
    int64_t items, numbers;
    if (shape.by_column) {
        items = (groups + ACROSS - 1) / ACROSS * job.segments;
        numbers = base::column_room(in.k);
    } else {
        job.units_per_item = size < ITEM ? ITEM / std::max<int64_t>(size, 1) : 1;
        items = (groups * job.segments + job.units_per_item - 1) / job.units_per_item;
        numbers = base::row_numbers(in.k);
    }
    const Scratch partial(job.segments > 1 ? groups * job.segments * in.k : 0);
    if (job.segments > 1) job.partial = partial.data();
    run_items(threads, 0, items, AWD_VARIANT(multi_dot_item), job, numbers);
    if (job.segments == 1) return;
    for (int64_t group = 0; group < groups; ++group) {
        for (int j = 0; j < in.k; ++j) {
            double sum = 0.0;
            for (int64_t segment = 0; segment < job.segments; ++segment) {
                sum += job.partial[(group * job.segments + segment) * in.k + j];
            }
            out[group * in.k + j] = sum;
        }
    }
}

}  // namespace awd
