"""Stages of a job kept by `--stages DIR`: skeleton, latents, inputs of the linears, timings."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save
from torch import Tensor, nn

from engine.errors import OutputError
from engine.flow import Conditions, SegmentDrift, Source
from engine.media.mp4 import encode_mp4
from kernels.whole_file import whole_file

log = logging.getLogger(__name__)

SKELETON, LATENTS = "skeleton.mp4", "latents.safetensors"
ACTIVATIONS, TIMINGS = "activations.safetensors", "timings_ms.json"
DRIFT = "drift.json"
NAMES = (SKELETON, LATENTS, ACTIVATIONS, TIMINGS, DRIFT)


class StageDump:
    """Writes stages into a folder; does nothing without a folder. Raises `OutputError`."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._seen: dict[str, tuple[Tensor, Tensor, int]] = {}  # by linear, over all segments
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                with TemporaryDirectory(dir=folder, prefix=".probe-"):
                    pass
            except OSError as error:
                raise OutputError(f"{folder} cannot hold stages: {error.strerror}.") from error
            for name in NAMES:
                if (folder / name).is_dir():
                    raise OutputError(f"{folder / name} is a folder, where a file shall be.")

    def keep_skeleton(self, source: Source) -> None:
        """Writes the skeleton, and removes what a longer clip left here of its later segments."""
        if self.folder is not None:
            for older in self.folder.glob("latents-*.safetensors"):
                older.unlink(missing_ok=True)
            encode_mp4([source.skeleton], source.fps, self.folder / SKELETON)

    def keep_latents(self, conditions: Conditions, latents: Tensor, segment: int = 1) -> None:
        """Writes `latents.safetensors`: finished latents and all that the transformer was told.

        Those of later segments go to `latents-2.safetensors` and so on.
        """
        if self.folder is None:
            return
        held = {
            "latents": latents,
            "text": conditions.text,
            "vision": conditions.vision,
            "reference": conditions.reference,
            "pose": conditions.pose,
        }
        if conditions.negative is not None:
            held["negative"] = conditions.negative
        if conditions.history is not None:
            held["history"] = conditions.history
        if (roles := conditions.roles) is not None:
            held |= {
                "reference_mask": roles.reference,
                "driving_mask": roles.driving,
                "additional": roles.additional,
                "additional_masks": roles.additional_masks,
            }
        tensors = {name: tensor.cpu().contiguous() for name, tensor in held.items()}
        self._keep(LATENTS if segment == 1 else f"latents-{segment}.safetensors", save(tensors))

    @contextmanager
    def recording(self, model: nn.Module | None) -> Iterator[None]:
        """Writes `activations.safetensors` at the end of the block.

        For each channel that enters a linear it holds the largest magnitude and the mean square
        over the whole job. A package has no linears to watch.
        """
        if self.folder is None:
            yield
            return
        if model is None:
            log.warning("%s is kept by the exact model alone (--checkpoint)", ACTIVATIONS)
            yield
            return
        seen = self._seen
        hooks = [
            module.register_forward_pre_hook(_recorder(name, seen))
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        tensors = {}
        for name, (largest, squares, rows) in seen.items():
            tensors[f"{name}.absmax"] = largest.cpu()
            tensors[f"{name}.mean_square"] = (squares / rows).float().cpu()
        self._keep(ACTIVATIONS, save(tensors))

    def keep_drift(self, report: Sequence[SegmentDrift]) -> None:
        """Writes the colours of a long clip's segments; of a clip without figures, nothing."""
        if self.folder is not None:
            (self.folder / DRIFT).unlink(missing_ok=True)
            if report:
                text = json.dumps([asdict(one) for one in report], indent=1)
                self._keep(DRIFT, f"{text}\n".encode())

    def keep_timings(self, laps_ms: Mapping[str, float]) -> None:
        if self.folder is not None:
            text = json.dumps({stage: round(ms, 1) for stage, ms in laps_ms.items()}, indent=1)
            self._keep(TIMINGS, f"{text}\n".encode())

    def _keep(self, name: str, data: bytes) -> None:
        assert self.folder is not None
        path = self.folder / name
        try:
            with whole_file(path) as draft:
                draft.write_bytes(data)
        except OSError as error:
            raise OutputError(f"{path} cannot be written: {error}.") from error


def _recorder(name: str, seen: dict[str, tuple[Tensor, Tensor, int]]):  # noqa: ANN202 - a hook
    def record(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).float()
        largest = x.abs().amax(dim=0)
        squares, rows = x.square().sum(dim=0, dtype=torch.float64), len(x)
        if name in seen:
            past_largest, past_squares, past_rows = seen[name]
            largest = torch.maximum(largest, past_largest)
            squares, rows = squares + past_squares, rows + past_rows
        seen[name] = largest, squares, rows

    return record
