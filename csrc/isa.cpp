// SPDX-License-Identifier: Apache-2.0
#include "isa.h"

namespace fe {

#define FE_DECLARE(FUNCTION, PARAMS) void FUNCTION(const PARAMS& params, int threads);
#define FE_ADDRESS(FUNCTION, PARAMS) FUNCTION,
#define FE_TABLE(ISA, NAME)                                                                                \
  namespace ISA {                                                                                          \
  FE_ENTRY_POINTS(FE_DECLARE)                                                                              \
  FE_CPU_ENTRY_POINTS(FE_DECLARE)                                                                          \
  static CpuKernels table() { return {FE_ENTRY_POINTS(FE_ADDRESS) FE_CPU_ENTRY_POINTS(FE_ADDRESS) NAME}; } \
  }

FE_TABLE(baseline, "baseline")
#if defined(FE_HAVE_X86_64_V3)
FE_TABLE(x86_64_v3, "x86-64-v3")
#endif
#if defined(FE_HAVE_X86_64_V4)
FE_TABLE(x86_64_v4, "x86-64-v4")
#endif

int runnable_isas(const CpuKernels** out) {
  static CpuKernels tables[3];
  static const int count = [] {
    int n = 0;
    tables[n++] = baseline::table();
#if defined(FE_HAVE_X86_64_V3)
    __builtin_cpu_init();
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
    if (v3) tables[n++] = x86_64_v3::table();
#if defined(FE_HAVE_X86_64_V4)
    const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl");
    if (v4) tables[n++] = x86_64_v4::table();
#endif
#endif
    return n;
  }();
  *out = tables;
  return count;
}

}  // namespace fe
