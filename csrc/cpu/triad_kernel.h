// a = b + scale * c over a stretch of memory, for one instruction set; triad.cpp includes it through foreach_isa.h.

// Elements of `a` before the first that a store of whole vectors may address, in a stretch of `count`.
static inline int64_t unaligned(const float* a, int64_t count) {
    const int64_t past = int64_t(reinterpret_cast<uintptr_t>(a) % 64 / sizeof(float));
    const int64_t head = past == 0 ? 0 : 16 - past;
    return head < count ? head : count;
}

static inline void triad_plain(const TriadJob& job, int64_t begin, int64_t end) {
    const float *b = job.b, *c = job.c;
    const float scale = job.scale;
    float* a = job.a;
#pragma GCC ivdep
    for (int64_t e = begin; e < end; ++e) a[e] = b[e] + scale * c[e];
}

#if AWD_X86

// Non-temporal stores write a line without reading it first.
static inline void triad_streaming(const TriadJob& job, int64_t begin, int64_t end) {
    const int64_t first = begin + unaligned(job.a + begin, end - begin);
    const int64_t last = first + (end - first) / 16 * 16;
    triad_plain(job, begin, first);
    for (int64_t e = first; e < last; e += 16) {  // a line at a time
#if AWD_VECTOR_LANES == 8
        const __m512 sum = _mm512_add_ps(_mm512_loadu_ps(job.b + e),
                                         _mm512_mul_ps(_mm512_set1_ps(job.scale), _mm512_loadu_ps(job.c + e)));
        _mm512_stream_ps(job.a + e, sum);
#elif AWD_VECTOR_LANES == 4
        for (int64_t part = e; part < e + 16; part += 8) {
            const __m256 sum = _mm256_add_ps(_mm256_loadu_ps(job.b + part),
                                             _mm256_mul_ps(_mm256_set1_ps(job.scale), _mm256_loadu_ps(job.c + part)));
            _mm256_stream_ps(job.a + part, sum);
        }
#else
        for (int64_t part = e; part < e + 16; part += 4) {
            const __m128 sum =
                _mm_add_ps(_mm_loadu_ps(job.b + part), _mm_mul_ps(_mm_set1_ps(job.scale), _mm_loadu_ps(job.c + part)));
            _mm_stream_ps(job.a + part, sum);
        }
#endif
    }
    triad_plain(job, last, end);
    _mm_sfence();
}

#else

static inline void triad_streaming(const TriadJob& job, int64_t begin, int64_t end) { triad_plain(job, begin, end); }

#endif

static void triad_part(const TriadJob& job, int64_t begin, int64_t end) {
    job.streaming ? triad_streaming(job, begin, end) : triad_plain(job, begin, end);
}
