"""The suite of streamed blocks reads what a block is made of; wrong bytes have no speed."""

from math import prod

import pytest

from benchmarks.cold_start import streaming
from benchmarks.timing import WrongResult
from engine.denoise.block import BlockWeights, tensor_names
from engine.denoise.packed import packed_bytes
from tests.support.planned_clips import REAL


def test_its_blocks_are_those_of_the_14b_model():
    names = {f"blocks.0.{name}" for name in tensor_names(BlockWeights)}
    sizes = [entry.nbytes for entry in REAL.tensors if entry.name in names]
    assert sorted(streaming.SIZES) == sorted(sizes)
    assert all(prod(entry.shape) for entry in REAL.tensors)


def test_bytes_that_differ_have_no_speed(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "SIZES", [1_000_000, 4096, 100])
    path = tmp_path / "weights.bin"
    blocks = streaming.write_blocks(path)
    assert path.stat().st_size == streaming.BLOCKS * packed_bytes(streaming.SIZES)
    rate = streaming.measure_blocks(path, blocks, streaming.BLOCKS)
    assert rate > 0
    found = streaming.streaming_figures([streaming.ReadRow("blocks", rate, 0.0)])
    assert found[1].value == pytest.approx(40 * packed_bytes(streaming.SIZES) / 1e9 / rate)
    monkeypatch.setattr(streaming, "read", lambda *given, direct: Nothing())
    with pytest.raises(WrongResult, match="differs"):
        streaming.measure_blocks(path, blocks, streaming.BLOCKS)


class Nothing:
    """The report of a reading that read nothing."""

    cached_bytes = nbytes = 1
