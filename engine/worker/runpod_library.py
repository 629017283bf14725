"""Imports the platform's library without what it does to name this machine's processor.

Its debugger, which is off, asks py-cpuinfo for the name while it is imported: 3.0 s of the 4.2 s
that this took on two busy cores. Whoever imports py-cpuinfo later gets the real one.
"""

import sys
from importlib import import_module
from platform import machine
from types import ModuleType

_ASKED = "cpuinfo"


def import_runpod() -> ModuleType:
    """Returns the library. It is imported once for the process, as any module is."""
    if _ASKED in sys.modules:
        return import_module("runpod")
    stand_in = ModuleType(_ASKED)
    vars(stand_in)["get_cpu_info"] = lambda: {"brand_raw": machine()}
    sys.modules[_ASKED] = stand_in
    try:
        return import_module("runpod")
    finally:
        del sys.modules[_ASKED]
