"""Programs that compute softmax(q k^T / sqrt(K)) v: asked for by name, never replaced."""

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.errors import Unavailable

# q [S, N, K], k and v [L, N, K] -> [S, N, K]
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's own program, which runs everywhere and is the definition of correct."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # [1, N, S, K]
    return F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1)


def _xformers() -> Attention:
    if importlib.util.find_spec("xformers") is None:
        raise Unavailable(
            "Attention xformers was asked for, but xformers is not installed here. "
            "Install the extra [gpu], or use --attention sdpa."
        )
    if not torch.cuda.is_available():
        raise Unavailable("Attention xformers needs a CUDA GPU and none is here. Use sdpa.")
    from xformers.ops import (  # pyright: ignore[reportMissingImports] - in the images only
        memory_efficient_attention,
    )

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return memory_efficient_attention(q[None], k[None], v[None])[0]

    return attend


ATTENTIONS: dict[str, Callable[[], Attention]] = {"sdpa": lambda: sdpa, "xformers": _xformers}


def find_attention(name: str) -> Attention:
    """Raises `Unavailable` if `name` is unknown or cannot run on this machine."""
    if name not in ATTENTIONS:
        raise Unavailable(f"There is no attention {name!r} here, only {', '.join(available())}.")
    return ATTENTIONS[name]()


def available() -> list[str]:
    """The names that `find_attention` takes on this machine."""
    names = []
    for name, find in ATTENTIONS.items():
        try:
            find()
        except Unavailable:
            continue
        names.append(name)
    return names
