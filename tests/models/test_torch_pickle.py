"""A pickle of the official program loads, and no NumPy object is made of any file."""

import io
import pickle
import zipfile

import numpy as np
import pytest
import torch
from torch.serialization import get_safe_globals

from engine.errors import BadCheckpoint
from engine.models import torch_pickle
from engine.models.checkpoint import Checkpoint
from engine.models.lora import Lora
from engine.models.tensorfile import TensorFile
from engine.models.torch_pickle import load_plain
from tests.support.checkpoints import save, small_weights

LAYER = "model.diffusion_model.transformer.layers.{n}.{linear}.lora_layer{part}.{half}.weight"
SAT = {
    ("attention.query_key_value", ".0"): "self_attn.q",
    ("attention.query_key_value", ".1"): "self_attn.k",
    ("attention.query_key_value", ".2"): "self_attn.v",
    ("attention.dense", ""): "self_attn.o",
    ("cross_attention.query", ""): "cross_attn.q",
    ("cross_attention.key_value", ".0"): "cross_attn.k",
    ("cross_attention.key_value", ".1"): "cross_attn.v",
    ("cross_attention.dense", ""): "cross_attn.o",
    ("mlp.dense_h_to_4h", ""): "ffn.0",
    ("mlp.dense_4h_to_h", ""): "ffn.2",
}


def allowed():
    """What pickles may name in this process: PyTorch has entries of its own, none is NumPy's."""
    held = set(get_safe_globals())
    assert "numpy" not in str(held)
    return held


def random_states():
    return {
        "np_rng_state": np.random.RandomState(0).get_state(),
        "scalar": np.float64(0.5),
        "torch_rng_state": torch.get_rng_state(),
        "random_rng_state": (3, (1, 2, 3), None),
        "iteration": 7,
        "learning_rate": 1e-4,
    }


def old_numpy(path):
    """The names that NumPy had until its second version."""
    with zipfile.ZipFile(path) as archive:
        held = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in held.items():
            changed = data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
            archive.writestr(name, changed if name.endswith("data.pkl") else data)


@pytest.mark.parametrize("numpy", ["new", "old"])
def test_a_lora_of_the_official_program_is_merged(tmp_path, numpy, caplog):
    weights = small_weights()
    module, want = {}, dict(weights)
    for n in range(2):
        for (linear, part), name in SAT.items():
            ours = f"blocks.{n}.{name}.weight"
            rows, columns = weights[ours].shape
            down, up = torch.randn(4, columns), torch.randn(rows, 4)
            for half, tensor in (("down", down), ("up", up)):
                module[LAYER.format(n=n, linear=linear, part=part, half=half)] = tensor
            want[ours] = weights[ours] + 0.5 * up @ down
    torch.save({"module": module, **random_states()}, tmp_path / "lora.pt")
    if numpy == "old":
        old_numpy(tmp_path / "lora.pt")
    checkpoint = Checkpoint(
        save(weights, tmp_path / "m.safetensors"), loras=[Lora(tmp_path / "lora.pt", 0.5)]
    )
    for name, weight in want.items():
        got = torch.empty(weight.shape)
        checkpoint.read_into(name, got)
        assert torch.allclose(got, weight, atol=1e-5), name
    assert "np_rng_state, scalar, torch_rng_state" in caplog.text


def test_no_numpy_object_is_made_and_nothing_stays_allowed(tmp_path):
    path = tmp_path / "m.pt"
    torch.save({"module": {"a": torch.ones(2)}, **random_states()}, path)
    before = allowed()
    held, _ = load_plain(path)
    assert allowed() == before

    def kinds(value):
        if isinstance(value, dict):
            return set().union(*(kinds(one) for one in value.values()))
        if isinstance(value, tuple | list):
            return set().union(set(), *(kinds(one) for one in value))
        return {type(value)}

    assert kinds(held) == {torch.Tensor, torch_pickle._Nothing, int, float, str, type(None)}
    (nothing,) = {type(held["scalar"])}
    assert nothing.__slots__ == () and not hasattr(held["scalar"], "__dict__")
    file = TensorFile(path, top_key="module")
    assert list(file) == ["a"]
    assert file.beside[:2] == ["np_rng_state", "scalar"]


def with_pickle(path, data):
    torch.save({"module": {"a": torch.ones(2)}}, path)
    with zipfile.ZipFile(path) as archive:
        held = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, old in held.items():
            archive.writestr(name, data if name.endswith("data.pkl") else old)


def call(module, name, arguments):
    """A pickle that calls a function with a tuple of numbers."""
    out = io.BytesIO()
    out.write(b"\x80\x02c" + module + b"\n" + name + b"\n(")
    for number in arguments:
        out.write(b"J" + number.to_bytes(4, "little"))
    out.write(b"tR.")
    return out.getvalue()


class Runs:
    def __reduce__(self):
        return (print, ("code ran",))


PICKLES = {
    "numpy's ufuncs": call(b"numpy", b"zeros", [2**30]),
    "numpy's loader": call(b"numpy", b"load", []),
    "a huge bytearray": call(b"builtins", b"bytearray", [2**31 - 1]),
    "a huge tensor": call(b"torch", b"Tensor", [2**31 - 1]),
    "code": pickle.dumps({"module": Runs()}, protocol=2),
    "os": call(b"os", b"getcwd", []),
    "a stack that is empty": b"\x80\x02R.",
    "a memo that is empty": b"\x80\x02h\x05.",
    "no end": b"\x80\x02}",
    "nothing": b"",
}


@pytest.mark.parametrize("case", PICKLES)
def test_a_pickle_that_names_more_than_tensors_is_refused(tmp_path, case, capsys):
    path = tmp_path / "m.pt"
    with_pickle(path, PICKLES[case])
    before = allowed()
    with pytest.raises(BadCheckpoint, match=r"^m\.pt is damaged, cut short or holds more than ten"):
        TensorFile(path)
    assert "code ran" not in capsys.readouterr().out
    assert allowed() == before


def test_a_pickle_of_endless_steps_or_bytes_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "m.pt"
    with_pickle(path, b"\x80\x02" + b"N0" * 2000 + b"N.")
    monkeypatch.setattr(torch_pickle, "_MOST_STEPS", 1000)
    with pytest.raises(BadCheckpoint, match="describes its tensors in more than 1000 steps"):
        TensorFile(path)
    monkeypatch.setattr(torch_pickle, "_MOST_BYTES", 1000)
    with pytest.raises(BadCheckpoint, match="describes its tensors in 4004 bytes; at most 1000"):
        TensorFile(path)
