// The contract of the compiled module: every operator, in the symbols of the Python reference.
//
// R groups of D elements, K tasks. A parameter arrives as the row-major matrix of its group view: rows x columns, where
// each row (or, by_column, each column) is one group; a single group is a matrix of one row. Memory belongs to the
// caller, is dense and aligned to its element, and outputs do not overlap inputs. Sizes are in elements. Arguments were
// checked by the Python side. Results are bitwise the same for any number of threads.
#pragma once

#include <cstdint>
#include <string>

#include "schedule.h"

namespace awd {

// Codes shared with awd_fast/ops/native.py.
enum class Dtype : int { f32 = 0, bf16 = 1, f16 = 2, f64 = 3 };
constexpr int64_t size_of(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }

enum class Similarity : int { absolute = 0, squared = 1 };
enum class Penalty : int { none = 0, l2 = 1, squared_l2 = 2 };

struct Matrix {
    int64_t rows, columns;
    bool by_column;

    int64_t groups() const { return by_column ? columns : rows; }
    int64_t size() const { return by_column ? rows : columns; }
};

// The tensors of one parameter: the base (null where the models are task vectors already) and K models like it.
struct Tensors {
    Dtype dtype;
    const void* base;
    const void* const* models;
    int k;
};

// L = sum over groups of S / total + alpha R(d), with S the mean over pairs of |cos| or cos^2 of the vectors t_i - d.
struct Objective {
    Similarity similarity;
    Penalty penalty;
    double alpha;
    double eps;    // added to every norm in a cosine's denominator
    double total;  // number of groups of the whole parameter, at least 1
};

// Gradient descent with the semantics of torch.optim.SGD (dampening 0), from d = 0.
struct Sgd {
    double lr, momentum, weight_decay;
    bool nesterov;
    int64_t iterations;
};

// Minimisation without a step size: awd_fast/converge.py.
struct Converge {
    double tolerance;
    int64_t max_iterations;  // of Newton steps, in each of its ways
};

// A recorded history of Converge has at most this many Newton steps of a way; later ones replace the last.
constexpr int64_t RECORDED_STEPS = 10000;
constexpr int WAYS = 1 + DESCENTS;  // smoothed Newton from d = 0, and the annealed descents

inline int64_t recorded_steps(const Converge& options) {
    return options.max_iterations < RECORDED_STEPS ? options.max_iterations : RECORDED_STEPS;
}

// Room for the history of Converge: each way offers one point of its own (d = 0, or the end of an annealed descent),
// then those of its Newton steps.
inline int64_t converge_entries(const Converge& options) { return WAYS * (1 + recorded_steps(options)); }

// out [R, K, K] = G, G_ij = <t_i, t_j> with t_i = models[i] - base. Differences are rounded once to float32 (float64
// for float64 storage), products and sums are float64.
void gram(const Tensors& in, const Matrix& shape, double* out, int threads);

// out = base + sum_j w_j t_j in the parameter's layout, rounded to out_dtype (16-bit through float32); without a base,
// sum_j w_j t_j. weights: float (double for float64 storage); [R, K] for row groups, [K, R] for column groups. The sum
// runs in that type over j in order.
void combine(const Tensors& in, const Matrix& shape, const void* weights, Dtype out_dtype, void* out, int threads);

// out [R, K] = <g_r, t_rj> with the gradient g in the parameter's layout, of a dtype that is float64 exactly where the
// tensors are. Differences are rounded once to float32 (float64 for float64 storage), products and sums are float64.
void multi_dot(const Tensors& in, const Matrix& shape, const void* gradient, Dtype gradient_dtype, double* out,
               int threads);

// coefficients [R, K] of d = sum_j a_j t_j after all iterations, and history [iterations + 1]: the loss at d_0, d_1,
// ... gram: [R, K, K], symmetric.
void descend_sgd(const double* gram, int64_t groups, int k, const Objective& objective, const Sgd& options,
                 double* coefficients, double* history, int threads);

// The same by Converge. history [converge_entries(options)]: the loss at d = 0, after each Newton step of the first
// way, and for every annealed descent that a group made, after it and after each Newton step of its polish; a group
// that has finished a way, or does not need it, stays at its last loss. Returns the number of entries used.
int64_t descend_converge(const double* gram, int64_t groups, int k, const Objective& objective, const Converge& options,
                         double* coefficients, double* history, int threads);

// gram, descend and combine in one pass over the rows or columns: out = base + sum_i factors_i (t_i - d) with factors
// [K], by SGD or by Converge, whichever is not null. gram [R, K, K] and coefficients [R, K] are outputs too. Returns
// the number of entries of the history that are used.
int64_t merge_rows(const Tensors& in, const Matrix& shape, const double* factors, const Objective& objective,
                   const Sgd* sgd, const Converge* converge, Dtype out_dtype, void* out, double* gram,
                   double* coefficients, double* history, int threads);

// Adam (torch.optim.Adam) or SGD on the elements of d, with the penalty l1 sum |d| beside that of the objective.
struct Elementwise {
    bool adam;
    double lr, momentum, beta2, eps, weight_decay;  // momentum: beta1 of Adam; beta2 and eps: of Adam alone
    bool nesterov;
    double l1;
};

// All iterations for row or column groups from d = 0: shift, d in the parameter's layout, as float (double for float64
// storage), the type of the optimiser's state and of gradients too; history [iterations + 1]: the loss at d_0, d_1,
// ...; at the end gram [R, K, K] = G, inner [R, K] = <t_i, d>, square [R] = <d, d>.
void adam_rows(const Tensors& in, const Matrix& shape, const Objective& objective, const Elementwise& options,
               int64_t iterations, void* shift, double* history, double* gram, double* inner, double* square,
               int threads);

// Iteration number `step` (from 1 on) of one group, or of a part of one, of `size` elements. slope [K + 1]: r, and the
// multiple of d in the gradient multiple d - 2 sum_i r_i t_i. shift, velocity, square: d and the optimiser's state,
// float (double for float64 storage), changed in place; SGD needs no square, nor without momentum a velocity: null.
// moments [K + 2]: <t_i, d>, <d, d> and sum |d| at the new d.
void adam_step(const Tensors& in, int64_t size, const Elementwise& options, int64_t step, const double* slope,
               void* shift, void* velocity, void* square, double* moments, int threads);

// Sparse merges: task vectors of which elements are left out. Elements are numbered in the order of memory; that is
// their position, to which a caller adds an offset where a tensor is a part of something larger.
//
// The order of a task vector's elements: by |t|, largest first, equal ones by position. |t| is that of the difference
// rounded to float32 (float64 for float64 storage). NaN counts as larger than infinity, and all NaN as equal.

// out: for each model and each of its two ranks r [K, 2] the cut behind the first r elements of all `count` parameters
// taken together (their positions run on from one to the next): thresholds [K, 2] and limits [K, 2]. Before the cut are
// the elements larger than the threshold, and those equal to it whose position is below the limit. For r = 0 these are
// NaN and 0, for all elements 0 and their number.
void trim(const Tensors* parameters, const int64_t* sizes, int64_t count, const int64_t* ranks, double* thresholds,
          int64_t* limits, int threads);

// Which elements of a task vector are kept: those between the first and the second cut [K, 2] of `trim` where there are
// thresholds, and those that chance keeps where there are chances: c [K, columns] for an element whose |t| has rank
// 0, 1, ... from below in its row of `columns` elements (1: the same for all). It is kept where the 31 high bits of its
// random number (csrc/cpu/philox.h), of the seed, the model's index and the position, are at most c.
struct Drop {
    const double* thresholds;
    const int64_t* limits;
    const int32_t* chances;
    int64_t columns;
    uint64_t seed;
    int64_t offset;  // the position of the first element
};

// How the sign of an element of the result is elected: not at all, by the sum of the kept elements, or by their count.
enum class Election : int { none = 0, sum = 1, count = 2 };

struct Vote {
    Election election;
    bool normalize;  // divide by the sum of the weights that agree with the sign, of all where there is no election
    double divisor;  // that sum where there is no election
    double scale;
};

// out = base + scale * sum_i v_i / divisor over the models whose v_i = factors_i t_i has the elected sign, + where the
// positive v_i are no smaller a sum (no fewer) than the negative ones; elements that are not kept are 0. A divisor of 0
// is 1; a NaN that is kept shows. All in float (double for float64 storage), rounded after each operation, over i in
// order. factors, weights: [K].
void sparse_merge(const Tensors& in, int64_t size, const Drop& drop, const double* factors, const double* weights,
                  const Vote& vote, Dtype out_dtype, void* out, int threads);

// out [K, 2]: the sum of |t_i| over all elements, and over those that are kept; sums are float64.
void sparse_norms(const Tensors& in, int64_t size, const Drop& drop, double* out, int threads);

// The instruction set the operators run: "base", "avx2" or "avx512". It is the widest this CPU has, unless the
// environment variable AWD_FAST_CPU_ISA or choose_cpu_isa names another; a name that this CPU lacks throws
// std::invalid_argument.
std::string cpu_isa();
void choose_cpu_isa(const std::string& name);

// a = b + scale * c over `count` elements, with non-temporal stores where `streaming` (and the CPU has them): the
// memory's own speed, which the benchmarks compare the operators with (STREAM's triad).
void triad(const float* b, const float* c, float scale, int64_t count, bool streaming, float* a, int threads);

}  // namespace awd
