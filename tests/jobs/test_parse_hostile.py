"""What strangers send in place of a job: each is refused in one sentence."""

import json

import pytest

from tests.support.job_bodies import refusal, refused

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
        ({"fit": 1}, "fit is 1; a short word"), ({"recipe": "fast"}, "'production' or 'official'"),
        ({"output": "s3"}, "'base64' or 'url'"), ({"align": "best"}, "'exact' or 'official'"),
        ({"action": "read_log"}, "'generate', 'health' or 'validate' is expected."),
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
