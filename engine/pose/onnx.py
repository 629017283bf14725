"""A network in an ONNX file, run by onnxruntime: on the GPU where that works, else on the CPU.

onnxruntime gives up its CUDA provider in three ways: it was built without, it drops it while the
session opens, or the first kernel fails (1.22 and older on sm_120: cudaErrorInvalidPtx;
docs/reference/runpod.md A.7). So a GPU session is proved with one run before it is believed, and
the log always says which provider runs a file and why. On the GPU a session may take no more memory
than the plan of a clip counts for it.
"""

import importlib
import logging
import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import numpy as np

from engine.errors import BadCheckpoint, MissingModel
from engine.pose.arrays import Floats

Net = Callable[[Floats], list[Floats]]  # one network: an array in, its outputs out
PortShape = tuple[int | None, ...]  # None: any length

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
CUDA_LIBRARY = Path("capi", "libonnxruntime_providers_cuda.so")  # of the wheel for the GPU alone

WORK_BYTES = 512 * 2**20  # for what a network computes, beside its weights; set by hand
_GRAPH_BYTES = 64 * 2**20  # an ONNX file whose weights lie in other files is smaller

log = logging.getLogger(__name__)


class SessionPort(Protocol):
    """An input or output of a session; a dimension that is a name or None may have any length."""

    @property
    def name(self) -> str: ...
    @property
    def type(self) -> str: ...
    @property
    def shape(self) -> Sequence[int | str | None]: ...


class Session(Protocol):
    """The part of `onnxruntime.InferenceSession` in use."""

    def get_providers(self) -> Sequence[str]: ...
    def get_inputs(self) -> Sequence[SessionPort]: ...
    def get_outputs(self) -> Sequence[SessionPort]: ...
    def run(self, names: None, feed: Mapping[str, Floats], /) -> Sequence[object]: ...


@dataclass(frozen=True, slots=True)
class OnnxRuntime:
    """The part of onnxruntime in use; a test gives its own."""

    providers: Callable[[], Sequence[str]]
    open: Callable[[Path, Sequence[str]], Session]


class OnnxNetwork:
    """One float32 picture-like array in, the network's arrays out."""

    def __init__(
        self,
        path: Path,
        takes: tuple[int, ...],
        gives: Sequence[PortShape],
        *,
        gpu: bool,
        runtime: OnnxRuntime | None = None,
    ) -> None:
        """`takes`, `gives`: shapes of the input and of the outputs, in the file's order.

        Raises `MissingModel` if there is no such file and `BadCheckpoint` if it is damaged or its
        input and outputs are those of another network.
        """
        if not path.is_file():
            raise MissingModel(f"There is no file {path}.")
        self.path = path
        self._takes, self._gives = takes, gives
        self._session = self._open(runtime or OnnxRuntime(_providers, _open_file), gpu)
        self.provider = self._session.get_providers()[0]

    def __call__(self, x: Floats) -> list[Floats]:
        return self._run(self._session, x)

    def _open(self, runtime: OnnxRuntime, gpu: bool) -> Session:
        held = runtime.providers()
        if not gpu:
            log.info("%s runs on %s: no GPU was asked for", self.path.name, CPU)
        elif CUDA not in held:
            log.warning("%s runs on %s: onnxruntime has %s", self.path.name, CPU, ", ".join(held))
        else:
            proved = self._prove(runtime)
            if proved is not None:
                return proved
        try:
            session = runtime.open(self.path, [CPU])
        except _failures() as error:
            raise BadCheckpoint(
                f"onnxruntime cannot open {self.path.name} ({self.path.stat().st_size} bytes): "
                f"{_first_line(error)}. Is it whole, and is its data file beside it?"
            ) from error
        self._check(session)
        return session

    def _prove(self, runtime: OnnxRuntime) -> Session | None:
        """A GPU session that has computed once, or None with the reason in the log."""
        try:
            session = runtime.open(self.path, [CUDA, CPU])
            if session.get_providers()[0] == CUDA:
                self._check(session)
                self._run(session, np.zeros(self._takes, np.float32))
                log.info("%s runs on %s: proved by one run", self.path.name, CUDA)
                return session
            reason = "onnxruntime gave its CUDA provider up"
        except _failures() as error:
            reason = f"the GPU failed: {_first_line(error)}"
        log.warning("%s runs on %s, which is slower: %s", self.path.name, CPU, reason)
        return None

    def _check(self, session: Session) -> None:
        inputs, outputs = session.get_inputs(), session.get_outputs()
        kinds = {node.type for node in (*inputs, *outputs)}
        if (
            len(inputs) != 1
            or len(outputs) != len(self._gives)
            or not _fits(inputs[0].shape, self._takes)
            or not all(_fits(node.shape, want) for node, want in zip(outputs, self._gives))
        ):
            raise BadCheckpoint(
                f"{self.path.name} takes {_shapes(inputs)} and gives {_shapes(outputs)}; expected "
                f"{_text(self._takes)} and {' '.join(map(_text, self._gives))}. "
                "It is the file of another network."
            )
        if kinds != {"tensor(float)"}:
            raise BadCheckpoint(
                f"{self.path.name} works in {', '.join(sorted(kinds))}; expected tensor(float). "
                "Use the float32 export."
            )

    def _run(self, session: Session, x: Floats) -> list[Floats]:
        outputs: list[Floats] = []
        for got, want in zip(session.run(None, {session.get_inputs()[0].name: x}), self._gives):
            if not isinstance(got, np.ndarray) or not _fits(got.shape, want):
                found = _text(got.shape) if isinstance(got, np.ndarray) else type(got).__name__
                raise BadCheckpoint(
                    f"{self.path.name} gave {found}; expected {_text(want)}. "
                    "It is the file of another network."
                )
            outputs.append(got)
        return outputs


def gpu_bytes(network: Path) -> int:
    """Counts the bytes that a network may take on the GPU; 0 where onnxruntime is for the CPU.

    onnxruntime itself is not imported, which takes longer than a start should.
    """
    runtime = find_spec("onnxruntime")
    folders = runtime.submodule_search_locations if runtime is not None else None
    if not any(Path(folder, CUDA_LIBRARY).is_file() for folder in folders or ()):
        return 0
    return WORK_BYTES + sum(file.stat().st_size for file in (network, *weight_files(network)))


def weight_files(network: Path) -> Iterator[Path]:
    """The files beside an ONNX file that hold its weights: those whose names it mentions.

    ViTPose-H has more weights than one ONNX file may hold.
    """
    if not 0 < network.stat().st_size <= _GRAPH_BYTES:
        return
    with network.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as graph:
        for beside in sorted(network.parent.iterdir()):
            if beside != network and beside.is_file() and graph.find(beside.name.encode()) >= 0:
                yield beside


def provider_options(path: Path, providers: Sequence[str]) -> list[tuple[str, dict[str, str]]]:
    """Pairs providers with their options: the GPU's memory grows as asked, up to `gpu_bytes`."""
    limited = {
        "gpu_mem_limit": str(gpu_bytes(path)),
        "arena_extend_strategy": "kSameAsRequested",  # else it doubles with each extension
        "cudnn_conv_algo_search": "HEURISTIC",  # the exhaustive search takes all memory it finds
        "cudnn_conv_use_max_workspace": "0",
    }
    return [(provider, limited if provider == CUDA else {}) for provider in providers]


def _providers() -> Sequence[str]:
    import onnxruntime  # here, and not when a worker starts: many jobs bring their motion

    return onnxruntime.get_available_providers()


def _open_file(path: Path, providers: Sequence[str]) -> Session:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors alone: the rest is in our own log
    # With its own fallback on, onnxruntime may swap a failing GPU for the CPU and only print so.
    return onnxruntime.InferenceSession(
        path, options, providers=provider_options(path, providers), enable_fallback=False
    )


@cache
def _failures() -> tuple[type[Exception], ...]:
    """The exceptions of onnxruntime; its own classes share no base but Exception."""
    core = importlib.import_module("onnxruntime.capi.onnxruntime_pybind11_state")
    own = (kind for kind in vars(core).values() if isinstance(kind, type))
    return (RuntimeError, ValueError, *(kind for kind in own if issubclass(kind, Exception)))


def _fits(found: Sequence[int | str | None], expected: PortShape) -> bool:
    """True if the shapes agree; a length that the file only names fits any other."""
    return len(found) == len(expected) and all(
        want is None or not isinstance(have, int) or have == want
        for have, want in zip(found, expected)
    )


def _shapes(nodes: Sequence[SessionPort]) -> str:
    return " ".join(f"{node.name} {_text(node.shape)}" for node in nodes) or "nothing"


def _text(shape: Sequence[int | str | None]) -> str:
    return f"[{', '.join('?' if length is None else str(length) for length in shape)}]"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
