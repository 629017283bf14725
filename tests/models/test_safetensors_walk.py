"""The header of a safetensors file is read as the library does, and one that lies is refused."""

import json

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from engine.errors import BadCheckpoint
from engine.models.safetensors_walk import BITS, walk
from engine.models.tensorfile import TensorFile

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.float8_e8m0fnu, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint64, torch.uint32, torch.uint16, torch.uint8, torch.bool, torch.complex64,
]  # fmt: skip


def test_tensors_of_every_type_are_what_the_library_reads(tmp_path):
    path = tmp_path / "m.safetensors"
    held = {f"t{n}": torch.arange(6).reshape(2, 3).to(dtype) for n, dtype in enumerate(DTYPES)}
    held |= {"empty": torch.empty(0, 5), "scalar": torch.tensor(2.5)}
    save_file(held, path, metadata={"format": "pt", "a": "b"})
    file = TensorFile(path)
    assert file.metadata == {"format": "pt", "a": "b"}
    with safe_open(path, "pt") as library:
        assert set(file) == set(library.keys())
        for name in file:
            part, want = library.get_slice(name), library.get_tensor(name)
            assert (file.dtype(name), list(file.shape(name))) == (
                part.get_dtype(),
                part.get_shape(),
            )
            with file.open(name) as tensor:
                assert tensor.dtype == want.dtype
                assert torch.equal(tensor.view(torch.uint8) if want.ndim else tensor,
                                   want.view(torch.uint8) if want.ndim else want)  # fmt: skip
            raw = want.flatten().view(torch.uint8).numpy().tobytes()
            assert file.few_bytes(name) == raw


def written(path, header, data=bytes(32), length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    path.write_bytes(size.to_bytes(8, "little") + text + data)
    return path


def entry(dtype="F32", shape=(2, 4), offsets=(0, 32)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_data_behind_a_header_of_odd_length_are_read(tmp_path):
    data = torch.arange(8.0).numpy().tobytes()
    text = json.dumps({"a": entry()}).encode()
    path = written(tmp_path / "m.safetensors", text + b" " * (1 - len(text) % 2), data)
    with TensorFile(path).open("a") as tensor:
        assert torch.equal(tensor, torch.arange(8.0).view(2, 4))


HOSTILE = {
    "no JSON": b"{nothing",
    "a list": b"[]",
    "nested without end": b'{"a":' + b"[" * 100_000,
    "no entry": {"a": 3},
    "no type": {"a": {"shape": [8], "data_offsets": [0, 32]}},
    "an unknown type": {"a": entry("F128")},
    "a type that is a list": {"a": entry(["F32"])},
    "a negative size": {"a": entry(shape=(-2, -4))},
    "a size that is text": {"a": entry(shape=("2", 4))},
    "a size that is true": {"a": entry(shape=(True, 8))},
    "a huge size": {"a": entry(shape=(1 << 70,))},
    "sizes whose product wraps": {"a": entry(shape=(1 << 32, 1 << 32, 8), offsets=(0, 32))},
    "axes without end": {"a": entry(shape=(1,) * 5000, offsets=(0, 4))},
    "another number of bytes": {"a": entry(shape=(2, 3))},
    "a place behind the file": {"a": entry(offsets=(32, 64))},
    "a place before the data": {"a": entry(offsets=(-32, 0))},
    "a place that ends before it begins": {"a": entry(offsets=(32, 0))},
    "three places": {"a": entry(offsets=(0, 16, 32))},
    "a gap": {"a": entry("U8", (8,), (0, 8)), "b": entry("U8", (8,), (24, 32))},
    "an overlap": {"a": entry("U8", (20,), (0, 20)), "b": entry("U8", (20,), (12, 32))},
    "bytes at the end": {"a": entry("U8", (8,), (0, 8))},
    "metadata of numbers": {"__metadata__": {"a": 1}, "a": entry()},
    "metadata that are a list": {"__metadata__": [], "a": entry()},
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_header_that_the_library_refuses_is_refused(tmp_path, case):
    path = written(tmp_path / "m.safetensors", HOSTILE[case])
    with pytest.raises(BadCheckpoint, match=r"^m\.safetensors is damaged or cut short") as caught:
        TensorFile(path)
    assert len(str(caught.value)) < 300
    with pytest.raises(SafetensorError):
        safe_open(path, "pt")


def test_a_name_that_is_there_twice_is_refused(tmp_path):
    one = json.dumps(entry()).encode()
    path = written(tmp_path / "m.safetensors", b'{"a":' + one + b',"a":' + one + b"}")
    with pytest.raises(BadCheckpoint, match="its header gives a name twice"):
        TensorFile(path)


@pytest.mark.parametrize("length", [1 << 62, 1 << 40, 2**64 - 1, 5])
def test_a_header_of_a_length_that_is_not_its_own_is_refused(tmp_path, length):
    path = written(tmp_path / "m.safetensors", {"a": entry()}, length=length)
    with pytest.raises(BadCheckpoint, match="is damaged or cut short"):
        TensorFile(path)


def test_the_types_are_those_of_the_library(tmp_path):
    for dtype, bits in BITS.items():
        data = bytes(bits)  # eight values
        header = {"a": entry(dtype, (8,), (0, bits))}
        path = written(tmp_path / "m.safetensors", header, data)
        with safe_open(path, "pt") as library:
            assert library.get_slice("a").get_dtype() == dtype
        assert walk(path).tensors["a"].nbytes == bits
