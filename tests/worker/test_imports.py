"""The imports of the worker: no compiler; in its handler and the launcher, Python's own alone.

Each import is done in a process of its own: this one has imported Triton long ago.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OFFLINE = ("engine.build", "engine.demo", "kernels.device", "kernels.aot.compile",
           "kernels.aot.toolkit", "kernels.aot.sass", "kernels.aot.proofs")  # fmt: skip


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


BROUGHT = """
import sys
before = {*sys.modules}
__import__(sys.argv[1])
tops = {name.partition(".")[0] for name in {*sys.modules} - before}
print(*sorted(tops - {*sys.stdlib_module_names}))
"""


@pytest.mark.parametrize(
    ("module", "ours"),
    [
        ("handler", ["engine", "handler"]),
        ("kernels.launch", ["kernels"]),
        ("engine.config", ["engine"]),
    ],
)
def test_handler_launcher_and_settings_import_nothing_but_pythons_own_modules(module, ours):
    """Neither torch nor the platform's library, which take seconds: those come to serve."""
    assert in_a_new_process(BROUGHT, module) == ours


def test_the_search_for_other_modules_finds_them_where_they_are_imported():
    assert {"torch", "numpy"} < {*in_a_new_process(BROUGHT, "engine.conditioning")}


@pytest.mark.parametrize("package", ["kernels", "kernels.device"])
def test_a_package_imports_nothing_by_itself(package):
    """Others look for a package called `kernels` and import it to see what it has."""
    path = ROOT / package.replace(".", "/") / "__init__.py"
    nodes = list(ast.walk(ast.parse(path.read_text("utf-8"))))
    assert [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)] == []
    assert [node.id for node in nodes if isinstance(node, ast.Name)] == []
