"""Makes what a cold start is measured on: a package, models, its weights as safetensors.

Run by `cold_start.suite` in a process of its own; the last line is one JSON object of paths.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save_file

from engine.build.make import Order, make_package
from engine.config import models_dir, state_dir
from engine.demo.weights import demo_weights
from engine.errors import EngineError
from engine.machine.gpu import find_gpu
from engine.package.folder import open_package
from kernels.arch import ARCHS, SM89, Arch


def main(given: Sequence[str]) -> None:
    """A folder for what is made, and the package if it is not to be the tiny one."""
    try:
        print(json.dumps(scene(Path(given[0]), Path(given[1]) if given[1:] else None)))
    except EngineError as error:
        sys.exit(str(error))


def scene(folder: Path, package: Path | None) -> dict[str, str]:
    models = models_dir()
    if package is None:
        demo = demo_weights(state_dir())
        models, order = demo.models, Order(own_arch(), demo.checkpoint)
        package = make_package(order, folder / "package", state_dir())
    opened = open_package(package)
    weights = folder / "weights.safetensors"
    save_file({name: opened.read(name).clone() for name in opened.names}, weights)
    state = folder / "state"
    state.mkdir()
    return {
        "package": str(opened.path), "models": str(models), "state": str(state),
        "weights": str(weights),
    }  # fmt: skip


def own_arch() -> Arch:
    """The architecture of the GPU; without one the first that packages are built for."""
    gpu = find_gpu()
    capability = SM89.capability if gpu is None else gpu.capability
    return next((arch for arch in ARCHS if arch.capability == capability), SM89)


if __name__ == "__main__":
    main(sys.argv[1:])
