"""The CUDA driver of `fake_driver.c`, compiled and told what to do."""

import ctypes
import os
import subprocess
from pathlib import Path
from shutil import which

import pytest


def build_driver(folder: Path) -> Path:
    """A library that is libcuda and libnvidia-ml at once."""
    if not which("gcc"):
        if os.environ.get("CI") == "true":
            pytest.fail("gcc is not installed")
        pytest.skip("gcc is not installed")
    path = folder / "libcuda.so.1"
    source = Path(__file__).with_name("fake_driver.c")
    subprocess.run(["gcc", "-Wall", "-Werror", "-shared", "-fPIC", "-o", path, source], check=True)
    return path


class FakeDriver:
    """A machine with one RTX 4090 and a driver for CUDA 12.7, until told otherwise."""

    def __init__(self, path):
        self.path = str(path)
        self.library = ctypes.CDLL(self.path)
        self.library.fake_log.restype = ctypes.c_char_p
        self.library.fake_reset()

    def fail(self, name, code):
        """From now on this function does."""
        self.library.fake_fail(name.encode(), code)

    def refuse(self, code):
        """Machine code that begins so is of no GPU that this driver knows."""
        self.library.fake_refuse(code)

    def gpu(self, name, capability, version=(12, 7), count=1):
        major, minor = version
        self.library.fake_gpu(name.encode(), *capability, 1000 * major + 10 * minor, count)

    def log(self):
        return self.library.fake_log().decode().splitlines()
