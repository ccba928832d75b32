// SPDX-License-Identifier: Apache-2.0
#include "kl.h"

#include "cuda_common.cuh"

namespace fe {
namespace FE_ISA {
namespace {

// The sum over a block of threads in a fixed order; thread 0 gets it.
__device__ __forceinline__ double block_sum(double value) {
  __shared__ double partial[kWarps];
  value = warp_sum(value);
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = value;
  __syncthreads();
  double total = 0.0;
  for (int w = 0; w < kWarps; ++w) total += partial[w];
  return total;
}

template <class T>
__global__ void __launch_bounds__(kThreads) bernoulli_forward_kernel(const BernoulliKlParams p) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * p.attributes;
  const MaskOperand target{p.target, 0, p.target_dtype};
  double sum = 0.0;
  for (int64_t a = threadIdx.x; a < p.attributes; a += kThreads) {
    const double divergence = bernoulli_divergence(load(static_cast<const T*>(p.logits)[first + a]),
                                                   smoothed(load_mask(target, first + a), p.smoothing));
    sum += p.weight ? p.weight[a] * divergence : divergence;
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) p.loss[blockIdx.x] = static_cast<float>(sum / static_cast<double>(p.attributes));
}

template <class T>
__global__ void __launch_bounds__(kThreads) bernoulli_backward_kernel(const BernoulliKlParams p) {
  const MaskOperand target{p.target, 0, p.target_dtype};
  const int64_t all = p.batch * p.attributes, stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < all; i += stride) {
    const int64_t n = i / p.attributes;
    const double share = (p.weight ? p.weight[i - n * p.attributes] : 1.0) / static_cast<double>(p.attributes);
    const double slope =
        logistic(load(static_cast<const T*>(p.logits)[i])) - smoothed(load_mask(target, i), p.smoothing);
    store(static_cast<float>(p.grad[n] * share * slope), static_cast<T*>(p.grad_logits) + i);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) gaussian_forward_kernel(const GaussianKlParams p) {
  const T* mu = static_cast<const T*>(p.mu) + blockIdx.x * p.elements;
  const T* logvar = static_cast<const T*>(p.logvar) + blockIdx.x * p.elements;
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < p.elements; i += kThreads) {
    const float m = load(mu[i]);
    sum += static_cast<double>(m * m + exponential_excess(load(logvar[i])));
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) p.loss[blockIdx.x] = static_cast<float>(0.5 * sum);
}

template <class T>
__global__ void __launch_bounds__(kThreads) gaussian_backward_kernel(const GaussianKlParams p) {
  const int64_t all = p.batch * p.elements, stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < all; i += stride) {
    const float grad = p.grad[i / p.elements];
    if (p.grad_mu) store(grad * load(static_cast<const T*>(p.mu)[i]), static_cast<T*>(p.grad_mu) + i);
    if (p.grad_logvar)
      store(0.5f * grad * exponential_minus_one(load(static_cast<const T*>(p.logvar)[i])),
            static_cast<T*>(p.grad_logvar) + i);
  }
}

template <class T>
void bernoulli(const BernoulliKlParams& p, cudaStream_t stream, bool is_backward) {
  if (is_backward)
    bernoulli_backward_kernel<T><<<grid_stride_blocks(p.batch * p.attributes), kThreads, 0, stream>>>(p);
  else
    bernoulli_forward_kernel<T><<<static_cast<unsigned>(p.batch), kThreads, 0, stream>>>(p);
}

template <class T>
void gaussian(const GaussianKlParams& p, cudaStream_t stream, bool is_backward) {
  if (is_backward)
    gaussian_backward_kernel<T><<<grid_stride_blocks(p.batch * p.elements), kThreads, 0, stream>>>(p);
  else
    gaussian_forward_kernel<T><<<static_cast<unsigned>(p.batch), kThreads, 0, stream>>>(p);
}

Error run(const BernoulliKlParams& p, int device, void* stream, bool is_backward) {
  if (Error error = select_device(device)) return error;
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  if (p.dtype == kFloat16)
    bernoulli<Float16>(p, s, is_backward);
  else if (p.dtype == kBFloat16)
    bernoulli<BFloat16>(p, s, is_backward);
  else
    bernoulli<float>(p, s, is_backward);
  return launch_error();
}

Error run(const GaussianKlParams& p, int device, void* stream, bool is_backward) {
  if (Error error = select_device(device)) return error;
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  if (p.dtype == kFloat16)
    gaussian<Float16>(p, s, is_backward);
  else if (p.dtype == kBFloat16)
    gaussian<BFloat16>(p, s, is_backward);
  else
    gaussian<float>(p, s, is_backward);
  return launch_error();
}

}  // namespace
}  // namespace FE_ISA

#define FE_DEFINE(FUNCTION, PARAMS, IS_BACKWARD)                              \
  Error FUNCTION##_cuda(const PARAMS& p, int device, void* stream) {          \
    return FE_ISA::run(p, device, stream, IS_BACKWARD);                       \
  }
FE_DEFINE(bernoulli_kl_fwd, BernoulliKlParams, false)
FE_DEFINE(bernoulli_kl_bwd, BernoulliKlParams, true)
FE_DEFINE(gaussian_kl_fwd, GaussianKlParams, false)
FE_DEFINE(gaussian_kl_bwd, GaussianKlParams, true)
#undef FE_DEFINE

}  // namespace fe
