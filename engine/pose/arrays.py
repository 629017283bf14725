"""The array types of motion capture, and what each is used for."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]  # joints, keypoints, boxes, colours: what is kept and handed on
Doubles = NDArray[np.float64]  # fits, costs and crops, where rounding could decide a choice
AnyFloats = NDArray[np.floating]  # float32 or float64, as the caller needs it
Indices = NDArray[np.intp]  # rows, bones or pixels of another array
Bools = NDArray[np.bool_]  # which points are seen, which boxes are kept
Frame = NDArray[np.uint8]  # a picture [H, W, 3] RGB, or as the renderer draws it [H, W, 4] RGBA
Frames = Iterable[Frame]  # one clip, in order
