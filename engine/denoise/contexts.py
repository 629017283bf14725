"""The keys of text and picture for the cross attention of all blocks, and what is kept of them.

They are made once a clip. Their weights (4.2 GB at 14B) stay on the device for the next clip where
the memory plan has room, and are read for each clip where it has not. The keys of the last texts
stay too: a text that is known needs none of its weights.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256

import torch
from torch import Tensor

from engine.denoise.block import (
    ContextKeys,
    PictureWeights,
    TextWeights,
    assemble,
    picture_keys,
    tensor_names,
    text_keys,
)
from engine.machine.upload import PackageWeights
from engine.models.dit import Scail
from kernels.cross_attention import CrossKeys
from kernels.ops import Ops

KEPT_TEXT_BYTES = 512 * 2**20  # at 14B ten prompts of up to 63 tokens, or one of 512

SideWeights = type[TextWeights] | type[PictureWeights]
Read = Callable[[str], Tensor]  # of one block's tensors


@dataclass(frozen=True, slots=True)
class _Text:
    """A text's rows, the last of which stands for `repeats` equal ones: those of padding are."""

    rows: Tensor  # [L, text_dim]
    repeats: int
    digest: bytes  # of both


class Contexts:
    """Owns the weights of the contexts, while they stay on the device, and the keys of texts."""

    def __init__(self, weights: PackageWeights, layers: int, outside: Scail) -> None:
        """`outside` is the model without layers. Raises `BadPackage` if a tensor is missing."""
        self._weights, self._layers, self._outside = weights, layers, outside
        self._keeps_weights = self._keeps_texts = True
        self._held: dict[str, Tensor] | None = None
        self._texts: OrderedDict[bytes, list[CrossKeys]] = OrderedDict()
        for name in {*self._names(TextWeights, PictureWeights)}.difference(weights.package.names):
            weights.package.entry(name)  # raises, as it is not there: in a clip it would be late

    def keep(self, *, weights: bool, texts: bool) -> None:
        """Decides what stays for the next clip, and gives the rest back."""
        self._keeps_weights, self._keeps_texts = weights, texts
        if not weights:
            self._held = None
        if not texts:
            self._texts.clear()

    def keys(self, ops: Ops, texts: Sequence[Tensor], vision: Tensor) -> list[list[ContextKeys]]:
        """Makes the keys of each block for each text [L, text_dim] with the picture."""
        told = [_told(text) for text in texts]
        known = {text.digest: self._texts.get(text.digest) for text in told}
        outside, device = self._outside, self._weights.device
        embedded = {
            text.digest: (outside.text_embedding(text.rows.to(device)), text.repeats)
            for text in told
            if known[text.digest] is None
        }
        seen = outside.img_emb(vision)
        made: dict[bytes, list[CrossKeys]] = {digest: [] for digest in embedded}
        pictures: list[CrossKeys] = []

        def make(read: Read) -> None:
            pictures.append(picture_keys(ops, assemble(PictureWeights, read), seen))
            for digest, given in embedded.items():
                made[digest].append(text_keys(ops, assemble(TextWeights, read), *given))

        self._each_block(make, [TextWeights, PictureWeights] if embedded else [PictureWeights])
        found = {digest: made.get(digest) or keys or [] for digest, keys in known.items()}
        self._remember(found)
        return [
            [ContextKeys(*pair) for pair in zip(found[text.digest], pictures, strict=True)]
            for text in told
        ]

    def _each_block(self, use: Callable[[Read], None], sides: Sequence[SideWeights]) -> None:
        """Calls `use` for each block. Weights that are not here are read, all if they will stay."""
        if self._held is None:
            keeps = self._keeps_weights
            kept = self._read(use, (TextWeights, PictureWeights) if keeps else sides, keeps=keeps)
            self._held = kept if keeps else None
            return
        for n in range(self._layers):
            use(_of_block(self._held, n))

    def _read(
        self, use: Callable[[Read], None], sides: Sequence[SideWeights], *, keeps: bool
    ) -> dict[str, Tensor]:
        """Reads the weights and calls `use` as soon as those of a block are there."""
        names = self._names(*sides)
        kept: dict[str, Tensor] = {}
        held: dict[str, Tensor] = {}
        done = 0

        def take(name: str, tensor: Tensor) -> None:
            nonlocal done
            held[name] = tensor
            if len(held) == len(names) // self._layers:  # all of one block: they lie together
                use(_of_block(held, done))
                done += 1
                if keeps:
                    kept.update(held)
                held.clear()

        self._weights.visit(names, take)
        return kept

    def _names(self, *sides: SideWeights) -> list[str]:
        names = dict.fromkeys(name for side in sides for name in tensor_names(side))
        return [f"blocks.{n}.{name}" for n in range(self._layers) for name in names]

    def _remember(self, found: dict[bytes, list[CrossKeys]]) -> None:
        """Keeps the keys of these texts, and lets go of those that were of no use for longest."""
        if not self._keeps_texts:
            return
        self._texts.update(found)
        for digest in found:
            self._texts.move_to_end(digest)
        while sum(map(_nbytes, self._texts.values())) > KEPT_TEXT_BYTES:
            self._texts.popitem(last=False)


def _told(text: Tensor) -> _Text:
    padding = count_padding(text)
    rows, repeats = text[: len(text) - max(padding - 1, 0)], max(padding, 1)
    data = rows.float().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return _Text(rows, repeats, sha256(data).digest() + repeats.to_bytes(8))


def count_padding(text: Tensor) -> int:
    """Counts the rows at the end of a text [L, C] that are zero."""
    real = text.any(dim=1).nonzero()
    return len(text) - (int(real[-1]) + 1 if len(real) else 0)


def _of_block(held: dict[str, Tensor], n: int) -> Read:
    return lambda name: held[f"blocks.{n}.{name}"]


def _nbytes(keys: Sequence[CrossKeys]) -> int:
    return sum(side.nbytes for one in keys for side in (one.k, one.v, one.bias))
