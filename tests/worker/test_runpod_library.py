"""The platform's library is whole, and nobody is asked for the processor while it is imported."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import sys, multiprocessing, subprocess
for module in (multiprocessing, subprocess):
    for name in ("Process", "Popen"):
        if hasattr(module, name):
            setattr(module, name, None)  # py-cpuinfo starts both
from engine.worker.runpod_library import import_runpod
runpod = import_runpod()
print(callable(runpod.serverless.start), callable(runpod.serverless.progress_update))
print(runpod.serverless.utils.rp_debugger.PROCESSOR != "", import_runpod() is runpod)
print("cpuinfo" in sys.modules)
"""


def test_the_library_is_imported_without_asking_for_the_processor():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines() == ["True True", "True True", "False"], done.stderr
