"""The memory of the packaged transformer beside its weights: tensors as they come and go.

The functions here walk through the code, and take from a heap what it allocates, in its order: a
`Counter` then tells the most bytes at once, a `CachingAllocator` what PyTorch reserves for them.
tests/denoise/test_activations.py holds them against the code on the meta device. What is smaller
than a thousandth of the tokens is left out.
Source: docs/reference/performance.md B and E.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

from engine.config import TEXT_TOKENS
from engine.denoise.block import common_step
from engine.machine.allocator import (
    CachingAllocator,
    Card,
    Counter,
    Heap,
    round_up,
    smallest_gpu,
)
from kernels.layout import HEAD, K_BLOCK, KEY_PADDING, Q_BLOCK
from kernels.rope import ROTATED_AT_ONCE

VELOCITY_VALUES = 64  # that a token becomes
PATCH_VALUES = 80  # of latents and mask, that a token is made of
ROLE_VALUES = 112  # of a mask that says who is who, where a model takes them
VISION_ROWS = 320  # of the picture's keys: 257 in whole tiles
STATISTICS_TOKENS = 64  # whose sums and peaks RoPE keeps
GAP_STEP = 8 * 2**20  # the gap is told in multiples of it
LAYERS_WALKED = 2  # a usual block and the last one: more change nothing


@dataclass(frozen=True, slots=True)
class Width:
    """The widths of a transformer's tokens, and the bits of q, k and v in its self attention."""

    dim: int
    ffn: int
    attention_bits: int = 8
    takes_roles: bool = False  # masks that say who is who


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens of an evaluation."""

    picture: int  # of all pictures and of the video
    skeleton: int  # 0: it is not seen
    video: int
    further: int = 0  # those of the pictures beside the first

    @property
    def total(self) -> int:
        return self.picture + self.skeleton


@lru_cache(maxsize=1024)
def largest_moment(width: Width, tokens: int) -> int:
    """Counts the most bytes inside a block, beside x."""
    counter = Counter()
    walk_block(counter, width, tokens, tokens)
    return counter.peak


def walk_block(heap: Heap, width: Width, tokens: int, kept: int) -> None:
    """Walks through `engine.denoise.block.run_block`, whose first `kept` tokens are asked for."""
    dim, ffn = width.dim, width.ffn

    def rows(count: int, values: int) -> tuple[object, ...]:
        return heap.take(count * values), heap.take(4 * count)

    def give(*handles: object) -> None:
        for handle in handles:
            heap.give(handle)

    x = rows(tokens, dim)
    qkv = heap.take(6 * dim * tokens)
    give(*x)
    if width.attention_bits == 16:
        for count in {min(tokens, ROTATED_AT_ONCE), tokens % ROTATED_AT_ONCE} - {0}:
            walk_rotation(heap, 4 * dim * count)
        heads: tuple[object, ...] = (qkv,)
    else:
        inverse = heap.take(8 * tokens)
        give(heap.take(8 * dim * -(-tokens // STATISTICS_TOKENS)))
        keys, count = round_up(tokens, KEY_PADDING), dim // HEAD
        q, q_scales = heap.take(dim * tokens), heap.take(4 * count * -(-tokens // Q_BLOCK))
        k, k_scales = heap.take(dim * keys), heap.take(4 * count * keys // K_BLOCK)
        heads = q, q_scales, k, k_scales, heap.take(dim * keys)
        give(inverse, qkv)
    seen = heap.take(2 * dim * kept)
    x = rows(kept, dim)
    give(seen, *heads, *x)

    x = rows(kept, dim)
    q = heap.take(2 * dim * kept)
    give(*x)
    inverse, some = heap.take(4 * kept), 2 * dim * -(-kept // common_step(kept))
    few, unseen = heap.take(some), heap.take(2 * dim * VISION_ROWS)
    for _ in range(2):
        seen = heap.take(some)
        give(seen, heap.take(2 * some))
    values = heap.take(2 * dim * TEXT_TOKENS), heap.take(2 * dim * VISION_ROWS)
    seen = heap.take(2 * dim * kept)
    give(inverse, few, unseen, *values, q)
    x = rows(kept, dim)
    give(seen, *x)

    x = rows(kept, dim)
    inner = heap.take(2 * ffn * kept)
    give(*x)
    x = rows(kept, ffn)
    give(inner, *x)


def walk_rotation(heap: Heap, nbytes: int) -> None:
    """Walks through what `kernels.rope.rotate_in_place` makes of q of some tokens, which have so
    many bytes in FP32; k is treated alike.
    """
    wide, normed = heap.take(nbytes), heap.take(nbytes)
    heap.give(wide)
    halves = []
    for _ in range(2):  # the even values of pairs, then the odd ones
        products = heap.take(nbytes // 2), heap.take(nbytes // 2)
        halves.append(heap.take(nbytes // 2))
        for product in products:
            heap.give(product)
    rotated = heap.take(nbytes)
    for handle in (*halves, normed, rotated):
        heap.give(handle)


def walk_embedding(heap: Heap, width: Width, told: Tokens) -> object:
    """Walks through what makes tokens of latents and masks, in FP32. Returns x."""
    tokens = walk_roles(heap, width, told) if width.takes_roles else walk_plain(heap, width, told)
    ordered = heap.take(4 * width.dim * told.total)
    heap.give(tokens)
    return ordered


def walk_plain(heap: Heap, width: Width, told: Tokens) -> object:
    """Walks through `dit.Scail.embed` of a model that takes no masks."""
    token, patch = 4 * width.dim, 4 * PATCH_VALUES
    pieces = heap.take(patch * told.video), heap.take(patch * told.picture)
    x = heap.take(token * told.picture)
    if told.skeleton:
        parts = x, heap.take(token * told.skeleton), heap.take(token * told.skeleton)
        x = heap.take(token * told.total)
        pieces = parts[2], *pieces, *parts[:2]
    for piece in pieces:
        heap.give(piece)
    return x


def walk_roles(heap: Heap, width: Width, told: Tokens) -> object:
    """Walks through `dit.Scail.embed` of a model that takes masks: each region is made of latents,
    then what its mask makes is added.
    """
    token, patch, mask = 4 * width.dim, 4 * PATCH_VALUES, 4 * ROLE_VALUES
    main = told.picture - told.further

    def with_roles(count: int, *masks: object) -> object:
        made = heap.take(token * count)
        for piece in masks:
            heap.give(piece)
        tokens = heap.take(token * count)
        heap.give(made)
        return tokens

    pieces = [heap.take(patch * told.video), heap.take(patch * main)]
    latents = heap.take(token * main)
    skeleton = heap.take(token * told.skeleton) if told.skeleton else None
    pieces.append(heap.take(mask * told.video))
    regions = [with_roles(main, heap.take(mask * main))]
    heap.give(latents)
    if told.further:
        pieces.append(heap.take(token * told.further))
        regions.append(with_roles(told.further))
    if skeleton is not None:
        pieces.append(with_roles(told.skeleton))
        heap.give(skeleton)
        regions.append(heap.take(token * told.skeleton))
    x = heap.take(token * told.total)
    for piece in (*regions, *pieces):
        heap.give(piece)
    return x


def walk_head(heap: Heap, width: Width, told: Tokens) -> None:
    """Walks through what makes a velocity of tokens: a norm in FP32, its product with a scale,
    that plus a shift, and what is left of it for each token.
    """
    normed = heap.take(4 * width.dim * told.video)
    scaled = heap.take(4 * width.dim * told.video)
    heap.give(normed)
    shifted = heap.take(4 * width.dim * told.video)
    heap.give(scaled)
    patches = heap.take(4 * VELOCITY_VALUES * told.video)
    heap.give(shifted)
    velocity = heap.take(4 * VELOCITY_VALUES * told.video)
    heap.give(patches)
    heap.give(velocity)


def walk_blocks(heap: Heap, width: Width, told: Tokens) -> None:
    for layer in range(LAYERS_WALKED):
        is_last = layer == LAYERS_WALKED - 1
        walk_block(heap, width, told.total, told.video if is_last else told.total)


def walk_launched(heap: Heap, width: Width, told: Tokens) -> None:
    """Walks through an evaluation whose kernels are launched one after another."""
    x = walk_embedding(heap, width, told)
    walk_blocks(heap, width, told)
    walk_head(heap, width, told)
    heap.give(x)


@dataclass(frozen=True, slots=True)
class Kind:
    """The evaluations of one kind in a clip."""

    told: Tokens
    graphs: int  # that are recorded of them, one for each text; 0: kernels are launched


@dataclass(frozen=True, slots=True)
class Course:
    """What the memory of a denoised clip goes through."""

    width: Width
    kept: tuple[tuple[int, int], ...]  # bytes and count of tensors that stay, as keys of the texts
    kinds: tuple[Kind, ...]  # in the order of the steps

    @property
    def launched(self) -> "Course":
        """The same without graphs."""
        return replace(self, kinds=tuple(replace(kind, graphs=0) for kind in self.kinds))


@lru_cache(maxsize=1024)
def allocator_gap(course: Course, *, expandable: bool = False) -> int:
    """Counts the bytes that PyTorch must be able to reserve beyond those in use at the largest
    moment: its blocks fit one tensor and not the next one.
    """
    kept = sum(nbytes * count for nbytes, count in course.kept)
    asked = kept + most_bytes(course)

    def run(card: Card) -> None:
        walk_clip(card, course, expandable=expandable)

    return smallest_gpu(run, asked, GAP_STEP) - asked


def walk_clip(card: Card, course: Course, *, expandable: bool = False) -> None:
    """Walks through the first evaluations of each kind, after which nothing changes. Raises `Full`
    if the card is too small.
    """
    usual = CachingAllocator(card, expandable=expandable)
    pool = CachingAllocator(card, expandable=expandable, records=True)
    width = course.width
    for nbytes, count in course.kept:
        for _ in range(count):
            usual.take(nbytes)
    for kind in course.kinds:
        for _ in range(2):
            walk_launched(usual, width, kind.told)
        for _ in range(kind.graphs):
            x = walk_embedding(usual, width, kind.told)
            usual.take(4 * width.dim * kind.told.total)  # the graph's own
            usual.empty_cache()  # as PyTorch does before it records
            walk_blocks(pool, width, kind.told)
            usual.give(x)  # what comes out is in the graph's
            walk_head(usual, width, kind.told)


@lru_cache(maxsize=1024)
def most_bytes(course: Course) -> int:
    """Counts the most bytes at once, without what is kept.

    Evaluations of one kind are launched at first, beside the graphs of the kind before, and then
    perhaps recorded. Graphs have an x each, and share the memory between their kernels.
    """
    width = course.width
    most = held = pool = 0
    for kind in course.kinds:
        launched, recorded, around = Counter(), Counter(), Counter()
        walk_launched(launched, width, kind.told)
        most = max(most, held + pool + launched.peak)
        if not kind.graphs:
            continue
        walk_blocks(recorded, width, kind.told)
        pool = max(pool, recorded.peak)
        held += kind.graphs * 4 * width.dim * kind.told.total
        around.give(walk_embedding(around, width, kind.told))
        walk_head(around, width, kind.told)
        most = max(most, held + pool + around.peak)
    return most
