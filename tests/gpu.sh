#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Every check that needs a GPU, and the GPU benchmarks, into one JSON file.
#
#   tests/gpu.sh                       everything
#   tests/gpu.sh tests memcheck        only these of: tests memcheck racecheck benchmark edit
#   tests/gpu.sh benchmark -- --op masked_mse --provider eager --provider cuda
#                                      what follows -- goes to `faceedit bench kernels`,
#   tests/gpu.sh edit -- --batch 1     or, with this stage, to `faceedit bench maskfacegan`
#
# The file is docs/benchmarks/<gpu>-<commit>.json (FACEEDIT_GPU_JSON=FILE: that one); a later run adds its stages to it.
# Needs faceedit's requirements, pytest, pytest-xdist and hypothesis; the CUDA rows also need the native module with CUDA
# (`python setup.py build_ext --inplace`), the sanitizer stages compute-sanitizer. Exit code 1 if a stage failed.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
python=${PYTHON:-python3}
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" KINETO_LOG_LEVEL=99
stages=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do stages+=("$1"); shift; done
if [ $# -gt 0 ]; then shift; fi
options=("$@")
if [ ${#stages[@]} -eq 0 ]; then stages=(tests memcheck racecheck benchmark edit); fi
takers=()
for name in "${stages[@]}"; do
  case $name in
    tests | memcheck | racecheck) ;;
    benchmark | edit) takers+=("$name") ;;
    *) echo "tests/gpu.sh: a stage must be tests, memcheck, racecheck, benchmark or edit, got '$name'" >&2; exit 2 ;;
  esac
done
if [ ${#options[@]} -gt 0 ] && [ ${#takers[@]} -ne 1 ]; then
  echo "tests/gpu.sh: options after -- must belong to one stage, benchmark or edit, got ${stages[*]}; name one of them" >&2
  exit 2
fi

if ! gpu=$("$python" -c 'import torch; assert torch.cuda.is_available(); print(torch.cuda.get_device_name(0))' 2> /dev/null); then
  echo "tests/gpu.sh: no CUDA device was found by $python; run it on a machine with a GPU and PyTorch" >&2
  exit 1
fi

write_record() {
  "$python" - "$work" "$json" << 'PY'
import json
import sys
from pathlib import Path

from faceedit.kernels.benchmarking import machine

work, target = Path(sys.argv[1]), Path(sys.argv[2])
record = json.loads(target.read_text()) if target.exists() else {"checks": {}}
record["machine"] = machine.describe("cuda")
for path in sorted(work.glob("*.stage")):
    code, seconds, command = path.read_text().splitlines()
    entry = {"result": {"0": "passed", "skipped": "skipped"}.get(code, "failed"), "seconds": int(seconds), "command": command}
    log = path.with_suffix(".log")
    if log.exists():
        lines = log.read_text(errors="replace").splitlines()
        entry["output"] = lines[-1:] if entry["result"] == "passed" else lines[-40:]
    record["checks"][path.stem] = entry
for stage, kept in (("benchmark", "benchmarks"), ("edit", "edits")):
    if (work / f"{stage}.json").exists():
        record.setdefault(kept, []).append(json.loads((work / f"{stage}.json").read_text()))
target.write_text(json.dumps(record, indent=1) + "\n")
print(f"wrote {target}")
PY
}

# However it ends, what was measured until then is kept.
finish() {
  local code=$?
  trap - EXIT
  if compgen -G "$work/*.stage" > /dev/null; then write_record || code=1; fi
  rm -rf "$work"
  exit "$code"
}

work=$(mktemp -d)
trap finish EXIT
commit=$(git rev-parse --short=12 HEAD 2> /dev/null || echo unknown)
name=$(printf '%s' "$gpu" | tr -c 'A-Za-z0-9' '-' | tr 'A-Z' 'a-z')
json=${FACEEDIT_GPU_JSON:-docs/benchmarks/$name-$commit.json}
mkdir -p "$(dirname "$json")"
failed=0

# stage NAME COMMAND...: run it, show its output, and keep exit code, seconds and the output's end.
stage() {
  local name=$1 start=$SECONDS code=0
  shift
  printf '== %s: %s\n' "$name" "$*"
  "$@" > "$work/$name.log" 2>&1 || code=$?
  tail -n 40 "$work/$name.log"
  printf '%s\n%s\n%s\n' "$code" "$((SECONDS - start))" "$*" > "$work/$name.stage"
  printf '== %s: exit code %d after %d s\n' "$name" "$code" "$((SECONDS - start))"
  if [ "$code" -ne 0 ]; then failed=1; fi
}

# Without PyTorch's caching allocator every tensor is an allocation of its own, whose ends the tool watches.
sanitize() {
  if ! command -v compute-sanitizer > /dev/null; then
    printf 'skipped\n0\ncompute-sanitizer was not found\n' > "$work/$1.stage"
    printf '== %s: skipped, compute-sanitizer was not found\n' "$1"
    return
  fi
  stage "$1" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 9 \
    "$python" -m faceedit bench kernels --check --device cuda --provider cuda --provider triton
}

for name in "${stages[@]}"; do
  case $name in
    tests)
      # Compiling for Triton is most of it, on one core each.
      stage tests "$python" -m pytest -q -n auto -p no:cacheprovider tests/kernels \
        tests/faceedit/test_maskfacegan_optimizer.py tests/faceedit/test_resizing.py -m gpu
      ;;
    memcheck | racecheck) sanitize "$name" ;;
    benchmark) stage benchmark "$python" -m faceedit bench kernels --device cuda --json "$work/benchmark.json" "${options[@]}" ;;
    edit) stage edit "$python" -m faceedit bench maskfacegan --device cuda --json "$work/edit.json" "${options[@]}" ;;
  esac
done
exit "$failed"
