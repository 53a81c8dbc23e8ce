// Whether the CUDA operators can run here.

#include <cuda_runtime.h>

#include <stdexcept>

#include "../cuda_kernels.h"

namespace awd::cuda {
namespace {

__global__ void probe() {}

}  // namespace

std::string why_not() {
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess) return std::string("CUDA: ") + cudaGetErrorString(error);
    return count == 0 ? "CUDA sees no device" : "";
}

void choose_device(int device) {
    const cudaError_t error = cudaSetDevice(device);
    if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

std::string why_not_on(int device) {
    cudaFuncAttributes attributes;
    int before = 0;
    cudaError_t error = cudaGetDevice(&before);
    if (error == cudaSuccess) error = cudaSetDevice(device);
    if (error == cudaSuccess) {
        error = cudaFuncGetAttributes(&attributes, probe);
        cudaSetDevice(before);
    }
    cudaGetLastError();  // an error that was asked for must not meet the next launch
    return error == cudaSuccess ? "" : std::string("its binaries: ") + cudaGetErrorString(error);
}

}  // namespace awd::cuda
