# SPDX-License-Identifier: Apache-2.0
# The everyday commands, the same for people and for .ci/run. `check` never edits; `fix` does.
.PHONY: setup check fix test test-gpu asan bench ci

setup:
	pip install -e '.[dev]'

check:
	ruff format --check .
	ruff check .
	mypy
	lint-imports

fix:
	ruff check --fix .
	ruff format .

test:
	pytest

test-gpu:
	tests/gpu.sh

asan:
	tests/asan.sh

bench:
	faceedit bench kernels

ci:
	.ci/run
