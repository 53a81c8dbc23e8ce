#include <algorithm>
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
constexpr int MOST_BITS = 11;       // of a digit
constexpr int BINS = 1 << MOST_BITS;
constexpr int SIDE_BY_SIDE = 4;  // histograms that take turns, since equal digits in a row would wait for each other
constexpr int64_t SAMPLED = 1 << 18;  // elements from which on a sample says where to look
constexpr int64_t SAMPLES = 4096;
constexpr int64_t CLUSTER = 16;     // sampled elements side by side: a cache line
constexpr double DEVIATIONS = 6.0;  // of a sample's ranks, within which the true one is looked for
constexpr int WORTH = 4;            // bits that a sample must spare
constexpr int KEY_BITS = 31, KEY_BITS_64 = 63;

// A rank that is looked for among the keys from `least` on, of which `rest` bits are unknown: how many elements it is
// behind those with larger keys.
struct Target {
    int model;
    int64_t entry;  // in the results
    int64_t least, left;
    int rest;
    bool guessed;  // from a sample: where larger keys are still to be counted

    // The next digit is the highest `bits` of the unknown ones. Behind a guess keys are spread over all digits, each of
    // which costs time to add up, so that this one is small.
    int bits() const {
        if (guessed) return rest > MOST_BITS ? std::min(rest - MOST_BITS, MOST_BITS) : rest;
        const int digits = (rest + MOST_BITS - 1) / MOST_BITS;
        return (rest + digits - 1) / digits;
    }
    int shift() const { return rest - bits(); }
};

struct Stretch {
    int64_t parameter, begin, end;  // elements of it
};

struct TrimJob {
    const Tensors* parameters;
    const Stretch* stretches;
    const Target* targets;  // by model
    int count;
    int64_t* counts;   // [targets, BINS + 1] of all stretches: of digits, and of keys above them where guessed
    uint16_t* each;    // of the last digit: [stretches, targets, BINS]
    int64_t* place;    // what locate_item finds
    int64_t* samples;  // [K, SAMPLES]: what sample_item finds, of the stretches
};

}  // namespace
}  // namespace awd

#define AWD_KERNEL "trim_kernel.h"
#include "foreach_isa.h"

namespace awd {
namespace {

// Clusters at random places of all parameters, the same on every run.
std::vector<Stretch> sampled_places(const int64_t* sizes, int64_t count, int64_t total) {
    std::vector<int64_t> places;
    uint64_t state = 0;
    for (int64_t index = 0; index < SAMPLES / CLUSTER; ++index) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        places.push_back(int64_t(double(state >> 11) / double(uint64_t(1) << 53) * double(total)));
    }
    std::sort(places.begin(), places.end());
    std::vector<Stretch> found;
    int64_t before = 0, parameter = 0;
    for (int64_t place : places) {
        while (parameter + 1 < count && place >= before + sizes[parameter]) before += sizes[parameter++];
        const int64_t size = sizes[parameter];
        const int64_t begin = std::min(place - before, std::max<int64_t>(size - CLUSTER, 0));
        found.push_back({parameter, begin, std::min(begin + CLUSTER, size)});
    }
    return found;
}

// Narrows the keys of each target to those that a sample leaves likely.
void guess(TrimJob job, std::vector<Target>& targets, const std::vector<Stretch>& places, int64_t total, int threads) {
    const int k = job.parameters[0].k;
    std::vector<int64_t> samples(size_t(k * SAMPLES));
    job.stretches = places.data();
    job.count = int(places.size());
    job.samples = samples.data();
    run_items(threads, 0, k, AWD_VARIANT(sample_item), job, base::trim_numbers());
    int64_t number = 0;
    for (const Stretch& place : places) number += place.end - place.begin;
    for (Target& target : targets) {
        int64_t* const own = samples.data() + target.model * SAMPLES;
        const double share = double(total - target.left) / double(total);
        const double off = DEVIATIONS * std::sqrt(double(number) * share * (1.0 - share)) + double(CLUSTER);
        const double first = share * double(number) - off, last = share * double(number) + off;
        if (first < 0.0 || last >= double(number)) continue;
        std::nth_element(own, own + int64_t(last), own + number);
        std::nth_element(own, own + int64_t(first), own + int64_t(last));
        const int64_t width = own[int64_t(last)] - own[int64_t(first)];
        int rest = 1;
        while (width >> rest != 0) ++rest;
        if (rest + WORTH > target.rest) continue;
        target.least = own[int64_t(first)];
        target.rest = rest;
        target.guessed = true;
    }
}

// The digit with the element that is left - 1 places behind the first, counted from the largest digit down; takes from
// `left` what lies before that digit. -1 where it is not among them.
int64_t digit_of(const int64_t* counts, int bins, int64_t& left) {
    int64_t digit = bins - 1;
    while (digit >= 0 && counts[digit] < left) left -= counts[digit--];
    return digit;
}

// The position behind the last element at a target's threshold that is before the cut; where all are, the end.
int64_t limit_of(TrimJob job, const std::vector<Stretch>& stretches, int index, int64_t digit, const Target& target,
                 int64_t total) {
    int64_t equal = 0, before = 0, position = 0;
    const int64_t count = int64_t(stretches.size());
    for (int64_t item = 0; item < count; ++item) equal += job.each[(item * job.count + index) * BINS + digit];
    if (equal == target.left) return total;
    for (int64_t item = 0; item < count; ++item) {
        const int64_t here = job.each[(item * job.count + index) * BINS + digit];
        if (before + here >= target.left) {
            Target wanted = target;
            wanted.left -= before;
            job.targets = &wanted;
            job.place = &before;
            run_items(1, item, item + 1, AWD_VARIANT(locate_item), job, base::trim_numbers());
            return position + before;
        }
        before += here;
        position += stretches[size_t(item)].end - stretches[size_t(item)].begin;
    }
    return total;
}

double magnitude_at(int64_t key, bool wide) {
    return wide ? base::magnitude_of(key) : double(base::magnitude_of(int32_t(key)));
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
            stretches.push_back({index, begin, std::min(begin + STRETCH, sizes[index])});
        }
    }
    std::vector<Target> targets;
    for (int64_t entry = 0; entry < 2 * int64_t(k); ++entry) {
        const int64_t rank = ranks[entry];
        thresholds[entry] = rank > 0 ? 0.0 : std::nan("");
        limits[entry] = rank > 0 ? total : 0;
        if (rank > 0 && rank < total) {
            targets.push_back({int(entry / 2), entry, 0, rank, wide ? KEY_BITS_64 : KEY_BITS, false});
        }
    }
    TrimJob job{parameters, stretches.data(), nullptr, 0, nullptr, nullptr, nullptr, nullptr};
    if (total >= SAMPLED && !targets.empty()) {
        guess(job, targets, sampled_places(sizes, count, total), total, threads);
    }
    std::vector<int64_t> counts;
    std::vector<uint16_t> each;
    while (!targets.empty()) {
        job.targets = targets.data();
        job.count = int(targets.size());
        counts.assign(targets.size() * (BINS + 1), 0);
        job.counts = counts.data();
        const bool last = std::any_of(targets.begin(), targets.end(), [](const Target& t) { return t.shift() == 0; });
        if (last) each.resize(stretches.size() * targets.size() * BINS);
        job.each = last ? each.data() : nullptr;
        run_items(threads, 0, int64_t(stretches.size()), AWD_VARIANT(count_item), job, base::trim_numbers());
        std::vector<Target> next;
        for (int index = 0; index < job.count; ++index) {
            Target target = targets[size_t(index)];
            const int64_t* own = &counts[size_t(index) * (BINS + 1)];
            target.left -= own[BINS];
            const int64_t digit = target.left > 0 ? digit_of(own, 1 << target.bits(), target.left) : -1;
            if (digit < 0) {  // the guess was wrong
                next.push_back(
                    {target.model, target.entry, 0, ranks[target.entry], wide ? KEY_BITS_64 : KEY_BITS, false});
                continue;
            }
            target.rest = target.shift();
            target.least += digit << target.rest;
            target.guessed = false;
            if (target.rest == 0) {
                thresholds[target.entry] = magnitude_at(target.least, wide);
                limits[target.entry] = limit_of(job, stretches, index, digit, target, total);
            } else {
                next.push_back(target);
            }
        }
        targets.swap(next);
    }
}

}  // namespace awd
