"""A package whose parts contradict each other is refused when it is opened, in a sentence."""

import copy
import json
import shutil

import pytest
import torch

from engine.build.quantize import FFN_MULTIPLE as BUILT_MULTIPLE
from engine.build.segments import DEPLOY, _ports
from engine.config import SCAIL_14B, TINY
from engine.denoise.block import BlockWeights, ContextWeights, tensor_names
from engine.denoise.packaged import outside_the_blocks
from engine.errors import BadPackage
from engine.models.dit import Scail
from engine.package import contents
from engine.package.contents import FFN_MULTIPLE, expected_tensors
from engine.package.folder import open_package
from engine.program import choose_package
from kernels.arch import SM89
from tests.support.built import tiny_package
from tests.support.packages import reseal

CPU = torch.device("cpu")
# What a package tells of how it was made. Nothing is decided by it.
PROVENANCE = ("digest", "engine", "toolchain", "wheels", "sources")
# The loop's instructions are shown by `info`, and that is all. A hash is compared when the bytes
# are read.
SHOWN = ("loop", "sha256")


@pytest.fixture(scope="module")
def held():
    return tiny_package(SM89)


@pytest.fixture(scope="module")
def copied(held, tmp_path_factory):
    return shutil.copytree(held, tmp_path_factory.mktemp("changed") / "sm89")


@pytest.fixture(scope="module")
def body(held):
    return json.loads((held / "manifest.json").read_bytes())


def leaves(value, path=()):
    """All values that are neither lists nor objects, by the way to them."""
    parts = value.items() if isinstance(value, dict) else enumerate(value)
    for key, part in parts:
        if isinstance(part, dict | list):
            yield from leaves(part, (*path, key))
        else:
            yield (*path, key), part


def changed(body, path, value):
    whole = copy.deepcopy(body)
    inner = whole
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return whole


def is_accepted(path, whole):
    """Opened and chosen as a worker does it; anything but a `BadPackage` is a fault."""
    reseal(path, lambda _: whole)
    try:
        choose_package(path, CPU)
    except BadPackage as error:
        assert "\n" not in str(error)
        return False
    return True


def numbers(body):
    """The ways to all numbers that decide something: some tensors and kernels stand for all."""
    for path, value in leaves(body):
        if path[0] in PROVENANCE or any(key in SHOWN for key in path) or isinstance(value, str):
            continue
        place = {"tensors": 1, "native": 2}.get(path[0])
        if place is None or path[place] % 8 == 1:
            yield path, value


def test_every_number_that_is_changed_alone_is_refused(copied, body):
    assert is_accepted(copied, body)
    accepted, tried = [], 0
    for path, value in numbers(body):
        for other in {value + 1, value - 1, 2 * value} - {value} if value is not None else [1]:
            tried += 1
            if is_accepted(copied, changed(body, path, other)):
                accepted.append((path, value, other))
    assert tried > 150
    # a smaller feed forward with the same padding computes the same. The shared memory that a
    # kernel asks for stands nowhere else.
    rest = [one for one in accepted if one[0][-1] != "shared_bytes"]
    assert rest == [(("model", "ffn"), 512, 511)]


def test_every_format_that_is_changed_alone_is_refused(copied, body):
    kinds = ["float32", "bfloat16", "float16", "float8_e4m3fn", "int8"]
    for n, entry in enumerate(body["tensors"]):
        if n % 3 and not entry["name"].endswith(".q"):
            continue
        for kind in kinds:
            path = ("tensors", n, "dtype")
            assert kind == entry["dtype"] or not is_accepted(copied, changed(body, path, kind))
    for form in ("fp8", "mixed", ""):
        assert not is_accepted(copied, changed(body, ("weights",), form))


def test_shapes_of_as_many_values_are_refused(copied, body):
    for n, entry in enumerate(body["tensors"][:60:2]):
        shape = entry["shape"]
        for other in (shape[::-1], [1, *shape], [2, shape[0] // 2, *shape[1:]]):
            path = ("tensors", 2 * n, "shape")
            assert other == shape or not is_accepted(copied, changed(body, path, other)), entry


def test_words_that_decide_something_are_compared(copied, body):
    for path, value in (
        (("arch",), "sm90"),
        (("driver_floor",), "1.0"),
        (("native", "kernels", 18, "spec"), "0" * 64),
        (("native", "kernels", 18, "entry"), "another"),
        (("native", "kernels", 18, "toolkit"), "13.0"),
        (("native", "kernels", 18, "name"), body["native"]["kernels"][17]["name"]),
        (("tensors", 30, "name"), "blocks.0.unknown"),
        (("tensors", 30, "name"), "x"),
        (("model",), {**body["model"], "layers": 3}),
        (("model",), {**body["model"], "dim": 384}),
        (("model",), {**body["model"], "dim": 0}),
        (("model",), {**body["model"], "layers": 0}),
        (("model",), {**body["model"], "layers": 10**9}),
    ):
        assert not is_accepted(copied, changed(body, path, value)), path


def test_tensors_lie_in_the_order_in_which_they_are_loaded(copied, body, held):
    package = open_package(held)
    built = [entry.name for entry in package.manifest.tensors]
    manifest = package.manifest
    assert built == [*expected_tensors(manifest.model, manifest.padded_ffn, manifest.weights)]
    places = {name: n for n, name in enumerate(built)}
    for one, other in (
        ("img_emb.proj.3.bias", "img_emb.proj.4.bias"),
        ("blocks.0.norm_q", "blocks.1.norm_q"),
        ("blocks.0.norm3_shift", "blocks.0.norm3_scale"),
        ("blocks.0.text.q", "blocks.0.vision.q"),
    ):
        whole = changed(body, ("tensors", places[one], "name"), other)
        whole["tensors"][places[other]]["name"] = one
        reseal(copied, lambda _, whole=whole: whole)
        with pytest.raises(BadPackage, match=rf"the tensor {other} lies where {one} is expected"):
            open_package(copied)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("arch",), "sm89" * 5000),
        (("driver_floor",), "12.7" * 5000),
        (("files", 1, "sha256"), "0" * 300_000),
        (("files", 2, "path"), "a" * 100_000),
        (("native", "kernels", 2, "entry"), "a\nb"),
        (("native", "kernels", 2, "arch"), "x" * 10_000),
        (("native", "kernels", 2, "toolkit"), "\ud800"),
        (("sources", 0), "a\nb"),
        (("tensors", 1, "dtype"), "a\nb" * 1000),
    ],
)
def test_a_refusal_shows_no_more_than_a_glance_of_what_it_found(copied, body, path, value):
    reseal(copied, lambda _: changed(body, path, value))
    with pytest.raises(BadPackage) as raised:
        open_package(copied)
    assert str(raised.value).removeprefix(str(copied)).isprintable()
    assert len(str(raised.value).removeprefix(str(copied))) < 500


def test_a_kernel_that_the_model_needs_is_missed_at_once(copied, body):
    kernels = body["native"]["kernels"]
    ways = ("attention.", "gemm.")  # of which others are there
    for n, kernel in enumerate(kernels):
        rest = [*kernels[:n], *kernels[n + 1 :]]
        whole = changed(body, ("native", "kernels"), rest)
        files = [file for file in body["files"] if kernel["name"] + ".cubin" not in file["path"]]
        assert is_accepted(copied, {**whole, "files": files}) == kernel["name"].startswith(ways)
        assert not is_accepted(copied, whole), "a file of no kernel"


def test_an_operation_without_any_of_its_ways_is_refused(copied, body):
    for op in ("attention.", "gemm.i8"):
        kernels = [k for k in body["native"]["kernels"] if not k["name"].startswith(op)]
        files = [f for f in body["files"] if not f["path"].startswith(f"kernels/{op}")]
        whole = changed(body, ("native", "kernels"), kernels)
        reseal(copied, lambda _, whole=whole, files=files: {**whole, "files": files})
        with pytest.raises(BadPackage, match=rf"the kernel {op}.* is missing\. Build the package"):
            choose_package(copied, CPU)


def test_a_rotation_that_kernels_do_not_compute_is_refused_with_what_to_do(copied, body):
    for key, value in (("group", 128), ("group", 512), ("kind", "hadamard"), ("kind", "x" * 200)):
        reseal(copied, lambda _, key=key, value=value: changed(body, ("rotation", key), value))
        sentence = r"this engine rotates by 'regular-hadamard' in groups of 256\. Build it again"
        with pytest.raises(BadPackage, match=sentence):
            open_package(copied)


def test_linears_that_are_rotated_are_those_of_int8(copied, body):
    linears = body["rotation"]["linears"]
    for told, sentence in (
        (None, r"is INT8, and is not among the linears that are rotated"),
        ({**body["rotation"], "linears": linears[1:]}, rf"{linears[0]} is INT8, and is not"),
        ({**body["rotation"], "linears": [*linears, "x"]}, "'x' is said to be rotated, and is no"),
    ):
        reseal(copied, lambda _, told=told: {**body, "rotation": told})
        with pytest.raises(BadPackage, match=rf"contradicts itself: .*{sentence}.*Build it again"):
            open_package(copied)
    fp8 = json.loads((tiny_package(SM89, "fp8") / "manifest.json").read_bytes())
    assert fp8["rotation"] is None and fp8["weights"] == "fp8"


def test_the_sentence_says_what_contradicts_what(copied, body):
    for path, value, sentence in (
        (("model", "text_dim"), 65, r"text_embedding\.0\.weight is \[256, 64\], and by .*65\]"),
        (("model", "layers"), 3, r"blocks\.2\.cross_norm_q is missing, which a model of 3 layers"),
        (("model", "layers"), 1, r"a tensor 'blocks\.1\.\w+.*', which a model of 1 layers"),
        (("padded_ffn",), 768, "512 values, which are padded to 768 where 512 are expected"),
        (("model", "dim"), 300, "300 wide, no multiple of the head size 128"),
        (("native", "kernels", 0, "warps"), 4, r"has warps 256, not 128"),
    ):  # fmt: skip
        reseal(copied, lambda _, path=path, value=value: changed(body, path, value))
        with pytest.raises(BadPackage, match=rf"contradicts itself: .*{sentence}.*Build it again"):
            open_package(copied)


def test_the_list_of_tensors_is_that_of_the_models(held):
    assert FFN_MULTIPLE == BUILT_MULTIPLE
    for config in (TINY, SCAIL_14B):
        made = expected_tensors(config, -(-config.ffn // 256) * 256, "int8")
        block = {name for kind in (BlockWeights, ContextWeights) for name in tensor_names(kind)}
        with torch.device("meta"):
            outside = {k: v.numel() for k, v in Scail(config).state_dict().items()
                       if not k.startswith("blocks.")}  # fmt: skip
        assert made.keys() == {*outside} | {
            f"blocks.{n}.{name}" for n in range(config.layers) for name in block
        }
        for name, count in outside.items():
            assert torch.Size(made[name].shape).numel() == count, name
    package = open_package(held)
    made = expected_tensors(TINY, 512, "int8")
    assert {entry.name: entry.shape for entry in package.manifest.tensors} == {
        name: expected.shape for name, expected in made.items()
    }
    assert outside_the_blocks.__doc__  # reads the same names


def test_the_list_of_ports_is_that_of_the_segments():
    for config in (TINY, SCAIL_14B):
        ports = {(port.name, port.kind): port.shape for port in _ports(config, DEPLOY)}
        assert contents._ports(config.dim, config.ffn) == ports


PLAN = {
    "file": "block.plan",
    "bytes": 9,
    "sha256": "ab",
    "inputs": [["x", "FLOAT", [1, "S", 256]], ["up.q", "FP8", [1, 512, 256]]],
    "outputs": [["out", "FLOAT", [1, "S", 256]]],
    "proof": {},
}
PROGRAM = {
    "arch": "sm89",
    "library": "1.0",
    "tokens": {"least": 16, "usual": 4000, "most": 50_000},
    "plans": {"block": PLAN},
    "graphs": [],
}


def with_plans(body, program, nbytes=9, sha256="ab"):
    file = {"path": "plans/block.plan", "bytes": nbytes, "sha256": sha256}
    return {**body, "tensorrt": program, "files": [*body["files"], file]}


def test_plans_are_compared_with_their_files_and_the_model(copied, body, tmp_path):
    assert not is_accepted(copied, with_plans(body, PROGRAM))  # of INT8 weights
    fp8 = tiny_package(SM89, "fp8")
    copied = shutil.copytree(fp8, tmp_path / "sm89")
    body = json.loads((fp8 / "manifest.json").read_bytes())
    (copied / "plans").mkdir()
    (copied / "plans" / "block.plan").write_bytes(b"123456789")
    assert is_accepted(copied, with_plans(body, PROGRAM))
    for path, value in leaves(PROGRAM):
        if path[-1] in ("library", "file") or "proof" in path:
            continue
        others = [value + 1, 10**6, -1] if isinstance(value, int) else ["other"]
        for other in others:
            if path[0] == "tokens" and (other > 16) and path[-1] != "least":
                continue  # another range, which may be right
            if (path, other) == (("tokens", "least"), 17):
                continue
            whole = with_plans(body, changed(PROGRAM, path, other))
            assert not is_accepted(copied, whole), (path, other)
    for plan in ([], {"inputs": 5}, {**PLAN, "file": "none.plan"}, {**PLAN, "inputs": None}):
        whole = with_plans(body, {**PROGRAM, "plans": {"block": plan}})
        assert not is_accepted(copied, whole), plan
