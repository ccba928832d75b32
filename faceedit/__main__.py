# SPDX-License-Identifier: Apache-2.0
"""`python -m faceedit` is the `faceedit` command."""

import sys

from faceedit.cli import main

if __name__ == "__main__":
    sys.exit(main())
