"""A checkpoint of the size of the 14B model, from one layer's file: the disk holds 1.3 GB, not 33.

python -m tests.support.synthetic DIR [--weights int8]        what a build takes, as JSON
"""

import argparse
import json
import resource
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.build.make import write_weights
from engine.build.quantize import Quantization
from engine.config import SCAIL_14B, ModelConfig
from engine.denoise.block import WEIGHT_FORMS
from engine.models.checkpoint import Checkpoint
from engine.models.dit import Scail
from engine.models.formats.held import Codes, PackageForm
from engine.package.folder import PARTIAL, PackageWriter
from engine.package.manifest import WEIGHTS
from kernels.whole_file import whole_file

LAYER_FILE = "one-layer-bf16.safetensors"


class Repeated:
    """An `engine.build.quantize.WeightSource` with one layer of a checkpoint in place of many."""

    def __init__(self, one: Checkpoint, layers: int) -> None:
        self.config = replace(one.config, layers=layers)
        self._one = one

    def __iter__(self) -> Iterator[str]:
        for name in self._one:
            for n in range(self.config.layers) if name.startswith("blocks.") else (None,):
                yield name if n is None else name.replace("blocks.0.", f"blocks.{n}.", 1)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._one.shape(_stored(name))

    def read_into(self, name: str, out: Tensor) -> None:
        self._one.read_into(_stored(name), out)

    def kept_by(self, name: str) -> PackageForm | None:
        return self._one.kept_by(_stored(name))

    def codes(self, name: str) -> Codes | None:
        return self._one.codes(_stored(name))


def _stored(name: str) -> str:
    if not name.startswith("blocks."):
        return name
    return f"blocks.0.{name.split('.', 2)[2]}"


def write_layer(folder: Path, config: ModelConfig = SCAIL_14B, seed: int = 0) -> Path:
    """Normal BF16 weights of a model with one layer, all else full size. Kept if it is there."""
    path = folder / LAYER_FILE
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with torch.device("meta"):
            shapes = {n: w.shape for n, w in Scail(replace(config, layers=1)).state_dict().items()}
        draw = torch.Generator().manual_seed(seed)
        some = torch.randn(2**22, generator=draw).bfloat16()  # repeated: drawing all takes minutes
        tensors = {name: _filled(some, shape) for name, shape in shapes.items()}
        with whole_file(path) as draft:
            save_file(tensors, draft)
    return path


def _filled(some: Tensor, shape: torch.Size) -> Tensor:
    flat = some.repeat(-(-shape.numel() // len(some)))[: shape.numel()]
    return (flat * shape[-1] ** -0.5 if len(shape) > 1 else flat).view(shape)


def build(folder: Path, form: str, layers: int = SCAIL_14B.layers) -> dict[str, object]:
    """Writes the weights of a package and drops them. Peak memory is that of this process."""
    weights = Repeated(Checkpoint(write_layer(folder), layers=1), layers)
    home = folder / "synthetic"
    shutil.rmtree(f"{home}{PARTIAL}", ignore_errors=True)
    begin = time.perf_counter()
    with PackageWriter(home, f"synthetic {form}") as writer:
        write_weights(writer, Quantization(weights, WEIGHT_FORMS[form]))
        seconds = time.perf_counter() - begin
        written = (folder / f"synthetic{PARTIAL}" / WEIGHTS).stat().st_size
    shutil.rmtree(f"{home}{PARTIAL}")
    return {
        "weights": form,
        "layers": layers,
        "bytes": written,
        "seconds": round(seconds, 1),
        "mb_per_s": round(written / seconds / 1e6, 1),
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2),
        "threads": torch.get_num_threads(),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--weights", choices=WEIGHT_FORMS, default="int8")
    args = parser.parse_args(argv)
    print(json.dumps(build(args.folder, args.weights)))


if __name__ == "__main__":
    main()
