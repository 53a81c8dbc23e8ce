// What the Python face gives the operators, as their types: shared by the CPU's and the GPU's bindings.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

namespace awd::bindings {

namespace py = pybind11;

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

inline awd::Dtype dtype_of(int code) {
    if (code < 0 || code > 3) throw std::invalid_argument("dtype code " + std::to_string(code) + " is not 0 to 3");
    return awd::Dtype(code);
}

inline awd::Matrix matrix_of(int64_t rows, int64_t columns, bool by_column) {
    if (rows < 0 || columns < 0) throw std::invalid_argument("the matrix has a negative size");
    return {rows, columns, by_column};
}

inline awd::Objective objective_of(const std::string& similarity, const std::string& penalty, double alpha, double eps,
                                   int64_t total) {
    awd::Objective objective{awd::Similarity::absolute, awd::Penalty::none, alpha, eps,
                             total > 1 ? double(total) : 1.0};
    if (similarity == "squared") {
        objective.similarity = awd::Similarity::squared;
    } else if (similarity != "absolute") {
        throw std::invalid_argument("similarity is " + similarity);
    }
    if (penalty == "l2") {
        objective.penalty = awd::Penalty::l2;
    } else if (penalty == "squared_l2") {
        objective.penalty = awd::Penalty::squared_l2;
    } else if (penalty != "none") {
        throw std::invalid_argument("penalty is " + penalty + ", which is not Euclidean");
    }
    return objective;
}

inline awd::Elementwise elementwise_of(const py::dict& options) {
    return {options["adam"].cast<bool>(),     options["lr"].cast<double>(),  options["momentum"].cast<double>(),
            options["beta2"].cast<double>(),  options["eps"].cast<double>(), options["weight_decay"].cast<double>(),
            options["nesterov"].cast<bool>(), options["l1"].cast<double>()};
}

inline void check_tasks(int64_t k) {
    if (k < 1 || k > 32768) throw std::invalid_argument("K is " + std::to_string(k) + "; expected 1 to 32768");
}

// The addresses of one parameter's tensors, and the view of them that the operators take.
struct Addresses {
    std::vector<const void*> models;
    awd::Tensors tensors;

    Addresses(int dtype, uintptr_t base, const std::vector<uintptr_t>& addresses) {
        check_tasks(int64_t(addresses.size()));
        for (uintptr_t address : addresses) models.push_back(pointer<const void>(address));
        tensors = {dtype_of(dtype), pointer<const void>(base), models.data(), int(models.size())};
    }
    Addresses(const Addresses&) = delete;
    Addresses(Addresses&&) = default;  // the view points into memory that moves along
};

// The options of optimisers, as classes of this module alone.
inline void bind_options(py::module_& module) {
    using namespace pybind11::literals;
    py::class_<awd::Sgd>(module, "Sgd", "Options of SGD.", py::module_local())
        .def(py::init<double, double, double, bool, int64_t>(), "lr"_a, "momentum"_a, "weight_decay"_a, "nesterov"_a,
             "iterations"_a);
    py::class_<awd::Converge>(module, "Converge", "Options of Converge.", py::module_local())
        .def(py::init<double, int64_t>(), "tolerance"_a, "max_iterations"_a);
}

}  // namespace awd::bindings
