"""Jobs as clients write them: every form in use, precedence, and what is refused."""

import dataclasses
import json
import re
import secrets
from pathlib import Path
from typing import get_args

import pytest

from engine.config import KINDS, LIMITS, Defaults
from engine.errors import BadRequest
from engine.flow import Recipe, RecipeName, Settings
from engine.jobs.body import Fields
from engine.jobs.job import Bucket, Given
from engine.jobs.parse import parse_job
from engine.jobs.usual import SAID_NOWHERE
from engine.recipes import NEEDED_LORAS, NEGATIVE_PROMPT, RECIPES, check_settings
from tests.support.job_bodies import DANCE, PICTURE, job, refusal, refused, settings_of

ROOT = Path(__file__).resolve().parents[2]


def stored(golden):
    """Yields the names of stored requests with their bodies; the Hub's own files hold none."""
    for path in sorted((golden / "workflows" / "requests").glob("*.req.json")):
        found = json.loads(path.read_text("utf-8"))
        yield path.name, [found] if "input" in found else found.get("tests", [])


@pytest.mark.golden
def test_every_stored_request_means_what_its_endpoint_made_of_it(golden):
    read = {name: [parse_job(b, DANCE) for b in bodies] for name, bodies in stored(golden)
            if "4392464" not in name}  # fmt: skip
    assert sum(map(len, read.values())) == 11
    for jobs in read.values():
        for made in jobs:
            recipe = made.settings.recipe
            assert (recipe.sampler, recipe.cfg, made.kind) == ("dpm++_sde", 1.0, "video")
            assert (made.settings.audio, made.delivery, made.attention) == (True, "base64", None)
    (n8n,) = read["Dance-SCAIL-BPlan__n8n_payload__8865fd1.req.json"]
    said = n8n.settings
    assert (said.width, said.height, said.fps, said.seed) == (416, 672, 24.0, 779298828917358)
    assert (n8n.image, n8n.motion, said.frames) == (Given("image_url", "url", PICTURE), None, None)
    assert (said.recipe, n8n.warnings) == (RECIPES["preview"]["production"], ())
    (nested,) = read["xicon_serverless_runpod_0127__nested__922e4d9.req.json"]
    assert nested.image == Given("images.reference_image", "url", "https://example.com/ref.jpg")
    assert nested.motion == Given("videos.dance_video", "url", "https://example.com/dance.mp4")
    (full,) = read["Dance-SCAIL-BPlan__test_endpoint_full__35f552c.req.json"]
    said = full.settings
    assert (said.width, said.height, said.fps, said.seed) == (1280, 736, 16.0, 779298828917358)
    (local,) = read["Wan_Animate_Runpod_hub__test_local__0617c7c.req.json"]
    assert local.image == Given("image_path", "path", "/ComfyUI/input/test_image.jpg")
    said = local.settings
    assert (said.negative_prompt, said.seed) == ("static, blurry, low quality", 12345)


@pytest.mark.golden
def test_the_stored_body_without_a_picture_is_told_so(golden):
    (body,) = dict(stored(golden))["XiCON-Dance-SCAIL-Serverless__tests__4392464.req.json"]
    assert refusal(body) == "No picture is given; send image_url, image_path or image_base64."


@pytest.mark.golden
def test_the_default_negative_prompt_is_the_endpoints_to_the_letter(golden):
    path = golden / "workflows" / "Dance-SCAIL-BPlan__SCAIL_api__c72a07f.api.json"
    assert (
        json.loads(path.read_text("utf-8"))["368"]["inputs"]["negative_prompt"] == NEGATIVE_PROMPT
    )


def test_a_request_as_a_json_string_is_the_same_request():
    body = {"image_url": PICTURE, "width": 416, "seed": 2**64 - 1, "prompt": "a\nb"}
    assert parse_job({"input": json.dumps(body)}, DANCE) == parse_job({"input": body}, DANCE)


def test_numbers_written_as_strings_are_numbers_and_seeds_keep_all_their_bits():
    written = settings_of(
        width="416", height=" 672 ", fps="23.976", steps="8", cfg="1e0", seed=str(2**64 - 1),
        audio="false", context_frames="81", context_overlap=16.0,
    )  # fmt: skip
    assert (written.width, written.height, written.fps) == (416, 672, 23.976)
    assert (written.recipe.steps, written.recipe.cfg, written.seed) == (8, 1.0, 2**64 - 1)
    assert (written.recipe.window_frames, written.recipe.overlap_frames) == (81, 16)
    assert written.audio is False


def test_null_and_the_empty_string_are_as_good_as_nothing():
    empty = {"width": "", "seed": None, "fps": " ", "image_path": "", "videos": {"dance_video": ""},
             "recipe": None, "images": None, "workflow": "", "fit": "", "prompt": None}  # fmt: skip
    assert job(**empty) == job()


def test_a_prompt_may_be_empty():
    assert settings_of(prompt="", negative_prompt="").prompt == ""
    assert settings_of(negative_prompt="").negative_prompt == ""
    assert settings_of().prompt == "the human starts to dance"


def test_an_address_comes_before_a_path_before_base64_before_what_is_nested():
    every = {"image_url": "https://a/b", "image_path": "p.png", "image_base64": "AAAA",
             "images": {"reference_image": "https://c/d"}}  # fmt: skip
    order = ["image_url", "image_path", "image_base64", "images.reference_image"]
    for first in range(len(order)):
        names = list(every)[first:]
        made = parse_job({"input": {name: every[name] for name in names}}, DANCE)
        assert made.image.field == order[first]
        ignored = ", ".join(order[first + 1 :])
        assert made.warnings == ((f"{ignored}: ignored for {order[first]}.",) if ignored else ())


@pytest.mark.parametrize(
    ("field", "kind", "way"),
    [
        (f"{name}_{way}", kind, way)
        for name, kind in (("video", "video"), ("pose_video", "pose"), ("joints", "joints"))
        for way in ("url", "path", "base64")
    ],
)
def test_a_motion_is_a_dance_a_skeleton_or_joints(field, kind, way):
    made = job(**{field: "value"})
    assert (made.motion, made.kind) == (Given(field, way, "value"), kind)


def test_two_kinds_of_motion_contradict_each_other():
    said = refused(video_url="https://a/b", joints_path="j.npz")
    assert said == "video_url and joints_path are both given; a clip has one motion."


def test_without_a_video_the_endpoint_uses_its_own_or_says_that_it_has_none():
    assert job().motion is None
    assert "No motion is given and this endpoint has none" in refused(Defaults())


def test_health_needs_no_media_and_a_dry_run_those_of_a_clip():
    healthy = parse_job({"input": {"action": "health"}}, Defaults())
    assert (healthy.action, healthy.image, healthy.warnings) == ("health", None, ())
    assert settings_of(action="validate", steps=8).recipe.steps == 8
    assert refusal({"input": {"action": "validate"}}).startswith("No picture is given")
    assert refused(Defaults(), action="validate").startswith("No motion is given")


def test_unknown_keys_are_ignored_and_told():
    made = job(points_store=[1], coordinates="x", **{"a" * 200: 1, "b\x00\u202e": 2})
    assert made.warnings == (
        f"Not known here and ignored: points_store, coordinates, {'a' * 37}..., b??.",
    )
    many = job(**{f"k{n}": n for n in range(5000)}).warnings[0]
    assert many.endswith("k9 and 4990 more.")


def test_limits_of_frames_under_their_three_names_are_lowest_first():
    assert settings_of(frame_load_cap=357, num_frames=325).frames == 325
    assert settings_of(frame_load_cap=0).frames is None
    assert settings_of(frame_load_cap=0, frames=81).frames == 81


def test_every_nth_frame_is_not_done_and_that_is_told():
    assert "select_every_nth is 2, done as 1" in job(select_every_nth=2).warnings[0]
    assert job(select_every_nth=1).warnings == ()


def test_a_recipe_is_chosen_by_the_request_or_the_endpoint_and_changed_by_fields():
    official = settings_of(recipe="official", steps=30, shift=3, sampler="unipc")
    want = Recipe(sampler="unipc", steps=30, cfg=4.0, shift=3.0)
    assert (official.recipe, official.negative_prompt) == (want, "")
    assert (official.width, official.fps) == (None, None)
    endpoint = Defaults(recipe="official", video=Path("d"))
    assert settings_of(endpoint).recipe == RECIPES["preview"]["official"]


@pytest.mark.parametrize(
    ("mode", "attention", "said"),
    [("sageattn", None, 0), ("int8fp8", "int8fp8", 0), ("xformers", "xformers", 0),
     ("flash_attn_2", "sdpa", 1), ("sageattn_3", None, 1)],
)  # fmt: skip
def test_attention_is_what_computes_the_same_here(mode, attention, said):
    made = job(attention_mode=mode)
    assert (made.attention, len(made.warnings)) == (attention, said)


def test_fit_is_the_requests_or_the_endpoints():
    assert (settings_of().fit, settings_of(fit="resize").fit) == ("crop", "resize")
    assert settings_of(Defaults(fit="resize", video=Path("d"))).fit == "resize"


def test_minus_one_is_a_seed_of_its_own_that_every_client_can_read():
    seeds = {settings_of(seed=-1).seed for _ in range(20)}
    assert len(seeds) == 20
    assert all(0 <= seed < 2**53 for seed in seeds)


def test_storage_beside_the_input_is_read_and_never_shown():
    secret = secrets.token_hex()
    config = {"endpointUrl": "https://s3", "accessId": secret, "accessSecret": secret}
    body = {"input": {"image_url": PICTURE, "output": "url"}, "s3Config": config}
    made = parse_job(body, DANCE)
    assert made.bucket == Bucket("https://s3", secret, secret)
    assert (made.delivery, secret in repr(made)) == ("url", False)
    named = parse_job(body | {"s3Config": config | {"bucketName": "clips"}}, DANCE)
    assert named.bucket.bucket_name == "clips"
    assert parse_job(body | {"s3Config": {}}, DANCE).bucket is None
    less = config | {"accessSecret": 7}, config | {"endpointUrl": " "}, {"accessId": secret}
    for wrong in (*less, config | {"bucketName": [secret]}, [secret], secret):
        assert secret not in refusal(body | {"s3Config": wrong})


def test_the_settings_of_a_job_are_what_its_fields_say():
    said = {
        "prompt": "p", "negative_prompt": "n", "seed": 5, "width": 416, "height": 672,
        "fit": "resize", "fps": 12.0, "frames": 33, "audio": False, "persons": 2,
        "align": "official",
    }  # fmt: skip
    assert settings_of(**said) == Settings(RECIPES["preview"]["production"], **said)


def test_every_setting_can_be_said_by_a_request():
    assert {field.name for field in dataclasses.fields(Settings)} <= {*Fields.model_fields}


def test_prompts_keep_line_breaks_and_letters_of_every_script():
    prompt = 'a "quoted"\n\tline \u8df3\u821e \U0001f469\u200d\U0001f9b0 {{name}}'
    assert settings_of(prompt=prompt).prompt == prompt


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"pose_from": -0.1}, "The start of the skeleton is -0.1; it must be 0 to 1."),
        ({"pose_until": 1.5}, "The end of the skeleton is 1.5"),
        ({"pose_from": 0.6, "pose_until": 0.5}, "starts at 0.6 of the steps and ends at 0.5"),
        ({"pose_strength": float("nan")}, "strength of the skeleton is nan"),
        ({"pose_strength": 11}, "it must be 0 to 10"), ({"cfg": 10**400}, "it must be 0 to 20"),
        ({"window_frames": 0}, "The window is 0"), ({"overlap_frames": 90}, "it must be 0 to 80"),
    ],
)  # fmt: skip
def test_the_skeletons_share_and_strength_have_limits(change, sentence):
    recipe = Recipe(**{"sampler": "euler", "steps": 4, "cfg": 1.0, "shift": 5.0, **change})
    with pytest.raises(BadRequest, match=sentence):
        check_settings(Settings(recipe))


def test_the_longest_window_is_the_longest_clip():
    assert settings_of(context_frames=LIMITS.max_frames).recipe.window_frames == LIMITS.max_frames


DEEP = json.loads("[" * 900 + "]" * 900)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"width": True}, "width is true; a whole number is expected."),
        ({"width": "416px"}, 'width is "416px"; a whole number is expected.'),
        ({"width": 416.5}, "width is 416.5; a whole number"), ({"width": []}, "width is a list;"),
        ({"width": {}}, "width is an object;"), ({"width": DEEP}, "width is a list;"),
        ({"width": float("nan")}, "width is nan;"), ({"width": "NaN"}, 'width is "NaN";'),
        ({"width": 10**400}, "width is a huge number;"), ({"width": "9" * 5000}, 'width is "999'),
        ({"width": -416}, "The width is -416; it must be 64 to 1280."),
        ({"width": 0}, "64 to 1280"),
        ({"width": 63}, "The width is 63;"), ({"width": 1281}, "The width is 1281;"),
        ({"width": 2**100}, "The width is"), ({"width": "4_16"}, "whole number"),
        ({"width": "\u0664\u0661\u0666"}, "whole number"), ({"height": 1e308}, "height is 1e+308;"),
        ({"fps": float("inf")}, "fps is inf; a number"), ({"fps": "inf"}, "a number"),
        ({"fps": "1e999"}, "a number"), ({"fps": 0}, "The fps is 0.0; it must be 1 to 120."),
        ({"fps": "-24"}, "The fps is -24.0;"), ({"fps": 1e9}, "The fps is 1000000000.0;"),
        ({"steps": 0}, "The steps is 0; it must be 1 to 100."),
        ({"steps": 101}, "The steps is 101"),
        ({"steps": "six"}, 'steps is "six";'),
        ({"cfg": 21}, "The cfg is 21.0; it must be 0 to 20."),
        ({"cfg": float("nan")}, "cfg is nan;"), ({"shift": 0}, "The shift is 0.0;"),
        ({"shift": 1e-9}, "The shift is"), ({"sampler": "euler_a"}, "no sampler called 'euler_a'"),
        ({"sampler": "x" * 9999}, "a short word is expected."),
        ({"sampler": "a\nb"}, "a short word"),
        ({"seed": 2**64}, "The seed is 18446744073709551616;"), ({"seed": -2}, "The seed is -2;"),
        ({"seed": 0.5}, "seed is 0.5;"), ({"seed": "0x10"}, "whole number"),
        ({"frames": 0}, "The frames is 0; it must be 1 to 2000."),
        ({"frames": 10**9}, "The frames"),
        ({"num_frames": -1}, "The frames is -1"), ({"frame_load_cap": -5}, "The frames is -5"),
        ({"context_frames": 0}, "The window is 0"), ({"context_frames": 10**9}, "The window"),
        ({"context_overlap": 80}, "The overlap of windows is 80; it must be 0 to 79."),
        ({"context_overlap": -9}, "is -9; it"),
        ({"persons": 0}, "The persons is 0"),
        ({"persons": 99}, "The persons is 99; it must be 1 to 8"),
        ({"max_seconds": 0}, "The max_seconds is 0.0"), ({"max_seconds": 1e9}, "1 to 604800"),
        ({"audio": "maybe"}, "true or false is expected."), ({"audio": 2}, "true or false"),
        ({"fit": "stretch"}, "fit is \"stretch\"; 'crop' or 'resize' is expected."),
        ({"fit": 1}, "fit is 1; a short word"),
        ({"recipe": "fast"}, "'production', 'official', 'turbo' or 'fast8' is expected."),
        ({"output": "s3"}, "'base64' or 'url'"), ({"align": "best"}, "'exact' or 'official'"),
        ({"action": "read_log"}, "'generate', 'health', 'masks' or 'validate' is expected."),
        ({"workflow_type": "wan_animate"}, "'scail_dance' is expected."),
        ({"attention_mode": "sage"}, "There is no attention mode 'sage'."),
        ({"attention_mode": 3}, "a short word"), ({"image_url": 7}, "image_url is 7; text"),
        ({"image_url": ["https://a"]}, "image_url is a list; text is expected."),
        ({"video_base64": {"a": 1}}, "video_base64 is an object; text"),
        ({"video_url": b"a"}, "bytes"),
        ({"images": []}, "images is a list; an object is expected."),
        ({"images": "a"}, "an object"),
        ({"images": {"reference_image": 5}}, "images.reference_image is 5; text"),
        ({"videos": DEEP}, "videos is a list; an object"),
        ({"videos": {"dance_video": DEEP}}, "text"),
        ({"prompt": 5}, "prompt is 5; text is expected."), ({"prompt": ["a"]}, "prompt is a list"),
        ({"prompt": "a\x00b"}, "The prompt has the character U+0000 at place 2, which no text has"),
        ({"prompt": "\x1b[31m"}, "U+001B at place 1"), ({"prompt": "\x7f"}, "U+007F"),
        ({"negative_prompt": "ok\x85"}, "The negative prompt has the character U+0085 at place 3"),
        ({"prompt": "\udcff"}, "U+DCFF"), ({"prompt": "x" * 4097}, "4097 characters"),
        ({"prompt": "x" * 10**7}, "10000000 characters; at most 4096 fit."),
        ({"workflow": "none"}, 'There is no workflow called "none" here, only dance-scail-bplan'),
        ({"workflow": "../secret"}, "There is no workflow called"),
        ({"workflow": "a\0"}, "no workflow"),
        ({"workflow": 3}, "The workflow is 3; an object of nodes is expected."),
        ({"workflow": "{" * 10**5}, "The workflow is a string, but no JSON object."),
        ({"workflow": "dance-scail-bplan", "recipe": "official"}, "Give recipe or workflow"),
    ],
    ids=lambda value: repr(value)[:40] if isinstance(value, dict) else "",
)  # fmt: skip
def test_what_no_clip_can_be_made_of_is_refused_in_a_sentence(fields, sentence):
    assert sentence in refused(**fields)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (None, 'The job has no "input"'), ([], 'The job has no "input"'), ("{}", "no"), (5, "no"),
        ({}, 'The job has no "input"'), ({"id": "a"}, 'The job has no "input"'),
        ({"input": None}, "The input is nothing; an object is expected."),
        ({"input": []}, "The input is a list;"), ({"input": 5}, "The input is 5;"),
        ({"input": "hello"}, "The input is a string, but no JSON object."),
        ({"input": ""}, "no JSON"), ({"input": "[]"}, "The input is a list;"),
        ({"input": '"{}"'}, 'The input is "{}"; an object'), ({"input": "null"}, "is nothing"),
        ({"input": '{"image_url":'}, "no JSON"),
        ({"input": '{"width": ' + "9" * 9999 + "}"}, "JSON"),
        ({"input": "[" * 10**6}, "The input is JSON nested too deep to be read."),
        ({"input": '{"a":' * 10**5 + "1" + "}" * 10**5}, "nested too deep"),
        ({"input": " " * (64 * 2**20 + 1)}, "too long for JSON."),
        ({"input": '{"image_url": "https://a/b", "width": NaN}'}, "width is nan;"),
        ({"input": '{"image_url": "https://a/b", "cfg": -Infinity}'}, "cfg is -inf;"),
        ({"input": DEEP}, "The input is a list;"), ({"input": True}, "The input is true;"),
    ],
    ids=lambda value: repr(value)[:30],
)  # fmt: skip
def test_what_is_no_job_is_refused_in_a_sentence(given, sentence):
    assert sentence in refusal(given)


def test_a_refusal_repeats_only_a_glance_of_what_came():
    token = "https://bucket/person.jpg?token=" + "s3cr3t" * 50
    said = refused(width=token)
    assert said == f'width is "{token[:37]}..."; a whole number is expected.'


def test_a_recipe_has_a_name_a_row_and_settings_of_its_own():
    assert {*get_args(RecipeName)} == {name for rows in RECIPES.values() for name in rows}
    assert {*KINDS} == {*RECIPES} == {*SAID_NOWHERE}
    for kind, rows in RECIPES.items():
        assert [*rows] == [*SAID_NOWHERE[kind]]
        assert {*NEEDED_LORAS[kind]} <= {*rows}


def test_every_field_of_a_request_is_documented():
    told = (ROOT / "docs" / "deploy.md").read_text("utf-8").split("### Fields of a request")[1]
    words = set(re.findall(r"`([a-z0-9_]+)[`.]", told.split("###")[0]))
    assert {*Fields.model_fields} <= words


def test_what_is_not_known_in_a_nested_object_is_told_too():
    given = job(images={"reference_image": PICTURE, "mask": "m.png"}, videos={"end": 1})
    assert "Not known here and ignored: images.mask, videos.end." in given.warnings
