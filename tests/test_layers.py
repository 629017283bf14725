"""Dependencies point down: the layers of the house, and every import held against them."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Low to high, one layer a line. A module imports from lower lines only; two modules of one line
# are strangers, and a package named here is one module to the others.
LAYERS = """
kernels.arch kernels.device
kernels.spec kernels.fp8
kernels.signature kernels.toolkit kernels.elf kernels.cubin kernels.layout
kernels.sass kernels.launch
kernels.attention kernels.cross_attention kernels.rope kernels.modulate kernels.capsules
kernels.channel_norm
kernels.gemm kernels.proofs
kernels.compile kernels.ops kernels.trial
engine.errors engine.clock engine.diskcache engine.heap engine.pools
engine.joblog
engine.rawfile engine.resident engine.blank engine.progress engine.scratch
engine.tensorrt_library
engine.stream
engine.config engine.flow engine.addresses engine.hub engine.fields
engine.job
engine.sampler engine.windows engine.gpu engine.media engine.download engine.models
engine.pose engine.manifest engine.endpoint
engine.weightfile engine.variants engine.block engine.binding engine.fetch
engine.recipes engine.comfy engine.body
engine.package engine.steps engine.honoured engine.watch
engine.upload engine.graphs engine.workflow engine.plans
engine.exact engine.denoiser engine.tensorrt_steps engine.request engine.stages engine.source
engine.capture engine.conditioning engine.memory
engine.residency
engine.pipeline engine.build
engine.outlook engine.fitness engine.delivery
engine.worker
engine.load engine.golden engine.demo
engine.renderer
engine.__main__ build_engine handler benchmarks
""".strip().splitlines()
LEAVES = {"engine", "kernels"}  # imports nothing of ours

RANK = {name: rank for rank, line in enumerate(LAYERS) for name in line.split()}


def modules():
    paths = (
        path for top in ("engine", "kernels", "benchmarks") for path in (ROOT / top).rglob("*.py")
    )
    paths = [*paths, ROOT / "build_engine.py", ROOT / "handler.py"]
    for path in sorted(paths):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield path, ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def home(name):
    """The entry of LAYERS that a module belongs to."""
    parts = name.split(".")
    return next((n for k in range(len(parts), 0, -1) if (n := ".".join(parts[:k])) in RANK), None)


@pytest.mark.parametrize(("path", "name"), list(modules()), ids=lambda value: str(value)[-40:])
def test_a_module_imports_from_lower_layers_only(path, name):
    ours = {home(n) for n in imports(path) if n.split(".")[0] in ("engine", "kernels")} - {None}
    if name in LEAVES:
        assert ours == set()
        return
    assert home(name) is not None, f"{name} has no layer"
    wrong = {n for n in ours if n != home(name) and RANK[n] >= RANK[home(name)]}
    assert wrong == set(), f"{name} must not import {wrong}"


def test_every_layer_names_something_that_exists():
    known = {name for _, name in modules()}
    assert {n for n in RANK if n not in known} == set()


def test_nothing_is_called_utils():
    names = {path.stem for path, _ in modules()}
    assert names & {"utils", "util", "common", "helpers", "misc"} == set()
