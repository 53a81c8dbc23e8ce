// Task vectors of a block and the integers that order them by magnitude, for one instruction set.

#include "weighted_sum.h"

#ifndef AWD_MAGNITUDES
#define AWD_MAGNITUDES

// The bits of |t| are in the order of |t|; those of a NaN are behind infinity's, and made all the same.
constexpr int32_t NAN_KEY = 0x7f800001;
constexpr int64_t NAN_KEY_64 = 0x7ff0000000000001;

AWD_INLINE int32_t key_of(float value) {
    const int32_t key = int32_t(bits_of(value) & 0x7fffffff);
    return key > NAN_KEY ? NAN_KEY : key;
}
AWD_INLINE int64_t key_of(double value) {
    int64_t key;
    std::memcpy(&key, &value, sizeof key);
    key &= INT64_MAX;
    return key > NAN_KEY_64 ? NAN_KEY_64 : key;
}
AWD_INLINE float magnitude_of(int32_t key) { return float_of(uint32_t(key)); }
AWD_INLINE double magnitude_of(int64_t key) {
    double value;
    std::memcpy(&value, &key, sizeof value);
    return value;
}

// Fetches the `count` elements AHEAD behind `at`, of which only `end` are there: what is done with a block takes so
// long that the CPU does not look as far.
constexpr int64_t AHEAD = 2 * CHUNK;
AWD_INLINE void fetch_ahead(const void* tensor, Dtype dtype, int64_t at, int64_t count, int64_t end) {
    if (at + AHEAD + count > end) return;
    const char* const from = address(tensor, dtype, at + AHEAD);
    for (int64_t byte = 0; byte < count * size_of(dtype); byte += 64) __builtin_prefetch(from + byte);
}

// t [count], times a factor.
template <class Stored, class Real>
AWD_INLINE void differences(const Stored* __restrict origin, const Stored* __restrict model, int64_t count, Real factor,
                            Real* __restrict t) {
    if (origin != nullptr) {
        for (int64_t e = 0; e < count; ++e) t[e] = factor * (value_of(model[e]) - value_of(origin[e]));
    } else {
        for (int64_t e = 0; e < count; ++e) t[e] = factor * value_of(model[e]);
    }
}

template <class Stored, class Key>
AWD_INLINE void keys_of(const Stored* __restrict origin, const Stored* __restrict model, int64_t count,
                        Key* __restrict keys) {
    if (origin != nullptr) {
        for (int64_t e = 0; e < count; ++e) keys[e] = key_of(value_of(model[e]) - value_of(origin[e]));
    } else {
        for (int64_t e = 0; e < count; ++e) keys[e] = key_of(value_of(model[e]));
    }
}

#endif
