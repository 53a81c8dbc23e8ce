// The contract of the CUDA operators: those of kernels.h, for tensors on a GPU, and for many parameters in one launch.
#pragma once

#include <cstdint>
#include <string>

namespace awd::cuda {

// Why no GPU can be used here (no driver, no device), or "".
std::string why_not();

// Why this GPU cannot run the binaries that were built, or "".
std::string why_not_on(int device);

}  // namespace awd::cuda
