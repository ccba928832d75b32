// SPDX-License-Identifier: Apache-2.0
// Storage types, enumerations and the work split shared by every kernel. Knows nothing of PyTorch.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define FE_HD __host__ __device__ __forceinline__
#else
#define FE_HD inline __attribute__((always_inline))
#endif

// Every CPU source is compiled once per instruction set. All code it can inline lives in the namespace FE_ISA, so that
// the linker never replaces a baseline function by its AVX-512 twin.
#ifndef FE_ISA
#define FE_ISA shared
#endif

namespace fe {

enum Dtype : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kUInt8 = 3 };

// A failed launch names the argument or the CUDA error; nullptr is success. The strings are static.
using Error = const char*;

// One sample's pixels are cut into blocks whose size depends on the shape alone, never on the number of threads:
// partial sums are made per block and combined in index order, so results do not depend on the thread count.
struct BlockPlan {
  int64_t blocks_per_sample;
  int32_t pixels_per_block;
};

constexpr int32_t kMaxBlockPixels = 1024;  // the row buffers of the CPU kernels

FE_HD BlockPlan plan_blocks(int64_t pixels, int64_t channels, int32_t elements, int32_t fewest, int32_t most) {
  int64_t size = elements / (channels > 0 ? channels : 1);
  size = size < fewest ? fewest : (size > most ? most : size);
  return {(pixels + size - 1) / size, static_cast<int32_t>(size)};
}

// At most 256 pixels: a channel's float32 sum runs over one block, and its rounding error grows with the length.
FE_HD BlockPlan plan_cpu_blocks(int64_t pixels, int64_t channels) {
  return plan_blocks(pixels, channels, 32768, 128, 256);
}

FE_HD BlockPlan plan_cuda_blocks(int64_t pixels, int64_t channels) {
  return plan_blocks(pixels, channels, 16384, 32, 256);
}

FE_HD BlockPlan plan_blocks(bool cuda, int64_t pixels, int64_t channels) {
  return cuda ? plan_cuda_blocks(pixels, channels) : plan_cpu_blocks(pixels, channels);
}

// A planar map of its own dtype, [batch or 1, pixels]; a null pointer stands for an absent one.
struct MaskOperand {
  const void* data;
  int64_t stride;  // pixels, or 0 when one map serves the batch
  int32_t dtype;
};

inline Error check_mask_operand(const MaskOperand& m, int64_t pixels) {
  if (!m.data) return nullptr;
  if (m.dtype < kFloat32 || m.dtype > kUInt8) return "mask dtype is not supported";
  if (m.stride != 0 && m.stride != pixels) return "a mask must have the pixels of the images";
  return nullptr;
}

}  // namespace fe
