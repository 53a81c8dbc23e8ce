// The Python face of the operators that leave elements out; awd_fast/ops/sparse_native.py is its caller.

#include "arguments.h"

namespace awd::bindings {
namespace {

struct DropOptions {
    uintptr_t thresholds, limits, chances;
    int64_t columns;
    uint64_t seed;
    int64_t offset;

    awd::Drop drop() const {
        if ((thresholds == 0) != (limits == 0)) throw std::invalid_argument("thresholds without limits");
        if (chances != 0 && columns < 1) throw std::invalid_argument("chances of no columns");
        return {pointer<const double>(thresholds),
                pointer<const int64_t>(limits),
                pointer<const int32_t>(chances),
                columns,
                seed,
                offset};
    }
};

struct VoteOptions {
    std::string election;
    bool normalize;
    double divisor, scale;

    awd::Vote vote() const {
        if (election != "none" && election != "sum" && election != "count") {
            throw std::invalid_argument("election is " + election);
        }
        const awd::Election elected = election == "none"  ? awd::Election::none
                                      : election == "sum" ? awd::Election::sum
                                                          : awd::Election::count;
        return {elected, normalize, divisor, scale};
    }
};

void trim(int dtype, const std::vector<uintptr_t>& bases, const std::vector<std::vector<uintptr_t>>& models,
          const std::vector<int64_t>& sizes, uintptr_t ranks, uintptr_t thresholds, uintptr_t limits, int threads) {
    if (models.empty() || bases.size() != models.size() || sizes.size() != models.size()) {
        throw std::invalid_argument("bases, models and sizes are not one per parameter");
    }
    std::vector<Addresses> held;
    std::vector<awd::Tensors> parameters;
    held.reserve(models.size());
    for (size_t index = 0; index < models.size(); ++index) {
        if (models[index].size() != models[0].size()) throw std::invalid_argument("parameters differ in K");
        if (sizes[index] < 0) throw std::invalid_argument("a size is negative");
        held.emplace_back(dtype, bases[index], models[index]);
        parameters.push_back(held.back().tensors);
    }
    py::gil_scoped_release unlocked;
    awd::trim(parameters.data(), sizes.data(), int64_t(sizes.size()), pointer<const int64_t>(ranks),
              pointer<double>(thresholds), pointer<int64_t>(limits), threads);
}

void sparse_merge(int dtype, uintptr_t base, const std::vector<uintptr_t>& models, int64_t size,
                  const DropOptions& drop, const std::vector<double>& factors, const std::vector<double>& weights,
                  const VoteOptions& vote, int out_dtype, uintptr_t out, int threads) {
    const Addresses in(dtype, base, models);
    if (size < 0) throw std::invalid_argument("the size is negative");
    if (factors.size() != models.size() || weights.size() != models.size()) {
        throw std::invalid_argument("factors or weights are not one per model");
    }
    const awd::Dtype rounded = dtype_of(out_dtype);
    const awd::Drop left_out = drop.drop();
    const awd::Vote voted = vote.vote();
    py::gil_scoped_release unlocked;
    awd::sparse_merge(in.tensors, size, left_out, factors.data(), weights.data(), voted, rounded, pointer<void>(out),
                      threads);
}

void sparse_norms(int dtype, uintptr_t base, const std::vector<uintptr_t>& models, int64_t size,
                  const DropOptions& drop, uintptr_t out, int threads) {
    const Addresses in(dtype, base, models);
    if (size < 0) throw std::invalid_argument("the size is negative");
    const awd::Drop left_out = drop.drop();
    py::gil_scoped_release unlocked;
    awd::sparse_norms(in.tensors, size, left_out, pointer<double>(out), threads);
}

}  // namespace

void bind_sparse(py::module_& module) {
    using namespace pybind11::literals;
    py::class_<DropOptions>(module, "Drop", "Which elements are left out.", py::module_local())
        .def(py::init<uintptr_t, uintptr_t, uintptr_t, int64_t, uint64_t, int64_t>(), "thresholds"_a, "limits"_a,
             "chances"_a, "columns"_a, "seed"_a, "offset"_a);
    py::class_<VoteOptions>(module, "Vote", "How signs are elected.", py::module_local())
        .def(py::init<std::string, bool, double, double>(), "election"_a, "normalize"_a, "divisor"_a, "scale"_a);
    module.def("trim", &trim, "dtype"_a, "bases"_a, "models"_a, "sizes"_a, "ranks"_a, "thresholds"_a, "limits"_a,
               "threads"_a, "The cuts behind the largest elements of task vectors.");
    module.def("sparse_norms", &sparse_norms, "dtype"_a, "base"_a, "models"_a, "size"_a, "drop"_a, "out"_a, "threads"_a,
               "l1 norms of task vectors and of what is kept of them.");
    module.def("sparse_merge", &sparse_merge, "dtype"_a, "base"_a, "models"_a, "size"_a, "drop"_a, "factors"_a,
               "weights"_a, "vote"_a, "out_dtype"_a, "out"_a, "threads"_a,
               "base + scale * the elected sums of what is kept of the task vectors.");
}

}  // namespace awd::bindings
