// Which instruction set runs: chosen once, for all operators. See foreach_isa.h for how kernels are compiled for each.
#pragma once

#include "../kernels.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define AWD_X86 1
#include <immintrin.h>
#else
#define AWD_X86 0
#endif

namespace awd {

enum class Isa : int { base = 0, avx2 = 1, avx512 = 2 };

// Throws std::invalid_argument where AWD_FAST_CPU_ISA names a set that this CPU lacks.
Isa chosen_isa();

// The variant of a kernel for the chosen set.
template <class Kernel>
Kernel variant(Kernel base, [[maybe_unused]] Kernel avx2, [[maybe_unused]] Kernel avx512) {
    switch (chosen_isa()) {
        case Isa::avx512:
            return avx512;
        case Isa::avx2:
            return avx2;
        default:
            return base;
    }
}

}  // namespace awd

// The three variants of `name`; without x86 there is one.
#if AWD_X86
#define AWD_VARIANT(name) ::awd::variant(base::name, avx2::name, avx512::name)
#else
#define AWD_VARIANT(name) ::awd::variant(base::name, base::name, base::name)
#endif
