"""Golden files of quantised formats and LoRA dialects: what the reference programs made of them.

Beside a file NAME.safetensors, NAME.pt or NAME.gguf lies NAME.expected.safetensors (NAME with its
ending for GGUF) with the FP32 result under converted names. LoRAs are added, at strength 1, to the
plain weights of the same folder that have all that they change (docs/reference/formats.md 8).
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from engine.errors import BadCheckpoint
from engine.golden.check import Check, compare
from engine.models.formats.weights import StoredWeights
from engine.models.lora import Lora, merge
from engine.models.lora_names import is_lora
from engine.models.tensorfile import TensorFile

EXPECTED = ".expected.safetensors"
SOURCES = (".safetensors", ".pt", ".gguf")
ROUNDING = 1e-6  # of a tensor's largest value, where sums are formed in another order
_ROTATED = "rotated"  # in the name of a format


def belongs(path: Path) -> bool:
    """Tells if a file is a result of such a set, or what results of its folder are made from."""
    if path.name.endswith(EXPECTED) or _expected(path) is not None:
        return True
    return path.suffix == ".safetensors" and path in _bases(path.parent)


def checks(path: Path) -> Iterator[Check]:
    """A check for each tensor of a result; none for the other files, which are read for them."""
    if not path.name.endswith(EXPECTED):
        return
    stem = path.name.removesuffix(EXPECTED)
    names = [stem] if stem.endswith(".gguf") else [stem + suffix for suffix in SOURCES]
    source = next((one for name in names if (one := path.with_name(name)).is_file()), None)
    if source is None:
        yield Check(f"{path.name}: no {' or '.join(names)} beside it", None, None, False)
        return
    wanted = load_file(path)
    file = TensorFile(source, top_key="module")
    if any(is_lora(name) for name in file):
        yield from _lora_checks(source, wanted)
    else:
        yield from _weight_checks(source.name, StoredWeights(file), wanted)


def _weight_checks(
    source: str, stored: StoredWeights, wanted: dict[str, Tensor]
) -> Iterator[Check]:
    for name in sorted(set(stored) | set(wanted)):
        if name not in wanted or name not in stored:
            where = "expected" if name not in stored else "stored"
            yield Check(f"{source}: {name} is only {where}", None, None, False)
            continue
        want = wanted[name]
        if not stored[name].fits(tuple(want.shape)):
            shapes = f"{list(stored[name].shape)} cannot be {list(want.shape)}"
            yield Check(f"{source}: {name}: {shapes}", None, None, False)
            continue
        got = torch.full(want.shape, torch.nan)
        stored.read(name, got)
        share = ROUNDING if _ROTATED in stored[name].kind else 0.0
        yield _compare(source, name, got, want, share)


def _lora_checks(source: Path, wanted: dict[str, Tensor]) -> Iterator[Check]:
    bases = [
        held for base in _bases(source.parent) if wanted.keys() <= (held := load_file(base)).keys()
    ]
    if not bases:
        yield Check(f"{source.name}: no weights beside it to add it to", None, None, False)
        return
    lora = Lora(source)
    lora.check({name: tuple(weight.shape) for name, weight in bases[0].items()})
    for name in sorted(set(bases[0]) - set(wanted)):
        if lora.changes(name):
            yield Check(f"{source.name}: {name} should not change", None, None, False)
    for name in sorted(wanted):
        got = bases[0][name].float().clone()
        merge([lora], name, got)
        yield _compare(source.name, name, got, wanted[name], ROUNDING)


def _compare(source: str, name: str, got: Tensor, want: Tensor, share: float) -> Check:
    largest = float(want.abs().max()) if want.numel() else 0.0
    return compare(f"{source}: {name}", got.numpy(), want.numpy(), share * largest)


def _expected(path: Path) -> Path | None:
    """The result that is made from a file, if it is there."""
    if path.suffix not in SOURCES:
        return None
    stem = path.name if path.suffix == ".gguf" else path.stem
    found = path.with_name(stem + EXPECTED)
    return found if found.is_file() else None


def _bases(folder: Path) -> list[Path]:
    """Plain weights that LoRAs of the folder may be added to: no result is made of them alone."""
    loras = [
        path for path in sorted(folder.iterdir())
        if path.suffix in SOURCES and _expected(path) is not None and _holds_lora(path)
    ]  # fmt: skip
    if not loras:
        return []
    plain = [
        path for path in sorted(folder.glob("*.safetensors"))
        if not path.name.endswith(EXPECTED) and _expected(path) is None
    ]  # fmt: skip
    wanted = set[str]().union(*(_names(_expected(path) or path) for path in loras))
    return [path for path in plain if wanted <= _names(path)]


def _holds_lora(path: Path) -> bool:
    if path.suffix != ".pt":
        return any(is_lora(name) for name in _names(path))
    try:
        return any(is_lora(name) for name in TensorFile(path, top_key="module"))
    except BadCheckpoint:
        return False


def _names(path: Path) -> set[str]:
    """The names in a safetensors file; none of a file that cannot be read, which is told itself."""
    if path.suffix != ".safetensors" or not path.is_file():
        return set()
    try:
        with safe_open(path, "pt") as file:
            return set(file.keys())
    except (SafetensorError, OSError):
        return set()
