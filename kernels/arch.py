"""The GPU architectures that packages are built for. What differs between them is a row here."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Arch:
    name: str  # also the package folder and the Dockerfile suffix
    capability: tuple[int, int]  # CUDA compute capability
    target: str  # what ptxas is told; cubins run on exactly this
    shared_bytes: int  # shared memory one block may use
    driver: tuple[int, int]  # the oldest CUDA version a driver may report
    toolkits: tuple[str, ...]  # ptxas releases whose cubins such a driver takes, baseline first
    gpus: str  # cards, by the names that people know
    image: str | None  # the Dockerfile of the image to deploy on these
    codes: tuple[str, ...]  # 8-bit types that its tensor cores multiply, as Triton calls them
    attention: str  # the form of self attention where none is asked for (`kernels.attention`)


# E4M3 came with Ada (docs/reference/kernels.md 1): the kernels of these are in INT8 and BF16.
SM80 = Arch(
    "sm80", (8, 0), "sm_80", 166_912, driver=(12, 6), toolkits=("12.6",),
    gpus="A100", image="Dockerfile.sm86", codes=("i8",), attention="int8",
)  # fmt: skip
SM86 = Arch(
    "sm86", (8, 6), "sm_86", 101_376, driver=(12, 6), toolkits=("12.6",),
    gpus="RTX 3090, RTX A6000, A40", image="Dockerfile.sm86", codes=("i8",), attention="int8",
)  # fmt: skip
SM89 = Arch(
    "sm89", (8, 9), "sm_89", 101_376, driver=(12, 7), toolkits=("12.6", "12.8"),
    gpus="RTX 4090, L40S, RTX 6000 Ada", image="Dockerfile.sm89",
    codes=("i8", "fp8e4nv"), attention="int8fp8",
)  # fmt: skip
SM90 = Arch(
    "sm90", (9, 0), "sm_90a", 232_448, driver=(12, 7), toolkits=("12.6", "12.8"),
    gpus="H100, H200", image=None,
    codes=("i8", "fp8e4nv"), attention="int8fp8",
)  # fmt: skip
SM120 = Arch(
    "sm120", (12, 0), "sm_120a", 101_376, driver=(12, 8), toolkits=("12.8",),
    gpus="RTX 5090, RTX PRO 6000", image="Dockerfile.sm120",
    codes=("i8", "fp8e4nv"), attention="int8fp8",
)  # fmt: skip
ARCHS = (SM80, SM86, SM89, SM90, SM120)


def archs_with(codes: str) -> tuple[Arch, ...]:
    """Lists the architectures whose tensor cores multiply codes of this type."""
    return tuple(arch for arch in ARCHS if codes in arch.codes)
