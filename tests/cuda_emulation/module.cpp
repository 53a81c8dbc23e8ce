// The CUDA operators run thread by thread on the CPU, as a Python module: tests/test_cuda.py.

#include "../../csrc/arguments.h"
#include "../../csrc/cuda_kernels.h"

namespace awd::cuda {
void choose_device(int) {}
}  // namespace awd::cuda

namespace awd::bindings {
void bind_cuda(pybind11::module_& module);
}

PYBIND11_MODULE(_emulated, module) {
    awd::bindings::bind_options(module);
    awd::bindings::bind_cuda(module);
}
