#include <cmath>
#include <cstdint>
#include <cstring>

#include "../kernels.h"
#include "blocks.h"
#include "parallel.h"

namespace awd {
namespace {

struct SparseNormsJob {
    Tensors in;
    int64_t size, stretch;
    Drop drop;
    double* partial;  // [items, K, 2]
};

}  // namespace
}  // namespace awd

#define AWD_KERNEL "sparse_norms_kernel.h"
#include "foreach_isa.h"

namespace awd {

void sparse_norms(const Tensors& in, int64_t size, const Drop& drop, double* out, int threads) {
    const int64_t stretch = dropped_stretch(drop), items = (size + stretch - 1) / stretch, sums = 2 * int64_t(in.k);
    const Scratch partial(items * sums);
    const SparseNormsJob job{in, size, stretch, drop, partial.data()};
    run_items(threads, 0, items, AWD_VARIANT(sparse_norms_item), job, base::sparse_norms_numbers(drop, in.k));
    for (int64_t index = 0; index < sums; ++index) {
        out[index] = 0.0;
        for (int64_t item = 0; item < items; ++item) out[index] += partial.data()[item * sums + index];
    }
}

}  // namespace awd
