#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Build the CPU kernels with AddressSanitizer and run the kernel tests on them: a read or write outside a tensor, on any
# instruction set, stops the run with its place in the source. Arguments go to pytest, as `tests/asan.sh -k masked_mse`.
#
# The instrumented module lies in a copy of the package under build/asan; an installed or in-place build is not touched.
# Needs a C++ compiler with libasan, cmake, ninja and pybind11 besides what the tests need.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
python=${PYTHON:-python3}
build=build/asan
libraries=$("${CXX:-c++}" -print-file-name=libasan.so):$("${CXX:-c++}" -print-file-name=libstdc++.so)
if [[ $libraries != /*:/* ]]; then
  echo "tests/asan.sh: libasan was not found beside ${CXX:-c++}; install the compiler's sanitizer library" >&2
  exit 1
fi

mkdir -p "$build"
cmake -S . -B "$build/cmake" -GNinja -DFACEEDIT_CUDA=OFF -DFACEEDIT_SANITIZE=ON \
  -DPython_EXECUTABLE="$("$python" -c 'import sys; print(sys.executable)')" \
  -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$root/$build/module" > "$build/log"
cmake --build "$build/cmake" >> "$build/log"

rm -rf "$build/package"
mkdir -p "$build/package"
cp -rL faceedit "$build/package/"
rm -f "$build"/package/faceedit/kernels/{_C*.so,build_info.json}
cp "$build"/module/_C*.so "$build/package/faceedit/kernels/"
echo '{"native": true, "cuda": false, "reason": "", "cuda_reason": "FACEEDIT_CUDA=off"}' \
  > "$build/package/faceedit/kernels/build_info.json"

# Leaks are the interpreter's own. torch.compile and Triton start compilers, which need none of this: left out.
# -P keeps this folder, and with it the package that is not instrumented, off the path.
export PYTHONPATH="$root/$build/package" ASAN_OPTIONS=detect_leaks=0:abort_on_error=0:exitcode=9
# Spinning workers would stall a busy machine; see the table of hazards in docs/testing.md.
export OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive
export LD_PRELOAD=$libraries

# The instrument itself first: a kernel told that its input is longer than it is must be stopped.
code=0
"$python" -P > "$build/canary" 2>&1 << 'PY' || code=$?
import torch

from faceedit.kernels import native

module, x, y = native.module(), torch.zeros(1024), torch.zeros(4096)
print("module", module.__file__)
none = dict.fromkeys(("scale", "noise", "strength", "bias", "act", "noise_stride", "dtype"), 0)
shape = {"batch": 1, "channels": 1, "pixels": 4096, "channels_last": False, "slope": 0.2, "gain": 1.0, "clamp": -1.0}
module.noise_bias_act_fwd(module.Target(-1, 1, 0), x=x.data_ptr(), y=y.data_ptr(), **none, **shape)
PY
if [ "$code" -ne 9 ] || ! grep -q "module $root/build/asan/.*" "$build/canary" || ! grep -q heap-buffer-overflow "$build/canary"; then
  cat "$build/canary" >&2
  echo "tests/asan.sh: an overread was not stopped; the module is not instrumented" >&2
  exit 1
fi

exec "$python" -P -m pytest -p no:cacheprovider tests/kernels tests/benchmarks \
  --deselect tests/kernels/test_import.py -m 'not slow and not gpu' -k 'not compile' "$@"
