"""A machine is replaced for what another would mend, and for nothing else."""

import dataclasses

import pytest

from engine.errors import BadPackage, MissingModel, OutputError, UnsupportedDriver, UnsupportedGpu
from engine.worker.fitness import FREE_BYTES, fitness_checks
from engine.worker.scratch import Scratch
from engine.worker.service import Worker
from tests.support.workers import endpoint


@dataclasses.dataclass
class Disk:
    free_bytes: int


@pytest.mark.parametrize("error", [BadPackage("No package."), MissingModel("No VAE.")])
def test_what_no_other_machine_would_mend_passes_the_checks_and_is_told_to_jobs(tmp_path, error):
    """Also on a machine with a GPU: what loading judges is judged once."""
    given = endpoint(tmp_path, allows_cpu=False, on_runpod=True)
    scratch = Scratch(given.scratch)
    worker = Worker(given, scratch)

    def load(_):
        raise error

    worker.start(load)
    assert worker.health()["problem"] == str(error)
    assert [check.__name__ for check in fitness_checks(Disk(FREE_BYTES))] == ["disk"]
    for check in fitness_checks(Disk(FREE_BYTES)):
        check()
    worker.close()


@pytest.mark.parametrize("error", [UnsupportedGpu("No GPU."), UnsupportedDriver("Old.")])
def test_what_another_machine_would_mend_ends_the_start(tmp_path, error):
    worker = Worker(given := endpoint(tmp_path), Scratch(given.scratch))

    def load(_):
        raise error

    with pytest.raises(type(error)):
        worker.start(load)
    worker.close()


def test_a_disk_without_room_for_a_job_fails():
    (disk,) = fitness_checks(Disk(FREE_BYTES - 1))
    with pytest.raises(OutputError, match=r"^2\.1 GB of disk are free .* are needed\.$"):
        disk()


def test_loading_leaves_nothing_in_the_folder_of_jobs(tmp_path):
    worker = Worker(given := endpoint(tmp_path), Scratch(given.scratch))
    seen = []

    def load(given):
        (given.scratch / "warm.mp4").write_bytes(b"x")
        seen.append(given.scratch)
        raise BadPackage("No package.")

    worker.start(load)
    assert [path.exists() for path in seen] == [False]
    worker.close()
