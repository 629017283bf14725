"""Builds the TensorRT program of an architecture: ONNX graphs, and plans from them.

It is optional and experimental: no GPU here can run a plan. The library is used only in a process
of its own (`engine.build.plan_worker`), because its builder crashes on some graphs; nothing of it
is imported here. One plan of one block serves all layers, weights being its inputs. A plan counts
as built when its layer table proves that it computes in FP8 (`engine.build.plan_proofs`).
Source: docs/reference/tensorrt.md 8.
"""

import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import torch

from engine.build.export import export
from engine.build.plan_proofs import layer_table, prove, read_layers
from engine.build.segments import DEPLOY, SEGMENTS, TWIN, Segment
from engine.clock import over
from engine.config import ModelConfig
from engine.errors import BuildFailed
from engine.tensorrt.plans import PlanRecord, ProgramRecord, TokenRange
from kernels.arch import SM89, SM120, Arch

log = logging.getLogger(__name__)

TARGETS: Mapping[Arch, str] = {SM89: "SM89", SM120: "SM120"}  # as the library calls them
NEEDS = ("tensorrt_rtx", "onnx", "onnxscript")
WORKER = (sys.executable, "-m", "engine.build.plan_worker")
ERRORS = ("[ERROR]", "[INTERNAL_ERROR]")  # how such lines of the builder's log begin
TWIN_FILE = "block_fp32.onnx"

# The widest model of a range, and the tokens of its clips: test models, and the real ones' at 480p
# to 720p, with four further pictures.
RANGES = {512: TokenRange(64, 1024, 16_384), 65_536: TokenRange(12_288, 36_864, 110_592)}


def unavailable(arch: Arch, weights_form: str, needs: Sequence[str] = NEEDS) -> str | None:
    """Says why no such program can be built here; None if it can."""
    if arch not in TARGETS:
        known = " and ".join(known.name for known in TARGETS)
        return (
            f"TensorRT-RTX builds for {known}, not for {arch.name}. Leave tensorrt out of "
            "--programs."
        )
    if weights_form != "fp8":
        return (
            f"the TensorRT program takes fp8 weights, not {weights_form}. Use --weights fp8, or "
            "leave tensorrt out of --programs."
        )
    if missing := [name for name in needs if find_spec(name) is None]:
        return (
            f"{', '.join(missing)} is not installed here. Run pip install '.[tensorrt]' where the "
            "engine's sources are, or leave tensorrt out of --programs."
        )
    return None


def build_program(
    config: ModelConfig, arch: Arch, folder: Path, *, timeout_s: float
) -> ProgramRecord:
    """Writes graphs, plans and their layer tables into `folder`, which exists.

    `config.ffn` is that of the package's weights, padded. Raises `BuildFailed` with the graph and
    the architecture for a plan that is refused, takes longer than `timeout_s`, crashes the builder
    or fails its proof.
    """
    tokens = next(found for widest, found in RANGES.items() if config.dim <= widest)
    plans, versions = {}, set()
    for name in over([*SEGMENTS], "tensorrt", "plan"):
        segment = Segment(name, config, DEPLOY)
        export(segment, folder / f"{name}.onnx")
        plans[name], version = build_plan(segment, arch, folder, tokens, timeout_s=timeout_s)
        versions.add(version)
    export(Segment("block", config, TWIN), folder / TWIN_FILE)
    evidence = [f"{name}.{kind}" for name in SEGMENTS for kind in ("onnx", "layers.txt")]
    return ProgramRecord(arch.name, versions.pop(), tokens, plans, (*evidence, TWIN_FILE))


def build_plan(
    segment: Segment,
    arch: Arch,
    folder: Path,
    tokens: TokenRange,
    *,
    timeout_s: float,
    worker: Sequence[str] = WORKER,
) -> tuple[PlanRecord, str]:
    """Builds and proves a plan of the graph in `folder`. Returns its record and the library's
    version; raises as `build_program` does.
    """
    start = time.perf_counter()
    path = folder / f"{segment.name}.plan"
    name = f"{path.name} for {arch.name}"
    graph, shapes = path.with_suffix(".onnx"), _open_shapes(segment, tokens)
    text, facts = run_builder(graph, path, arch, shapes, timeout_s=timeout_s, worker=worker)
    _check_ports(name, segment, facts)
    if not (table := layer_table(text)):
        raise BuildFailed(
            f"{name} cannot be proven: the builder's log lists no layers. pyproject.toml names the "
            "version of TensorRT-RTX that lists them."
        )
    (folder / f"{segment.name}.layers.txt").write_text(table, encoding="utf-8")
    weights = [port for port in segment.inputs if port.dtype == torch.float8_e4m3fn]
    depths = {port.name: port.sized(1)[-1] for port in weights}
    recipe = segment.recipe
    proof = prove(name, read_layers(table), depths, recipe.attentions8, recipe.attentions)
    data = path.read_bytes()
    log.info("%s: %s, %.0f ms", name, proof, 1e3 * (time.perf_counter() - start))
    digest = hashlib.sha256(data).hexdigest()
    inputs, outputs = (
        tuple(port.record() for port in ports) for ports in (segment.inputs, segment.outputs)
    )
    plan = PlanRecord(path.name, len(data), digest, inputs, outputs, asdict(proof))
    return plan, str(facts["library"])


def _open_shapes(segment: Segment, tokens: TokenRange) -> Mapping[str, Sequence[Sequence[int]]]:
    """The least, usual and largest shape of each input that depends on the number of tokens."""
    return {
        port.name: [port.sized(number) for number in (tokens.least, tokens.usual, tokens.most)]
        for port in segment.inputs
        if port.sized(1) != port.shape
    }


def run_builder(
    graph: Path,
    plan: Path,
    arch: Arch,
    shapes: Mapping[str, Sequence[Sequence[int]]],
    *,
    timeout_s: float,
    worker: Sequence[str] = WORKER,
) -> tuple[str, Mapping[str, object]]:
    """Writes a plan of a graph and returns the builder's log and facts. If the builder dies, that
    is a `BuildFailed`. `shapes`: least, usual and largest of each input whose size is open.
    """
    name = f"{plan.name} for {arch.name}"
    order = json.dumps({"target": TARGETS[arch], "shapes": shapes})
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    facts = plan.with_suffix(".json")
    try:
        done = subprocess.run(
            [*worker, str(graph), str(plan)], input=order, env=environment, timeout=timeout_s,
            check=False, capture_output=True, encoding="utf-8", errors="replace",
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise BuildFailed(
            f"{name} was not built from {graph.name} within {timeout_s:g} s; it takes a few. Build "
            "again, alone on the machine; if that does not help, leave tensorrt out of --programs."
        ) from error
    if done.returncode == 0 and facts.exists():
        known = json.loads(facts.read_bytes())
        facts.unlink()
        return done.stdout, known
    errors = [line for line in done.stdout.splitlines() if line.startswith(ERRORS)]
    words = (errors[:1] or done.stderr.strip().splitlines()[-1:] or ["it left no message"])[0]
    how = "refuses"
    if done.returncode < 0:
        how = f"dies of {signal.Signals(-done.returncode).name} on"
    raise BuildFailed(
        f"{name}: TensorRT-RTX's builder {how} {graph.name}: {words.rstrip('.')}. The package can "
        "be built without tensorrt in --programs."
    )


def _check_ports(name: str, segment: Segment, facts: Mapping[str, object]) -> None:
    for side, ports in (("inputs", segment.inputs), ("outputs", segment.outputs)):
        wanted = [[port.name, port.kind, list(port.sized(-1))] for port in ports]
        if facts[side] != wanted:
            raise BuildFailed(
                f"{name} has the {side} {facts[side]}, expected {wanted}. pyproject.toml names the "
                "version of TensorRT-RTX that keeps them."
            )
