"""The settings of a clip travel in its comment, and come back through the parser of requests."""

import dataclasses
import json
import random

import pytest
import torch

from engine.config import KINDS, defaults
from engine.errors import BadMedia, BadRequest
from engine.flow import Settings
from engine.jobs.like import comment_for, comment_of, like, require_same_kind
from engine.jobs.parse import parse_job
from engine.jobs.served import PREVIEW, Served
from engine.media.mp4 import encode_mp4
from engine.recipes import NEGATIVE_PROMPT, RECIPES

SCAIL2 = Served(KINDS["scail2"], KINDS["scail2"].modes)
MEDIA = {"image_url": "https://a.example/a.png", "video_url": "https://a.example/b.mp4"}
FRAMES = (torch.arange(4 * 32 * 32 * 3) % 251).to(torch.uint8).view(4, 32, 32, 3)


def clip_with(comment, path):
    encode_mp4([FRAMES], 16.0, path, comment=comment)
    return path


def job_of(given, served):
    return parse_job({"input": {**MEDIA, **given}}, defaults(), served).settings


def back(settings, kind, path):
    return like(clip_with(comment_of(settings, kind, "SCAIL"), path), "this clip")


CASES = {
    "preview": [
        {"seed": 7},
        {"seed": 2**53 - 1, "prompt": 'A "quoted" = line; # \\ of\nthree', "recipe": "official"},
        {"width": 512, "height": 896, "fps": 12.5, "frames": 33, "audio": False, "persons": 2},
        {"recipe": "official", "steps": 12, "cfg": 2.5, "shift": 3.25, "align": "official"},
        {"sampler": "euler", "context_frames": 41, "context_overlap": 8, "fit": "resize"},
        {"negative_prompt": "", "prompt": "", "seed": 0},
    ],
    "scail2": [
        {"seed": 1, "mode": "animation"},
        {"recipe": "fast8", "segments": "cover", "prompt": "zwei tanzen, \u4e8c\u4eba"},
        {"segments": "windows", "context_frames": 33, "context_overlap": 4},
        {"framing": "as-is", "who": "2,1", "strict": True, "drift": "none"},
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "given"), [(kind, given) for kind, all_ in CASES.items() for given in all_]
)
def test_a_job_with_the_settings_of_a_clip_has_the_settings_of_its_job(kind, given, tmp_path):
    served = {"preview": PREVIEW, "scail2": SCAIL2}[kind]
    settings = job_of({"seed": 5, **given}, served)
    found = back(settings, kind, tmp_path / "a.mp4")
    assert found.kind == kind
    again = job_of(found.given, served)
    assert again == dataclasses.replace(settings, keep_settings=False)


LETTERS = [chr(code) for code in (*range(32, 127), *range(161, 1200))]


def test_random_settings_come_back_too(tmp_path):
    draw = random.Random(0)
    for number in range(12):
        given = {
            "recipe": draw.choice(["production", "official"]),
            "steps": draw.randint(1, 60),
            "cfg": draw.choice([1, 1.5, 4.0, 7]),
            "shift": draw.uniform(0.5, 12),
            "seed": draw.randrange(2**53),
            "prompt": "".join(draw.choices(LETTERS, k=200)),
            "fps": draw.choice([8, 23.976, 30]),
        }
        settings = job_of(given, PREVIEW)
        assert (
            job_of(back(settings, "preview", tmp_path / f"{number}.mp4").given, PREVIEW) == settings
        )


def test_a_comment_is_a_line_of_json_with_the_note_and_without_media():
    settings = Settings(RECIPES["preview"]["official"], "she dances", NEGATIVE_PROMPT, seed=3)
    told = json.loads(comment_of(settings, "preview", "DEMO WEIGHTS"))
    assert told["note"] == "DEMO WEIGHTS, seed 3"
    assert told["model"] == "preview"
    assert told["input"]["recipe"] == "official"
    assert told["input"]["seed"] == 3
    assert not any("_url" in name or "_path" in name for name in told["input"])


def test_a_service_tells_its_settings_only_when_it_was_asked():
    settings = Settings(RECIPES["preview"]["official"], "a secret wish", seed=3)
    assert comment_for(settings, "preview", "SCAIL") == "SCAIL, seed 3"
    told = dataclasses.replace(settings, keep_settings=True)
    assert "a secret wish" in comment_for(told, "preview", "SCAIL")


def test_what_no_field_can_say_is_noted_and_told_again(tmp_path):
    recipe = dataclasses.replace(RECIPES["preview"]["official"], pose_strength=0.5)
    found = back(Settings(recipe, seed=1), "preview", tmp_path / "a.mp4")
    assert "workflow" in found.told[0]


def test_media_loras_and_unknown_fields_of_a_clip_are_ignored_and_named(tmp_path):
    given = {
        "seed": 3,
        "image_path": "/etc/passwd",
        "lora": "x",
        "webhook": "http://a",
        "action": "health",
    }
    comment = json.dumps({"model": "preview", "input": given})
    found = like(clip_with(comment, tmp_path / "a.mp4"), "this clip")
    assert found.given == {"seed": 3}
    for name in ("image_path", "lora", "webhook", "action"):
        assert name in found.told[0]


@pytest.mark.parametrize(
    "comment",
    [
        "SCAIL, seed 3",
        "",
        "{",
        "[" * 50_000,
        "{}",
        "[]",
        '{"model": "preview"}',
        '{"model": "other", "input": {}}',
        '{"model": ["preview"], "input": {}}',
        '{"model": "preview", "input": [1]}',
        '{"model": "preview", "input": {"steps": "many"}}',
        '{"model": "preview", "input": {"seed": 1e999}}',
        '{"model": "preview", "input": {"prompt": {"a": 1}}}',
        '{"model": "preview", "input": {"seed": ' + "9" * 5000 + "}}",
    ],
)
def test_a_comment_that_is_none_of_ours_ends_in_a_sentence(comment, tmp_path):
    with pytest.raises(BadRequest) as refused:
        like(clip_with(comment, tmp_path / "a.mp4"), "this clip")
    assert len(str(refused.value)) < 400


def test_a_clip_without_a_comment_and_a_file_that_is_no_clip_are_refused(tmp_path):
    encode_mp4([FRAMES], 16.0, tmp_path / "a.mp4")
    with pytest.raises(BadRequest, match="how it was made"):
        like(tmp_path / "a.mp4", "this clip")
    (tmp_path / "b.mp4").write_bytes(b"no clip at all" * 100)
    with pytest.raises(BadMedia, match="this clip is no video"):
        like(tmp_path / "b.mp4", "this clip")


def test_text_beyond_the_bound_is_refused(tmp_path):
    comment = json.dumps({"model": "preview", "input": {"prompt": "=" * 100_000}})
    with pytest.raises(BadMedia, match="more text"):
        like(clip_with(comment, tmp_path / "a.mp4"), "this clip")


def test_the_longest_prompts_that_are_taken_come_back(tmp_path):
    longest = "\u4e8c=" * 2048
    settings = job_of({"seed": 1, "prompt": longest, "negative_prompt": longest}, PREVIEW)
    found = back(settings, "preview", tmp_path / "a.mp4")
    assert job_of(found.given, PREVIEW) == settings


def test_settings_of_another_model_are_refused_by_name(tmp_path):
    found = back(Settings(RECIPES["scail2"]["turbo"], seed=1), "scail2", tmp_path / "a.mp4")
    require_same_kind(found, SCAIL2)
    with pytest.raises(BadRequest, match="SCAIL-2"):
        require_same_kind(found, PREVIEW)


def test_what_a_clip_says_of_itself_has_nothing_that_a_terminal_obeys(tmp_path):
    comment = json.dumps({"model": "preview", "input": {}, "lost": "\x1b[2Jgone\n\ud800"})
    found = like(clip_with(comment, tmp_path / "a.mp4"), "this clip")
    assert found.told == ("this clip says of itself: ?[2Jgone??",)
