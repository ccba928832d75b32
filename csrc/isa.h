// SPDX-License-Identifier: Apache-2.0
// The CPU entry points of the instruction set chosen when the module is imported.
#pragma once

#include "entry_points.h"

namespace fe {

struct CpuKernels {
#define FE_MEMBER(FUNCTION, PARAMS) void (*FUNCTION)(const PARAMS& params, int threads);
  FE_ENTRY_POINTS(FE_MEMBER)
  FE_CPU_ENTRY_POINTS(FE_MEMBER)
#undef FE_MEMBER
  const char* isa;
};

// The sets compiled in that this processor can run, best last. Never empty: the baseline always runs.
int runnable_isas(const CpuKernels** out);

}  // namespace fe
