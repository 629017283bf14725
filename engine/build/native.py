"""Compiles the kernels that a worker needs for an architecture, and proves them."""

from collections.abc import Iterable
from pathlib import Path

from engine.build.quantize import FFN_MULTIPLE, padded_ffn
from engine.config import ModelConfig
from engine.errors import BuildFailed
from kernels.aot.compile import compile_kernels
from kernels.aot.cubin import Cubin
from kernels.arch import Arch
from kernels.fp8 import RowForm
from kernels.ops import native_specs
from kernels.spec import BuildError


def build_native(
    config: ModelConfig, forms: Iterable[RowForm], arch: Arch, state: Path
) -> list[Cubin]:
    """Compiles the kernels for a model whose weights have these forms. Raises `BuildFailed` for a
    model that their tiles cannot cover, and for a kernel that does not compile or lacks its proof.
    """
    if config.dim % FFN_MULTIPLE:
        raise BuildFailed(
            f"The native program takes models whose width is a multiple of {FFN_MULTIPLE}; this "
            f"one is {config.dim} wide."
        )
    specs = native_specs(config.dim, padded_ffn(config), forms, arch)
    wanted = [(spec, arch) for spec in specs]
    try:
        return compile_kernels(wanted, state)
    except BuildError as error:
        raise BuildFailed(f"The native program for {arch.name} cannot be built: {error}") from error
