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
#include "upfirdn2d_strip.h"

namespace py = pybind11;

namespace {

const fe::CpuKernels* g_tables = nullptr;
int g_runnable = 0;
int g_chosen = 0;

const fe::CpuKernels& cpu() { return g_tables[g_chosen]; }

// Where a call runs: device < 0 is the CPU with `threads`, else that CUDA device on `stream`.
struct Target {
  int32_t device;
  int32_t threads;
  void* stream;
};

// A small layer's kernel takes a microsecond, so its arguments must take less: keyword arguments come as CPython passes
// them, without a dictionary, and a field is found by the identity of its name.

void raise_if_failed(bool failed) {
  if (failed && PyErr_Occurred()) throw py::error_already_set();
}

// Pointers come as addresses.
template <class T>
void assign(T*& field, PyObject* value) {
  field = static_cast<T*>(PyLong_AsVoidPtr(value));
  raise_if_failed(!field);
}

template <class T>
std::enable_if_t<std::is_integral_v<T>> assign(T& field, PyObject* value) {
  const long long number = PyLong_AsLongLong(value);
  raise_if_failed(number == -1);
  field = static_cast<T>(number);
  if (field != number) throw std::overflow_error("a number does not fit its field");
}

void assign(bool& field, PyObject* value) {
  if (!PyBool_Check(value)) throw py::type_error("a flag must be True or False");
  field = value == Py_True;
}

template <class T>
std::enable_if_t<std::is_floating_point_v<T>> assign(T& field, PyObject* value) {
  const double number = PyFloat_AsDouble(value);
  raise_if_failed(number == -1.0);
  field = static_cast<T>(number);
}

PyObject* tuple_of_three(PyObject* value, const char* what) {
  if (!PyTuple_Check(value) || PyTuple_GET_SIZE(value) != 3) throw py::type_error(what);
  return value;
}

void assign(fe::MaskOperand& field, PyObject* value) {
  const PyObject* items = tuple_of_three(value, "a mask must be the tuple (address, stride, dtype)");
  assign(field.data, PyTuple_GET_ITEM(items, 0));
  assign(field.stride, PyTuple_GET_ITEM(items, 1));
  assign(field.dtype, PyTuple_GET_ITEM(items, 2));
}

Target read_target(PyObject* value) {
  const PyObject* items = tuple_of_three(value, "the target must be the tuple (device, threads, stream)");
  Target target;
  assign(target.device, PyTuple_GET_ITEM(items, 0));
  assign(target.threads, PyTuple_GET_ITEM(items, 1));
  assign(target.stream, PyTuple_GET_ITEM(items, 2));
  return target;
}

// A list that travels by value: pointers of several maps, their sizes. What is not given stays zero.
template <class T, size_t N>
void assign(T (&field)[N], PyObject* value) {
  const auto items = py::reinterpret_steal<py::object>(PySequence_Fast(value, "maps must come as a list"));
  if (!items) throw py::error_already_set();
  const auto count = static_cast<size_t>(PySequence_Fast_GET_SIZE(items.ptr()));
  if (count > N) throw std::invalid_argument("at most " + std::to_string(N) + " entries fit a kernel's lists");
  for (size_t i = 0; i < count; ++i) assign(field[i], PySequence_Fast_GET_ITEM(items.ptr(), i));
}

// The names of the fields, in the order of visit_fields. They are interned, as keywords in Python code are.
template <class Params>
const std::vector<PyObject*>& field_names() {
  static const std::vector<PyObject*> names = [] {
    std::vector<PyObject*> made;
    Params params{};
    fe::visit_fields(params, [&made](const char* name, auto&) { made.push_back(PyUnicode_InternFromString(name)); });
    return made;
  }();
  return names;
}

size_t position(const char* function, const std::vector<PyObject*>& fields, PyObject* name, size_t expected) {
  for (size_t i = 0; i < fields.size(); ++i) {
    const size_t index = (expected + i) % fields.size();
    if (fields[index] == name) return index;
  }
  for (size_t i = 0; i < fields.size(); ++i)  // a name made at run time
    if (PyUnicode_Compare(fields[i], name) == 0) return i;
  throw py::type_error(std::string(function) + ": got an argument that is no field");
}

// A field that is not named stays zero (an absent operand); a name that is no field is an error. `names` may be null.
template <class Params>
Params read_params(const char* function, PyObject* const* values, PyObject* names) {
  constexpr size_t kMost = 64;
  const std::vector<PyObject*>& fields = field_names<Params>();
  if (fields.size() > kMost) throw std::length_error("a parameter struct has more fields than the bindings can read");
  PyObject* found[kMost] = {};
  const Py_ssize_t count = names ? PyTuple_GET_SIZE(names) : 0;
  for (Py_ssize_t i = 0, next = 0; i < count; ++i) {
    const size_t index = position(function, fields, PyTuple_GET_ITEM(names, i), static_cast<size_t>(next));
    found[index] = values[i];
    next = static_cast<Py_ssize_t>(index) + 1;
  }
  Params params{};
  size_t index = 0;
  fe::visit_fields(params, [&](const char*, auto& field) {
    if (PyObject* value = found[index++]) assign(field, value);
  });
  return params;
}

template <class Params>
Params read_params(const char* function, const py::kwargs& arguments) {
  std::vector<PyObject*> values;
  py::list names;
  for (const auto& [name, value] : arguments) names.append(name), values.push_back(value.ptr());
  return read_params<Params>(function, values.data(), py::tuple(names).ptr());
}

// Calls body(target, keyword values) and turns what it throws into a Python exception.
template <class Body>
PyObject* entry(PyObject* const* arguments, Py_ssize_t positional, Body&& body) {
  try {
    if (positional != 1) throw py::type_error("the one positional argument is the target");
    return body(read_target(arguments[0]), arguments + 1);
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const py::builtin_exception& error) {
    error.set_error();
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::overflow_error& error) {
    PyErr_SetString(PyExc_OverflowError, error.what());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

template <class Params, class Cpu, class Cuda>
void launch(const char* name, const Params& params, const Target& target, fe::Error error, Cpu on_cpu, Cuda on_cuda) {
  if (!error) {
    py::gil_scoped_release release;
    if (target.device < 0) {
      on_cpu(params, target.threads < 1 ? 1 : target.threads);
    } else {
      error = on_cuda(params, target.device, target.stream);
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

template <class T, int V>
void run_fir_strips(const fe::UpFirDnParams& p, int32_t rows) {
  using namespace fe::FE_ISA;
  if (!fir_strip_packs_fit<T, V>(p)) throw std::invalid_argument("packs do not fit");
  const fe::FirStrips plan = cut_fir_strips(p, V, rows);
  visit_fir_strip<T, V>(p, [&](auto* strip) {
    using Strip = std::remove_pointer_t<decltype(strip)>;
    for (int64_t thread = 0; thread < plan.threads(p.out_width); ++thread)
      Strip(p, plan, static_cast<uint32_t>(thread)).walk();
  });
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

template <class Params>
fe::Error cpu_only(const Params&, int, void*) {
  return "it runs on a CPU only";
}
#define FE_NO_CUDA(FUNCTION, PARAMS) cpu_only<fe::PARAMS>

#define FE_CALL_WITH(FUNCTION, PARAMS, ON_CUDA)                                                              \
  PyObject* call_##FUNCTION(PyObject*, PyObject* const* arguments, Py_ssize_t positional, PyObject* names) { \
    return entry(arguments, positional, [&](const Target& target, PyObject* const* values) -> PyObject* {    \
      const auto params = read_params<fe::PARAMS>(#FUNCTION, values, names);                                 \
      launch(#FUNCTION, params, target, fe::check_##FUNCTION(params), cpu().FUNCTION, ON_CUDA);              \
      Py_RETURN_NONE;                                                                                        \
    });                                                                                                      \
  }
#define FE_CALL(FUNCTION, PARAMS) FE_CALL_WITH(FUNCTION, PARAMS, FE_CUDA(FUNCTION, PARAMS))
#define FE_CALL_ON_CPU(FUNCTION, PARAMS) FE_CALL_WITH(FUNCTION, PARAMS, FE_NO_CUDA(FUNCTION, PARAMS))
FE_ENTRY_POINTS(FE_CALL)
FE_CPU_ENTRY_POINTS(FE_CALL_ON_CPU)

#define FE_CALL_WORKSPACE(FUNCTION, PARAMS)                                                                  \
  PyObject* call_##FUNCTION(PyObject*, PyObject* const* arguments, Py_ssize_t positional, PyObject* names) { \
    return entry(arguments, positional, [&](const Target& target, PyObject* const* values) {                 \
      const auto params = read_params<fe::PARAMS>(#FUNCTION, values, names);                                 \
      return PyLong_FromLongLong(fe::FUNCTION(params, target.device >= 0));                                  \
    });                                                                                                      \
  }
FE_WORKSPACES(FE_CALL_WORKSPACE)

#define FE_METHOD(FUNCTION, PARAMS)                                                                        \
  {#FUNCTION, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call_##FUNCTION)), METH_FASTCALL | METH_KEYWORDS, \
   nullptr},
PyMethodDef methods[] = {FE_ENTRY_POINTS(FE_METHOD) FE_CPU_ENTRY_POINTS(FE_METHOD) FE_WORKSPACES(FE_METHOD){nullptr, nullptr, 0, nullptr}};

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

  // The work split, so that tests can check that blocks cover every pixel once.
  m.def("plan_blocks", [](bool cuda, int64_t pixels, int64_t channels) {
    const fe::BlockPlan p = fe::plan_blocks(cuda, pixels, channels);
    return py::make_tuple(p.blocks_per_sample, p.pixels_per_block);
  });

  m.def("modulated_layer_shared_bytes", &fe::layer_shared_bytes);

  // The CUDA kernel of upfirdn2d run here, one thread after another, so that tests can check its index maths. Returns the
  // number of blocks and the floats of shared memory a block has.
  m.def("upfirdn2d_blocks", [](bool packs, const py::kwargs& values) {
    const auto params = read_params<fe::UpFirDnParams>("upfirdn2d_blocks", values);
    if (fe::Error error = fe::check_upfirdn2d_fwd(params)) throw std::runtime_error(error);
    const fe::FirTile tile = fe::FE_ISA::plan_fir_tile(params);
    packs ? run_fir_blocks<4>(params, tile) : run_fir_blocks<1>(params, tile);
    return py::make_tuple(tile.blocks(), fe::FE_ISA::fir_tile_floats(params, tile));
  });
  // The same for the kernel of four separable taps, in strips of `rows`. Returns whether it has this filter; where not, nothing is written.
  m.def("upfirdn2d_strips", [](bool packs, int32_t rows, const py::kwargs& values) {
    const auto params = read_params<fe::UpFirDnParams>("upfirdn2d_strips", values);
    if (fe::Error error = fe::check_upfirdn2d_fwd(params)) throw std::runtime_error(error);
    if (!fe::FE_ISA::fir_strips_fit(params)) return false;
    if (params.dtype == fe::kFloat32)
      packs ? run_fir_strips<float, 4>(params, rows) : run_fir_strips<float, 1>(params, rows);
    else if (params.dtype == fe::kBFloat16)
      packs ? run_fir_strips<fe::FE_ISA::BFloat16, 4>(params, rows) : run_fir_strips<fe::FE_ISA::BFloat16, 1>(params, rows);
    else
      packs ? run_fir_strips<fe::FE_ISA::Float16, 4>(params, rows) : run_fir_strips<fe::FE_ISA::Float16, 1>(params, rows);
    return true;
  });

  if (PyModule_AddFunctions(m.ptr(), methods) < 0) throw py::error_already_set();
}
