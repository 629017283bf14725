"""Packages of the tiny weights, built once a test run by what builds the real ones."""

from functools import cache
from pathlib import Path
from tempfile import mkdtemp

from engine.build.make import Order, WeightsForm, make_package
from engine.config import state_dir
from engine.demo.weights import demo_weights
from kernels.arch import Arch
from tests.support.compiled import STATE


@cache
def tiny_package(arch: Arch, weights: WeightsForm | None = None) -> Path:
    """A package of the native program. It must not be changed."""
    folder = Path(mkdtemp(dir=state_dir()))
    order = Order(arch, demo_weights(state_dir()).checkpoint, weights=weights)
    return make_package(order, folder, STATE)
