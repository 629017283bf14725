"""What the worker imports: no compiler, and the launcher nearly for nothing.

Each import is done in a process of its own: this one has imported Triton long ago.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OFFLINE = ("engine.build", "engine.demo", "kernels.device", "kernels.aot.compile",
           "kernels.aot.toolkit",           "kernels.aot.sass", "kernels.aot.proofs")  # fmt: skip
LIMIT_MS = 50
MOST_RUNS = 20  # the best counts: CPU time too depends on what else a machine does


def worker_modules():
    for top in ("engine", "kernels"):
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            if not any(name == away or name.startswith(f"{away}.") for away in OFFLINE):
                yield name


def in_a_new_process(program, *arguments):
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


FOUND = """
import sys
from importlib import import_module
for name in sys.argv[1:]:
    import_module(name)
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""


def test_nothing_of_the_worker_imports_triton():
    modules = list(worker_modules())
    assert {
        "engine.denoise.block",
        "engine.load",
        "engine.pipeline",
        "kernels.launch",
        "kernels.ops",
    } < {*modules}
    found = in_a_new_process(FOUND, *modules)
    assert {"torch", "engine", "kernels"} < {*found}
    assert "triton" not in found


def test_the_search_for_triton_finds_it_where_it_is_imported():
    assert "triton" in in_a_new_process(FOUND, "kernels.device.gemm")


TIMED = """
import sys, time
begin = time.process_time()
import kernels.launch
print(1000 * (time.process_time() - begin), "torch" in sys.modules)
"""


def test_the_launcher_is_imported_in_50_ms_and_without_torch():
    times = []
    while not times or (min(times) >= LIMIT_MS and len(times) < MOST_RUNS):
        ms, has_torch = in_a_new_process(TIMED)
        assert has_torch == "False"
        times.append(float(ms))
    assert min(times) < LIMIT_MS, times


@pytest.mark.parametrize("package", ["kernels", "kernels.device"])
def test_a_package_imports_nothing_by_itself(package):
    """Others look for a package called `kernels` and import it to see what it has."""
    path = ROOT / package.replace(".", "/") / "__init__.py"
    nodes = list(ast.walk(ast.parse(path.read_text())))
    assert [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)] == []
    assert [node.id for node in nodes if isinstance(node, ast.Name)] == []
