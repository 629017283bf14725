"""The launcher's calls reach a driver byte for byte; this driver runs nothing and logs them."""

import struct
from dataclasses import replace

import pytest

from kernels.aot.cubin import Cubin, spec_digest
from kernels.arch import SM89, SM90
from kernels.launch import DriverError, KernelBank
from kernels.spec import KernelError, KernelSpec, Tuning
from tests.support.fake_driver import FakeDriver, build_driver

STREAM = 0x57
INVALID_IMAGE = 209  # CUDA_ERROR_NO_BINARY_FOR_GPU

SPEC = KernelSpec(
    name="mix.first",
    device="mix:mix_kernel",
    signature="*fp8e4nv i32 *bf16 fp32 i64 *fp32",
    constants={"D": 128},
    tuning={SM89: Tuning(warps=8, stages=2, blocks={"BLOCK": 64}, toolkit="12.6")},
    multiples_of_16=(1,),
)


def cubin(spec=SPEC, arch=SM89, **fields):
    facts = {
        "name": spec.name, "arch": arch.name, "spec": spec_digest(spec, SM89), "sha256": "",
        "entry": "mix_kernel", "warps": 8, "shared_bytes": 1000, "scratch_bytes": 0,
        "registers": 40, "text_bytes": 8, "toolkit": "12.6", "loop": None, "data": b"CODE0001",
    }  # fmt: skip
    return Cubin(**facts | fields)


class OnGpu:
    """A tensor in GPU memory, as far as the launcher looks at it."""

    def __init__(self, address, dtype, device="cuda:0", contiguous=True):
        self.address, self.dtype, self.device = address, f"torch.{dtype}", device
        self.contiguous, self.shape = contiguous, (4, 6)

    def data_ptr(self):
        return self.address

    def is_contiguous(self):
        return self.contiguous

    def stride(self):
        return (12, 2)


A = OnGpu(0x7F00DEAD0000, "float8_e4m3fn")
B = OnGpu(0x7F00BEEF0010, "bfloat16")
C = OnGpu(0x7F00BEEF0020, "float32")
GOOD = (A, 48, B, 1.5, -3, C)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return build_driver(tmp_path_factory.mktemp("driver"))


@pytest.fixture
def fake(library):
    return FakeDriver(library)


def bank(fake, *cubins, **options):
    return KernelBank(cubins or (cubin(),), SM89, lambda: STREAM, library=fake.path, **options)


def launches(fake):
    return [line for line in fake.log() if line.startswith("launch")]


def values(line):
    return [bytes.fromhex(word) for word in line.partition("values ")[2].split()]


def test_arguments_arrive_with_the_bytes_and_the_order_of_the_signature(fake):
    fake.parameters(8, 4, 8, 4, 8, 8, 8, 8)
    bank(fake).launch(SPEC, (5, 6, 7), *GOOD)
    (line,) = launches(fake)
    pack = struct.pack
    assert values(line) == [
        pack("<Q", A.address), pack("<i", 48), pack("<Q", B.address), pack("<f", 1.5),
        pack("<q", -3), pack("<Q", C.address), bytes(8), bytes(8),
    ]  # fmt: skip


def test_the_grid_the_block_the_shared_memory_and_the_stream_arrive(fake):
    with bank(fake) as kernels:
        kernels.launch(SPEC, (5, 6, 7), *GOOD)
        kernels.launch(SPEC, (9,), *GOOD)
    function = next(line for line in fake.log() if line.startswith("load")).split()[-1]
    want = "grid {} block 256 1 1 shared 1000 stream 0x57 extra (nil) values"
    called = f"launch {int(function, 16) + 1:#x} "
    assert launches(fake) == [called + want.format("5 6 7"), called + want.format("9 1 1")]


def test_the_stream_is_asked_for_at_every_launch(fake):
    streams = iter([1, 2])
    kernels = KernelBank([cubin()], SM89, lambda: next(streams), library=fake.path)
    kernels.launch(SPEC, (1,), *GOOD)
    kernels.launch(SPEC, (1,), *GOOD)
    assert [line.split("stream ")[1].split()[0] for line in launches(fake)] == ["0x1", "0x2"]


def test_code_is_loaded_once_and_unloaded_at_the_end(fake):
    second = replace(SPEC, name="mix.second")
    kernels = bank(fake, cubin(), cubin(second, data=b"CODE0002", entry="other"), ordinal=1)
    kernels.close()
    kernels.close()
    log = fake.log()
    loads = [line.split() for line in log if line.startswith("load")]
    assert [words[1] for words in loads] == ["CODE0001", "CODE0002"]
    assert [line for line in log if "function" in line] == [
        f"function mix_kernel of {loads[0][-1]}", f"function other of {loads[1][-1]}"
    ]  # fmt: skip
    assert [line.split()[1] for line in log if "unload" in line] == [w[-1] for w in loads]
    assert [log[0], log[1], log[2], log[-1]] == [
        "cuInit 0", "cuDeviceGet 1", "retain 71", "release 71"
    ]  # fmt: skip


@pytest.mark.parametrize(("shared", "asked"), [(49152, False), (49153, True), (101376, True)])
def test_shared_memory_beyond_48_kib_is_asked_for(fake, shared, asked):
    bank(fake, cubin(shared_bytes=shared))
    attributes = [line for line in fake.log() if line.startswith("attribute")]
    assert [line.split("= ")[1] for line in attributes] == ([str(shared)] if asked else [])
    assert all(line.startswith("attribute 8 of ") for line in attributes)


# --- failures of the driver


@pytest.mark.parametrize("name", ["cuModuleLoadData", "cuModuleGetFunction", "cuFuncSetAttribute"])
def test_a_kernel_that_the_driver_refuses_is_named_and_everything_is_given_back(fake, name):
    fake.fail(name, INVALID_IMAGE)
    refused = f"{name} for mix.second failed: CUDA_ERROR_NO_BINARY_FOR_GPU"
    second = replace(SPEC, name="mix.second")
    with pytest.raises(DriverError, match=refused) as caught:
        bank(fake, cubin(second, shared_bytes=50000))
    assert caught.value.code == INVALID_IMAGE
    log = fake.log()
    assert sum(line.startswith("load") for line in log) == sum("unload" in line for line in log)
    assert log[-1] == "release 70"


def test_after_a_refused_kernel_the_others_can_still_be_launched(fake):
    kernels = bank(fake)
    fake.fail("cuModuleLoadData", INVALID_IMAGE)
    with pytest.raises(DriverError, match=r"mix.second"):
        kernels.load(cubin(replace(SPEC, name="mix.second")))
    fake.fail("", 0)
    kernels.launch(SPEC, (1,), *GOOD)
    assert len(launches(fake)) == 1


def test_a_launch_that_the_driver_refuses_is_an_error(fake):
    kernels = bank(fake)
    fake.fail("cuLaunchKernel", 719)
    with pytest.raises(DriverError, match=r"cuLaunchKernel for mix.first failed: .* \(719\)"):
        kernels.launch(SPEC, (1,), *GOOD)


@pytest.mark.parametrize("name", ["cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain"])
def test_a_driver_without_a_gpu_is_an_error(fake, name):
    fake.fail(name, 100)
    with pytest.raises(DriverError, match=rf"{name} failed: .* \(100\)"):
        bank(fake)


def test_a_machine_without_a_driver_is_told_so(tmp_path):
    with pytest.raises(DriverError, match=r"no CUDA driver: .*Install NVIDIA's driver"):
        KernelBank([], SM89, lambda: 0, library=str(tmp_path / "libcuda.so.1"))


def test_a_library_that_is_no_driver_is_told_so():
    with pytest.raises(DriverError, match="no CUDA driver"):
        KernelBank([], SM89, lambda: 0, library="libc.so.6")


def test_the_drivers_release_is_read(fake):
    assert bank(fake).driver.version() == (12, 7)


# --- mistakes of the caller


MISTAKES = {
    "one argument less": (GOOD[:5], "takes 6 arguments, got 5"),
    "one argument more": ((*GOOD, 1), "takes 6 arguments, got 7"),
    "a tensor of another type": ((B, *GOOD[1:]), r"argument 0 \(\*fp8e4nv\).* torch.bfloat16"),
    "a tensor on another GPU": (
        (OnGpu(0, "float8_e4m3fn", "cuda:1"), *GOOD[1:]), "on cuda:1, the kernel on cuda:0"
    ),
    "a tensor on the CPU": ((OnGpu(0, "float8_e4m3fn", "cpu"), *GOOD[1:]), "on cpu"),
    "a tensor with gaps": (
        (*GOOD[:5], OnGpu(0, "float32", contiguous=False)), r"strides \[12, 2\] has gaps"
    ),
    "a tensor that begins anywhere": (
        (*GOOD[:2], OnGpu(0x7F0000000008, "bfloat16"), *GOOD[3:]), "argument 2.*multiple of 16"
    ),
    "a number instead of a tensor": ((1, *GOOD[1:]), "a tensor is wanted"),
    "a tensor instead of a number": ((A, A, *GOOD[2:]), "a number is wanted"),
    "an integer that must be a multiple": ((A, 40, *GOOD[2:]), "argument 1.*40 is not a multiple"),
    "an integer of 33 bits": ((A, 2**31, *GOOD[2:]), "argument 1.*does not fit"),
    "an integer of 65 bits": ((*GOOD[:4], 2**63, C), "argument 4.*does not fit"),
    "a fraction for an integer": ((*GOOD[:4], 2.0, C), "argument 4.*2.0 is not an integer"),
    "a truth value for an integer": ((*GOOD[:4], True, C), "argument 4.*True is not an integer"),
    "no finite number": ((*GOOD[:3], float("nan"), *GOOD[4:]), "argument 3.*nan is not a finite"),
    "a number beyond FP32": ((*GOOD[:3], 1e39, *GOOD[4:]), "argument 3.*not a finite"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_argument_is_refused_by_name(fake, mistake):
    arguments, message = MISTAKES[mistake]
    kernels = bank(fake)
    with pytest.raises(KernelError, match=f"mix.first.*{message}"):
        kernels.launch(SPEC, (1,), *arguments)
    assert launches(fake) == []


@pytest.mark.parametrize("grid", [(), (1, 1, 1, 1), (0,), (1, 65536), (2**31,), (1, 1, -1)])
def test_a_grid_that_cuda_cannot_start_is_refused(fake, grid):
    kernels = bank(fake)
    with pytest.raises(KernelError, match=r"mix.first: .*(axes|axis)"):
        kernels.launch(SPEC, grid, *GOOD)
    assert launches(fake) == []


def test_edges_of_what_is_allowed_are_launched(fake):
    fake.parameters(8, 4, 8, 4, 8, 8, 8, 8)
    edges = (A, -(2**31), B, 3, 2**63 - 1, OnGpu(0, "float32"))
    bank(fake).launch(SPEC, (2**31 - 1, 65535, 65535), *edges)
    got = values(launches(fake)[0])
    assert got[1] == struct.pack("<i", -(2**31))
    assert got[3] == struct.pack("<f", 3.0)
    assert got[4] == struct.pack("<q", 2**63 - 1)


def test_a_kernel_compiled_from_another_spec_is_not_launched(fake):
    kernels = bank(fake)
    tuned = replace(SPEC.tuning[SM89], blocks={"BLOCK": 128})
    for other in (
        replace(SPEC, tuning={SM89: tuned}),
        replace(SPEC, signature=SPEC.signature.replace("i64", "i32")),
        replace(SPEC, constants={"D": 64}),
        replace(SPEC, tuning={SM90: tuned}),
    ):
        with pytest.raises(
            KernelError, match=r"compiled from another spec.*Build the package again"
        ):
            kernels.launch(other, (1,), *GOOD)
    assert launches(fake) == []
    assert kernels.tuning(SPEC).blocks == {"BLOCK": 64}


def test_a_kernel_that_was_not_loaded_is_not_launched(fake):
    with pytest.raises(KernelError, match=r"mix.other is not loaded, only mix.first"):
        bank(fake).launch(replace(SPEC, name="mix.other"), (1,), *GOOD)


def test_cubins_that_a_bank_cannot_hold_are_refused(fake):
    for wrong, message in (
        (cubin(arch=SM90), "is for sm90, not sm89"),
        (cubin(), "is loaded already"),
        (cubin(replace(SPEC, name="b"), scratch_bytes=384), "384 bytes of scratch"),
    ):
        with pytest.raises(KernelError, match=message):
            bank(fake, cubin(), wrong)
        assert fake.log()[-1] == "release 70"


def test_a_kernel_without_arguments_is_launched_with_its_hidden_pointers_alone(fake):
    fake.parameters(8, 8)
    spec = replace(SPEC, signature="", multiples_of_16=())
    kernels = bank(fake, cubin(spec))
    kernels.launch(spec, (1,))
    with pytest.raises(KernelError, match="takes 0 arguments, got 1"):
        kernels.launch(spec, (1,), 1)
    (line,) = launches(fake)
    assert values(line) == [bytes(8), bytes(8)]
