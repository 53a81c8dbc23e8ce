// Fetching memory before it is needed, for one instruction set: spread over arithmetic, because many fetches at once
// would wait for each other.

#include "../number.h"
#include "storage.h"

#ifndef AWD_FETCH
#define AWD_FETCH

// Of each of `count` streams, `bytes` for every step of the work that they are fetched beside.
struct Wanted {
    const char* const* streams;
    int count;
    int64_t bytes;
};

// Fetches streams of the same length into the second-level cache, `lines` cache lines a call, one stream after the
// other.
struct Fetcher {
    const char* const* streams = nullptr;
    int count = 0;      // streams that are left
    int64_t bytes = 0;  // of a stream
    int64_t at = 0;
    int64_t lines = 0;

    inline __attribute__((always_inline)) void fetch() {
        for (int64_t line = 0; line < lines && count > 0; ++line) {
            __builtin_prefetch(*streams + at, 0, 2);
            at += 64;
            if (at >= bytes) {
                at = 0;
                ++streams;
                --count;
            }
        }
    }
};

#endif
