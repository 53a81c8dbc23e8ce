// Compiles the kernel file named by AWD_KERNEL once per instruction set, in the namespaces awd::base, ::avx2, ::avx512.
//
// The set is switched on by a pragma around the code, never by a compiler flag: with a flag, the linker may keep the
// wide copy of a template shared with baseline code. Everything a kernel calls must therefore be inside its namespace,
// so AWD_KERNEL includes the unguarded mathematics headers itself, and standard headers are included before this one.
// A vector type wider than the enclosing set would be split up before inlining, which is why each set has its own
// Number.

#include "isa.h"

#define AWD_AVX2_TARGET "avx2,fma"
#define AWD_AVX512_TARGET "avx2,fma,avx512f,avx512vl,avx512dq,avx512bw"
#define AWD_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define AWD_BEGIN(set) AWD_PRAGMA(clang attribute push(__attribute__((target(set))), apply_to = function))
#define AWD_END _Pragma("clang attribute pop")
#else
#define AWD_BEGIN(set) _Pragma("GCC push_options") AWD_PRAGMA(GCC target(set))
#define AWD_END _Pragma("GCC pop_options")
#endif

#define AWD_VECTOR_LANES 2
namespace awd::base {
constexpr int LANES = 2;
typedef double Number __attribute__((vector_size(16)));
#include AWD_KERNEL
}  // namespace awd::base
#include "lift_guards.h"

#if AWD_X86

AWD_BEGIN(AWD_AVX2_TARGET)
#define AWD_VECTOR_LANES 4
namespace awd::avx2 {
constexpr int LANES = 4;
typedef double Number __attribute__((vector_size(32)));
#include AWD_KERNEL
}  // namespace awd::avx2
#include "lift_guards.h"
AWD_END

AWD_BEGIN(AWD_AVX512_TARGET)
#define AWD_VECTOR_LANES 8
namespace awd::avx512 {
constexpr int LANES = 8;
typedef double Number __attribute__((vector_size(64)));
#include AWD_KERNEL
}  // namespace awd::avx512
#include "lift_guards.h"
AWD_END

#endif
