"""From files to a pipeline that is ready for its first job."""

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from engine.conditioning import Encoders
from engine.denoise.block_runner import LaunchedBlocks
from engine.denoise.cuda_graphs import CudaGraphRecorder, GraphedBlocks, GraphRecorder
from engine.denoise.exact import ExactDenoiser
from engine.denoise.packaged import PackagedDenoiser
from engine.errors import BadPackage, MissingModel, Unavailable, UnsupportedGpu
from engine.machine.gpu import Gpu, arch_of, find_gpu, require_cudnn, require_driver
from engine.machine.kernel_choice import attention_kernel, choose_variants, gemm_ways
from engine.machine.resident import Resident
from engine.machine.upload import PackageWeights
from engine.media.framing import frames_to_u8
from engine.memory import ClipShape, EncoderBytes, MemoryPlan, plan
from engine.models.attention import ATTENTIONS, find_attention
from engine.models.checkpoint import Checkpoint
from engine.models.locate import IMAGE_ENCODER, TEXT_ENCODER, VAE, find_model
from engine.models.lora import Lora
from engine.models.stored_prompts import StoredPrompts, load_prompts
from engine.models.text import embed_prompts, encoder_bytes
from engine.models.vae import Norm, Vae, load_vae
from engine.models.vae_decode import VaeDecoder
from engine.models.vision import VisionEncoder
from engine.package.folder import Package, find_packages, open_package
from engine.package.manifest import PROMPTS
from engine.pipeline import Pipeline
from engine.pose.capture import capture_skeleton
from engine.pose.extract import PoseExtractor
from engine.pose.networks import Networks
from engine.residency import Memory, Movable
from engine.source import MotionCapture
from engine.tensorrt.block_runner import open_program
from kernels.arch import ARCHS, Arch
from kernels.attention import FORMS, variants
from kernels.channel_norm import (
    TYPES,
    ChannelNorm,
    channel_norm,
    channel_norm_reference,
    channel_norm_spec,
)
from kernels.fp8 import LIMITS
from kernels.launch import KernelBank
from kernels.ops import Ops, native_ops, native_specs, plain_attention, reference_ops
from kernels.spec import Bank, KernelError, KernelSpec
from kernels.trial import event_ms

log = logging.getLogger(__name__)

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


NATIVE = "native"  # the program that every package has
DEFAULT_ATTENTION = "int8fp8"  # of packages: of the 8-bit forms the more exact


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """How the models are run."""

    device: torch.device
    precision: str  # a key of PRECISIONS
    attention: str | None  # None: the default of what is loaded
    state: Path  # what can be recomputed is kept here
    program: str = NATIVE  # or a key of `engine.tensorrt.block_runner.PROGRAMS`

    @property
    def dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision]

    @property
    def text_dtype(self) -> torch.dtype:
        """UMT5 overflows in FP16 (docs/reference/encoders.md 2.3)."""
        return torch.bfloat16 if self.dtype == torch.float16 else self.dtype


def load_exact(
    checkpoint: Path,
    loras: Sequence[tuple[Path, float]],
    models: Path,
    networks: Networks,
    settings: ModelSettings,
) -> Pipeline:
    """The plain PyTorch model of a checkpoint, and the other models from a models folder.

    All files are found and checked before the first weight is read, but for the motion capture
    `networks`: not every job needs them.
    """
    attention = find_attention(settings.attention or "sdpa")
    opened = Checkpoint(checkpoint, loras=[Lora(path, strength) for path, strength in loras])
    found = _find_models(models)
    denoiser = ExactDenoiser(opened, settings.device, settings.dtype, attention)
    text, vision, vae = _encoders(found, None, settings)

    def decode(latents: Tensor) -> Iterator[Tensor]:
        return map(frames_to_u8, vae.decode(latents))

    encoders = Encoders(text, vision, vae, decode)
    return Pipeline(denoiser, encoders, _capture(networks, settings), Memory.unplanned())


def load_package(path: Path, models: Path, networks: Networks, settings: ModelSettings) -> Pipeline:
    """A package, or the one of a folder of packages that fits the GPU, and the other models.

    Without a GPU the references compute what the kernels of any package do. Raises what
    `find_gpu`, `arch_of`, `require_driver` and `open_package` raise, all before weights are read.
    """
    on_gpu = settings.device.type == "cuda"
    native = _native(path, settings) if on_gpu else _references(path, settings)
    package = native.package
    stored = _stored_prompts(package)
    found = _find_models(models, needs_text=stored is None)
    graphed = partial(GraphedBlocks, record=native.capture) if native.capture else None
    make_steps = LaunchedBlocks
    if settings.program != NATIVE:
        made = package, settings.program, native.gpu, settings.state
        make_steps = open_program(*made, lambda: torch.cuda.current_stream().cuda_stream)
        graphed = None  # the library's launches are not recorded
    with ThreadPoolExecutor(1, "encoders") as pool:  # they load while the transformer streams
        encoding = pool.submit(_encoders, found, stored, settings)
        weights = PackageWeights(package, settings.device)
        denoiser = PackagedDenoiser(weights, native.ops, graphed, make_steps)
        text, vision, vae = encoding.result()
    decoder = VaeDecoder(vae, native.norm_of(vae), frames_to_u8, native.capture)
    device, host = settings.device, torch.device("cpu")
    homes = (
        Resident(lambda: vision.move(device), lambda: vision.move(host)),
        Resident(lambda: vae.to(device), lambda: vae.to(host)),
    )
    encoders = Encoders(text, vision, vae, decoder.decode, *(homes if on_gpu else ()))
    movable = Movable(
        denoiser.home,
        encoders.vision_home,
        encoders.vae_home,
        denoiser.use_graphs,
        {"denoise": denoiser.forget, "decode": decoder.release},
    )
    memory = Memory(_planner(native, found, encoders, settings), movable)
    return Pipeline(denoiser, encoders, _capture(networks, settings), memory)


@dataclass(frozen=True, slots=True)
class _Native:
    """A package and what runs it."""

    package: Package
    ops: Ops
    norm_of: Callable[[Vae], ChannelNorm]
    capture: GraphRecorder | None
    gpu: Gpu | None


def _native(path: Path, settings: ModelSettings) -> _Native:
    """The package for this GPU, and its kernels on it."""
    gpu = find_gpu()
    if gpu is None:
        raise UnsupportedGpu("PyTorch sees a GPU and the CUDA driver shows none. Restart.")
    held = [name for name, _ in find_packages(path)]
    # where there is none, what is wrong with the path says more than which GPU this is
    package = open_package(path, arch_of(gpu, held) if held else None)
    arch = _arch(package)
    require_driver(gpu, package.manifest.driver)
    require_cudnn(torch.backends.cudnn.version())
    device = settings.device
    torch.zeros(1, device=device)  # makes the context that the bank shares
    bank = KernelBank([], arch, lambda: torch.cuda.current_stream(device).cuda_stream)
    digest, state = package.digest, settings.state
    choices = choose_variants(package.kernels, digest, gpu, bank, device, state, event_ms)
    attention = settings.attention or DEFAULT_ATTENTION
    form = attention if attention in FORMS else DEFAULT_ATTENTION
    stored = {entry.dtype for entry in package.manifest.tensors}
    dtypes = [dtype for dtype in LIMITS if str(dtype).removeprefix("torch.") in stored]
    ops = native_ops(
        bank, arch, attention=attention_kernel(choices, form), gemm=gemm_ways(choices, dtypes)
    )
    manifest = package.manifest
    _require_known(bank, native_specs(manifest.model.dim, manifest.padded_ffn, dtypes, arch))
    norm_of = partial(vae_norm, bank, {kernel.name for kernel in package.kernels})
    return _Native(package, _with_attention(ops, attention), norm_of, CudaGraphRecorder(), gpu)


def vae_norm(bank: Bank, held: Collection[str], vae: Vae) -> ChannelNorm:
    """The norm of a VAE's decoder: by `bank`, if kernels for its type and channels are among those
    whose names are `held`, else by PyTorch.
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


def _require_known(bank: Bank, specs: Sequence[KernelSpec]) -> None:
    """That kernels without variants are there, compiled from what this program has. Raises
    `BadPackage`.
    """
    for spec in specs:
        if not spec.name.startswith(("attention.", "gemm.")):  # those were chosen among
            try:
                bank.tuning(spec)
            except KernelError as error:
                raise BadPackage(f"{error} Build the package again with this engine.") from error


def _references(path: Path, settings: ModelSettings) -> _Native:
    package = open_package(path)
    attention = settings.attention or DEFAULT_ATTENTION
    form = attention if attention in FORMS else DEFAULT_ATTENTION
    ops = reference_ops(variants(form, _arch(package))[0])
    ops = _with_attention(ops, attention)
    return _Native(package, ops, lambda _: channel_norm_reference, None, None)


def _arch(package: Package) -> Arch:
    return next(arch for arch in ARCHS if arch.name == package.manifest.arch)


def _stored_prompts(package: Package) -> StoredPrompts | None:
    if package.manifest.prompts is None:
        return None
    package.file(PROMPTS)  # verifies it: a changed number would be another prompt
    return load_prompts(package.path / PROMPTS)


def _planner(
    native: _Native, found: "_Found", encoders: Encoders, settings: ModelSettings
) -> Callable[[ClipShape], MemoryPlan] | None:
    """Plans of clips, with the memory that was free before the first weight arrived."""
    if native.gpu is None:
        return None
    gpu, manifest = native.gpu, native.package.manifest
    free = gpu.memory_bytes if gpu.free_bytes is None else gpu.free_bytes
    is_needed = manifest.prompts is None and found.text.is_file()
    text = encoder_bytes(found.text, settings.text_dtype) if is_needed else 0
    vae = sum(weight.nbytes for weight in encoders.vae.parameters())
    bytes_of = EncoderBytes(text, encoders.vision.nbytes, vae)
    return lambda shape: plan(manifest, shape, bytes_of, free)


def _with_attention(ops: Ops, attention: str) -> Ops:
    """The same, or with an attention of 16 bits if it is called by its name."""
    if attention in FORMS:
        return ops
    if attention not in ATTENTIONS:
        known = ", ".join([*FORMS, *ATTENTIONS])
        raise Unavailable(f"There is no attention {attention!r} for packages, only {known}.")
    return plain_attention(ops, find_attention(attention))


@dataclass(frozen=True, slots=True)
class _Found:
    """Where the models beside the transformer are."""

    folder: Path
    text: Path
    vision: Path
    vae: Path


def _find_models(models: Path, needs_text: bool = True) -> _Found:
    """Raises `MissingModel`. A text encoder that may never be asked is missed when it is."""
    try:
        text = find_model(models, TEXT_ENCODER)
    except MissingModel:
        if needs_text:
            raise
        text = models / TEXT_ENCODER.folders[0] / TEXT_ENCODER.names[0]
    return _Found(models, text, find_model(models, IMAGE_ENCODER), find_model(models, VAE))


def _encoders(
    found: _Found, stored: StoredPrompts | None, settings: ModelSettings
) -> tuple[Callable[[Sequence[str]], list[Tensor]], VisionEncoder, Vae]:
    device, dtype = settings.device, settings.dtype
    torch.backends.cudnn.allow_tf32 = False  # FP32 convolutions shall be FP32
    text = partial(
        embed_prompts,
        encoder=found.text,
        models=found.folder,
        cache=settings.state / "prompts",
        device=device,
        dtype=settings.text_dtype,
        stored=stored,
    )
    return text, VisionEncoder(found.vision, device, dtype), load_vae(found.vae, device, dtype)


def _capture(networks: Networks, settings: ModelSettings) -> MotionCapture:
    return partial(capture_skeleton, PoseExtractor(networks, settings.state))
