"""Plans compute what blocks of our own kernels do, and what the model does."""

import math
from dataclasses import replace
from functools import cache

import pytest
import torch

from engine.build.quantize import Quantization, groups
from engine.build.segments import DEPLOY, Segment
from engine.config import TEXT_TOKENS, ModelConfig
from engine.denoise.block import (
    BlockWeights,
    ContextKeys,
    ContextWeights,
    assemble,
    block_modulation,
    context_keys,
)
from engine.denoise.block_runner import LaunchedBlocks, Pass
from engine.errors import BadRequest, Unavailable
from engine.models.attention import sdpa
from engine.models.dit import Block, Context, rope_tables
from engine.tensorrt.block_runner import PlanKeys, block_tensors, open_program
from kernels.attention import ATTENTION
from kernels.cross_attention import cross_attention_reference, cross_keys
from kernels.fp8 import E4M3
from kernels.ops import plain_attention, reference_ops
from kernels.spec import KernelError
from tests.support.fake_tensorrt import GPU, RANGE, STREAM, VERSION, FakeLibrary, planned_package

COSINE = 0.999
LAYERS, DRAWN = 40, 10
PROGRAMS = ["tensorrt", "hybrid"]
CONFIG = ModelConfig(layers=1, dim=256, ffn=320)
PADDED = replace(CONFIG, ffn=512)
CPU = torch.device("cpu")
TEXT_ROWS = 38  # the last of them stands for all that follow


class OneBlock:
    """The weights of a block as those of a checkpoint."""

    config = CONFIG

    def __init__(self, block):
        self.held = {f"blocks.0.{name}": weight for name, weight in block.state_dict().items()}

    def __iter__(self):
        return iter(self.held)

    def shape(self, name):
        return tuple(self.held[name].shape)

    def read_into(self, name, out):
        out.copy_(self.held[name])

    def kept_by(self, name):
        return None

    def codes(self, name):
        return None


class Scene:
    """Ten blocks, four times, each of which moves the tokens by a part of what they are."""

    def __init__(self):
        self.draw = torch.Generator().manual_seed(5)
        self.blocks = [self.block() for _ in range(DRAWN)] * (LAYERS // DRAWN)
        self.rope = rope_tables((2, 4, 6), True, CPU)
        self.x = self.randn(len(self.rope.cos), CONFIG.dim)
        self.modulation = 0.2 * self.randn(6, CONFIG.dim)
        text = self.randn(TEXT_TOKENS, CONFIG.dim)
        text[TEXT_ROWS:] = text[TEXT_ROWS - 1]
        self.context = Context(text, self.randn(257, CONFIG.dim))
        made = [self.quantized(block) for block in self.blocks[:DRAWN]] * (LAYERS // DRAWN)
        self.weights = [weights for weights, _ in made]
        self.keys = [keys for _, keys in made]

    def randn(self, *shape):
        return torch.randn(*shape, generator=self.draw)

    def block(self):
        block = Block(CONFIG, sdpa).requires_grad_(False)
        for name, weight in block.named_parameters():
            if weight.ndim == 2:
                weight.copy_(self.randn(*weight.shape) / math.sqrt(weight.shape[1]))
            elif "norm" in name and name.endswith("weight"):
                weight.copy_(1.2 + 0.2 * self.randn(*weight.shape))
            else:
                weight.copy_(0.2 * self.randn(*weight.shape))
        # Of each branch E4M3 loses 4 %: forty of them add about what the tokens were.
        block.cross_attn.o.weight.mul_(0.1)  # which no gate makes smaller
        for linear in (block.self_attn.o, block.ffn[2]):
            linear.weight.mul_(0.4)
        return block

    @torch.inference_mode()
    def quantized(self, block):
        tensors = {}
        for group in groups(Quantization(OneBlock(block), E4M3)):
            tensors |= group.make()[0]
        read = {name.removeprefix("blocks.0."): tensor for name, tensor in tensors.items()}
        weights = assemble(BlockWeights, read.__getitem__)
        weights = replace(weights, smooth=1 + 0.1 * self.randn(2, CONFIG.dim).abs())
        text, repeats = self.context.text[:TEXT_ROWS], TEXT_TOKENS - TEXT_ROWS + 1
        given = assemble(ContextWeights, read.__getitem__), text, self.context.vision, repeats
        return weights, context_keys(reference_ops(), *given)

    @cache  # noqa: B019 - the scene lives as long as the tests
    @torch.inference_mode()
    def exact(self, layers):
        """Computes the tokens that the model gives, whose weights were not smoothed."""
        x = self.x
        for block in self.blocks[:layers]:
            x = block(x, self.modulation, self.context, self.rope)
        return x

    @cache  # noqa: B019
    def native(self, layers):
        return self.run(
            LaunchedBlocks(reference_ops(ATTENTION["fp8_f32"]), self.plain(layers)), layers
        )

    @torch.inference_mode()
    def run(self, runner, layers, kept=None, keys=None):
        given = self.x.clone(), self.modulation, keys or self.keys[:layers], self.rope
        return runner(Pass(*given, kept or len(self.x)))

    def plain(self, layers):
        """The weights without smoothing, so that `exact` is what they compute."""
        ones = torch.ones(2, CONFIG.dim)
        return [replace(weights, smooth=ones) for weights in self.weights[:layers]]


@pytest.fixture(scope="module")
def scene():
    return Scene()


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    return planned_package(tmp_path_factory.mktemp("planned") / "sm89", PADDED)


@pytest.fixture
def opened(package, tmp_path):
    """Opens what makes a block runner, as `load_package` does."""

    def open_one(program, fake, gpu=GPU, held=package):
        return open_program(held, program, gpu, tmp_path, lambda: STREAM, lambda version: fake)

    return open_one


def cosine(got, want):
    return torch.cosine_similarity(got.double().flatten(), want.double().flatten(), dim=0).item()


def assert_near(got, want, least=COSINE):
    assert got.shape == want.shape
    assert cosine(got, want) > least
    assert got.norm().item() == pytest.approx(want.norm().item(), rel=0.02)


# --- what is computed


@pytest.mark.parametrize("layers", [1, LAYERS])
@pytest.mark.parametrize("program", PROGRAMS)
def test_plans_are_near_the_model_and_near_our_own_kernels(scene, opened, program, layers):
    ops, weights = reference_ops(ATTENTION["fp8_f32"]), scene.plain(layers)
    got = scene.run(opened(program, FakeLibrary())(ops, weights), layers)
    assert_near(got, scene.exact(layers))
    assert_near(got, scene.native(layers))
    assert cosine(got, scene.x) < 0.99  # the blocks did something


def test_every_layer_runs_once_in_order_with_its_own_weights_and_keys(scene, opened):
    """Bit for bit what the plan's definition gives, called with tensors instead of addresses."""
    fake, segment = FakeLibrary(), Segment("block", PADDED, DEPLOY)
    got = scene.run(opened("tensorrt", fake)(reference_ops(), scene.weights), LAYERS)
    x = scene.x[None]
    tables = {"cos": scene.rope.cos[:, 0][None], "sin": scene.rope.sin[:, 0][None]}
    for weights, keys in zip(scene.weights, scene.keys, strict=True):
        last, count = TEXT_ROWS - 1, TEXT_TOKENS - TEXT_ROWS + 1
        text_k, text_v = (
            torch.cat([side[:last], side[last].expand(count, -1)])
            for side in (keys.text.k, keys.text.v)
        )
        tensors = {
            "x": x,
            "modulation": block_modulation(weights, scene.modulation)[None],
            "text_k": text_k[None],
            "text_v": text_v[None],
            "vision_k": keys.vision.k[:257][None],
            "vision_v": keys.vision.v[:257][None],
            **tables,
            **block_tensors(weights),
        }
        with torch.inference_mode():
            (x,) = segment(*(tensors[port.name] for port in segment.inputs))
    assert torch.equal(got, x[0])
    assert fake.runs == [("block", len(scene.x), STREAM)] * LAYERS


def test_smoothing_is_in_the_modulation_that_a_plan_is_given(scene, opened):
    ops = reference_ops(ATTENTION["fp8_f32"])
    got = scene.run(opened("hybrid", FakeLibrary())(ops, scene.weights[:3]), 3)
    want = scene.run(LaunchedBlocks(ops, scene.weights[:3]), 3)
    assert_near(got, want)
    other = scene.run(LaunchedBlocks(ops, scene.plain(3)), 3)
    assert cosine(got, want) > cosine(got, other)


def test_the_hybrid_runs_our_attention_between_its_plans(scene, opened):
    """Attention in 16 bits brings it nearer to blocks that have it than to those in 8."""
    fake, ops = FakeLibrary(), reference_ops(ATTENTION["fp8_f32"])
    wide = plain_attention(ops, sdpa)
    got = scene.run(opened("hybrid", fake)(wide, scene.weights[:2]), 2)
    tokens = len(scene.x)
    assert fake.runs == [("pre", tokens, STREAM), ("post", tokens, STREAM)] * 2
    near, far = (scene.run(LaunchedBlocks(each, scene.weights[:2]), 2) for each in (wide, ops))
    assert (got - near).norm() < (got - far).norm()
    assert_near(got, near)


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_first_tokens_are_returned_after_the_last_block(scene, opened, program):
    runner = opened(program, FakeLibrary())(reference_ops(), scene.weights[:3])
    whole = scene.run(runner, 3).clone()
    assert torch.equal(scene.run(runner, 3, kept=48), whole[:48])


@pytest.mark.parametrize("program", PROGRAMS)
def test_an_evaluation_leaves_nothing_to_the_next(scene, opened, program):
    runner = opened(program, FakeLibrary())(reference_ops(), scene.weights[:2])
    first = scene.run(runner, 2).clone()
    other = scene.run(runner, 2, keys=scene.keys[2:4])
    assert cosine(first, other) < 1 - 1e-4
    assert torch.equal(scene.run(runner, 2), first)


def test_plans_are_opened_once_however_often_the_weights_come_back(scene, opened):
    fake = FakeLibrary()
    make = opened("hybrid", fake)
    got = [scene.run(make(reference_ops(), scene.weights[:2]), 2) for _ in range(2)]
    assert torch.equal(*got)
    assert fake.asked == ["validity", "engine"] * 2  # of `pre` and `post`
    assert fake.compiled == [("pre", len(scene.x)), ("post", len(scene.x))]


# --- text and picture


@pytest.mark.parametrize("real", [1, 2, 63, 64, 65, 511, 512])
def test_keys_for_plans_are_those_of_all_rows(real):
    """There are as many keys as rows of text, and the softmax is that over weighted ones."""
    draw = torch.Generator().manual_seed(real)
    rows, others = (torch.randn(2, n, 256, generator=draw) for n in (real, 257))
    weight = torch.rand(256, generator=draw) + 0.5
    kept = ContextKeys(cross_keys(*rows, weight, 513 - real), cross_keys(*others, weight))
    got = PlanKeys(kept).of(kept)
    every = torch.cat([rows, rows[:, -1:].expand(-1, 512 - real, -1)], dim=1)
    whole = cross_keys(*every, weight)
    assert torch.equal(got["text_k"], whole.k[None])
    assert torch.equal(got["text_v"], whole.v[None])
    assert torch.equal(got["vision_k"], cross_keys(*others, weight).k[None, :257])
    assert torch.equal(got["vision_v"], others[1].bfloat16()[None])
    q, inverse = torch.randn(9, 256, generator=draw), torch.ones(9)
    weighted = cross_attention_reference(q, inverse, kept.text, kept.vision)
    expanded = cross_attention_reference(q, inverse, whole, kept.vision)
    torch.testing.assert_close(weighted, expanded)


def test_keys_for_plans_are_those_that_the_plan_for_them_makes(scene):
    """Its plan is not used: our own kernels make them for both programs."""
    block = scene.blocks[3]
    tensors = {}
    for group in groups(Quantization(OneBlock(block), E4M3)):
        tensors |= group.make()[0]
    tensors = {name.removeprefix("blocks.0."): tensor for name, tensor in tensors.items()}
    tensors |= {name: tensor[None] for name, tensor in tensors.items() if name.endswith(".q")}
    # ours round what they are given to BF16 first
    given = {"text": scene.context.text, "vision": scene.context.vision}
    tensors |= {name: tensor.bfloat16().float()[None] for name, tensor in given.items()}
    segment = Segment("context", PADDED, DEPLOY)
    want = segment(*(tensors[port.name] for port in segment.inputs))
    got = PlanKeys(scene.keys[3]).of(scene.keys[3])
    for port, tensor in zip(segment.outputs, want, strict=True):
        assert got[port.name].shape == tensor.shape
        # the plan rounds a product twice to BF16
        torch.testing.assert_close(got[port.name], tensor, rtol=2**-6, atol=0.02)


@pytest.mark.parametrize(("rows", "repeats"), [(37, 1), (37, 475), (512, 2), (600, 1)])
def test_text_of_another_length_is_refused(rows, repeats):
    keys = cross_keys(torch.ones(rows, 256), torch.ones(rows, 256), torch.ones(256), repeats)
    with pytest.raises(KernelError, match=f"take 512 rows of text.*got {rows + repeats - 1}"):
        PlanKeys(ContextKeys(keys, keys))


def test_a_picture_of_another_number_of_rows_is_refused(scene, opened):
    keys = cross_keys(torch.ones(17, 256), torch.ones(17, 256), torch.ones(256))
    runner = opened("tensorrt", FakeLibrary())(reference_ops(), scene.weights[:1])
    with pytest.raises(
        KernelError, match=r"block.plan wants vision_k \[1, 257, 256\].* got \[1, 17"
    ):
        scene.run(runner, 1, keys=[replace(scene.keys[0], vision=keys)])


def test_a_block_has_all_inputs_of_the_plan_but_those_of_the_clip(scene):
    found = block_tensors(scene.weights[0])
    names = {port.name for port in Segment("block", PADDED, DEPLOY).inputs}
    clip = {"x", "modulation", "cos", "sin", "text_k", "text_v", "vision_k", "vision_v"}
    assert set(found) == names - clip
    assert torch.equal(
        found["up.q"].view(torch.int8)[0], scene.weights[0].up.rows.q.view(torch.int8)
    )
    assert found["up.q"].data_ptr() == scene.weights[0].up.rows.q.data_ptr()  # no copy
    assert torch.equal(found["norm3_scale"], scene.weights[0].norm3_scale)


# --- what cannot be run


def test_a_program_that_the_package_does_not_have_is_refused(opened, tmp_path):
    held = planned_package(tmp_path / "sm90", PADDED, {"absent": "TensorRT-RTX has no sm90."})
    with pytest.raises(
        Unavailable, match=r"sm90 has no TensorRT program: TensorRT-RTX has no sm90"
    ):
        opened("tensorrt", FakeLibrary(), held=held)


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_machine_without_a_gpu_is_refused(opened, program):
    says = f"--program {program} needs a GPU, and there is none: use --program native"
    with pytest.raises(Unavailable, match=says):
        opened(program, FakeLibrary(), gpu=None)


def test_a_gpu_that_cannot_run_the_plans_is_refused_before_any_weight_is_read(opened):
    fake = FakeLibrary("INVALID", 2)
    with pytest.raises(Unavailable, match=r"block.plan cannot run on RTX 4090.*UNSUPPORTED_CC"):
        opened("tensorrt", fake)
    assert fake.asked == ["validity"]


def test_the_library_is_asked_for_in_the_version_of_the_plans(package, tmp_path):
    asked = []

    def find(version):
        asked.append(version)
        raise Unavailable("not here")

    with pytest.raises(Unavailable, match="not here"):
        open_program(package, "hybrid", GPU, tmp_path, lambda: STREAM, find)
    assert asked == [VERSION]


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_clip_with_too_many_tokens_is_refused(scene, opened, program):
    runner = opened(program, FakeLibrary())(reference_ops(), scene.weights[:1])
    rope = rope_tables((4, 6, 8), False, CPU)
    x = torch.randn(len(rope.cos), 256)
    with pytest.raises(BadRequest, match=f"has {len(x)} tokens; .* takes 64 to {RANGE.most}"):
        runner(Pass(x, scene.modulation, scene.keys[:1], rope, len(x)))
