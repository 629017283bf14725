"""What masks are made with: a network that follows what it was shown, and its memory of a clip.

The network is called as transformers' Sam2VideoModel is. Whoever has that call can stand in for
it. Source: docs/reference/masks.md 7.3.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Outputs = dict[int, dict[str, dict[int, dict[str, object]]]]  # person, kind, frame, name


class Answer(Protocol):
    """What the network says of one frame."""

    pred_masks: Tensor  # [P, 1, h, w] logits, or [P, h, w]
    object_score_logits: Tensor  # [P, 1]; above 0 the person is there


class Session(Protocol):
    """The network's memory of one clip, as transformers' Sam2VideoInferenceSession keeps it."""

    processed_frames: dict[int, Tensor] | None
    obj_with_new_inputs: list[int]
    output_dict_per_obj: Outputs
    frames_tracked_per_obj: dict[int, dict[int, object]]
    cache: object  # of what was computed of the newest frame, whoever is looked for

    def obj_id_to_idx(self, obj_id: int, /) -> int: ...
    def add_point_inputs(self, obj_idx: int, frame_idx: int, inputs: dict, /) -> None: ...
    def add_mask_inputs(self, obj_idx: int, frame_idx: int, inputs: Tensor, /) -> None: ...
    def remove_point_inputs(self, obj_idx: int, frame_idx: int, /) -> None: ...
    def remove_mask_inputs(self, obj_idx: int, frame_idx: int, /) -> None: ...


class Network(Protocol):
    """A model that follows persons from frame to frame."""

    def __call__(
        self, inference_session: Session, *, frame: Tensor, frame_idx: int, reverse: bool
    ) -> Answer: ...


@dataclass(frozen=True, slots=True)
class Segmenter:
    """A network that is ready, and what has to be known of it."""

    name: str  # as people call it, and how it is told from others
    network: Network
    opened: Callable[[int, int], Session]  # height and width of a video -> a session
    side: int  # pixels of the square that frames are stretched to
    kept: int  # frames whose outputs the network may look back at
    device: torch.device
    dtype: torch.dtype
