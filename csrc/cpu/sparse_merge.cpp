#include <cmath>
#include <cstdint>
#include <cstring>

#include "../kernels.h"
#include "blocks.h"
#include "parallel.h"

namespace awd {
namespace {

struct SparseMergeJob {
    Tensors in;
    int64_t size, stretch;
    Drop drop;
    const double *factors, *weights;
    Vote vote;
    Dtype out_dtype;
    void* out;
    bool streaming;
};

}  // namespace
}  // namespace awd

#define AWD_KERNEL "sparse_merge_kernel.h"
#include "foreach_isa.h"

namespace awd {

void sparse_merge(const Tensors& in, int64_t size, const Drop& drop, const double* factors, const double* weights,
                  const Vote& vote, Dtype out_dtype, void* out, int threads) {
    const int64_t stretch = dropped_stretch(drop), items = (size + stretch - 1) / stretch;
    const SparseMergeJob job{in, size, stretch, drop, factors, weights, vote, out_dtype, out, size >= STREAMED};
    run_items(threads, 0, items, AWD_VARIANT(sparse_merge_item), job, base::sparse_merge_numbers(drop, in.k));
}

}  // namespace awd
