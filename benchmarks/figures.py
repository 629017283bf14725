"""What a suite found, in the one form in which runs are compared and results are written down."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Figure:
    """One number of a suite."""

    name: str  # unique within the suite, the same in every run of the same thing
    value: float
    unit: str  # "ms", "s", "MiB", "dB", "TFLOPS", ...
    noise: float  # half of the spread between runs, in the same unit; 0 for what has none
    better: Literal["lower", "higher"]
    source: Literal["measured", "estimate"]
