"""The CUDA driver of `fake_driver.c`, compiled and told what to do."""

import ctypes
import os
from pathlib import Path
from shutil import copyfile

from tests.support.compiled import STATE
from virtual_gpu.compiler import compiler, shared_library


def build_driver(folder: Path) -> Path:
    """Returns a library that is libcuda and libnvidia-ml at once."""
    source = Path(__file__).with_name("fake_driver.c")
    made = shared_library([source], STATE / "fake_driver", compiler("c"), ("-Wall", "-Werror"))
    path = folder / "libcuda.so.1"
    copyfile(made, path)
    return path


def with_driver(library: Path, **changes: str) -> dict[str, str]:
    """Returns the environment of a process that finds this driver as the machine's own."""
    nvml = library.with_name("libnvidia-ml.so.1")
    if not nvml.exists():
        nvml.symlink_to(library.name)
    hidden = {"CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH"}
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    return kept | {"LD_LIBRARY_PATH": str(library.parent)} | changes


class FakeDriver:
    """A machine with one RTX 4090 and a driver for CUDA 12.7, until told otherwise."""

    def __init__(self, path):
        self.path = str(path)
        self.library = ctypes.CDLL(self.path)
        self.library.fake_log.restype = ctypes.c_char_p
        self.library.fake_reset()

    def fail(self, name, code):
        """Makes this function fail from now on; no function if the name is empty."""
        self.library.fake_fail(name.encode(), code)

    def refuse(self, code):
        """Refuses machine code that begins with these bytes, as made for another GPU."""
        self.library.fake_refuse(code)

    def gpu(self, name, capability, version=(12, 7), count=1):
        major, minor = version
        self.library.fake_gpu(name.encode(), *capability, 1000 * major + 10 * minor, count)

    def parameters(self, *sizes):
        """Gives the widths in bytes of the next kernel's arguments, whose values it then logs."""
        self.library.fake_parameters((ctypes.c_int * len(sizes))(*sizes), len(sizes))

    def log(self):
        return self.library.fake_log().decode().splitlines()
