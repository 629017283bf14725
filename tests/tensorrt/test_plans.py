"""Plans are opened only where they can run, run on tensors by name, and refused in sentences."""

import inspect
import json
import logging
import math
from importlib import import_module
from importlib.util import find_spec

import pytest
import torch

from engine.build.export import export
from engine.build.segments import DEPLOY, Segment
from engine.build.tensorrt import RANGES, build_plan
from engine.config import TINY
from engine.diskcache import DiskCache
from engine.errors import BadPackage, BadRequest, Unavailable
from engine.package.folder import open_folder
from engine.tensorrt import library as tensorrt_library
from engine.tensorrt.library import LIBRARY, import_library
from engine.tensorrt.plans import KERNEL_BYTES, Host, Opener, read_record
from kernels.arch import SM89
from kernels.spec import KernelError
from tests.support.fake_tensorrt import (
    GPU,
    RANGE,
    STREAM,
    VERSION,
    FakeLibrary,
    planned_package,
    program,
    record,
)
from tests.support.packages import reseal

INSTEAD = "use --program native, which every package has"
library = pytest.mark.skipif(
    find_spec(LIBRARY) is None,
    reason="TensorRT-RTX is not installed: pip install '.[tensorrt]'",
)


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    return planned_package(tmp_path_factory.mktemp("planned") / "sm89", TINY)


@pytest.fixture
def opened(package, tmp_path):
    """Opens `pre` as a process does that keeps its kernels in this test's folder."""

    def open_pre(fake, gpu=GPU, held=package):
        cache = DiskCache(tmp_path / "kernels", KERNEL_BYTES)
        return Opener(held, fake, Host(gpu, lambda: STREAM, cache)).open("pre")

    return open_pre


def given(tokens, seed=1):
    """All that `pre` takes and gives."""
    draw = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(1, tokens, TINY.dim, generator=draw),
        "modulation": 0.1 * torch.randn(1, 6, TINY.dim, generator=draw),
        "qkv.q": torch.randn(1, 3 * TINY.dim, TINY.dim, generator=draw).to(torch.float8_e4m3fn),
        "qkv.s": torch.rand(3 * TINY.dim, generator=draw),
        "qkv.bias": torch.randn(3 * TINY.dim, generator=draw),
        "qkv": torch.full((1, tokens, 3 * TINY.dim), math.nan, dtype=torch.bfloat16),
        "more": torch.zeros(1),  # what another plan takes
    }


def wanted(tensors):
    segment = Segment("pre", TINY, DEPLOY)
    return segment(*(tensors[port.name] for port in segment.inputs))[0]


# --- running one


def test_a_plan_computes_from_its_inputs_into_its_output(opened):
    fake = FakeLibrary()
    plan = opened(fake)
    for seed, tokens in enumerate((64, 64, 200, 100)):
        tensors = given(tokens, seed)
        plan.run(tensors, tokens)
        assert torch.equal(tensors["qkv"], wanted(tensors))
        assert tensors["more"] == 0
    assert fake.runs == [("pre", tokens, STREAM) for tokens in (64, 64, 200, 100)]


def test_validity_is_asked_before_the_plan_is_opened(opened):
    fake = FakeLibrary()
    opened(fake)
    assert fake.asked == ["validity", "engine"]


@pytest.mark.parametrize("tokens", [0, 1, RANGE.least - 1, RANGE.most + 1, 1000])
def test_a_clip_outside_the_range_of_a_plan_is_refused(opened, tokens):
    fake = FakeLibrary()
    tensors = given(1) | {
        name: torch.empty(1, tokens, width, dtype=dtype)
        for name, width, dtype in (("x", 256, torch.float32), ("qkv", 768, torch.bfloat16))
    }
    says = rf"has {tokens} tokens; pre.plan takes 64 to 200. Ask for another.*{INSTEAD}"
    with pytest.raises(BadRequest, match=says):
        opened(fake).run(tensors, tokens)
    assert fake.runs == []


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("x", lambda x: x.double()),
        ("x", lambda x: x[0]),
        ("x", lambda x: x.mT.contiguous().mT),
        ("qkv", lambda x: x[:, :-1]),
        ("qkv", lambda x: x.float()),
        ("qkv.q", lambda x: x.view(torch.int8)),
        ("qkv.s", lambda x: x[::2].repeat(2)[::2]),
    ],
)
def test_a_tensor_that_would_be_read_wrongly_is_refused(opened, name, change):
    fake, tensors = FakeLibrary(), given(64)
    plan = opened(fake)
    tensors[name] = change(tensors[name])
    with pytest.raises(KernelError, match=rf"pre.plan wants {name} \[.*contiguous, got \["):
        plan.run(tensors, 64)
    assert fake.runs == []


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ("shape", r"x \[1, 64, 256\] of pre.plan is refused"),
        ("address", "x of pre.plan is refused"),
        ("execute", "pre.plan is not run"),
    ],
)
def test_what_the_library_refuses_while_it_runs_is_told_in_its_words(opened, call, says):
    plan = opened(FakeLibrary(refuses=(call,)))
    told = rf"{says} by TensorRT-RTX {VERSION} on RTX 4090 with driver 570.86.15: {call} went wrong"
    with pytest.raises(Unavailable, match=rf"{told}\. To make this clip, {INSTEAD}"):
        plan.run(given(64), 64)


def test_a_plan_whose_shapes_were_refused_is_asked_again(opened):
    fake = FakeLibrary(refuses=("shape",))
    plan, tensors = opened(fake), given(64)
    with pytest.raises(Unavailable):
        plan.run(tensors, 64)
    fake.refuses = ()
    plan.run(tensors, 64)
    assert torch.equal(tensors["qkv"], wanted(tensors))


# --- what was compiled


def test_kernels_are_compiled_once_for_a_number_of_tokens_and_kept(opened):
    first, second = FakeLibrary(), FakeLibrary()
    for fake, counts in ((first, (64, 64, 100)), (second, (100, 64, 70))):
        plan = opened(fake)
        for tokens in counts:
            plan.run(given(tokens), tokens)
    assert first.compiled == [("pre", 64), ("pre", 100)]
    assert second.compiled == [("pre", 70)]


@pytest.mark.parametrize(
    "change",
    [{"name": "RTX 4080"}, {"uuid": "GPU-2"}, {"driver": "575.1"}, {"driver": None},
     {"cuda": (12, 9)}],
)  # fmt: skip
def test_kernels_of_another_gpu_or_driver_are_not_used(opened, change):
    opened(FakeLibrary()).run(given(64), 64)
    fake = FakeLibrary()
    other = {field: getattr(GPU, field) for field in GPU.__slots__} | change
    opened(fake, type(GPU)(**other)).run(given(64), 64)
    assert fake.compiled == [("pre", 64)]


def test_kernels_that_the_library_does_not_take_are_compiled_again_and_replaced(opened, caplog):
    opened(FakeLibrary(card="before an update")).run(given(64), 64)
    fakes = FakeLibrary(), FakeLibrary()
    with caplog.at_level(logging.WARNING, "engine"):
        for fake in fakes:
            opened(fake).run(given(64), 64)
    assert [fake.compiled for fake in fakes] == [[("pre", 64)], []]
    assert [r.message for r in caplog.records] == [
        "kernels kept for pre.plan do not fit any more: compiled again"
    ]


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda _: b"", lambda data: data + b"!"]
)
def test_damaged_kernels_are_compiled_again(opened, tmp_path, damage):
    opened(FakeLibrary()).run(given(64), 64)
    (entry,) = (tmp_path / "kernels").iterdir()
    entry.write_bytes(damage(entry.read_bytes()))
    fake, tensors = FakeLibrary(), given(64)
    opened(fake).run(tensors, 64)
    assert fake.compiled == [("pre", 64)]
    assert torch.equal(tensors["qkv"], wanted(tensors))


# --- what cannot be opened


@pytest.mark.parametrize("bits", [0, 4, 6])
def test_a_plan_that_is_not_valid_here_is_refused_with_the_reasons(opened, bits):
    reasons = {0: "no reason given", 4: "OLD_CUDA_DRIVER", 6: "UNSUPPORTED_CC, OLD_CUDA_DRIVER"}
    fake = FakeLibrary("INVALID", bits)
    says = (
        rf"TensorRT-RTX {VERSION} says that pre.plan cannot run on RTX 4090 with driver 570.86.15: "
        rf"{reasons[bits]}\. Take a machine.*GPU of sm89, or {INSTEAD}"
    )
    with pytest.raises(Unavailable, match=says):
        opened(fake)
    assert fake.asked == ["validity"]


def test_a_plan_that_may_be_slow_is_opened_with_a_warning(opened, caplog):
    with caplog.at_level(logging.WARNING, "engine"):
        plan, tensors = opened(FakeLibrary("SUBOPTIMAL", 4)), given(64)
    plan.run(tensors, 64)
    assert torch.equal(tensors["qkv"], wanted(tensors))
    assert "pre.plan may be slow on RTX 4090" in caplog.text
    assert "OLD_CUDA_DRIVER" in caplog.text


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ("deserialize", "pre.plan cannot be opened"),
        ("context", "pre.plan cannot be made ready"),
        ("cache", "the cache of pre.plan is refused"),
    ],
)
def test_what_the_library_refuses_to_open_is_told_in_its_words(opened, caplog, call, says):
    with pytest.raises(Unavailable, match=rf"{says} by TensorRT-RTX.*: {call} went wrong\."):
        opened(FakeLibrary(refuses=(call,)))
    assert f"TensorRT-RTX: {call} went wrong." in caplog.text
    assert "something else" not in caplog.text


def test_a_package_without_the_program_says_why(tmp_path):
    package = planned_package(tmp_path / "sm89", TINY, {"absent": "it was not asked for."})
    says = rf"sm89 has no TensorRT program: it was not asked for\. To make this clip, {INSTEAD}"
    with pytest.raises(Unavailable, match=says):
        read_record(package)


def test_a_record_is_read_as_it_was_written(package):
    found = read_record(package)
    assert found == program(TINY)
    assert set(found.plans) == {"block", "pre", "post", "context"}
    assert found.plans["pre"].outputs == (["qkv", "BF16", [1, "S", 3 * TINY.dim]],)


def without(name):
    return lambda told: told["plans"].pop(name)


def port(value):
    return lambda told: told["plans"]["pre"]["inputs"].__setitem__(0, value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda told: told.pop("tokens"), "tensorrt lacks 'tokens'"),
        (lambda told: told["tokens"].update(least=-1), "least is '-1'"),
        (lambda told: told.update(plans=7), "plans is '7'"),
        (lambda told: told["plans"]["pre"].update(file=None), "file is 'None'"),
        (lambda told: told["plans"]["pre"].update(file="../pre.plan"), "has no plans/../pre.plan"),
        (lambda told: told["plans"]["pre"].update(sha256="0" * 64), "not the plan that was proven"),
        (without("pre"), "has no plan pre"),
        (port(["x", "FLOAT"]), r"pre.plan has the port \['x', 'FLOAT'\], which makes no sense"),
        (port(["x", "HALF", [1]]), "makes no sense"),
        (port(["x", "FLOAT", []]), "makes no sense"),
        (port(["x", "FLOAT", [1, "T"]]), "makes no sense"),
        (port(["x", "FLOAT", [1, 0]]), "makes no sense"),
        (port([["x"], "FLOAT", [1]]), "makes no sense"),
        (port({}), "makes no sense"),
        (port("x" * 10**5), "makes no sense"),
    ],
)
def test_a_manifest_whose_program_makes_no_sense_is_refused(opened, tmp_path, change, says):
    told = json.loads(json.dumps(record(TINY)))
    change(told)
    package = planned_package(tmp_path / "sm89", TINY, told)
    with pytest.raises(BadPackage, match=says) as error:
        opened(FakeLibrary(), held=package)
    assert len(str(error.value)) < 1000


def test_a_plan_with_ports_of_another_engine_is_refused(opened, tmp_path):
    told = json.loads(json.dumps(record(TINY)))
    told["plans"]["pre"]["inputs"].append(["gate", "FLOAT", [1]])
    package = planned_package(tmp_path / "sm89", TINY, told)
    fake = FakeLibrary()
    with pytest.raises(BadPackage, match=r"pre.plan wants gate, which this engine does not have"):
        opened(fake, held=package).run(given(64), 64)
    assert fake.runs == []


def test_a_damaged_plan_never_reaches_the_library(opened, tmp_path):
    planned_package(tmp_path / "sm89", TINY)
    path = tmp_path / "sm89" / "plans" / "pre.plan"
    path.write_bytes(path.read_bytes().replace(b"256", b"265"))
    fake = FakeLibrary()
    with pytest.raises(BadPackage, match=r"pre.plan is damaged"):
        opened(fake, held=open_folder(tmp_path / "sm89"))
    assert fake.asked == []


def test_a_resealed_manifest_is_read_as_any_other(tmp_path):
    planned_package(tmp_path / "sm89", TINY)
    reseal(tmp_path / "sm89", lambda body: body["tensorrt"].update(library="9.9"))
    assert read_record(open_folder(tmp_path / "sm89")).library == "9.9"


# --- the library itself


def test_a_library_that_is_not_here_is_a_sentence():
    says = rf"needs no_such_library 1\.2, which is not here\. Run pip install.*{INSTEAD}"
    with pytest.raises(Unavailable, match=says):
        import_library("1.2", "no_such_library")


@pytest.mark.parametrize("error", ["OSError('libx.so: no such file')", "ImportError('of libx.so')"])
def test_a_library_that_does_not_load_is_a_sentence(tmp_path, monkeypatch, error):
    name = "broken_" + error.partition("(")[0].lower()
    (tmp_path / f"{name}.py").write_text(f"raise {error}")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(Unavailable, match=rf"needs {name} 1\.2, which does not load: .*libx.so"):
        import_library("1.2", name)


def test_another_version_of_the_library_is_a_sentence():
    says = rf"json 2\.0\.9 is here; the plans of this package are for 1\.2, .*{INSTEAD}"
    with pytest.raises(Unavailable, match=says):
        import_library("1.2", "json")


CLASSES = {  # of the library, by the protocol that says what is used of it
    "TensorRt": None,
    "PlanRuntime": "Runtime",
    "Engine": "ICudaEngine",
    "ExecutionContext": "IExecutionContext",
    "RuntimeConfig": "IRuntimeConfig",
    "RuntimeCache": "IRuntimeCache",
    "Flags": "EngineInvalidityDiagnostics",
    "Specialization": "DynamicShapesKernelSpecializationStrategy",
    "Allocation": "ExecutionContextAllocationStrategy",
    "EnumValue": "EngineValidity",
    "EnumFlag": "EngineInvalidityDiagnostics",
}


def used(protocol):
    declared = [name for name in vars(protocol) if inspect.isfunction(getattr(protocol, name))]
    names = {*declared, *inspect.get_annotations(protocol)}
    return sorted(name for name in names if name.startswith("__") or not name.startswith("_"))


@library
@pytest.mark.parametrize("name", CLASSES)
def test_all_that_is_used_of_the_library_is_there(name):
    protocol, whole = getattr(tensorrt_library, name), import_module(LIBRARY)
    ours = [n for n in used(protocol) if n not in ("__init__", "__subclasshook__")]
    owner = whole if CLASSES[name] is None else getattr(whole, CLASSES[name])
    assert ours
    assert [n for n in ours if not hasattr(owner, n)] == []


def test_every_protocol_is_held_against_the_library():
    classes = inspect.getmembers(tensorrt_library, inspect.isclass)
    own = {name for name, kind in classes if kind.__module__ == tensorrt_library.__name__}
    assert own == set(CLASSES)


@library
def test_the_library_takes_our_logger_and_finds_what_is_no_plan_invalid(opened):
    version = import_module(LIBRARY).__version__
    with pytest.raises(Unavailable, match=r"pre.plan cannot run on RTX 4090.*: MALFORMED_ENGINE\."):
        opened(import_library(version))


@library
@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here, which may run it")
def test_a_real_plan_is_refused_where_there_is_no_gpu(opened, tmp_path):
    segment = Segment("pre", TINY, DEPLOY)
    export(segment, tmp_path / "pre.onnx")
    _, version = build_plan(segment, SM89, tmp_path, RANGES[512], timeout_s=120)
    files = {"pre": (tmp_path / "pre.plan").read_bytes()}
    package = planned_package(tmp_path / "sm89", TINY, files=files)
    with pytest.raises(Unavailable, match=r"says that pre\.plan cannot run on RTX 4090"):
        opened(import_library(version), held=package)
