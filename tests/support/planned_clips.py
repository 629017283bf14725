"""Clips to be planned, and packages of the names and shapes of real ones, without their bytes."""

from dataclasses import fields, replace
from math import prod
from pathlib import Path

import torch

from engine.config import SCAIL2_14B, SCAIL_14B
from engine.denoise.block import BlockWeights, ContextWeights, Weight
from engine.memory import ClipShape, EncoderBytes
from engine.models.dit import Scail
from engine.package.manifest import ITEM_BYTES, Entry
from tests.support.live_memory import META
from tests.support.packages import MANIFEST

GB = 10**9
ENCODERS = EncoderBytes(text=772_800_000, vision=1_222_000_000, vae=253_785_062)
# Free on an empty card: what its driver shows, less what it keeps for itself.
FREE = {24: 24_080 * 2**20, 32: 32_100 * 2**20, 141: 143_200 * 2**20}
DESKTOP = {8: 7_300 * 2**20, 12: 11_400 * 2**20, 16: 15_500 * 2**20}  # while a desktop runs
NAMED = {"416x672": (416, 672), "512x896": (512, 896), "704x1280": (704, 1280)}


class MetaPackage:
    """A package of the right names and shapes, and its `PackageWeights`: tensors on the meta
    device, zeros on the CPU for what stays there.
    """

    path, device = Path("meta"), META

    def __init__(self, manifest):
        self.package, self.manifest = self, manifest
        self.entries = {entry.name: entry for entry in manifest.tensors}
        self.names = tuple(self.entries)
        self.handed_over = set()

    def read(self, wanted):
        if isinstance(wanted, str):
            return torch.zeros(1).expand(self.entries[wanted].shape)  # gigabytes of one value
        held = {}
        self.visit(wanted, held.__setitem__)
        return held

    def entry(self, name):
        return self.entries[name]

    def fill(self, places, through_cache=False):
        for name, place in places.items():
            self.handed_over.add(name)
            assert place.numel() == self.entries[name].nbytes

    def visit(self, names, take):
        for name in names:
            self.handed_over.add(name)
            take(name, self.tensor(name))

    def tensor(self, name):
        entry = self.entries[name]
        return meta(*entry.shape, dtype=getattr(torch, entry.dtype))


def entries(model, ffn, codes="float8_e4m3fn"):
    """The tensors of a package, as the build names and orders them."""
    dim = model.dim
    with META:
        outside = Scail(replace(model, layers=0)).state_dict()
    found = []
    for name, tensor in outside.items():
        shape = tensor.flatten(1).shape if tensor.ndim > 3 else tensor.shape
        is_large = len(shape) == 2 and prod(shape) >= 2**20
        found.append((name, "bfloat16" if is_large else "float32", tuple(shape)))
    sizes = {
        "text": (2 * dim, dim), "vision": (2 * dim, dim), "qkv": (3 * dim, dim), "o": (dim, dim),
        "cross_q": (dim, dim), "cross_o": (dim, dim), "up": (ffn, dim), "down": (dim, ffn),
    }  # fmt: skip
    tables = {"modulation": (6, dim), "smooth": (2, dim), "inner": (ffn,)}
    for kind in (ContextWeights, BlockWeights):
        for n in range(model.layers):
            for field in fields(kind):
                name = f"blocks.{n}.{field.name}"
                if field.type is Weight:
                    rows, width = sizes[field.name]
                    found.append((f"{name}.q", codes, (rows, width)))
                    found += [(f"{name}.{end}", "float32", (rows,)) for end in ("s", "bias")]
                else:
                    found.append((name, "float32", tables.get(field.name, (dim,))))
    return tuple(
        Entry(name, dtype, shape, 0, prod(shape) * ITEM_BYTES[dtype], "")
        for name, dtype, shape in found
    )


def manifest_of(model, ffn):
    told = {"model_kind": model.kind.name, "model": model, "padded_ffn": ffn}
    return replace(MANIFEST, **told, tensors=entries(model, ffn))


REAL = manifest_of(SCAIL_14B, 13824)
REAL_SCAIL2 = manifest_of(SCAIL2_14B, 13824)
SOME_LAYERS_SCAIL2 = manifest_of(replace(SCAIL2_14B, layers=16), 13824)
SOME_LAYERS = manifest_of(replace(SCAIL_14B, layers=16), 13824)
FEW_LAYERS = manifest_of(replace(SCAIL_14B, layers=3), 13824)


def shape_of(name, **changes):
    return replace(ClipShape(*NAMED[name], frames=81), **changes)


def meta(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device=META)


PLAIN, PRODUCTION, GUIDED = {}, {"unseen": "last"}, {"contexts": 2}
LATE = {"unseen": "first"}
SHORT = {"unseen": "last", "evaluations": (3, 3)}  # the production recipe: 6 steps, one window
