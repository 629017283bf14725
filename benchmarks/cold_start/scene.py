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
    """Makes everything in a folder, and the package too unless it is given after the folder."""
    folder, models = Path(given[0]), models_dir()
    if given[1:]:
        package = Path(given[1])
    else:
        demo = demo_weights(state_dir())
        models = demo.models
        package = make_package(Order(own_arch(), demo.checkpoint), folder / "package", state_dir())
    opened = open_package(package)
    weights, state = folder / "weights.safetensors", folder / "state"
    save_file({name: opened.read(name).clone() for name in opened.names}, weights)
    state.mkdir()
    made = {"package": opened.path, "models": models, "state": state, "weights": weights}
    print(json.dumps({name: str(path) for name, path in made.items()}))


def own_arch() -> Arch:
    """The architecture of the GPU; without one the first that packages are built for."""
    gpu = find_gpu()
    capability = SM89.capability if gpu is None else gpu.capability
    return next((arch for arch in ARCHS if arch.capability == capability), SM89)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except EngineError as error:
        sys.exit(str(error))
