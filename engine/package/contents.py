"""What a package of a model must hold: model, tensors, kernels and plans compared with each other.

A manifest's numbers are used to read tensors and to launch kernels, so a wrong one would end in a
clip of noise, or in a fault of the GPU. What belongs together is said here once more, without
PyTorch, which need not be there yet; a test holds the list against the models and the build.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from engine.config import HEAD_SIZE, LATENT_CHANNELS, MASK_CHANNELS, TEXT_TOKENS, ModelConfig
from engine.errors import BadPackage
from engine.package.manifest import ROTATION, ROTATION_GROUP, Entry, Manifest
from kernels.aot.cubin import WARP, Cubin
from kernels.aot.elf import read_elf
from kernels.arch import ARCHS
from kernels.spec import BuildError

FFN_MULTIPLE = 256  # `padded_ffn` is the next multiple of it
MOST_LAYERS = 1000
REPORT = "report.json"  # what a build found, in the package
REBUILD = "Build it again with this engine."
_FULL, _SHORT, _CODES = ("float32",), ("bfloat16", "float16"), ("int8", "float8_e4m3fn")
_LARGE = 2**20  # values from which a matrix outside the blocks takes two bytes a value
_TIME = 256  # width of the sinusoid
_PATCH = 2 * 2
_VISION_TOKENS = 257
# what a block needs of text and picture is loaded before all blocks
_CONTEXT = ("text.", "vision.", "cross_norm_q", "text_norm_k", "vision_norm_k")
_TOKENS = "S"  # the size of a plan's ports that a clip decides


class Expected(NamedTuple):
    """A tensor as it must be."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...]  # one of them


def check_contents(
    manifest: Manifest, kernels: Sequence[Cubin], report: bytes | None, path: Path
) -> None:
    """Raises `BadPackage` if parts of an opened package contradict each other.

    `report`: the build's, if the package has one, which names the format of each tensor again.
    """
    _check_basis(manifest, path)
    try:
        _check_model(manifest)
        _check_tensors(manifest)
        _check_rotation(manifest)
        if report is not None:
            _check_report(manifest, report)
        _check_plans(manifest)
        for kernel in kernels:
            _check_kernel(kernel)
        _check_names(manifest, kernels)
    except ValueError as error:
        raise BadPackage(f"{path} contradicts itself: {error}. {REBUILD}") from error


def expected_tensors(model: ModelConfig, padded_ffn: int, form: str) -> dict[str, Expected]:
    """The tensors of a package by name, in load order. `form`: "int8" or "fp8"."""
    outside = {name: _kept(*shape) for name, shape in sorted(_outside(model))}
    head = {name: held for name, held in outside.items() if name.startswith("head.")}
    made = {name: held for name, held in outside.items() if name not in head}
    block = dict(_block(model.dim, padded_ffn, form))
    context = [name for name in block if name.startswith(_CONTEXT)]
    for names in (context, [name for name in block if name not in context]):
        for n in range(model.layers):
            made |= {f"blocks.{n}.{name}": block[name] for name in names}
    return made | head


def _kept(*shape: int) -> Expected:
    is_large = len(shape) == 2 and shape[0] * shape[1] >= _LARGE
    return Expected(shape, _SHORT if is_large else _FULL)


def _outside(model: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Weights outside the blocks: convolutions as matrices, tables without a leading one."""
    dim, clip = model.dim, model.clip_dim
    channels = (LATENT_CHANNELS + MASK_CHANNELS) * _PATCH
    linears = {
        "patch_embedding": (dim, channels),
        "patch_embedding_pose": (dim, channels),
        "time_embedding.0": (dim, _TIME),
        "time_embedding.2": (dim, dim),
        "time_projection.1": (6 * dim, dim),
        "text_embedding.0": (dim, model.text_dim),
        "text_embedding.2": (dim, dim),
        "img_emb.proj.0": (clip,),
        "img_emb.proj.1": (clip, clip),
        "img_emb.proj.3": (dim, clip),
        "img_emb.proj.4": (dim,),
        "head.head": (LATENT_CHANNELS * _PATCH, dim),
    }
    if model.mask_dim:
        linears["patch_embedding_mask"] = (dim, model.mask_dim * _PATCH)
    for name, shape in linears.items():
        yield f"{name}.weight", shape
        yield f"{name}.bias", shape[:1]
    yield "head.modulation", (2, dim)


def _block(dim: int, ffn: int, form: str) -> Iterator[tuple[str, Expected]]:
    for name, rows in (("modulation", 6), ("smooth", 2)):
        yield name, Expected((rows, dim), _FULL)
    for name in ("norm_q", "norm_k", "norm3_shift", "norm3_scale"):
        yield name, Expected((dim,), _FULL)
    yield "inner", Expected((ffn,), _FULL)
    linears = {
        "qkv": (3 * dim, dim),
        "o": (dim, dim),
        "cross_q": (dim, dim),
        "cross_o": (dim, dim),
        "up": (ffn, dim),
        "down": (dim, ffn),
        "text": (2 * dim, dim),
        "vision": (2 * dim, dim),
    }
    for name, shape in linears.items():
        # calibration chooses between the two for each linear that every step needs
        is_int8 = form == "int8" and name in ("text", "vision")
        codes = ("int8",) if is_int8 else _CODES if form == "int8" else ("float8_e4m3fn",)
        yield f"{name}.q", Expected(shape, codes)
        yield f"{name}.s", Expected(shape[:1], _FULL)
        yield f"{name}.bias", Expected(shape[:1], _FULL)
    for name in ("cross_norm_q", "text_norm_k", "vision_norm_k"):
        yield name, Expected((dim,), _FULL)


def _check_model(manifest: Manifest) -> None:
    model, padded = manifest.model, manifest.padded_ffn
    if not 1 <= model.layers <= MOST_LAYERS:
        raise ValueError(f"its model has {model.layers} layers")
    if not model.dim or model.dim % HEAD_SIZE:
        raise ValueError(f"its model is {model.dim} wide, no multiple of the head size {HEAD_SIZE}")
    wanted = -(-model.ffn // FFN_MULTIPLE) * FFN_MULTIPLE
    if not model.ffn or padded != wanted:
        raise ValueError(
            f"its feed forward has {model.ffn} values, which are padded to {padded} where {wanted} "
            "are expected"
        )
    floor = next(arch for arch in ARCHS if arch.name == manifest.arch).driver
    if manifest.driver < floor:
        raise ValueError(
            f"its driver floor is {manifest.driver_floor}, and kernels for {manifest.arch} need "
            f"{floor[0]}.{floor[1]}"
        )


def _check_tensors(manifest: Manifest) -> None:
    wanted = expected_tensors(manifest.model, manifest.padded_ffn, manifest.weights)
    held = {entry.name: entry for entry in manifest.tensors}
    model = manifest.model
    of_model = f"a model of {model.layers} layers and width {model.dim}"
    if absent := _first(wanted, held):
        raise ValueError(f"the tensor {absent} is missing, which {of_model} has")
    if strange := _first(held, wanted):
        raise ValueError(f"it has a tensor {strange[:80]!r}, which {of_model} has not")
    if moved := next((pair for pair in zip(held, wanted, strict=True) if pair[0] != pair[1]), None):
        raise ValueError(  # the names of two alike tensors may have been exchanged
            f"the tensor {moved[0]} lies where {moved[1]} is expected"
        )
    for name, (shape, dtypes) in wanted.items():
        _check_tensor(held[name], shape, dtypes, manifest.weights)


def _check_tensor(entry: Entry, shape: tuple[int, ...], dtypes: tuple[str, ...], form: str) -> None:
    if entry.shape != shape:
        raise ValueError(
            f"the tensor {entry.name} is {list(entry.shape)}, and by the model's numbers "
            f"{list(shape)}"
        )
    if entry.dtype not in dtypes:
        raise ValueError(
            f"the tensor {entry.name} is stored as {entry.dtype}, and {' or '.join(dtypes)} is "
            f"expected in a package of {form} weights"
        )


def _check_basis(manifest: Manifest, path: Path) -> None:
    """Refuses rows in another basis than this engine rotates to: they would be noise."""
    rotation = manifest.rotation
    if rotation is not None and (rotation.kind, rotation.group) != (ROTATION, ROTATION_GROUP):
        raise BadPackage(
            f"{path} has rows rotated by {rotation.kind[:40]!r} in groups of {rotation.group}, and "
            f"this engine rotates by {ROTATION!r} in groups of {ROTATION_GROUP}. {REBUILD}"
        )


def _check_rotation(manifest: Manifest) -> None:
    """Compares the linears that are said to be rotated with those of INT8: kernels rotate the rows
    that meet these.
    """
    told = () if manifest.rotation is None else manifest.rotation.linears
    linears = [e for e in manifest.tensors if e.name.endswith(".q")]
    held = [e.name.removesuffix(".q") for e in linears if e.dtype == "int8"]
    if absent := _first(held, told):
        raise ValueError(f"{absent} is INT8, and is not among the linears that are rotated")
    if strange := _first(told, held):
        raise ValueError(f"{strange[:80]!r} is said to be rotated, and is no linear in INT8")


def _check_report(manifest: Manifest, report: bytes) -> None:
    """Compares formats with those that the build measured: codes of one byte can be read as others,
    and 16 bits too.
    """
    held = {entry.name: entry.dtype for entry in manifest.tensors}
    try:
        told = [(one["name"], one["dtype"]) for one in json.loads(report)["tensors"]]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"its {REPORT} is no report of a build") from error
    for name, dtype in told:
        stored = held.get(f"{name}.q", held.get(name))
        if stored != dtype:
            raise ValueError(f"the tensor {name} is stored as {stored}, and was made as {dtype}")


def _check_plans(manifest: Manifest) -> None:
    """Compares the facts of a TensorRT program with the files that they speak of."""
    plans = manifest.tensorrt.get("plans", {})
    files = {file.path: file for file in manifest.files}
    if not isinstance(plans, Mapping):
        raise ValueError(f"its plans are {str(plans)[:40]}, an object is expected")
    if plans and manifest.weights != "fp8":
        raise ValueError(f"its plans take fp8 weights, and its own are {manifest.weights}")
    if plans and manifest.tensorrt.get("arch") != manifest.arch:
        raise ValueError(
            f"its plans are for {str(manifest.tensorrt.get('arch'))[:40]}, not for {manifest.arch}"
        )
    for name, plan in plans.items():
        plan = plan if isinstance(plan, Mapping) else {}
        file = files.get(f"plans/{plan.get('file')}")
        if file is None:
            raise ValueError(f"the plan {name[:40]} is not in its list of files")
        if (plan.get("bytes"), plan.get("sha256")) != (file.bytes, file.sha256):
            raise ValueError(f"the plan {name[:40]} is another file than {file.path}")
        for key in ("inputs", "outputs"):
            ports = plan.get(key)
            for port in ports if isinstance(ports, list | tuple) and ports else [ports]:
                _check_port(str(name), port, manifest)
    if plans:
        _check_tokens(manifest.tensorrt.get("tokens"))


def _check_tokens(tokens: object) -> None:
    held = tokens if isinstance(tokens, Mapping) else {}
    numbers = [held.get(key) for key in ("least", "usual", "most")]
    whole = [number for number in numbers if type(number) is int]
    if len(whole) != 3 or whole != sorted(whole) or whole[0] < 1:
        raise ValueError(f"its plans take the tokens {str(tokens)[:80]}")


def _check_port(plan: str, port: object, manifest: Manifest) -> None:
    """Compares an input or output of a plan with the model's numbers."""
    match port:
        case [str(name), str(kind), [*shape]]:
            wanted = _ports(manifest.model.dim, manifest.padded_ffn).get((name, kind))
            if wanted == tuple(shape):
                return
            by_model = "no such port" if wanted is None else str([*wanted])
            raise ValueError(
                f"the plan {plan[:40]} has the port {name[:40]} {kind[:20]} {str(shape)[:60]}, and "
                f"by the model's numbers {by_model}"
            )
    raise ValueError(f"the plan {plan[:40]} has the port {str(port)[:60]}")


def _ports(dim: int, ffn: int) -> dict[tuple[str, str], tuple[int | str, ...]]:
    """The ports that plans may have, by name and type."""
    made: dict[tuple[str, str], tuple[int | str, ...]] = {
        ("x", "FLOAT"): (1, _TOKENS, dim),
        ("out", "FLOAT"): (1, _TOKENS, dim),
        ("modulation", "FLOAT"): (1, 6, dim),
        ("cos", "FLOAT"): (1, _TOKENS, HEAD_SIZE // 2),
        ("sin", "FLOAT"): (1, _TOKENS, HEAD_SIZE // 2),
        ("text", "FLOAT"): (1, TEXT_TOKENS, dim),
        ("vision", "FLOAT"): (1, _VISION_TOKENS, dim),
        ("qkv", "BF16"): (1, _TOKENS, 3 * dim),
        ("attention", "BF16"): (1, _TOKENS, dim),
    }
    for name in ("text_k", "text_v", "vision_k", "vision_v"):
        rows = TEXT_TOKENS if name.startswith("text") else _VISION_TOKENS
        made[name, "BF16"] = (1, rows, dim)
    for name, (shape, _) in _block(dim, ffn, "fp8"):
        if name.endswith(".q"):
            made[name, "FP8"] = (1, *shape)
        elif name not in ("modulation", "smooth", "inner"):
            made[name, "FLOAT"] = shape
    return made


def _check_kernel(kernel: Cubin) -> None:
    """Compares a kernel's record with what its machine code says of itself."""
    try:
        code = read_elf(kernel.data)
    except BuildError as error:
        raise ValueError(f"the kernel {kernel.name} is no machine code: {error}") from error
    arch = next(arch for arch in ARCHS if arch.name == kernel.arch)
    told = {
        "entry": (kernel.entry, code.entry),
        "warps": (kernel.warps * WARP, code.threads),
        "registers": (kernel.registers, code.registers),
        "bytes of code": (kernel.text_bytes, code.text_bytes),
        "toolkit": (kernel.toolkit, code.toolkit),
        "capability": (arch.capability[0] * 10 + arch.capability[1], code.capability),
        "bytes of scratch": (kernel.scratch_bytes, 0),
    }
    for what, (said, found) in told.items():
        if said != found:
            raise ValueError(f"the kernel {kernel.name} has {what} {found}, not {said}")
    if not 0 <= kernel.shared_bytes <= arch.shared_bytes:
        raise ValueError(
            f"the kernel {kernel.name} wants {kernel.shared_bytes} bytes of shared memory; a block "
            f"of {arch.name} may have {arch.shared_bytes}"
        )


def _check_names(manifest: Manifest, kernels: Sequence[Cubin]) -> None:
    names = [kernel.name for kernel in kernels]
    if len(names) != len({*names}):
        raise ValueError("it has a kernel twice")
    files = [file.path for file in manifest.files if file.path.startswith("kernels/")]
    if unknown := _first(files, [f"kernels/{name}.cubin" for name in names]):
        raise ValueError(f"{unknown} belongs to no kernel that it names")


def _first(names: Iterable[str], others: Iterable[str]) -> str | None:
    """The first name in order that is not among the others."""
    return min({*names}.difference(others), default=None)
