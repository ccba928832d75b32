// SPDX-License-Identifier: Apache-2.0
#include "noise_regularizer.h"

#include "cuda_common.cuh"

namespace fe {
namespace FE_ISA {
namespace {

// Sum over a block in a fixed order; every thread gets the result.
__device__ __forceinline__ double block_sum(double value, double* scratch) {
  value = warp_sum(value);
  __syncthreads();
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = value;
  __syncthreads();
  double total = 0.0;
  for (int w = 0; w < kWarps; ++w) total += scratch[w];
  return total;
}

// One map of one sample.
struct Map {
  const NoiseMapPlan* plan;
  int side, index;
  int64_t sample;
  float* coarse;  // levels kNoiseTileLevels and up
  float* grad_coarse;
  float* moments;

  __device__ __forceinline__ float* level(float* pyramid, int l) const {
    return pyramid + noise_level_offset(side, kNoiseTileLevels, l);
  }
};

__device__ __forceinline__ Map map_at(const NoiseRegularizerParams& p, const NoisePlan& plan, int64_t sample, int index) {
  const NoiseMapPlan& m = plan.maps[index];
  float* coarse = p.coarse + sample * plan.coarse + m.first_coarse;
  return {&m,     static_cast<int>(p.sides[index]), index, sample, coarse, coarse + p.batch * plan.coarse,
          p.moments + 2 * (sample * plan.levels + m.first_level)};
}

// The map, and the tile of it, that this block works on.
struct Place {
  Map map;
  int x, y;  // the tile's first pixel
};

__device__ __forceinline__ Place place_of_block(const NoiseRegularizerParams& p, const NoisePlan& plan) {
  const int64_t sample = blockIdx.x / plan.blocks, block = blockIdx.x % plan.blocks;
  int index = p.count - 1;
  while (plan.maps[index].first_block > block) --index;
  const int tile = static_cast<int>(block - plan.maps[index].first_block), across = plan.maps[index].blocks_across;
  return {map_at(p, plan, sample, index), tile % across * kNoiseTile, tile / across * kNoiseTile};
}

// A tile with its halo at every level that is made from it, one after the other in shared memory.
template <int AFTER>
struct Tile {
  static constexpr int kSide = kNoiseHalo + kNoiseTile + AFTER;
  static constexpr int kCells = kSide * kSide * 85 / 64;  // the side is a multiple of 8: 1 + 1/4 + 1/16 + 1/64

  static __device__ __forceinline__ int offset(int l) {
    return kSide * kSide + (l > 1 ? kSide * kSide / 4 : 0) + (l > 2 ? kSide * kSide / 16 : 0) - (l == 0 ? kSide * kSide : 0);
  }

  template <class T>
  static __device__ __forceinline__ void fill(float* cells, const T* map, int side, int x, int y, int levels) {
    for (int i = threadIdx.x; i < kSide * kSide; i += kThreads) {
      const int row = noise_wrap(y + i / kSide - kNoiseHalo, side), column = noise_wrap(x + i % kSide - kNoiseHalo, side);
      cells[i] = load(map[static_cast<int64_t>(row) * side + column]);
    }
    __syncthreads();
    for (int l = 1; l < levels; ++l) {
      const float* from = cells + offset(l - 1);
      const int width = kSide >> l;
      for (int i = threadIdx.x; i < width * width; i += kThreads) {
        const float* corner = from + i / width * 2 * (2 * width) + i % width * 2;
        cells[offset(l) + i] = ((corner[0] + corner[1]) + (corner[2 * width] + corner[2 * width + 1])) * 0.25f;
      }
      __syncthreads();
    }
  }
};

template <class T>
__device__ __forceinline__ const T* map_data(const NoiseRegularizerParams& p, const Map& map) {
  return static_cast<const T*>(p.maps[map.index]) + map.sample * map.side * map.side;
}

// Sums the products of the levels a tile holds, and writes the first level it does not hold.
template <class T, bool SUMS>
__global__ void __launch_bounds__(kThreads) tile_kernel(const NoiseRegularizerParams p, const NoisePlan plan) {
  using Cells = Tile<0>;
  __shared__ float cells[Cells::kCells];
  __shared__ float sums[2 * kNoiseTileLevels][kWarps];
  const Place place = place_of_block(p, plan);
  const Map& map = place.map;
  const int levels = map.plan->levels < kNoiseTileLevels ? map.plan->levels : kNoiseTileLevels;
  if (!SUMS && map.plan->levels <= kNoiseTileLevels) return;  // nothing to write
  Cells::fill(cells, map_data<T>(p, map), map.side, place.x, place.y, levels);
  if (SUMS) {
    for (int l = 0; l < levels; ++l) {
      const int cell = kNoiseTile >> l, width = Cells::kSide >> l, halo = kNoiseHalo >> l;
      const int across = (map.side - place.x) >> l, down = (map.side - place.y) >> l;
      const float* level = cells + Cells::offset(l);
      float along_x = 0.0f, along_y = 0.0f;
      for (int i = threadIdx.x; i < cell * cell; i += kThreads) {
        const int row = i / cell, column = i % cell;
        if (row >= down || column >= across) continue;
        const float* here = level + (row + halo) * width + column + halo;
        along_x += here[0] * here[-1];
        along_y += here[0] * here[-width];
      }
      along_x = warp_sum(along_x);
      along_y = warp_sum(along_y);
      if (threadIdx.x % kWarp == 0) {
        sums[2 * l][threadIdx.x / kWarp] = along_x;
        sums[2 * l + 1][threadIdx.x / kWarp] = along_y;
      }
    }
    __syncthreads();
    if (threadIdx.x < 2 * levels) {
      double total = 0.0;
      for (int w = 0; w < kWarps; ++w) total += static_cast<double>(sums[threadIdx.x][w]);
      p.partials[kNoiseSums * static_cast<int64_t>(blockIdx.x) + threadIdx.x] = total;
    }
  }
  if (map.plan->levels <= kNoiseTileLevels) return;
  constexpr int l = kNoiseTileLevels, cell = kNoiseTile >> l, width = Cells::kSide >> (l - 1);
  const int row = threadIdx.x / cell, column = threadIdx.x % cell;
  const int side = map.side >> l, y = (place.y >> l) + row, x = (place.x >> l) + column;
  if (threadIdx.x >= cell * cell || y >= side || x >= side) return;
  const int halo = kNoiseHalo >> (l - 1);
  const float* corner = cells + Cells::offset(l - 1) + (2 * row + halo) * width + 2 * column + halo;
  map.coarse[y * side + x] = ((corner[0] + corner[1]) + (corner[width] + corner[width + 1])) * 0.25f;
}

// The next level of a coarse map, by one block.
__device__ __forceinline__ void halve(const float* level, int side, float* next) {
  const int half = side / 2;
  for (int i = threadIdx.x; i < half * half; i += kThreads) {
    const float* corner = level + static_cast<int64_t>(i / half) * 2 * side + i % half * 2;
    next[i] = ((corner[0] + corner[1]) + (corner[side] + corner[side + 1])) * 0.25f;
  }
  __syncthreads();
}

// One block a map and sample: adds up what the tiles found, and goes through the levels above theirs.
__global__ void __launch_bounds__(kThreads) finish_kernel(const NoiseRegularizerParams p, const NoisePlan plan) {
  __shared__ double scratch[kWarps];
  const Map map = map_at(p, plan, blockIdx.x / p.count, static_cast<int>(blockIdx.x % p.count));
  const int levels = map.plan->levels, tile_levels = levels < kNoiseTileLevels ? levels : kNoiseTileLevels;
  const double* partials = p.partials + kNoiseSums * (map.sample * plan.blocks + map.plan->first_block);
  for (int i = threadIdx.x / kWarp; i < 2 * tile_levels; i += kWarps) {
    double sum = 0.0;
    for (int b = threadIdx.x % kWarp; b < map.plan->blocks; b += kWarp) sum += partials[kNoiseSums * b + i];
    sum = warp_sum(sum);
    const double side = static_cast<double>(map.side >> (i / 2));
    if (threadIdx.x % kWarp == 0) map.moments[i] = static_cast<float>(sum / (side * side));
  }
  for (int l = kNoiseTileLevels; l < levels; ++l) {
    const int side = map.side >> l;
    const float* level = map.level(map.coarse, l);
    float along_x = 0.0f, along_y = 0.0f;
    for (int i = threadIdx.x; i < side * side; i += kThreads) {
      const int row = i / side, column = i % side;
      along_x += level[i] * level[row * side + (column ? column - 1 : side - 1)];
      along_y += level[i] * level[(row ? row - 1 : side - 1) * side + column];
    }
    const double x = block_sum(static_cast<double>(along_x), scratch);
    const double y = block_sum(static_cast<double>(along_y), scratch);
    const double area = static_cast<double>(side) * static_cast<double>(side);
    if (threadIdx.x == 0) map.moments[2 * l] = static_cast<float>(x / area);
    if (threadIdx.x == 0) map.moments[2 * l + 1] = static_cast<float>(y / area);
    if (l + 1 < levels) halve(level, side, map.level(map.coarse, l + 1));
  }
}

__global__ void loss_kernel(const NoiseRegularizerParams p, const NoisePlan plan) {
  double loss = 0.0;
  for (int i = threadIdx.x; i < 2 * plan.levels; i += kWarp) {
    const double moment = static_cast<double>(p.moments[2 * static_cast<int64_t>(blockIdx.x) * plan.levels + i]);
    loss += moment * moment;
  }
  loss = warp_sum(loss);
  if (threadIdx.x == 0) p.loss[blockIdx.x] = static_cast<float>(loss);
}

struct Slopes {
  float along_x, along_y;
};

__device__ __forceinline__ Slopes slopes_at(const Map& map, int l, float grad) {
  const float side = static_cast<float>(map.side >> l);
  const float factor = 2.0f * grad / (side * side);
  return {factor * map.moments[2 * l], factor * map.moments[2 * l + 1]};
}

// One block a map and sample: the gradients of the levels above those of the tiles, the coarsest first.
__global__ void __launch_bounds__(kThreads, 4) coarse_gradient_kernel(const NoiseRegularizerParams p, const NoisePlan plan) {
  const Map map = map_at(p, plan, blockIdx.x / p.count, static_cast<int>(blockIdx.x % p.count));
  const int levels = map.plan->levels;
  for (int l = kNoiseTileLevels; l + 1 < levels; ++l)
    halve(map.level(map.coarse, l), map.side >> l, map.level(map.coarse, l + 1));
  for (int l = levels - 1; l >= kNoiseTileLevels; --l) {
    const int side = map.side >> l;
    const Slopes slopes = slopes_at(map, l, p.grad[map.sample]);
    const float* level = map.level(map.coarse, l);
    const float* next = map.level(map.grad_coarse, l + 1);
    float* grad = map.level(map.grad_coarse, l);
    for (int i = threadIdx.x; i < side * side; i += kThreads) {
      const int row = i / side, column = i % side;
      const float beside = level[row * side + (column ? column - 1 : side - 1)] +
                           level[row * side + (column + 1 < side ? column + 1 : 0)];
      const float stacked = level[(row ? row - 1 : side - 1) * side + column] +
                            level[(row + 1 < side ? row + 1 : 0) * side + column];
      const float above = l + 1 < levels ? next[row / 2 * (side / 2) + column / 2] * 0.25f : 0.0f;
      grad[i] = slopes.along_x * beside + slopes.along_y * stacked + above;
    }
    __syncthreads();
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) gradient_kernel(const NoiseRegularizerParams p, const NoisePlan plan) {
  using Cells = Tile<kNoiseHalo>;
  __shared__ float cells[Cells::kCells];
  __shared__ float gradients[kNoiseTile * kNoiseTile * 21 / 64];  // of levels 1 to 3: 1/4 + 1/16 + 1/64
  const Place place = place_of_block(p, plan);
  const Map& map = place.map;
  const int levels = map.plan->levels < kNoiseTileLevels ? map.plan->levels : kNoiseTileLevels;
  T* out = static_cast<T*>(p.grad_maps[map.index]) + map.sample * map.side * map.side;
  Cells::fill(cells, map_data<T>(p, map), map.side, place.x, place.y, levels);
  for (int l = levels - 1; l >= 0; --l) {
    const int cell = kNoiseTile >> l, width = Cells::kSide >> l, halo = kNoiseHalo >> l, side = map.side >> l;
    const Slopes slopes = slopes_at(map, l, p.grad[map.sample]);
    const float* level = cells + Cells::offset(l);
    // Levels 3, 2 and 1 stand one after the other.
    float* own = gradients + (l == 1 ? 5 * 64 : (l == 2 ? 64 : 0));
    const float* next = gradients + (l == 0 ? 5 * 64 : (l == 1 ? 64 : 0));
    for (int i = threadIdx.x; i < cell * cell; i += kThreads) {
      const int row = i / cell, column = i % cell, y = (place.y >> l) + row, x = (place.x >> l) + column;
      if (y >= side || x >= side) continue;
      const float* here = level + (row + halo) * width + column + halo;
      float gradient = slopes.along_x * (here[-1] + here[1]) + slopes.along_y * (here[-width] + here[width]);
      if (l + 1 < levels) {
        gradient += next[row / 2 * (cell / 2) + column / 2] * 0.25f;
      } else if (l + 1 < map.plan->levels) {
        gradient += map.grad_coarse[y / 2 * (side / 2) + x / 2] * 0.25f;
      }
      if (l == 0)
        store(gradient, out + static_cast<int64_t>(y) * side + x);
      else
        own[i] = gradient;
    }
    __syncthreads();
  }
}

template <class T>
void run(const NoiseRegularizerParams& p, cudaStream_t stream, bool is_backward) {
  const NoisePlan plan = plan_noise(p, true);
  const unsigned tiles = static_cast<unsigned>(p.batch * plan.blocks), maps = static_cast<unsigned>(p.batch * p.count);
  if (is_backward) {
    if (plan.coarse) {
      tile_kernel<T, false><<<tiles, kThreads, 0, stream>>>(p, plan);
      coarse_gradient_kernel<<<maps, kThreads, 0, stream>>>(p, plan);
    }
    gradient_kernel<T><<<tiles, kThreads, 0, stream>>>(p, plan);
    return;
  }
  tile_kernel<T, true><<<tiles, kThreads, 0, stream>>>(p, plan);
  finish_kernel<<<maps, kThreads, 0, stream>>>(p, plan);
  loss_kernel<<<static_cast<unsigned>(p.batch), kWarp, 0, stream>>>(p, plan);
}

Error run_dtype(const NoiseRegularizerParams& p, int device, void* stream, bool is_backward) {
  if (Error error = select_device(device)) return error;
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  if (p.dtype == kFloat16)
    run<Float16>(p, s, is_backward);
  else if (p.dtype == kBFloat16)
    run<BFloat16>(p, s, is_backward);
  else
    run<float>(p, s, is_backward);
  return launch_error();
}

// Normalisation.

struct NormalizeBlock {
  int64_t sample, first, index;  // first element; position among the map's blocks
  int map, count;
};

__device__ __forceinline__ NormalizeBlock normalize_block(const NormalizeNoiseParams& p, const NormalizePlan& plan) {
  const int64_t blocks = plan.first_block[p.count], block = blockIdx.x % blocks;
  NormalizeBlock b{};
  b.sample = blockIdx.x / blocks;
  while (plan.first_block[b.map + 1] <= block) ++b.map;
  b.index = block - plan.first_block[b.map];
  b.first = b.index * kNormalizeBlock;
  b.count = static_cast<int>(normalize_count(p.pixels[b.map], b.index));
  return b;
}

__device__ __forceinline__ double* normalize_totals(const NormalizeNoiseParams& p, const NormalizePlan& plan,
                                                    const NormalizeBlock& b) {
  const int64_t map = b.sample * p.count + b.map;
  return p.workspace + 2 * p.batch * plan.first_block[p.count] + kNormalizeTotals * map;
}

template <class T>
__global__ void __launch_bounds__(kThreads) moments_kernel(const NormalizeNoiseParams p, const NormalizePlan plan) {
  constexpr int kOwn = kNormalizeBlock / kThreads;
  __shared__ double scratch[kWarps];
  const NormalizeBlock b = normalize_block(p, plan);
  const T* map = static_cast<const T*>(p.maps[b.map]) + b.sample * p.pixels[b.map];
  const float origin = load(map[0]);
  float values[kOwn], sum = 0.0f, squares = 0.0f;
#pragma unroll
  for (int k = 0; k < kOwn; ++k) {
    const int i = threadIdx.x + k * kThreads;
    values[k] = i < b.count ? load(map[b.first + i]) - origin : 0.0f;
    sum += values[k];
  }
  const float mean = static_cast<float>(block_sum(static_cast<double>(sum), scratch) / b.count);
#pragma unroll
  for (int k = 0; k < kOwn; ++k) {
    const float centred = values[k] - mean;
    if (static_cast<int>(threadIdx.x) + k * kThreads < b.count) squares += centred * centred;
  }
  const double total = block_sum(static_cast<double>(squares), scratch);
  if (threadIdx.x > 0) return;
  p.workspace[2 * static_cast<int64_t>(blockIdx.x)] = static_cast<double>(mean);
  p.workspace[2 * static_cast<int64_t>(blockIdx.x) + 1] = total;
  if (b.index == 0) normalize_totals(p, plan, b)[0] = static_cast<double>(origin);
}

// Every block adds up its map's moments itself: a launch between would cost more than the reads, which hit the L2 cache.
template <class T>
__global__ void __launch_bounds__(kThreads) apply_kernel(const NormalizeNoiseParams p, const NormalizePlan plan) {
  __shared__ double scratch[kWarps];
  const NormalizeBlock b = normalize_block(p, plan);
  const int64_t pixels = p.pixels[b.map], blocks = plan.first_block[b.map + 1] - plan.first_block[b.map];
  const double* partials = p.workspace + 2 * (blockIdx.x - b.index);
  double sum = 0.0, squares = 0.0;
  for (int64_t i = threadIdx.x; i < blocks; i += kThreads)
    sum += partials[2 * i] * static_cast<double>(normalize_count(pixels, i));
  const double mean = block_sum(sum, scratch) / static_cast<double>(pixels);
  for (int64_t i = threadIdx.x; i < blocks; i += kThreads) {
    const double apart = partials[2 * i] - mean;
    squares += partials[2 * i + 1] + apart * apart * static_cast<double>(normalize_count(pixels, i));
  }
  const float factor = static_cast<float>(normalize_factor(block_sum(squares, scratch), pixels));
  const float origin = static_cast<float>(normalize_totals(p, plan, b)[0]), middle = static_cast<float>(mean);
  T* values = static_cast<T*>(p.maps[b.map]) + b.sample * pixels + b.first;
  for (int i = threadIdx.x; i < b.count; i += kThreads)
    store(((load(values[i]) - origin) - middle) * factor, values + i);
}

template <class T>
void normalize(const NormalizeNoiseParams& p, cudaStream_t stream) {
  const NormalizePlan plan = plan_normalize(p);
  const unsigned blocks = static_cast<unsigned>(p.batch * plan.first_block[p.count]);
  moments_kernel<T><<<blocks, kThreads, 0, stream>>>(p, plan);
  apply_kernel<T><<<blocks, kThreads, 0, stream>>>(p, plan);
}

}  // namespace
}  // namespace FE_ISA

Error noise_regularizer_fwd_cuda(const NoiseRegularizerParams& p, int device, void* stream) {
  return FE_ISA::run_dtype(p, device, stream, false);
}

Error noise_regularizer_bwd_cuda(const NoiseRegularizerParams& p, int device, void* stream) {
  return FE_ISA::run_dtype(p, device, stream, true);
}

Error normalize_noise_cuda(const NormalizeNoiseParams& p, int device, void* stream) {
  if (Error error = FE_ISA::select_device(device)) return error;
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  if (p.dtype == kFloat16)
    FE_ISA::normalize<FE_ISA::Float16>(p, s);
  else if (p.dtype == kBFloat16)
    FE_ISA::normalize<FE_ISA::BFloat16>(p, s);
  else
    FE_ISA::normalize<float>(p, s);
  return FE_ISA::launch_error();
}

}  // namespace fe
