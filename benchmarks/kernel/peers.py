"""Other libraries that do the work of our kernels, and what runs them.

Their inputs are ready before the clock starts; ours are too, quantisation is a kernel of its own.
The result of a kernel's peer is not checked here.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.kernel.work import LaunchWork
from engine.config import HEAD_SIZE, SCAIL_14B

DIM, FFN, HEADS, HEAD = SCAIL_14B.dim, SCAIL_14B.ffn, SCAIL_14B.heads, HEAD_SIZE
PRODUCTS = {"qkv": (3 * DIM, DIM), "o": (DIM, DIM), "up": (FFN, DIM), "down": (DIM, FFN)}  # N, K
ATTENTION = "attention"  # the work of a peer that is no product

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # of q, k, v [1, N, S, K] bf16
PeerWork = Callable[[], object]
PeerTimer = Callable[[PeerWork], float | None]  # ms; None: runs, but has no clock


@dataclass(frozen=True, slots=True)
class Peer:
    name: str
    work: LaunchWork
    run: Callable[[], PeerWork]  # makes inputs, returns the work
    beside: str = ATTENTION  # the work of ours that it is timed in turns with


def peers(tokens: int) -> Iterator[Peer]:
    """Everything that does the work of one of our kernels, for S tokens."""
    flop = 4.0 * tokens * tokens * DIM
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        name = backend.name.removesuffix("_ATTENTION").lower()
        run = partial(_attention, tokens, partial(_sdpa, backend))
        yield Peer(f"torch sdpa {name} bf16", LaunchWork(flop, bits=16), run)
    yield Peer("sageattention", LaunchWork(flop), partial(_attention, tokens, _sage))
    for name, (n, k) in PRODUCTS.items():
        work = LaunchWork(2.0 * tokens * n * k)
        for fast in (True, False):
            label = f"torch _scaled_mm {name}{' fast' if fast else ''}"
            yield Peer(label, work, partial(_scaled_mm, tokens, n, k, fast), beside=name)
        yield Peer(f"torch _int_mm {name}", work, partial(_int_mm, tokens, n, k), beside=name)


def _attention(tokens: int, attend: Attend) -> PeerWork:
    q, k, v = torch.randn(3, 1, HEADS, tokens, HEAD, device="cuda", dtype=torch.bfloat16)
    return lambda: attend(q, k, v)


def _sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v)


def _sage(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """INT8 attention of `pip install sageattention==1.0.6`. Its own quantisation is inside, as it
    has no interface without.
    """
    return import_module("sageattention").sageattn(q, k, v, tensor_layout="HND")


def _scaled_mm(tokens: int, n: int, k: int, fast: bool) -> PeerWork:
    """A product of E4M3. `fast`: sums stay in the tensor core's short accumulator."""
    a, b = (torch.randn(rows, k, device="cuda").to(torch.float8_e4m3fn) for rows in (tokens, n))
    a_scale, b_scale = torch.ones(tokens, 1, device="cuda"), torch.ones(1, n, device="cuda")
    return lambda: torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
        a, b.T, a_scale, b_scale, out_dtype=torch.bfloat16, use_fast_accum=fast
    )


def _int_mm(tokens: int, n: int, k: int) -> PeerWork:
    """A product of INT8. Its sums in INT32 come back without scales."""
    a, b = (
        torch.randint(-127, 128, (rows, k), device="cuda", dtype=torch.int8) for rows in (tokens, n)
    )
    return lambda: torch._int_mm(a, b.T)  # pyright: ignore[reportPrivateImportUsage]
