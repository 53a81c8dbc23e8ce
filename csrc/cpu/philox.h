// Random numbers by Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), a pure function
// of seed, stream and position, for one instruction set.
//
// A counter gives four numbers. Those of sixteen counters in a row are the numbers of 64 positions: counter 16 q + i
// gives those of the positions 64 q + i, 64 q + 16 + i, 64 q + 32 + i and 64 q + 48 + i, so that lanes are never
// exchanged.

#include "../number.h"
#include "storage.h"

#ifndef AWD_PHILOX
#define AWD_PHILOX

constexpr int PHILOX_ROUNDS = 10;
constexpr int64_t PHILOX_TILE = 64;
constexpr uint32_t PHILOX_FACTORS[2] = {0xD2511F53, 0xCD9E8D57}, PHILOX_STEPS[2] = {0x9E3779B9, 0xBB67AE85};

typedef uint64_t Wide __attribute__((vector_size(8 * LANES)));  // 32-bit numbers in its lower halves

// Products of the lower halves.
AWD_INLINE Wide wide_product(Wide x, Wide y) {
#if AWD_X86 && AWD_VECTOR_LANES == 8
    return (Wide)_mm512_maskz_mul_epu32(0xff, (__m512i)x, (__m512i)y);
#elif AWD_X86 && AWD_VECTOR_LANES == 4
    return (Wide)_mm256_mul_epu32((__m256i)x, (__m256i)y);
#elif AWD_X86
    return (Wide)_mm_mul_epu32((__m128i)x, (__m128i)y);
#else
    return (x & 0xffffffff) * (y & 0xffffffff);
#endif
}

AWD_INLINE Wide counters(uint64_t first) {
    Wide lanes;
    for (int i = 0; i < LANES; ++i) lanes[i] = uint64_t(i);
    return lanes + first;
}

// out [64]: the numbers of tile q. Two vectors at a time: a round waits for its products.
static inline void philox_tile(uint64_t seed, uint32_t stream, int64_t tile, uint32_t* out) {
    typedef uint32_t Narrow __attribute__((vector_size(4 * LANES)));
    constexpr int PAIR = 2;
    for (int64_t lane = 0; lane < 16; lane += PAIR * LANES) {
        Wide x0[PAIR], x1[PAIR], x2[PAIR], x3[PAIR];
        for (int i = 0; i < PAIR; ++i) {
            x0[i] = counters(uint64_t(tile) * 16 + uint64_t(lane + i * LANES));
            x1[i] = x0[i] >> 32;
            x2[i] = Wide{} + stream;
            x3[i] = Wide{};
        }
        uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#pragma GCC unroll 10
        for (int round = 0; round < PHILOX_ROUNDS; ++round) {
#pragma GCC unroll 2
            for (int i = 0; i < PAIR; ++i) {
                const Wide a = wide_product(x0[i], Wide{} + PHILOX_FACTORS[0]);
                const Wide b = wide_product(x2[i], Wide{} + PHILOX_FACTORS[1]);
                x0[i] = (b >> 32) ^ x1[i] ^ k0;  // what is left in upper halves is never looked at
                x2[i] = (a >> 32) ^ x3[i] ^ k1;
                x1[i] = b;
                x3[i] = a;
            }
            k0 += PHILOX_STEPS[0];
            k1 += PHILOX_STEPS[1];
        }
        for (int i = 0; i < PAIR; ++i) {
            const Narrow words[4] = {__builtin_convertvector(x0[i], Narrow), __builtin_convertvector(x1[i], Narrow),
                                     __builtin_convertvector(x2[i], Narrow), __builtin_convertvector(x3[i], Narrow)};
            for (int word = 0; word < 4; ++word) {
                std::memcpy(out + word * 16 + lane + i * LANES, &words[word], sizeof(Narrow));
            }
        }
    }
}

// The numbers of `count` positions from `position` on. room: count + 2 * PHILOX_TILE.
AWD_INLINE const uint32_t* philox(uint64_t seed, uint32_t stream, int64_t position, int64_t count, uint32_t* room) {
    const int64_t first = position / PHILOX_TILE, last = (position + count + PHILOX_TILE - 1) / PHILOX_TILE;
    for (int64_t tile = first; tile < last; ++tile) {
        philox_tile(seed, stream, tile, room + (tile - first) * PHILOX_TILE);
    }
    return room + (position - first * PHILOX_TILE);
}

#endif
