#include <cmath>
#include <cstdint>
#include <cstring>

#include "../kernels.h"
#include "parallel.h"

namespace awd {
namespace {

constexpr int64_t STRETCH = 65536;  // elements per item of work
constexpr int64_t CHUNK = 1024;     // elements whose sums stay in the first-level cache
constexpr int TOGETHER = 4;         // models added in one pass over the sums

struct CombineJob {
    Tensors in;
    Matrix shape;
    const void* weights;
    Dtype out_dtype;
    void* out;
};

}  // namespace
}  // namespace awd

#define AWD_KERNEL "combine_kernel.h"
#include "foreach_isa.h"

namespace awd {

void combine(const Tensors& in, const Matrix& shape, const void* weights, Dtype out_dtype, void* out, int threads) {
    const CombineJob job{in, shape, weights, out_dtype, out};
    const int64_t items = (shape.rows * shape.columns + STRETCH - 1) / STRETCH;
    run_items(threads, 0, items, AWD_VARIANT(combine_item), job, (2 + TOGETHER) * CHUNK);
}

}  // namespace awd
