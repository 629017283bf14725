"""A package of the 14B model's size that lies in no file: tensors are drawn where they are used.

Names, shapes and dtypes are those of a build (tests/benchmarks/test_forward.py holds them against
one), values are random and in a range that keeps 40 layers finite. Each tensor depends on its name
alone, so that it is the same however often it is asked for.
"""

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.denoise import block as fused
from engine.machine.upload import PackageWeights, Take
from engine.models.dit import Scail
from engine.package.folder import Package
from engine.package.manifest import (
    ITEM_BYTES,
    ROTATION,
    ROTATION_GROUP,
    Entry,
    Manifest,
    Native,
    Rotation,
    WeightsForm,
    aligned,
)
from kernels.arch import Arch
from kernels.fp8 import LIMITS, RowForm, to_8bit

FFN_MULTIPLE = 256  # of `engine.build.quantize`, which a measuring machine may lack
LARGE = 2**20  # values from which a matrix outside the blocks has two bytes a value
QUERY_SIZE = 1.5  # of queries and keys: attention then looks at few of 48,832 tokens
WEIGHTS: WeightsForm = "int8"  # as a build chooses where nobody says otherwise
FORM = fused.WEIGHT_FORMS[WEIGHTS]
SPREAD = 4  # standard deviations from the mean to the largest code

TensorShape = tuple[str, str, tuple[int, ...]]  # name, dtype, shape


class RandomPackage(Package):
    """An `engine.package.folder.Package` without a folder."""

    def read(self, name: str) -> Tensor:
        return drawn(self, name, torch.device("cpu"))


class RandomWeights(PackageWeights):
    """`engine.machine.upload.PackageWeights`, drawn on the device."""

    def visit(self, names: Iterable[str], take: Take) -> None:
        wanted = {*names}
        for name in self.package.names:
            if name in wanted:
                take(name, drawn(self.package, name, self.device))


def random_package(model: ModelConfig, arch: Arch) -> RandomPackage:
    """The package that a build would make for this architecture where nobody says otherwise."""
    ffn = -(-model.ffn // FFN_MULTIPLE) * FFN_MULTIPLE
    entries, offset = {}, 0
    for key, dtype, shape in _tensors(model, ffn, FORM):
        nbytes = prod(shape) * ITEM_BYTES[dtype]
        entries[key] = Entry(key, dtype, shape, offset, nbytes, "")
        offset = aligned(offset + nbytes)
    linears = (key.removesuffix(".q") for key, entry in entries.items() if entry.dtype == "int8")
    manifest = Manifest(
        model_kind=model.kind.name, arch=arch.name, driver_floor="{}.{}".format(*arch.driver),
        engine="0", toolchain={}, wheels={}, sources=(), model=model, padded_ffn=ffn,
        weights=WEIGHTS, rotation=Rotation(ROTATION, ROTATION_GROUP, tuple(linears)),
        native=Native(()), prompts=None, tensorrt={"absent": "random weights have none."},
        tensors=tuple(entries.values()),
    )  # fmt: skip
    return RandomPackage(Path("random weights"), "0" * 64, manifest, (), entries, {})


def _tensors(model: ModelConfig, ffn: int, form: RowForm) -> Iterator[TensorShape]:
    """Name, dtype and shape, in load order."""
    with torch.device("meta"):
        state = Scail(replace(model, layers=0)).state_dict()
    outside = []
    for name, tensor in sorted(state.items()):
        flat = tensor[0] if name == "head.modulation" else tensor
        flat = flat.flatten(1) if flat.ndim > 2 else flat
        is_large = tensor.ndim == 2 and tensor.numel() >= LARGE
        outside.append((name, "bfloat16" if is_large else "float32", tuple(flat.shape)))
    yield from (one for one in outside if not one[0].startswith("head."))
    for kind in (fused.ContextWeights, fused.BlockWeights):
        for n in range(model.layers):
            for name in fused.tensor_names(kind):
                yield f"blocks.{n}.{name}", *_in_block(name, model.dim, ffn, form)
    yield from (one for one in outside if one[0].startswith("head."))


def _in_block(name: str, dim: int, ffn: int, form: RowForm) -> tuple[str, tuple[int, ...]]:
    """Dtype and shape of a tensor of a block."""
    field, _, end = name.partition(".")
    if not end:
        shapes = {"modulation": (6, dim), "smooth": (2, dim), "inner": (ffn,)}
        return "float32", shapes.get(name, (dim,))
    rows = ffn if field == "up" else dim * len(fused.LINEARS[field])
    if end != "q":
        return "float32", (rows,)
    return str(form.dtype).removeprefix("torch."), (rows, ffn if field == "down" else dim)


def drawn(package: Package, name: str, device: torch.device) -> Tensor:
    """A tensor of random values: matrices keep the size of what they multiply, norms are near one,
    the rest is small.
    """
    entry = package.entry(name)
    dtype = getattr(torch, entry.dtype)
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))

    def randn(scale: float, mean: float = 0.0) -> Tensor:
        found = torch.randn(entry.shape, generator=generator, device=device)
        return found.mul_(scale).add_(mean)

    if dtype in LIMITS:
        return to_8bit(randn(LIMITS[dtype] / SPREAD), dtype)
    part = name.rpartition(".")[2]
    if part == "s":
        codes = package.entry(f"{name.removesuffix('s')}q")
        limit = LIMITS[getattr(torch, codes.dtype)]
        return torch.full(entry.shape, SPREAD / limit * codes.shape[1] ** -0.5, device=device)
    if part in ("smooth", "inner"):
        return torch.ones(entry.shape, device=device)
    if "norm_" in part:  # of queries and keys
        return randn(0.1, mean=QUERY_SIZE)
    if len(entry.shape) == 2 and "modulation" not in name:
        return randn(entry.shape[1] ** -0.5).to(dtype)
    is_norm = len(entry.shape) == 1 and name.endswith("weight")
    return randn(0.1, mean=1.0 if is_norm else 0.0).to(dtype)
