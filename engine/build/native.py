"""Which kernels a worker needs, compiled for an architecture and proven."""

from collections.abc import Iterable
from pathlib import Path

import torch

from engine.build.quantize import FFN_MULTIPLE, padded_ffn
from engine.config import ModelConfig
from engine.errors import BuildFailed
from kernels.arch import Arch
from kernels.attention import ATTENTION, formats
from kernels.channel_norm import CHANNEL_NORM
from kernels.compile import compile_kernels
from kernels.cross_attention import CROSS_ATTENTION
from kernels.cubin import Cubin
from kernels.gemm import GEMM
from kernels.modulate import modulate_spec, quantize_spec
from kernels.rope import rms_inverse_spec, rope_specs
from kernels.spec import BuildError, KernelSpec


def native_specs(
    config: ModelConfig, formats_used: Iterable[torch.dtype], arch: Arch
) -> list[KernelSpec]:
    """All forms of attention, and of each product all ways that were not measured against each
    other: a worker chooses. `formats_used` are those of the linears' rows. The VAE's norm too.
    """
    dim, dtypes = config.dim, sorted(set(formats_used), key=str)
    specs = [CROSS_ATTENTION, rms_inverse_spec(dim, 1), *CHANNEL_NORM.values()]
    for dtype in dtypes:
        specs.append(modulate_spec(dim, dtype))
        specs += [quantize_spec(width, dtype) for width in sorted({dim, padded_ffn(config)})]
    for way in GEMM.values():
        if way.dtype in dtypes:
            specs += way.specs
    for spec in ATTENTION.values():
        if arch in spec.tuning:
            qk, v, _ = formats(spec)
            specs += [spec, *rope_specs(dim, qk, v)]
    unique = {spec.name: spec for spec in specs if arch in spec.tuning}
    return [unique[name] for name in sorted(unique)]


def build_native(
    config: ModelConfig, formats_used: Iterable[torch.dtype], arch: Arch, state: Path
) -> list[Cubin]:
    """Raises `BuildFailed` for a model that the kernels' tiles cannot cover, and for a kernel that
    does not compile or lacks its proof.
    """
    if config.dim % FFN_MULTIPLE:
        raise BuildFailed(
            f"The native program takes models whose width is a multiple of {FFN_MULTIPLE}; this "
            f"one is {config.dim} wide."
        )
    wanted = [(spec, arch) for spec in native_specs(config, formats_used, arch)]
    try:
        return compile_kernels(wanted, state)
    except BuildError as error:
        raise BuildFailed(f"The native program for {arch.name} cannot be built: {error}") from error
