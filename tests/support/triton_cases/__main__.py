# SPDX-License-Identifier: Apache-2.0
"""Run the cases named on the command line, all without a name."""

import importlib
import sys

from support.triton_cases import CASES, _drawn

what, *names = sys.argv[1:]
if what == "drawn":
    for name in _drawn.run():
        print("drew", name)
    sys.exit()
for name in names or CASES:
    module = importlib.import_module(f"support.triton_cases.{name}")
    if what == "numbers":
        ran = module.numbers()
        assert ran == module.ROWS, f"{name}: {ran} rows ran on Triton, expected {module.ROWS}"
        print("ran", name, ran)
    else:
        module.compile_all()
