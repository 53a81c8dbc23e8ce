// The parameters of a launch, in its arguments: no memory is allocated or copied for them.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <vector>

#include "../cuda_kernels.h"
#include "storage.cuh"

namespace awd::cuda {

constexpr int TABLE_WORDS = 3712;  // of the 32764 bytes that a kernel's arguments may have

// One parameter. Units of work are counted through all parameters, as groups are.
struct Part {
    const void* base;
    void *out, *velocity, *square;
    int64_t rows, columns;
    int64_t first_group, first_unit;
    double total;    // number of groups of the whole parameter, at least 1
    int32_t number;  // among all parameters
    Dtype out_dtype;
    bool by_column;
    bool packed;  // every row of every tensor begins at a multiple of 16 bytes

    __device__ __forceinline__ int64_t groups() const { return by_column ? columns : rows; }
    __device__ __forceinline__ int64_t size() const { return by_column ? rows : columns; }
};
constexpr int PART_WORDS = int(sizeof(Part) / 8);
static_assert(sizeof(Part) == 88, "a part is 11 words");

struct Table {
    int32_t count, k;
    int64_t first_unit, units;  // of this launch
    Dtype dtype;
    uint64_t words[TABLE_WORDS];

    __device__ __forceinline__ const Part& part(int index) const {
        return *reinterpret_cast<const Part*>(words + int64_t(index) * (PART_WORDS + k));
    }
    __device__ __forceinline__ const void* model(int index, int j) const {
        return reinterpret_cast<const void*>(words[int64_t(index) * (PART_WORDS + k) + PART_WORDS + j]);
    }
    // The part that a unit belongs to.
    __device__ __forceinline__ int find(int64_t unit) const {
        int low = 0, high = count - 1;
        while (low < high) {
            const int middle = (low + high + 1) / 2;
            if (part(middle).first_unit <= unit) {
                low = middle;
            } else {
                high = middle - 1;
            }
        }
        return low;
    }
};

inline int64_t groups_of(const Batch& batch) {
    int64_t groups = 0;
    for (const Parameter& parameter : batch.parameters) groups += parameter.shape.groups();
    return groups;
}

// Whether packets of 16 bytes can be used: of every tensor that is read, and of what is written.
inline bool is_packed(const Batch& batch, const Parameter& parameter) {
    const int64_t packet = 16 / size_of(batch.dtype);
    const bool one_row = parameter.shape.rows <= 1 && !parameter.shape.by_column;  // what is left over goes one by one
    if (!one_row && parameter.shape.columns % packet != 0) return false;
    const auto aligned = [](const void* at) { return reinterpret_cast<uintptr_t>(at) % 16 == 0; };
    for (const void* model : parameter.models) {
        if (!aligned(model)) return false;
    }
    return aligned(parameter.base) && aligned(parameter.out) && aligned(parameter.velocity) &&
           aligned(parameter.square);
}

// One for all calls of a thread, since it is large.
inline Table& table_room() {
    static thread_local Table table;
    return table;
}

// Calls run(table) for as many tables as hold all parameters. units(parameter): how many units of work it is; without
// any it is left out. Returns the number of units.
template <class Units, class Run>
int64_t for_each_table(const Batch& batch, const Units& units, const Run& run) {
    Table& table = table_room();
    const int stride = PART_WORDS + batch.k;
    const int capacity = TABLE_WORDS / stride;
    int64_t unit = 0, group = 0;
    table = Table{};
    table.k = batch.k;
    table.dtype = batch.dtype;
    const auto flush = [&] {
        if (table.count > 0) run(table);
        table.count = 0;
        table.first_unit = unit;
        table.units = 0;
    };
    for (size_t number = 0; number < batch.parameters.size(); ++number) {
        const Parameter& parameter = batch.parameters[number];
        const int64_t here = units(parameter);
        if (here > 0) {
            if (table.count == capacity) flush();
            const Part part{parameter.base,
                            parameter.out,
                            parameter.velocity,
                            parameter.square,
                            parameter.shape.rows,
                            parameter.shape.columns,
                            group,
                            unit,
                            parameter.total > 1 ? double(parameter.total) : 1.0,
                            int32_t(number),
                            parameter.out_dtype,
                            parameter.shape.by_column,
                            is_packed(batch, parameter)};
            uint64_t* to = table.words + int64_t(table.count) * stride;
            std::memcpy(to, &part, sizeof part);
            for (int j = 0; j < int(parameter.models.size()); ++j) {
                to[PART_WORDS + j] = reinterpret_cast<uintptr_t>(parameter.models[size_t(j)]);
            }
            ++table.count;
            table.units += here;
            unit += here;
        }
        group += parameter.shape.groups();
    }
    flush();
    return unit;
}

template <class Units>
int64_t units_of(const Batch& batch, const Units& units) {
    int64_t sum = 0;
    for (const Parameter& parameter : batch.parameters) sum += units(parameter);
    return sum;
}

inline int64_t divided(int64_t count, int64_t by) { return (count + by - 1) / by; }

}  // namespace awd::cuda
