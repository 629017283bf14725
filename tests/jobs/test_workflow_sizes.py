"""Sizes, counts and rates of a workflow: constants, calculators, and what hands them on."""

import pytest

from engine.jobs.workflow import read_workflow
from tests.support.job_bodies import refused
from tests.support.workflows import inputs_of, linked, told, workflow

CALCULATOR = "SimpleCalculatorKJ"


def read(nodes=None, **changes):
    return read_workflow(workflow(nodes=nodes, **changes))


@pytest.mark.parametrize(
    ("kind", "inputs"),
    [
        ("INTConstant", {"value": 640}), ("PrimitiveInt", {"value": "640"}),
        ("PrimitiveFloat", {"value": 640.0}), ("FloatConstant", {"value": "6.4e2"}),
        ("easy int", {"value": 640}), ("ImpactInt", {"value": 640}), ("Int Literal", {"int": 640}),
        ("PrimitiveInt", {"value": ["203", 0]}),
        (CALCULATOR, {"expression": "a - 32", "a": ["204", 0]}),
        (CALCULATOR, {"expression": "round(a * 1.5384)", "a": ["203", 0]}),
        (CALCULATOR, {"expression": "-(-a // 1) + b - int(c)", "a": 600, "b": 50, "c": "10.9"}),
        ("Reroute", {"": ["901", 0]}), ("GetNode", {"Constant": "w"}),
        ("GetImageSizeAndCount", {"image": ["902", 0]}),
        ("GetImageSizeAndCount", {"image": ["903", 0]}),
    ],
)  # fmt: skip
def test_a_side_is_read_through_what_hands_it_on(kind, inputs):
    output = 1 if kind in ("GetImageSizeAndCount",) else 0
    nodes = {
        "900": (kind, inputs),
        "901": ("INTConstant", {"value": 640}),
        "902": ("ImageResizeKJv2", inputs_of("107", width=640)),
        "903": ("Reroute", {"": ["902", 0]}),
        "904": ("SetNode", {"INT": ["901", 0], "Constant": "w"}),
    }
    given = {"n203_value": 640} if inputs.get("value") == ["203", 0] else {}
    assert read(nodes, n107_width=["900", output], **given).width == 640


@pytest.mark.parametrize(
    ("expression", "is_half"),
    [("a / 2", True), ("a/2", True), ("a // 2", True), ("a * 0.5", True), ("int(a / 2)", True),
     ("0.5*a", True), ("(a + a) / 4", True), ("a", False), ("a * 1", False), ("a / 4", None),
     ("__import__('os').system('true')", None), ("9**9**9", None), ("a / 0", None),
     ("1e308 * 1e308", None), ("(" * 90 + "a", None), ("a" * 500, None), ("", None),
     ("a if a else a", None), ("'a' * 10", None), ("a.real", None), ("[a][0]", None),
     ("round(a, 2)", None), ("max(a, a)", None), ("lambda: a", None), ("a\0", None),
     ("c", None)],
)  # fmt: skip
def test_a_skeleton_is_half_or_whole_by_what_the_calculator_says(expression, is_half):
    given = {"n371_expression": expression, "n372_expression": expression}
    half = read(**given).recipe.half_render
    assert half is (True if is_half is None else is_half)
    assert ("the size of node 362 (RenderNLFPoses), done as half" in told(workflow(**given))) is (
        is_half is None
    )


def test_half_of_a_side_that_is_left_open_is_half():
    given = {"n203_value": "{{width}}", "n204_value": "{{height}}"}
    draft = read(**given)
    assert (draft.width, draft.height, draft.recipe.half_render) == (None, None, True)
    assert "the size of" not in told(workflow(**given))


def test_sides_that_are_linked_crosswise_are_done_crosswise_and_told():
    given = workflow(n99_width=["107", 2], n99_height=["107", 1])
    draft = read_workflow(given)
    assert (draft.width, draft.height) == (672, 416)
    assert "width of node 107 (ImageResizeKJv2) is 416, done as 672" in linked(given)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"n131_width": 320}, "width of node 131 (ImageResizeKJv2) is 320, done as 416"),
        ({"n131_height": ["203", 0]}, "height of node 131 (ImageResizeKJv2) is 416, done as 672"),
        ({"n99_width": 512, "n99_height": 896}, "width of node 107 (ImageResizeKJv2) is 416, done"),
        ({"n99_width": ["131", 1]}, "width of node 99 (WanVideoEmptyEmbeds) comes from output 1"),
        ({"n131_width": ["334", 0]}, "width of node 131 (ImageResizeKJv2) comes from node 334"),
    ],
)  # fmt: skip
def test_a_picture_of_another_size_than_the_clip_is_told(changes, said):
    assert any(one.startswith(said) for one in linked(workflow(**changes)))


@pytest.mark.parametrize(
    ("nodes", "changes", "frames"),
    [
        ({"900": ("INTConstant", {"value": 81})}, {"n99_num_frames": ["900", 0]}, 81),
        ({"900": ("INTConstant", {"value": 50})}, {"n130_frame_load_cap": ["900", 0]}, 50),
        ({}, {"n99_num_frames": "81"}, 81),
        ({}, {"n130_frame_load_cap": 0}, None),
    ],
)
def test_frames_are_read_from_constants_too(nodes, changes, frames):
    assert read(nodes, **changes).frames == frames


def test_a_rate_that_is_that_of_the_loaded_video_is_the_one_it_is_loaded_at():
    nodes = {"900": ("VHS_VideoInfo", {"video_info": ["130", 3]})}
    assert read(nodes, n139_frame_rate=["900", 5], n130_force_rate=30).fps == 30.0
    nodes = {"900": ("VHS_VideoInfoLoaded", {"video_info": ["130", 3]})}
    assert read(nodes, n139_frame_rate=["900", 0], n130_force_rate=16).fps == 16.0
    for changes in ({"n130_force_rate": 0}, {"n139_frame_rate": ["900", 1]}):
        given = workflow(nodes=nodes, **{"n139_frame_rate": ["900", 0], **changes})
        assert "a value or a constant is expected." in refused(workflow=given)


@pytest.mark.parametrize(
    ("nodes", "changes", "sentence"),
    [
        ({"900": (CALCULATOR, {"expression": "a", "a": ["900", 0]})}, {"n107_width": ["900", 0]},
         "input a of node 900 (SimpleCalculatorKJ) goes through too many nodes, or in a circle."),
        ({"900": (CALCULATOR, {"expression": "a + foo", "a": 1})}, {"n107_width": ["900", 0]},
         "The input foo of node 900 (SimpleCalculatorKJ) is missing."),
        ({"900": (CALCULATOR, {"expression": "open(a)", "a": 1})}, {"n107_width": ["900", 0]},
         "The input open of node 900 (SimpleCalculatorKJ) is missing."),
        ({"900": (CALCULATOR, {"expression": "int(a)(a)", "a": 1})}, {"n107_width": ["900", 0]},
         'is "int(a)(a)"; arithmetic of its inputs is expected.'),
        ({"900": ("GetImageSizeAndCount", {"image": ["106", 0]})}, {"n107_width": ["900", 1]},
         "The size that node 106 (LoadImage) tells is not that of a ImageResizeKJv2."),
        ({}, {"n107_width": ["131", 0]}, "from node 131 (ImageResizeKJv2), which is no side."),
        ({}, {"n107_width": ["203", 1]}, "comes from output 1 of node 203 (INTConstant); a value"),
        ({}, {"n203_value": "٤١٦"}, "a whole number is expected."),
        ({}, {"n203_value": "1e999"}, 'is "1e999"; a whole number is expected.'),
        ({}, {"n203_value": "nan"}, 'is "nan"; a whole number is expected.'),
        ({}, {"n203_value": True}, "is true; a whole number is expected."),
        ({}, {"n203_value": 416.5}, "is 416.5; a whole number is expected."),
        ({}, {"n203_value": "9" * 5000}, "a whole number is expected."),
    ],
)  # fmt: skip
def test_what_is_no_side_is_refused_in_a_sentence(nodes, changes, sentence):
    assert sentence in refused(workflow=workflow(nodes=nodes, **changes))
