"""Builds a TensorRT-RTX plan from an ONNX graph, in a process of its own: the builder may crash.

    python -m engine.build.plan_worker GRAPH.onnx FILE.plan < order.json

The order: `target`, a compute capability of the library, and `shapes`, the smallest, usual and
largest of each input whose size is open. Writes the builder's log to standard output, then the plan
and FILE.json: the library's version and what the plan takes and returns. The parent is
`engine.build.tensorrt`.
"""

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Protocol

trt = import_module("tensorrt_rtx")  # optional, and without types for a checker


class Severity(Protocol):
    name: str


class NetworkPort(Protocol):
    name: str
    dtype: Severity
    shape: tuple[int, ...]


class BuilderLog(trt.ILogger):
    """Writes every message at once: a buffer would die with the process."""

    def log(self, severity: Severity, msg: str) -> None:
        sys.stdout.write(f"[{severity.name}] {msg}\n")
        sys.stdout.flush()


def build(graph: Path, order: dict) -> tuple[bytes, dict]:
    """Builds the plan, and tells its facts. Ends with a sentence if the library refuses."""
    log = BuilderLog()
    builder = trt.Builder(log)
    typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(typed)
    parser = trt.OnnxParser(network, log)
    if not parser.parse(graph.read_bytes()):
        error = parser.get_error(0)
        sys.exit(f"{error.node_operator()} {error.node_name()}: {error.desc()}")
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # with it the log has all layers
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, order["target"]), 0)
    if order["shapes"]:
        profile = builder.create_optimization_profile()
        for name, shapes in order["shapes"].items():
            profile.set_shape(name, *shapes)
        config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        sys.exit("the builder made no plan")
    return bytes(plan), {
        "library": trt.__version__,
        "inputs": [_port(network.get_input(n)) for n in range(network.num_inputs)],
        "outputs": [_port(network.get_output(n)) for n in range(network.num_outputs)],
    }


def _port(tensor: NetworkPort) -> list:
    return [tensor.name, tensor.dtype.name, list(tensor.shape)]


def main(graph: Path, plan: Path) -> None:
    data, facts = build(graph, json.load(sys.stdin))
    plan.write_bytes(data)
    plan.with_suffix(".json").write_text(json.dumps(facts), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
