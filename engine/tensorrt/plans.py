"""The TensorRT plans of a package: their record, opened with the library, and run by name.

Experimental: no GPU here can run a plan. The library is asked for only when somebody wants its
program; its licence restricts offering that as a hosted service (THIRD_PARTY_NOTICES.md). A plan
is portable, its kernels are compiled on the GPU that runs it, and kept in a cache on disk. Tensors
between a plan's kernels lie in PyTorch's memory, so that all plans share it with everything else
and a lack of it raises the usual error. Source: docs/reference/tensorrt.md 7.
"""

import hashlib
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.diskcache import DiskCache
from engine.errors import BadPackage, BadRequest, Unavailable
from engine.machine.gpu import Gpu
from engine.package.folder import Package
from engine.package.manifest import MEND, from_json
from engine.tensorrt.library import (
    INSTEAD,
    Engine,
    EnumValue,
    ExecutionContext,
    RuntimeCache,
    RuntimeConfig,
    TensorRt,
)
from kernels.spec import KernelError

log = logging.getLogger(__name__)

FOLDER = "plans"  # of a package
TOKENS = "S"  # the one size that a plan leaves open
DTYPES = {"FLOAT": torch.float32, "BF16": torch.bfloat16, "FP8": torch.float8_e4m3fn}
KERNEL_BYTES = 2**30  # the most that compiled kernels take on the disk


@dataclass(frozen=True, slots=True)
class TokenRange:
    """The numbers of tokens that a program takes; kernels are chosen for the usual one. There is no
    FP8 attention for ranges that begin at 16.
    """

    least: int
    usual: int
    most: int


@dataclass(frozen=True, slots=True)
class PlanRecord:
    """One plan, as the manifest has it: a file that the library runs, and what is known of it."""

    file: str
    bytes: int
    sha256: str
    inputs: tuple[object, ...]  # a `Port.record` each
    outputs: tuple[object, ...]
    proof: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class ProgramRecord:
    """A program, as the manifest has it: `block`, or `pre` and `post` around our own attention;
    `context` once a clip for both.
    """

    arch: str
    library: str  # the version whose runtime alone reads the plans
    tokens: TokenRange
    plans: Mapping[str, PlanRecord]  # by segment
    graphs: tuple[str, ...]  # files they were made from, and layer tables: the evidence


@dataclass(frozen=True, slots=True)
class Port:
    """An input or output of a plan, contiguous."""

    name: str
    dtype: torch.dtype
    shape: tuple[int | str, ...]  # `TOKENS` where it depends on the clip

    def sized(self, tokens: int) -> tuple[int, ...]:
        return tuple(tokens if isinstance(size, str) else size for size in self.shape)

    @property
    def kind(self) -> str:
        """The name of the dtype in the library: a key of `DTYPES`."""
        return next(kind for kind, dtype in DTYPES.items() if dtype == self.dtype)

    def record(self) -> list[object]:
        """Describes the port for a manifest. `_read_port` reads it."""
        return [self.name, self.kind, list(self.shape)]


@dataclass(frozen=True, slots=True)
class Host:
    """The machine that plans run on."""

    gpu: Gpu
    stream: Callable[[], int]  # gives the handle of PyTorch's current stream
    kernels: DiskCache  # those that were compiled for plans


def read_record(package: Package) -> ProgramRecord:
    """Reads what a package says of its TensorRT program. Raises `Unavailable` if it has none,
    `BadPackage` if that makes no sense.
    """
    held = package.manifest.tensorrt
    if "absent" in held:
        raise Unavailable(
            f"{package.path} has no TensorRT program: {held['absent']} To make this clip, {INSTEAD}"
        )
    try:
        return from_json(ProgramRecord, dict(held), "tensorrt")
    except ValueError as error:
        raise BadPackage(f"{package.path} is damaged: {error}. {MEND}") from error


class Opener:
    """Owns the library's runtime, and opens the plans of one package."""

    def __init__(self, package: Package, library: TensorRt, host: Host) -> None:
        """Raises what `read_record` raises."""
        self.record = read_record(package)
        self._package, self._library, self._host = package, library, host
        self._errors: deque[str] = deque(maxlen=1)  # the last one of the library
        self._runtime = library.Runtime(_listener(library, self._errors))

    def open(self, name: str) -> "TensorRtPlan":
        """Opens one plan. Raises `BadPackage` if it is missing or damaged, `Unavailable` if the
        GPU, the driver or the library cannot run it.
        """
        if name not in self.record.plans:
            raise BadPackage(f"{self._package.path} has no plan {name}. {MEND}")
        record = self.record.plans[name]
        data = self._package.file(f"{FOLDER}/{record.file}")
        if hashlib.sha256(data).hexdigest() != record.sha256:
            raise BadPackage(f"{record.file} is not the plan that was proven. {MEND}")
        ports = tuple(_read_port(value, record.file) for value in record.inputs)
        outputs = tuple(_read_port(value, record.file) for value in record.outputs)
        start = time.perf_counter()
        self._require_valid(record.file, data)
        engine = self._runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise self.refused(f"{record.file} cannot be opened")
        config = engine.create_runtime_config()
        kernels = self._kernels(record, config)
        strategies = self._library.DynamicShapesKernelSpecializationStrategy
        # A clip's number of tokens is known: its own kernels, not makeshifts for its first steps.
        config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
        # By default it takes what the largest clip would need, for as long as the plan is open.
        allocation = self._library.ExecutionContextAllocationStrategy
        config.set_execution_context_allocation_strategy(allocation.USER_MANAGED)
        context = engine.create_execution_context(config)
        if context is None:
            raise self.refused(f"{record.file} cannot be made ready")
        log.info("%s: opened, %.0f ms", record.file, 1e3 * (time.perf_counter() - start))
        return TensorRtPlan(self, record.file, ports, outputs, engine, context, kernels)

    def refused(self, what: str) -> Unavailable:
        """Makes an error of the library's own words."""
        told = self._errors[-1] if self._errors else "it gives no reason"
        return Unavailable(
            f"{what} by TensorRT-RTX {self._library.__version__} {self._machine}: "
            f"{told.rstrip('. ')}. To make this clip, {INSTEAD}"
        )

    @property
    def stream(self) -> int:
        return self._host.stream()

    @property
    def _machine(self) -> str:
        gpu = self._host.gpu
        return f"on {gpu.name} with driver {gpu.driver or 'of unknown release'}"

    def _require_valid(self, file: str, data: bytes) -> None:
        validity, bits = self._runtime.get_engine_validity(data)
        flags = self._library.EngineInvalidityDiagnostics.__members__.values()
        reasons = ", ".join(flag.name for flag in flags if bits & flag.value) or "no reason given"
        if validity.name == "SUBOPTIMAL":
            log.warning("%s may be slow %s: %s", file, self._machine, reasons)
        elif validity.name != "VALID":
            raise Unavailable(
                f"TensorRT-RTX {self._library.__version__} says that {file} cannot run "
                f"{self._machine}: {reasons}. Take a machine with a newer driver and a GPU of "
                f"{self.record.arch}, or {INSTEAD}"
            )

    def _kernels(self, record: PlanRecord, config: RuntimeConfig) -> "_Kernels":
        """Adds the kernels that were compiled for this plan on this GPU to a configuration."""
        gpu, cache = self._host.gpu, config.create_runtime_cache()
        machine = gpu.name, gpu.uuid, str(gpu.driver), str(gpu.cuda)
        key = "\n".join((*machine, self._library.__version__, record.sha256))
        known = self._host.kernels.read(key)
        if known is not None and not cache.deserialize(known):
            log.warning("kernels kept for %s do not fit any more: compiled again", record.file)
            known = None
        if not config.set_runtime_cache(cache):
            raise self.refused(f"the cache of {record.file} is refused")
        return _Kernels(self._host.kernels, key, cache, known)


class _Kernels:
    """The compiled kernels of one plan: a new number of tokens adds some."""

    def __init__(self, disk: DiskCache, key: str, cache: RuntimeCache, known: bytes | None) -> None:
        self._disk, self._key, self._cache, self._known = disk, key, cache, known

    def keep(self) -> None:
        """Writes them to the disk if they are others than there."""
        found = bytes(self._cache.serialize())
        if found != self._known:
            self._disk.write(self._key, found)
            self._known = found


class TensorRtPlan:
    """One plan on a GPU. It holds no tensor between two runs."""

    def __init__(
        self,
        opener: Opener,
        file: str,
        inputs: tuple[Port, ...],
        outputs: tuple[Port, ...],
        engine: Engine,
        context: ExecutionContext,
        kernels: _Kernels,
    ) -> None:
        self.file, self.inputs, self.outputs = file, inputs, outputs
        self._engine = engine  # must live as long as its context
        self._opener, self._context, self._kernels = opener, context, kernels
        self._tokens: int | None = None  # the number that the context is ready for
        self._scratch_bytes = 0

    def run(self, tensors: Mapping[str, Tensor], tokens: int) -> None:
        """Computes the outputs, which are among the `tensors`, from the inputs, on the current
        stream: memory that is freed after this may be used by whatever runs on it next.

        Raises `BadRequest` for a number of tokens out of the plan's range, `BadPackage` if it has
        ports that are not given, `KernelError` for tensors that it cannot take, `Unavailable` if
        the library refuses.
        """
        ports = *self.inputs, *self.outputs
        if unknown := {port.name for port in ports}.difference(tensors):
            raise BadPackage(
                f"{self.file} wants {min(unknown)}, which this engine does not have. Build the "
                f"package again with this engine, or {INSTEAD}"
            )
        given = [(port, tensors[port.name]) for port in ports]
        for port, tensor in given:
            self._check(port, tensor, tokens)
        is_first = tokens != self._tokens
        start = time.perf_counter()
        if is_first:
            self._resize(tokens)
        for port, tensor in given:
            if not self._context.set_tensor_address(port.name, tensor.data_ptr()):
                raise self._opener.refused(f"{port.name} of {self.file} is refused")
        device = given[0][1].device
        scratch = torch.empty(max(1, self._scratch_bytes), dtype=torch.uint8, device=device)
        self._context.set_device_memory(scratch.data_ptr(), self._scratch_bytes)
        if not self._context.execute_async_v3(self._opener.stream):
            raise self._opener.refused(f"{self.file} is not run")
        if is_first:
            self._kernels.keep()
            took_ms = 1e3 * (time.perf_counter() - start)
            log.info("%s: ready for %d tokens, %.0f ms", self.file, tokens, took_ms)

    def _resize(self, tokens: int) -> None:
        allowed = self._opener.record.tokens
        if not allowed.least <= tokens <= allowed.most:
            raise BadRequest(
                f"A clip of this size and length has {tokens} tokens; {self.file} takes "
                f"{allowed.least} to {allowed.most}. Ask for another size or length, or {INSTEAD}"
            )
        self._tokens = None  # until all of it is done
        for port in self.inputs:
            shape = port.sized(tokens)
            is_open = shape != port.shape
            if is_open and not self._context.set_input_shape(port.name, shape):
                raise self._opener.refused(f"{port.name} {list(shape)} of {self.file} is refused")
        self._scratch_bytes = self._context.update_device_memory_size_for_shapes()
        self._tokens = tokens

    def _check(self, port: Port, tensor: Tensor, tokens: int) -> None:
        """Refuses a tensor that would be read wrongly: the library sees addresses alone."""
        shape = port.sized(tokens)
        if tensor.dtype != port.dtype or tensor.shape != shape or not tensor.is_contiguous():
            raise KernelError(
                f"{self.file} wants {port.name} {list(shape)} {port.dtype} contiguous, got "
                f"{[*tensor.shape]} {tensor.dtype} with strides {[*tensor.stride()]}"
            )


def _read_port(value: object, file: str) -> Port:
    match value:
        case [str(name), str(dtype), [*shape]] if dtype in DTYPES and shape:
            if all(size == TOKENS or (type(size) is int and size > 0) for size in shape):
                return Port(name, DTYPES[dtype], tuple(shape))
    raise BadPackage(f"{file} has the port {str(value)[:80]}, which makes no sense. {MEND}")


def _listener(library: TensorRt, errors: deque[str]) -> object:
    """Makes an `ILogger` for the library, which keeps its errors and writes into our log."""

    def hear(_: object, severity: EnumValue, message: str) -> None:
        is_error = severity.name in ("ERROR", "INTERNAL_ERROR")
        if is_error:
            errors.append(message)
        loud = is_error or severity.name == "WARNING"
        log.log(logging.WARNING if loud else logging.DEBUG, "TensorRT-RTX: %s", message)

    return type("Listener", (library.ILogger,), {"log": hear})()
