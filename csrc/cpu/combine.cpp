#include <cmath>
#include <cstdint>
#include <cstring>

#include "../kernels.h"
#include "blocks.h"
#include "parallel.h"

namespace awd {
namespace {

constexpr int64_t STRETCH = 32768;  // elements per item of work

struct CombineJob {
    Tensors in;
    Matrix shape;
    const void* weights;
    Dtype out_dtype;
    void* out;
    bool streaming;
};

}  // namespace
}  // namespace awd

#define AWD_KERNEL "combine_kernel.h"
#include "foreach_isa.h"

namespace awd {

void combine(const Tensors& in, const Matrix& shape, const void* weights, Dtype out_dtype, void* out, int threads) {
    const int64_t size = shape.rows * shape.columns;
    const CombineJob job{in, shape, weights, out_dtype, out, size >= STREAMED};
    const int64_t items = (size + STRETCH - 1) / STRETCH;
    run_items(threads, 0, items, AWD_VARIANT(combine_item), job, (2 + TOGETHER) * CHUNK);
}

}  // namespace awd
