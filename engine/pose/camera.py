"""The pinhole camera that joints are drawn with: x right, y down, z forward, millimetres."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from engine.pose.arrays import Doubles

FIELD_OF_VIEW_DEGREES = 55.0  # across the longer side; what motion capture assumes


@dataclass(frozen=True, slots=True)
class Camera:
    """Focal lengths and principal point, in pixels. A point (X, Y, Z) appears at fx X / Z + cx."""

    fx: float
    fy: float
    cx: float
    cy: float

    @property
    def matrix(self) -> Doubles:
        """The intrinsic matrix [3, 3]."""
        return np.array([[self.fx, 0.0, self.cx], [0.0, self.fy, self.cy], [0.0, 0.0, 1.0]])


def base_camera(height: int, width: int) -> Camera:
    """The camera of a canvas that was fitted to no picture (docs/reference/pose.md 5.1)."""
    focal = max(height, width) / (2 * math.tan(math.radians(FIELD_OF_VIEW_DEGREES / 2)))
    return Camera(focal, focal, width / 2, height / 2)


def camera_from_matrix(matrix: ArrayLike) -> Camera:
    """The camera of an intrinsic matrix [3, 3] without skew."""
    intrinsics = np.asarray(matrix, np.float64)
    fx, fy = float(intrinsics[0, 0]), float(intrinsics[1, 1])
    return Camera(fx, fy, float(intrinsics[0, 2]), float(intrinsics[1, 2]))
