"""Fixtures for every test: golden data, NaN in fresh memory, a small and quiet torch."""

import logging
import os
import signal
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # triton decides at import; compiling runs in workers

import pytest
import torch

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"


@pytest.fixture
def golden() -> Path:
    """The golden folder beside the project; without it a test is skipped, or fails if required."""
    if not GOLDEN.is_dir():
        message = "golden data is not beside this checkout (../shared/golden)"
        if os.environ.get("SCAIL_GOLDEN") == "required":
            pytest.fail(message)
        pytest.skip(message)
    return GOLDEN


@pytest.fixture(scope="session", autouse=True)
def _state(tmp_path_factory):
    """Nothing of a test is left in, or taken from, the user's cache."""
    before = os.environ.get("SCAIL_STATE")
    os.environ["SCAIL_STATE"] = str(tmp_path_factory.mktemp("state"))
    yield
    if before is None:
        del os.environ["SCAIL_STATE"]
    else:
        os.environ["SCAIL_STATE"] = before


@pytest.fixture(scope="session", autouse=True)
def _same_for_everybody():
    """Tests talk to this machine alone, which no proxy reaches, and some look at modes."""
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        del os.environ[name]
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.fixture
def usual_signals():
    """Signals end processes, as at a terminal: nohup and background shells have some ignored, which
    every process that is started inherits.
    """
    usual = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGHUP: signal.SIG_DFL,
        signal.SIGTERM: signal.SIG_DFL,
    }
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def _log_level():
    """The command line sets it for its process, which here is everybody's."""
    before = logging.getLogger("engine").level
    yield
    logging.getLogger("engine").setLevel(before)


@pytest.fixture(autouse=True)
def _seeded():
    """Every test draws the same numbers, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _unwritten_memory_is_nan():
    """`torch.empty` is filled with NaN, so an output that nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
