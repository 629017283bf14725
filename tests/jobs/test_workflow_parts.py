"""The part that a node plays: absent inputs, second nodes of a class, and where links lead."""

import importlib.util
import json

import pytest

from engine.jobs.job import Given
from engine.jobs.workflow import read_workflow
from tests.support.job_bodies import job, refused
from tests.support.workflows import MEDIA, inputs_of, linked, told, workflow

LOAD_VIDEO = inputs_of("130", video="other.mp4")
RESIZE = inputs_of("107")
LOADER = "WanVideoVAELoader"
# Of each stored case (the golden README): what is told of it, or what it says
CASES = {
    "wf-prompts-in-turn": 'The prompt has 3 parts between "|".',
    "wf-without-ref_dw_pose": "ref_dw_pose of node 362 (RenderNLFPoses) comes from nothing, done",
    "wf-sound-of-a-second-video": "audio of node 139 (VHS_VideoCombine) comes from output 2 of "
    "node 902 (VHS_LoadVideo), done with output 2 of node 130 (VHS_LoadVideo)",
    "wf-clip-vision-of-another-picture": "image_1 of node 327 (WanVideoClipVisionEncode) comes "
    "from node 900 (LoadImage), done with node 107",
    "wf-without-clip_embeds": "clip_embeds of node 350 (WanVideoAddSCAILReferenceEmbeds) comes "
    "from nothing, done with the picture seen by CLIP",
    "wf-ref-pose-of-another-picture": "images of node 901 (PoseDetectionVitPoseToDWPose) comes "
    "from node 900 (LoadImage), done with node 107",
    "wf-keypoints-of-another-video": "images of node 363 (PoseDetectionVitPoseToDWPose) comes "
    "from node 925 (ImageResizeKJv2), done with node 131",
    **dict.fromkeys(
        ("wf-prompt-from-StringConstant", "wf-prompt-from-PrimitiveStringMultiline",
         "wf-a-list-that-is-no-link", "wf-picture-annotated-input", "wf-numbers-as-strings"),
        "",
    ),
}  # fmt: skip


@pytest.mark.golden
def test_every_stored_case_is_done_as_the_graph_says_or_told(golden, tmp_path):
    spec = importlib.util.spec_from_file_location(
        "make_inputs", golden / "cases" / "make_inputs.py"
    )
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    base = golden / "workflows" / "Dance-SCAIL-BPlan__SCAIL_api__c72a07f.api.json"
    made.workflows(base, tmp_path)
    assert {path.stem for path in tmp_path.glob("*.json")} == set(CASES)
    usual = job(workflow=json.loads(base.read_text("utf-8")))
    for name, said in CASES.items():
        read = job(workflow=json.loads((tmp_path / f"{name}.json").read_text("utf-8")))
        new = [said for said in read.warnings if said not in usual.warnings]
        if said:
            assert said in new[0]
        elif name == "wf-numbers-as-strings":
            assert [w.replace('"1"', "1") for w in read.warnings] == list(usual.warnings)
            assert read.settings == usual.settings
        else:
            assert new == [], name
        if name.startswith("wf-prompt-from"):
            assert read.settings.prompt == "she dances"


def node(*said):
    kind, inputs = said
    return {"900": (kind, inputs)}


LED_ELSEWHERE = [
    # sound
    (node("VHS_LoadAudio", {"audio_file": "a.mp3"}), {"n139_audio": ["900", 0]},
     "audio of node 139 (VHS_VideoCombine) comes from node 900 (VHS_LoadAudio), done with output"),
    (node("LoadAudio", {"audio": "a.mp3"}), {"n139_audio": ["900", 0]}, "done with output 2 of no"),
    (node("TrimAudioDuration", {"audio": ["130", 2], "duration": 2}), {"n139_audio": ["900", 0]},
     "node 900 (TrimAudioDuration) is left out"),
    ({}, {"n139_audio": ["130", 0]}, "comes from node 130 (VHS_LoadVideo), done with output 2 of"),
    ({}, {"n139_audio": ["130", 9]}, "comes from output 9 of node 130 (VHS_LoadVideo), done with"),
    ({}, {"n139_audio": "song.mp3"}, "audio of node 139 (VHS_VideoCombine) is no link, done witho"),
    # pictures
    ({}, {"n327_image_1": ["106", 0]}, "comes from node 106 (LoadImage), done with node 107"),
    ({}, {"n327_image_1": ["131", 0]}, "comes from node 131 (ImageResizeKJv2), done with node 107"),
    ({}, {"n327_image_1": ...}, "image_1 of node 327 (WanVideoClipVisionEncode) comes from nothin"),
    (node("ImageResizeKJv2", {**RESIZE, "width": 224}), {"n327_image_1": ["900", 0]},
     "image_1 of node 327 (WanVideoClipVisionEncode) comes from node 900 (ImageResizeKJv2), done"),
    ({}, {"n107_image": ["106", 1]}, "comes from output 1 of node 106 (LoadImage), done with its"),
    ({}, {"n107_image": ["106", 7]}, "comes from output 7 of node 106 (LoadImage), done with its"),
    (node("ImageBlur", {"image": ["106", 0]}), {"n107_image": ["900", 0]},
     "node 900 (ImageBlur) is left out"),
    (node("Rembg", {"image": ["107", 0]}), {"n350_ref_image": ["900", 0]}, "node 900 (Rembg) is l"),
    # motion
    ({}, {"n363_images": ["130", 0]}, "comes from node 130 (VHS_LoadVideo), done with node 131"),
    ({}, {"n362_dw_poses": ...}, "dw_poses of node 362 (RenderNLFPoses) comes from nothing, done"),
    ({}, {"n362_dw_poses": None}, "dw_poses of node 362 (RenderNLFPoses) comes from nothing"),
    ({}, {"n362_ref_dw_pose": ["363", 0]}, "comes from node 131 (ImageResizeKJv2), done with node"),
    (node("DWPreprocessor", {"image": ["131", 0]}), {"n362_dw_poses": ["900", 0]},
     "dw_poses of node 362 (RenderNLFPoses) comes from node 900 (DWPreprocessor), done with the k"),
    (node("VHS_LoadVideo", LOAD_VIDEO), {"n99_num_frames": ["900", 1]},
     "num_frames of node 99 (WanVideoEmptyEmbeds) comes from output 1 of node 900 (VHS_LoadVideo)"),
    ({}, {"n99_num_frames": ["130", 0]}, "comes from node 130 (VHS_LoadVideo), done with output 1"),
    # networks
    (node(LOADER, {"model_name": "b.pth"}), {"n28_vae": ["900", 0]},
     "vae of node 350 (WanVideoAddSCAILReferenceEmbeds) comes from node 38 (WanVideoVAELoader), d"),
    ({}, {"n28_vae": ...}, "vae of node 28 (WanVideoDecode) comes from nothing, done with the VAE"),
    ({}, {"n324_vae": ...}, "vae of node 324 (WanVideoAddSCAILPoseEmbeds) comes from nothing, don"),
    ({}, {"n28_samples": ["348", 1]}, "comes from output 1 of node 348 (WanVideoSamplerv2), done"),
    (node("WanVideoContextOptionsNew", {}), {"n354_context_options": ["900", 0]},
     "context_options of node 354 (WanVideoSamplerExtraArgs) comes from node 900"),
    (node("WanVideoSetAttentionModeOverride", {"model": ["80", 0]}), {"n348_model": ["900", 0]},
     "node 900 (WanVideoSetAttentionModeOverride) is left out"),
    (node("WanVideoAddUni3C", {"embeds": ["324", 0]}), {"n348_image_embeds": ["900", 0]},
     "node 900 (WanVideoAddUni3C) is left out"),
    # what is made of the clip
    (node("RIFE VFI", {"frames": ["28", 0], "multiplier": 2}), {"n323_image": ["900", 0]},
     "node 900 (RIFE VFI) is left out"),
    (node("GetImageRangeFromBatch", {"images": ["28", 0]}), {"n323_image": ["900", 0]},
     "node 900 (GetImageRangeFromBatch) is left out"),
    (node("VHS_VideoCombine", inputs_of("139")), {}, "node 900 (VHS_VideoCombine) saves a video t"),
]  # fmt: skip


@pytest.mark.parametrize(("nodes", "changes", "said"), LED_ELSEWHERE)
def test_an_input_that_leads_elsewhere_is_told(nodes, changes, said):
    assert any(said in one for one in linked(workflow(nodes=nodes, **changes)))


ALIKE = [
    (node("VHS_LoadVideo", inputs_of("130", video="a.mp4")),
     {"n130_video": "a.mp4", "n139_audio": ["900", 2]}),
    (node("ImageResizeKJv2", RESIZE), {"n327_image_1": ["900", 0]}),
    (node("ImageResizeKJv2", {**RESIZE, "width": "416"}), {"n327_image_1": ["900", 0]}),
    (node(LOADER, inputs_of("38")), {"n28_vae": ["900", 0]}),
    (node("ImageResizeKJv2", inputs_of("131")), {"n363_images": ["900", 0]}),
    (node("GetImageSizeAndCount", {"image": ["131", 0]}), {"n99_num_frames": ["900", 3]}),
    (node("Reroute", {"": ["107", 0]}), {"n327_image_1": ["900", 0]}),
]  # fmt: skip


@pytest.mark.parametrize(("nodes", "changes"), ALIKE)
def test_a_second_node_that_does_the_same_is_the_same(nodes, changes):
    assert linked(workflow(nodes=nodes, **changes)) == []


BESIDE = [
    node("LoadImage", {"image": "other.png"}),
    node("VHS_LoadVideo", LOAD_VIDEO),
    node("WanVideoContextOptions", inputs_of("355", context_frames=16)),
    node("PreviewImage", {"images": ["28", 0]}),
    node("Note", {"text": ["a", "b", "c"], "more": ["1", "2"], "link": ["nowhere", 0]}),
    node("WanVideoSamplerv2", inputs_of("348")),
    node("VHS_VideoCombine", inputs_of("137")),
]


@pytest.mark.parametrize("nodes", BESIDE)
def test_a_node_that_the_clip_is_not_made_of_says_nothing(nodes):
    assert told(workflow(nodes=nodes)) == ""


def test_the_picture_is_the_one_that_the_links_lead_to():
    given = workflow(nodes=node("LoadImage", {"image": "two.png"}), n107_image=["900", 0], **MEDIA)
    made = job(image_url=None, workflow=given)
    assert made.image == Given("workflow.image", "path", "two.png")
    assert "the LoadImage 106 is not the one in use" in made.warnings[0]


def test_a_picture_annotated_with_comfyuis_folder_is_that_picture():
    made = job(image_url=None, workflow=workflow(**{**MEDIA, "n106_image": "a b.png [input]"}))
    assert made.image == Given("workflow.image", "path", "a b.png")
    assert job(workflow=workflow(n130_video="dance.mp4 [input]")).motion is None
    assert "ComfyUI's temp folder" in refused(
        image_url=None, workflow=workflow(**{**MEDIA, "n106_image": "a.png [temp]"})
    )


@pytest.mark.parametrize(
    ("changes", "nodes", "files"),
    [
        ({"n56_prev_lora": ["900", 0]}, node("WanVideoLoraSelect", {"lora": "b", "strength": 0.5}),
         'at 1; the LoRA "b" at 0.5.'),
        ({"n80_lora": ["900", 0]},
         node("WanVideoLoraSelectMulti", {"lora_0": "a", "strength_0": 1, "lora_1": "none",
                                          "strength_1": 1, "lora_2": "c", "strength_2": 0.7}),
         '; the LoRA "a" at 1; the LoRA "c" at 0.7.'),
        ({"n22_lora": ["900", 0]}, node("WanVideoLoraSelect", {"lora": "b", "strength": 2}),
         '; the LoRA "b" at 2; the LoRA "lightx2v'),
        ({"n80_lora": ["900", 0]}, node("WanVideoLoraSelectFromURL", {"url": "b"}),
         "; what node 900 (WanVideoLoraSelectFromURL) adds."),
        ({"n38_model_name": "Wan2_2_VAE.safetensors"}, {}, 'at 1; "Wan2_2_VAE.safetensors".'),
        ({"n38_precision": "fp32"}, {}, 'the precision "fp32" of node 38 (WanVideoVAELoader).'),
        ({"n368_model_name": "umt5-xxl-enc-fp8_e4m3fn.safetensors"}, {}, '"umt5-xxl-enc-fp8_e4m3f'),
        ({"n326_clip_name": "clip_vision_g.safetensors"}, {}, '"clip_vision_g.safetensors".'),
        ({"n364_yolo_model": "yolov8n.onnx"}, {}, '"yolov8n.onnx".'),
        ({"n334_model": ["900", 0]}, node("LoadNLFModel", {"nlf_model": "a"}),
         "what node 900 (LoadNLFModel) loads."),
    ],
)  # fmt: skip
def test_files_that_are_not_those_of_the_endpoint_are_named(changes, nodes, files):
    assert files in read_workflow(workflow(nodes=nodes, **changes)).warnings[-1]


def test_what_a_lora_is_told_beside_its_strength_is_left_out():
    nodes = node("WanVideoLoraBlockEdit", {"blocks": 1})
    assert "blocks of node 56 (WanVideoLoraSelect) is left out" in told(
        workflow(nodes=nodes, n56_blocks=["900", 0])
    )


def test_a_mark_of_the_editor_is_told_for_the_clip_alone():
    given = workflow()
    given["80"]["mode"], given["137"]["mode"] = 4, 2
    assert told(given) == (
        "Muted or bypassed, but in an API workflow done all the same: node 80 (WanVideoSetLoRAs)."
    )


@pytest.mark.parametrize(
    ("nodes", "changes", "sentence"),
    [
        ({"900": ("LoadImage", {"image": "b"}),
          "901": ("ImageSwitch", {"a": ["106", 0], "b": ["900", 0], "which": 1})},
         {"n107_image": ["901", 0]},
         "leads to node 106 (LoadImage) and to node 900 (LoadImage) through node 901 (ImageSwitch"),
        ({"900": ("A", {"x": ["901", 0]}), "901": ("A", {"x": ["900", 0]})},
         {"n107_image": ["900", 0]}, "go in a circle through node 900 (A)"),
        ({f"u{n}": ("U", {"x": [f"u{n + 1}", 0]}) for n in range(60)}, {"n107_image": ["u0", 0]},
         "leads through more than 50 nodes; link it to a LoadImage by a shorter way."),
        (node("WanVideoSamplerv2", inputs_of("348", samples=["348", 0])),
         {"n28_samples": ["900", 0]}, "made with 2 nodes WanVideoSamplerv2; exactly one"),
        (node("WanVideoAddSCAILPoseEmbeds", inputs_of("324", embeds=["324", 0])),
         {"n348_image_embeds": ["900", 0]}, "made with 2 nodes WanVideoAddSCAILPoseEmbeds"),
        ({}, {"n348_image_embeds": ["350", 0]}, "made with 0 nodes WanVideoAddSCAILPoseEmbeds"),
        ({}, {"n139_images": ["323", 1]}, "(GetImageSizeAndCount); a WanVideoDecode is expected."),
        ({}, {"n334_images": ["130", 0]}, "comes from node 130 (VHS_LoadVideo); a ImageResizeKJv2"),
        ({}, {"n107_image": ["106", -1]}, "is no link to a node of the workflow"),
        ({}, {"n107_image": ["106", 0.5]}, "is no link to a node of the workflow"),
        ({}, {"n107_image": ["999", 0]}, "is no link to a node of the workflow"),
    ],
)  # fmt: skip
def test_a_graph_that_leads_nowhere_or_two_ways_is_refused(nodes, changes, sentence):
    assert sentence in refused(workflow=workflow(nodes=nodes, **changes))


def without_139(nodes):
    """A workflow whose clip is saved by 901, and by another."""
    given = workflow(nodes=nodes)
    given["901"] = given.pop("139")
    return given


@pytest.mark.parametrize(
    "nodes",
    [
        node("VHS_VideoCombine", inputs_of("139", save_output=False, frame_rate=48)),
        {"902": ("ImageConcatMulti", {"image_1": ["362", 0], "image_2": ["28", 0]}),
         "900": ("VHS_VideoCombine", inputs_of("139", images=["902", 0], frame_rate=48))},
    ],
)  # fmt: skip
def test_of_several_videos_the_one_that_is_kept_or_is_the_clip_alone_is_made(nodes):
    given = without_139(nodes)
    assert read_workflow(given).fps == 24.0
    assert "node 900 (VHS_VideoCombine) saves a video too, which is not made" in told(given)


def test_two_videos_of_which_neither_is_the_clip_rather_than_the_other_are_refused():
    given = without_139(node("VHS_VideoCombine", inputs_of("139", frame_rate=48)))
    assert "saves 2 videos of a WanVideoDecode" in refused(workflow=given)
