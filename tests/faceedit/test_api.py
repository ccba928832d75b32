# SPDX-License-Identifier: Apache-2.0
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from support.command_line import PACKAGE_ROOT

import faceedit

# Users rely on these names; taking one away is a deliberate edit of this list.
PUBLIC = {
    "EditResult",
    "FaceEditError",
    "__version__",
    "edit",
    "kernels",
    "list_weights",
    "load_editor",
    "load_network",
}


def test_public_surface_is_locked():
    assert set(faceedit.__all__) == PUBLIC
    assert len(PUBLIC) < 15


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_name_resolves(name):
    assert getattr(faceedit, name) is not None
    assert name in dir(faceedit)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="edti"):
        _ = faceedit.edti


def test_import_loads_nothing_heavy(tmp_path):
    code = (
        "import sys, faceedit; "
        "heavy = {'torch', 'numpy', 'cv2', 'PIL', 'triton', 'lightning', 'safetensors'} & set(sys.modules); "
        "sys.exit(f'imported {sorted(heavy)}' if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(PACKAGE_ROOT)},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_version_is_the_projects():
    project = Path(__file__).parents[2] / "pyproject.toml"
    assert tomllib.loads(project.read_text())["project"]["version"] == faceedit.__version__
