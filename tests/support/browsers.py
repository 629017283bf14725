"""A browser that a test drives, and the service that it opens: both real, both of this machine."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
# tests only, and not in the repository: 650 kB that npm has
AXE, AXE_SHA256 = "4.14.1", "29348999450cdf2849a8e70b7912fc2da85a849da39c0d0d5394f51d4a9ed95c"
_ADDRESS = re.compile(r"at (http://\S+/)")
_START_S = 120


@dataclass(frozen=True)
class Served:
    """A service that runs, and where it keeps its things."""

    address: str
    state: Path


@contextmanager
def service(state: Path, **variables: str) -> Iterator[Served]:
    """Runs `python -m engine serve` with the demo models, until the block ends."""
    environment = os.environ | {"SCAIL_STATE": str(state), "OMP_NUM_THREADS": "1"} | variables
    command = [sys.executable, "-m", "engine", "serve", "--port", "0"]
    log = state / "log.txt"
    with log.open("wb") as told:
        running = subprocess.Popen(command, env=environment, stdout=told, stderr=told)
    try:
        yield Served(_address(running, log), state)
    finally:
        running.terminate()
        running.wait(30)


def _address(running: subprocess.Popen[bytes], log: Path) -> str:
    ends = time.monotonic() + _START_S
    while time.monotonic() < ends and running.poll() is None:
        if found := _ADDRESS.search(log.read_text("utf-8")):
            return found[1]
        time.sleep(0.1)
    raise AssertionError(f"the service did not start: {log.read_text('utf-8')}")


@contextmanager
def chromium() -> Iterator["Browser"]:  # noqa: F821 - playwright may not be there
    """Starts Debian's Chromium, or skips the test."""
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here (apt-get install chromium)")
    api = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
    with api.sync_playwright() as playwright:
        # root has no sandbox; a video may play before anybody clicked
        arguments = ["--no-sandbox", "--autoplay-policy=no-user-gesture-required"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


def axe(folder: Path) -> str:
    """Returns the source of axe-core, from npm into a folder that is kept, or skips the test."""
    script = folder / f"axe-{AXE}.min.js"
    if not script.is_file():
        npm = shutil.which("npm")
        if npm is None:
            pytest.skip("there is no npm here, which brings axe-core")
        packed = subprocess.run(
            [npm, "pack", "--silent", f"axe-core@{AXE}"], cwd=folder, capture_output=True
        )
        if packed.returncode:
            pytest.skip("npm brings no axe-core here (is the registry reachable?)")
        with tarfile.open(folder / f"axe-core-{AXE}.tgz") as archive:
            member = archive.extractfile("package/axe.min.js")
            assert member is not None
            script.write_bytes(member.read())
    found = script.read_bytes()
    assert hashlib.sha256(found).hexdigest() == AXE_SHA256
    return found.decode()
