"""Any JSON gives a job or an `EngineError`: random bodies, and nearly good ones."""

import dataclasses
import json
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import Defaults
from engine.errors import EngineError
from engine.jobs.body import Fields
from engine.jobs.job import Job
from engine.jobs.parse import parse_job
from engine.jobs.served import PREVIEW
from engine.recipes import check_settings
from tests.support.job_bodies import SCAIL2

OURS = Path(__file__).resolve().parents[2] / "workflows"
WORKFLOW = json.loads((OURS / "dance-scail-bplan.json").read_text(encoding="utf-8"))
DEFAULTS = Defaults(video=Path("dance.mp4"))
CAPPED = Defaults(video=Path("dance.mp4"), max_pixels=96 * 160, max_frames=17)
QUICK = settings(max_examples=120, deadline=None)  # a busy machine is not a failure
STORAGE = ("endpointUrl", "accessId", "accessSecret", "bucketName")
TEXT = st.text(st.characters(codec=None), max_size=12)  # halves of surrogate pairs too
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-(2**600), 2**600), st.floats(), TEXT,
    st.sampled_from(["416", "1e400", "-1", "nan", "crop", "production", "euler", "{{x}}", "{}"]),
    st.integers(1, 2000), st.sampled_from(sorted(WORKFLOW)),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=8,
)
FIELDS = st.dictionaries(st.sampled_from([*Fields.model_fields, "unknown"]) | TEXT, VALUES)


def outcome(given, defaults=DEFAULTS, served=PREVIEW):
    """Returns the job, checked again, or the sentence. Another exception fails the test."""
    try:
        job = parse_job(given, defaults, served)
    except EngineError as error:
        said = str(error)
        assert said.endswith(".")
        assert said.isprintable()
        assert len(said) < 600
        return said
    assert isinstance(job, Job)
    check_settings(job.settings, served.kind.name)
    assert all(said.isprintable() and len(said) <= 2000 for said in job.warnings)
    assert len(job.warnings) <= 20
    return job


def seedless(given):
    """Returns the outcome with the seed set to 0, whichever was drawn."""
    found = outcome(given)
    if not isinstance(found, Job):
        return found
    return dataclasses.replace(found, settings=dataclasses.replace(found.settings, seed=0))


@QUICK
@given(VALUES)
def test_anything_in_place_of_a_job_is_refused_or_read(value):
    outcome(value)
    outcome({"input": value})


@QUICK
@given(FIELDS)
def test_any_value_in_any_field_is_refused_or_read(fields):
    outcome({"input": fields})
    try:
        text = json.dumps(fields)
    except ValueError:
        return
    assert seedless({"input": json.loads(text)}) == seedless({"input": text})


@QUICK
@given(st.sampled_from(sorted(Fields.model_fields)), VALUES)
def test_one_odd_field_in_a_good_request_is_refused_or_read(name, value):
    outcome({"input": {"image_url": "https://a/b", name: value}})


@QUICK
@given(VALUES, st.sampled_from(STORAGE))
def test_storage_of_any_kind_is_refused_or_read(value, key):
    good = {"input": {"image_url": "https://a/b"}}
    outcome({**good, "s3Config": value})
    outcome({**good, "s3Config": {**dict.fromkeys(STORAGE, "a"), key: value}})


@QUICK
@given(st.integers(64, 1280), st.integers(64, 1280), st.integers(1, 2000))
def test_what_an_endpoint_caps_is_never_exceeded(width, height, frames):
    body = {"image_url": "https://a/b", "width": width, "height": height, "frames": frames}
    capped = outcome({"input": body}, CAPPED).settings
    assert capped.width * capped.height <= 96 * 160
    assert capped.frames <= 17
    free = outcome({"input": body}).settings
    assert (free.width, free.height, free.frames) == (width // 32 * 32, height // 32 * 32, frames)


@QUICK
@given(st.dictionaries(TEXT, VALUES))
def test_any_object_in_place_of_a_workflow_is_refused_or_read(nodes):
    outcome({"input": {"image_url": "https://a/b", "workflow": nodes}})


LINKS = st.tuples(
    st.sampled_from([*sorted(WORKFLOW), "900", "901", "902", "999"]), st.integers(-1, 4)
).map(list)
KINDS = st.sampled_from(
    [*sorted({node["class_type"] for node in WORKFLOW.values()}), "Reroute", "SetNode", "GetNode",
     "ImageSwitch", "StringConstant", "WanVideoLoraSelectMulti", "VHS_VideoInfo",
     "WanVideoTextEncode", "GetImageSizeAndCount"]
)  # fmt: skip
NAMES = st.sampled_from(sorted({name for node in WORKFLOW.values() for name in node["inputs"]}))
NODES = st.fixed_dictionaries(
    {"class_type": KINDS, "inputs": st.dictionaries(NAMES, LINKS | SCALARS, max_size=6)},
    optional={"mode": VALUES, "_meta": VALUES},
)


@QUICK
@given(
    st.dictionaries(st.sampled_from(["900", "901", "902", *sorted(WORKFLOW)]), NODES, max_size=3),
    st.lists(st.tuples(st.sampled_from(sorted(WORKFLOW)), NAMES, LINKS | SCALARS), max_size=5),
)
def test_a_workflow_linked_in_any_way_is_refused_or_read(nodes, changes):
    made = {**{name: {**node, "inputs": {**node["inputs"]}} for name, node in WORKFLOW.items()},
            **nodes}  # fmt: skip
    for node, name, value in changes:
        made[node]["inputs"][name] = value
    outcome({"input": {"image_url": "https://a/b", "workflow": made}})


@QUICK
@given(st.data())
def test_a_workflow_with_one_thing_changed_is_refused_or_read(data):
    node = data.draw(st.sampled_from(sorted(WORKFLOW)))
    inputs = WORKFLOW[node]["inputs"]
    value = data.draw(
        VALUES | st.tuples(st.sampled_from(sorted(WORKFLOW)), st.integers()).map(list)
    )
    name = data.draw(st.sampled_from(sorted(inputs)) | TEXT)
    changed = data.draw(
        st.sampled_from(
            [
                {**WORKFLOW[node], "inputs": {**inputs, name: value}},
                {**WORKFLOW[node], "inputs": {k: v for k, v in inputs.items() if k != name}},
                {**WORKFLOW[node], "class_type": value},
                value,
            ]
        )
    )
    outcome({"input": {"image_url": "https://a/b", "workflow": {**WORKFLOW, node: changed}}})


CORE = json.loads((OURS / "scail2-replacement-long.json").read_text(encoding="utf-8"))
CORE_NAMES = st.sampled_from(sorted({name for node in CORE.values() for name in node["inputs"]}))
CORE_KINDS = st.sampled_from(
    [*sorted({node["class_type"] for node in CORE.values()}), "KSampler", "SamplerCustomAdvanced",
     "CFGGuider", "RandomNoise", "BatchImagesNode", "SCAIL2ColoredMask", "SAM3_VideoTrack",
     "ConditioningZeroOut", "VHS_LoadVideo", "VHS_VideoCombine", "ImageScale", "Reroute"]
)  # fmt: skip
CORE_LINKS = st.tuples(st.sampled_from([*sorted(CORE), "900", "999"]), st.integers(-1, 4)).map(list)
CORE_NODES = st.fixed_dictionaries(
    {"class_type": CORE_KINDS,
     "inputs": st.dictionaries(CORE_NAMES, CORE_LINKS | SCALARS, max_size=6)},
)  # fmt: skip


@QUICK
@given(
    st.dictionaries(st.sampled_from(["900", *sorted(CORE)]), CORE_NODES, max_size=3),
    st.lists(st.tuples(st.sampled_from(sorted(CORE)), CORE_NAMES, CORE_LINKS | SCALARS)),
)
def test_a_core_workflow_linked_in_any_way_is_refused_or_read(nodes, changes):
    made = {name: {**node, "inputs": {**node["inputs"]}} for name, node in CORE.items()} | nodes
    for node, name, value in changes[:5]:
        made[node]["inputs"][name] = value
    outcome({"input": {"image_url": "https://a/b", "workflow": made}}, served=SCAIL2)


@QUICK
@given(FIELDS)
def test_any_value_in_any_field_of_scail2_is_refused_or_read(fields):
    outcome({"input": {"image_url": "https://a/b", "mask_url": "https://a/m"} | fields}, DEFAULTS,
            SCAIL2)  # fmt: skip


@QUICK
@given(VALUES, st.sampled_from(["references", "reference_url", "mode", "mask_path", "segments"]))
def test_one_odd_field_of_scail2_is_refused_or_read(value, name):
    outcome({"input": {"image_url": "https://a/b", name: value}}, DEFAULTS, SCAIL2)
    outcome({"input": {"image_url": "https://a/b", "references": [{"url": value}]}}, served=SCAIL2)
