"""A worker serves on the virtual GPU: kernels are checked and chosen, the clip's memory is planned,
every step is launched, and the reply is an MP4.
"""

import asyncio
import base64

import pytest

from engine.config import state_dir
from engine.demo.presets import NANO_HOME
from engine.machine.ladder import LADDER
from engine.media.video import probe_video
from engine.worker.renderer import renderer_of
from engine.worker.scratch import Scratch
from engine.worker.service import Worker
from handler import respond
from kernels.arch import ARCHS
from kernels.attention import ATTENTION, variants
from kernels.gemm import GEMM
from tests.support.nano_clips import CPU, nano_package
from tests.support.virtual_program import GPU_BYTES, VirtualProgram
from tests.support.workers import FRAMES, endpoint, job, left_in

pytestmark = pytest.mark.slow


def ask(worker, given):
    return asyncio.run(respond(worker, given, [].append))


@pytest.fixture(params=ARCHS, ids=lambda arch: arch.name)
def program(request):
    return VirtualProgram(request.param)


@pytest.fixture
def worker(program, tmp_path):
    chosen = program.chosen(nano_package(program.bank.arch))
    given = endpoint(tmp_path, models=NANO_HOME, state=state_dir())
    made = Worker(given, Scratch(given.scratch))
    made.start(lambda endpoint: renderer_of(chosen, endpoint, CPU, program.make))
    yield made
    made.close()


def test_a_job_becomes_an_mp4_by_kernels_that_were_chosen_and_a_plan(program, worker, tmp_path):
    arch, bank = program.bank.arch, program.bank
    given = job(tmp_path, recipe="official", steps=2, cfg=4.0, seed=3, prompt="a dancer")
    plan = ask(worker, job(tmp_path, "job-0", action="validate"))["memory"]
    assert (plan["does"], plan["free_bytes"]) == (LADDER[0].does, GPU_BYTES)

    # every kernel that there is a choice of was held against its definition, and none was wrong
    choices = {choice.op: choice for choice in program.choices.ops}
    attention = choices[f"attention.{arch.attention}"]
    assert [v.name for v in attention.variants] == [
        name for name, spec in ATTENTION.items() if spec in variants(arch.attention, arch)
    ]
    assert {v.fault for choice in choices.values() for v in choice.variants} == {""}
    timed = [choice for choice in choices.values() if len(choice.variants) > 1]
    assert program.timed >= sum(len(choice.variants) for choice in timed) > 0
    for choice in timed:
        fastest = min(v.ms for v in choice.variants)
        first = choice.variants[0]
        chosen = next(v for v in choice.variants if v.name == choice.chosen)
        assert (chosen.ms == fastest) or (chosen is first and first.ms * 0.98 <= fastest)

    bank.launches.clear()
    reply = ask(worker, given)
    video = base64.b64decode(reply["video"], validate=True)
    (tmp_path / "out.mp4").write_bytes(video)
    found = probe_video(tmp_path / "out.mp4")
    assert (found.frames, found.width, found.height) == (FRAMES, 96, 64)
    assert reply["gpu"] == f"virtual {arch.name}"
    assert left_in(worker) == []

    # blocks of 2 steps with guidance: each launches attention once
    attended = ATTENTION[attention.chosen].name
    assert {n for n in bank.launches if n.startswith("attention.")} == {attended}
    layers = program.chosen(nano_package(arch)).package.manifest.model.layers
    assert bank.launches[attended] == 2 * 2 * layers
    ways = {f"gemm.{choices[op].chosen}" for op in choices if op.startswith("gemm.")}
    multiplied = {n.rpartition(".")[0] for n in bank.launches if n.startswith("gemm.")}
    assert multiplied == ways and ways <= {f"gemm.{name}" for name in GEMM}
    assert {"cross_attention"} < {*bank.launches}

    # the same job once more: another clip would mean that something is left of the first
    assert ask(worker, given)["video"] == reply["video"]
