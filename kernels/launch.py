"""Launches compiled kernels through the CUDA driver, on the stream that PyTorch is using.

No compiler, no Triton, and no memory of its own: a launch is one call of the driver, and can be
recorded in a CUDA graph. Kernels live in the device's primary context, which PyTorch uses too; a
thread that launches must have used the device before, as any that holds a tensor of it has.
Source: docs/reference/kernels.md 6.
"""

import ctypes
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self, TypeAlias

from kernels.aot.cubin import HIDDEN_POINTERS, WARP, Cubin, spec_digest
from kernels.arch import Arch
from kernels.signature import check_launch, parameters
from kernels.spec import Argument, KernelError, KernelSpec, Tuning

LIBRARY = "libcuda.so.1"  # comes with the driver
FREE_SHARED_BYTES = 48 * 1024  # a block may use more only if its kernel says so
MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES

_Handle = ctypes.c_void_p
_Out = ctypes.POINTER(ctypes.c_void_p)
_SIGNATURES: dict[str, list[type]] = {
    "cuInit": [ctypes.c_uint],
    "cuGetErrorName": [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)],
    "cuDriverGetVersion": [ctypes.POINTER(ctypes.c_int)],
    "cuDeviceGet": [ctypes.POINTER(ctypes.c_int), ctypes.c_int],
    "cuDevicePrimaryCtxRetain": [_Out, ctypes.c_int],
    "cuDevicePrimaryCtxRelease_v2": [ctypes.c_int],
    "cuCtxPushCurrent_v2": [_Handle],
    "cuCtxPopCurrent_v2": [_Out],
    "cuModuleLoadData": [_Out, ctypes.c_void_p],
    "cuModuleGetFunction": [_Out, _Handle, ctypes.c_char_p],
    "cuModuleUnload": [_Handle],
    "cuFuncSetAttribute": [_Handle, ctypes.c_int, ctypes.c_int],
    "cuLaunchKernel": [_Handle, *[ctypes.c_uint] * 7, _Handle, _Out, _Out],
}
_Number: TypeAlias = ctypes.c_int32 | ctypes.c_int64 | ctypes.c_uint64 | ctypes.c_float
_NUMBERS = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}


class DriverError(Exception):
    """The CUDA driver is missing, too old, or refused a call."""

    def __init__(self, message: str, code: int | None = None) -> None:
        super().__init__(message)
        self.code = code  # CUresult


class Driver:
    """The functions of libcuda that are used here. A failing one raises `DriverError`."""

    def __init__(self, library: str = LIBRARY) -> None:
        try:
            self.library = ctypes.CDLL(library)
            for name, types in _SIGNATURES.items():
                getattr(self.library, name).argtypes = types
        except (OSError, AttributeError) as error:
            raise DriverError(f"no CUDA driver: {error}. Install NVIDIA's driver.") from error
        self.call("cuInit", 0)

    def call(self, name: str, *arguments: object, what: str = "") -> None:
        code = getattr(self.library, name)(*arguments)
        if code:
            about = f" for {what}" if what else ""
            raise DriverError(f"{name}{about} failed: {self._reason(code)} ({code})", code)

    def version(self) -> tuple[int, int]:
        """Returns the CUDA release that the driver knows, as (12, 8)."""
        number = ctypes.c_int()
        self.call("cuDriverGetVersion", ctypes.byref(number))
        return number.value // 1000, number.value % 1000 // 10

    def _reason(self, code: int) -> str:
        text = ctypes.c_char_p()
        self.library.cuGetErrorName(code, ctypes.byref(text))
        return (text.value or b"an unknown error").decode()


@dataclass(frozen=True, slots=True)
class _Loaded:
    cubin: Cubin
    module: ctypes.c_void_p
    function: ctypes.c_void_p


class KernelBank:
    """The kernels of one architecture on one device. A `kernels.spec.Bank`, and a resource: `close`
    gives the code and the context back.

    `stream` gives the stream to launch on and is asked at every launch:
    `lambda: torch.cuda.current_stream(device).cuda_stream`.
    """

    def __init__(
        self,
        cubins: Iterable[Cubin],
        arch: Arch,
        stream: Callable[[], int],
        *,
        ordinal: int = 0,
        library: str = LIBRARY,
    ) -> None:
        """Loads all cubins. Raises what `load` raises, and `DriverError` without a driver."""
        self.arch = arch
        self.device = f"cuda:{ordinal}"
        self.driver = Driver(library)
        self._stream = stream
        self._loaded: dict[str, _Loaded] = {}
        self._matched: dict[str, KernelSpec] = {}  # specs that were found equal to their cubins'
        device, self._context = ctypes.c_int(), ctypes.c_void_p()
        self.driver.call("cuDeviceGet", ctypes.byref(device), ordinal)
        self._handle: int | None = device.value
        self.driver.call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), self._handle)
        try:
            for cubin in cubins:
                self.load(cubin)
        except (DriverError, KernelError):
            self.close()
            raise

    def load(self, cubin: Cubin) -> None:
        """Adds a kernel. Raises `DriverError` if this driver or GPU cannot take its code, and
        `KernelError` for a cubin of another architecture or a name that is taken.
        """
        if cubin.arch != self.arch.name:
            raise KernelError(f"kernel {cubin.name} is for {cubin.arch}, not {self.arch.name}")
        if cubin.name in self._loaded:
            raise KernelError(f"kernel {cubin.name} is loaded already")
        if cubin.scratch_bytes:
            raise KernelError(f"kernel {cubin.name} wants {cubin.scratch_bytes} bytes of scratch")
        with self._in_context():
            module, function = ctypes.c_void_p(), ctypes.c_void_p()
            call, name = self.driver.call, cubin.name
            call("cuModuleLoadData", ctypes.byref(module), cubin.data, what=name)
            entry = cubin.entry.encode()
            try:
                call("cuModuleGetFunction", ctypes.byref(function), module, entry, what=name)
                if cubin.shared_bytes > FREE_SHARED_BYTES:
                    wanted = (MAX_DYNAMIC_SHARED, cubin.shared_bytes)
                    call("cuFuncSetAttribute", function, *wanted, what=name)
            except DriverError:
                call("cuModuleUnload", module, what=name)
                raise
        self._loaded[cubin.name] = _Loaded(cubin, module, function)

    def tuning(self, spec: KernelSpec) -> Tuning:
        self._find(spec)
        return spec.tuning[self.arch]

    def launch(self, spec: KernelSpec, grid: Sequence[int], *arguments: Argument) -> None:
        loaded = self._find(spec)
        check_launch(spec, self.device, grid, arguments)
        values = [_value(kind.type, value) for kind, value in zip(parameters(spec), arguments)]
        values += [ctypes.c_uint64(0)] * HIDDEN_POINTERS
        pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        x, y, z = (*grid, 1, 1)[:3]
        self.driver.call(
            "cuLaunchKernel", loaded.function, x, y, z, WARP * loaded.cubin.warps, 1, 1,
            loaded.cubin.shared_bytes, self._stream(), pointers, None, what=spec.name,
        )  # fmt: skip

    def close(self) -> None:
        """Unloads everything. The kernels must have ended: synchronise first."""
        if self._handle is None:
            return
        with self._in_context():
            for loaded in self._loaded.values():
                self.driver.call("cuModuleUnload", loaded.module, what=loaded.cubin.name)
        self._loaded.clear()
        self.driver.call("cuDevicePrimaryCtxRelease_v2", self._handle)
        self._handle = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _find(self, spec: KernelSpec) -> _Loaded:
        """Returns the cubin of a spec, which must have been compiled from the very same spec."""
        loaded = self._loaded.get(spec.name)
        if loaded is None:
            raise KernelError(f"kernel {spec.name} is not loaded, only {', '.join(self._loaded)}")
        if self._matched.get(spec.name) is not spec:
            if self.arch not in spec.tuning or spec_digest(spec, self.arch) != loaded.cubin.spec:
                raise KernelError(
                    f"kernel {spec.name} was compiled from another spec than this program has. "
                    f"Build the package again with this version."
                )
            self._matched[spec.name] = spec
        return loaded

    @contextmanager
    def _in_context(self) -> Iterator[None]:
        self.driver.call("cuCtxPushCurrent_v2", self._context)
        try:
            yield
        finally:
            self.driver.call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))


def _value(kind: str, value: Argument) -> _Number:
    if isinstance(value, int | float):
        return _NUMBERS[kind](value)
    return ctypes.c_uint64(value.data_ptr())
