// Whether the CUDA operators can run here.

#include <cuda_runtime.h>

#include <stdexcept>

#include "../cuda_kernels.h"

namespace awd::cuda {
namespace {

// A driver that knows more than 4 KB of arguments.
constexpr int OLDEST_DRIVER = 12010;

__global__ void probe() {}

}  // namespace

std::string why_not() {
    int count = 0, version = 0;
    cudaError_t error = cudaGetDeviceCount(&count);
    if (error == cudaSuccess) error = cudaDriverGetVersion(&version);
    if (error != cudaSuccess) return std::string("CUDA: ") + cudaGetErrorString(error);
    if (version < OLDEST_DRIVER) return "the driver is that of CUDA 12.0 or older; the kernels' arguments need 12.1";
    return count == 0 ? "CUDA sees no device" : "";
}

void choose_device(int device) {
    const cudaError_t error = cudaSetDevice(device);
    if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

// The caller has made the device the present one in PyTorch, and restores what was before.
std::string why_not_on(int device) {
    cudaFuncAttributes attributes;
    cudaError_t error = cudaSetDevice(device);
    if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, probe);
    cudaGetLastError();  // an error that was asked for must not meet the next launch
    return error == cudaSuccess ? "" : std::string("its binaries: ") + cudaGetErrorString(error);
}

}  // namespace awd::cuda
