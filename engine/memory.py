"""How much of the GPU's memory a clip will need, and what has to take turns so that it fits.

Bytes are counted before anything runs: weights from the manifest, the rest from the tensors that
the code makes, in the order in which it makes them and lets go of them. Tests hold these tables
against the code itself: tests/test_memory.py, tests/denoise/test_activations.py. What PyTorch's
allocator needs beyond them while a clip is denoised comes from a model of it
(`engine.denoise.activations`). Where all of it does not fit, something takes turns or is streamed:
a clip is made on the rung of a ladder (`engine.machine.ladder`) that loses the fewest seconds to
weights on their way. On the lowest ones as many blocks stay as fit, and the others are streamed.

A clip in segments is planned by its longest one: each is prepared, denoised and decoded by itself,
and what was made for one is gone before the next is prepared.

The text encoder, which a new prompt needs, passes block by block on every rung: it is read once for
a prompt wherever it goes.

A plan takes for granted that graphs are forgotten when a clip is denoised and that the decoder's
buffers are released when it is decoded: neither is of use to the next clip.

What no table can tell are allowances, set by hand and not measured on any GPU of ours:
`CUDA_BYTES`, `WORKSPACE_BYTES`, `GAP_BYTES`, `SMALL_BYTES` and the allocator's rounding.
Sources: docs/reference/performance.md B and F7, docs/reference/encoders.md 1.7.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

import torch

from engine.config import (
    LATENT_CHANNELS,
    ROLE_CHANNELS,
    SIZE_MULTIPLE,
    TEXT_TOKENS,
    TRAINED_FRAMES,
    VAE_STRIDE,
    ModelConfig,
)
from engine.denoise.activations import Course, Kind, Tokens, Width, allocator_gap, most_bytes
from engine.denoise.contexts import KEPT_TEXT_BYTES
from engine.denoise.cuda_graphs import is_recorded
from engine.denoise.schedule import Streaming
from engine.denoise.weight_bytes import WeightBytes, weight_bytes
from engine.denoise.windows import latent_frames
from engine.errors import BadRequest, TooLarge
from engine.machine.ladder import LADDER, UNKNOWN_EVALUATIONS, Rates, Rung, Traffic, seconds
from engine.models.vae_decode import decode_bytes
from engine.package.manifest import Manifest
from kernels.cross_attention import KEY_TILE
from kernels.layout import HEAD

CUDA_BYTES = 640 * 2**20  # context, kernels of PyTorch, cuBLAS, cuDNN and of the package
WORKSPACE_BYTES = 256 * 2**20  # of cuDNN, for one convolution
GAP_BYTES = 256 * 2**20  # between tensors in the allocator's blocks, or more while denoising
SMALL_BYTES = 64 * 2**20  # modulations, conditions, biases: what is listed nowhere
ALLOWANCES = CUDA_BYTES + WORKSPACE_BYTES + GAP_BYTES + SMALL_BYTES
RING, SMALLEST_RING = 3, 2  # blocks; with three no step waits for the order of copies
LESS = 0.9  # of the memory that was not enough, for a stage that is tried again

VISION_TOKENS = 257
TABLE_BYTES = 2 * 4 * HEAD // 2  # a token's cos and sin
LATENTS_HELD = 8  # of the whole clip: the solver's, the noise, the conditions
NORM_BYTES = 4 * 4 * 96  # a pixel: four FP32 copies of a frame, where the VAE's norm is PyTorch's
# Bytes a pixel of the picture: what the encoder remembers of earlier frames, and its largest moment
ENCODE_BYTES = 2935
HISTORY_BYTES = 6400  # the same where the last frames of a segment are encoded, at full size

Stage: TypeAlias = Literal["conditioning", "denoise", "decode"]


@dataclass(frozen=True, slots=True)
class ClipShape:
    """The clip that is planned: its size, and what is denoised at once.

    Raises `BadRequest` for numbers that no clip has.
    """

    height: int
    width: int
    frames: int  # of a window, or of a segment
    contexts: int = 1  # 2 with guidance: the prompt and the negative one
    unseen: Literal["never", "last", "first"] = "never"  # which steps do not see the skeleton
    clip_frames: int = 0  # of the whole clip, where it has several windows
    text_tokens: int = TEXT_TOKENS  # rows of the prompt, padding counted once
    # of a window, with the skeleton and without; None: as many of each as are worth recording
    evaluations: tuple[int, int] | None = None
    references: int = 0  # pictures beside the first one
    has_history: bool = False  # later segments begin with frames of those before, encoded again

    def __post_init__(self) -> None:
        assert self.unseen in ("never", "last", "first")
        counts = (self.height, self.width, self.frames, self.contexts, self.text_tokens)
        usual = all(type(count) is int and count > 0 for count in counts) and self.contexts < 3
        clip = all(
            type(count) is int and count >= 0
            for count in (self.clip_frames, self.references, *(self.evaluations or ()))
        )
        if not (usual and clip) or self.height % SIZE_MULTIPLE or self.width % SIZE_MULTIPLE:
            raise BadRequest(
                f"The memory of {self} cannot be planned: numbers must be whole and positive, "
                f"sides multiples of {SIZE_MULTIPLE}, and contexts 1 or 2."
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Frames of the video in latents, tokens of one."""
        area = self.height // (2 * VAE_STRIDE[1]) * (self.width // (2 * VAE_STRIDE[2]))
        return latent_frames(self.frames), area

    @property
    def tokens(self) -> int:
        """S of an evaluation that sees the skeleton (docs/reference/performance.md B)."""
        time, area = self.grid
        return area * (1 + self.references + time) + area * time // 4


@dataclass(frozen=True, slots=True)
class EncoderBytes:
    """Weights of the other models as they lie on the GPU, and how the VAE decodes."""

    text: int  # of it, what is on the GPU at once: it passes block by block
    vision: int
    vae: int
    vae_dtype: torch.dtype = torch.bfloat16
    plain_norm: bool = False  # the decoder's norm is PyTorch's: no kernel fits this VAE
    capture: int = 0  # of motion capture's networks, which stay once a dance was seen
    segmenting: int = 0  # what SAM 2 takes while masks are made; it leaves before the clip


# as people have them: UMT5-XXL in BF16, CLIP-H, the VAE of Wan 2.1
USUAL_ENCODERS = EncoderBytes(text=772_800_000, vision=1_222_000_000, vae=253_785_062)


@dataclass(frozen=True, slots=True)
class Running:
    """How the transformer is run, where that decides about memory."""

    attention_bits: int = 8  # of q, k and v in self attention
    expandable: bool = False  # segments of PyTorch's allocator grow
    rates: Rates = field(default_factory=Rates)


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes by name."""

    weights: WeightBytes  # of the transformer
    layers: int
    text: int  # encoders' weights
    vision: int
    vae: int
    capture: int  # motion capture's networks
    segmenting: int  # SAM 2, before a clip
    contexts: int  # keys and values of text and picture, of all blocks
    tables: int  # RoPE
    latents: int
    encode: int
    decode: int
    course: Course  # of the clip while it is denoised, with all graphs that are worth it
    running: Running


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The bytes that will be resident, and the peak of each stage, with all allowances."""

    rung: Rung
    shape: ClipShape
    footprint: Footprint
    streaming: Streaming | None  # None: all blocks are on the GPU
    resident_bytes: int  # between jobs
    peaks: Mapping[Stage, int]  # bytes
    free_bytes: int  # before this process has touched the GPU

    @property
    def peak_bytes(self) -> int:
        return max(self.peaks.values())

    @property
    def streamed_bytes(self) -> int:
        """Those that are copied to the GPU in every forward."""
        if self.streaming is None:
            return 0
        held = self.footprint
        return held.weights.block * (held.layers - self.streaming.resident)

    @property
    def seconds(self) -> float:
        """Those that the clip loses at most to weights on their way, by estimate."""
        held, shape = self.footprint, self.shape
        counts = shape.evaluations or (UNKNOWN_EVALUATIONS, 0)
        told = max(kind.told.total for kind in held.course.kinds)
        moved = Traffic(
            contexts=held.weights.contexts,
            encoders=held.vision + held.vae,
            blocks=held.weights.blocks,
            streamed=self.streamed_bytes,
            forwards=shape.contexts * sum(counts),
            # a product of 8 bits for each byte of a block, q k^T and p v
            products=told * held.weights.blocks + 2 * told**2 * held.course.width.dim * held.layers,
        )
        return seconds(self.rung, moved, held.running.rates)

    @property
    def does(self) -> str:
        """What is done for the clip to fit, as a clause."""
        if self.streaming is None:
            return self.rung.does
        ring, layers = self.streaming, self.footprint.layers
        source = "pinned memory" if self.footprint.running.rates.is_pinned else "the page cache"
        return (
            f"{self.rung.does} ({layers - ring.resident} of {layers} from {source} through "
            f"{ring.depth} buffers, {ring.resident} stay)"
        )

    @property
    def sentence(self) -> str:
        stages = ", ".join(f"{stage} {_gb(nbytes)}" for stage, nbytes in self.peaks.items())
        return (
            f"{_described(self.shape)}: {_gb(self.resident_bytes)} stay on the GPU, at most "
            f"{_gb(self.peak_bytes)} are needed ({stages}), {_gb(self.free_bytes)} are free: "
            f"{self.does}; weights on their way take at most {self.seconds:.1f} s."
        )


def plan(
    manifest: Manifest,
    shape: ClipShape,
    encoders: EncoderBytes,
    free_bytes: int,
    running: Running = Running(),
) -> MemoryPlan:
    """Chooses the fastest rung on which the clip fits into `free_bytes`, as NVML tells it before
    this process has a CUDA context. Of those that are as fast to the second it is the highest.

    Raises `TooLarge` if none does, with the need and what would fit.
    """
    bytes_of = _footprint(manifest, weight_bytes(manifest.tensors), shape, encoders, running)
    plans = [_on(rung, shape, bytes_of, free_bytes) for rung in LADDER]
    fitting = [one for one in plans if one.peak_bytes <= free_bytes]
    if not fitting:
        least = min(plans, key=lambda one: one.peak_bytes)
        raise TooLarge(_too_large(manifest, encoders, least))
    return min(fitting, key=lambda one: round(one.seconds))


def has_room_for_blocks(manifest: Manifest, free_bytes: int, running: Running) -> bool:
    """Tells if clips of the smaller usual size can be made with all blocks on the GPU, with the
    usual encoders.
    """
    smallest = ClipShape(416, 672, TRAINED_FRAMES)
    bytes_of = _footprint(
        manifest, weight_bytes(manifest.tensors), smallest, USUAL_ENCODERS, running
    )
    rungs = [rung for rung in LADDER if rung.blocks_stay and not rung.streams]
    return any(_on(rung, smallest, bytes_of, 0).peak_bytes <= free_bytes for rung in rungs)


def next_rung(plan: MemoryPlan, stage: Stage) -> MemoryPlan | None:
    """Chooses the next rung that needs less in a stage which ran out of memory, at last that on
    which no block stays; None if there is none.
    """
    below = LADDER[LADDER.index(plan.rung) + 1 :]
    for rung, share in (*((rung, LESS) for rung in below), (LADDER[-1], 0.0)):
        room = int(share * plan.peaks[stage])
        lower = _on(rung, plan.shape, plan.footprint, plan.free_bytes, room)
        if lower.peaks[stage] < plan.peaks[stage]:
            return lower
    return None


def _on(
    rung: Rung, shape: ClipShape, fp: Footprint, free_bytes: int, room: int | None = None
) -> MemoryPlan:
    """Plans a clip on one rung. Blocks that could be streamed fill `room`, or what is free."""
    encoders = fp.vision + fp.vae
    idle = ALLOWANCES + fp.weights.outside + rung.encoders_stay * encoders
    idle += fp.capture
    idle += rung.contexts_stay * fp.weights.contexts + rung.texts_stay * KEPT_TEXT_BYTES
    alone = not rung.encoders_stay
    course = fp.course if rung.graphs else fp.course.launched
    gap = allocator_gap(course, expandable=fp.running.expandable)
    peaks: dict[Stage, int] = {
        "conditioning": idle
        + max(fp.text, alone * fp.vision, alone * fp.vae + fp.encode, fp.segmenting),
        "denoise": idle
        + (fp.contexts + fp.tables + fp.latents + most_bytes(course))
        + max(0, gap - GAP_BYTES),
        "decode": idle + alone * fp.vae + fp.latents + fp.decode,
    }
    streaming, blocks = None, fp.weights.blocks + fp.weights.rounding
    if rung.streams:
        left = (free_bytes if room is None else min(room, free_bytes)) - max(peaks.values())
        streaming = _streaming(fp.layers, left // fp.weights.block)
        blocks = fp.weights.block * (streaming.resident + streaming.depth)
    for stage in peaks:
        peaks[stage] += (rung.blocks_stay or stage == "denoise") * blocks
    idle += rung.blocks_stay * blocks
    return MemoryPlan(rung, shape, fp, streaming, idle, peaks, free_bytes)


def _streaming(layers: int, places: int) -> Streaming:
    """Shares out so many places for blocks: to the ring first, the others to blocks that stay."""
    depth = min(max(places, SMALLEST_RING), RING)
    return Streaming(min(max(places - depth, 0), max(layers - depth, 0)), depth)


# --- bytes by name


def _footprint(
    manifest: Manifest,
    weights: WeightBytes,
    shape: ClipShape,
    encoders: EncoderBytes,
    running: Running,
) -> Footprint:
    model, (time, area) = manifest.model, shape.grid
    counts = (None, None) if shape.evaluations is None else shape.evaluations
    seen, unseen = (
        Kind(
            Tokens(
                area * (1 + shape.references + time),
                skeleton,
                area * time,
                area * shape.references,
            ),
            graphs=shape.contexts if count is None or is_recorded(count) else 0,
        )
        for skeleton, count in zip((area * time // 4, 0), counts, strict=True)
    )
    kinds = {"never": (seen,), "last": (seen, unseen), "first": (unseen, seen)}[shape.unseen]
    text, vision = _up(shape.text_tokens, KEY_TILE), _up(VISION_TOKENS, KEY_TILE)
    kept = (text, shape.contexts), (vision, 1)  # keys, and how many of them there are
    course = Course(
        Width(model.dim, manifest.padded_ffn, running.attention_bits, bool(model.mask_dim)),
        kept=tuple((2 * model.dim * keys, 2 * count * model.layers) for keys, count in kept),
        kinds=kinds,
    )
    clip = latent_frames(max(shape.frames, shape.clip_frames))
    pixels = shape.height * shape.width
    cells = pixels // (VAE_STRIDE[1] * VAE_STRIDE[2])
    return Footprint(
        weights=weights,
        layers=model.layers,
        text=encoders.text,
        vision=encoders.vision,
        vae=encoders.vae,
        capture=encoders.capture,
        segmenting=encoders.segmenting,
        contexts=model.layers * sum(keys * count for keys, count in kept) * (2 * 2 * model.dim + 4),
        tables=sum(kind.told.total for kind in kinds) * TABLE_BYTES,
        latents=LATENTS_HELD * 4 * LATENT_CHANNELS * clip * cells
        + _roles_bytes(model, shape, clip, cells),
        encode=(HISTORY_BYTES if shape.has_history else ENCODE_BYTES) * pixels,
        decode=decode_bytes(shape.height, shape.width, encoders.vae_dtype)
        + encoders.plain_norm * NORM_BYTES * pixels,
        course=course,
        running=running,
    )


def _roles_bytes(model: ModelConfig, shape: ClipShape, clip: int, cells: int) -> int:
    """Counts what a model that takes masks is told beside latents: `flow.Roles` of the whole clip,
    and of a window once more.
    """
    if not model.mask_dim:
        return 0
    window = latent_frames(shape.frames)
    driving = 4 * ROLE_CHANNELS * (clip + window) * cells // 4  # at half size
    return driving + 4 * (ROLE_CHANNELS * (1 + shape.references) + LATENT_CHANNELS
                          * shape.references) * cells  # fmt: skip


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


# --- what is said


def _too_large(manifest: Manifest, encoders: EncoderBytes, last: MemoryPlan) -> str:
    shape, held = last.shape, last.footprint

    def fits(other: ClipShape) -> bool:
        bytes_of = _footprint(manifest, held.weights, other, encoders, held.running)
        if most_bytes(bytes_of.course.launched) > last.free_bytes:
            return False  # whatever else it needs: most of a huge clip's offers end here
        return _on(last.rung, other, bytes_of, last.free_bytes).peak_bytes <= last.free_bytes

    stage = max(last.peaks, key=lambda name: last.peaks[name])
    shorter = next((one for one in _shorter(shape) if fits(one)), None)
    smaller = next((one for one in _smaller(shape) if fits(one)), None)
    offers = [_described(one) for one in (shorter, smaller) if one is not None]
    mend = (
        f"{' or '.join(offers)} would fit."
        if offers
        else "No size fits: free memory on this GPU, or take a larger one."
    )
    return (
        f"{_described(shape)} needs {_gb(last.peak_bytes)} of GPU memory ({stage}) even where "
        f"{last.does}; {_gb(last.free_bytes)} are free. {mend}"
    )


def _shorter(shape: ClipShape) -> Iterator[ClipShape]:
    """Windows with fewer frames, the longest first."""
    for time in range(shape.grid[0] - 1, 0, -1):
        yield replace(shape, frames=VAE_STRIDE[0] * (time - 1) + 1)


def _smaller(shape: ClipShape) -> Iterator[ClipShape]:
    """Smaller pictures of nearly the same form, the largest first."""
    long = max(shape.height, shape.width)
    for side in range(long - SIZE_MULTIPLE, 0, -SIZE_MULTIPLE):
        height, width = (
            max(1, round(one * side / long / SIZE_MULTIPLE)) * SIZE_MULTIPLE
            for one in (shape.height, shape.width)
        )
        yield replace(shape, height=height, width=width)


def _described(shape: ClipShape) -> str:
    guided = ", two prompts" if shape.contexts == 2 else ""
    further = f", {shape.references} further pictures" if shape.references else ""
    return f"{shape.width}x{shape.height}, {shape.frames} frames at once{guided}{further}"


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB"
