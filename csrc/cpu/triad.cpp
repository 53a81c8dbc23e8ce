#include <cstdint>

#include "../kernels.h"
#include "isa.h"

namespace awd {
namespace {

struct TriadJob {
    const float *b, *c;
    float scale;
    float* a;
    bool streaming;
};

}  // namespace
}  // namespace awd

#define AWD_KERNEL "triad_kernel.h"
#include "foreach_isa.h"

namespace awd {

void triad(const float* b, const float* c, float scale, int64_t count, bool streaming, float* a, int threads) {
    const TriadJob job{b, c, scale, a, streaming};
    const auto part = AWD_VARIANT(triad_part);
    if (threads < 1) threads = 1;
    // Not run_items: like STREAM, every thread has one part of its own, so that nothing but memory is measured.
    const int64_t each = (count / threads + 63) / 64 * 64;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int thread = 0; thread < threads; ++thread) {
        const int64_t begin = thread * each < count ? thread * each : count;
        const int64_t end = thread + 1 < threads && begin + each < count ? begin + each : count;
        part(job, begin, end);
    }
}

}  // namespace awd
