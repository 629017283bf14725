"""What a GPU costs while it works: RunPod's serverless prices, where they are known.

Prices are from RunPod's documentation as of August 2026 (docs/reference/runpod.md B.3,
docs/deploy.md). Model loading and idle time are billed too and are not in the price of a clip.
"""

from dataclasses import dataclass

SOURCE = "RunPod's documentation, August 2026"


@dataclass(frozen=True, slots=True)
class Price:
    """Of a GPU whose name holds one of these."""

    names: tuple[str, ...]  # as the driver says them: "NVIDIA GeForce RTX 4090", "NVIDIA H200"
    usd_per_s: float | None  # None: unknown
    source: str = SOURCE

    @property
    def usd_per_h(self) -> float | None:
        return None if self.usd_per_s is None else 3600 * self.usd_per_s


PRICES = (
    Price(("RTX 4090",), 0.00031),
    Price(("RTX 5090",), None, f"not in {SOURCE}"),
    Price(("A40", "RTX A6000"), 0.00034),
    Price(("L40S", "RTX 6000 Ada"), 0.00053),
    Price(("A100",), 0.00076),
    Price(("RTX PRO 6000",), 0.00111),
    Price(("H100",), 0.00116),
    Price(("H200",), 0.00155),
    Price(("B200",), 0.00240),
)
UNKNOWN = "no price of it is known"


def price_of(gpu: str | None) -> Price:
    """Of a GPU by the driver's name, whatever its case; None is a CPU.

    What is not in the table has no price: nothing is guessed from a similar name.
    """
    if gpu is None:
        return Price((), None, "a CPU is not sold by the clip")
    words = gpu.upper().replace("-", " ").split()
    for price in PRICES:
        if any(_holds(words, name.upper().split()) for name in price.names):
            return price
    return Price((gpu,), None, UNKNOWN)


def _holds(words: list[str], wanted: list[str]) -> bool:
    """Whole words in a row, so that "A40" is not found in "A4000"."""
    length = len(wanted)
    return any(words[n : n + length] == wanted for n in range(len(words) - length + 1))
