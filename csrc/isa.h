// SPDX-License-Identifier: Apache-2.0
// The CPU entry points of the instruction set chosen when the module is imported.
#pragma once

#include "masked_mse.h"
#include "noise_bias_act.h"

namespace fe {

struct CpuKernels {
  const char* isa;
  void (*noise_bias_act_fwd)(const NoiseBiasActParams&, int);
  void (*noise_bias_act_bwd)(const NoiseBiasActParams&, int);
  void (*masked_mse_fwd)(const MaskedMseParams&, int);
  void (*masked_mse_bwd)(const MaskedMseParams&, int);
};

// The sets compiled in that this processor can run, best last. Never empty: the baseline always runs.
int runnable_isas(const CpuKernels** out);

}  // namespace fe
