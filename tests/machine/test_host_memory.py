"""What the host has is what machine and container allow, and pinned memory is given back."""

import gc

import pytest
import torch

from engine.machine.host_memory import HostMemory, host_memory
from engine.machine.pinned import pinner
from kernels.launch import DriverError
from tests.support.fake_driver import FakeDriver, build_driver

GIB = 2**30
MACHINE = 20 * GIB


@pytest.fixture
def meminfo(tmp_path):
    path = tmp_path / "meminfo"
    path.write_text(f"MemTotal: 1 kB\nMemAvailable:   {MACHINE // 1024} kB\nSwapFree: 0 kB\n")
    return path


def write(folder, **files):
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(str(content))


def test_without_a_limit_it_is_what_the_machine_has(meminfo, tmp_path):
    assert host_memory(meminfo, tmp_path / "none") == HostMemory(MACHINE, "the machine")
    write(tmp_path, memory__max="max\n", memory__current=5, memory__stat="inactive_file 1\n")
    assert host_memory(meminfo, tmp_path) == HostMemory(MACHINE, "the machine")


def test_a_container_has_what_its_limit_leaves_beside_the_page_cache(meminfo, tmp_path):
    stat = f"anon 7\ninactive_file {3 * GIB}\n"
    write(tmp_path, memory__max=16 * GIB, memory__current=5 * GIB, memory__stat=stat)
    assert host_memory(meminfo, tmp_path) == HostMemory(14 * GIB, "the container's limit")


def test_older_control_groups_are_read_too(meminfo, tmp_path):
    (tmp_path / "memory").mkdir()
    write(
        tmp_path / "memory",
        memory__limit_in_bytes=8 * GIB,
        memory__usage_in_bytes=3 * GIB,
        memory__stat=f"total_inactive_file {GIB}\n",
    )
    assert host_memory(meminfo, tmp_path) == HostMemory(6 * GIB, "the container's limit")


def test_a_limit_above_the_machine_is_none(meminfo, tmp_path):
    write(tmp_path, memory__max=99 * GIB, memory__current=0, memory__stat="")
    assert host_memory(meminfo, tmp_path) == HostMemory(MACHINE, "the machine")


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    return FakeDriver(build_driver(tmp_path_factory.mktemp("driver")))


def test_memory_is_pinned_in_its_size_for_as_long_as_it_lives(driver):
    pin = pinner(driver.path)
    memory = pin(300_000)
    memory.fill_(7)
    assert (len(memory), memory.dtype, int(memory[-1])) == (300_000, torch.uint8, 7)
    part = memory[:5]
    assert driver.log()[-1] == "register 300000 1"
    del memory
    gc.collect()
    assert driver.log()[-1] == "register 300000 1"  # as long as anybody looks at it
    del part
    gc.collect()
    assert driver.log()[-1] == "unregister"


def test_a_system_that_refuses_is_told(driver):
    pin = pinner(driver.path)
    driver.fail("cuMemHostRegister_v2", 2)
    with pytest.raises(DriverError, match="cuMemHostRegister_v2 for 4096 bytes failed"):
        pin(4096)
    driver.fail("", 0)
