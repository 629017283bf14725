"""Workflows of ComfyUI's own nodes, for SCAIL-2: by links and not by number, and what is told."""

import copy

import pytest

from engine.errors import BadRequest
from engine.jobs.job import Given
from engine.jobs.workflow import read_workflow
from engine.recipes import RECIPES
from tests.jobs.test_workflow import renumbered
from tests.support.core_workflows import FULL, LONG, TURBO, core, read, told
from tests.support.job_bodies import MASK, SCAIL2, refused, scail2_job, scail2_refused
from tests.support.workflows import workflow


def test_the_turbo_sample_is_the_turbo_recipe():
    """Its scheduler reads the model before the node that says 5 (docs/reference/scail2.md 5)."""
    draft = read(core())
    assert draft.recipe == RECIPES["scail2"]["turbo"]
    assert (draft.image, draft.video, draft.prompt) == ("me.png", "dance.mp4", "he dances")
    assert (draft.width, draft.height, draft.frames, draft.fps) == (896, 512, 81, None)
    assert (draft.mode, draft.audio, draft.seed, draft.negative_prompt) == (
        "animation",
        True,
        0,
        "",
    )


def test_the_full_sample_has_forty_steps_and_guidance():
    recipe = read(core(FULL)).recipe
    assert (recipe.sampler, recipe.steps, recipe.cfg, recipe.shift) == (
        "euler_simple",
        40,
        5.0,
        8.0,
    )


def test_a_scheduler_behind_the_shift_has_that_shift():
    assert read(core(n104_model=["35", 0])).recipe.shift == 5.0
    assert read(core(n104_model=["35", 0], n35_shift=3)).recipe.shift == 3.0
    plain = ksampler(core())
    assert read(plain).recipe.shift == 5.0
    plain["102"]["inputs"]["model"] = ["31", 0]
    assert read(plain).recipe.shift == 8.0


def ksampler(given, **changes):
    """The graph with a KSampler in place of the custom one."""
    inputs = {
        "model": ["35", 0], "positive": ["100", 0], "negative": ["100", 1], "seed": 7, "steps": 8,
        "cfg": 1, "sampler_name": "uni_pc", "scheduler": "simple", "latent_image": ["100", 2],
        "denoise": 1,
    }  # fmt: skip
    given["102"] = {"class_type": "KSampler", "inputs": inputs | changes}
    return given


def test_the_three_samplers_are_read_alike():
    plain = read(ksampler(core()))
    assert (plain.recipe.sampler, plain.recipe.steps, plain.seed) == ("unipc", 8, 7)
    assert "uni_pc with the scheduler simple is done as unipc" in told(ksampler(core()))
    advanced = core(
        nodes={
            "102": ("SamplerCustomAdvanced", {
                "noise": ["60", 0], "guider": ["61", 0], "sampler": ["101", 0],
                "sigmas": ["104", 0], "latent_image": ["100", 2]}),
            "60": ("RandomNoise", {"noise_seed": 11}),
            "61": ("CFGGuider", {"model": ["35", 0], "positive": ["100", 0],
                                 "negative": ["100", 1], "cfg": 2.5}),
        }
    )  # fmt: skip
    found = read(advanced)
    assert (found.seed, found.recipe.cfg, found.recipe.shift) == (11, 2.5, 8.0)
    assert found.warnings[-1] == read(core()).warnings[-1]


def test_a_chain_is_one_long_clip_and_the_engine_cuts_it():
    draft = read(core(LONG))
    assert draft.frames == 81 + 2 * 76
    assert draft.mode == "replacement"
    assert "The chain of 3 segments is one clip here" in told(core(LONG))
    given = core(LONG, n13_file="masks.mp4", n15_image="ref_mask.png")
    assert (read(given).mask, read(given).reference_mask) == ("masks.mp4", "ref_mask.png")
    made = scail2_job(workflow=given)
    assert made.cast.mask == Given("workflow.mask", "path", "masks.mp4")
    assert (made.settings.segments, made.settings.frames) == ("even", 233)
    assert scail2_job(workflow=given, **MASK).cast.mask.field == "mask_url"


def test_a_segment_that_differs_from_the_first_is_told():
    said = told(core(LONG, n200_pose_strength=0.5, n300_previous_frame_count=9))
    assert "pose_strength of node 200 (WanSCAILToVideo) is 0.5, done as 1" in said
    assert "previous_frame_count of node 300 (WanSCAILToVideo) is 9, done as 5" in said


def test_nodes_that_make_masks_want_them_in_the_request():
    assert "node 44 (SCAIL2ColoredMask) is read as the wish for masks." in told(core())
    assert "needs a driving mask" in scail2_refused(workflow=core(n100_replacement_mode=True))
    made = scail2_job(workflow=core(n100_replacement_mode=True), **MASK)
    assert made.settings.mode == "replacement"
    without = core(n100_pose_video_mask=..., n100_reference_image_mask=...)
    assert "the wish for masks" not in told(without)
    assert scail2_job(workflow=core()).wants_masks
    assert not scail2_job(workflow=without).wants_masks


def test_what_nodes_say_of_the_masks_that_they_make_is_done_or_told():
    """Without it a graph that follows the second of two persons would follow both."""
    said = told(core())
    assert "max_objects of node 42 (SAM3_VideoTrack) is 2, done as all in the picture" in said
    for usual in ("sort_by", "object_indices", "detection", "text of", "images of", "track_data"):
        assert usual not in said
    changes = {
        "n44_sort_by": ("area", "sort_by of node 44 (SCAIL2ColoredMask) is \"area\", done as "
                        "\"left_to_right\""),
        "n44_object_indices": ("1", "object_indices of node 44 (SCAIL2ColoredMask) is \"1\", done"),
        "n44_replacement_mode": (True, "replacement_mode of node 44 (SCAIL2ColoredMask) is not"),
        "n44_reference_masks": (["10", 1], "reference_masks of node 44 (SCAIL2ColoredMask) comes "
                                "from output 1 of node 10 (LoadImage), done without"),
        "n44_driving_track_data": (["10", 0], "driving_track_data of node 44 (SCAIL2ColoredMask) "
                                   "comes from node 10 (LoadImage), done with what node 100"),
        "n42_detection_threshold": (0.3, "detection_threshold of node 42 (SAM3_VideoTrack) is"),
        "n42_max_objects": ("lots", "max_objects of node 42 (SAM3_VideoTrack) is no number"),
        "n43_max_objects": (1, "max_objects of node 43 (SAM3_VideoTrack) is 1, done as all in"),
        "n42_images": (["10", 0], "images of node 42 (SAM3_VideoTrack) comes from node 10 "
                       "(LoadImage), done with pose_video of node 100"),
        "n41_text": ("a dog", 'text of node 41 (CLIPTextEncode) is "a dog", done as person'),
        "n100_pose_video_mask": (["44", 1], "pose_video_mask of node 100 (WanSCAILToVideo) comes "
                                 "from output 1 of node 44 (SCAIL2ColoredMask), done with its"),
    }  # fmt: skip
    for name, (value, sentence) in changes.items():
        assert sentence in told(core(**{name: value})), name
        assert sentence not in said, name


def test_a_tracker_of_one_object_asks_for_one_person():
    assert scail2_job(workflow=core()).persons is None
    alone = core(n42_max_objects=1)
    assert scail2_job(workflow=alone).persons == 1
    assert scail2_job(workflow=alone, persons=3).persons == 3
    assert "max_objects of node 42" not in told(alone)
    assert scail2_job(workflow=core(n42_max_objects="1")).persons == 1
    for unlimited in (0, 6, 64, "{{most}}"):
        free = core(n42_max_objects=unlimited)
        assert scail2_job(workflow=free).persons is None
        assert "max_objects of node 42 (SAM3_VideoTrack) is" not in told(free)


def test_a_batch_of_pictures_is_the_character_and_further_pictures():
    batch = {
        "70": ("ImageBatch", {"image1": ["10", 0], "image2": ["71", 0]}),
        "71": ("BatchImagesNode", {"images.image0": ["72", 0], "images.image1": ["73", 0]}),
        "72": ("LoadImage", {"image": "side.png"}),
        "73": ("LoadImage", {"image": "back.png"}),
    }
    made = scail2_job(workflow=core(nodes=batch, n100_reference_image=["70", 0]))
    names = [one.image.value for one in made.cast.references]
    assert (names, made.image.field) == (["side.png", "back.png"], "image_url")
    own = scail2_job(workflow=core(nodes=batch, n100_reference_image=["70", 0]), references=["a"])
    assert [one.image.field for one in own.cast.references] == ["references.0.url"]


FILES = {
    "60": ("LoadImage", {"image": "me mask.png"}),
    "61": ("LoadImage", {"image": "side mask.png"}),
    "62": ("ImageBatch", {"image1": ["60", 0], "image2": ["61", 0]}),
    "63": ("LoadImage", {"image": "side.png"}),
    "64": ("ImageBatch", {"image1": ["10", 0], "image2": ["63", 0]}),
    "65": ("ImageFromBatch", {"image": ["12", 0], "batch_index": 10, "length": 20}),
    "66": ("VHS_LoadImagesPath", {"directory": "masks"}),
    "67": ("ImageBatch", {"image1": ["44", 1], "image2": ["61", 0]}),
}


def test_a_batch_of_masks_goes_with_its_batch_of_pictures():
    given = core(nodes=FILES, n100_reference_image=["64", 0], n100_reference_image_mask=["62", 0])
    made = scail2_job(workflow=given).cast
    assert made.reference_mask.value == "me mask.png"
    (further,) = made.references
    assert (further.image.value, further.mask.value) == ("side.png", "side mask.png")
    assert further.mask.field == "workflow.references.0.mask"
    mixed = core(nodes=FILES, n100_reference_image=["64", 0], n100_reference_image_mask=["67", 0])
    assert read(mixed).reference_mask is None  # a node makes it
    assert read(mixed).references == (("side.png", "side mask.png"),)
    one = core(nodes=FILES, n100_reference_image=["64", 0], n100_reference_image_mask=["60", 0])
    assert (read(one).reference_mask, read(one).references) == (
        "me mask.png",
        (("side.png", None),),
    )
    many = core(nodes=FILES, n100_reference_image_mask=["62", 0])
    assert "has 1 more than there are pictures, which are left out" in told(many)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"n100_pose_video_mask": ["66", 0]},
         "pose_video_mask of node 100 (WanSCAILToVideo) comes from node 66 (VHS_LoadImagesPath), "
         "done without: masks come from files"),
        ({"n100_pose_video_mask": "mask.mp4"},
         "pose_video_mask of node 100 (WanSCAILToVideo) is no link, done without"),
        ({"n100_reference_image_mask": ["3", 0]}, "comes from node 3 (VAELoader), done without"),
        ({"n100_pose_video": ["65", 0]}, "node 65 (ImageFromBatch) is left out: all frames count"),
        ({"n100_clip_vision_output": ...}, "from nothing, done with the picture seen by CLIP"),
        ({"n22_image": ["63", 0]}, "image of node 22 (CLIPVisionEncode) comes from node 63"),
    ],
)  # fmt: skip
def test_media_that_are_linked_otherwise_than_done_are_named(change, said):
    assert said not in told(core(nodes=FILES))
    assert said in told(core(nodes=FILES, **change))


def test_clip_may_see_the_first_picture_of_a_batch():
    given = core(nodes=FILES, n100_reference_image=["64", 0])
    assert "seen by CLIP" not in told(given)


def chain_of_four():
    """The long sample with a fourth segment."""
    given = core(LONG, n13_file="m.mp4", n15_image="r.png")
    for old in ("300", "301", "302", "303", "304"):
        given[f"4{old[1:]}"] = copy.deepcopy(given[old])
    for node, name, link in (
        ("400", "previous_frames", ["303", 0]), ("400", "video_frame_offset", ["300", 3]),
        ("402", "positive", ["400", 0]), ("402", "negative", ["400", 1]),
        ("402", "latent_image", ["400", 2]), ("402", "sigmas", ["404", 0]),
        ("403", "samples", ["402", 0]), ("90", "images", ["84", 0]),
    ):  # fmt: skip
        given[node]["inputs"][name] = link
    given["84"] = {
        "class_type": "ImageBatch",
        "inputs": {"image1": ["83", 0], "image2": ["403", 0]},
    }
    return given


def test_a_chain_of_four_is_a_clip_of_four_stretches():
    assert read(chain_of_four()).frames == 81 + 3 * 76
    assert "Settings done another way" not in told(chain_of_four())


@pytest.mark.parametrize("link", [["203", 0], ["103", 0], ["403", 0], ["12", 0]])
def test_a_segment_that_does_not_follow_the_one_before_makes_no_chain(link):
    given = chain_of_four()
    given["400"]["inputs"]["previous_frames"] = link
    assert "are no chain" in scail2_refused(workflow=given)


@pytest.mark.parametrize(
    ("node", "name", "value", "said"),
    [
        ("404", "steps", 30, "steps of node 402 (SamplerCustom) is 30, done as 6"),
        ("402", "cfg", 4, "cfg of node 402 (SamplerCustom) is 4.0, done as 1.0"),
        ("404", "model", ["35", 0], "shift of node 402 (SamplerCustom) is 5.0, done as 8.0"),
        ("400", "positive", ["21", 0],
         "positive of node 400 (WanSCAILToVideo) comes from node 21 (CLIPTextEncode), done from"),
        ("400", "reference_image", ["15", 0], "comes from node 15 (LoadImage), done from node 10"),
        ("400", "video_frame_offset", 100, "video_frame_offset of node 400 (WanSCAILToVideo) is"),
        ("400", "video_frame_offset", ["200", 3], "is left out: each segment follows the last"),
    ],
)  # fmt: skip
def test_a_later_segment_that_is_made_otherwise_is_told(node, name, value, said):
    given = chain_of_four()
    given[node]["inputs"][name] = value
    assert said in told(given)


def test_ids_and_order_mean_nothing():
    for name in (TURBO, FULL, LONG):
        one, other = read(core(name)), read(renumbered(core(name)))
        for field in ("recipe", "prompt", "seed", "width", "fps", "frames", "mode", "image"):
            assert getattr(one, field) == getattr(other, field)


def test_placeholders_are_left_to_the_request_and_the_endpoint():
    given = workflow(TURBO, n100_width="{{w}}", n104_steps="{{steps}}", n101_sampler_name="{{s}}")
    draft = read(given)
    assert (draft.image, draft.video, draft.prompt, draft.width) == (None, None, None, None)
    assert (draft.recipe.steps, draft.recipe.sampler) == (6, "euler_simple")
    assert "Left open by the workflow: image of node 10 (LoadImage);" in draft.warnings[0]
    made = scail2_job(workflow=given, prompt="p", steps=4, width=704)
    assert (made.settings.prompt, made.settings.recipe.steps) == ("p", 4)


def test_a_name_of_many_letters_is_told_in_a_few():
    long = core()
    long["100"]["inputs"]["x" * 5000 + "\n"] = "{{x}}"
    (said,) = [one for one in read(long).warnings if one.startswith("Left open")]
    assert said.isprintable()
    assert len(said) < 200


def test_a_workflow_of_the_other_model_ends_in_a_sentence():
    assert refused(workflow=core()) == (
        "The workflow is for SCAIL-2: it has node 100 (WanSCAILToVideo). This worker serves "
        "SCAIL-Preview."
    )
    assert refused(workflow="scail2-turbo") == refused(workflow=core())
    said = scail2_refused(workflow="dance-scail-bplan")
    assert said.startswith("The workflow is for SCAIL-Preview: it has node ")
    assert said.endswith("This worker serves SCAIL-2.")
    assert "makes 0 videos of a WanSCAILToVideo" in scail2_refused(workflow={})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"n100_batch_size": 2}, "batch_size of node 100 (WanSCAILToVideo) is 2, done as 1"),
        ({"n104_denoise": 0.5}, "denoise of node 104 (BasicScheduler) is 0.5, done as 1"),
        ({"n100_brand_new": 1}, "brand_new of node 100 (WanSCAILToVideo) is left out"),
        ({"n91_codec": "av1"}, 'codec of node 91 (SaveVideo) is "av1", done as "auto"'),
        ({"n100_video_frame_offset": 9}, "video_frame_offset of node 100 (WanSCAILToVideo) is"),
        ({"n100_previous_frames": ["12", 0]}, "previous_frames of node 100 (WanSCAILToVideo) is l"),
        ({"n100_width": ["12", 2]}, "the size of node 100 (WanSCAILToVideo), done as the picture"),
        ({"n30_strength_model": 0.5}, 'distil..." at 0.5'),
    ],
)  # fmt: skip
def test_what_is_done_another_way_is_named(change, said):
    assert said not in told(core())
    assert said in told(core(**change))


def test_a_node_that_is_not_known_is_passed_and_named():
    match = {"65": ("ColorMatch", {"image": ["103", 0], "reference": ["10", 0]})}
    assert "node 65 (ColorMatch) is left out" in told(core(nodes=match, n90_images=["65", 0]))
    skip = {"65": ("SkipLayerGuidance", {"model": ["31", 0]})}
    given = core(nodes=skip, n35_model=["65", 0])
    assert "node 65 (SkipLayerGuidance) is left out" in told(given)
    assert "the LoRA" in told(given)


def test_a_rate_of_its_own_and_a_missing_sound_are_read():
    assert read(core(n90_fps=24)).fps == 24.0
    assert read(core(n90_audio=...)).audio is False


def broken(name=TURBO, **changes):
    def change(given):
        for place, value in changes.items():
            node, _, key = place[1:].partition("_")
            if value is ...:
                given[node]["inputs"].pop(key)
            else:
                given[node]["inputs"][key] = value

    return name, change


def doubled(given):
    given["9102"] = copy.deepcopy(given["102"])
    given["103"]["inputs"]["other"] = ["9102", 0]


def two_clips(given):
    given["9090"] = copy.deepcopy(given["90"])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (broken(n101_sampler_name="lcm"), 'samples by "lcm" with the scheduler "simple"; euler'),
        (broken(n104_scheduler="karras"), 'with the scheduler "karras"; euler with simple or'),
        (broken(n100_pose_video=...), "pose_video of node 100 (WanSCAILToVideo) comes from"),
        (broken(n100_reference_image=...), "reference_image of node 100 (WanSCAILToVideo) comes"),
        (broken(n100_positive=["3", 0]), "a CLIPTextEncode or ConditioningZeroOut is expected."),
        (broken(n102_sigmas=["101", 0]), "comes from node 101 (KSamplerSelect); a Basic"),
        (broken(n102_model=["3", 0]), "comes from node 3 (VAELoader); a UNETLoader or"),
        (broken(n104_steps=...), "The input steps of node 104 (BasicScheduler) is missing."),
        (broken(n104_steps="many"), 'is "many"; a whole number is expected.'),
        (broken(n104_steps=500), "The steps is 500; it must be 1 to 100."),
        (broken(n100_pose_end=7), "The end of the skeleton is 7.0; it must be 0 to 1."),
        (broken(n100_length=-3), "The frames is -3; it must be 1 to 2000."),
        (broken(n100_replacement_mode="maybe"), "true or false is expected."),
        (broken(n30_model=["30", 0]), "The links of the workflow go in a circle through node 30"),
        (broken(n102_latent_image=["3", 0]), "a WanSCAILToVideo is expected."),
        (broken(LONG, n200_previous_frames=...), "The 3 WanSCAILToVideo of the workflow are no ch"),
        (broken(LONG, n100_previous_frames=["303", 0]), "are no chain"),
        ((TURBO, doubled), "The node 100 (WanSCAILToVideo) has 2 samplers; exactly one"),
        ((TURBO, two_clips), "makes 2 videos of a WanSCAILToVideo through CreateVideo or VHS_Vid"),
        ((TURBO, lambda given: given.pop("90")), "makes 0 videos of a WanSCAILToVideo"),
        ((TURBO, lambda given: given.update({f"s{n}": given["100"] for n in range(40)})),
         "The workflow has 41 WanSCAILToVideo; at most 30 do."),
    ],
)  # fmt: skip
def test_what_is_no_such_workflow_is_refused_in_a_sentence(change, sentence):
    name, do = change
    given = core(name)
    do(given)
    assert sentence in scail2_refused(workflow=given, **MASK)


def test_a_batch_in_a_circle_ends():
    circle = {"70": ("ImageBatch", {"image1": ["70", 0], "image2": ["70", 0]})}
    with pytest.raises(BadRequest, match=r"circle|too many nodes"):
        read_workflow(core(nodes=circle, n100_reference_image=["70", 0]), SCAIL2)
