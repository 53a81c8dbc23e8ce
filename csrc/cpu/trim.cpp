#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "../kernels.h"
#include "blocks.h"
#include "parallel.h"

namespace awd {
namespace {

constexpr int64_t STRETCH = 32768;  // elements per item of work: its counts fit 16 bits, the base's the cache
constexpr int LARGEST_DIGIT = 11;   // bits
constexpr int BINS = 1 << LARGEST_DIGIT;
constexpr int SIDE_BY_SIDE = 4;  // histograms that take turns, since equal digits in a row would wait for each other

// A rank that is looked for, digit by digit from the top: the digits found so far, and how far behind the elements with
// larger digits it is.
struct Target {
    int model;
    int64_t entry;  // in the results
    int64_t prefix, left;
};

struct Stretch {
    int64_t parameter, begin, end;  // elements of it
};

struct TrimJob {
    const Tensors* parameters;
    const Stretch* stretches;
    Target* targets;  // by model
    int count;
    int above, shift, bits;  // the digit is the `bits` bits from `shift` on; the bits from `above` on are the prefix
    int64_t* counts;         // [targets, BINS] of all stretches
    uint16_t* each;          // of the last digit: [stretches, targets, 1 << bits]
    int64_t* place;          // what locate_item finds
};

}  // namespace
}  // namespace awd

#define AWD_KERNEL "trim_kernel.h"
#include "foreach_isa.h"

namespace awd {
namespace {

// The digit with the element that is left - 1 places behind the first, counted from the largest digit down; takes from
// `left` what lies before that digit.
int64_t digit_of(const int64_t* counts, int bins, int64_t& left) {
    int64_t digit = bins - 1;
    while (digit > 0 && counts[digit] < left) left -= counts[digit--];
    return digit;
}

// How many of the elements at each target's threshold are before the cut is known: the position behind the last of
// them. All of them, and there is no need to look.
int64_t limit_of(TrimJob& job, const std::vector<Stretch>& stretches, int index, int64_t total) {
    const Target& target = job.targets[index];
    const int bins = 1 << job.bits;
    const int64_t digit = target.prefix & (bins - 1);
    int64_t equal = 0, before = 0, position = 0;
    for (int64_t item = 0; item < int64_t(stretches.size()); ++item) {
        equal += job.each[(item * job.count + index) * bins + digit];
    }
    if (equal == target.left) return total;
    for (int64_t item = 0;; ++item) {
        const int64_t here = job.each[(item * job.count + index) * bins + digit];
        if (before + here >= target.left) {
            Target wanted = target;
            wanted.left -= before;
            TrimJob one = job;
            one.targets = &wanted;
            one.place = &before;
            run_items(1, item, item + 1, AWD_VARIANT(locate_item), one, base::trim_numbers());
            return position + before;
        }
        before += here;
        position += stretches[size_t(item)].end - stretches[size_t(item)].begin;
    }
}

}  // namespace

void trim(const Tensors* parameters, const int64_t* sizes, int64_t count, const int64_t* ranks, double* thresholds,
          int64_t* limits, int threads) {
    const int k = parameters[0].k;
    const bool wide = parameters[0].dtype == Dtype::f64;
    std::vector<Stretch> stretches;
    int64_t total = 0;
    for (int64_t index = 0; index < count; total += sizes[index++]) {
        for (int64_t begin = 0; begin < sizes[index]; begin += STRETCH) {
            stretches.push_back({index, begin, begin + STRETCH < sizes[index] ? begin + STRETCH : sizes[index]});
        }
    }
    std::vector<Target> targets;
    for (int64_t entry = 0; entry < 2 * int64_t(k); ++entry) {
        thresholds[entry] = ranks[entry] > 0 ? 0.0 : std::nan("");
        limits[entry] = ranks[entry] > 0 ? total : 0;
        if (ranks[entry] > 0 && ranks[entry] < total) targets.push_back({int(entry / 2), entry, 0, ranks[entry]});
    }
    if (targets.empty()) return;
    const std::vector<int> digits = wide ? std::vector<int>{11, 11, 11, 10, 10, 10} : std::vector<int>{11, 10, 10};
    TrimJob job{parameters, stretches.data(), targets.data(), int(targets.size()), wide ? 63 : 31, wide ? 63 : 31, 0,
                nullptr,    nullptr,          nullptr};
    std::vector<int64_t> counts;
    std::vector<uint16_t> each;
    for (size_t index = 0; index < digits.size(); ++index) {
        job.above = job.shift;
        job.bits = digits[index];
        job.shift -= job.bits;
        counts.assign(targets.size() * BINS, 0);
        job.counts = counts.data();
        if (job.shift == 0) each.resize(stretches.size() * targets.size() << job.bits);
        job.each = job.shift == 0 ? each.data() : nullptr;
        run_items(threads, 0, int64_t(stretches.size()), AWD_VARIANT(count_item), job, base::trim_numbers());
        if (job.each != nullptr) {
            for (size_t item = 0; item < stretches.size(); ++item) {
                for (size_t bin = 0; bin < targets.size() << job.bits; ++bin) {
                    counts[(bin >> job.bits) * BINS + (bin & ((size_t(1) << job.bits) - 1))] +=
                        each[(item * targets.size() << job.bits) + bin];
                }
            }
        }
        for (size_t target = 0; target < targets.size(); ++target) {
            const int64_t digit = digit_of(&counts[target * BINS], 1 << job.bits, targets[target].left);
            targets[target].prefix = (targets[target].prefix << job.bits) | digit;
        }
    }
    for (int index = 0; index < job.count; ++index) {
        const Target& target = targets[size_t(index)];
        thresholds[target.entry] =
            wide ? base::magnitude_of(target.prefix) : double(base::magnitude_of(int32_t(target.prefix)));
        limits[target.entry] = limit_of(job, stretches, index, total);
    }
}

}  // namespace awd
