"""ComfyUI workflows as jobs: those in use, by links and not by number, and what is told of them."""

import copy
import json

import pytest

from engine.config import Defaults
from engine.errors import BadRequest
from engine.jobs.job import Given
from engine.jobs.parse import parse_job
from engine.jobs.workflow import read_workflow
from engine.recipes import NEGATIVE_PROMPT, RECIPES
from tests.support.job_bodies import DANCE, PICTURE, job, refused, settings_of
from tests.support.workflows import workflow

WEIGHTS = "Weights are those of this endpoint, not what the workflow names: "


def renumbered(given):
    """Writes a workflow under other ids and in another order."""
    ids = {old: str(1000 + 7 * n) for n, old in enumerate(reversed(list(given)))}

    def moved(value):
        return [ids[value[0]], value[1]] if isinstance(value, list) else value

    return {
        ids[old]: {**node, "inputs": {k: moved(v) for k, v in node["inputs"].items()}}
        for old, node in reversed(given.items())
    }


def stored(golden):
    return {path.name: json.loads(path.read_text("utf-8"))
            for path in sorted((golden / "workflows").glob("*.api.json"))}  # fmt: skip


def settings(name):
    """Size, rate, frames, window, overlap, fit of a stored workflow.

    Source: docs/reference/runpod.md A.9.
    """
    if "BPlan" in name:
        if "c72a07f" in name or "031d3a4" in name:
            return 416, 672, 24.0, 325 if "031d3a4" in name else 357, 80, 20, "resize"
        return 1280, 736, 24.0 if "c132b25" in name else 16.0, 357, 121, 48, "resize"
    if "Wan_Animate" in name:
        return 416, 672, 24.0, None, 10, 4, "crop"
    sides = (None, None) if "template" in name else (416, 672)
    return *sides, 24.0, 100 if "0127" in name else None, 81, 16, "crop"


@pytest.mark.golden
def test_all_thirteen_workflows_in_use_are_read_as_they_were_run(golden):
    read = {name: read_workflow(given) for name, given in stored(golden).items()}
    assert len(read) == 13
    for name, draft in read.items():
        recipe = draft.recipe
        got = (draft.width, draft.height, draft.fps, draft.frames, recipe.window_frames,
               recipe.overlap_frames, draft.fit)  # fmt: skip
        assert got == settings(name)
        assert (recipe.sampler, recipe.steps, recipe.cfg) == ("dpm++_sde", 6, 1.0)
        assert recipe.shift == pytest.approx(5)
        assert (recipe.pose_from, recipe.pose_until, recipe.half_render) == (0.0, 0.5, True)
        assert (draft.negative_prompt, draft.audio) == (NEGATIVE_PROMPT, True)
        assert not any("Ids of nodes" in warning for warning in draft.warnings)
        assert draft.warnings[-1].startswith(WEIGHTS + '"Wan21-14B-SCAIL-preview')


@pytest.mark.golden
def test_every_workflow_in_use_becomes_a_job(golden):
    for given in stored(golden).values():
        made = job(workflow=given, width=416, height=672)
        said = made.settings
        assert (said.width, said.recipe.sampler) == (416, "dpm++_sde")
        assert made.image.field == "image_url"


@pytest.mark.golden
def test_our_workflows_are_the_production_ones_with_their_media_left_open(golden):
    for ours, theirs in (("dance-scail-bplan", "BPlan__SCAIL_api__c72a07f"),
                         ("xicon-dance-scail", "vFinal__f39b7ba")):  # fmt: skip
        (original,) = [given for name, given in stored(golden).items() if theirs in name]
        original["106"]["inputs"]["image"] = "{{image}}"
        original["130"]["inputs"]["video"] = "{{video}}"
        assert workflow(ours) == original


def test_the_workflow_in_production_is_the_production_recipe():
    draft = read_workflow(workflow(n349_shift=5))
    assert draft.recipe == RECIPES["preview"]["production"]
    assert (draft.seed, draft.image, draft.video) == (779298828917358, None, None)


def test_ids_mean_nothing_but_programs_that_fill_them_in_are_warned():
    usual, moved = read_workflow(workflow()), read_workflow(renumbered(workflow()))
    for name in ("recipe", "prompt", "seed", "width", "height", "fps", "frames", "fit", "audio"):
        assert getattr(usual, name) == getattr(moved, name)
    ids = [said for said in moved.warnings if said.startswith("Ids of nodes")]
    assert len(ids) == 1
    assert "there is no 106 (LoadImage); there is no 130 (VHS_LoadVideo)" in ids[0]


def test_an_id_with_another_class_or_out_of_use_is_named():
    swapped = workflow()
    swapped["203"], swapped["204"] = swapped["204"], swapped["203"]
    assert "the INTConstant 203 is not" not in read_workflow(swapped).warnings[0]  # value alone
    relinked = workflow(n107_width=["204", 0], n107_height=["203", 0])
    assert (read_workflow(relinked).width, read_workflow(relinked).height) == (672, 416)
    assert (
        "the INTConstant 203 is not the one in use; the INTConstant 204 is not the one in use"
        in read_workflow(relinked).warnings[0]
    )
    other = workflow()
    other["106"], other["1106"] = {"class_type": "KSampler", "inputs": {}}, other["106"]
    other["107"]["inputs"]["image"] = ["1106", 0]
    assert "106 is a KSampler, not a LoadImage" in read_workflow(other).warnings[0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"n130_select_every_nth": 2},
         "select_every_nth of node 130 (VHS_LoadVideo) is 2, done as 1"),
        ({"n130_skip_first_frames": 9}, "skip_first_frames of node 130 (VHS_LoadVideo) is 9"),
        ({"n130_force_rate": 0}, "force_rate of node 130 (VHS_LoadVideo) is 0, done as 24.0"),
        ({"n139_crf": 10}, "crf of node 139 (VHS_VideoCombine) is 10, done as 19"),
        ({"n139_pingpong": True}, "pingpong of node 139 (VHS_VideoCombine) is true, done as false"),
        ({"n355_freenoise": False}, "freenoise of node 355"),
        ({"n355_fuse_method": "pyramid"}, "fuse"),
        ({"n349_end_step": 3}, "end_step of node 349"), ({"n354_riflex_freq_index": 6}, "riflex"),
        ({"n350_strength": 0.5}, "strength of node 350"), ({"n362_draw_face": False}, "draw_face"),
        ({"n107_keep_proportion": "pad"}, 'keep_proportion of node 107 (ImageResizeKJv2) is "pad"'),
        ({"n107_divisible_by": 16}, "divisible_by of node 107"),
        ({"n362_width": 100}, "the size of"),
        ({"n371_expression": "a / 4"}, "the size of node 362 (RenderNLFPoses), done as half"),
        ({"n348_samples": ["28", 0]}, "samples of node 348 (WanVideoSamplerv2) is left out"),
        ({"n348_brand_new": 3}, "brand_new of node 348 (WanVideoSamplerv2) is left out"),
        ({"n22_attention_mode": "flash_attn_3"}, "Attention flash_attn_3 is not built in; sdpa is"),
    ],
)  # fmt: skip
def test_what_is_done_another_way_is_named(change, said):
    assert said not in " ".join(job(workflow=workflow()).warnings)
    assert said in " ".join(job(workflow=workflow(**change)).warnings)


def test_a_node_that_changes_the_clip_and_is_not_known_is_named():
    given = workflow(n323_image=["400", 0])
    given["400"] = {"class_type": "ColorMatch", "inputs": {"image": ["28", 0], "strength": 1}}
    assert "node 400 (ColorMatch) is left out" in " ".join(read_workflow(given).warnings)
    given["500"] = {"class_type": "PreviewImage", "inputs": {"images": ["28", 0]}}
    assert "PreviewImage" not in " ".join(read_workflow(given).warnings)


def test_many_differences_are_counted_and_not_all_listed():
    given = workflow(**{f"n348_x{n}": n for n in range(80)})
    (said,) = [s for s in read_workflow(given).warnings if s.startswith("Settings")]
    assert said.endswith("; 72 more.")
    assert len(said) < 1500


def test_placeholders_are_left_to_the_request_and_the_endpoint():
    given = workflow(n203_value="{{width}}", n348_seed="{{ seed }}", n349_steps="{{steps}}",
                     n368_positive_prompt="{{prompt}}", n238_value="{{cfg}}",
                     n139_frame_rate="{{fps}}", n355_context_frames="{{c}}")  # fmt: skip
    draft = read_workflow(given)
    assert (draft.width, draft.height, draft.seed, draft.prompt, draft.fps) == (
        None, 672, None, None, None,
    )  # fmt: skip
    assert draft.recipe.steps == 6
    assert "Left open by the workflow: image of node 106 (LoadImage);" in draft.warnings[0]
    made = settings_of(workflow=given, width=320, prompt="p")
    assert (made.width, made.height, made.prompt, made.fps) == (320, 672, "p", 24.0)
    assert (made.seed, made.recipe.window_frames) == (779298828917358, 80)


def test_numbers_may_be_strings_and_stand_where_constants_do():
    draft = read_workflow(
        workflow(n107_width="640", n107_height=384, n348_cfg=2, n362_width=320, n362_height=192)
    )
    assert (draft.width, draft.height, draft.recipe.cfg) == (640, 384, 2.0)
    assert draft.recipe.half_render is True


def test_skeletons_drawn_at_full_size_are_so_here():
    full = workflow(n362_width=["203", 0], n362_height=["204", 0])
    assert read_workflow(full).recipe.half_render is False


def test_size_frames_and_fit_follow_the_links():
    exact = workflow(n99_width=512, n99_height=896, n99_num_frames=81)
    draft = read_workflow(exact)
    assert (draft.width, draft.height, draft.frames) == (512, 896, 81)
    assert read_workflow(workflow(n130_frame_load_cap=0)).frames is None
    assert read_workflow(workflow("xicon-dance-scail")).fit == "crop"


def test_without_windows_the_clip_is_denoised_at_once():
    given = workflow()
    del given["354"]["inputs"]["context_options"]
    assert read_workflow(given).recipe.window_frames == 2000


def test_without_a_link_to_sound_the_clip_is_silent():
    given = workflow()
    del given["139"]["inputs"]["audio"]
    assert settings_of(workflow=given).audio is False
    assert settings_of(workflow=given, audio=True).audio is True


def test_the_two_embeds_may_come_in_either_order():
    given = workflow(n348_image_embeds=["350", 0], n350_embeds=["324", 0], n324_embeds=["99", 0])
    assert read_workflow(given).recipe == read_workflow(workflow()).recipe


def test_fields_beat_the_workflow():
    made = settings_of(workflow=workflow(), steps=4, context_overlap=16, seed=3, fps=16, frames=81,
                       fit="crop", attention_mode="sageattn")  # fmt: skip
    assert (made.recipe.steps, made.recipe.overlap_frames, made.recipe.window_frames) == (4, 16, 80)
    assert (made.seed, made.fps, made.frames, made.fit) == (3, 16.0, 81, "crop")
    assert settings_of(workflow=workflow(), frame_load_cap=0).frames is None
    sdpa = workflow(n22_attention_mode="sdpa")
    assert job(workflow=sdpa).attention == "sdpa"
    assert job(workflow=sdpa, attention_mode="sageattn").attention is None


def test_media_of_a_workflow_are_names_in_an_input_folder_or_the_endpoints_own():
    given = workflow(n106_image="person.jpg", n130_video="other.mp4")
    made = parse_job({"input": {"workflow": given}}, DANCE)
    assert made.image == Given("workflow.image", "path", "person.jpg")
    assert made.motion == Given("workflow.video", "path", "other.mp4")
    assert job(workflow=given, video_url="https://a/b").motion.field == "video_url"
    for name in ("dance.mp4", "/ComfyUI/input/dance.mp4"):
        assert job(workflow=workflow(n130_video=name)).motion is None
    assert job(Defaults(), workflow=workflow(n130_video="dance.mp4")).motion is not None


def test_a_workflow_may_be_json_or_one_of_ours_by_name():
    made = job(workflow=workflow())
    assert made == job(workflow=json.dumps(workflow())) == job(workflow="dance-scail-bplan")
    assert made.image == Given("image_url", "url", PICTURE)


def broken(change):
    given = workflow()
    change(given)
    return given


def without(node, key=None):
    def change(given):
        if key is None:
            del given[node]
        else:
            del given[node]["inputs"][key]

    return change


def chosen(node, key, value):
    def change(given):
        given[node]["inputs"][key] = value

    return change


def doubled(given):
    given["9348"] = copy.deepcopy(given["348"])
    given["28"]["inputs"]["other"] = ["9348", 0]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (without("348"), 'The input samples of node 28 (WanVideoDecode) is no link to a node'),
        (without("139"), "The workflow saves 0 videos of a WanVideoDecode"),
        (without("349", "steps"), "The input steps of node 349 (WanVideoSchedulerv2) is missing."),
        (without("348", "text_embeds"),
         "comes from nothing; a WanVideoTextEncodeCached or WanVideoTextEncode is expected."),
        (without("80", "model"),
         "There is no WanVideoModelLoader behind the input model of node 348"),
        (without("350", "ref_image"), "a ImageResizeKJv2 is expected."),
        (doubled, "2 nodes WanVideoS"),
        (chosen("348", "text_embeds", ["349", 0]),
         "comes from node 349 (WanVideoSchedulerv2); a Wan"),
        (chosen("348", "cfg", ["349", 0]), "a value or a constant is expected."),
        (chosen("203", "value",
         "wide"), 'The input value of node 203 (INTConstant) is "wide"; a whole'),
        (chosen("203", "value", float("nan")), "is nan; a whole number is expected."),
        (chosen("203", "value", 10**400), "is a huge number; a whole"),
        (chosen("203", "value", {}), "an"),
        (chosen("203", "value", [["a"]]), 'The input value of node 203'),
        (chosen("203", "value", None), "is nothing; a whole number"),
        (chosen("348",
         "seed", [1, 2]), 'The input seed of node 348 (WanVideoSamplerv2) is no link'),
        (chosen("348", "seed", ["x" * 99, 0]), "is no link to a node of the workflow."),
        (chosen("80", "model", ["80", 0]),
         "The links of the workflow go in a circle through node 80"),
        (chosen("368", "positive_prompt", 5), "is 5; text is expected."),
        (lambda given: given.update({"7": 5}), 'The workflow\'s node 7 is no node;'),
        (lambda given: given.update({"7": {"class_type": []}}),
         "class_type and inputs are expected."),
        (lambda given: given.update({str(n): given["39"] for n in range(2000)}), "at most 1000"),
        (lambda given: given["39"]["inputs"].update({str(n): n for n in range(99)}), "106 inputs"),
        (lambda given: given.update({"nodes": []}), "export it in the API format."),
        (lambda given: given.clear(), "saves 0 videos"),
        (lambda given: given.update({f"s{n}": given["139"] for n in range(30)}), "saves 32 videos"),
    ],
)  # fmt: skip
def test_what_is_no_such_workflow_is_refused_in_a_sentence(change, sentence):
    assert sentence in refused(workflow=broken(change))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (chosen("349", "scheduler", "lcm"), "There is no sampler called 'lcm'. Choose one of:"),
        (chosen("349", "scheduler", "x" * 50), "a short word is expected."),
        (chosen("324", "end_percent", 1.5), "The end of the skeleton is 1.5; it must be 0 to 1."),
        (chosen("324", "strength", -1), "The strength of the skeleton is -1.0"),
        (chosen("22", "attention_mode", "magic"), "There is no attention mode 'magic'."),
        (chosen("355", "context_overlap", 200), "The overlap of windows is 200"),
        (chosen("203", "value", 4096), "The width is 4096; it must be 64 to 1280."),
        (chosen("348", "seed", -7), "The seed is -7"),
        (chosen("139", "frame_rate", 0), "The fps is 0"),
    ],
)  # fmt: skip
def test_a_workflow_that_no_clip_can_be_made_with_is_refused_in_a_sentence(change, sentence):
    assert sentence in refused(workflow=broken(change))


def test_a_workflow_is_an_object():
    for given in (None, [], "a", 5, True, [[[]]]):
        with pytest.raises(BadRequest, match="an object of nodes is expected"):
            read_workflow(given)
