// SPDX-License-Identifier: Apache-2.0
// faceedit.kernels._C: addresses, sizes and enumerations in, nothing out. Python owns every buffer.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "isa.h"
#include "upfirdn2d_tile.h"

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

// Python values into the fields of a parameter struct. Pointers come as addresses.
template <class T>
void assign(T*& field, py::handle value) {
  field = pointer<T>(value.cast<uintptr_t>());
}

template <class T>
std::enable_if_t<std::is_arithmetic_v<T>> assign(T& field, py::handle value) {
  field = value.cast<T>();
}

void assign(fe::MaskOperand& field, py::handle value) {
  const auto operand = value.cast<py::tuple>();  // (address, stride, dtype)
  assign(field.data, operand[0]), assign(field.stride, operand[1]), assign(field.dtype, operand[2]);
}

// A list that travels by value: pointers of several maps, their sizes. What is not given stays zero.
template <class T, size_t N>
void assign(T (&field)[N], py::handle value) {
  const auto items = value.cast<py::sequence>();
  if (items.size() > N) throw std::invalid_argument("at most " + std::to_string(N) + " entries fit a kernel's lists");
  for (size_t i = 0; i < items.size(); ++i) assign(field[i], py::object(items[i]));
}

// A field that is not named stays zero (an absent operand); a name that is no field is an error.
template <class Params>
Params read_params(const char* function, const py::kwargs& values) {
  Params params{};
  size_t used = 0;
  fe::visit_fields(params, [&](const char* name, auto& field) {
    if (PyObject* value = PyDict_GetItemString(values.ptr(), name)) {
      assign(field, value);
      ++used;
    }
  });
  if (used != values.size()) throw py::type_error(std::string(function) + ": got an argument that is no field");
  return params;
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

template <int V>
void run_fir_blocks(const fe::UpFirDnParams& p, const fe::FirTile& tile) {
  using namespace fe::FE_ISA;
  if (p.dtype != fe::kFloat32 || !fir_packs_fit<float, V>(p, tile)) throw std::invalid_argument("packs do not fit");
  constexpr int32_t kGuard = 64, kWarps = 8, kWidth = 32;
  const int32_t size = fir_tile_floats(p, tile);
  std::vector<FirPack<float, 4>> buffer((size + 3) / 4 + kGuard);
  float* shared = buffer[0].lane;
  for (int64_t index = 0; index < tile.blocks(); ++index) {
    // What a step reads without an earlier one having written it shows as NaN, a write past the end in the guard.
    std::fill_n(shared, buffer.size() * 4, std::numeric_limits<float>::quiet_NaN());
    const FirBlock<float, V> block(p, tile, index, shared);
    for (int32_t i = 0; i < kWarps * kWidth; ++i) block.load_samples(i / kWidth, kWarps, i % kWidth, kWidth);
    for (int32_t i = 0; p.separable && i < kWarps * kWidth; ++i)
      block.filter_down(i / kWidth, kWarps, i % kWidth, kWidth);
    for (int32_t i = 0; i < kWarps * kWidth; ++i) block.filter_along(i / kWidth, kWarps, i % kWidth, kWidth);
    for (size_t i = size; i < buffer.size() * 4; ++i)
      if (shared[i] == shared[i]) throw std::out_of_range("a block wrote outside its shared memory");
  }
}

#if !defined(FE_WITH_CUDA)
template <class Params>
fe::Error without_cuda(const Params&, int, void*) {
  return "this build holds no CUDA kernels";
}
#define FE_CUDA(FUNCTION, PARAMS) without_cuda<fe::PARAMS>
#else
#define FE_CUDA(FUNCTION, PARAMS) fe::FUNCTION##_cuda
#endif

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
    const fe::BlockPlan p = fe::plan_blocks(cuda, pixels, channels);
    return py::make_tuple(p.blocks_per_sample, p.pixels_per_block);
  });

  // The CUDA kernel of upfirdn2d run here, one thread after another, so that tests can check its index maths. Returns the
  // number of blocks and the floats of shared memory a block has.
  m.def("upfirdn2d_blocks", [](bool packs, const py::kwargs& values) {
    const auto params = read_params<fe::UpFirDnParams>("upfirdn2d_blocks", values);
    if (fe::Error error = fe::check_upfirdn2d_fwd(params)) throw std::runtime_error(error);
    const fe::FirTile tile = fe::FE_ISA::plan_fir_tile(params);
    packs ? run_fir_blocks<4>(params, tile) : run_fir_blocks<1>(params, tile);
    return py::make_tuple(tile.blocks(), fe::FE_ISA::fir_tile_floats(params, tile));
  });

#define FE_BIND(FUNCTION, PARAMS)                                                                             \
  m.def(#FUNCTION, [](const Target& target, const py::kwargs& values) {                                       \
    const auto params = read_params<fe::PARAMS>(#FUNCTION, values);                                           \
    launch(#FUNCTION, params, target, fe::check_##FUNCTION(params), cpu().FUNCTION, FE_CUDA(FUNCTION, PARAMS)); \
  });
  FE_ENTRY_POINTS(FE_BIND)

#define FE_BIND_WORKSPACE(FUNCTION, PARAMS)                                             \
  m.def(#FUNCTION, [](const Target& target, const py::kwargs& values) {                 \
    return fe::FUNCTION(read_params<fe::PARAMS>(#FUNCTION, values), target.device >= 0); \
  });
  FE_WORKSPACES(FE_BIND_WORKSPACE)
}
