#include <cmath>
#include <cstdint>
#include <cstring>

#include "../kernels.h"
#include "parallel.h"

namespace awd {
namespace {

constexpr int64_t SEGMENT = 65536;      // elements of a row group per partial sum
constexpr int64_t SEGMENT_ROWS = 1024;  // elements of a column group per partial sum
constexpr int64_t TILE_STEPS = 8;       // rows of a tile that are in the cache at a time
constexpr int64_t SUM_LANES = 8;
constexpr int64_t PARTIAL_NUMBERS = 1 << 25;  // of partial sums at most; longer segments where they would be more

// Everything here depends on the shape alone, never on the threads: it fixes the order of the sums.
struct GramJob {
    Tensors in;
    Matrix shape;
    int64_t segment;         // elements of a group per unit of work
    int64_t segments;        // units per group
    int64_t units_per_item;  // row groups only
    int64_t tile;            // columns that are worked on together
    int64_t chunk;           // elements per vector in the cache
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
    GramJob job{in, shape, SEGMENT, 1, 1, 0, 0, out};
    int64_t items, numbers;
    if (shape.by_column) {
        // Long stretches of every row, as long as the sums of so many groups stay in the second-level cache.
        job.tile = in.k <= 16 ? 256 : in.k <= 128 ? 64 : SUM_LANES;
        job.chunk = job.tile * TILE_STEPS;
        job.segment = SEGMENT_ROWS;
        numbers = job.tile * square + in.k * job.chunk + 2 * job.tile;
    } else {
        job.chunk = in.k <= 8 ? 256 : in.k <= 16 ? 128 : 64;
        numbers = SUM_LANES * square + (in.k + 2) * job.chunk;
    }
    const int64_t sums = groups * square > 0 ? groups * square : 1;
    const int64_t most = PARTIAL_NUMBERS / sums > 1 ? PARTIAL_NUMBERS / sums : 1;
    if (size > job.segment * most) job.segment = (size + most - 1) / most;
    job.segments = size > job.segment ? (size + job.segment - 1) / job.segment : 1;
    if (shape.by_column) {
        items = (groups + job.tile - 1) / job.tile * job.segments;
    } else {
        job.units_per_item = size < SEGMENT / 2 ? SEGMENT / 2 / (size > 0 ? size : 1) : 1;
        items = (groups * job.segments + job.units_per_item - 1) / job.units_per_item;
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
