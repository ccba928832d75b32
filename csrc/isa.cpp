// SPDX-License-Identifier: Apache-2.0
#include "isa.h"

namespace fe {

#define FE_DECLARE_ISA(ISA)          \
  FE_DECLARE_NOISE_BIAS_ACT(ISA)     \
  FE_DECLARE_MASKED_MSE(ISA)

#define FE_TABLE(ISA, NAME) \
  {NAME, ISA::noise_bias_act_fwd, ISA::noise_bias_act_bwd, ISA::masked_mse_fwd, ISA::masked_mse_bwd}

FE_DECLARE_ISA(baseline)
#if defined(FE_HAVE_X86_64_V3)
FE_DECLARE_ISA(x86_64_v3)
#endif
#if defined(FE_HAVE_X86_64_V4)
FE_DECLARE_ISA(x86_64_v4)
#endif

int runnable_isas(const CpuKernels** out) {
  static CpuKernels tables[3];
  static const int count = [] {
    int n = 0;
    tables[n++] = FE_TABLE(baseline, "baseline");
#if defined(FE_HAVE_X86_64_V3)
    __builtin_cpu_init();
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
    if (v3) tables[n++] = FE_TABLE(x86_64_v3, "x86-64-v3");
#if defined(FE_HAVE_X86_64_V4)
    const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl");
    if (v4) tables[n++] = FE_TABLE(x86_64_v4, "x86-64-v4");
#endif
#endif
    return n;
  }();
  *out = tables;
  return count;
}

}  // namespace fe
