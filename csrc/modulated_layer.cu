// SPDX-License-Identifier: Apache-2.0
#include "modulated_layer.h"

#include <limits>

#include "cuda_common.cuh"

namespace fe {
namespace FE_ISA {
namespace {

// A block of threads keeps the whole weight of its sample in shared memory, multiplied by the styles, and goes from
// square to square of the image: 16 x 16 pixels and a border of one. While it computes one square the next is on its
// way. A warp has rows of 16 pixels; a product of the tensor cores takes 16 of them, 16 inputs and 8 outputs.
constexpr int kSide = static_cast<int>(kLayerSide);
constexpr int kReach = kSide + 2;
constexpr int kTaps = static_cast<int>(kLayerTaps);

// BACK: of the backward pass, which holds more in registers.
template <int C, bool BACK>
struct Layout {
  static constexpr int kWarps = C == 32 && BACK ? 4 : 8;
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kRows = kSide / kWarps;  // of a warp
  static constexpr int kChunks = C / 8;         // of 16 bytes in the channels of a pixel
  static constexpr int kSquare = kReach * kReach * C * 2;
  static constexpr int kWeight = kTaps * C * C * 2;
  static constexpr int kResident = static_cast<int>(layer_resident(C));

  // Where a chunk of a line of C channels lies: chunks of eight neighbouring lines in different banks. `at` is the line,
  // or what it is among the even number of lines of its row.
  static __device__ __forceinline__ int place(int line, int at, int chunk) {
    const int turn = C == 64 ? at & 7 : (at >> 1) & 3;
    return line * (C * 2) + ((chunk ^ turn) << 4);
  }
};
static_assert(kReach % 2 == 0, "see place");

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes; zeros where `inside` is false, and nothing is read.
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, bool inside) {
  const int bytes = inside ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all copies but those of the last commit.
__device__ __forceinline__ void await_earlier_copies() { asm volatile("cp.async.wait_group 1;" ::: "memory"); }

__device__ __forceinline__ void load_matrices(uint32_t address, uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a), "=r"(b), "=r"(c), "=r"(d)
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void multiply(BFloat16, float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void multiply(Float16, float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four lanes hold a matrix of words, a column each; afterwards a row each.
__device__ __forceinline__ void transpose(uint32_t* words, int lane) {
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
    const bool upper = lane & step;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (j & step) continue;
      const uint32_t sent = upper ? words[j] : words[j + step];
      const uint32_t received = __shfl_xor_sync(0xffffffffu, sent, step);
      (upper ? words[j] : words[j + step]) = received;
    }
  }
}

template <class T>
__device__ __forceinline__ uint32_t rounded_pair(float low, float high) {
  Fragment<T, 2> pair;
  const float values[2] = {low, high};
  pair.pack(values);
  return pair.words.lane[0];
}

// The squares of one sample that a block of threads goes through.
struct Squares {
  int height, width, across, count;

  __host__ __device__ Squares(int64_t height_, int64_t width_)
      : height(static_cast<int>(height_)),
        width(static_cast<int>(width_)),
        across((width + kSide - 1) / kSide),
        count(across * ((height + kSide - 1) / kSide)) {}
};

template <class T, int C, bool BACK>
__device__ __forceinline__ void fetch(const Squares& squares, const T* image, int square, char* to) {
  using L = Layout<C, BACK>;
  const int row = square / squares.across * kSide - 1, column = square % squares.across * kSide - 1;
  const uint32_t start = shared_address(to);
  constexpr int kAcross = kReach * L::kChunks;
  for (int i = threadIdx.x; i < kReach * kAcross; i += L::kThreads) {
    const int down = i / kAcross, along = i % kAcross / L::kChunks, chunk = i % L::kChunks;
    const int r = row + down, c = column + along;
    const bool inside = r >= 0 && r < squares.height && c >= 0 && c < squares.width;
    const T* from = inside ? image + (r * squares.width + c) * C + chunk * 8 : image;
    copy_async(start + L::place(down * kReach + along, along, chunk), from, inside);
  }
}

// weight [C, 3, 3, C], its inputs times style where there is one.
template <class T, int C, bool BACK>
__device__ __forceinline__ void keep_weight(const void* weight, const float* style, char* to) {
  using L = Layout<C, BACK>;
#pragma unroll(C / 8)  // as many reads under way
  for (int i = threadIdx.x; i < kTaps * C * L::kChunks; i += L::kThreads) {
    const int chunk = i % L::kChunks, line = i / L::kChunks, o = line / kTaps, tap = line % kTaps;
    Fragment<T, 8> pack;
    pack.read(weight, i);
    if (style) {
      float values[8];
      pack.unpack(values);
#pragma unroll
      for (int v = 0; v < 8; ++v) values[v] *= __ldg(style + chunk * 8 + v);
      pack.pack(values);
    }
    pack.write(to + L::place(tap * C + o, o, chunk), 0);
  }
}

// sum[m][n]: 16 pixels of the warp's row m by outputs 8 n ... 8 n + 7, as the tensor cores deal them to lanes.
template <class T, int C, bool BACK>
__device__ __forceinline__ void convolve(const char* weight, const char* image,
                                         float (&sum)[Layout<C, BACK>::kRows][C / 8][4]) {
  using L = Layout<C, BACK>;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int matrix = lane / 8, within = lane % 8;
  // Of this lane's rows of the matrices that are loaded at once, four: what is left are constants.
  uint32_t pixels[3][C / 16], weights[C / 16];
#pragma unroll
  for (int k = 0; k < C / 16; ++k) {
    const int o = matrix / 2 * 8 + within;
    weights[k] = shared_address(weight) + L::place(o, o, 2 * k + matrix % 2);
#pragma unroll
    for (int along = 0; along < 3; ++along) {
      const int column = along + matrix % 2 * 8 + within;
      pixels[along][k] =
          shared_address(image) + L::place(warp * L::kRows * kReach + column, column, 2 * k + matrix / 2);
    }
  }
#pragma unroll
  for (int m = 0; m < L::kRows; ++m) {
#pragma unroll
    for (int n = 0; n < C / 8; ++n) sum[m][n][0] = sum[m][n][1] = sum[m][n][2] = sum[m][n][3] = 0.0f;
  }
#pragma unroll 1  // more loads under way than this do not fit the registers
  for (int down = 0; down < 3; ++down) {
#pragma unroll
    for (int along = 0; along < 3; ++along) {
#pragma unroll
      for (int k = 0; k < C / 16; ++k) {
        uint32_t b[C / 8][2];
#pragma unroll
        for (int n = 0; n < C / 8; n += 2)
          load_matrices(weights[k] + (along * C + n * 8) * (C * 2), b[n][0], b[n][1], b[n + 1][0], b[n + 1][1]);
#pragma unroll
        for (int m = 0; m < L::kRows; ++m) {
          uint32_t a[4];
          load_matrices(pixels[along][k] + m * (kReach * C * 2), a[0], a[1], a[2], a[3]);
#pragma unroll
          for (int n = 0; n < C / 8; ++n) multiply(T{}, sum[m][n], a, b[n]);
        }
        pixels[along][k] += kReach * C * 2;
      }
    }
#pragma unroll
    for (int k = 0; k < C / 16; ++k) weights[k] += 3 * C * C * 2;
  }
}

// Pixels of this lane in a square: of row m, and of either half of its 16 columns.
template <class L>
struct Pixels {
  int top, left, height, width;

  __device__ __forceinline__ Pixels(const Squares& squares, int square)
      : top(square / squares.across * kSide + threadIdx.x / kWarp * L::kRows),
        left(square % squares.across * kSide + threadIdx.x % kWarp / 4),
        height(squares.height),
        width(squares.width) {}

  __device__ __forceinline__ bool inside(int m, int half) const { return top + m < height && left + half * 8 < width; }
  __device__ __forceinline__ int index(int m, int half) const { return (top + m) * width + left + half * 8; }
};

// A piecewise linear activation of positive gain with its clamp; a NaN stays one.
struct Activated {
  float above, below, least, most;

  explicit Activated(const ModulatedLayerParams& p) {
    above = p.gain;
    below = p.act == kLeakyRelu ? p.slope * p.gain : p.gain;
    most = p.clamp < 0.0f ? std::numeric_limits<float>::infinity() : p.clamp;
    least = p.act == kRelu ? 0.0f : -most;
  }
  __device__ __forceinline__ float operator()(float z) const {
    float y = z * (z < 0.0f ? below : above);
    asm("max.NaN.f32 %0, %0, %1;" : "+f"(y) : "f"(least));
    asm("min.NaN.f32 %0, %0, %1;" : "+f"(y) : "f"(most));
    return y;
  }
};

template <class T, int C>
__global__ void __launch_bounds__(Layout<C, false>::kThreads, Layout<C, false>::kResident)
    forward_kernel(const ModulatedLayerParams p, const Activated activated, const Squares squares,
                   const unsigned blocks_per_sample) {
  using L = Layout<C, false>;
  extern __shared__ __align__(128) char shared[];
  char* const weight = shared;
  char* const images = weight + L::kWeight;
  float* const vectors = reinterpret_cast<float*>(images + 2 * L::kSquare);  // scale, bias, rgb_factors
  const unsigned sample = blockIdx.x / blocks_per_sample, first = blockIdx.x % blocks_per_sample;
  const int64_t pixels = p.height * p.width;
  const T* image = static_cast<const T*>(p.x) + sample * pixels * C;
  T* out = static_cast<T*>(p.y) + sample * pixels * C;
  const float* noise = p.noise ? p.noise + sample * p.noise_stride : nullptr;
  float* rgb = p.rgb ? p.rgb + sample * 3 * pixels : nullptr;
  const float strength = p.strength ? __ldg(p.strength) : 1.0f;
  const int lane = threadIdx.x % kWarp, quarter = lane % 4;

  fetch<T, C, false>(squares, image, first, images);
  commit_copies();
  keep_weight<T, C, false>(p.weight, p.style + sample * C, weight);
  for (int i = threadIdx.x; i < 5 * C; i += L::kThreads) {
    const int kind = i / C, c = i % C;
    float value = 0.0f;
    if (kind == 0) value = p.scale ? p.scale[sample * C + c] : 1.0f;
    if (kind == 1) value = p.bias ? p.bias[c] : 0.0f;
    if (kind >= 2) value = rgb ? p.rgb_factors[(sample * 3 + kind - 2) * C + c] : 0.0f;
    vectors[i] = value;
  }
  int turn = 0;
  for (int square = first; square < squares.count; square += blocks_per_sample, turn ^= 1) {
    const int next = square + blocks_per_sample;
    if (next < squares.count) fetch<T, C, false>(squares, image, next, images + (turn ^ 1) * L::kSquare);
    commit_copies();
    const Pixels<L> pixel(squares, square);
    float offset[L::kRows][2];  // read ahead of the products
#pragma unroll
    for (int m = 0; m < L::kRows; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half)
        offset[m][half] = noise && pixel.inside(m, half) ? __ldg(noise + pixel.index(m, half)) * strength : 0.0f;
    }
    await_earlier_copies();
    __syncthreads();
    float sum[L::kRows][C / 8][4];
    convolve<T, C, false>(weight, images + turn * L::kSquare, sum);
    __syncthreads();  // the square may be overwritten

    float colours[L::kRows][2][3] = {};
#pragma unroll
    for (int n = 0; n < C / 8; ++n) {
      float vector[5][2];
#pragma unroll
      for (int kind = 0; kind < 5; ++kind) {
        const Pack<float, 2> pair = reinterpret_cast<const Pack<float, 2>*>(vectors + kind * C)[n * 4 + quarter];
        vector[kind][0] = pair.lane[0], vector[kind][1] = pair.lane[1];
      }
#pragma unroll
      for (int m = 0; m < L::kRows; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& z = sum[m][n][half * 2 + e];
            z = activated(z * vector[0][e] + (offset[m][half] + vector[1][e]));
#pragma unroll
            for (int k = 0; k < 3; ++k) colours[m][half][k] += z * vector[2 + k][e];
          }
        }
      }
    }
#pragma unroll
    for (int m = 0; m < L::kRows; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int q = pixel.index(m, half);
        const bool inside = pixel.inside(m, half);
        if (rgb) {
#pragma unroll
          for (int k = 0; k < 3; ++k) {
            const float colour = group_sum(colours[m][half][k], 4);
            if (quarter == 0 && inside) rgb[k * pixels + q] = colour;
          }
        }
#pragma unroll
        for (int g = 0; g < C / 32; ++g) {
          uint32_t words[4];
#pragma unroll
          for (int w = 0; w < 4; ++w)
            words[w] = rounded_pair<T>(sum[m][4 * g + w][half * 2], sum[m][4 * g + w][half * 2 + 1]);
          transpose(words, lane);
          Fragment<T, 8> pack;
#pragma unroll
          for (int w = 0; w < 4; ++w) pack.words.lane[w] = words[w];
          if (inside) pack.write(out + q * C + (4 * g + quarter) * 8, 0);
        }
      }
    }
  }
}

template <class T, int C>
__global__ void __launch_bounds__(Layout<C, true>::kThreads, Layout<C, true>::kResident)
    backward_kernel(const ModulatedLayerGradientParams p, const Squares squares, const unsigned blocks_per_sample) {
  using L = Layout<C, true>;
  extern __shared__ __align__(128) char shared[];
  char* const weight = shared;
  char* const images = weight + L::kWeight;
  float* const styles = reinterpret_cast<float*>(images + 2 * L::kSquare);
  const unsigned sample = blockIdx.x / blocks_per_sample, first = blockIdx.x % blocks_per_sample;
  const int64_t base = sample * p.height * p.width * C;
  const T* image = static_cast<const T*>(p.grad) + base;
  const T* x = p.grad_style ? static_cast<const T*>(p.x) + base : nullptr;
  T* out = static_cast<T*>(p.grad_x) + base;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, quarter = lane % 4, eighth = lane / 4;

  fetch<T, C, true>(squares, image, first, images);
  commit_copies();
  keep_weight<T, C, true>(p.weight, nullptr, weight);
  for (int c = threadIdx.x; c < C; c += L::kThreads) styles[c] = p.style[sample * C + c];
  float totals[C / 32][8] = {};  // of the channels that this lane writes
  int turn = 0;
  for (int square = first; square < squares.count; square += blocks_per_sample, turn ^= 1) {
    const int next = square + blocks_per_sample;
    if (next < squares.count) fetch<T, C, true>(squares, image, next, images + (turn ^ 1) * L::kSquare);
    commit_copies();
    const Pixels<L> pixel(squares, square);
    Fragment<T, 8> x_pack[L::kRows][2][C / 32];  // read ahead of the products
#pragma unroll
    for (int m = 0; m < L::kRows; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int g = 0; g < C / 32; ++g) {
          x_pack[m][half][g] = {};
          if (x && pixel.inside(m, half))
            x_pack[m][half][g].read(x + pixel.index(m, half) * C + (4 * g + quarter) * 8, 0);
        }
      }
    }
    await_earlier_copies();
    __syncthreads();
    float sum[L::kRows][C / 8][4];
    convolve<T, C, true>(weight, images + turn * L::kSquare, sum);
    __syncthreads();  // the square may be overwritten

#pragma unroll
    for (int g = 0; g < C / 32; ++g) {
      const int c = (4 * g + quarter) * 8;
      float style[8];
#pragma unroll
      for (int v = 0; v < 8; v += 4) {
        const Pack<float, 4> four = *reinterpret_cast<const Pack<float, 4>*>(styles + c + v);
#pragma unroll
        for (int u = 0; u < 4; ++u) style[v + u] = four.lane[u];
      }
#pragma unroll
      for (int m = 0; m < L::kRows; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint32_t words[4];
#pragma unroll
          for (int w = 0; w < 4; ++w)
            words[w] = rounded_pair<T>(sum[m][4 * g + w][half * 2], sum[m][4 * g + w][half * 2 + 1]);
          transpose(words, lane);
          if (!pixel.inside(m, half)) continue;
          Fragment<T, 8> pack;
#pragma unroll
          for (int w = 0; w < 4; ++w) pack.words.lane[w] = words[w];
          float data[8], value[8];
          pack.unpack(data);
          x_pack[m][half][g].unpack(value);
#pragma unroll
          for (int v = 0; v < 8; ++v) {
            totals[g][v] += data[v] * value[v];
            data[v] *= style[v];
          }
          pack.pack(data);
          pack.write(out + pixel.index(m, half) * C + c, 0);
        }
      }
    }
  }
  if (!x) return;
  // Lanes of one quarter of each warp have sums of the same channels.
  float* const sums = reinterpret_cast<float*>(images);
  __syncthreads();
#pragma unroll
  for (int g = 0; g < C / 32; ++g) {
#pragma unroll
    for (int v = 0; v < 8; ++v) {
      const float total = sum_over_groups(totals[g][v], 4);
      if (eighth == 0) sums[warp * C + (4 * g + quarter) * 8 + v] = total;
    }
  }
  __syncthreads();
  for (int c = threadIdx.x; c < C; c += L::kThreads) {
    float total = 0.0f;
    for (int w = 0; w < L::kWarps; ++w) total += sums[w * C + c];
    p.workspace[static_cast<int64_t>(blockIdx.x) * C + c] = total;
  }
}

template <class Params, class Kernel, class... Settings>
Error launch(const Params& p, int64_t each, Kernel kernel, int threads, cudaStream_t stream,
             const Settings&... settings) {
  const int bytes = static_cast<int>(layer_shared_bytes(p.channels));
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) {
    cudaGetLastError();  // it would be reported for the next launch
    return "this GPU has too little shared memory for a layer of so many channels";
  }
  kernel<<<static_cast<unsigned>(p.batch * each), threads, bytes, stream>>>(
      p, settings..., Squares(p.height, p.width), static_cast<unsigned>(each));
  return launch_error();
}

template <class T, int C>
Error run(const ModulatedLayerParams& p, int device, cudaStream_t stream) {
  int processors = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  const int64_t each = layer_blocks(p.batch, C, p.height, p.width, processors);
  return launch(p, each, forward_kernel<T, C>, Layout<C, false>::kThreads, stream, Activated(p));
}

template <class T, int C>
Error run(const ModulatedLayerGradientParams& p, int, cudaStream_t stream) {
  const int64_t each = layer_sums(p.batch, C, p.height, p.width);
  if (Error error = launch(p, each, backward_kernel<T, C>, Layout<C, true>::kThreads, stream)) return error;
  if (p.grad_style) combine_cuda(p.workspace, p.batch, each, C, p.grad_style, stream);
  return launch_error();
}

template <class Params>
Error run_any(const Params& p, int device, void* stream) {
  if (Error error = select_device(device)) return error;
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  if (p.dtype == kFloat16)
    return p.channels == 32 ? run<Float16, 32>(p, device, s) : run<Float16, 64>(p, device, s);
  return p.channels == 32 ? run<BFloat16, 32>(p, device, s) : run<BFloat16, 64>(p, device, s);
}

bool all_aligned(const ModulatedLayerParams& p) {
  return aligned(p.x, 16) && aligned(p.y, 16) && aligned(p.weight, 16);
}

bool all_aligned(const ModulatedLayerGradientParams& p) {
  return aligned(p.grad, 16) && aligned(p.x, 16) && aligned(p.weight, 16) && aligned(p.grad_x, 16);
}

}  // namespace
}  // namespace FE_ISA

Error modulated_layer_fwd_cuda(const ModulatedLayerParams& p, int device, void* stream) {
  return FE_ISA::all_aligned(p) ? FE_ISA::run_any(p, device, stream) : "tensors must be aligned to 16 bytes";
}

Error modulated_layer_bwd_cuda(const ModulatedLayerGradientParams& p, int device, void* stream) {
  if (p.grad_style && !p.workspace) return "workspace must not be null";
  return FE_ISA::all_aligned(p) ? FE_ISA::run_any(p, device, stream) : "tensors must be aligned to 16 bytes";
}

}  // namespace fe
