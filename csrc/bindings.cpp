// The Python face of the compiled module: pointers as integers, sizes, dtype codes. awd_fast/ops/native.py is its
// caller.

#include "arguments.h"

namespace awd::bindings {
void bind_sparse(pybind11::module_& module);  // sparse_bindings.cpp
}

// setup.py defines AWD_WITH_CUDA, the version of the toolkit, and AWD_CUDA_ARCHS; or AWD_WITHOUT_CUDA, why not.
#ifdef AWD_WITH_CUDA
#include "cuda_kernels.h"

namespace awd::bindings {
void bind_cuda(pybind11::module_& module);  // cuda_bindings.cpp
}
#elif !defined(AWD_WITHOUT_CUDA)
#define AWD_WITHOUT_CUDA "not asked for"
#endif

namespace py = pybind11;
using namespace awd::bindings;

namespace {

void gram(int dtype, uintptr_t base, const std::vector<uintptr_t>& models, int64_t rows, int64_t columns,
          bool by_column, uintptr_t out, int threads) {
    const Addresses in(dtype, base, models);
    const awd::Matrix shape = matrix_of(rows, columns, by_column);
    py::gil_scoped_release unlocked;
    awd::gram(in.tensors, shape, pointer<double>(out), threads);
}

void combine(int dtype, uintptr_t base, const std::vector<uintptr_t>& models, int64_t rows, int64_t columns,
             bool by_column, uintptr_t weights, int out_dtype, uintptr_t out, int threads) {
    const Addresses in(dtype, base, models);
    const awd::Matrix shape = matrix_of(rows, columns, by_column);
    const awd::Dtype rounded = dtype_of(out_dtype);
    py::gil_scoped_release unlocked;
    awd::combine(in.tensors, shape, pointer<const void>(weights), rounded, pointer<void>(out), threads);
}

void multi_dot(int dtype, uintptr_t base, const std::vector<uintptr_t>& models, int64_t rows, int64_t columns,
               bool by_column, uintptr_t gradient, int gradient_dtype, uintptr_t out, int threads) {
    const Addresses in(dtype, base, models);
    const awd::Matrix shape = matrix_of(rows, columns, by_column);
    const awd::Dtype stored = dtype_of(gradient_dtype);
    if ((stored == awd::Dtype::f64) != (in.tensors.dtype == awd::Dtype::f64)) {
        throw std::invalid_argument("only one of gradient and tensors is float64");
    }
    py::gil_scoped_release unlocked;
    awd::multi_dot(in.tensors, shape, pointer<const void>(gradient), stored, pointer<double>(out), threads);
}

void check_one(const awd::Sgd* sgd, const awd::Converge* converge) {
    if ((sgd == nullptr) == (converge == nullptr)) throw std::invalid_argument("expected either sgd or converge");
    if (sgd != nullptr ? sgd->iterations < 0 : converge->max_iterations < 0) {
        throw std::invalid_argument("a number of iterations is negative");
    }
}

int64_t descend(uintptr_t gram, int64_t groups, int64_t k, const std::string& similarity, const std::string& penalty,
                double alpha, double eps, int64_t total, const awd::Sgd* sgd, const awd::Converge* converge,
                uintptr_t coefficients, uintptr_t history, int threads) {
    check_tasks(k);
    if (groups < 0) throw std::invalid_argument("the number of groups is negative");
    check_one(sgd, converge);
    const awd::Objective objective = objective_of(similarity, penalty, alpha, eps, total);
    py::gil_scoped_release unlocked;
    if (converge != nullptr) {
        return awd::descend_converge(pointer<const double>(gram), groups, int(k), objective, *converge,
                                     pointer<double>(coefficients), pointer<double>(history), threads);
    }
    awd::descend_sgd(pointer<const double>(gram), groups, int(k), objective, *sgd, pointer<double>(coefficients),
                     pointer<double>(history), threads);
    return sgd->iterations + 1;
}

int64_t merge_rows(int dtype, uintptr_t base, const std::vector<uintptr_t>& models, int64_t rows, int64_t columns,
                   bool by_column, const std::vector<double>& factors, const std::string& similarity,
                   const std::string& penalty, double alpha, double eps, int64_t total, const awd::Sgd* sgd,
                   const awd::Converge* converge, int out_dtype, uintptr_t out, uintptr_t gram, uintptr_t coefficients,
                   uintptr_t history, int threads) {
    const Addresses in(dtype, base, models);
    const awd::Matrix shape = matrix_of(rows, columns, by_column);
    const awd::Dtype rounded = dtype_of(out_dtype);
    const awd::Objective objective = objective_of(similarity, penalty, alpha, eps, total);
    if (factors.size() != models.size()) throw std::invalid_argument("factors are not one per model");
    check_one(sgd, converge);
    py::gil_scoped_release unlocked;
    return awd::merge_rows(in.tensors, shape, factors.data(), objective, sgd, converge, rounded, pointer<void>(out),
                           pointer<double>(gram), pointer<double>(coefficients), pointer<double>(history), threads);
}

int64_t converge_history_size(int64_t max_iterations) {
    return awd::converge_entries(awd::Converge{0.0, max_iterations});
}

void adam_rows(int dtype, uintptr_t base, const std::vector<uintptr_t>& models, int64_t rows, int64_t columns,
               bool by_column, const std::string& similarity, const std::string& penalty, double alpha, double eps,
               int64_t total, const py::dict& optimizer, int64_t iterations, uintptr_t shift, uintptr_t history,
               uintptr_t gram, uintptr_t inner, uintptr_t square, int threads) {
    const Addresses in(dtype, base, models);
    const awd::Matrix shape = matrix_of(rows, columns, by_column);
    if (iterations < 0) throw std::invalid_argument("a count is negative");
    const awd::Objective objective = objective_of(similarity, penalty, alpha, eps, total);
    const awd::Elementwise options = elementwise_of(optimizer);
    py::gil_scoped_release unlocked;
    awd::adam_rows(in.tensors, shape, objective, options, iterations, pointer<void>(shift), pointer<double>(history),
                   pointer<double>(gram), pointer<double>(inner), pointer<double>(square), threads);
}

void adam_step(int dtype, uintptr_t base, const std::vector<uintptr_t>& models, int64_t size, const py::dict& optimizer,
               int64_t step, uintptr_t slope, uintptr_t shift, uintptr_t velocity, uintptr_t square, uintptr_t moments,
               int threads) {
    const Addresses in(dtype, base, models);
    if (size < 0 || step < 1) throw std::invalid_argument("a count is too small");
    const awd::Elementwise options = elementwise_of(optimizer);
    py::gil_scoped_release unlocked;
    awd::adam_step(in.tensors, size, options, step, pointer<const double>(slope), pointer<void>(shift),
                   pointer<void>(velocity), pointer<void>(square), pointer<double>(moments), threads);
}

py::dict build_info() {
    py::dict info;
#ifdef __clang__
    info["compiler"] = "clang " __clang_version__;
#elif defined(__GNUC__)
    info["compiler"] = "gcc " __VERSION__;
#else
    info["compiler"] = "unknown";
#endif
#ifdef _OPENMP
    info["openmp"] = true;
#else
    info["openmp"] = false;
#endif
#ifdef AWD_WITH_CUDA
    info["cuda"] = AWD_WITH_CUDA;
    info["cuda_archs"] = py::str(AWD_CUDA_ARCHS).attr("split")(";");
#else
    info["cuda"] = "";
    info["cuda_archs"] = py::list();
#endif
    return info;
}

#ifdef AWD_WITH_CUDA
std::string cuda_why_not() { return awd::cuda::why_not(); }
std::string cuda_why_not_on(int device) { return awd::cuda::why_not_on(device); }
#else
std::string cuda_why_not() { return "built without CUDA (" AWD_WITHOUT_CUDA ")"; }
std::string cuda_why_not_on(int) { return cuda_why_not(); }
#endif

void triad(uintptr_t a, uintptr_t b, uintptr_t c, float scale, int64_t count, bool streaming, int threads) {
    if (count < 0) throw std::invalid_argument("count is negative");
    py::gil_scoped_release unlocked;
    awd::triad(pointer<const float>(b), pointer<const float>(c), scale, count, streaming, pointer<float>(a), threads);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    using namespace pybind11::literals;
    module.doc() = "The compiled CPU operators of awd_fast; called by awd_fast.ops.native.";
    module.def("gram", &gram, "dtype"_a, "base"_a, "models"_a, "rows"_a, "columns"_a, "by_column"_a, "out"_a,
               "threads"_a, "Gram matrices of the task vectors, written to float64 [R, K, K] at `out`.");
    module.def("combine", &combine, "dtype"_a, "base"_a, "models"_a, "rows"_a, "columns"_a, "by_column"_a, "weights"_a,
               "out_dtype"_a, "out"_a, "threads"_a, "base + sum_j w_j t_j, written to `out`.");
    module.def("multi_dot", &multi_dot, "dtype"_a, "base"_a, "models"_a, "rows"_a, "columns"_a, "by_column"_a,
               "gradient"_a, "gradient_dtype"_a, "out"_a, "threads"_a,
               "Inner products of a gradient and the task vectors, written to float64 [R, K] at `out`.");
    bind_options(module);
    module.def("descend", &descend, "gram"_a, "groups"_a, "k"_a, "similarity"_a, "penalty"_a, "alpha"_a, "eps"_a,
               "total"_a, "sgd"_a, "converge"_a, "coefficients"_a, "history"_a, "threads"_a,
               "All iterations on the coefficients of d; returns how many entries of the history are used.");
    module.def(
        "merge_rows", &merge_rows, "dtype"_a, "base"_a, "models"_a, "rows"_a, "columns"_a, "by_column"_a, "factors"_a,
        "similarity"_a, "penalty"_a, "alpha"_a, "eps"_a, "total"_a, "sgd"_a, "converge"_a, "out_dtype"_a, "out"_a,
        "gram"_a, "coefficients"_a, "history"_a, "threads"_a,
        "Gram, all iterations and the combination in one pass; returns how many entries of the history are used.");
    module.def("converge_history_size", &converge_history_size, "max_iterations"_a,
               "Entries to allocate for the history of Converge.");
    module.def("adam_rows", &adam_rows, "dtype"_a, "base"_a, "models"_a, "rows"_a, "columns"_a, "by_column"_a,
               "similarity"_a, "penalty"_a, "alpha"_a, "eps"_a, "total"_a, "optimizer"_a, "iterations"_a, "shift"_a,
               "history"_a, "gram"_a, "inner"_a, "square"_a, "threads"_a,
               "All iterations of Adam or SGD on the elements of d, for every group.");
    module.def("adam_step", &adam_step, "dtype"_a, "base"_a, "models"_a, "size"_a, "optimizer"_a, "step"_a, "slope"_a,
               "shift"_a, "velocity"_a, "square"_a, "moments"_a, "threads"_a,
               "One iteration of Adam or SGD on the elements of one group's d, in place.");
    bind_sparse(module);
    module.def("cpu_isa", &awd::cpu_isa, "The instruction set the operators run: base, avx2 or avx512.");
    module.def("choose_cpu_isa", &awd::choose_cpu_isa, "name"_a,
               "Run the operators on another instruction set; ValueError where this CPU lacks it.");
    module.def("build_info", &build_info, "How this module was built: compiler, openmp, cuda, cuda_archs.");
    module.def("cuda_why_not", &cuda_why_not, py::call_guard<py::gil_scoped_release>(),
               "Why the CUDA operators cannot run on this machine, or an empty string.");
    module.def("cuda_why_not_on", &cuda_why_not_on, "device"_a, py::call_guard<py::gil_scoped_release>(),
               "Why the CUDA operators cannot run on this GPU, or an empty string.");
#ifdef AWD_WITH_CUDA
    bind_cuda(module);
#endif
    module.def("triad", &triad, "a"_a, "b"_a, "c"_a, "scale"_a, "count"_a, "streaming"_a, "threads"_a,
               "a = b + scale * c in float32, the benchmarks' measure of the memory.");
}
