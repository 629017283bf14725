"""The same work in other libraries, as far as they are installed: attention, and 8-bit products.

Their inputs are ready before the clock starts; ours are too, quantisation is a kernel of its own.
A peer's result is not checked here.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

HEADS, HEAD = 40, 128
DIM, FFN = HEADS * HEAD, 13824
PRODUCTS = {"qkv": (3 * DIM, DIM), "o": (DIM, DIM), "up": (FFN, DIM), "down": (DIM, FFN)}  # N, K


@dataclass(frozen=True, slots=True)
class Peer:
    name: str
    flop: float
    run: Callable[[], Callable[[], object]] | None  # makes inputs, returns the work
    missing: str = ""  # how to get it, where it is not installed


def peers(tokens: int) -> Iterator[Peer]:
    flop = 4.0 * tokens * tokens * DIM
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        name = backend.name.removesuffix("_ATTENTION").lower()
        yield Peer(f"torch sdpa {name} bf16", flop, lambda backend=backend: _sdpa(tokens, backend))
    yield _if_installed("xformers", "pip install xformers==0.0.35", flop, lambda: _xformers(tokens))
    yield _if_installed(
        "sageattention", "pip install sageattention==1.0.6", flop, lambda: _sage(tokens)
    )
    how = "pip install nvidia-cudnn-frontend"
    yield _if_installed("cudnn", how, flop, lambda: _cudnn_fp8(tokens), "cudnn sdpa fp8")
    for name, (n, k) in PRODUCTS.items():
        work = 2.0 * tokens * n * k
        for fast in (True, False):
            label = f"torch _scaled_mm {name}{' fast' if fast else ''}"
            yield Peer(label, work, lambda n=n, k=k, fast=fast: _scaled_mm(tokens, n, k, fast))
        yield Peer(f"torch _int_mm {name}", work, lambda n=n, k=k: _int_mm(tokens, n, k))


def _if_installed(
    package: str, how: str, flop: float, run: Callable[[], Callable[[], object]], name: str = ""
) -> Peer:
    if find_spec(package) is None:
        return Peer(name or package, flop, None, f"not installed: {how}")
    return Peer(name or package, flop, run)


def _heads_first(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [1, N, S, K] bf16."""
    q, k, v = torch.randn(3, 1, HEADS, tokens, HEAD, device="cuda", dtype=torch.bfloat16)
    return q, k, v


def _sdpa(tokens: int, backend: SDPBackend) -> Callable[[], object]:
    q, k, v = _heads_first(tokens)

    def run() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return run


def _xformers(tokens: int) -> Callable[[], object]:
    q, k, v = (side.transpose(1, 2).contiguous() for side in _heads_first(tokens))
    attend = import_module("xformers.ops").memory_efficient_attention
    return lambda: attend(q, k, v)


def _sage(tokens: int) -> Callable[[], object]:
    """Its own quantisation is inside, as it has no interface without."""
    q, k, v = _heads_first(tokens)
    attend = import_module("sageattention").sageattn
    return lambda: attend(q, k, v, tensor_layout="HND")


def _cudnn_fp8(tokens: int) -> Callable[[], object]:
    """E4M3 in and out, one scale a tensor, all of them 1. Never run yet: no GPU was at hand."""
    cudnn = import_module("cudnn")
    e4m3, fp32 = cudnn.data_type.FP8_E4M3, cudnn.data_type.FLOAT
    inputs = [side.to(torch.float8_e4m3fn) for side in _heads_first(tokens)]
    one, out = torch.ones(1, 1, 1, 1, device="cuda"), torch.empty_like(inputs[0])
    graph = cudnn.pygraph(io_data_type=e4m3, intermediate_data_type=fp32, compute_data_type=fp32)
    heads = [
        graph.tensor(name=name, dim=list(x.shape), stride=list(x.stride()), data_type=e4m3)
        for name, x in zip("qkv", inputs)
    ]
    scales = [
        graph.tensor(name=name, dim=[1] * 4, stride=[1] * 4, data_type=fp32)
        for name in ("descale_q", "descale_k", "descale_v", "descale_s", "scale_s", "scale_o")
    ]
    o, _, *peaks = graph.sdpa_fp8(
        *heads, *scales, is_inference=True, attn_scale=HEAD**-0.5, use_causal_mask=False
    )
    o.set_output(True).set_dim(list(out.shape)).set_stride(list(out.stride())).set_data_type(e4m3)
    for peak in peaks:
        peak.set_output(True).set_dim([1] * 4).set_stride([1] * 4).set_data_type(fp32)
    try:
        graph.build([cudnn.heur_mode.A])
    except cudnn.cudnnGraphNotSupportedError as error:
        raise RuntimeError(str(error)) from error
    made = {peak: torch.empty_like(one) for peak in peaks}
    given = dict(zip([*heads, *scales], [*inputs, *[one] * len(scales)]))
    space = torch.empty(graph.get_workspace_size(), device="cuda", dtype=torch.uint8)
    return lambda: graph.execute(given | made | {o: out}, space)


def _scaled_mm(tokens: int, n: int, k: int, fast: bool) -> Callable[[], object]:
    """`fast`: sums stay in the tensor core's short accumulator."""
    a, b = (torch.randn(rows, k, device="cuda").to(torch.float8_e4m3fn) for rows in (tokens, n))
    a_scale, b_scale = torch.ones(tokens, 1, device="cuda"), torch.ones(1, n, device="cuda")
    return lambda: torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
        a, b.T, a_scale, b_scale, out_dtype=torch.bfloat16, use_fast_accum=fast
    )


def _int_mm(tokens: int, n: int, k: int) -> Callable[[], object]:
    """Sums in INT32 come back without scales."""
    a, b = (
        torch.randint(-127, 128, (rows, k), device="cuda", dtype=torch.int8) for rows in (tokens, n)
    )
    return lambda: torch._int_mm(a, b.T)  # pyright: ignore[reportPrivateImportUsage]
