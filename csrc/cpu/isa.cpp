#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace awd {
namespace {

const char* const NAMES[] = {"base", "avx2", "avx512"};
std::atomic<int> chosen{-1};

bool has(Isa isa) {
#if AWD_X86
    if (isa == Isa::avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (isa == Isa::avx512) {
        return has(Isa::avx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
    }
#endif
    return isa == Isa::base;
}

Isa widest() { return has(Isa::avx512) ? Isa::avx512 : has(Isa::avx2) ? Isa::avx2 : Isa::base; }

Isa named(const std::string& name) {
    std::string known;
    for (int index = 0; index < 3; ++index) {
        if (!has(Isa(index))) continue;
        if (name == NAMES[index]) return Isa(index);
        known += (known.empty() ? "" : ", ") + std::string(NAMES[index]);
    }
    throw std::invalid_argument("the CPU instruction set is '" + name + "'; this CPU runs " + known);
}

}  // namespace

Isa chosen_isa() {
    int isa = chosen.load(std::memory_order_relaxed);
    if (isa < 0) {
        const char* wanted = std::getenv("AWD_FAST_CPU_ISA");
        isa = int(wanted == nullptr || *wanted == '\0' ? widest() : named(wanted));
        chosen.store(isa, std::memory_order_relaxed);
    }
    return Isa(isa);
}

std::string cpu_isa() { return NAMES[int(chosen_isa())]; }

void choose_cpu_isa(const std::string& name) { chosen.store(int(named(name)), std::memory_order_relaxed); }

}  // namespace awd
