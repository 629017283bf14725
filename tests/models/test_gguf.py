"""GGUF files are read by our own walk of their header, and a header that lies is refused."""

import struct

import gguf
import numpy as np
import pytest
import torch

from engine.errors import BadCheckpoint
from engine.models.checkpoint import Checkpoint
from engine.models.formats.gguf_blocks import LOSS
from engine.models.formats.weights import StoredWeights
from engine.models.gguf_walk import TYPES, walk
from engine.models.tensorfile import TensorFile
from tests.support.checkpoints import assert_equal, loaded, small_weights
from tests.support.layouts import GGUF_TYPES, gguf_of


def test_the_sizes_of_blocks_are_those_of_the_package():
    for number, kind in TYPES.items():
        known = gguf.GGMLQuantizationType(number)
        assert (known.name, *gguf.GGML_QUANT_SIZES[known]) == tuple(kind)
    assert set(LOSS) == {kind.name for kind in TYPES.values() if kind.values > 1}


def text(value):
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def entry(name, kind, value):
    return text(name) + struct.pack("<I", kind) + value


def row(name, dims, kind, offset):
    sizes = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return text(name) + sizes + struct.pack("<IQ", kind, offset)


def container(rows, data=b"", entries=(), tensors=None, count=None, version=3, magic=b"GGUF"):
    tensors = len(rows) if tensors is None else tensors
    count = len(entries) if count is None else count
    head = magic + struct.pack("<IQQ", version, tensors, count) + b"".join([*entries, *rows])
    return head + bytes(-len(head) % 32) + data


F32, Q8_0 = 0, 8
ONE = row("a", (4, 2), F32, 0)
DATA = np.arange(8, dtype="<f4").tobytes()


def test_the_walk_finds_tensors_words_and_shapes(tmp_path):
    path = tmp_path / "m.gguf"
    shape = struct.pack("<IQ4i", 5, 4, 2, 1, 2, 2)
    entries = [
        entry("general.architecture", 8, text("wan")),
        entry("comfy.gguf.orig_shape.a", 9, shape),
        entry("list", 9, struct.pack("<IQ", 8, 2) + text("x") + text("y")),
        entry("flag", 7, b"\1"),
        entry("rate", 12, struct.pack("<d", 0.5)),
    ]
    path.write_bytes(container([ONE, row("b", (32, 3), Q8_0, 32)], DATA + bytes(102), entries))
    header = walk(path)
    assert [(t.name, t.type.name, t.shape, t.nbytes) for t in header.tensors] == [
        ("a", "F32", (2, 4), 32),
        ("b", "Q8_0", (3, 32), 102),
    ]
    assert header.texts == {"general.architecture": "wan"}
    assert header.shapes == {"a": (2, 1, 2, 2)}
    assert header.unused_bytes == 0
    file = TensorFile(path)
    with file.open("a") as tensor:
        assert torch.equal(tensor, torch.arange(8.0).view(2, 1, 2, 2))
    out = torch.full((3, 32), torch.nan)
    StoredWeights(file).read("b", out)
    assert torch.equal(out, torch.zeros(3, 32))


HUGE = 2**63
HOSTILE = {
    "no GGUF": (container([ONE], DATA, magic=b"GGML"), r"begins with b'GGML'"),
    "of the first version": (container([ONE], DATA, version=1), "GGUF of version 1; 2 or 3"),
    "of another byte order": (container([ONE], DATA, version=3 << 24), "version 50331648"),
    "no tensors": (container([], DATA), "has 0 tensors and 0 entries"),
    "tensors without end": (container([ONE], DATA, tensors=HUGE), "has 9223372036854775808 tens"),
    "more tensors than there are": (container([ONE], tensors=9), "are left for it|cannot be read"),
    "entries without end": (container([ONE], DATA, count=HUGE), "and 9223372036854775808 entries"),
    "a name without end": (
        container([struct.pack("<Q", HUGE) + b"a"], DATA), "has a text of 9223372036854775808 b",
    ),
    "a huge name": (container([row("a" * 2000, (4,), F32, 0)], DATA), "has a text of 2000 bytes"),
    "a huge text": (
        container([ONE], DATA, [entry("x", 8, struct.pack("<Q", 1 << 40))]), "has a text of 1099",
    ),
    "an array without end": (
        container([ONE], DATA, [entry("x", 9, struct.pack("<IQ", 4, HUGE))]), "are left for it",
    ),
    "texts without end": (
        container([ONE], DATA, [entry("x", 9, struct.pack("<IQ", 8, HUGE))]),
        "are left for it|has a text of",
    ),
    "an array of arrays": (
        container([ONE], DATA, [entry("x", 9, struct.pack("<IQ", 9, 1))]), "array of a type 9",
    ),
    "an unknown entry": (container([ONE], DATA, [entry("x", 99, b"")]), "a type 99 that GGUF does"),
    "the same entry twice": (
        container([ONE], DATA, [entry("x", 7, b"\1"), entry("x", 7, b"\0")]), "tells x twice",
    ),
    "a name that is no text": (container([row(b"\xff\xfe", (4,), F32, 0)], DATA), "cannot be read"),
    "no size": (container([row("a", (4, 0), F32, 0)], DATA), r"has a of the shape \[0, 4\]"),
    "a size beyond any file": (container([row("a", (HUGE, 2), F32, 0)], DATA), "of the shape"),
    "sizes whose product wraps": (
        container([row("a", (1 << 33, 1 << 33), F32, 0)], DATA), "of the shape",
    ),
    "a negative size": (container([row("a", (2**64 - 4, 2), F32, 0)], DATA), "of the shape"),
    "axes without end": (
        container([text("a") + struct.pack("<I", 1 << 31)], DATA), "with 2147483648 axes",
    ),
    "an unknown type": (container([row("a", (4,), 77, 0)], DATA), "in a type 77 that is not read"),
    "a name with a line in it": (
        container([row("a\nb", (4, 2), F32, 0)], DATA), r"has a tensor of the name 'a\\nb'",
    ),
    "a type that is gone": (container([row("a", (32,), 4, 0)], DATA), "in a type 4 that is not"),
    "half a block": (container([row("a", (33, 2), Q8_0, 0)], DATA * 9), "rows are multiples of 32"),
    "a place beyond the file": (container([row("a", (4, 2), F32, 1 << 40)], DATA), "is cut short"),
    "a place that wraps": (container([row("a", (4, 2), F32, 2**64 - 32)], DATA), "is cut short"),
    "a place off the grid": (
        container([row("a", (4, 2), F32, 4)], DATA * 2), "a at no multiple of 32 bytes",
    ),
    "cut short": (container([ONE], DATA[:-1]), "is cut short: a ends at byte"),
    "overlapping": (
        container([row("a", (16,), F32, 0), row("b", (16,), F32, 32)], DATA * 4),
        "has a and b in the same bytes",
    ),
    "in the same place": (container([ONE, row("b", (4, 2), F32, 0)], DATA), "in the same bytes"),
    "twice": (container([ONE, row("a", (4, 2), F32, 32)], DATA * 2), "has a twice"),
    "aligned to 3": (
        container([ONE], DATA, [entry("general.alignment", 4, struct.pack("<I", 3))]), "to 3 bytes",
    ),
    "aligned to nothing": (
        container([ONE], DATA, [entry("general.alignment", 4, struct.pack("<I", 0))]), "to 0 bytes",
    ),
    "aligned to a text": (
        container([ONE], DATA, [entry("general.alignment", 8, text("32" * 900))]), "aligns its",
    ),
    "of another shape": (
        container([ONE], DATA,
                  [entry("comfy.gguf.orig_shape.a", 9, struct.pack("<IQ2i", 5, 2, 3, 3))]),
        r"tells the shape \(3, 3\) for a, which has 8 values",
    ),
    "of a negative shape": (
        container([ONE], DATA,
                  [entry("comfy.gguf.orig_shape.a", 9, struct.pack("<IQ2i", 5, 2, -2, -4))]),
        "tells the shape",
    ),
    "of a shape for nothing": (
        container([ONE], DATA,
                  [entry("comfy.gguf.orig_shape.z", 9, struct.pack("<IQ2i", 5, 2, 2, 4))]),
        "for z, which has no values",
    ),
    "one of several": (
        container([ONE], DATA, [entry("split.count", 2, struct.pack("<H", 3))]), "one of 3 parts",
    ),
    "a header of megabytes": (
        container([ONE], DATA, [entry(f"x{n}", 8, text("y" * (1 << 20))) for n in range(9)]),
        "are left for it",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_header_that_cannot_be_so_ends_in_a_sentence(tmp_path, case):
    data, message = HOSTILE[case]
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    with pytest.raises(BadCheckpoint, match=rf"^m\.gguf .*(?:{message})") as caught:
        TensorFile(path)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("kept", [0, 3, 4, 11, 30, 200, 0.5, 0.9999])
def test_a_file_that_was_cut_anywhere_is_told(tmp_path, kept):
    path = tmp_path / "m.gguf"
    gguf_of("Q8_0", small_weights(), path)
    data = path.read_bytes()
    path.write_bytes(data[: kept if isinstance(kept, int) else int(len(data) * kept)])
    with pytest.raises(BadCheckpoint, match=r"^m\.gguf"):
        Checkpoint(path)


def test_bytes_that_belong_to_nothing_are_told(tmp_path, caplog):
    path = tmp_path / "m.gguf"
    path.write_bytes(container([ONE], DATA + bytes(500)))
    TensorFile(path)
    assert "m.gguf: 500 bytes in it belong to no tensor" in caplog.text


def test_scales_that_are_not_finite_are_told_of_the_weight(tmp_path):
    path = tmp_path / "m.gguf"
    gguf_of("Q8_0", small_weights(), path)
    place = next(t.start for t in walk(path).tensors if t.name == "blocks.0.ffn.0.weight")
    data = bytearray(path.read_bytes())
    data[place : place + 2] = np.float16(np.nan).tobytes()
    path.write_bytes(data)
    with pytest.raises(BadCheckpoint, match=r"blocks\.0\.ffn\.0\.weight holds values that are not"):
        loaded(path)


def test_scales_of_0_for_codes_that_differ_are_told(tmp_path):
    path = tmp_path / "m.gguf"
    gguf_of("Q4_0", small_weights(), path)
    place = next(t for t in walk(path).tensors if t.name == "blocks.0.ffn.0.weight")
    data = bytearray(path.read_bytes())
    for block in range(place.start, place.start + place.nbytes, 18):
        data[block : block + 2] = bytes(2)
    path.write_bytes(data)
    with pytest.raises(BadCheckpoint, match=r"blocks\.0\.ffn\.0\.weight has scales of 0 for rows"):
        loaded(path)


@pytest.mark.parametrize("kind", GGUF_TYPES)
def test_weights_of_zeros_are_zeros(tmp_path, kind):
    weights = small_weights()
    weights["blocks.0.ffn.0.weight"] = torch.zeros(192, 128)
    gguf_of(kind, weights, tmp_path / "m.gguf")
    assert not loaded(tmp_path / "m.gguf")["blocks.0.ffn.0.weight"].any()


@pytest.mark.parametrize("arch", ["wan", "pig", "cow"])
def test_the_name_of_an_architecture_is_not_asked_for(tmp_path, arch):
    means = gguf_of("Q8_0", small_weights(), tmp_path / "m.gguf", arch)
    assert_equal(loaded(tmp_path / "m.gguf"), means)


def rewritten(tmp_path, change):
    """The small model as a GGUF file whose weights and entries were changed by a writer."""
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "wan")
    for name, weight in change(small_weights(), writer).items():
        writer.add_tensor(name, weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "m.gguf"


def test_axes_that_a_writer_joined_and_ones_that_it_dropped_come_back(tmp_path):
    def change(weights, writer):
        held = {}
        for name, weight in weights.items():
            if weight.ndim == 5:
                writer.add_array(f"comfy.gguf.orig_shape.{name}", list(weight.shape))
                held[name] = weight.reshape(-1, 16)
            else:
                held[name] = weight[0] if name.endswith("modulation") else weight
        return held

    assert_equal(loaded(rewritten(tmp_path, change)), small_weights())


def test_quantised_weights_whose_axes_were_joined_are_read_row_by_row(tmp_path):
    weight, kind = torch.randn(6, 16), gguf.GGMLQuantizationType.Q8_0
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "wan")
    packed = gguf.quantize(weight.view(3, 32).numpy(), kind)
    writer.add_tensor("x.weight", packed, raw_dtype=kind)
    writer.add_array("comfy.gguf.orig_shape.x.weight", [6, 4, 1, 2, 2])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    stored = StoredWeights(TensorFile(tmp_path / "m.gguf"))
    want = torch.from_numpy(gguf.dequantize(packed, kind)).view(6, 4, 1, 2, 2)
    got = torch.full((6, 4, 1, 2, 2), torch.nan)
    stored.read("x.weight", got)
    assert torch.equal(got, want)
    part = torch.full((3, 4, 1, 2, 2), torch.nan)
    stored.read("x.weight", part, first=3)
    assert torch.equal(part, want[3:])


def test_a_file_without_the_last_step_of_its_tool_is_told(tmp_path):
    def change(weights, writer):
        return {name: weight for name, weight in weights.items() if "patch" not in name}

    with pytest.raises(BadCheckpoint, match="of a Wan model and no patch embedding: wr"):
        Checkpoint(rewritten(tmp_path, change))


@pytest.mark.parametrize("name", ["SCAIL-2-Q8_0.gguf", "model.safetensors", "model.pt"])
def test_a_gguf_file_is_known_by_its_first_bytes_whatever_it_is_called(tmp_path, name):
    means = gguf_of("Q8_0", small_weights(), tmp_path / "m.gguf")
    (tmp_path / "m.gguf").rename(tmp_path / name)
    assert_equal(loaded(tmp_path / name), means)
