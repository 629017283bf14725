"""A small package to read, break and build again: every dtype, odd sizes, one kernel, one plan."""

import hashlib
import json
from dataclasses import replace

import torch

from engine.config import TINY
from engine.package.folder import PackageWriter
from engine.package.manifest import Manifest, MergedLora, Native, SourceFile
from kernels.aot.cubin import Cubin, Mix

CODE = b"\x7fELF machine code"
KERNEL = Cubin(
    name="gemm.i8", arch="sm89", spec="spec", sha256=hashlib.sha256(CODE).hexdigest(),
    entry="gemm_kernel", warps=8, shared_bytes=4096, scratch_bytes=0, registers=168,
    text_bytes=9000, toolkit="12.6", loop=Mix(322, {"IMMA.16832.S8.S8.SAT": 64}, {"LDSM": 36}),
    data=CODE,
)  # fmt: skip
PLAN = b"plan" * 100
MANIFEST = Manifest(
    model_kind="preview",
    arch="sm89",
    driver_floor="12.7",
    engine="0.1.0",
    toolchain={"torch": "2.13.0"},
    wheels={"nvidia-cuda-nvcc-cu12 12.6.85": "d7" * 32},
    sources=(
        SourceFile("m.safetensors", 10, "ab" * 32, None),
        SourceFile("l.safetensors", 5, "0", MergedLora(0.5, "other", 64)),
    ),
    model=TINY,
    padded_ffn=512,
    weights="int8",
    rotation=None,
    native=Native((KERNEL.record(),)),
    tensorrt={"absent": "It was not asked for."},
    prompts=None,
)


def tensors(group):
    """The tensors that a build makes of one group: the same each time."""
    noise = torch.Generator().manual_seed(group)
    x = torch.randn(33, 7, generator=noise)
    return {
        f"blocks.{group}.q": (x * 40).to(torch.int8),
        f"blocks.{group}.s": x[:, 0].contiguous(),
        f"blocks.{group}.f8": x.T.to(torch.float8_e4m3fn),  # a view with strides
        f"blocks.{group}.b16": x.bfloat16()[1:],
        f"blocks.{group}.f16": x.half().reshape(11, 3, 7),
        f"blocks.{group}.one": x[0, 0],
    }


def facts(group):
    return {"group": group, "errors": [0.25, None], "text": "é\n"}


def build(home, groups=3, identity="a", manifest=MANIFEST, made=None):
    """Writes the whole package; `made` is told each group that is made and not resumed."""
    with PackageWriter(home, identity) as writer:
        found = [writer.write(f"group {n}", lambda n=n: make(n, made)) for n in range(groups)]
        assert found == [facts(n) for n in range(groups)]
        return complete(writer, manifest)


def make(group, made=None):
    if made is not None:
        made.append(group)
    return tensors(group), facts(group)


def complete(writer, manifest=MANIFEST):
    writer.add_file("kernels/gemm.i8.cubin", CODE)
    writer.add_file("plans/block.plan", PLAN)
    return writer.finish(manifest)


def reseal(path, change):
    """Changes a manifest as somebody would who can make a digest."""
    manifest = path / "manifest.json"
    body = json.loads(manifest.read_bytes())
    body = change(body) or body
    text = json.dumps(body | {"digest": "0" * 64})
    digest = hashlib.sha256(text.encode()).hexdigest()
    manifest.write_text(text.replace("0" * 64, digest, 1))


def for_arch(arch):
    """Facts and kernel of a package for another architecture."""
    record = replace(KERNEL, arch=arch.name).record()
    return replace(MANIFEST, arch=arch.name, native=Native((record,)))
