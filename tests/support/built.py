"""Packages of the tiny weights, built once a test run by what builds the real ones."""

from functools import cache
from pathlib import Path
from tempfile import mkdtemp

from engine.build.make import Order, make_package
from engine.config import state_dir
from engine.demo.presets import PRESETS
from engine.flow import KindName
from engine.package.manifest import WeightsForm
from kernels.arch import Arch
from tests.support.compiled import STATE

TINY_PRESETS: dict[KindName, str] = {"preview": "tiny", "scail2": "tiny-scail2"}


@cache
def tiny_package(
    arch: Arch, weights: WeightsForm | None = None, kind: KindName = "preview"
) -> Path:
    """A package of the native program. It must not be changed."""
    folder = Path(mkdtemp(dir=state_dir()))
    demo = PRESETS[TINY_PRESETS[kind]].weights(state_dir())
    return make_package(Order(arch, demo.checkpoint, weights=weights), folder, STATE)
