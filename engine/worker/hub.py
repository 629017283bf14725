"""Checks hub.json and tests.json against RunPod's names, each other, and the image.

The Hub builds one image, tests it on one GPU and offers it on pools of GPUs. A wrong name is no
error there: the platform looks for a machine that does not exist.
Source: docs/reference/runpod.md 0.1, 0.2, B.1 and C.4.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from engine.errors import BadRequest
from engine.worker.gpu_pools import (
    CUDA_VERSIONS,
    GPUS,
    PODS,
    POOLS,
    instead,
    instead_of_pool,
    pool_of,
    short,
)
from kernels.arch import ARCHS, SM89, Arch

# The variables that entrypoint.sh and the engine read. RunPod's SDK reads others, with its prefix.
VARIABLES = (
    "SCAIL_PACKAGE", "SCAIL_MODELS", "SCAIL_STATE", "SCAIL_CHECKPOINT", "SCAIL_LORA",
    "SCAIL_INPUTS", "WEIGHTS_REPO", "WEIGHTS_REVISION", "HF_TOKEN", "DEFAULT_VIDEO", "RECIPE",
    "FIT", "MAX_PIXELS", "MAX_FRAMES", "BUCKET_ENDPOINT_URL", "BUCKET_ACCESS_KEY_ID",
    "BUCKET_SECRET_ACCESS_KEY", "BUCKET_NAME",
)  # fmt: skip
PLATFORM = "RUNPOD_"
ACTIONS = ("health", "validate")  # inputs with these render nothing
RENDER_MS = 900_000  # a first start may fetch or build the weights
DISK_GB = 20  # image, clips of a job, and the tenth that the SDK wants free

JsonKind: TypeAlias = "type | tuple[str, ...]"  # a JSON type, or the values that are taken
HUB: Mapping[str, JsonKind] = {
    "title": str, "description": str, "type": ("serverless",), "config": dict, "iconUrl": str,
    "category": ("audio", "embedding", "language", "video", "image"),
}  # fmt: skip
HUB_CONFIG: Mapping[str, JsonKind] = {
    "runsOn": ("GPU",), "containerDiskInGb": int, "gpuCount": int, "gpuIds": str,
    "allowedCudaVersions": list, "env": list, "presets": list, "endpointType": str,
    "cpuFlavor": str,
}  # fmt: skip
TESTS: Mapping[str, JsonKind] = {"tests": list, "config": dict}
TEST: Mapping[str, JsonKind] = {"name": str, "input": dict, "timeout": int}
TESTS_CONFIG: Mapping[str, JsonKind] = {
    "gpuTypeId": str, "gpuCount": int, "allowedCudaVersions": list, "env": list,
    "cpuFlavor": str,
}  # fmt: skip
OPTIONAL = {"iconUrl", "env", "presets", "endpointType", "cpuFlavor"}
NAMES = {str: "a string", int: "a whole number", list: "a list", dict: "an object"}
LARGEST_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Image:
    """What an image has kernels for."""

    archs: tuple[Arch, ...]

    @property
    def name(self) -> str:
        return ", ".join(arch.name for arch in self.archs)

    @property
    def gpus(self) -> str:
        return ", ".join(arch.gpus for arch in self.archs)

    @property
    def capabilities(self) -> set[tuple[int, int]]:
        return {arch.capability for arch in self.archs}

    @property
    def driver(self) -> tuple[int, int]:
        """The oldest CUDA version that suits all of them."""
        return max(arch.driver for arch in self.archs)


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with a listing."""

    file: str
    field: str  # "config.gpuIds"
    sentence: str  # what is there, what is expected, what to write

    def __str__(self) -> str:
        return f"{self.file}: {self.field}: {self.sentence}"


def check(folder: Path) -> list[Problem]:
    """Lists all that is wrong, in the order of the files. `folder`: a project, or its .runpod.

    Raises `BadRequest` for a file that is missing or is no JSON object.
    """
    place = folder / ".runpod" if (folder / ".runpod").is_dir() else folder
    hub, tests = (_load(place / name) for name in ("hub.json", "tests.json"))
    image, problems = _image(place / "Dockerfile")
    offered, wanted = _part(hub, "config"), _part(tests, "config")
    problems += [Problem("hub.json", *found) for found in _hub(hub, offered, image)]
    problems += [Problem("tests.json", *found) for found in _tests(tests, wanted, offered, image)]
    return problems


Problems: TypeAlias = Iterator[tuple[str, str]]  # fields and sentences


def _load(path: Path) -> Mapping[str, object]:
    try:
        data = path.read_bytes()
        if len(data) > LARGEST_BYTES:
            raise ValueError(f"it has {len(data)} bytes, {LARGEST_BYTES} at most are read")
        found = json.loads(data)
        if not isinstance(found, dict):
            raise ValueError("an object is expected")
    except OSError as error:
        raise BadRequest(f"{path} cannot be read: {error.strerror}. The Hub needs it.") from error
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"{path} is not the JSON of a listing: {error}.") from error
    return found


def _part(whole: Mapping[str, object], name: str) -> Mapping[str, object]:
    part = whole.get(name)
    return part if isinstance(part, dict) else {}


def _image(path: Path) -> tuple[Image, list[Problem]]:
    """Finds the architectures of the Hub's image, and what is wrong with its Dockerfile.

    Without a Dockerfile beside the files it is the Ada image.
    """
    if not path.is_file():
        return Image((SM89,)), []
    text = path.read_text(encoding="utf-8", errors="replace")
    argument = re.search(r'^ARG ARCH="?([^"\n]*)"?\s*$', text, re.MULTILINE)
    named = argument[1].split() if argument else []
    archs = tuple(arch for arch in ARCHS if arch.name in named)
    if not named or len(archs) != len(named):
        known = ", ".join(arch.name for arch in ARCHS)
        return Image((SM89,)), [Problem(path.name, "ARG ARCH", f"names none of {known}.")]
    image = Image(archs)
    base = re.search(r"nvidia/cuda:(\d+)\.(\d+)", text)
    if base and (int(base[1]), int(base[2])) > image.driver:
        sentence = (
            f"the base image is of CUDA {base[1]}.{base[2]} and does not start on hosts below "
            f"it; {image.name} is for {_dotted(image.driver)} and newer. Take an older base."
        )
        return image, [Problem(path.name, "ARG CUDA", sentence)]
    return image, []


def _hub(hub: Mapping[str, object], config: Mapping[str, object], image: Image) -> Problems:
    yield from _shape(hub, "", HUB)
    yield from _shape(config, "config.", HUB_CONFIG)
    disk = config.get("containerDiskInGb")
    if type(disk) is int and disk < DISK_GB:
        yield "config.containerDiskInGb", f"is {disk}; the image needs {DISK_GB}."
    yield from _gpu_count(config)
    yield from _not_ours(config)
    if isinstance(ids := config.get("gpuIds"), str):
        yield from (("config.gpuIds", sentence) for sentence in _wrong_ids(ids, image))
    versions = config.get("allowedCudaVersions")
    if isinstance(versions, list):
        yield from _cuda(versions, image)
        fit = [version for version in CUDA_VERSIONS if _release(version) >= image.driver]
        if missing := [version for version in fit if version not in versions]:
            yield (
                "config.allowedCudaVersions",
                f"lacks {', '.join(missing)}. RunPod compares exactly, so hosts that report them "
                f"are never taken; list {_dotted(image.driver)} and everything newer.",
            )
    yield from _variables(config)
    yield from _presets(config)


def _tests(
    tests: Mapping[str, object],
    config: Mapping[str, object],
    hub: Mapping[str, object],
    image: Image,
) -> Problems:
    yield from _shape(tests, "", TESTS)
    cases = tests.get("tests")
    yield from _cases(cases if isinstance(cases, list) else [])
    yield from _shape(config, "config.", TESTS_CONFIG)
    if isinstance(name := config.get("gpuTypeId"), str):
        yield from (("config.gpuTypeId", text) for text in _wrong_gpu(name, hub.get("gpuIds")))
    yield from _gpu_count(config)
    yield from _not_ours(config)
    versions, offered = config.get("allowedCudaVersions"), hub.get("allowedCudaVersions")
    if isinstance(versions, list):
        yield from _cuda(versions, image)
        known = [version for version in versions if version in CUDA_VERSIONS]
        beyond = [v for v in known if isinstance(offered, list) and v not in offered]
        if beyond:
            yield (
                "config.allowedCudaVersions",
                f"has {', '.join(beyond)}, which hub.json does not offer. Write its list here.",
            )
    yield from _variables(config)


def _shape(found: Mapping[str, object], where: str, kinds: Mapping[str, JsonKind]) -> Problems:
    """Checks that all fields are there and of their kinds, and no others."""
    for name in sorted(found.keys() - kinds.keys()):
        yield f"{where}{short(name)}", f"is no field that RunPod reads here; {instead(name, kinds)}"
    for name, kind in kinds.items():
        if name not in found:
            if name not in OPTIONAL:
                yield f"{where}{name}", "is missing."
        elif isinstance(kind, tuple):
            if found[name] not in kind:
                yield (
                    f"{where}{name}",
                    f"is {short(found[name])}; {' or '.join(kind)} is expected.",
                )
        elif type(found[name]) is not kind:
            yield f"{where}{name}", f"is {short(found[name])}; {NAMES[kind]} is expected."


def _gpu_count(config: Mapping[str, object]) -> Problems:
    count = config.get("gpuCount")
    if type(count) is int and count != 1:
        yield "config.gpuCount", f"is {count}; the engine uses 1."


def _not_ours(config: Mapping[str, object]) -> Problems:
    """Names fields that RunPod reads and that mean another kind of worker than this one."""
    if isinstance(kind := config.get("endpointType"), str):
        yield (
            "config.endpointType",
            f'is {short(kind)}. RunPod knows "LB", endpoints that balance HTTP requests over '
            "servers; this worker takes jobs from a queue. Remove the field.",
        )
    if isinstance(flavor := config.get("cpuFlavor"), str):
        yield (
            "config.cpuFlavor",
            f"is {short(flavor)}, which is for machines without a GPU; this worker needs one. "
            "Remove the field.",
        )


def _wrong_ids(text: str, image: Image) -> Iterator[str]:
    """Tells what is wrong with a list of pools such as "ADA_24,-NVIDIA L4"."""
    items = [item.strip() for item in text.split(",")]
    pools = [item for item in items if item in POOLS]
    away = {item.removeprefix("-").strip() for item in items if item.startswith("-")}
    for item in items:
        name = item.removeprefix("-").strip()
        if item.startswith("-"):
            if name in PODS:
                yield f"leaves out {name}, which is in no pool of RunPod. Remove it."
            elif name not in GPUS:
                yield f"leaves out {short(name)}, which is no GPU of RunPod; {instead(name, GPUS)}"
            elif not any(name in POOLS[pool] for pool in pools):
                yield f"leaves out {name}, which is in none of its pools. Remove it."
        elif item in GPUS:
            yield f"{short(item)} is a GPU; a pool is expected here. Write {pool_of(item)}."
        elif item in PODS:
            yield f"{short(item)} is a GPU that no pool of RunPod has. Write {_pool_for(image)}."
        elif item not in POOLS:
            yield f"{short(item)} is no pool of RunPod; {instead_of_pool(item)}"
        else:
            others = [gpu for gpu, found in POOLS[item].items() if found not in image.capabilities]
            if strange := [gpu for gpu in others if gpu not in away]:
                yield (
                    f"{item} has the {strange[0]}; this image is for {image.name} ({image.gpus}). "
                    f"{_without(item, strange, image)}"
                )
    if not pools:
        yield f"names no pool. Write {_pool_for(image)}."


def _without(pool: str, strange: list[str], image: Image) -> str:
    """Tells how to keep GPUs of other architectures out of a pool, or the pool out of the list."""
    if image.capabilities & {*POOLS[pool].values()}:
        return f"Add {','.join(f'-{gpu}' for gpu in strange)}."
    return f"Remove {pool}{_right_image(POOLS[pool][strange[0]])}."


def _wrong_gpu(name: str, ids: object) -> Iterator[str]:
    """Tells what is wrong with the GPU that tests run on; `ids` are the pools of hub.json."""
    items = [item.strip() for item in ids.split(",")] if isinstance(ids, str) else []
    away = {item.removeprefix("-").strip() for item in items if item.startswith("-")}
    offered = [gpu for item in items for gpu in POOLS.get(item, ()) if gpu not in away]
    if name in POOLS:
        gpu = next(iter(POOLS[name]))
        yield f"{name} is a pool; the name of one GPU is expected here. Write {short(gpu)}."
    elif name not in GPUS and name not in PODS:
        yield f"{short(name)} is no GPU of RunPod; {instead(name, GPUS)}"
    elif offered and name not in offered:
        yield f"{name} is in no pool of hub.json. Write one of {', '.join(offered)}."


def _cuda(versions: list[object], image: Image) -> Problems:
    field = "config.allowedCudaVersions"
    for version in versions:
        if not isinstance(version, str):
            yield field, f'has {short(version)}; strings such as "12.8" are expected.'
        elif version not in CUDA_VERSIONS:
            yield (
                field,
                f"has {short(version)}, which no host reports; {instead(version, CUDA_VERSIONS)}",
            )
    strings = [version for version in versions if version in CUDA_VERSIONS]
    if below := [version for version in strings if _release(str(version)) < image.driver]:
        yield (
            field,
            (
                f"has {', '.join(map(str, below))}; the image needs a driver of CUDA "
                f"{_dotted(image.driver)} or newer. Remove what is below."
            ),
        )
    if len(set(strings)) != len(strings):
        yield field, "names a version twice."
    if not versions:
        yield field, f"is empty; list {_dotted(image.driver)} and everything newer."


def _cases(cases: list[object]) -> Problems:
    light = renders = 0
    for number, case in enumerate(cases):
        where = f"tests[{number}]"
        if not isinstance(case, dict):
            yield where, f"is {short(case)}; an object is expected."
            continue
        yield from _shape(case, f"{where}.", TEST)
        is_light = _part(case, "input").get("action") in ACTIONS
        light, renders = light + is_light, renders + (not is_light)
        timeout = case.get("timeout")
        if type(timeout) is int and timeout < (1000 if is_light else RENDER_MS):
            least = "1000 (it counts milliseconds)" if is_light else f"{RENDER_MS} for a render"
            yield f"{where}.timeout", f"is {timeout}; write at least {least}."
    if not light:
        yield "tests", 'have no light self-test. Add one with the input {"action": "health"}.'
    if not renders:
        yield "tests", "render nothing. Add one that makes a small clip."


def _variables(config: Mapping[str, object]) -> Problems:
    items, seen = config.get("env"), set()
    for number, item in enumerate(items if isinstance(items, list) else []):
        where, key = f"config.env[{number}]", item.get("key") if isinstance(item, dict) else None
        if not isinstance(key, str):
            yield where, f'is {short(item)}; {{"key": ..., "value": ...}} is expected.'
            continue
        if key not in VARIABLES and not key.startswith(PLATFORM):
            yield f"{where}.key", f"{short(key)} is read by nothing; {instead(key, VARIABLES)}"
        if key in seen:
            yield f"{where}.key", f"{short(key)} is there twice."
        seen.add(key)
        if not isinstance(item.get("value"), str) and not isinstance(item.get("input"), dict):
            yield where, f"{short(key)} has neither a value, which is a string, nor an input."


def _presets(config: Mapping[str, object]) -> Problems:
    keys = {item.get("key") for item in _objects(config.get("env"))}
    for number, preset in enumerate(_objects(config.get("presets"))):
        for key in _part(preset, "defaults"):
            if key not in keys:
                yield f"config.presets[{number}]", f"sets {short(key)}, which is not in config.env."


def _objects(found: object) -> list[Mapping[str, object]]:
    return [item for item in found if isinstance(item, dict)] if isinstance(found, list) else []


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def _dotted(release: tuple[int, int]) -> str:
    return f"{release[0]}.{release[1]}"


def _pool_for(image: Image) -> str:
    fit = (pool for pool, gpus in POOLS.items() if {*gpus.values()} <= image.capabilities)
    return next(fit)


def _right_image(capability: tuple[int, int]) -> str:
    file = next((arch.image for arch in ARCHS if arch.capability == capability), None)
    return f", and deploy {file} for it" if file else ""
