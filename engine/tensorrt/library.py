"""The library of TensorRT-RTX: its import, and the types of all that is used of it.

It is imported when its program is asked for, and never by itself. Its wheel has no types: those
here declare the calls that are made. Source: docs/reference/tensorrt.md 7.
"""

from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Protocol, cast

from engine.errors import Unavailable

LIBRARY = "tensorrt_rtx"
INSTEAD = "use --program native, which every package has."


class EnumValue(Protocol):
    name: str


class EnumFlag(EnumValue, Protocol):
    value: int


class RuntimeCache(Protocol):
    def deserialize(self, blob: bytes) -> bool: ...
    def serialize(self) -> bytes: ...  # or a buffer that `bytes` takes


class RuntimeConfig(Protocol):
    dynamic_shapes_kernel_specialization_strategy: object

    def create_runtime_cache(self) -> RuntimeCache: ...
    def set_runtime_cache(self, cache: RuntimeCache) -> bool: ...
    def set_execution_context_allocation_strategy(self, strategy: object) -> None: ...


class ExecutionContext(Protocol):
    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool: ...
    def set_tensor_address(self, name: str, memory: int) -> bool: ...
    def update_device_memory_size_for_shapes(self) -> int: ...
    def set_device_memory(self, memory: int, size: int) -> None: ...
    def execute_async_v3(self, stream_handle: int) -> bool: ...


class Engine(Protocol):
    def create_runtime_config(self) -> RuntimeConfig: ...
    def create_execution_context(
        self, runtime_config: RuntimeConfig
    ) -> ExecutionContext | None: ...


class PlanRuntime(Protocol):
    def get_engine_validity(self, buffer: bytes) -> tuple[EnumValue, int]: ...
    def deserialize_cuda_engine(self, serialized_engine: bytes) -> Engine | None: ...


class Flags(Protocol):
    __members__: Mapping[str, EnumFlag]


class Specialization(Protocol):
    EAGER: object


class Allocation(Protocol):
    USER_MANAGED: object


class TensorRt(Protocol):
    """The module `tensorrt_rtx`, as far as it is used."""

    __version__: str
    ILogger: type
    Runtime: Callable[[object], PlanRuntime]
    EngineInvalidityDiagnostics: Flags
    DynamicShapesKernelSpecializationStrategy: Specialization
    ExecutionContextAllocationStrategy: Allocation


def import_library(version: str, name: str = LIBRARY) -> TensorRt:
    """Imports the library in this very version. Raises `Unavailable` if it is not here."""
    mend = f"Run pip install '.[tensorrt]' where the engine's sources are, or {INSTEAD}"
    if find_spec(name) is None:
        raise Unavailable(f"The TensorRT program needs {name} {version}, which is not here. {mend}")
    try:
        found = import_module(name)
    except (ImportError, OSError) as error:  # its wheel is Python, its libraries are other wheels
        raise Unavailable(
            f"The TensorRT program needs {name} {version}, which does not load: {error}. {mend}"
        ) from error
    if found.__version__ != version:
        raise Unavailable(
            f"{name} {found.__version__} is here; the plans of this package are for {version}, and "
            f"no other version reads them. Install that one, build the package again, or {INSTEAD}"
        )
    return cast("TensorRt", found)
