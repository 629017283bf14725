"""SAM 2 itself, small and with random weights: files, names, streaming, memory.

The one file that imports transformers' SAM 2, which takes seconds.
"""

import dataclasses
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoInferenceSession

from engine.errors import BadCheckpoint, BadRequest, MissingModel
from engine.flow import go_on
from engine.masks.corrections import parse_corrections
from engine.masks.making import Wanted, sha256_of
from engine.masks.sam2_load import as_segmenter, load_sam2
from engine.masks.sam2_names import original_tensors, renamed
from engine.masks.sam2_sizes import SIZES, Sam2Kind, config_of, tell
from engine.masks.segment import segment_with
from engine.masks.stream import Prompt, Stream, to_input
from engine.media.video import probe_video
from engine.models.tensorfile import TensorFile
from tests.support.mask_scenes import write_video
from tests.support.standin_models import save_yolox
from tests.support.tiny_sam2 import SIDE, lively, original, tiny_model

CPU = torch.device("cpu")
HEIGHT, WIDTH = 96, 160
BOXES = np.array([[20.0, 10, 60, 90], [90.0, 5, 150, 80]])


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def segmenter(model):
    return as_segmenter(model, "tiny", CPU, torch.float32)


def clip(count, seed=0):
    """Frames [T, H, W, 3] u8 in which two blots move over noise."""
    rng = np.random.default_rng(seed)
    frames = rng.integers(0, 60, (count, HEIGHT, WIDTH, 3), dtype=np.uint8)
    for t in range(count):
        for k, (x1, y1, x2, y2) in enumerate(BOXES.astype(int)):
            frames[t, y1:y2, x1 + t : x2 + t, k] = 200
    return frames


def box(person, frame):
    return Prompt(person, frame, BOXES[person])


def streamed(segmenter, frames, prompts, reverse=False):
    """Logits of each person and frame: {(person, frame): [h, w]}."""
    stream = Stream(segmenter, HEIGHT, WIDTH, reverse)
    order = range(len(frames))[:: -1 if reverse else 1]
    found = {}
    for t in order:
        now = [one for one in prompts if one.frame == t]
        if now or stream._sessions:
            for person, seen in stream.show(frames[t], t, now).items():
                found[person, t] = seen.logits
    return found


def whole(model, segmenter, frames, prompts, reverse=False):
    """The same by the library's own loop, which has all of a clip and forgets nothing."""
    video = torch.stack([to_input(frame, segmenter) for frame in frames])
    session = Sam2VideoInferenceSession(
        video=video, video_height=HEIGHT, video_width=WIDTH, dtype=torch.float32
    )
    scale = torch.tensor([SIDE / WIDTH, SIDE / HEIGHT]).repeat(2)
    for one in prompts:
        corners = (torch.tensor(one.box, dtype=torch.float32) * scale).reshape(1, 1, 2, 2)
        labels = torch.tensor([[[2, 3]]], dtype=torch.int32)
        k = session.obj_id_to_idx(one.person)
        session.add_point_inputs(k, one.frame, {"point_coords": corners, "point_labels": labels})
    session.obj_with_new_inputs = [one.person for one in prompts]
    start = prompts[0].frame
    model(session, frame_idx=start)
    outputs = model.propagate_in_video_iterator(session, start_frame_idx=start, reverse=reverse)
    return {
        (person, out.frame_idx): out.pred_masks[row, 0]
        for out in outputs
        for row, person in enumerate(out.object_ids)
    }


def iou(a, b):
    return float((a & b).sum() / (a | b).sum())


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "backward"])
def test_streaming_in_pruned_memory_gives_what_the_whole_clip_gives(model, segmenter, reverse):
    frames = clip(14)
    start = 13 if reverse else 0
    prompts = [box(0, start), box(1, start)]
    got = streamed(segmenter, frames, prompts, reverse)
    want = whole(model, segmenter, frames, prompts, reverse)
    assert got.keys() == want.keys() and len(got) == 28
    for key, logits in want.items():
        torch.testing.assert_close(got[key], logits, rtol=1e-4, atol=1e-4)
    masks = torch.stack([logits > 0 for logits in want.values()]).float()
    assert 0.02 < masks.mean() < 0.98  # neither empty nor full: they say something


def test_memory_of_a_stream_does_not_grow(segmenter):
    frames = clip(30)
    stream = Stream(segmenter, HEIGHT, WIDTH)
    held = []
    for t, frame in enumerate(frames):
        stream.show(frame, t, [box(0, 0), box(1, 0)] if t == 0 else [])
        sessions = stream._sessions.values()
        held.append(
            sum(
                tensor.nbytes
                for session in sessions
                for outputs in session.output_dict_per_obj[0].values()
                for output in outputs.values()
                for tensor in output.values()
            )
        )
        assert all(not session.processed_frames for session in sessions)
    assert held[-1] == held[-10]
    kept = [sorted(s.output_dict_per_obj[0]["non_cond_frame_outputs"]) for s in sessions]
    assert kept == [list(range(29 - segmenter.kept - 3, 30))] * 2


def test_a_late_person_is_found_from_their_frame_on_and_changes_nobody_else(segmenter):
    frames = clip(8)
    alone = streamed(segmenter, frames, [box(0, 0)])
    both = streamed(segmenter, frames, [box(0, 0), box(1, 5)])
    assert sorted(frame for person, frame in both if person == 1) == [5, 6, 7]
    for key, logits in alone.items():
        torch.testing.assert_close(both[key], logits, rtol=0, atol=0)


def test_a_person_taken_back_and_told_again_is_as_if_told_there_at_first(segmenter):
    frames = clip(8)
    want = streamed(segmenter, frames, [box(0, 0), box(0, 4)])
    stream = Stream(segmenter, HEIGHT, WIDTH)
    for t in range(7):
        stream.show(frames[t], t, [box(0, 0)] if t == 0 else [])
    stream.rewind(0, 4)
    for t in range(4, 8):
        seen = stream.show(frames[t], t, [box(0, 4)] if t == 4 else [])
        torch.testing.assert_close(seen[0].logits, want[0, t], rtol=0, atol=0)


def test_a_mask_that_is_shown_comes_back(segmenter):
    shape = np.zeros((HEIGHT, WIDTH), bool)
    shape[20:80, 40:110] = True
    stream = Stream(segmenter, HEIGHT, WIDTH)
    seen = stream.show(clip(1)[0], 0, [Prompt(0, 0, mask=shape)])[0]
    large = F.interpolate(seen.logits[None, None], (HEIGHT, WIDTH), mode="bilinear")[0, 0]
    assert iou(large.numpy() > 0, shape) >= 0.98
    assert seen.score > 0


def test_a_point_outside_changes_what_a_box_says(segmenter):
    frame = clip(1)[0]
    plain = Stream(segmenter, HEIGHT, WIDTH).show(frame, 0, [box(0, 0)])[0]
    pointed = Prompt(0, 0, BOXES[0], points=((30.0, 30.0, False),))
    other = Stream(segmenter, HEIGHT, WIDTH).show(frame, 0, [pointed])[0]
    assert not torch.equal(plain.logits, other.logits)


def test_frames_are_stretched_and_normalised(segmenter):
    grey = np.full((HEIGHT, WIDTH, 3), 128, np.uint8)
    pixels = to_input(grey, segmenter)
    want = (128 / 255 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    assert pixels.shape == (3, SIDE, SIDE)
    torch.testing.assert_close(pixels, want[:, None, None].expand(3, SIDE, SIDE))


def test_a_folder_gives_back_the_model_that_was_saved(tmp_path, model, segmenter):
    model.save_pretrained(tmp_path / "sam2")
    loaded = load_sam2(tmp_path / "sam2", CPU)
    frames = clip(4)
    got = streamed(loaded, frames, [box(0, 0)])
    want = streamed(segmenter, frames, [box(0, 0)])
    for key, logits in want.items():
        torch.testing.assert_close(got[key], logits, rtol=0, atol=0)
    assert (loaded.side, loaded.kept) == (SIDE, 4)


@pytest.mark.parametrize("is_21", [True, False], ids=["2.1", "2"])
def test_original_names_become_those_of_transformers(tmp_path, is_21):
    model = tiny_model(
        enable_temporal_pos_encoding_for_object_pointers=is_21,
        enable_occlusion_spatial_embedding=is_21,
    )
    want = {name: held.clone() for name, held in model.state_dict().items()}
    torch.save({"model": original(want)}, tmp_path / "a.pt")
    got = original_tensors(TensorFile(tmp_path / "a.pt", top_key="model"))
    assert got.keys() == want.keys()
    for name, held in want.items():
        torch.testing.assert_close(got[name], held, rtol=0, atol=0)


def test_the_names_of_released_files_are_known():
    """Names as the program that trained SAM 2 has them, and where each goes."""
    names = {
        "maskmem_tpos_enc": "memory_temporal_positional_encoding",
        "no_obj_embed_spatial": "occlusion_spatial_embedding_parameter",
        "image_encoder.trunk.pos_embed_window": "vision_encoder.backbone.pos_embed_window",
        "image_encoder.trunk.blocks.0.norm1.weight":
            "vision_encoder.backbone.blocks.0.layer_norm1.weight",
        "image_encoder.trunk.blocks.0.mlp.layers.0.weight":
            "vision_encoder.backbone.blocks.0.mlp.proj_in.weight",
        "image_encoder.trunk.blocks.0.mlp.layers.1.weight":
            "vision_encoder.backbone.blocks.0.mlp.proj_out.weight",
        "image_encoder.neck.convs.3.conv.bias": "vision_encoder.neck.convs.3.bias",
        "mask_downsample.weight": "mask_downsample.weight",
        "obj_ptr_tpos_proj.weight": "temporal_positional_encoding_projection_layer.weight",
        "obj_ptr_proj.layers.0.weight": "object_pointer_proj.proj_in.weight",
        "obj_ptr_proj.layers.1.weight": "object_pointer_proj.layers.0.weight",
        "obj_ptr_proj.layers.2.weight": "object_pointer_proj.proj_out.weight",
        "sam_mask_decoder.transformer.layers.1.cross_attn_token_to_image.out_proj.bias":
            "mask_decoder.transformer.layers.1.cross_attn_token_to_image.o_proj.bias",
        "sam_mask_decoder.transformer.norm_final_attn.weight":
            "mask_decoder.transformer.layer_norm_final_attn.weight",
        "memory_attention.norm.weight": "memory_attention.layer_norm.weight",
        "memory_encoder.out_proj.weight": "memory_encoder.projection.weight",
        "memory_encoder.mask_downsampler.encoder.10.weight":
            "memory_encoder.mask_downsampler.layers.3.layer_norm.weight",
        "memory_encoder.mask_downsampler.encoder.12.bias":
            "memory_encoder.mask_downsampler.final_conv.bias",
        "memory_encoder.fuser.layers.1.gamma": "memory_encoder.memory_fuser.layers.1.scale",
        "memory_encoder.fuser.layers.1.pwconv2.weight":
            "memory_encoder.memory_fuser.layers.1.pointwise_conv2.weight",
        "sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix":
            "prompt_encoder.shared_embedding.positional_embedding",
    }  # fmt: skip
    assert renamed(names) == names


@pytest.mark.parametrize(
    ("size", "held"), list(zip(SIZES, (901, 613, 517, 469))), ids=lambda value: str(value)[:20]
)
def test_each_size_is_told_by_width_and_blocks(size, held):
    from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoModel

    with torch.device("meta"):
        model = Sam2VideoModel(config_of(Sam2Kind(size, True)))
    shapes = {name: tuple(one.shape) for name, one in model.state_dict().items()}
    assert len(shapes) == held
    count = sum(one.numel() for one in model.parameters())
    assert size.parameters - 1 < count / 1e6 <= size.parameters
    kind = tell(shapes, "a file")
    assert kind == Sam2Kind(size, True)
    without = {name: shape for name, shape in shapes.items() if not name.startswith("occlusion")}
    assert tell(without, "a file") == Sam2Kind(size, False)


def test_a_size_that_never_was_is_refused(tmp_path, model):
    held = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(original(held), tmp_path / "a.safetensors")
    with pytest.raises(BadCheckpoint, match="patches are 8 wide and it has 5 blocks; large 144"):
        load_sam2(tmp_path / "a.safetensors", CPU)


def spoiled(tmp_path, model, change):
    model.save_pretrained(tmp_path / "sam2")
    place = tmp_path / "sam2" / "model.safetensors"
    held = load_file(place)
    change(held)
    save_file(held, place, {"format": "pt"})
    return tmp_path / "sam2"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda held: held.pop("no_object_pointer"), "1 tensors are missing .no_object_pointer."),
        (lambda held: held.update(more=torch.ones(1)), "1 have no place .more."),
        (lambda held: held.update(no_object_pointer=torch.ones(1, 4)), "4.; .1, 128. is expect"),
        (lambda held: held["no_object_pointer"].fill_(torch.nan), "infinite numbers or NaN"),
        (lambda held: held.update(no_object_pointer=torch.ones(1, 128, dtype=torch.int8)), "I8"),
    ],
)  # fmt: skip
def test_a_folder_whose_tensors_do_not_fit_is_refused(tmp_path, model, change, said):
    with pytest.raises(BadCheckpoint, match=said):
        load_sam2(spoiled(tmp_path, model, change), CPU)


def test_weights_in_half_precision_load(tmp_path, model):
    folder = spoiled(
        tmp_path, model, lambda held: held.update({k: v.half() for k, v in held.items()})
    )
    loaded = load_sam2(folder, CPU)
    got = loaded.network.state_dict()["no_memory_embedding"]
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, model.no_memory_embedding.half().float())


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "sam3_video"}, "is SAM 3. It is not run here"),
        ({"model_type": "edgetam_video"}, "is EdgeTAM"),
        ({"model_type": "sam"}, "SAM of 2023. It follows nobody"),
        ({"model_type": "SegformerForSemanticSegmentation", "auto_map": {}}, "BiRefNet or RMBG 2"),
        ({"model_type": "strange", "auto_map": {}}, "wants to run code that lies in it"),
        ({"model_type": "sam2_video", "auto_map": {}}, "wants to run code that lies in it"),
        ({"model_type": "sam2_video", "_attn_implementation": "evil/kernels"}, "by 'evil/kernels'"),
        (
            {"model_type": "sam2_video", "vision_config": {"attn_implementation": {"": "a/b"}}},
            "code that may lie elsewhere",
        ),
        ({"model_type": "sam2"}, "of type 'sam2'; sam2_video is expected"),
        ([], "cannot be read as a JSON object"),
        ({"model_type": "sam2_video", "num_maskmem": "many"}, "describes no SAM 2"),
    ],
)  # fmt: skip
def test_folders_of_other_models_are_refused(tmp_path, config, said):
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(BadCheckpoint, match=said):
        load_sam2(tmp_path, CPU)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("detector.backbone.weight", "is SAM 3"),
        ("image_encoder.trunk.body.stem.weight", "is EdgeTAM"),
        ("image_encoder.patch_embed.proj.weight", "SAM of 2023"),
        ("bb.layers.0.weight", "BiRefNet"),
        ("stage1.rebnconvin.conv_s1.weight", "Its licence forbids commercial use"),
        ("something.weight", "is no SAM 2: none of its 1 tensors"),
    ],
)
def test_files_of_other_models_are_refused(tmp_path, name, said):
    save_file({name: torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(BadCheckpoint, match=said):
        load_sam2(tmp_path / "a.safetensors", CPU)


def test_a_box_beyond_the_frame_ends_at_its_edge(segmenter):
    frame = clip(1)[0]
    edges = np.array([0.0, 0, WIDTH, HEIGHT])
    inside = Stream(segmenter, HEIGHT, WIDTH).show(frame, 0, [Prompt(0, 0, edges)])[0]
    beyond = edges + np.array([-9, -9, 9, 9])
    outside = Stream(segmenter, HEIGHT, WIDTH).show(frame, 0, [Prompt(0, 0, beyond)])[0]
    torch.testing.assert_close(outside.logits, inside.logits, rtol=0, atol=0)


def test_a_folder_of_models_makes_masks_of_a_video(tmp_path, model):
    """All but the weights is real: files, YOLOX's code, SAM 2's code, cache, record."""
    models, state = tmp_path / "models", tmp_path / "state"
    model.save_pretrained(models / "sam2" / "sam2.1-hiera-large")
    save_yolox(models / "yolox_l.onnx", ((320.0, 200.0, 200.0, 360.0, 0.9),))
    video = write_video(tmp_path / "dance.mkv", torch.from_numpy(clip(5)))
    Image.fromarray(clip(1, seed=1)[0]).save(tmp_path / "me.png")
    segment = segment_with(models, CPU, state)
    wanted = Wanted(
        tmp_path / "me.png", probe_video(video), None, None, (HEIGHT, WIDTH), "animation"
    )
    with pytest.raises(BadRequest, match=r"take about .* minutes on this CPU"):
        segment(wanted, go_on)
    asked = []
    patient = dataclasses.replace(wanted, is_patient=True)
    masks = segment(patient, lambda: asked.append(1))
    assert masks.labels.shape == (5, HEIGHT, WIDTH) and masks.labels.unique().tolist() == [0, 1]
    assert masks.reference.shape == (HEIGHT, WIDTH) and 1 in masks.reference
    assert masks.model.startswith("sam2.1-hiera-large ") and masks.order == (1,)
    assert masks.source_sha256 == sha256_of(video) and len(asked) >= 10
    again = segment(wanted, go_on)  # known by now: it takes no time
    torch.testing.assert_close(again.labels, masks.labels, rtol=0, atol=0)
    other = segment_with(models, CPU, state, corrections=parse_corrections(
        [{"frame": 2, "person": 1, "box": [0, 0, 20, 20]}]
    ))  # fmt: skip
    assert not torch.equal(other(patient, go_on).labels, masks.labels)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: size.name)
def test_models_of_the_real_sizes_run_in_little_memory(size):
    """Random numbers: shapes, and bytes of what is remembered of a person and a frame."""
    from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoModel

    torch.manual_seed(0)
    real = lively(Sam2VideoModel(config_of(Sam2Kind(size, True))))
    segmenter = as_segmenter(real, size.name, CPU, torch.float32)
    assert (segmenter.side, segmenter.kept) == (1024, 16)
    stream = Stream(segmenter, HEIGHT, WIDTH)
    for t, frame in enumerate(clip(2)):
        seen = stream.show(frame, t, [box(0, 0)] if t == 0 else [])
        assert seen[0].logits.shape == (256, 256) and seen[0].logits.isfinite().all()
    outputs = stream._sessions[0].output_dict_per_obj[0]
    for kind, number in (("cond_frame_outputs", 0), ("non_cond_frame_outputs", 1)):
        held = sum(tensor.nbytes for tensor in outputs[kind][number].values())
        assert held < 1.9 * 2**20  # features 0.5, their places 1, mask 0.25 MiB


def test_what_is_not_there_is_missing(tmp_path):
    with pytest.raises(MissingModel, match=r"no config\.json"):
        load_sam2(tmp_path, CPU)
    with pytest.raises(MissingModel, match="There is no file"):
        load_sam2(tmp_path / "a.pt", CPU)
