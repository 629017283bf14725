"""From files to a pipeline that is ready for its first job."""

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from engine.conditioning import Encoders
from engine.config import expandable_segments
from engine.denoise.block_runner import LaunchedBlocks
from engine.denoise.cuda_graphs import GraphedBlocks
from engine.denoise.exact import ExactDenoiser
from engine.denoise.packaged import PackagedDenoiser
from engine.denoise.packed import BlockSource, StoredBlocks, can_pin, kept_on_host
from engine.errors import BadPackage, MissingModel
from engine.machine.exhausted import held_by_others
from engine.machine.gpu import Gpu
from engine.machine.host_memory import host_memory
from engine.machine.ladder import Rates
from engine.machine.pinned import pinner
from engine.machine.rates import copy_rate
from engine.machine.resident import Resident
from engine.machine.upload import PackageWeights
from engine.masks.networks import MaskFiles
from engine.media.framing import frames_to_u8
from engine.memory import (
    CUDA_BYTES,
    ClipShape,
    EncoderBytes,
    MemoryPlan,
    Running,
    has_room_for_blocks,
    plan,
)
from engine.models.attention import find_attention
from engine.models.checkpoint import Checkpoint
from engine.models.known_prompts import KnownPrompts
from engine.models.latent_colours import LatentColours, latent_colours, name_of
from engine.models.locate import IMAGE_ENCODER, TEXT_ENCODER, VAE, find_model
from engine.models.lora import Lora
from engine.models.stored_prompts import StoredPrompts, load_prompts
from engine.models.text import embed_prompts, passing_bytes
from engine.models.vae import Vae, load_vae
from engine.models.vae_decode import VaeDecoder
from engine.models.vision import VisionEncoder
from engine.package.folder import Package
from engine.package.manifest import PROMPTS, PreviewColours
from engine.pipeline import Pipeline
from engine.pose.capture import capture_skeleton
from engine.pose.extract import PoseExtractor
from engine.pose.networks import Networks
from engine.program import NATIVE, ChosenPackage, MakeProgram, ModelSettings, make_program
from engine.residency import Memory, Movable, no_others
from engine.source import MotionCapture
from engine.tensorrt.block_runner import open_program
from kernels.channel_norm import ChannelNorm, channel_norm_reference

log = logging.getLogger(__name__)


def load_exact(
    checkpoint: Path,
    loras: Sequence[tuple[Path, float]],
    models: Path,
    networks: Networks,
    settings: ModelSettings,
) -> Pipeline:
    """Loads the plain PyTorch model of a checkpoint, and the other models from a models folder.

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

    encoders = Encoders(text, vision, vae, decode, colours=_colours(vae, settings))
    capture = _capture(networks, settings)
    return Pipeline(denoiser, encoders, capture, Memory.unplanned(), networks.look)


def load_package(
    chosen: ChosenPackage,
    models: Path,
    networks: Networks,
    settings: ModelSettings,
    make: MakeProgram = make_program,
) -> Pipeline:
    """Loads a package and the other models; on a GPU by a memory plan, on a CPU as it is. `make`
    binds the package's operations to what computes them.

    Raises what `make` raises, and `MissingModel`, before weights are read.
    """
    program = make(chosen, settings)
    stored = _stored_prompts(chosen.package)
    found = _find_models(models, needs_text=stored is None)
    recorder = program.recorder
    graphed = None if recorder is None else partial(GraphedBlocks, record=recorder)
    make_runner = LaunchedBlocks
    if settings.program != NATIVE:
        make_runner = open_program(
            chosen.package,
            settings.program,
            chosen.gpu,
            settings.state,
            lambda: torch.cuda.current_stream().cuda_stream,
        )
        graphed = None  # the library's launches are not recorded
    with ThreadPoolExecutor(1, "encoders") as pool:  # they load while the transformer streams
        encoding = pool.submit(_encoders, found, stored, settings)
        weights = PackageWeights(chosen.package, settings.device)
        denoiser = PackagedDenoiser(
            weights,
            program.ops,
            graphed,
            make_runner,
            loads=_has_room(chosen, settings),
            streams_from=_block_source(settings.device),
        )
        text, vision, vae = encoding.result()
    norm = program.norm_of(vae)
    decoder = VaeDecoder(vae, norm, frames_to_u8, recorder)
    encoders = Encoders(text, vision, vae, decoder.decode)
    encoders = replace(encoders, colours=_colours(vae, settings, chosen.package.manifest.colours))
    if chosen.gpu is not None:
        encoders = _movable(encoders, settings.device)
    movable = Movable(
        denoiser.home,
        encoders.vision_home,
        encoders.vae_home,
        denoiser.use_graphs,
        {"denoise": denoiser.forget, "decode": decoder.release},
        denoiser.kept,
        denoiser.stream,
    )
    planner = _planner(chosen, found, encoders, norm, settings, denoiser, networks.gpu_bytes())
    others = no_others if chosen.gpu is None else partial(held_by_others, CUDA_BYTES)
    memory = Memory(planner, movable, others)
    return Pipeline(denoiser, encoders, _capture(networks, settings), memory, networks.look)


def _movable(encoders: Encoders, device: torch.device) -> Encoders:
    """Lets CLIP and the VAE leave the GPU and come back, where memory is short."""
    vision, vae, host = encoders.vision, encoders.vae, torch.device("cpu")
    return Encoders(
        encoders.text,
        vision,
        vae,
        encoders.decode,
        Resident(lambda: vision.move(device), lambda: vision.move(host)),
        Resident(lambda: vae.to(device), lambda: vae.to(host)),
        encoders.colours,
    )


def _colours(
    vae: Vae, settings: ModelSettings, stored: PreviewColours | None = None
) -> Callable[[], LatentColours]:
    """What previews are made with: of the package, if its VAE was this one, else fitted when the
    first is wanted, wherever the VAE is then.
    """
    if stored is not None and stored.vae == name_of(vae):
        return cache(partial(LatentColours.of, stored.values))
    return cache(partial(latent_colours, vae, settings.state / "colours"))


def _stored_prompts(package: Package) -> StoredPrompts | None:
    told, width = package.manifest.prompts, package.manifest.model.text_dim
    if told is None:
        return None
    package.file(PROMPTS)  # verifies it: a changed number would be another prompt
    stored = load_prompts(package.path / PROMPTS)
    rows, found = stored.rows.values(), (len(stored.rows), stored.encoder_sha256)
    if found != (told.count, told.encoder_sha256) or any(one.shape[1:] != (width,) for one in rows):
        raise BadPackage(
            f"{package.path}: {PROMPTS} holds {found[0]} prompts of the encoder {found[1][:12]}, "
            f"and by the manifest {told.count} of {told.encoder_sha256[:12]}, {width} wide, are "
            "expected. Build the package again."
        )
    return stored


def _planner(
    chosen: ChosenPackage,
    found: "_ModelFiles",
    encoders: Encoders,
    norm: ChannelNorm,
    settings: ModelSettings,
    denoiser: PackagedDenoiser,
    capture: int,
) -> Callable[[ClipShape], MemoryPlan] | None:
    """Makes the function that plans a clip with the memory that is free now; None on a CPU."""
    if chosen.gpu is None:
        return None
    manifest = chosen.package.manifest
    free = _free_bytes(chosen.gpu, settings)
    needs_text = manifest.prompts is None and found.text.is_file()
    text = passing_bytes(found.text, settings.text_dtype) if needs_text else 0
    vae = sum(weight.nbytes for weight in encoders.vae.parameters())
    dtype = encoders.vae.conv2.weight.dtype
    segmenting = 0
    if manifest.model.kind.modes:  # Preview takes no masks
        segmenting = MaskFiles(found.folder, settings.device, settings.state).gpu_bytes()
    bytes_of = EncoderBytes(
        text, encoders.vision.nbytes, vae, dtype, norm is channel_norm_reference, capture,
        segmenting,
    )  # fmt: skip
    grows, rates = expandable_segments(), _rates(denoiser, settings.device)

    def plan_now(shape: ClipShape) -> MemoryPlan:
        running = Running(denoiser.attention_bits, grows, rates)
        return plan(manifest, shape, bytes_of, free, running)

    return plan_now


def _free_bytes(gpu: Gpu, settings: ModelSettings) -> int:
    """Counts the bytes that may be planned with: those that are free, or fewer if so asked."""
    free = gpu.memory_bytes if gpu.free_bytes is None else gpu.free_bytes
    return free if settings.gpu_bytes is None else min(free, settings.gpu_bytes)


def _has_room(chosen: ChosenPackage, settings: ModelSettings) -> bool:
    """Tells if all blocks may be loaded now. Where they may not, the first clip decides."""
    if chosen.gpu is None:
        return True
    free = _free_bytes(chosen.gpu, settings)
    return has_room_for_blocks(chosen.package.manifest, free, Running())


def _block_source(device: torch.device) -> Callable[[StoredBlocks], BlockSource]:
    """Makes the function that says where streamed blocks are kept: on a CPU, in the file."""
    if device.type != "cuda":
        return lambda stored: stored

    def keep(stored: StoredBlocks) -> BlockSource:
        torch.cuda.synchronize(device)  # the driver pins for the context of this thread
        return kept_on_host(stored, host_memory(), pinner())

    return keep


def _rates(denoiser: PackagedDenoiser, device: torch.device) -> Rates:
    """Measures how fast weights come. On a CPU nothing is measured."""
    if device.type != "cuda":
        return Rates()
    copies, pins = copy_rate(device), can_pin(denoiser.block_bytes, host_memory())
    rates = Rates(copies, denoiser.read_rate or Rates().read, pins)
    log.info(
        "weights come at %.1f GB/s from pinned memory, %.1f GB/s from the package",
        rates.copy / 1e9, rates.read / 1e9,
    )  # fmt: skip
    return rates


@dataclass(frozen=True, slots=True)
class _ModelFiles:
    """The files of the models beside the transformer."""

    folder: Path
    text: Path
    vision: Path
    vae: Path


def _find_models(models: Path, needs_text: bool = True) -> _ModelFiles:
    """Raises `MissingModel`. A text encoder that may never be asked is missed when it is."""
    try:
        text = find_model(models, TEXT_ENCODER)
    except MissingModel:
        if needs_text:
            raise
        text = models / TEXT_ENCODER.folders[0] / TEXT_ENCODER.names[0]
    return _ModelFiles(models, text, find_model(models, IMAGE_ENCODER), find_model(models, VAE))


def _encoders(
    found: _ModelFiles, stored: StoredPrompts | None, settings: ModelSettings
) -> tuple[Callable[[Sequence[str]], list[Tensor]], VisionEncoder, Vae]:
    """Loads text encoder (as a function, when it is first asked), CLIP and VAE."""
    device, dtype = settings.device, settings.dtype
    torch.backends.cudnn.allow_tf32 = False  # FP32 convolutions shall be FP32
    embed = partial(
        embed_prompts,
        encoder=found.text,
        models=found.folder,
        cache=settings.state / "prompts",
        device=device,
        dtype=settings.text_dtype,
        stored=stored,
    )
    text = KnownPrompts(embed, device)
    return text, VisionEncoder(found.vision, device, dtype), load_vae(found.vae, device, dtype)


def _capture(networks: Networks, settings: ModelSettings) -> MotionCapture:
    return partial(capture_skeleton, PoseExtractor(networks, settings.state))
