// SPDX-License-Identifier: Apache-2.0
// The one list of what the native module offers. The instruction set tables, the CUDA declarations and the Python
// bindings are all made from it.
#pragma once

#include "alpha_blend.h"
#include "attribute_maps.h"
#include "gates.h"
#include "kl.h"
#include "masked_mse.h"
#include "modulated_conv2d.h"
#include "modulated_layer.h"
#include "modulated_vectors.h"
#include "noise_bias_act.h"
#include "noise_regularizer.h"
#include "norm_modulate.h"
#include "place_components.h"
#include "upfirdn2d.h"
#include "winograd.h"

// ENTRY(function, Params): `function` exists as fe::<isa>::function(const Params&, int threads) and, in a CUDA build, as
// fe::function_cuda(const Params&, int device, void* stream). fe::check_function(const Params&) runs before either.
#define FE_ENTRY_POINTS(ENTRY)                             \
  ENTRY(alpha_blend_fwd, AlphaBlendParams)                 \
  ENTRY(alpha_blend_bwd, AlphaBlendParams)                 \
  ENTRY(bernoulli_kl_fwd, BernoulliKlParams)               \
  ENTRY(bernoulli_kl_bwd, BernoulliKlParams)               \
  ENTRY(gaussian_kl_fwd, GaussianKlParams)                 \
  ENTRY(gaussian_kl_bwd, GaussianKlParams)                 \
  ENTRY(noise_bias_act_fwd, NoiseBiasActParams)            \
  ENTRY(noise_bias_act_bwd, NoiseBiasActParams)            \
  ENTRY(masked_mse_fwd, MaskedMseParams)                   \
  ENTRY(masked_mse_bwd, MaskedMseParams)                   \
  ENTRY(modulated_epilogue_fwd, ModulatedEpilogueParams)   \
  ENTRY(modulated_epilogue_bwd, ModulatedEpilogueParams)   \
  ENTRY(modulated_style_bwd, ModulatedStyleParams)         \
  ENTRY(modulated_layer_fwd, ModulatedLayerParams)         \
  ENTRY(modulated_layer_bwd, ModulatedLayerGradientParams) \
  ENTRY(demodulation_fwd, DemodulationParams)              \
  ENTRY(demodulation_bwd, DemodulationParams)              \
  ENTRY(modulated_weight, ModulatedWeightParams)           \
  ENTRY(norm_modulate_fwd, NormModulateParams)             \
  ENTRY(norm_modulate_bwd, NormModulateParams)             \
  ENTRY(upfirdn2d_fwd, UpFirDnParams)                      \
  ENTRY(noise_regularizer_fwd, NoiseRegularizerParams)     \
  ENTRY(noise_regularizer_bwd, NoiseRegularizerParams)     \
  ENTRY(normalize_noise, NormalizeNoiseParams)             \
  ENTRY(place_components_fwd, PlaceComponentsParams)       \
  ENTRY(place_components_bwd, PlaceComponentsParams)       \
  ENTRY(mask_centres, MaskCentresParams)                   \
  ENTRY(gate_fwd, GateParams)                              \
  ENTRY(gate_bwd, GateParams)                              \
  ENTRY(attribute_maps_fwd, AttributeMapsParams)           \
  ENTRY(attribute_maps_bwd, AttributeMapsParams)

// The same of what runs on a CPU only.
#define FE_CPU_ENTRY_POINTS(ENTRY) \
  ENTRY(winograd, WinogradParams)  \
  ENTRY(winograd_weight, WinogradWeightParams)

// WORKSPACE(function, Params): int64_t fe::function(const Params&, bool cuda), elements of workspace that a call with
// these parameters needs. Pointers only say which results are wanted.
#define FE_WORKSPACES(WORKSPACE)                                         \
  WORKSPACE(gaussian_kl_fwd_workspace, GaussianKlParams)                 \
  WORKSPACE(noise_bias_act_bwd_workspace, NoiseBiasActParams)            \
  WORKSPACE(masked_mse_fwd_workspace, MaskedMseParams)                   \
  WORKSPACE(modulated_epilogue_bwd_workspace, ModulatedEpilogueParams)   \
  WORKSPACE(modulated_style_bwd_workspace, ModulatedStyleParams)         \
  WORKSPACE(modulated_layer_bwd_workspace, ModulatedLayerGradientParams) \
  WORKSPACE(norm_modulate_fwd_workspace, NormModulateParams)             \
  WORKSPACE(norm_modulate_bwd_workspace, NormModulateParams)             \
  WORKSPACE(noise_regularizer_fwd_partials, NoiseRegularizerParams)      \
  WORKSPACE(noise_regularizer_fwd_coarse, NoiseRegularizerParams)        \
  WORKSPACE(noise_regularizer_bwd_coarse, NoiseRegularizerParams)        \
  WORKSPACE(normalize_noise_workspace, NormalizeNoiseParams)             \
  WORKSPACE(attribute_maps_bwd_workspace, AttributeMapsParams)           \
  WORKSPACE(winograd_workspace, WinogradParams)

namespace fe {

#define FE_DECLARE_CUDA(FUNCTION, PARAMS) Error FUNCTION##_cuda(const PARAMS& params, int device, void* stream);
FE_ENTRY_POINTS(FE_DECLARE_CUDA)
#undef FE_DECLARE_CUDA

}  // namespace fe
