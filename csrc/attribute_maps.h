// SPDX-License-Identifier: Apache-2.0
// Attributes painted on the parts they concern: parameters and their checks.
#pragma once

#include "common.h"

namespace fe {

// out[n,a,q] = attr[n,a] * the sum over k of relation[n,a,k] * probs[n,k,q]. Planar; probs, out, grad and grad_probs share one
// dtype, everything else is float32.
struct AttributeMapsParams {
  const void* probs;       // [batch, parts, pixels]
  const float* attr;       // [batch, attributes]
  const float* relation;   // [batch or 1, attributes, parts]
  const float* transposed; // [batch, parts, attributes]: attr * relation; backward only
  void* out;               // [batch, attributes, pixels]
  const void* grad;
  void* grad_probs;
  float* grad_attr;  // [batch, attributes]
  float* workspace;  // attribute_maps_bwd_workspace() floats
  int64_t batch;
  int64_t attributes;
  int64_t parts;
  int64_t pixels;
  int64_t relation_stride;  // attributes * parts, or 0 when one relation serves the batch
  int32_t dtype;
};

template <class Visit>
void visit_fields(AttributeMapsParams& p, Visit&& visit) {
  visit("probs", p.probs), visit("attr", p.attr), visit("relation", p.relation), visit("transposed", p.transposed);
  visit("out", p.out), visit("grad", p.grad), visit("grad_probs", p.grad_probs), visit("grad_attr", p.grad_attr);
  visit("workspace", p.workspace), visit("batch", p.batch), visit("attributes", p.attributes);
  visit("parts", p.parts), visit("pixels", p.pixels), visit("relation_stride", p.relation_stride);
  visit("dtype", p.dtype);
}

// Blocks of 256 pixels on either device; a block's sums are a row of the workspace.
FE_HD BlockPlan plan_attribute_blocks(int64_t pixels) { return plan_blocks(pixels, 1, 256, 256, 256); }

FE_HD int64_t attribute_maps_bwd_workspace(const AttributeMapsParams& p, bool) {
  return p.grad_attr ? p.batch * plan_attribute_blocks(p.pixels).blocks_per_sample * p.attributes : 0;
}

inline Error check_attribute_maps(const AttributeMapsParams& p) {
  if (p.dtype != kFloat32 && p.dtype != kFloat16 && p.dtype != kBFloat16) return "dtype is not supported";
  if (p.batch < 1 || p.attributes < 1 || p.parts < 1 || p.pixels < 1) return "probs must not be empty";
  if (p.relation_stride != 0 && p.relation_stride != p.attributes * p.parts) return "relation must be dense";
  return nullptr;
}

inline Error check_attribute_maps_fwd(const AttributeMapsParams& p) {
  if (Error error = check_attribute_maps(p)) return error;
  return p.probs && p.attr && p.relation && p.out ? nullptr : "probs, attr, relation and out must not be null";
}

inline Error check_attribute_maps_bwd(const AttributeMapsParams& p) {
  if (Error error = check_attribute_maps(p)) return error;
  if (!p.grad) return "grad must not be null";
  if (p.grad_probs && !p.transposed) return "grad_probs needs the transposed weights";
  if (p.grad_attr && (!p.probs || !p.relation || !p.workspace)) return "grad_attr needs probs, relation and workspace";
  return nullptr;
}

}  // namespace fe
