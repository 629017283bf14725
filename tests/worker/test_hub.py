"""hub-check: the listing of the Hub against RunPod's names, its own tests, and the image."""

import json
import shutil
from pathlib import Path

import pytest

from engine.errors import BadRequest
from engine.worker.gpu_pools import GPUS, POOLS
from engine.worker.hub import VARIABLES, check

ROOT = Path(__file__).resolve().parents[2]
OURS = ROOT / ".runpod"
REQUESTS = "workflows/requests/XiCON-Dance-SCAIL-Serverless__{}.req.json"
RTX_4090, RTX_5090 = "NVIDIA GeForce RTX 4090", "NVIDIA GeForce RTX 5090"
QUARTER, HALF = (
    f"NVIDIA RTX PRO 6000 Blackwell Server Edition MIG {part}" for part in ("1g.24gb", "2g.48gb")
)


def ours(name):
    return json.loads((OURS / name).read_text("utf-8"))


def problems(folder, hub=None, tests=None):
    """Lists the problems of a folder with these two files; ours stand in for None."""
    for name, body in (("hub.json", hub), ("tests.json", tests)):
        text = body if isinstance(body, str) else json.dumps(ours(name) if body is None else body)
        (folder / name).write_text(text)
    return [str(problem) for problem in check(folder)]


def with_config(name, **changes):
    body = ours(name)
    body["config"] = {k: v for k, v in (body["config"] | changes).items() if v is not ...}
    return body


def with_case(number, **changes):
    body = ours("tests.json")
    case = body["tests"][number]
    body["tests"][number] = {k: v for k, v in (case | changes).items() if v is not ...}
    return body


def test_our_listing_has_no_problem():
    assert check(ROOT) == []
    assert check(OURS) == []


def test_our_pair_is_right_without_the_dockerfile_too(tmp_path):
    assert problems(tmp_path) == []


def test_our_listing_is_for_the_rtx_4090_with_drivers_from_12_7_on():
    hub, tests = ours("hub.json")["config"], ours("tests.json")["config"]
    assert hub["gpuIds"].split(",")[0] == "ADA_24"
    assert tests["gpuTypeId"] == RTX_4090
    assert hub["allowedCudaVersions"] == tests["allowedCudaVersions"] == [
        "12.7", "12.8", "12.9", "13.0",
    ]  # fmt: skip


def test_our_tests_are_a_light_one_and_a_render():
    light, render = ours("tests.json")["tests"]
    assert light["input"] == {"action": "health"}
    assert render["timeout"] >= 900_000
    assert {"image_base64", "pose_video_base64"} < render["input"].keys()


@pytest.mark.golden
def test_the_stored_pair_of_9aa2584_is_refused_with_the_right_sentences(golden, tmp_path):
    hub = (golden / REQUESTS.format("hub__9aa2584")).read_text("utf-8")
    tests = (golden / REQUESTS.format("tests__9aa2584")).read_text("utf-8")
    assert problems(tmp_path, hub, tests) == [
        "hub.json: config.gpuIds: ADA_32_PRO has the NVIDIA GeForce RTX 5090; this image is for "
        "sm89 (RTX 4090, L40S, RTX 6000 Ada). Remove ADA_32_PRO, and deploy Dockerfile.sm120 for "
        "it.",
        'hub.json: config.gpuIds: "BLACKWELL_24" is no pool of RunPod; known are BLACKWELL_96, '
        "BLACKWELL_180; the RTX 4090 is in ADA_24, the RTX 5090 in ADA_32_PRO.",
        "hub.json: config.allowedCudaVersions: lacks 12.8, 12.9, 13.0. RunPod compares exactly, so "
        "hosts that report them are never taken; list 12.7 and everything newer.",
        'tests.json: tests: have no light self-test. Add one with the input {"action": "health"}.',
        "tests.json: config.gpuTypeId: ADA_24 is a pool; the name of one GPU is expected here. "
        f'Write "{RTX_4090}".',
    ]


POOL_AS_GPU = "config.gpuTypeId: ADA_24 is a pool"
TOO_SHORT = "tests[0].timeout: is {}; write at least 900000 for a render."
TOO_OLD = "config.allowedCudaVersions: has 12.6"


@pytest.mark.golden
@pytest.mark.parametrize(
    ("commit", "expected"),
    [
        ("30e8234", [TOO_SHORT.format(600000), TOO_OLD]),
        ("4392464", [TOO_SHORT.format(10000), TOO_OLD, '"ENV_KEY_HERE" is read by nothing']),
        ("6494c65", [TOO_SHORT.format(600000), TOO_OLD]),
        ("9aa2584", [POOL_AS_GPU]),
        ("f7dba5e", [POOL_AS_GPU]),
    ],
)
def test_the_stored_tests_are_refused_beside_our_listing(golden, tmp_path, commit, expected):
    tests = (golden / REQUESTS.format(f"tests__{commit}")).read_text("utf-8")
    found = problems(tmp_path, tests=tests)
    assert all(line.startswith("tests.json: ") for line in found)
    assert [part for part in expected if not any(part in line for line in found)] == []


def test_the_guides_example_names_a_pool_where_a_gpu_belongs(tmp_path):
    hub = with_config("hub.json", gpuIds="ADA_24", allowedCudaVersions=["12.7"])
    tests = with_config("tests.json", gpuTypeId="ADA_24", allowedCudaVersions=["12.7"])
    assert problems(tmp_path, hub, tests)[1:] == [
        "tests.json: config.gpuTypeId: ADA_24 is a pool; the name of one GPU is expected here. "
        f'Write "{RTX_4090}".'
    ]


@pytest.mark.parametrize(
    ("ids", "sentence"),
    [
        ("BLACKWELL_24", '"BLACKWELL_24" is no pool of RunPod; known are BLACKWELL_96, '),
        ("ADA24", '"ADA24" is no pool of RunPod; known are AMPERE_16, '),
        ("ada_24", '"ada_24" is no pool of RunPod; known are ADA_24, ADA_32_PRO, '),
        ("", '"" is no pool of RunPod; '),
        ("ADA_24,", '"" is no pool of RunPod; '),
        (RTX_4090, f'"{RTX_4090}" is a GPU; a pool is expected here. Write ADA_24.'),
        ("-NVIDIA L4", "leaves out NVIDIA L4, which is in none of its pools. Remove it."),
        ("-NVIDIA L4", "names no pool. Write ADA_24."),
        ("ADA_24,-NVIDIA RTX 4090", f"no GPU of RunPod; is {RTX_4090} meant?"),
        ("ADA_24,ADA_32_PRO", f"ADA_32_PRO has the {RTX_5090}; this image is for sm89"),
        ("ADA_24,AMPERE_24", "AMPERE_24 has the NVIDIA RTX A5000; this image is for sm89"),
        ("HOPPER_141", "HOPPER_141 has the NVIDIA H200; this image is for sm89 (RTX 4090, L40S, "
         "RTX 6000 Ada). Remove HOPPER_141."),
        ("ADA_24,-NVIDIA GeForce RTX 4080", "RTX 4080, which is in no pool of RunPod. Remove it."),
        ("NVIDIA GeForce RTX 5080", "is a GPU that no pool of RunPod has. Write ADA_24."),
        ("\ud800" * 100_000, '"\\ud800\\ud800'),
    ],
    ids=lambda text: text[:30].encode("ascii", "replace").decode(),
)  # fmt: skip
def test_wrong_pools_are_named_with_the_right_ones(tmp_path, ids, sentence):
    found = problems(tmp_path, with_config("hub.json", gpuIds=ids))
    assert any(line.startswith("hub.json: config.gpuIds: ") and sentence in line for line in found)
    assert all(len(line.encode()) < 500 for line in found)


def test_a_pool_is_right_when_its_other_gpus_are_left_out(tmp_path):
    ids = f"ADA_24,AMPERE_24,-NVIDIA RTX A5000,-NVIDIA GeForce RTX 3090,-{QUARTER}"
    assert problems(tmp_path, with_config("hub.json", gpuIds=ids)) == []


def test_a_slice_of_blackwell_in_a_pool_of_ada_is_left_out_by_name(tmp_path):
    """Jobs of an endpoint for the L40S were run on slices, for which its image has no kernels."""
    ids = "ADA_24,ADA_48_PRO"
    assert problems(tmp_path, with_config("hub.json", gpuIds=ids)) == [
        f"hub.json: config.gpuIds: ADA_48_PRO has the {HALF}; this image is for sm89 (RTX 4090, "
        f"L40S, RTX 6000 Ada). Add -{HALF}."
    ]
    assert problems(tmp_path, with_config("hub.json", gpuIds=f"{ids},-{HALF}")) == []


def test_a_slice_is_a_gpu_of_its_own_for_the_image_of_blackwell(tmp_path):
    cuda = ["12.8", "12.9", "13.0"]
    shutil.copy(ROOT / "Dockerfile.sm120", tmp_path / "Dockerfile")
    others = ",".join(f"-{gpu}" for gpu in POOLS["ADA_48_PRO"] if gpu != HALF)
    hub = with_config("hub.json", gpuIds=f"ADA_48_PRO,{others}", allowedCudaVersions=cuda)
    tests = with_config("tests.json", gpuTypeId=HALF, allowedCudaVersions=cuda)
    assert problems(tmp_path, hub, tests) == []


@pytest.mark.parametrize(
    ("gpu", "sentence"),
    [
        ("RTX 4090", f'"RTX 4090" is no GPU of RunPod; is {RTX_4090} meant?'),
        ("GTX", '"GTX" is no GPU of RunPod; known are NVIDIA RTX A4000, '),
        ("NVIDIA RTX 4090", f'"NVIDIA RTX 4090" is no GPU of RunPod; is {RTX_4090} meant?'),
        ("BLACKWELL_24", '"BLACKWELL_24" is no GPU of RunPod; '),
        ("ADA_32_PRO", "ADA_32_PRO is a pool; the name of one GPU is expected here. Write "
         f'"{RTX_5090}".'),
        (RTX_5090, f"{RTX_5090} is in no pool of hub.json. Write one of {RTX_4090}."),
        ("NVIDIA L4", f"NVIDIA L4 is in no pool of hub.json. Write one of {RTX_4090}."),
        (QUARTER, f"{QUARTER} is in no pool of hub.json. Write one of {RTX_4090}."),
        ("NVIDIA GeForce RTX 4080", "NVIDIA GeForce RTX 4080 is in no pool of hub.json. Write "),
    ],
)  # fmt: skip
def test_a_wrong_gpu_of_the_tests_is_named_with_the_right_one(tmp_path, gpu, sentence):
    (found,) = problems(tmp_path, tests=with_config("tests.json", gpuTypeId=gpu))
    assert found.startswith(f"tests.json: config.gpuTypeId: {sentence}")


@pytest.mark.parametrize(
    ("versions", "sentence"),
    [
        (["12.7"], "lacks 12.8, 12.9, 13.0. RunPod compares exactly"),
        (["12.8", "12.9", "13.0"], "lacks 12.7. RunPod compares exactly"),
        (["12.6", "12.7", "12.8", "12.9", "13.0"], "has 12.6; the image needs a driver of "),
        (["12.7", "12.7", "12.8", "12.9", "13.0"], "names a version twice."),
        (["12.7", "12.8", "12.9", "13.0", "12.10"], 'has "12.10", which no host reports; is '),
        (["12.7", "12.8", "12.9", 13.0], 'has 13.0; strings such as "12.8" are expected.'),
        (["12.7", "12.8", "12.9", "13.0", ">=12.7"], 'has ">=12.7", which no host reports'),
        ([], "is empty; list 12.7 and everything newer."),
        ("12.7", 'is "12.7"; a list is expected.'),
        (None, "is null; a list is expected."),
        (..., "is missing."),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_cuda_versions_are_named(tmp_path, versions, sentence):
    found = problems(tmp_path, with_config("hub.json", allowedCudaVersions=versions))
    assert any(f"hub.json: config.allowedCudaVersions: {sentence}" in line for line in found)


def test_tests_must_not_want_a_driver_that_the_listing_does_not_offer(tmp_path):
    hub = with_config("hub.json", allowedCudaVersions=["12.7", "12.8"])
    found = problems(tmp_path, hub)
    assert found[-1] == (
        "tests.json: config.allowedCudaVersions: has 12.9, 13.0, which hub.json does not offer. "
        "Write its list here."
    )
    tests = with_config("tests.json", allowedCudaVersions=["12.8"])
    assert problems(tmp_path, tests=tests) == []


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"gpuCount": 2}, "config.gpuCount: is 2; the engine uses 1."),
        ({"gpuCount": True}, "config.gpuCount: is true; a whole number is expected."),
        ({"containerDiskInGb": 5}, "config.containerDiskInGb: is 5; the image needs 20."),
        ({"containerDiskInGb": float("nan")}, "config.containerDiskInGb: is NaN; a whole number"),
        ({"runsOn": "CPU"}, 'config.runsOn: is "CPU"; GPU is expected.'),
        ({"endpointType": "LB"}, 'config.endpointType: is "LB". RunPod knows "LB", endpoints '),
        ({"endpointType": "QUEUE"}, 'config.endpointType: is "QUEUE". RunPod knows "LB", '),
        ({"endpointType": 1}, "config.endpointType: is 1; a string is expected."),
        ({"cpuFlavor": "cpu3c"}, 'config.cpuFlavor: is "cpu3c", which is for machines without a '),
        ({"gpuIds": ["ADA_24"]}, 'config.gpuIds: is ["ADA_24"]; a string is expected.'),
        ({"gpuIds": ...}, "config.gpuIds: is missing."),
        ({"allowedCudaVersion": []}, 'config."allowedCudaVersion": is no field that RunPod reads '
         "here; is allowedCudaVersions meant?"),
        ({"env": [{"key": "WEIGHT_REPO", "value": ""}]}, 'config.env[0].key: "WEIGHT_REPO" is read '
         "by nothing; is WEIGHTS_REPO meant?"),
        ({"env": [{"key": "FIT"}]}, 'config.env[0]: "FIT" has neither a value'),
        ({"env": [{"key": "FIT", "value": "x"}] * 2}, 'config.env[1].key: "FIT" is there twice.'),
        ({"env": [7]}, "config.env[0]: is 7; "),
        ({"presets": [{"defaults": {"RECIP": "x"}}]}, 'config.presets[0]: sets "RECIP"'),
    ],
    ids=str,
)  # fmt: skip
def test_other_wrong_fields_of_the_listing_are_named(tmp_path, changes, sentence):
    (found,) = problems(tmp_path, with_config("hub.json", **changes))
    assert found.startswith(f"hub.json: {sentence}")


def test_a_processor_is_no_machine_for_the_tests_either(tmp_path):
    (found,) = problems(tmp_path, tests=with_config("tests.json", cpuFlavor="cpu5g"))
    assert found.startswith('tests.json: config.cpuFlavor: is "cpu5g", which is for machines ')


@pytest.mark.parametrize(
    ("number", "changes", "sentence"),
    [
        (1, {"timeout": 899_999}, "tests[1].timeout: is 899999; write at least 900000 for "),
        (1, {"timeout": "900000"}, 'tests[1].timeout: is "900000"; a whole number is expected.'),
        (1, {"timeout": ...}, "tests[1].timeout: is missing."),
        (0, {"timeout": 600}, "tests[0].timeout: is 600; write at least 1000 (it counts"),
        (0, {"name": ...}, "tests[0].name: is missing."),
        (0, {"inputs": {}}, 'tests[0]."inputs": is no field that RunPod reads here; is input '),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_cases_are_named(tmp_path, number, changes, sentence):
    (found,) = problems(tmp_path, tests=with_case(number, **changes))
    assert found.startswith(f"tests.json: {sentence}")


def test_a_listing_needs_a_self_test_and_a_render(tmp_path):
    light, render = ours("tests.json")["tests"]
    (found,) = problems(tmp_path, tests=ours("tests.json") | {"tests": [light]})
    assert found == "tests.json: tests: render nothing. Add one that makes a small clip."
    (found,) = problems(tmp_path, tests=ours("tests.json") | {"tests": [render]})
    assert found.startswith("tests.json: tests: have no light self-test.")
    found = problems(tmp_path, tests=ours("tests.json") | {"tests": [light, render, "dance"]})
    assert found == ['tests.json: tests[2]: is "dance"; an object is expected.']


def test_an_empty_listing_lacks_every_field(tmp_path):
    found = problems(tmp_path, {}, {})
    lacking = [line.split(": ")[1] for line in found if line.endswith("is missing.")]
    assert lacking == [
        "title", "description", "type", "config", "category", "config.runsOn",
        "config.containerDiskInGb", "config.gpuCount", "config.gpuIds",
        "config.allowedCudaVersions", "tests", "config", "config.gpuTypeId", "config.gpuCount",
        "config.allowedCudaVersions",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text",
    ["", "[]", "7", "{", '{"title": }', "[" * 100_000, '"' + "x" * 2**20 + '"'],
    ids=lambda text: text[:12],
)
def test_a_file_that_is_no_listing_is_one_sentence(tmp_path, text):
    with pytest.raises(BadRequest, match=r"hub\.json is not the JSON of a listing: "):
        problems(tmp_path, text)


def test_bytes_that_are_no_text_are_one_sentence(tmp_path):
    problems(tmp_path)
    (tmp_path / "tests.json").write_bytes(b'{"tests": "\xff\xfe"}')
    with pytest.raises(BadRequest, match=r"tests\.json is not the JSON of a listing: "):
        check(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(BadRequest, match=r"hub\.json cannot be read: No such file or directory"):
        check(tmp_path)
    with pytest.raises(BadRequest, match=r"hub\.json cannot be read: Not a directory"):
        check(OURS / "hub.json")


def listing(folder, dockerfile):
    shutil.copytree(OURS, folder / ".runpod")
    (folder / ".runpod" / "Dockerfile").write_text(dockerfile)
    return [str(problem) for problem in check(folder)]


def test_a_base_image_above_the_driver_floor_is_found(tmp_path):
    text = (
        (OURS / "Dockerfile").read_text("utf-8").replace("nvidia/cuda:12.6.3", "nvidia/cuda:12.8.1")
    )
    assert listing(tmp_path, text) == [
        "Dockerfile: ARG CUDA: the base image is of CUDA 12.8 and does not start on hosts below "
        "it; sm89 is for 12.7 and newer. Take an older base."
    ]


def test_the_image_of_another_architecture_does_not_fit_the_pools(tmp_path):
    found = listing(tmp_path, (ROOT / "Dockerfile.sm120").read_text("utf-8"))
    assert found == [
        "hub.json: config.gpuIds: ADA_24 has the NVIDIA GeForce RTX 4090; this image is for sm120 "
        "(RTX 5090, RTX PRO 6000). Remove ADA_24, and deploy Dockerfile.sm89 for it.",
        "hub.json: config.allowedCudaVersions: has 12.7; the image needs a driver of CUDA 12.8 or "
        "newer. Remove what is below.",
        "tests.json: config.allowedCudaVersions: has 12.7; the image needs a driver of CUDA 12.8 "
        "or newer. Remove what is below.",
    ]


def test_the_direct_deployment_of_the_rtx_5090_would_pass(tmp_path):
    cuda = ["12.8", "12.9", "13.0"]
    shutil.copy(ROOT / "Dockerfile.sm120", tmp_path / "Dockerfile")
    hub = with_config("hub.json", gpuIds="ADA_32_PRO", allowedCudaVersions=cuda)
    tests = with_config("tests.json", gpuTypeId=RTX_5090, allowedCudaVersions=cuda)
    assert problems(tmp_path, hub, tests) == []


AMPERE = ["12.6", "12.7", "12.8", "12.9", "13.0"]


@pytest.mark.parametrize(
    ("ids", "gpu"),
    [
        ("AMPERE_48,AMPERE_80", "NVIDIA RTX A6000"),
        (f"AMPERE_24,-NVIDIA L4,-{QUARTER}", "NVIDIA GeForce RTX 3090"),
    ],
)
def test_one_image_serves_the_pools_of_both_architectures_that_it_holds(tmp_path, ids, gpu):
    shutil.copy(ROOT / "Dockerfile.sm86", tmp_path / "Dockerfile")
    hub = with_config("hub.json", gpuIds=ids, allowedCudaVersions=AMPERE)
    tests = with_config("tests.json", gpuTypeId=gpu, allowedCudaVersions=AMPERE)
    assert problems(tmp_path, hub, tests) == []


def test_pools_with_gpus_beside_those_of_the_image_are_told(tmp_path):
    shutil.copy(ROOT / "Dockerfile.sm86", tmp_path / "Dockerfile")
    hub = with_config("hub.json", gpuIds="AMPERE_24,ADA_32_PRO", allowedCudaVersions=AMPERE)
    tests = with_config(
        "tests.json", gpuTypeId="NVIDIA GeForce RTX 3090", allowedCudaVersions=AMPERE
    )
    held = "this image is for sm80, sm86 (A100, RTX 3090, RTX A6000, A40)."
    assert problems(tmp_path, hub, tests) == [
        f"hub.json: config.gpuIds: AMPERE_24 has the NVIDIA L4; {held} Add -NVIDIA L4,-{QUARTER}.",
        f"hub.json: config.gpuIds: ADA_32_PRO has the {RTX_5090}; {held} Remove ADA_32_PRO, and "
        "deploy Dockerfile.sm120 for it.",
    ]
    hub = with_config("hub.json", gpuIds="", allowedCudaVersions=AMPERE)
    assert problems(tmp_path, hub, tests)[-1].endswith("names no pool. Write AMPERE_48.")


def test_an_image_for_no_architecture_is_named(tmp_path):
    (found,) = listing(tmp_path, "FROM scratch\n")
    assert found == "Dockerfile: ARG ARCH: names none of sm80, sm86, sm89, sm90, sm120."


@pytest.mark.parametrize("named", ['"sm86 sm75"', "", '""'])
def test_an_image_for_an_unknown_architecture_beside_a_known_one_is_named(tmp_path, named):
    found = listing(tmp_path, f"ARG ARCH={named}\n")
    assert found[0] == "Dockerfile: ARG ARCH: names none of sm80, sm86, sm89, sm90, sm120."


def test_no_pool_hides_the_gpu_of_another(tmp_path):
    """A GPU in two pools has one capability, and every pool has a GPU."""
    for pool, gpus in POOLS.items():
        assert gpus, pool
        assert {name: GPUS[name] for name in gpus} == dict(gpus)


@pytest.mark.parametrize("name", VARIABLES)
def test_every_variable_of_a_listing_is_read_by_the_image(name):
    files = [ROOT / "entrypoint.sh", *(ROOT / "engine").rglob("*.py")]
    readers = [path for path in files if path.name != "hub.py" and name in path.read_text("utf-8")]
    assert readers != []


@pytest.mark.parametrize("name", VARIABLES)
def test_every_variable_is_explained(name):
    assert f"`{name}`" in (ROOT / "docs" / "deploy.md").read_text("utf-8")
