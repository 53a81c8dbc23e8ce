// Runs CUDA kernels on the CPU, thread by thread: what of CUDA the kernels of csrc/cuda use, for a C++ compiler.
//
// A block's threads are fibers that run one at a time until they meet a barrier, in an order that changes from launch
// to launch; blocks run one after the other. Shared memory is filled with NaN before each block, so that a value that
// is read before its barrier shows. A barrier that not every thread reaches ends the process with a sentence.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define AWD_EMULATED 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __grid_constant__

namespace emulation {

struct Index {
    unsigned x = 0, y = 0, z = 0;
};

struct Fiber {
    Index index;
    bool done = false;
    const uint64_t* waits_for = nullptr;  // a barrier's generation
    uint64_t seen = 0;
    jmp_buf place;
    bool started = false;
    unsigned exchanges = 0;  // that its warp made
};

struct Barrier {
    unsigned arrived = 0;
    uint64_t generation = 0;
};

struct Block {
    std::vector<Fiber> fibers;
    std::vector<Barrier> warps;
    std::vector<uint64_t> slots[2];  // one for each thread, of what a warp exchanges
    Barrier all;
    std::vector<unsigned char> shared;
    jmp_buf scheduler;
    std::function<void()> body;
};

constexpr size_t STACK = 512 << 10;

inline Block block;
inline Fiber* current = nullptr;
inline Index block_index, block_dim, grid_dim;
inline std::vector<std::unique_ptr<char[]>> stacks;
inline uint64_t order = 1;

[[noreturn]] inline void fail(const char* sentence) {
    std::fprintf(stderr, "CUDA emulation: %s (block %u, thread %u)\n", sentence, block_index.x,
                 current ? current->index.x : 0);
    std::abort();
}

inline void entry() {
    block.body();
    current->done = true;
    _longjmp(block.scheduler, 1);
}

inline void wait(Barrier& barrier, unsigned members) {
    if (++barrier.arrived == members) {
        barrier.arrived = 0;
        ++barrier.generation;
        return;
    }
    current->waits_for = &barrier.generation;
    current->seen = barrier.generation;
    if (_setjmp(current->place) == 0) _longjmp(block.scheduler, 1);
}

inline void resume(size_t number) {
    Fiber& fiber = block.fibers[number];
    current = &fiber;
    fiber.waits_for = nullptr;
    if (_setjmp(block.scheduler) != 0) return;
    if (fiber.started) _longjmp(fiber.place, 1);
    fiber.started = true;
    if (stacks.size() <= number) stacks.resize(number + 1);
    if (!stacks[number]) stacks[number].reset(new char[STACK]);
    static ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = stacks[number].get();
    context.uc_stack.ss_size = STACK;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
    setcontext(&context);
}

inline void run_block(unsigned threads) {
    block.fibers.assign(threads, Fiber{});
    block.warps.assign((threads + 31) / 32, Barrier{});
    for (auto& slots : block.slots) slots.assign(threads, ~uint64_t(0));
    block.all = Barrier{};
    std::fill(block.shared.begin(), block.shared.end(), 0xff);
    for (unsigned t = 0; t < threads; ++t) block.fibers[t].index = {t, 0, 0};
    order = order * 6364136223846793005u + 1442695040888963407u;
    const bool backwards = (order >> 40) & 1;
    const unsigned first = unsigned(order >> 33) % threads;
    for (unsigned done = 0; done < threads;) {
        bool moved = false;
        for (unsigned step = 0; step < threads; ++step) {
            const unsigned number = (first + (backwards ? threads - step : step)) % threads;
            Fiber& fiber = block.fibers[number];
            if (fiber.done || (fiber.waits_for != nullptr && *fiber.waits_for == fiber.seen)) continue;
            moved = true;
            resume(number);
            done += fiber.done;
        }
        if (!moved) fail("threads wait at a barrier that others never reach");
    }
    current = nullptr;
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), unsigned x, unsigned y, unsigned threads, size_t shared,
            const Arguments&... arguments) {
    block.shared.assign(shared + 16, 0xff);
    block_dim = {threads, 1, 1};
    grid_dim = {x, y, 1};
    block.body = [&] { kernel(Parameters(arguments)...); };
    for (unsigned j = 0; j < y; ++j) {
        for (unsigned i = 0; i < x; ++i) {
            block_index = {i, j, 0};
            run_block(threads);
        }
    }
}

inline unsigned warp_members() {
    const unsigned first = current->index.x / 32 * 32;
    return std::min(32u, block_dim.x - first);
}

// The slots of a warp once every lane wrote its value. They stay until the next exchange but one: two sets take turns,
// and who writes to a set again has met all lanes since they read it.
template <class Value>
const uint64_t* exchanged(Value value) {
    static_assert(sizeof(Value) <= 8, "a value of at most 8 bytes");
    const unsigned warp = current->index.x / 32;
    if (warp_members() != 32) fail("a warp exchanges values before it is full");
    uint64_t* slots = &block.slots[current->exchanges++ % 2][warp * 32];
    std::memcpy(&slots[current->index.x % 32], &value, sizeof value);
    wait(block.warps[warp], 32);
    return slots;
}
template <class Value>
Value exchange(Value value, unsigned lane) {
    std::memcpy(&value, &exchanged(value)[lane % 32], sizeof value);
    return value;
}

// Every lane's value, for every lane of the warp.
template <class Value>
struct Exchanged {
    Value of[32];
};
template <class Value>
Exchanged<Value> exchange_all(Value value) {
    const uint64_t* slots = exchanged(value);
    Exchanged<Value> found;
    for (unsigned lane = 0; lane < 32; ++lane) std::memcpy(&found.of[lane], &slots[lane], sizeof value);
    return found;
}

}  // namespace emulation

#define threadIdx (::emulation::current->index)
#define blockIdx (::emulation::block_index)
#define blockDim (::emulation::block_dim)
#define gridDim (::emulation::grid_dim)

inline void __syncthreads() { emulation::wait(emulation::block.all, emulation::block_dim.x); }
inline void __syncwarp() { emulation::wait(emulation::block.warps[threadIdx.x / 32], emulation::warp_members()); }
template <class Value>
Value __shfl_xor_sync(unsigned, Value value, int mask) {
    return emulation::exchange(value, (threadIdx.x % 32) ^ unsigned(mask));
}
template <class Value>
Value __shfl_sync(unsigned, Value value, int lane) {
    return emulation::exchange(value, unsigned(lane));
}
inline int __any_sync(unsigned, int condition) {
    int found = 0;
    for (int one : emulation::exchange_all(condition).of) found |= one;
    return found;
}
