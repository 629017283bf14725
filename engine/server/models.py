"""Finds the models that the service can run, and has one of them loaded at a time.

The packages of a folder may be of both kinds. Two models of 14B do not fit on one GPU, so a job for
the other one has the first let go.
"""

import gc
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from engine.config import KINDS
from engine.demo.presets import PRESETS, Preset, preset_of
from engine.errors import EngineError, Unavailable
from engine.flow import KindName, Settings
from engine.jobs.served import Served
from engine.package.search import Held, find_packages
from engine.program import ChosenPackage, choose_package
from engine.server.demo_renderer import load_demo, served_by_demo, usual_of
from engine.worker.endpoint import Endpoint
from engine.worker.outlet import Outlet
from engine.worker.renderer import renderer_of
from engine.worker.scratch import Scratch
from engine.worker.service import Renderer, Worker
from engine.worker.serving import served_by

log = logging.getLogger(__name__)

_SHIPPED = ("nano", "nano-scail2")  # where no package is named

Load = Callable[[Endpoint], Renderer]


@dataclass(frozen=True, slots=True)
class Model:
    """A model that was found, whether it can be run here or not."""

    name: KindName
    served: Served  # what can be asked of it
    demo: Preset | None  # None: a real one
    load: Load | None  # None: it cannot be run, and `why` says why
    why: str | None = None


def find_models(package: Path | None, device: torch.device, allows_cpu: bool) -> list[Model]:
    """Finds the models of a package or of a folder of packages; without it the shipped demos.

    Raises `EngineError` where there is none at all. No weights are read.
    """
    if package is None:
        return [_demo(PRESETS[name], device) for name in _SHIPPED]
    held = [one for one in find_packages(package) if one.kind is not None]
    kinds: dict[KindName, None] = dict.fromkeys(one.kind for one in held if one.kind is not None)
    found = [_of_kind(kind, held, package, device, allows_cpu) for kind in kinds]
    if not found:
        choose_package(package, device)  # says what is wrong with it
    if not any(one.load for one in found):
        raise Unavailable(" ".join(one.why or "" for one in found))
    return found


def _demo(preset: Preset, device: torch.device) -> Model:
    served = served_by_demo(preset)
    load = partial(load_demo, preset, device=device)
    return Model(served.kind.name, served, preset, load)


def _of_kind(
    kind: KindName, held: Sequence[Held], package: Path, device: torch.device, allows_cpu: bool
) -> Model:
    """Chooses the package of a kind that fits the GPU."""
    of_kind = {one.path for one in held if one.kind == kind}
    folder = package if package in of_kind else package / kind
    if not of_kind & {package} and not any(path.parent == folder for path in of_kind):
        folder = next(iter(of_kind))  # from the time of one kind, DIR/ARCH
    try:
        chosen = choose_package(folder, device)
        preset = preset_of(chosen.package.manifest.model)
        if device.type == "cpu" and preset is None and not allows_cpu:
            raise Unavailable(
                f"There is no GPU here, and {KINDS[kind].title} takes hours for a clip without "
                "one. Take a machine with a GPU, or set SCAIL_ALLOW_CPU=1."
            )
    except EngineError as error:
        log.warning("%s cannot be served: %s", KINDS[kind].title, error)
        return Model(kind, Served(KINDS[kind], KINDS[kind].modes), None, None, str(error))
    served = served_by(chosen.package.manifest)
    usual = None if preset is None else usual_of(preset)
    load = partial(_load_package, chosen, usual=usual, device=device)
    return Model(kind, replace(served, usual=usual), preset, load)


def _load_package(
    chosen: ChosenPackage, endpoint: Endpoint, usual: Settings | None, device: torch.device
) -> Renderer:
    renderer = renderer_of(chosen, endpoint, device)
    return replace(renderer, served=replace(renderer.served, usual=usual))


class Models:
    """Owns the one worker that has a model loaded."""

    def __init__(self, found: Sequence[Model], endpoint: Endpoint, outlet: Outlet) -> None:
        self.found: dict[KindName, Model] = {one.name: one for one in found}
        self._endpoint, self._outlet = endpoint, outlet
        self._one_at_a_time = threading.Lock()  # who was called off leaves a loading thread
        self._worker: Worker | None = None
        self.loaded: KindName | None = None
        self.is_ending = False

    @property
    def usual(self) -> KindName:
        """The model of jobs that name none: the first that can be run."""
        models = [*self.found.values()]
        return next((one for one in models if one.load), models[0]).name

    def health(self) -> dict[str, object] | None:
        """Tells how the loaded worker is; None while there is none."""
        worker = self._worker
        return None if worker is None or self.loaded is None else worker.health()

    def worker(self, name: KindName) -> Worker:
        """Returns the worker of a model, which is loaded if another one is. Takes its time.

        Raises `Unavailable`, and what loading raises: the next job tries it again.
        """
        model = self.found[name]
        if model.load is None:
            raise Unavailable(model.why or "This model cannot be run here.")
        with self._one_at_a_time:
            if self._worker is not None and self.loaded == name:
                return self._worker
            self._let_go()
            try:
                return self._started(name, model.load)
            except BaseException:
                self._let_go()
                raise

    def _started(self, name: KindName, load: Load) -> Worker:
        # a folder of scratch folders for each model: a process may have one in each
        scratch = Scratch(self._endpoint.scratch / name)
        worker = self._worker = Worker(self._endpoint, scratch, self._outlet)
        worker.start(load)
        if worker.problem is not None:
            raise worker.problem
        self.loaded = name
        return worker

    def let_go(self) -> None:
        """Has the loaded model leave the memory."""
        with self._one_at_a_time:
            self._let_go()

    def _let_go(self) -> None:
        worker, self._worker, self.loaded = self._worker, None, None
        if worker is None:
            return
        worker.close()
        del worker
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @property
    def is_busy(self) -> bool:
        """Tells whether a job goes on, or a model is being loaded."""
        health = None if self._worker is None else self._worker.health()
        return self._one_at_a_time.locked() or (health is not None and health["status"] == "busy")

    def end(self, patience_s: float) -> None:
        """Ends the job at hand, or leaves it alone after so many seconds, and removes its files."""
        self.is_ending = True
        worker = self._worker
        if worker is not None:
            worker.call_off(patience_s)
            worker.leave()
