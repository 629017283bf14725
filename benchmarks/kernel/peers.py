"""The same work in other libraries: which they are, how to get one, and their times beside ours.

Their inputs are ready before the clock starts; ours are too, quantisation is a kernel of its own.
The result of a kernel's peer is not checked here.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from shutil import which
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

HEADS, HEAD = 40, 128
DIM, FFN = HEADS * HEAD, 13824
PRODUCTS = {"qkv": (3 * DIM, DIM), "o": (DIM, DIM), "up": (FFN, DIM), "down": (DIM, FFN)}  # N, K
ATTENTION = "attention"  # the work of a peer that is no product
ROUNDS = 3  # of turns: their spread is the noise

Timed = TypeVar("Timed")
PeerWork = Callable[[], object]
PeerTimer = Callable[[PeerWork], float | None]  # ms; None: runs, but has no clock


@dataclass(frozen=True, slots=True)
class PeerLibrary:
    """What a peer needs, and how to get it."""

    name: str
    measures: str
    install: str
    module: str = ""  # that is imported
    programs: tuple[str, ...] = ()  # of which one has to be found, where it is no module


TORCH = PeerLibrary("torch", "SDPA, _scaled_mm, _int_mm", "pip install torch==2.10.0", "torch")
XFORMERS = PeerLibrary("xformers", "attention BF16", "pip install xformers==0.0.35", "xformers")
SAGE = PeerLibrary(
    "sageattention", "attention INT8", "pip install sageattention==1.0.6", "sageattention"
)
CUDNN = PeerLibrary(
    "nvidia-cudnn-frontend", "attention FP8", "pip install nvidia-cudnn-frontend==1.32.0", "cudnn"
)
DIFFUSERS = PeerLibrary(
    "diffusers", "block of Wan, decoder of its VAE", "pip install diffusers==0.42.1", "diffusers"
)
TRITON = PeerLibrary("triton", "compiled block", "pip install triton==3.6.0", "triton")
COMPILER = PeerLibrary(
    "C compiler", "compiled block", "apt-get install gcc", programs=("gcc", "clang")
)
TORCHAO = PeerLibrary("torchao", "compiled FP8 block", "pip install torchao==0.18.0", "torchao")
OF_KERNELS = (TORCH, XFORMERS, SAGE, CUDNN)


def lacking(libraries: Sequence[PeerLibrary], on_gpu: bool) -> str:
    """Why a peer that needs these does not run here, and how to change that; "": it does."""
    lacks = [f"{one.name}: not here; {one.install}" for one in libraries if not _is_here(one)]
    if lacks or on_gpu:
        return ", ".join(lacks)
    return f"{' + '.join(one.name for one in libraries)}: needs a GPU"


def _is_here(library: PeerLibrary) -> bool:
    if library.programs:
        return any(which(program) for program in library.programs)
    return find_spec(library.module) is not None


def interleaved(
    works: Mapping[str, Timed], clock: Callable[[Timed], float | None], runs: int = ROUNDS
) -> dict[str, list[float]]:
    """ms of each, taken in turns (A B A B), so that clocks and heat of the machine hit all alike.

    A clock that gives no times leaves the lists empty, and each work has been run `runs` times.
    """
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(runs):
        for name, work in works.items():
            ms = clock(work)
            if ms is not None:
                times[name].append(ms)
    return times


@dataclass(frozen=True, slots=True)
class Peer:
    name: str
    flop: float
    run: Callable[[], PeerWork] | None  # makes inputs, returns the work
    missing: str = ""  # how to get it, where it is not installed
    beside: str = ATTENTION  # the work of ours that it is timed in turns with


def peers(tokens: int) -> Iterator[Peer]:
    flop = 4.0 * tokens * tokens * DIM
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        name = backend.name.removesuffix("_ATTENTION").lower()
        yield Peer(f"torch sdpa {name} bf16", flop, lambda backend=backend: _sdpa(tokens, backend))
    for label, library, make in (
        ("xformers", XFORMERS, _xformers),
        ("sageattention", SAGE, _sage),
        ("cudnn sdpa fp8", CUDNN, _cudnn_fp8),
    ):
        missing = lacking((library,), on_gpu=True)
        run = None if missing else lambda make=make: make(tokens)
        yield Peer(label, flop, run, missing)
    for name, (n, k) in PRODUCTS.items():
        work = 2.0 * tokens * n * k
        for fast in (True, False):
            label = f"torch _scaled_mm {name}{' fast' if fast else ''}"
            run = lambda n=n, k=k, fast=fast: _scaled_mm(tokens, n, k, fast)  # noqa: E731
            yield Peer(label, work, run, beside=name)
        run = lambda n=n, k=k: _int_mm(tokens, n, k)  # noqa: E731
        yield Peer(f"torch _int_mm {name}", work, run, beside=name)


def _heads_first(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [1, N, S, K] bf16."""
    q, k, v = torch.randn(3, 1, HEADS, tokens, HEAD, device="cuda", dtype=torch.bfloat16)
    return q, k, v


def _sdpa(tokens: int, backend: SDPBackend) -> PeerWork:
    q, k, v = _heads_first(tokens)

    def run() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return run


def _xformers(tokens: int) -> PeerWork:
    q, k, v = (side.transpose(1, 2).contiguous() for side in _heads_first(tokens))
    attend = import_module("xformers.ops").memory_efficient_attention
    return lambda: attend(q, k, v)


def _sage(tokens: int) -> PeerWork:
    """Its own quantisation is inside, as it has no interface without."""
    q, k, v = _heads_first(tokens)
    attend = import_module("sageattention").sageattn
    return lambda: attend(q, k, v, tensor_layout="HND")


def _cudnn_fp8(tokens: int) -> PeerWork:
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


def _scaled_mm(tokens: int, n: int, k: int, fast: bool) -> PeerWork:
    """`fast`: sums stay in the tensor core's short accumulator."""
    a, b = (torch.randn(rows, k, device="cuda").to(torch.float8_e4m3fn) for rows in (tokens, n))
    a_scale, b_scale = torch.ones(tokens, 1, device="cuda"), torch.ones(1, n, device="cuda")
    return lambda: torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
        a, b.T, a_scale, b_scale, out_dtype=torch.bfloat16, use_fast_accum=fast
    )


def _int_mm(tokens: int, n: int, k: int) -> PeerWork:
    """Sums in INT32 come back without scales."""
    a, b = (
        torch.randint(-127, 128, (rows, k), device="cuda", dtype=torch.int8) for rows in (tokens, n)
    )
    return lambda: torch._int_mm(a, b.T)  # pyright: ignore[reportPrivateImportUsage]
