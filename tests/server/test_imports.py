"""The worker and the command line start without the service: they import nothing of it."""

import pytest

from tests.worker.test_imports import in_a_new_process, worker_modules

FOUND = """
import sys
from importlib import import_module
for name in sys.argv[1:]:
    import_module(name)
print(*sorted(name for name in sys.modules if name.startswith("engine.server")
              or name.partition(".")[0] in ("fastapi", "starlette", "uvicorn", "h11")))
"""


@pytest.mark.parametrize("module", ["handler", "engine.__main__"])
def test_the_worker_and_the_command_line_import_nothing_of_the_service(module):
    of_worker = [name for name in worker_modules() if not name.startswith("engine.server")]
    modules = of_worker if module == "handler" else []
    assert {"engine.worker.service", "engine.worker.renderer"} <= {*modules} or not modules
    assert in_a_new_process(FOUND, module, *modules) == []


def test_the_search_finds_them_where_they_are_imported():
    found = in_a_new_process(FOUND, "engine.server.run")
    assert {"engine.server.app", "fastapi", "uvicorn"} < {*found}


def test_without_the_extra_the_command_says_what_to_install():
    program = """
import sys
sys.modules["fastapi"] = None
from engine.__main__ import main
try:
    main(["serve", "--port", "0"])
except SystemExit as ending:
    print(ending.code)
"""
    assert in_a_new_process(program) == ["2"]
