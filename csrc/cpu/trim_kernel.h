// Histograms of one digit of the magnitudes of a stretch of elements, for one instruction set; trim.cpp includes it
// through foreach_isa.h.

#include "magnitudes.h"

static inline int64_t trim_numbers() { return 5 * CHUNK + 16 + SIDE_BY_SIDE * BINS / 2; }

// counts[key >> shift] += 1 for each key.
template <class Key>
AWD_INLINE void count_all(const Key* keys, int64_t count, int shift, uint32_t* counts) {
    int64_t e = 0;
    for (; e + SIDE_BY_SIDE <= count; e += SIDE_BY_SIDE) {
#pragma GCC unroll 4
        for (int side = 0; side < SIDE_BY_SIDE; ++side) ++counts[side * BINS + (keys[e + side] >> shift)];
    }
    for (; e < count; ++e) ++counts[keys[e] >> shift];
}

#if AWD_X86 && AWD_VECTOR_LANES == 4
// For each set of 8 lanes, their numbers, to the front.
struct Fronts {
    int32_t lanes[256][8] = {};

    constexpr Fronts() {
        for (int set = 0; set < 256; ++set) {
            int used = 0;
            for (int lane = 0; lane < 8; ++lane) {
                if (set >> lane & 1) lanes[set][used++] = lane;
            }
        }
    }
};
alignas(32) static constexpr Fronts FRONTS;
#endif

// The keys from `least` to `most`, in order, to `found`, which has room for 16 more. Returns how many they are; adds to
// `above` how many are larger.
template <class Key>
AWD_INLINE int64_t matching(const Key* keys, int64_t count, Key least, Key most, Key* found, int64_t& above) {
    int64_t used = 0, e = 0;
#if AWD_X86 && AWD_VECTOR_LANES == 8
    if constexpr (sizeof(Key) == 4) {
        const __m512i first = _mm512_set1_epi32(least), last = _mm512_set1_epi32(most);
        for (; e + 16 <= count; e += 16) {
            const __m512i key = _mm512_loadu_si512(keys + e);
            const __mmask16 larger = _mm512_cmpgt_epi32_mask(key, last);
            const __mmask16 among = _mm512_cmpge_epi32_mask(key, first) & ~larger;
            _mm512_storeu_si512(found + used, _mm512_maskz_compress_epi32(among, key));
            used += __builtin_popcount(among);
            above += __builtin_popcount(larger);
        }
    }
#elif AWD_X86 && AWD_VECTOR_LANES == 4
    if constexpr (sizeof(Key) == 4) {
        const __m256i before = _mm256_set1_epi32(least - 1), last = _mm256_set1_epi32(most);  // keys are not negative
        for (; e + 8 <= count; e += 8) {
            const __m256i key = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(keys + e));
            const int larger = _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(key, last)));
            const int among = _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(key, before))) & ~larger;
            const __m256i front = _mm256_load_si256(reinterpret_cast<const __m256i*>(FRONTS.lanes[among]));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(found + used), _mm256_permutevar8x32_epi32(key, front));
            used += __builtin_popcount(unsigned(among));
            above += __builtin_popcount(unsigned(larger));
        }
    }
#endif
    for (; e < count; ++e) {
        const bool larger = keys[e] > most;
        found[used] = keys[e];
        used += (keys[e] >= least) & !larger;
        above += larger;
    }
    return used;
}

template <class Key>
struct TrimRoom {
    Key *keys, *found;  // [CHUNK], [CHUNK + 16]
    double* stored;     // base and model
    uint32_t* counts;   // [SIDE_BY_SIDE, BINS]

    explicit TrimRoom(double* room)
        : keys(reinterpret_cast<Key*>(room)),
          found(reinterpret_cast<Key*>(room + CHUNK)),
          stored(room + 2 * CHUNK + 16),
          counts(reinterpret_cast<uint32_t*>(room + 5 * CHUNK + 16)) {}
};

// The keys of elements [at, at + count) of one model.
template <class Stored, class Key>
AWD_INLINE void load_keys(const Tensors& in, int model, int64_t at, int64_t count, const TrimRoom<Key>& room) {
    Stored* rooms = reinterpret_cast<Stored*>(room.stored);
    const Stored* origin = nullptr;
    if (in.base != nullptr) origin = stored_block(in.base, in.dtype, at, count, rooms);
    keys_of(origin, stored_block(in.models[model], in.dtype, at, count, rooms + CHUNK), count, room.keys);
}

// Where the counts of a stretch go: to the sum of all, and beside those of the others where the digit is the last.
static inline void deliver(const TrimJob& job, int64_t item, int index, const uint32_t* counts, int sides,
                           int64_t above) {
    const Target& target = job.targets[index];
    int64_t* const sums = job.counts + index * int64_t(BINS + 1);
    uint16_t* each = target.shift() == 0 ? job.each + (item * job.count + index) * BINS : nullptr;
    for (int bin = 0; bin < 1 << target.bits(); ++bin) {
        uint32_t sum = 0;
        for (int side = 0; side < sides; ++side) sum += counts[side * BINS + bin];
        if (each != nullptr) each[bin] = uint16_t(sum);
        if (sum != 0) __atomic_fetch_add(&sums[bin], int64_t(sum), __ATOMIC_RELAXED);
    }
    if (target.guessed) __atomic_fetch_add(&sums[BINS], above, __ATOMIC_RELAXED);
}

template <class Stored, class Key>
static inline void count_stretch(const TrimJob& job, int64_t item, double* numbers) {
    const TrimRoom<Key> room(numbers);
    const Stretch stretch = job.stretches[item];
    const Tensors& in = job.parameters[stretch.parameter];
    for (int index = 0; index < job.count; ++index) {
        const Target target = job.targets[index];
        const int shift = target.shift();
        const bool all = target.rest == int(sizeof(Key)) * 8 - 1;
        constexpr Key INFINITE_KEY = sizeof(Key) == 4 ? Key(INT32_MAX) : Key(INT64_MAX);
        const int64_t largest = target.least + ((int64_t(1) << target.rest) - 1);
        const Key least = Key(target.least), most = largest < int64_t(INFINITE_KEY) ? Key(largest) : INFINITE_KEY;
        std::memset(room.counts, 0, size_t(all ? SIDE_BY_SIDE : 1) * BINS * sizeof(uint32_t));
        int64_t above = 0;
        for (int64_t at = stretch.begin; at < stretch.end; at += CHUNK) {
            const int64_t count = stretch.end - at < CHUNK ? stretch.end - at : CHUNK;
            fetch_ahead(in.models[target.model], in.dtype, at, count, stretch.end);
            load_keys<Stored>(in, target.model, at, count, room);
            if (all) {
                count_all(room.keys, count, shift, room.counts);
            } else {
                const int64_t used = matching(room.keys, count, least, most, room.found, above);
                for (int64_t e = 0; e < used; ++e) ++room.counts[(room.found[e] - least) >> shift];
            }
        }
        deliver(job, item, index, room.counts, all ? SIDE_BY_SIDE : 1, above);
    }
}

static void count_item(const TrimJob& job, int64_t item, double* room) {
    switch (job.parameters[0].dtype) {
        case Dtype::f64:
            return count_stretch<double, int64_t>(job, item, room);
        case Dtype::bf16:
            return count_stretch<Bf16, int32_t>(job, item, room);
        default:
            return count_stretch<float, int32_t>(job, item, room);
    }
}

// place: how far behind a stretch's begin the target's last element at its threshold ends.
template <class Stored, class Key>
static inline void locate(const TrimJob& job, int64_t item, double* numbers) {
    const TrimRoom<Key> room(numbers);
    const Stretch stretch = job.stretches[item];
    const Key wanted = Key(job.targets[0].least);
    int64_t left = job.targets[0].left;
    for (int64_t at = stretch.begin; at < stretch.end; at += CHUNK) {
        const int64_t count = stretch.end - at < CHUNK ? stretch.end - at : CHUNK;
        load_keys<Stored>(job.parameters[stretch.parameter], job.targets[0].model, at, count, room);
        for (int64_t e = 0; e < count; ++e) {
            left -= room.keys[e] == wanted;
            if (left == 0) {
                *job.place = at + e + 1 - stretch.begin;
                return;
            }
        }
    }
}

static void locate_item(const TrimJob& job, int64_t item, double* room) {
    switch (job.parameters[0].dtype) {
        case Dtype::f64:
            return locate<double, int64_t>(job, item, room);
        case Dtype::bf16:
            return locate<Bf16, int32_t>(job, item, room);
        default:
            return locate<float, int32_t>(job, item, room);
    }
}

// The keys of all stretches of one model, which are small.
template <class Stored, class Key>
static inline void sample(const TrimJob& job, int64_t model, double* numbers) {
    const TrimRoom<Key> room(numbers);
    int64_t* to = job.samples + model * SAMPLES;
    for (int index = 0; index < job.count; ++index) {
        const Stretch place = job.stretches[index];
        const int64_t count = place.end - place.begin;
        load_keys<Stored>(job.parameters[place.parameter], int(model), place.begin, count, room);
        for (int64_t e = 0; e < count; ++e) *to++ = room.keys[e];
    }
}

static void sample_item(const TrimJob& job, int64_t model, double* room) {
    switch (job.parameters[0].dtype) {
        case Dtype::f64:
            return sample<double, int64_t>(job, model, room);
        case Dtype::bf16:
            return sample<Bf16, int32_t>(job, model, room);
        default:
            return sample<float, int32_t>(job, model, room);
    }
}
