"""A package with what runs its operations: kernels on the GPU, or their references on a CPU."""

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

import torch

from engine.denoise.cuda_graphs import CudaGraphRecorder, GraphRecorder
from engine.errors import BadPackage, Unavailable, UnsupportedGpu
from engine.machine.gpu import Gpu, arch_of, find_gpu, require_cudnn, require_driver
from engine.machine.kernel_choice import Choices, attention_kernel, choose_variants, gemm_ways
from engine.models.attention import ATTENTIONS, available, find_attention
from engine.models.vae import Norm, Vae
from engine.package.folder import Package, open_package
from engine.package.search import find_packages
from kernels.aot.cubin import spec_digest
from kernels.arch import ARCHS, Arch
from kernels.attention import FORMS, variants
from kernels.channel_norm import (
    TYPES,
    ChannelNorm,
    channel_norm,
    channel_norm_reference,
    channel_norm_spec,
)
from kernels.fp8 import FORMS as ROW_FORMS
from kernels.fp8 import RowForm
from kernels.launch import KernelBank
from kernels.ops import Ops, native_ops, native_specs, plain_attention, reference_ops
from kernels.spec import Bank
from kernels.trial import trial_ms

log = logging.getLogger(__name__)

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NATIVE = "native"  # the program that every package has


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """The device, the precision and the program that models are run with."""

    device: torch.device
    precision: str  # a key of PRECISIONS
    attention: str | None  # None: the default of what is loaded
    state: Path  # what can be recomputed is kept here
    program: str = NATIVE  # or a key of `engine.tensorrt.block_runner.PROGRAMS`
    gpu_bytes: int | None = None  # of the GPU's memory that are planned with; None: what is free

    @property
    def dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision]

    @property
    def text_dtype(self) -> torch.dtype:
        """UMT5 overflows in FP16 (docs/reference/encoders.md 2.3)."""
        return torch.bfloat16 if self.dtype == torch.float16 else self.dtype


@dataclass(frozen=True, slots=True)
class ChosenPackage:
    """The one package that this process serves, and the GPU that it was chosen for."""

    package: Package
    gpu: Gpu | None  # None: references run it on a CPU

    @property
    def arch(self) -> Arch:
        return next(arch for arch in ARCHS if arch.name == self.package.manifest.arch)


@dataclass(frozen=True, slots=True)
class Program:
    """The operations that a package is made of, bound to what computes them here."""

    ops: Ops
    norm_of: Callable[[Vae], ChannelNorm]  # the norm of a VAE's decoder
    recorder: GraphRecorder | None  # records CUDA graphs; None: every launch is made anew


MakeProgram: TypeAlias = Callable[[ChosenPackage, ModelSettings], Program]


def choose_package(path: Path, device: torch.device) -> ChosenPackage:
    """Opens the package at `path`, or the one of a folder of packages that fits the GPU.

    Raises what `find_gpu`, `arch_of`, `require_driver` and `open_package` raise, and `BadPackage`
    for a package whose kernels are not those of this engine and model; no weights are read. On a
    CPU any package is taken.
    """
    if device.type != "cuda":
        return _known(ChosenPackage(open_package(path), None))
    gpu = find_gpu()
    if gpu is None:
        raise UnsupportedGpu("PyTorch sees a GPU and the CUDA driver shows none. Restart.")
    held = {one.arch for one in find_packages(path)}
    # where there is none, what is wrong with the path says more than which GPU this is
    package = open_package(path, arch_of(gpu, held) if held else None)
    require_driver(gpu, package.manifest.driver)
    require_cudnn(torch.backends.cudnn.version())
    return _known(ChosenPackage(package, gpu))


def _known(chosen: ChosenPackage) -> ChosenPackage:
    """Checks that each operation of the model has a kernel that was compiled from these specs: all
    but products and attentions, and one of the ways to do each of those.
    """
    package, arch, model = chosen.package, chosen.arch, chosen.package.manifest.model
    forms = _forms(package)
    if strange := [form.codes for form in forms if form.codes not in arch.codes]:
        raise BadPackage(
            f"{package.path} holds weights of {' and '.join(strange)}, which {arch.name} does not "
            f"multiply; {' and '.join(arch.codes)} is expected. Build the package again."
        )
    specs = native_specs(model.dim, package.manifest.padded_ffn, forms, arch)
    held = {kernel.name: kernel.spec for kernel in package.kernels}
    is_known = {spec.name: held.get(spec.name) == spec_digest(spec, arch) for spec in specs}
    ways: dict[str, list[str]] = {}
    for name in is_known:
        ways.setdefault(_operation(name), []).append(name)
    for names in ways.values():
        if not any(is_known[name] for name in names):
            what = "compiled from another source" if names[0] in held else "missing"
            raise BadPackage(
                f"{package.path}: the kernel {names[0]}, which a model of width {model.dim} needs, "
                f"is {what}. Build the package again with this engine."
            )
    return chosen


def _operation(kernel: str) -> str:
    """What a kernel does, whichever way: `gemm.i8_tall.gelu` is `gemm.i8.gelu`."""
    first, *rest = kernel.split(".")
    if first == "attention":
        return first
    return ".".join([first, rest[0].split("_")[0], *rest[1:]]) if first == "gemm" else kernel


def _forms(package: Package) -> list[RowForm]:
    """The forms of the weights of the blocks."""
    stored = {entry.dtype for entry in package.manifest.tensors}
    return [form for form in ROW_FORMS if str(form.dtype).removeprefix("torch.") in stored]


def make_program(chosen: ChosenPackage, settings: ModelSettings) -> Program:
    """Binds the package's operations to its kernels on the GPU, or to references on a CPU.

    Raises `Unavailable` for an attention that is not here.
    """
    if chosen.gpu is None:
        attention = settings.attention or chosen.arch.attention
        spec = variants(_form(attention, chosen.arch), chosen.arch)[0]
        ops = _with_attention(reference_ops(spec, chosen.arch), attention, chosen.arch)
        return Program(ops, lambda _: channel_norm_reference, None)
    package, device = chosen.package, settings.device
    torch.zeros(1, device=device)  # makes the context that the bank shares
    bank = KernelBank([], chosen.arch, lambda: torch.cuda.current_stream(device).cuda_stream)
    choices = choose_variants(
        package.kernels, package.digest, chosen.gpu, bank, device, settings.state, trial_ms
    )
    return native_program(chosen, settings, bank, choices, CudaGraphRecorder())


def native_program(
    chosen: ChosenPackage,
    settings: ModelSettings,
    bank: Bank,
    choices: Choices,
    recorder: GraphRecorder | None,
) -> Program:
    """Binds the package's operations to kernels that `bank` holds and that were chosen.

    Raises `Unavailable` for an attention that is not here.
    """
    attention, package = settings.attention or chosen.arch.attention, chosen.package
    ops = native_ops(
        bank,
        chosen.arch,
        attention=attention_kernel(choices, _form(attention, chosen.arch)),
        gemm=gemm_ways(choices, {form.dtype for form in _forms(package)}),
    )
    norm_of = partial(vae_norm, bank, {kernel.name for kernel in package.kernels})
    return Program(_with_attention(ops, attention, chosen.arch), norm_of, recorder)


def _form(attention: str, arch: Arch) -> str:
    """Returns the 8-bit form that is bound before `_with_attention`: the one that was asked for, or
    the architecture's own. Raises `Unavailable` for a form that no kernel of it has.
    """
    form = attention if attention in FORMS else arch.attention
    if not variants(form, arch):
        there = " and ".join(_forms_of(arch))
        raise Unavailable(
            f"{arch.name} has no attention {form}, only {there}. Ask for that, or for none by name."
        )
    return form


def _forms_of(arch: Arch) -> list[str]:
    return [form for form in FORMS if variants(form, arch)]


def vae_norm(bank: Bank, held: Collection[str], vae: Vae) -> ChannelNorm:
    """Chooses the norm of a VAE's decoder: by `bank`, if kernels for its type and channels are
    among those whose names are `held`, else by PyTorch, with a line in the log.
    """
    dtype = vae.conv2.weight.dtype
    norms = [module for module in vae.decoder.modules() if isinstance(module, Norm)]
    channels = sorted({norm.gamma.numel() for norm in norms})
    if dtype in TYPES and all(
        channel_norm_spec(count, dtype, has_branch=has_branch).name in held
        for count in channels
        for has_branch in (False, True)
    ):
        return partial(channel_norm, bank)
    widths = ", ".join(map(str, channels))
    log.info("no kernels for the VAE's norm over %s channels of %s: PyTorch does it", widths, dtype)
    return channel_norm_reference


def _with_attention(ops: Ops, attention: str, arch: Arch) -> Ops:
    """Replaces the self attention if one of 16 bits is called by its name."""
    if attention in FORMS:
        return ops
    if attention not in ATTENTIONS:
        known = ", ".join([*_forms_of(arch), *available()])
        raise Unavailable(f"There is no attention {attention!r} for packages, only {known}.")
    return plain_attention(ops, find_attention(attention))
