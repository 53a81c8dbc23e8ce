// The Python face of the CUDA operators: addresses as integers, a list of them for each parameter. awd_fast/ops/cuda.py
// is its caller. Empty where the module is built without CUDA.

#if defined(AWD_WITH_CUDA)

#include <utility>

#include "arguments.h"
#include "cuda_kernels.h"

namespace awd::bindings {
namespace {

using Rows = std::vector<std::vector<int64_t>>;

// Where launches go: the GPU's number and the address of a stream of it.
using Place = std::pair<int, uintptr_t>;

// base, rows, columns, by_column, out, velocity, square, out_dtype, total; then the models
constexpr size_t HEAD = 9;

cuda::Batch batch_of(int dtype, int64_t k, const Rows& parameters, const Place& place) {
    if (k < 1 || k > cuda::MOST_TASKS) throw std::invalid_argument("K is " + std::to_string(k) + "; expected 1 to 128");
    cuda::Batch batch{dtype_of(dtype), int(k), {}, pointer<void>(place.second)};
    cuda::choose_device(place.first);
    for (const std::vector<int64_t>& row : parameters) {
        if (row.size() != HEAD && row.size() != HEAD + size_t(k)) {
            throw std::invalid_argument("a parameter has " + std::to_string(row.size()) + " numbers");
        }
        cuda::Parameter parameter{pointer<const void>(uintptr_t(row[0])),
                                  {},
                                  matrix_of(row[1], row[2], row[3] != 0),
                                  pointer<void>(uintptr_t(row[4])),
                                  pointer<void>(uintptr_t(row[5])),
                                  pointer<void>(uintptr_t(row[6])),
                                  dtype_of(int(row[7])),
                                  row[8]};
        for (size_t at = HEAD; at < row.size(); ++at) {
            parameter.models.push_back(pointer<const void>(uintptr_t(row[at])));
        }
        batch.parameters.push_back(parameter);
    }
    return batch;
}

// Work memory of so many doubles, from the caller.
double* work_of(const py::function& allocate, int64_t numbers) {
    return pointer<double>(allocate(numbers).cast<uintptr_t>());
}

void gram(int dtype, int64_t k, const Rows& parameters, const Place& place, const py::function& allocate,
          uintptr_t out) {
    const cuda::Batch batch = batch_of(dtype, k, parameters, place);
    double* work = work_of(allocate, cuda::gram_numbers(batch));
    py::gil_scoped_release unlocked;
    cuda::gram(batch, work, pointer<double>(out));
}

void combine(int dtype, int64_t k, const Rows& parameters, const Place& place, uintptr_t weights) {
    const cuda::Batch batch = batch_of(dtype, k, parameters, place);
    py::gil_scoped_release unlocked;
    cuda::combine(batch, pointer<const void>(weights));
}

void multi_dot(int dtype, int64_t k, const Rows& parameters, const Place& place, const py::function& allocate,
               uintptr_t out) {
    const cuda::Batch batch = batch_of(dtype, k, parameters, place);
    for (const cuda::Parameter& parameter : batch.parameters) {
        if ((parameter.out_dtype == Dtype::f64) != (batch.dtype == Dtype::f64)) {
            throw std::invalid_argument("only one of gradient and tensors is float64");
        }
    }
    double* work = work_of(allocate, cuda::multi_dot_numbers(batch));
    py::gil_scoped_release unlocked;
    cuda::multi_dot(batch, work, pointer<double>(out));
}

void descend_sgd(int64_t k, const Rows& parameters, const Place& place, const py::function& allocate, uintptr_t gram,
                 const std::string& similarity, const std::string& penalty, double alpha, double eps,
                 const awd::Sgd& options, uintptr_t coefficients, uintptr_t history) {
    const cuda::Batch batch = batch_of(int(Dtype::f64), k, parameters, place);
    const Objective objective = objective_of(similarity, penalty, alpha, eps, 1);
    if (options.iterations < 0) throw std::invalid_argument("a number of iterations is negative");
    double* work = work_of(allocate, cuda::descend_sgd_numbers(batch, options));
    py::gil_scoped_release unlocked;
    cuda::descend_sgd(batch, pointer<const double>(gram), objective, options, work, pointer<double>(coefficients),
                      pointer<double>(history));
}

void descend_converge(int64_t k, const Rows& parameters, const Place& place, const py::function& allocate,
                      uintptr_t gram, const std::string& similarity, const std::string& penalty, double alpha,
                      double eps, const awd::Converge& options, uintptr_t coefficients, uintptr_t history,
                      uintptr_t lengths) {
    const cuda::Batch batch = batch_of(int(Dtype::f64), k, parameters, place);
    const Objective objective = objective_of(similarity, penalty, alpha, eps, 1);
    if (options.max_iterations < 0) throw std::invalid_argument("a number of iterations is negative");
    double* work = work_of(allocate, cuda::descend_converge_numbers(batch, options));
    py::gil_scoped_release unlocked;
    cuda::descend_converge(batch, pointer<const double>(gram), objective, options, work, pointer<double>(coefficients),
                           pointer<double>(history), pointer<int64_t>(lengths));
}

void merge_rows(int dtype, int64_t k, const Rows& parameters, const Place& place, const py::function& allocate,
                const std::vector<double>& factors, const std::string& similarity, const std::string& penalty,
                double alpha, double eps, const awd::Sgd& options, uintptr_t gram, uintptr_t coefficients,
                uintptr_t history) {
    const cuda::Batch batch = batch_of(dtype, k, parameters, place);
    const Objective objective = objective_of(similarity, penalty, alpha, eps, 1);
    if (factors.size() != size_t(k)) throw std::invalid_argument("factors are not one per model");
    if (options.iterations < 0 || options.iterations > cuda::MOST_FUSED_ITERATIONS) {
        throw std::invalid_argument("the number of iterations is not 0 to 4096");
    }
    double* work = work_of(allocate, cuda::merge_rows_numbers(batch, options));
    py::gil_scoped_release unlocked;
    cuda::merge_rows(batch, factors.data(), objective, options, work, pointer<double>(gram),
                     pointer<double>(coefficients), pointer<double>(history));
}

void adam_rows(int dtype, int64_t k, const Rows& parameters, const Place& place, const py::function& allocate,
               const std::string& similarity, const std::string& penalty, double alpha, double eps,
               const py::dict& optimizer, int64_t iterations, uintptr_t history, uintptr_t gram, uintptr_t inner,
               uintptr_t square) {
    const cuda::Batch batch = batch_of(dtype, k, parameters, place);
    const Objective objective = objective_of(similarity, penalty, alpha, eps, 1);
    const Elementwise options = elementwise_of(optimizer);
    if (iterations < 0) throw std::invalid_argument("a count is negative");
    double* work = work_of(allocate, cuda::adam_rows_numbers(batch, iterations));
    py::gil_scoped_release unlocked;
    cuda::adam_rows(batch, objective, options, iterations, work, pointer<double>(history), pointer<double>(gram),
                    pointer<double>(inner), pointer<double>(square));
}

void adam_step(int dtype, int64_t k, const Rows& parameters, const Place& place, const py::function& allocate,
               const py::dict& optimizer, int64_t step, uintptr_t slope, uintptr_t moments) {
    const cuda::Batch batch = batch_of(dtype, k, parameters, place);
    const Elementwise options = elementwise_of(optimizer);
    if (step < 1) throw std::invalid_argument("a count is too small");
    double* work = work_of(allocate, cuda::adam_step_numbers(batch));
    py::gil_scoped_release unlocked;
    cuda::adam_step(batch, options, step, pointer<const double>(slope), work, pointer<double>(moments));
}

void adam_stream(int dtype, int64_t k, const Rows& parameters, const Place& place, const py::function& allocate,
                 const std::string& similarity, const std::string& penalty, double alpha, double eps,
                 const py::dict& optimizer, int64_t iterations, uintptr_t gram, uintptr_t slope, uintptr_t moments,
                 uintptr_t history) {
    const cuda::Batch batch = batch_of(dtype, k, parameters, place);
    const Objective objective = objective_of(similarity, penalty, alpha, eps, 1);
    const Elementwise options = elementwise_of(optimizer);
    if (iterations < 0) throw std::invalid_argument("a count is negative");
    double* work = work_of(allocate, cuda::adam_step_numbers(batch));
    py::gil_scoped_release unlocked;
    cuda::adam_stream(batch, objective, options, iterations, pointer<const double>(gram), work, pointer<double>(slope),
                      pointer<double>(moments), pointer<double>(history));
}

}  // namespace

void bind_cuda(py::module_& module) {
    using namespace pybind11::literals;
    module.attr("CUDA_MOST_TASKS") = cuda::MOST_TASKS;
    module.attr("CUDA_FUSED_TASKS") = cuda::FUSED_TASKS;
    module.attr("CUDA_MOST_FUSED_ITERATIONS") = cuda::MOST_FUSED_ITERATIONS;
    module.def("cuda_gram", &gram, "dtype"_a, "k"_a, "parameters"_a, "place"_a, "allocate"_a, "out"_a,
               "Gram matrices of the groups of all parameters, written to float64 [R, K, K] at `out`.");
    module.def("cuda_combine", &combine, "dtype"_a, "k"_a, "parameters"_a, "place"_a, "weights"_a,
               "base + sum_j w_j t_j of all parameters, with weights [R, K].");
    module.def("cuda_multi_dot", &multi_dot, "dtype"_a, "k"_a, "parameters"_a, "place"_a, "allocate"_a, "out"_a,
               "Inner products of gradients and task vectors of all parameters, written to float64 [R, K] at `out`.");
    module.def("cuda_descend_sgd", &descend_sgd, "k"_a, "parameters"_a, "place"_a, "allocate"_a, "gram"_a,
               "similarity"_a, "penalty"_a, "alpha"_a, "eps"_a, "options"_a, "coefficients"_a, "history"_a,
               "All iterations of SGD on the coefficients of d.");
    module.def("cuda_descend_converge", &descend_converge, "k"_a, "parameters"_a, "place"_a, "allocate"_a, "gram"_a,
               "similarity"_a, "penalty"_a, "alpha"_a, "eps"_a, "options"_a, "coefficients"_a, "history"_a, "lengths"_a,
               "Converge on the coefficients of d; the ways of its history lie apart.");
    module.def("cuda_merge_rows", &merge_rows, "dtype"_a, "k"_a, "parameters"_a, "place"_a, "allocate"_a, "factors"_a,
               "similarity"_a, "penalty"_a, "alpha"_a, "eps"_a, "options"_a, "gram"_a, "coefficients"_a, "history"_a,
               "Gram, all iterations of SGD and the combination, in one launch.");
    module.def("cuda_adam_rows", &adam_rows, "dtype"_a, "k"_a, "parameters"_a, "place"_a, "allocate"_a, "similarity"_a,
               "penalty"_a, "alpha"_a, "eps"_a, "optimizer"_a, "iterations"_a, "history"_a, "gram"_a, "inner"_a,
               "square"_a, "All iterations of Adam or SGD on the elements of d, for every group.");
    module.def("cuda_adam_step", &adam_step, "dtype"_a, "k"_a, "parameters"_a, "place"_a, "allocate"_a, "optimizer"_a,
               "step"_a, "slope"_a, "moments"_a,
               "One iteration of Adam or SGD on the elements of the group that all parameters make, in place.");
    module.def("cuda_adam_stream", &adam_stream, "dtype"_a, "k"_a, "parameters"_a, "place"_a, "allocate"_a,
               "similarity"_a, "penalty"_a, "alpha"_a, "eps"_a, "optimizer"_a, "iterations"_a, "gram"_a, "slope"_a,
               "moments"_a, "history"_a, "All iterations of the same, without waiting for any.");
}

}  // namespace awd::bindings

#endif
