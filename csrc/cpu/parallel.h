// Threads: work items in any order, each with results of its own, so that the thread count cannot change a result.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>
#ifdef _OPENMP
#include <omp.h>
#endif

namespace awd {

// Doubles aligned for the widest vectors. Allocated before threads start, because no exception may leave a parallel
// region.
class Scratch {
  public:
    explicit Scratch(int64_t numbers) {
        const size_t bytes = (size_t(numbers < 1 ? 1 : numbers) * sizeof(double) + 63) / 64 * 64;
        if (numbers > (int64_t(1) << 48) || (data_ = std::aligned_alloc(64, bytes)) == nullptr) throw std::bad_alloc();
    }
    ~Scratch() { std::free(data_); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    double* data() const { return static_cast<double*>(data_); }

  private:
    void* data_ = nullptr;
};

// Calls run(job, item, room) for every item in [begin, end); `room` holds `numbers` doubles, one room per thread. A
// thread takes one item at a time, or, where `portions` is given, as many in a row as make so many portions a thread.
template <class Job>
void run_items(int threads, int64_t begin, int64_t end, void (*run)(const Job&, int64_t, double*), const Job& job,
               int64_t numbers, int64_t portions = 0) {
    if (begin >= end) return;
    if (threads > end - begin) threads = int(end - begin);
    if (threads < 1) threads = 1;
    const int64_t stride = (numbers + 15) / 16 * 16;  // two cache lines, so that threads do not share one
    const Scratch rooms(threads * stride);
#ifdef _OPENMP
    int64_t taken = portions > 0 ? (end - begin) / (threads * portions) : 1;
    if (taken < 1) taken = 1;
#pragma omp parallel for num_threads(threads) schedule(dynamic, taken)
    for (int64_t item = begin; item < end; ++item) run(job, item, rooms.data() + omp_get_thread_num() * stride);
#else
    for (int64_t item = begin; item < end; ++item) run(job, item, rooms.data());
#endif
}

}  // namespace awd
