"""DoRA: a weight is given its direction by a LoRA and its magnitudes by a vector.

    V = W + factor * change          W' = m * V / (|V| + 1e-7)          W + strength * (W' - W)

docs/reference/formats.md 7.3. The norm is that of V, as in training, of each row (m [out]) or of
each input channel (m [1, in]).
"""

from pathlib import Path

import torch
from torch import Tensor

from engine.errors import BadCheckpoint
from engine.models.lora_delta import RowReader, Shape

EPS = 1e-7
CHUNK_ROWS = 512


def per_output(path: Path, name: str, stored: Shape, weight: Shape) -> bool:
    """Tells if magnitudes of that shape are one a row; else they are one an input channel.

    Raises `BadCheckpoint` if they are neither.
    """
    rows, channels = weight[0], weight[1] if len(weight) > 1 else 0
    sizes = [size for size in stored if size != 1]
    if stored[:1] == (rows,) and sizes in ([rows], []):
        return True
    if stored[:2] == (1, channels) and sizes in ([channels], []):
        return False
    raise BadCheckpoint(
        f"{path.name}: {name} {list(stored)} is no magnitude of a weight {list(weight)}; "
        f"[{rows}, 1] or [1, {channels}] is expected."
    )


def renorm(
    rows: Tensor, delta: RowReader, factor: float, magnitude: Tensor, strength: float
) -> None:
    """Changes rows [out, columns] of a weight in place, some at a time."""
    parts = [slice(first, first + CHUNK_ROWS) for first in range(0, len(rows), CHUNK_ROWS)]

    def turned(part: slice) -> Tensor:
        held = rows[part]
        return held + factor * delta(part.start, part.start + len(held)).view(held.shape)

    ratio: Tensor | None = None
    if magnitude.shape[:1] != (len(rows),) or magnitude.numel() != len(rows):
        channels = magnitude.numel()  # of an input, each over the taps of a convolution
        squares = torch.zeros(channels, dtype=torch.float64)
        for part in parts:
            squares += turned(part).double().square().view(-1, channels, rows.shape[1] // channels
                ).sum((0, 2))  # fmt: skip
        norms = squares.sqrt().float() + EPS
        ratio = (magnitude.flatten() / norms).repeat_interleave(rows.shape[1] // channels)
    for part in parts:
        v = turned(part)
        if ratio is None:
            norms = v.norm(dim=1, keepdim=True) + EPS
            v *= magnitude.flatten()[part, None] / norms
        else:
            v *= ratio
        rows[part] += strength * (v - rows[part])
