"""Dependencies point down: the wings of the house, low to high, and every import held to them."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OURS = ("engine", "kernels", "virtual_gpu", "benchmarks")

# Low to high. A module imports from its own wing and from lower lines; two names on one line are
# strangers, who meet in whoever calls them both.
LAYERS = """
kernels.device
kernels
engine.errors engine.clock
engine.flow engine.diskcache
engine.config engine.command_line
engine.media engine.package engine.models
engine.stage_dump engine.pose engine.machine
engine.masks
engine.denoise engine.conditioning engine.drift
engine.source engine.tensorrt engine.memory engine.golden engine.recipes
engine.residency engine.demo engine.jobs engine.build
engine.program engine.pipeline
engine.load
engine.worker
engine.server
engine.cli
engine.__main__ build_engine handler
virtual_gpu
benchmarks
""".strip().splitlines()

RANK = {name: rank for rank, line in enumerate(LAYERS) for name in line.split()}


def modules():
    """(path, dotted name) of every module that is held to the layers."""
    paths = [path for top in OURS for path in (ROOT / top).rglob("*.py")]
    for path in sorted([*paths, ROOT / "build_engine.py", ROOT / "handler.py"]):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield path, ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = list(modules())
NAMES = {name for _, name in MODULES}


def imports(path):
    """Modules of ours that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in inner if name in NAMES} or {node.module}
    return {name for name in found if name.split(".")[0] in (*OURS, "build_engine", "handler")}


def wing(name):
    """The entry of LAYERS that a module belongs to: the longest that begins its name."""
    parts = name.split(".")
    return next((n for k in range(len(parts), 0, -1) if (n := ".".join(parts[:k])) in RANK), None)


@pytest.mark.parametrize(("path", "name"), MODULES, ids=lambda value: str(value)[-40:])
def test_a_module_imports_from_its_own_wing_and_lower_ones(path, name):
    if name == "engine":
        assert imports(path) == set()
        return
    assert wing(name) is not None, f"{name} belongs to no wing"
    wings = {wing(other) for other in imports(path)} - {wing(name)}
    assert {other for other in wings if RANK[other] >= RANK[wing(name)]} == set()


def test_the_virtual_gpu_knows_kernels_alone():
    """It executes what the compiler made, and nothing that serves may need it."""
    found = {
        other for path, name in MODULES if wing(name) == "virtual_gpu" for other in imports(path)
    }
    assert {other.split(".")[0] for other in found} == {"kernels", "virtual_gpu"}


def test_no_import_runs_in_a_circle():
    order = TopologicalSorter({name: imports(path) - {name} for path, name in MODULES})
    assert set(order.static_order()) >= NAMES  # raises CycleError with the circle


def test_every_layer_names_something_that_exists():
    assert {name for name in RANK if name not in NAMES} == set()


def test_nothing_is_called_utils():
    stems = {path.stem for path, _ in MODULES}
    assert stems & {"utils", "util", "common", "helpers", "misc"} == set()
