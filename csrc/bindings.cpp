// SPDX-License-Identifier: Apache-2.0
// faceedit.kernels._C: addresses, sizes and enumerations in, nothing out. Python owns every buffer.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "isa.h"

namespace py = pybind11;

namespace {

const fe::CpuKernels* g_tables = nullptr;
int g_runnable = 0;
int g_chosen = 0;

const fe::CpuKernels& cpu() { return g_tables[g_chosen]; }

// Where a call runs: device < 0 is the CPU with `threads`, else that CUDA device on `stream`.
struct Target {
  int device;
  int threads;
  uintptr_t stream;
};

template <class T = void>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

template <class Params, class Cpu, class Cuda>
void launch(const char* name, const Params& params, const Target& target, fe::Error error, Cpu on_cpu, Cuda on_cuda) {
  if (!error) {
    py::gil_scoped_release release;
    if (target.device < 0) {
      on_cpu(params, target.threads < 1 ? 1 : target.threads);
    } else {
      error = on_cuda(params, target.device, pointer(target.stream));
    }
  }
  if (error) throw std::runtime_error(std::string(name) + ": " + error);
}

#if !defined(FE_WITH_CUDA)
template <class Params>
fe::Error without_cuda(const Params&, int, void*) {
  return "this build holds no CUDA kernels";
}
#define FE_CUDA(FUNCTION, PARAMS) without_cuda<fe::PARAMS>
#else
#define FE_CUDA(FUNCTION, PARAMS) fe::FUNCTION
#endif

fe::BlockPlan plan(const Target& target, int64_t pixels, int64_t channels) {
  return target.device < 0 ? fe::plan_cpu_blocks(pixels, channels) : fe::plan_cuda_blocks(pixels, channels);
}

fe::MaskOperand mask_operand(const py::tuple& operand) {
  return {pointer<const void>(operand[0].cast<uintptr_t>()), operand[1].cast<int64_t>(), operand[2].cast<int32_t>()};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of faceedit. Call them through faceedit.kernels.";
  g_runnable = fe::runnable_isas(&g_tables);
  g_chosen = g_runnable - 1;

  m.def("isa", [] { return std::string(cpu().isa); });
  m.def("isas", [] {
    py::list names;
    for (int i = 0; i < g_runnable; ++i) names.append(g_tables[i].isa);
    return names;
  });
  m.def("set_isa", [](const std::string& name) {
    for (int i = 0; i < g_runnable; ++i) {
      if (name == g_tables[i].isa) {
        g_chosen = i;
        return;
      }
    }
    throw std::invalid_argument("set_isa: name must be an instruction set this processor runs, got " + name);
  });
  m.attr("compiler") = FE_COMPILER;
  m.attr("cuda_architectures") = FE_CUDA_ARCHITECTURES;  // empty without CUDA
  m.attr("cuda_compiler") = FE_CUDA_COMPILER;

  py::class_<Target>(m, "Target")
      .def(py::init<int, int, uintptr_t>(), py::arg("device"), py::arg("threads"), py::arg("stream"));

  // The work split, so that tests can check that blocks cover every pixel once.
  m.def("plan_blocks", [](bool cuda, int64_t pixels, int64_t channels) {
    const fe::BlockPlan p = plan({cuda ? 0 : -1, 1, 0}, pixels, channels);
    return py::make_tuple(p.blocks_per_sample, p.pixels_per_block);
  });

  m.def(
      "noise_bias_act_fwd",
      [](const Target& target, uintptr_t x, uintptr_t y, uintptr_t scale, uintptr_t noise, uintptr_t strength,
         uintptr_t bias, int64_t batch, int64_t channels, int64_t pixels, int64_t noise_stride, int dtype,
         bool channels_last, int act, float slope, float gain, float clamp) {
        fe::NoiseBiasActParams p{};
        p.x = pointer(x), p.y = pointer(y);
        p.scale = pointer<float>(scale), p.noise = pointer<float>(noise);
        p.strength = pointer<float>(strength), p.bias = pointer<float>(bias);
        p.batch = batch, p.channels = channels, p.pixels = pixels, p.noise_stride = noise_stride;
        p.dtype = dtype, p.channels_last = channels_last, p.act = act;
        p.slope = slope, p.gain = gain, p.clamp = clamp;
        launch("noise_bias_act", p, target, fe::check_noise_bias_act(p, false), cpu().noise_bias_act_fwd,
               FE_CUDA(noise_bias_act_fwd_cuda, NoiseBiasActParams));
      },
      py::arg("target"), py::kw_only(), py::arg("x"), py::arg("y"), py::arg("scale"), py::arg("noise"),
      py::arg("strength"), py::arg("bias"), py::arg("batch"), py::arg("channels"), py::arg("pixels"),
      py::arg("noise_stride"), py::arg("dtype"), py::arg("channels_last"), py::arg("act"), py::arg("slope"),
      py::arg("gain"), py::arg("clamp"));

  // Floats of workspace that the backward pass needs for the gradients asked for.
  m.def(
      "noise_bias_act_workspace",
      [](const Target& target, int64_t batch, int64_t channels, int64_t pixels, bool bias, bool scale, bool strength) {
        static float marker;
        fe::NoiseBiasActParams p{};
        p.batch = batch, p.channels = channels;
        p.grad_bias = bias ? &marker : nullptr;
        p.grad_scale = scale ? &marker : nullptr;
        p.grad_strength = strength ? &marker : nullptr;
        return fe::noise_bias_act_workspace(p, plan(target, pixels, channels)).total;
      },
      py::arg("target"), py::kw_only(), py::arg("batch"), py::arg("channels"), py::arg("pixels"), py::arg("bias"),
      py::arg("scale"), py::arg("strength"));

  m.def(
      "noise_bias_act_bwd",
      [](const Target& target, uintptr_t grad, uintptr_t saved, bool saved_is_input, uintptr_t scale, uintptr_t noise,
         uintptr_t strength, uintptr_t bias, uintptr_t grad_x, uintptr_t grad_scale, uintptr_t grad_noise,
         uintptr_t grad_strength, uintptr_t grad_bias, uintptr_t workspace, int64_t batch, int64_t channels,
         int64_t pixels, int64_t noise_stride, int dtype, bool channels_last, int act, float slope, float gain,
         float clamp) {
        fe::NoiseBiasActParams p{};
        p.grad = pointer(grad), p.saved = pointer(saved), p.saved_is_input = saved_is_input;
        p.scale = pointer<float>(scale), p.noise = pointer<float>(noise);
        p.strength = pointer<float>(strength), p.bias = pointer<float>(bias);
        p.grad_x = pointer(grad_x), p.grad_scale = pointer<float>(grad_scale);
        p.grad_noise = pointer<float>(grad_noise), p.grad_strength = pointer<float>(grad_strength);
        p.grad_bias = pointer<float>(grad_bias), p.workspace = pointer<float>(workspace);
        p.batch = batch, p.channels = channels, p.pixels = pixels, p.noise_stride = noise_stride;
        p.dtype = dtype, p.channels_last = channels_last, p.act = act;
        p.slope = slope, p.gain = gain, p.clamp = clamp;
        launch("noise_bias_act_backward", p, target, fe::check_noise_bias_act(p, true), cpu().noise_bias_act_bwd,
               FE_CUDA(noise_bias_act_bwd_cuda, NoiseBiasActParams));
      },
      py::arg("target"), py::kw_only(), py::arg("grad"), py::arg("saved"), py::arg("saved_is_input"), py::arg("scale"),
      py::arg("noise"), py::arg("strength"), py::arg("bias"), py::arg("grad_x"), py::arg("grad_scale"),
      py::arg("grad_noise"), py::arg("grad_strength"), py::arg("grad_bias"), py::arg("workspace"), py::arg("batch"),
      py::arg("channels"), py::arg("pixels"), py::arg("noise_stride"), py::arg("dtype"), py::arg("channels_last"),
      py::arg("act"), py::arg("slope"), py::arg("gain"), py::arg("clamp"));

  // Doubles of workspace that the forward pass needs.
  m.def(
      "masked_mse_workspace",
      [](const Target& target, int64_t batch, int64_t channels, int64_t pixels) {
        return 2 * batch * plan(target, pixels, channels).blocks_per_sample;
      },
      py::arg("target"), py::kw_only(), py::arg("batch"), py::arg("channels"), py::arg("pixels"));

  m.def(
      "masked_mse_fwd",
      [](const Target& target, uintptr_t a, uintptr_t b, const py::tuple& mask, const py::tuple& exclude,
         const py::tuple& include, uintptr_t loss, uintptr_t inverse_weight, uintptr_t workspace, int64_t batch,
         int64_t channels, int64_t pixels, int dtype, bool channels_last, int relax, bool normalize_by_mask) {
        fe::MaskedMseParams p{};
        p.a = pointer(a), p.b = pointer(b);
        p.mask = mask_operand(mask), p.exclude = mask_operand(exclude), p.include = mask_operand(include);
        p.loss = pointer<float>(loss), p.inverse_weight = pointer<float>(inverse_weight);
        p.workspace = pointer<double>(workspace);
        p.batch = batch, p.channels = channels, p.pixels = pixels, p.dtype = dtype;
        p.channels_last = channels_last, p.relax = relax, p.normalize_by_mask = normalize_by_mask;
        launch("masked_mse", p, target, fe::check_masked_mse(p, false), cpu().masked_mse_fwd,
               FE_CUDA(masked_mse_fwd_cuda, MaskedMseParams));
      },
      py::arg("target"), py::kw_only(), py::arg("a"), py::arg("b"), py::arg("mask"), py::arg("exclude"),
      py::arg("include"), py::arg("loss"), py::arg("inverse_weight"), py::arg("workspace"), py::arg("batch"),
      py::arg("channels"), py::arg("pixels"), py::arg("dtype"), py::arg("channels_last"), py::arg("relax"),
      py::arg("normalize_by_mask"));

  m.def(
      "masked_mse_bwd",
      [](const Target& target, uintptr_t grad, uintptr_t a, uintptr_t b, const py::tuple& mask,
         const py::tuple& exclude, const py::tuple& include, uintptr_t inverse_weight, uintptr_t grad_a,
         uintptr_t grad_b, int64_t batch, int64_t channels, int64_t pixels, int dtype, bool channels_last, int relax) {
        fe::MaskedMseParams p{};
        p.grad = pointer<float>(grad), p.a = pointer(a), p.b = pointer(b);
        p.mask = mask_operand(mask), p.exclude = mask_operand(exclude), p.include = mask_operand(include);
        p.inverse_weight = pointer<float>(inverse_weight);
        p.grad_a = pointer(grad_a), p.grad_b = pointer(grad_b);
        p.batch = batch, p.channels = channels, p.pixels = pixels, p.dtype = dtype;
        p.channels_last = channels_last, p.relax = relax;
        launch("masked_mse_backward", p, target, fe::check_masked_mse(p, true), cpu().masked_mse_bwd,
               FE_CUDA(masked_mse_bwd_cuda, MaskedMseParams));
      },
      py::arg("target"), py::kw_only(), py::arg("grad"), py::arg("a"), py::arg("b"), py::arg("mask"),
      py::arg("exclude"), py::arg("include"), py::arg("inverse_weight"), py::arg("grad_a"), py::arg("grad_b"),
      py::arg("batch"), py::arg("channels"), py::arg("pixels"), py::arg("dtype"), py::arg("channels_last"),
      py::arg("relax"));
}
