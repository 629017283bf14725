"""The decoder on buffers: its frames are those of `Vae.decode`, on memory that is known before."""

from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from benchmarks.clip import vae as benchmark
from engine.errors import EngineError
from engine.golden import vae as golden_vae
from engine.models.vae import Vae
from engine.models.vae_decode import VaeDecoder, decode_bytes, fastest_convolutions
from kernels.arch import SM90
from kernels.channel_norm import channel_norm, channel_norm_reference
from tests.models.test_vae import random_latents, random_vae, relative_error
from tests.support.interpreter import InterpretedBank


def clamped(pixels):
    return pixels.clamp(-1, 1)


def decoder(vae, norm=channel_norm_reference, finish=clamped, capture=None):
    return VaeDecoder(vae, norm, finish, capture)


def decoded(vae, latents):
    return torch.cat(list(vae.decode(latents)), dim=1)


class Tape:
    """A CUDA graph on a CPU: capturing records operations on tensors and changes nothing, replaying
    does them again on the same memory, whatever else has happened in Python since.
    """

    def __init__(self):
        self.captured = self.replayed = 0

    def __call__(self, run):
        self.captured += 1
        recorder = Recorder()
        with recorder:
            run()
        recorder.undo()

        def replay():
            self.replayed += 1
            for function, args, kwargs, made in recorder.calls:
                again = function(*args, **kwargs)
                for old, new in zip(tensors(made), tensors(again), strict=True):
                    if old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                        old.copy_(new)

        return replay


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls, self.before = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for place, value in zip(function._schema.arguments, args):
            self._keep(place, value)
        for place in function._schema.arguments:
            self._keep(place, kwargs.get(place.name))
        made = function(*args, **kwargs)
        self.calls.append((function, args, kwargs, made))
        return made

    def _keep(self, place, value):
        if place.alias_info is not None and place.alias_info.is_write and value is not None:
            self.before.append((value, value.clone()))

    def undo(self):
        for tensor, value in reversed(self.before):
            tensor.copy_(value)


def tensors(values):
    return [value for value in tree_iter(values) if isinstance(value, torch.Tensor)]


class LiveMemory(TorchDispatchMode):
    """The most bytes that tensors made inside it held at one time. Convolutions give channels last
    what came so, as cuDNN does and the meta device does not know.
    """

    def __init__(self):
        super().__init__()
        self.held, self.others, self.peak_bytes = {}, set(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {tensor.untyped_storage()._cdata for tensor in tensors((args, kwargs))}
        self.others |= given - self.held.keys()
        made = function(*args, **(kwargs or {}))
        if function in CONVOLUTIONS:
            made = made.contiguous(memory_format=LAYOUTS[made.ndim])
        for tensor in tensors(made):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.others:
                self.held[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self.now_bytes())
        return made

    def now_bytes(self):
        self.held = {key: kept for key, kept in self.held.items() if not kept[0].expired()}
        return sum(size for _, size in self.held.values())


CONVOLUTIONS = {torch.ops.aten.conv2d.default, torch.ops.aten.conv3d.default}
LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}


# Numbers


@pytest.mark.parametrize(
    ("width", "count", "size"),
    [(4, 1, (2, 3)), (4, 2, (3, 2)), (8, 6, (5, 3)), (4, 4, (1, 1)), (12, 3, (2, 5))],
)
def test_the_frames_are_those_of_the_plain_decoder(width, count, size):
    vae, latents = random_vae(width), random_latents(count, *size)
    assert relative_error(decoded(decoder(vae), latents), decoded(vae, latents)) < 1e-5


@pytest.mark.golden
def test_golden_videos_are_decoded(golden):
    tensors = load_file(golden / "encoders" / "vae.safetensors")
    weights = {n[8:]: w for n, w in tensors.items() if n.startswith("weights.")}
    vae = Vae(len(weights["encoder.conv1.weight"]))
    vae.load_state_dict(weights)
    fast = decoder(vae.requires_grad_(False))
    cases = [name.removesuffix(".video") for name in tensors if name.endswith(".video")]
    assert len(cases) == 5
    for case in cases:
        error = decoded(fast, tensors[f"{case}.latent"]) - tensors[f"{case}.video"]
        assert error.abs().max() < golden_vae.TOLERANCE


def test_the_pieces_are_one_frame_and_then_four_for_each_latent():
    pieces = list(decoder(random_vae()).decode(random_latents(4)))
    assert [tuple(piece.shape) for piece in pieces] == [(3, 1, 16, 24)] + 3 * [(3, 4, 16, 24)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_it_is_as_exact_as_the_plain_decoder(dtype):
    vae, latents = random_vae(8), random_latents(3, 3, 4)
    exact = decoded(vae, latents)
    half = random_vae(8).to(dtype)
    limit = relative_error(decoded(half, latents), exact)
    assert 1e-5 < relative_error(decoded(decoder(half), latents), exact) < 1.2 * limit


def test_with_the_kernel_it_is_as_exact_as_with_the_reference():
    latents, bank = random_latents(2, 1, 2), InterpretedBank(SM90)
    exact = decoded(random_vae(), latents)
    half = random_vae().half()
    limit = relative_error(decoded(decoder(half), latents), exact)
    got = decoded(decoder(half, partial(channel_norm, bank)), latents)
    assert 1e-5 < relative_error(got, exact) < 1.2 * limit


def test_latents_of_another_type_are_decoded_as_they_are():
    vae, latents = random_vae(), random_latents(3).half()
    assert relative_error(decoded(decoder(vae), latents), decoded(vae, latents.float())) < 1e-5


def test_what_is_handed_out_was_finished_by_the_caller():
    vae, latents = random_vae(), random_latents(3)
    pieces = decoder(vae, finish=lambda pixels: (pixels * 100).to(torch.int16)).decode(latents)
    history = {}
    for got, latent in zip(pieces, latents.split(1, dim=1), strict=True):
        want = (vae.decode_step(latent, history) * 100).to(torch.int16)
        assert got.dtype == torch.int16
        assert (got - want).abs().max() <= 1


# Streams


def test_the_steady_step_is_captured_once_and_its_replays_give_the_same_frames():
    tape, vae = Tape(), random_vae()
    fast = decoder(vae, capture=tape)
    latents = random_latents(6)
    assert relative_error(decoded(fast, latents), decoded(vae, latents)) < 1e-5
    assert (tape.captured, tape.replayed) == (1, 4)  # two were run: the first frame, and a trial


def test_the_next_clip_of_the_same_size_begins_anew_and_needs_no_capture():
    tape, vae = Tape(), random_vae()
    fast = decoder(vae, capture=tape)
    for seed in (3, 4, 5):
        latents = random_latents(4, seed=seed)
        assert relative_error(decoded(fast, latents), decoded(vae, latents)) < 1e-5
    assert (tape.captured, tape.replayed) == (1, 2 + 3 + 3)


def test_a_clip_of_another_size_has_buffers_and_a_capture_of_its_own():
    tape, vae = Tape(), random_vae()
    fast = decoder(vae, capture=tape)
    for size in ((2, 3), (3, 2), (2, 3)):
        latents = random_latents(3, *size)
        assert relative_error(decoded(fast, latents), decoded(vae, latents)) < 1e-5
    assert tape.captured == 3


def test_after_a_release_everything_is_made_again():
    tape, vae, latents = Tape(), random_vae(), random_latents(3)
    fast = decoder(vae, capture=tape)
    before = decoded(fast, latents)
    fast.release()
    assert torch.equal(decoded(fast, latents), before)
    assert tape.captured == 2


def test_clips_may_be_decoded_at_once():
    vae, one, two = random_vae(), random_latents(4, seed=3), random_latents(4, seed=4)
    fast = decoder(vae, capture=Tape())
    decoded(fast, one)
    pairs = list(zip(fast.decode(one), fast.decode(two), strict=True))
    assert relative_error(torch.cat([a for a, _ in pairs], dim=1), decoded(vae, one)) < 1e-5
    assert relative_error(torch.cat([b for _, b in pairs], dim=1), decoded(vae, two)) < 1e-5


def test_a_clip_that_was_given_up_leaves_nothing_to_the_next():
    vae, latents = random_vae(), random_latents(5, seed=6)
    fast = decoder(vae, capture=Tape())
    for stop in (1, 2, 4):
        begun = fast.decode(random_latents(5, seed=stop))
        for _ in range(stop):
            next(begun)
        begun.close()
        assert relative_error(decoded(fast, latents), decoded(vae, latents)) < 1e-5


def test_pieces_that_were_handed_out_do_not_change_later():
    fast = decoder(random_vae(), capture=Tape())
    pieces, copies = [], []
    for piece in fast.decode(random_latents(6)):
        pieces.append(piece)
        copies.append(piece.clone())
    decoded(fast, random_latents(6, seed=9))
    assert all(torch.equal(piece, copy) for piece, copy in zip(pieces, copies, strict=True))


def test_while_a_piece_is_with_the_caller_the_next_one_is_under_way():
    begun = []

    def noted(pixels):
        begun.append(pixels.shape[1])
        return pixels

    seen = [len(begun) for _ in decoder(random_vae(), finish=noted).decode(random_latents(4))]
    assert seen == [2, 3, 4, 4]


def test_the_weights_are_not_changed_and_those_of_convolutions_not_copied():
    vae, latents = random_vae(), random_latents(3)
    before = {name: weight.clone() for name, weight in vae.named_parameters()}
    fast = decoder(vae, finish=lambda pixels: pixels)
    frames = decoded(fast, latents)
    assert all(torch.equal(before[name], weight) for name, weight in vae.named_parameters())
    vae.decoder.head["2"].weight.zero_()
    assert decoded(fast, latents).std(dim=(1, 2, 3)).max() == 0
    assert frames.std(dim=(1, 2, 3)).min() > 0.01


@pytest.mark.parametrize("shape", [(16, 0, 2, 2), (15, 1, 2, 2), (16, 2, 2), (1, 16, 1, 2, 2)])
def test_latents_of_a_wrong_shape_are_refused_at_once(shape):
    with pytest.raises(EngineError, match=r"latents \[16, t, h, w\], not"):
        decoder(random_vae()).decode(torch.zeros(shape))


def test_the_search_for_algorithms_ends_with_the_step_even_if_that_fails():
    assert not torch.backends.cudnn.benchmark
    with pytest.raises(RuntimeError, match="no memory"), fastest_convolutions():
        assert torch.backends.cudnn.benchmark
        raise RuntimeError("no memory")
    assert not torch.backends.cudnn.benchmark


# Memory


def leave_alone(x, branch, bias, gamma, window, history):
    """A norm that takes no memory of its own, like the kernel."""


def nothing(pixels):
    return pixels.new_zeros(0)


@pytest.mark.parametrize(
    ("device", "width", "size", "dtype"),
    [
        ("meta", 96, (512, 896), torch.bfloat16),
        ("meta", 96, (416, 672), torch.float16),
        ("cpu", 8, (32, 48), torch.float32),
    ],
)
def test_the_peak_of_memory_is_known_before(device, width, size, dtype):
    with torch.device(device):
        vae = Vae(width).to(dtype).requires_grad_(False)
    latents = torch.zeros(16, 3, size[0] // 8, size[1] // 8, device=device)
    fast = decoder(vae, leave_alone, finish=nothing)
    with LiveMemory() as live:
        for _ in fast.decode(latents):
            pass
    assert live.peak_bytes == pytest.approx(decode_bytes(*size, dtype, width), rel=1e-3)


def test_a_clip_as_in_training_takes_about_three_gibibytes():
    assert decode_bytes(512, 896, torch.bfloat16) == 3_405_188_096
    assert decode_bytes(896, 512, torch.float16) == 3_405_188_096
    assert decode_bytes(512, 896, torch.float32) == pytest.approx(2 * 3_405_188_096, rel=1e-3)


def test_between_clips_it_holds_the_buffers_and_after_a_release_nothing():
    vae = Vae(8).to(device="meta", dtype=torch.bfloat16).requires_grad_(False)
    fast = decoder(vae, leave_alone, finish=nothing)
    with LiveMemory() as live:
        for _ in fast.decode(torch.zeros(16, 3, 8, 12, device="meta")):
            pass
        kept = live.now_bytes()
        fast.release()
    assert 0.5 * decode_bytes(64, 96, torch.bfloat16, 8) < kept < live.peak_bytes
    assert live.now_bytes() == 0


# Benchmark


def test_the_benchmark_compares_before_it_measures():
    job = benchmark.DecodeJob(torch.device("cpu"), torch.float32, 8, 16, 24, 3)
    plain, buffers = benchmark.decode_rows(job, None, runs=1)
    assert (plain.way, buffers.way) == ("plain", "buffers")
    assert plain.frames == buffers.frames == (9, 16, 24)
    assert plain.error == 0
    assert 0 <= buffers.error < 2e-3  # 0 where the processor sums in the same order
    assert plain.ms > 0 and buffers.ms > 0
