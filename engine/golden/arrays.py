"""The arrays of a golden .npz file under their names."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Arrays = Mapping[str, NDArray]


def read_arrays(path: Path) -> Arrays:
    """All arrays of the file. Raises what numpy raises for a damaged one."""
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}
