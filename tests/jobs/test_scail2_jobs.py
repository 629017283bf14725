"""Jobs for SCAIL-2: masks, further pictures, modes, recipes, and fields of the other model."""

import dataclasses
import json

import pytest

from engine.config import KINDS, Defaults
from engine.errors import BadRequest, Unavailable
from engine.flow import Settings
from engine.jobs.job import Given, GivenReference
from engine.jobs.parse import parse_job
from engine.jobs.served import Served
from engine.jobs.usual import usual_sizes
from engine.recipes import NEEDED_LORAS, RECIPES, check_settings, recipe_of, same_row
from tests.support.core_workflows import LONG, core
from tests.support.job_bodies import (
    DANCE,
    MASK,
    PICTURE,
    SCAIL2,
    job,
    refused,
    scail2_job,
    scail2_refused,
)

OLD_BODY = {"prompt": "she dances", "width": 416, "height": 672, "steps": 6, "cfg": 1.0, "fps": 24}


def url(field, value):
    return Given(field, "url", value)


def test_a_request_that_says_nothing_is_turbo_as_the_picture_and_the_video_are():
    made = scail2_job()
    want = Settings(
        RECIPES["scail2"]["turbo"], prompt="the human starts to dance", seed=779298828917358,
        mode="animation", segments="even",
    )  # fmt: skip
    assert (made.settings, made.warnings) == (want, ())
    assert (made.settings.width, made.settings.fps, made.settings.negative_prompt) == (
        None,
        None,
        "",
    )
    assert usual_sizes(Defaults(), SCAIL2) == [(896, 512), (512, 896)]


def test_a_body_for_the_old_endpoint_is_a_job_for_scail2_too():
    made = scail2_job(**OLD_BODY)
    assert made.settings.recipe == RECIPES["scail2"]["turbo"]
    assert (made.settings.width, made.settings.height, made.settings.fps) == (416, 672, 24.0)
    assert made.warnings == ()


def test_the_recipes_of_a_kind_are_its_own():
    assert scail2_job(recipe="official").settings.recipe.steps == 40
    assert scail2_job(recipe="fast8").settings.recipe.shift == 1.0
    named = scail2_job(recipe="production")
    assert named.settings.recipe == RECIPES["scail2"]["turbo"]
    assert named.warnings == ("The recipe production is called turbo for SCAIL-2.",)
    usual = scail2_job(SCAIL2, Defaults(recipe="production", video=DANCE.video))
    assert (usual.settings, usual.warnings) == (named.settings, ())  # told once, at the start
    there = "There is no recipe turbo for SCAIL-Preview, only production and official."
    assert refused(recipe="turbo") == there
    assert "no recipe fast8 for SCAIL-Preview" in refused(recipe="fast8")
    endpoint = Defaults(recipe="turbo", video=DANCE.video)
    assert refused(endpoint) == there
    assert recipe_of("preview", None) == (RECIPES["preview"]["production"], None)


def test_the_loras_of_a_recipe_are_data():
    told = {
        name: [(lora.role, lora.rank, lora.strength) for lora in needed]
        for name, needed in NEEDED_LORAS["scail2"].items()
    }
    assert told == {
        "turbo": [("distill", 64, 0.8), ("dpo", None, 1.0)],
        "official": [],
        "fast8": [("distill", 128, 1.0)],
    }


def test_a_recipe_that_the_package_was_not_built_for_is_refused_with_what_to_do():
    plain = dataclasses.replace(SCAIL2, refused={"turbo": "Build with --lora."})
    for fields in ({}, {"recipe": "turbo"}, {"recipe": "production"}):
        with pytest.raises(Unavailable, match=r"^Build with --lora\.$"):
            scail2_job(plain, **fields)
    assert scail2_job(plain, recipe="official").settings.recipe.cfg == 5.0


def test_a_workflow_with_the_figures_of_a_recipe_asks_for_its_weights():
    plain = dataclasses.replace(SCAIL2, refused={"turbo": "Build with --lora."})
    for given in ("scail2-turbo", core(), core(LONG, n13_file="m.mp4")):
        with pytest.raises(Unavailable, match=r"^Build with --lora\.$"):
            scail2_job(plain, workflow=given, **MASK)
    for given in ("scail2-full", core(n104_steps=8), core(n104_model=["35", 0])):
        assert scail2_job(plain, workflow=given).settings.recipe.sampler == "euler_simple"
    one = [same_row(row, "scail2") for row in RECIPES["scail2"].values()]
    assert one == [*RECIPES["scail2"]]


@pytest.mark.parametrize("way", ["url", "path", "base64"])
def test_masks_are_named_as_other_media_are(way):
    made = scail2_job(**{f"mask_{way}": "m", f"reference_mask_{way}": "r"})
    assert made.cast.mask == Given(f"mask_{way}", way, "m")
    assert made.cast.reference_mask == Given(f"reference_mask_{way}", way, "r")


def test_of_several_fields_for_a_mask_the_first_counts_and_the_others_are_told():
    made = scail2_job(mask_base64="AAAA", mask_path="m.mp4", reference_mask_path="a")
    assert made.cast.mask.field == "mask_path"
    assert made.warnings == ("mask_base64: ignored for mask_path.",)


def test_further_pictures_are_a_list_of_objects_each_with_its_mask():
    made = scail2_job(
        references=[{"url": "https://a/1", "mask_path": "1.png"}, {"base64": "AAAA"}, "https://a/3"]
    )
    assert made.cast.references == (
        GivenReference(
            url("references.0.url", "https://a/1"),
            Given("references.0.mask_path", "path", "1.png"),
        ),
        GivenReference(Given("references.1.base64", "base64", "AAAA")),
        GivenReference(url("references.2.url", "https://a/3")),
    )


def test_plain_further_pictures_are_texts_behind_the_others():
    made = scail2_job(
        reference_path=["x.png", "y.png"], reference_url="https://a/b", references=["https://a/0"]
    )
    assert [one.image.field for one in made.cast.references] == [
        "references.0.url", "reference_url.0", "reference_path.0", "reference_path.1"
    ]  # fmt: skip


def test_a_list_may_be_written_as_json_and_an_empty_one_is_as_good_as_nothing():
    given = [{"url": "https://a/1"}]
    assert scail2_job(references=json.dumps(given)) == scail2_job(references=given)
    for nothing in (None, "", [], "[]"):
        assert scail2_job(references=nothing, reference_url=nothing) == scail2_job()
    assert job(references=[], reference_path=[]) == job()


def test_what_is_not_known_of_a_further_picture_is_told():
    made = scail2_job(references=[{"url": "https://a", "weight": 2}])
    assert made.warnings == ("Not known here and ignored: references.0.weight.",)


def test_both_modes_are_there_also_under_the_names_of_wan_animate():
    assert scail2_job(mode="replacement", **MASK).settings.mode == "replacement"
    assert scail2_job(mode="replace", **MASK).settings.mode == "replacement"
    assert scail2_job(mode="animate").settings.mode == "animation"
    assert job(mode="animate") == job(mode="animation") == job()  # what Preview does


def test_replacement_is_told_what_it_lacks():
    said = scail2_refused(mode="replacement")
    assert said == (
        "The mode replacement needs a driving mask, which says who in the video is replaced; send "
        "mask_url, mask_path or mask_base64."
    )
    said = scail2_refused(mode="replacement", joints_path="a.npz", **MASK)
    assert "needs a video of the person who is replaced" in said
    assert "which has no scene" in scail2_refused(mode="replace", pose_video_path="a.mp4", **MASK)


def test_weights_that_were_made_to_relight_serve_replacement_only():
    relit = Served(KINDS["scail2"], ("replacement",))
    assert parse_job(
        {"input": {"image_url": PICTURE, **MASK}}, DANCE, relit
    ).settings.mode == "replacement"  # fmt: skip
    assert scail2_refused(relit, mode="animation", **MASK) == (
        "The mode animation is not there: the weights of this SCAIL-2 were made for replacement "
        "only."
    )
    assert "needs a driving mask" in scail2_refused(relit)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"mask_url": "https://a/b"}, "mask_url"), ({"mask_base64": "AAAA"}, "mask_base64"),
        ({"reference_mask_path": "a"}, "reference_mask_path"),
        ({"references": ["https://a"]}, "references"), ({"reference_url": "a"}, "reference_url"),
        ({"segments": "even"}, "segments"), ({"drift": "none"}, "drift"),
    ],
)  # fmt: skip
def test_fields_of_scail2_are_refused_by_a_worker_of_preview(fields, name):
    want = (
        f"{name} is for SCAIL-2; this worker serves SCAIL-Preview. "
        "Leave it out, or take a package of SCAIL-2."
    )
    assert refused(**fields) == refused(**fields, action="validate") == want


def test_fields_of_preview_are_refused_by_a_worker_of_scail2():
    want = (
        "align is for SCAIL-Preview; this worker serves SCAIL-2. "
        "Leave it out, or take a package of SCAIL-Preview."
    )
    assert scail2_refused(align="exact") == want
    assert refused(mode="replacement") == (
        "The mode replacement is for SCAIL-2; this worker serves SCAIL-Preview."
    )


def test_health_is_told_whatever_else_a_body_says():
    asked = {"input": {"action": "health", "mask_url": "https://a", "references": ["a"] * 9}}
    assert parse_job(asked, Defaults(recipe="turbo")).action == "health"


def test_segments_are_cut_by_name_and_windows_are_for_windows():
    assert scail2_job(segments="cover").settings.segments == "cover"
    windows = scail2_job(segments="windows", context_frames=41, context_overlap=8).settings.recipe
    assert (windows.window_frames, windows.overlap_frames) == (41, 8)
    made = scail2_job(context_frames=80, context_overlap=20)
    assert made.settings.recipe == RECIPES["scail2"]["turbo"]
    assert made.warnings == (
        "context_frames and context_overlap: ignored. Long clips are made in segments here; "
        '"segments": "windows" makes them in windows.',
    )


def test_colours_go_back_to_the_first_segment_unless_a_request_says_otherwise():
    assert scail2_job().settings.drift == "first"
    assert scail2_job(drift="previous").settings.drift == "previous"
    assert scail2_job(drift="none").warnings == ()


def test_a_mask_tells_six_persons_apart_and_no_more():
    six = scail2_job(persons=6)
    assert six.settings.persons == 6
    assert six.warnings == ("persons is 6, which changes nothing: masks say who is who.",)
    assert job(persons=2).warnings == ()
    assert "The persons is 7; it must be 1 to 6." in scail2_refused(persons=7)
    check_settings(Settings(RECIPES["preview"]["official"], persons=8))
    with pytest.raises(BadRequest, match="1 to 6"):
        check_settings(Settings(RECIPES["scail2"]["official"], persons=8), "scail2")


DEEP = json.loads("[" * 900 + "]" * 900)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"mode": "swap"}, "mode is \"swap\"; 'animation' or 'replacement' is expected."),
        ({"mode": 3}, "mode is 3; a short word"), ({"mode": ["animation"]}, "mode is a list;"),
        ({"mode": {"a": 1}}, "mode is an object;"), ({"mode": True}, "mode is true;"),
        ({"segments": "long"}, "'even', 'cover', 'official', 'sat' or 'windows' is expected."),
        ({"drift": "last"}, "drift is \"last\"; 'first', 'previous' or 'none' is expected."),
        ({"segments": 5}, "segments is 5;"), ({"segments": [81]}, "segments is a list;"),
        ({"mask_url": 5}, "mask_url is 5; text is expected."),
        ({"mask_url": ["https://a"]}, "mask_url is a list; text"),
        ({"mask_path": {}}, "mask_path is an object; text"), ({"mask_base64": DEEP}, "is a list;"),
        ({"mask_url": "s3://bucket/mask"}, "mask_url is an address of a store"),
        ({"mask_url": "A" * 99}, "looks like base64; send that in _base64."),
        ({"mask_path": "m.mp4 [output]"}, "names a file in ComfyUI's output folder"),
        ({"reference_mask_url": False}, "reference_mask_url is false; text"),
        ({"reference_mask_base64": 1.5}, "reference_mask_base64 is 1.5; text"),
        ({"references": 5}, "references is 5; a list"),
        ({"references": {"url": "https://a"}}, "references is an object; a list"),
        ({"references": True}, "references is true; a list"),
        ({"references": [5]}, "references.0 is 5; an object is expected."),
        ({"references": [None]}, "references.0 is nothing; an object is expected."),
        ({"references": [[]]}, "references.0 is a list; an object is expected."),
        ({"references": DEEP}, "references.0 is a list; an object"),
        ({"references": [{}]}, "references.0 names no picture; send its url, path or base64."),
        ({"references": [{"mask_url": "https://a"}]}, "references.0 names no picture;"),
        ({"references": [{"url": None, "path": ""}]}, "references.0 names no picture;"),
        ({"references": [""]}, "references.0 names no picture;"),
        ({"references": [{"url": 7}]}, "references.0.url is 7; text is expected."),
        ({"references": ["https://a", {"path": DEEP}]}, "references.1.path is a list; text"),
        ({"references": [{"url": "https://a", "mask_url": [1]}]}, "references.0.mask_url is a"),
        ({"references": ["https://a"] * 7}, "7 further pictures are given; at most 4 are taken"),
        ({"references": ["https://a"] * 5}, "5 further pictures"),
        ({"references": ["https://a"] * 3, "reference_path": ["a", "b"]}, "5 further pictures"),
        ({"references": ["a"] * 101}, "references is a list; a list of at most 100"),
        ({"references": "[1"}, "The list is a string, but no JSON object."),
        ({"references": "[" * 10**5}, "nested too deep"),
        ({"reference_url": 5}, "reference_url is 5; a list"),
        ({"reference_url": [5]}, "reference_url is a list; text is expected."),
        ({"reference_path": [None]}, "reference_path is a list; text"),
        ({"reference_base64": {"a": 1}}, "reference_base64 is an object; a list"),
        ({"reference_url": ["blob:x"]}, "reference_url.0 is an address that one program knows"),
        ({"persons": 0}, "The persons is 0; it must be 1 to 6."),
    ],
    ids=lambda value: repr(value)[:50] if isinstance(value, dict) else "",
)  # fmt: skip
def test_hostile_values_of_the_new_fields_end_in_a_sentence(fields, sentence):
    assert sentence in scail2_refused(**fields)
