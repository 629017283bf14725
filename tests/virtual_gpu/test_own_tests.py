"""The tests that run kernels in the interpreter hold for what was compiled of them, too."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("attention", "channel_norm", "cross_attention", "gemm", "modulate", "rope")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_tests_of_a_kernel_pass_on_the_virtual_gpu(name):
    plugin = ["-p", "tests.support.on_virtual_gpu", "-p", "no:cacheprovider"]
    chosen = ["-m", "not slow and not gpu", f"tests/kernels/test_{name}.py"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *plugin, *chosen],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
