#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "../kernels.h"
#include "blocks.h"
#include "descents.h"
#include "parallel.h"

namespace awd {
namespace {

constexpr int64_t BLOCK = 8;                     // row groups of a block
constexpr int64_t RESIDENT_BYTES = 4096 * 1024;  // of a column block, where it can be so narrow
constexpr int64_t NARROW_BYTES = 64;             // of a row of a column block, at least
constexpr int64_t WIDE_BYTES = 256;              // and at most
constexpr int64_t FETCHED_BYTES = 512 * 1024;    // of the next block, fetched beside the iterations of this one
constexpr int64_t ITEMS_PER_THREAD = 4;

struct MergeJob {
    Tensors in;
    Matrix shape;
    const double* factors;  // [K] of the disentangled vectors
    Dtype out_dtype;
    void* out;
    bool streaming;
    int64_t block;    // groups that are merged together
    bool converging;  // which of the two descents runs
    SgdJob sgd;
    ConvergeJob converge;
    double* gram;  // [R, K, K]
    double* coefficients;
};

// Columns of a block: as many as keep it in the caches, in whole cache lines.
int64_t block_columns(const Tensors& in, const Matrix& shape) {
    const int64_t size = size_of(in.dtype);
    const int64_t column = std::max<int64_t>(shape.rows * (in.k + 1) * size, 1);
    int64_t bytes = WIDE_BYTES;
    while (bytes > NARROW_BYTES && bytes / size * column > RESIDENT_BYTES) bytes /= 2;
    return bytes / size;
}

int64_t weight_numbers(const Tensors& in, const Matrix& shape, int64_t block) {
    return in.k * (shape.by_column ? block : 1);
}

}  // namespace
}  // namespace awd

#define AWD_KERNEL "merge_rows_kernel.h"
#include "foreach_isa.h"

namespace awd {

int64_t merge_rows(const Tensors& in, const Matrix& shape, const double* factors, const Objective& objective,
                   const Sgd* sgd, const Converge* converge, Dtype out_dtype, void* out, double* gram,
                   double* coefficients, double* history, int threads) {
    const int64_t groups = shape.groups();
    const bool converging = converge != nullptr;
    const Sgd steps = converging ? Sgd{} : *sgd;
    const Converge ways = converging ? *converge : Converge{};
    const int64_t entries = converging ? converge_entries(ways) : steps.iterations + 1;
    const int64_t block = shape.by_column ? block_columns(in, shape) : BLOCK;
    const int64_t blocks = (groups + block - 1) / block;
    const int64_t together = items_together(blocks, entries);
    const Scratch histories(together * entries);
    std::vector<int64_t> lengths(size_t(converging ? together * WAYS : 0));
    const StepSizes sizes;
    MergeJob job{
        in,
        shape,
        factors,
        out_dtype,
        out,
        groups * shape.size() >= STREAMED,
        block,
        converging,
        {gram, groups, in.k, objective, steps, coefficients, nullptr, histories.data(), entries, 0, entries, 0},
        {gram, groups, in.k, objective, ways, &sizes, coefficients, histories.data(), lengths.data(), 0},
        gram,
        coefficients};
    const int64_t descent = converging ? converge_numbers(in.k) : sgd_numbers(in.k) + entries;
    const int64_t reduction = shape.by_column ? base::column_numbers(in.k, block) : base::element_numbers(in.k);
    const int64_t combination = weight_numbers(in, shape, block) + (2 + TOGETHER) * CHUNK;
    const int64_t numbers = std::max({descent * MAX_LANES, reduction, combination}) + in.k + 8;
    int64_t used[WAYS] = {1};
    for (int64_t index = 0; index < entries; ++index) history[index] = 0.0;
    for (int64_t first = 0; first < blocks; first += together) {
        const int64_t last = std::min(first + together, blocks);
        job.sgd.first_item = job.converge.first_item = first;
        run_items(threads, first, last, AWD_VARIANT(merge_block), job, numbers, ITEMS_PER_THREAD);
        add_histories(histories.data(), last - first, entries, entries, history);
        if (converging) add_lengths(lengths.data(), last - first, used);
    }
    return converging ? close_ways(used, entries / WAYS, objective.total, history) : entries;
}

}  // namespace awd
