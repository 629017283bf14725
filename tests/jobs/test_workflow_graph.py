"""Nodes and links as they are written: values, wires, what counts as a link, and what it costs."""

import pytest

from engine.errors import BadRequest
from engine.jobs.workflow import read_workflow
from engine.jobs.workflow_graph import Graph, Link, read_graph
from engine.jobs.workflow_parts import find_parts
from engine.jobs.workflow_settings import differences
from engine.jobs.workflow_sizes import side
from tests.support.job_bodies import job, refused, settings_of
from tests.support.workflows import MEDIA, inputs_of, told, workflow


@pytest.mark.parametrize(
    ("kind", "inputs"),
    [
        ("StringConstant", {"string": "she dances"}), ("StringConstant", {"value": "she dances"}),
        ("StringConstantMultiline", {"string": "she dances", "strip_newlines": True}),
        ("PrimitiveString", {"value": "she dances"}), ("String Literal", {"string": "she dances"}),
        ("PrimitiveStringMultiline", {"value": "she dances"}), ("JWString", {"text": "she dances"}),
        ("easy string", {"value": "she dances"}), ("Text Multiline", {"text": "she dances"}),
        ("PrimitiveString", {"value": ["901", 0]}), ("Reroute", {"": ["901", 0]}),
        ("CR Text", {"text": "she dances"}), ("CR Prompt Text", {"prompt": "she dances"}),
        ("ShowText|pysssss", {"text": ["901", 0], "text_0": "what was shown before"}),
        ("ttN text", {"text": "she dances"}), ("easy positive", {"positive": "she dances"}),
        ("JWStringMultiline", {"text": "she dances"}), ("String", {"value": "she dances"}),
        ("Primitive string [Crystools]", {"string": "she dances"}),
    ],
)  # fmt: skip
def test_a_prompt_is_read_from_every_node_that_holds_a_text(kind, inputs):
    nodes = {"900": (kind, inputs), "901": ("StringConstant", {"string": "she dances"})}
    for name in ("positive_prompt", "negative_prompt"):
        draft = read_workflow(workflow(nodes=nodes, **{f"n368_{name}": ["900", 0]}))
        assert "she dances" in (draft.prompt, draft.negative_prompt)


def test_a_prompt_may_come_from_the_encoder_that_does_not_cache():
    nodes = {
        "901": ("LoadWanVideoT5TextEncoder", {"model_name": "umt5-xxl-enc-bf16.safetensors"}),
        "900": ("WanVideoTextEncode", {"positive_prompt": "p", "negative_prompt": "n",
                                       "t5": ["901", 0], "force_offload": True}),
    }  # fmt: skip
    draft = read_workflow(workflow(nodes=nodes, n348_text_embeds=["900", 0]))
    assert (draft.prompt, draft.negative_prompt) == ("p", "n")
    assert draft.warnings[-1] == read_workflow(workflow()).warnings[-1]


@pytest.mark.parametrize(
    ("kind", "inputs", "seed"),
    [("PrimitiveInt", {"value": 2**64 - 1, "control_after_generate": "fixed"}, 2**64 - 1),
     ("PrimitiveInt", {"value": str(2**64 - 1)}, 2**64 - 1), ("easy seed", {"seed": 7}, 7),
     ("Seed (rgthree)", {"seed": 7}, 7)],
)  # fmt: skip
def test_a_seed_is_read_from_every_node_that_holds_one(kind, inputs, seed):
    given = workflow(nodes={"900": (kind, inputs)}, n348_seed=["900", 0])
    assert settings_of(workflow=given).seed == seed


def test_every_number_may_be_a_string():
    given = workflow(**MEDIA)
    for node in given.values():
        for name, value in node["inputs"].items():
            if type(value) in (int, float):
                node["inputs"][name] = str(value)
    usual = job(workflow=workflow(**MEDIA))
    read = job(workflow=given)
    assert read.settings == usual.settings
    assert [said.replace('at "1"', "at 1") for said in read.warnings] == list(usual.warnings)


@pytest.mark.parametrize(
    ("value", "is_told"),
    [("19", False), ("19.0", False), (19.0, False), ("1.9e1", False), ("10", True), (True, True),
     (None, True), ([], True), ({}, True), (["203", 0], True), ("nineteen", True)],
)  # fmt: skip
def test_a_setting_is_compared_as_the_number_it_says(value, is_told):
    assert ("crf of node 139" in told(workflow(n139_crf=value))) is is_told


@pytest.mark.parametrize(
    ("value", "is_told"),
    [(True, False), (1, False), ("true", False), ("True", False), (False, True), (0, True),
     ("false", True), (2, True), (None, True), ([True], True)],
)  # fmt: skip
def test_a_switch_is_compared_as_what_it_says(value, is_told):
    assert ("freenoise of node 355" in told(workflow(n355_freenoise=value))) is is_told


@pytest.mark.parametrize("link", [["106", 0], [106, 0], ["106", "0"], ["106", 0.0]])
def test_a_link_may_be_written_with_numbers_or_strings(link):
    assert read_workflow(workflow(n107_image=link, **MEDIA)).image == "ref.png"


@pytest.mark.parametrize(
    "value",
    [["a", "b", "c"], ["106"], [], ["nowhere", 0], [416, 672], ["106", "x"], [["106", 0]],
     ["106", None], [None, 0], ["106", True], {"a": ["106", 0]}],
)  # fmt: skip
def test_a_list_that_is_no_link_is_a_value(value):
    beside = workflow(n137_tags=value)
    assert told(beside) == ""
    assert "tags of node 348 (WanVideoSamplerv2) is left out" in told(workflow(n348_tags=value))


def test_the_body_that_comfyuis_own_server_takes_is_that_workflow():
    given = {"prompt": workflow(**MEDIA), "client_id": "a", "extra_data": {}}
    assert job(workflow=given) == job(workflow=workflow(**MEDIA))


def test_wires_end_at_the_node_that_feeds_them():
    nodes = {
        "900": ("SetNode", {"IMAGE": ["106", 0], "Constant": "picture"}),
        "901": ("GetNode", {"Constant": "picture"}),
        "902": ("Reroute", {"anything": ["901", 0]}),
        "903": ("SetNode", {"IMAGE": ["131", 0], "Constant": "dance"}),
    }
    assert told(workflow(nodes=nodes, n107_image=["902", 0])) == ""
    nodes["904"] = nodes["900"]  # two of one name
    given = workflow(nodes=nodes, n107_image=["902", 0])
    assert "There is no LoadImage behind the input image" in refused(workflow=given)


@pytest.mark.parametrize(
    "nodes",
    [
        {"900": ("Reroute", {"": ["901", 0]}), "901": ("Reroute", {"": ["900", 0]})},
        {"900": ("Reroute", {"": ["900", 0]})},
        {"900": ("GetNode", {"a": "x"}), "901": ("SetNode", {"a": "x", "b": ["900", 0]})},
        {"900": ("PrimitiveString", {"value": ["900", 0]})},
        {str(900 + n): ("Reroute", {"": [str(901 + n), 0]}) for n in range(60)},
    ],
)
def test_wires_and_constants_in_a_circle_are_refused(nodes):
    nodes = {**nodes, "960": ("StringConstant", {"string": "a"})}
    given = workflow(nodes=nodes, n368_positive_prompt=["900", 0])
    assert "in a circle through node 9" in refused(workflow=given)


def test_nodes_are_alike_all_the_way_or_different():
    nodes = {
        f"{copy}{n}": {"class_type": "A", "inputs": {"a": [f"{copy}{n + 1}", 0], "b": n}}
        for copy in "xyz" for n in range(100)
    }  # fmt: skip
    for copy in "xyz":
        nodes[f"{copy}99"]["inputs"] = {"file": "other" if copy == "z" else "same"}
    graph = read_graph(nodes)
    x, y, z = (Link(graph.nodes[f"{copy}0"], 0) for copy in "xyz")
    assert graph.is_same(x, y)
    assert not graph.is_same(x, z)
    assert not graph.is_same(x, Link(y.node, 1))


class Counted(dict):
    """Nodes that count how often they are looked up: the work of a walk."""

    looked_up = 0

    def get(self, key, default=None):
        Counted.looked_up += 1
        return super().get(key, default)


MESHES = {
    "unknown": lambda n: ("U", {f"i{k}": [f"u{(7 * n + 13 * k) % 45}", 0] for k in range(98)}),
    "adding": lambda n: (
        "WanVideoSetLoRAs",
        {"model": [f"u{n + 1}" if n < 44 else "92", 0], **{f"i{k}": ["u0", 0] for k in range(98)}},
    ),
    "computing": lambda n: (
        "SimpleCalculatorKJ",
        {"expression": "a + b + c + d", **{c: [f"u{(3 * n + i) % 45}", 0] for i, c in
                                           enumerate("abcd")}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("mesh", MESHES)
def test_a_graph_in_which_all_is_linked_to_all_is_walked_in_bounded_work(mesh):
    changes = {
        "unknown": {"n327_image_1": ["u0", 0], "n139_audio": ["u0", 0], "n362_dw_poses": ["u0", 0]},
        "adding": {"n80_model": ["u0", 0]},
        "computing": {"n131_width": ["u0", 0]},
    }[mesh]
    nodes = {f"u{n}": MESHES[mesh](n) for n in range(45)}
    read = read_graph(workflow(nodes=nodes, **changes))
    Counted.looked_up = 0
    graph = Graph(Counted(read.nodes), read.wires)
    parts = find_parts(graph)
    differences(graph, parts.known(graph))
    if mesh == "computing":
        with pytest.raises(BadRequest, match="goes through too many nodes"):
            side(graph, parts["dance"], "width")
    assert 0 < Counted.looked_up < 100_000


def test_a_deep_value_is_never_compared():
    deep = []
    for _ in range(900):
        deep = [deep]
    assert "crf of node 139 (VHS_VideoCombine) is a list" in told(workflow(n139_crf=deep))
    other = inputs_of("106", tags=deep)
    nodes = {"900": ("LoadImage", other), "901": ("ImageResizeKJv2", inputs_of("107"))}
    nodes["901"][1]["image"] = ["900", 0]
    assert "image_1 of node 327" in told(
        workflow(nodes=nodes, n327_image_1=["901", 0], n106_tags=deep)
    )
