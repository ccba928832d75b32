#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Build the CPU kernels with AddressSanitizer and run the kernel tests on them: a read or write outside a tensor, on any
# instruction set, stops the run with its place in the source. Arguments go to pytest, as `tests/asan.sh -k masked_mse`;
# files named there are run in place of all.
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
"$python" -P tests/support/overread.py 4096 > "$build/canary" 2>&1 || code=$?
if [ "$code" -ne 9 ] || ! grep -q "module $root/build/asan/.*" "$build/canary" || ! grep -q heap-buffer-overflow "$build/canary"; then
  cat "$build/canary" >&2
  echo "tests/asan.sh: an overread was not stopped; the module is not instrumented" >&2
  exit 1
fi

chosen='not compile' paths=() options=()
while [ $# -gt 0 ]; do
  case $1 in
    -k) chosen="($2) and not compile"; shift ;;
    *) if [ -e "${1%%::*}" ]; then paths+=("$1"); else options+=("$1"); fi ;;
  esac
  shift
done
if [ ${#paths[@]} -eq 0 ]; then paths=(tests/kernels tests/benchmarks); fi
exec "$python" -P -m pytest -p no:cacheprovider "${paths[@]}" --deselect tests/kernels/test_import.py \
  -m 'not slow and not gpu' -k "$chosen" "${options[@]}"
