// The contract of the CUDA operators: those of kernels.h, for tensors on a GPU, for many parameters in one launch.
//
// Every pointer is to memory of the GPU that the stream belongs to, which is the present one. Launches go to the
// caller's stream; nothing is allocated and the host waits for nothing, so that calls can be captured in a CUDA graph.
// Work memory is the caller's: the functions that end in _numbers say how many doubles of it. Results are bitwise the
// same from run to run. What cannot be launched throws std::runtime_error.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernels.h"

namespace awd::cuda {

constexpr int MOST_TASKS = 128;  // K of any operator
constexpr int FUSED_TASKS = 8;   // K of merge_rows

// One tensor of a model with its K models, or some of its groups. Groups of all parameters are counted through: results
// by group, such as G, lie one parameter after the other.
struct Parameter {
    const void* base;                 // null where the models are task vectors already
    std::vector<const void*> models;  // K
    Matrix shape;
    void *out, *velocity, *square;  // what an operator writes, in the parameter's layout
    Dtype out_dtype;
    int64_t total;  // number of groups of the whole tensor; below 1 counts as 1
};

struct Batch {
    Dtype dtype;
    int k;
    std::vector<Parameter> parameters;
    void* stream;  // cudaStream_t
};

// Why no GPU can be used here (no driver, no device), or "".
std::string why_not();

// Why this GPU cannot run the binaries that were built, or "".
std::string why_not_on(int device);

// Makes the GPU the present one for this module, whose CUDA runtime is its own.
void choose_device(int device);

// out [R, K, K].
void gram(const Batch& batch, double* work, double* out);
int64_t gram_numbers(const Batch& batch);

// weights: [R, K], float (double for float64 storage), for column groups too.
void combine(const Batch& batch, const void* weights);

// out [R, K]. out of a parameter: the gradient, of dtype out_dtype, which is only read.
void multi_dot(const Batch& batch, double* work, double* out);
int64_t multi_dot_numbers(const Batch& batch);

// coefficients [R, K], history [parameters, entries]: a loss for each parameter, with the mean over its own groups (all
// `total` of them). Of the parameters only the shapes and totals are read. entries: iterations + 1.
void descend_sgd(const Batch& batch, const double* gram, const Objective& objective, const Sgd& options, double* work,
                 double* coefficients, double* history);
int64_t descend_sgd_numbers(const Batch& batch, const Sgd& options);

// The same by Converge. history [parameters, WAYS, recorded_steps + 1]: the ways apart, each held at its last loss;
// lengths [parameters, WAYS]: how many entries of each are used.
void descend_converge(const Batch& batch, const double* gram, const Objective& objective, const Converge& options,
                      double* work, double* coefficients, double* history, int64_t* lengths);
int64_t descend_converge_numbers(const Batch& batch, const Converge& options);

// gram, descend_sgd and combine in one launch, for K of at most FUSED_TASKS and at most MOST_FUSED_ITERATIONS. factors
// [K] on the host.
constexpr int64_t MOST_FUSED_ITERATIONS = 4096;
void merge_rows(const Batch& batch, const double* factors, const Objective& objective, const Sgd& options, double* work,
                double* gram, double* coefficients, double* history);
int64_t merge_rows_numbers(const Batch& batch, const Sgd& options);

// All iterations on the elements of row or column groups; gradients are computed in double. out: d, as float (double
// for float64 storage). inner [R, K], square [R]; history [parameters, iterations + 1].
void adam_rows(const Batch& batch, const Objective& objective, const Elementwise& options, int64_t iterations,
               double* work, double* history, double* gram, double* inner, double* square);
int64_t adam_rows_numbers(const Batch& batch, int64_t iterations);

// Iteration `step` of one group that all parameters make. out, velocity, square of a parameter: d and the optimiser's
// state, changed in place. slope [K + 1] on the GPU. moments [parameters, K + 2].
void adam_step(const Batch& batch, const Elementwise& options, int64_t step, const double* slope, double* work,
               double* moments);
int64_t adam_step_numbers(const Batch& batch);

// All iterations of one group from d and a state of zeros. gram: G [K, K] of the group. slope [K + 1] and moments
// [parameters, K + 2], zeros at the start, are the last ones at the end. history [iterations + 1].
void adam_stream(const Batch& batch, const Objective& objective, const Elementwise& options, int64_t iterations,
                 const double* gram, double* work, double* slope, double* moments, double* history);

}  // namespace awd::cuda
