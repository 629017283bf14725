"""The GPUs and driver levels of RunPod, under the names that it knows them by.

An endpoint asks for pools, a test runs on a GPU. ADA_32_PRO is Blackwell in spite of its name, and
two pools of older GPUs hold slices of a Blackwell one. RunPod's own pages disagree about the L4,
and its table of pools has no ADA_32_PRO, which its catalogue still answers with (October 2026).
Source: docs/reference/runpod.md 0.1, 0.2 and B.1.
"""

import json
from collections.abc import Iterable, Mapping
from difflib import get_close_matches

# A slice has a quarter or half of the processors and of the 96 GB, and is Blackwell all the same.
_QUARTER, _HALF = (
    f"NVIDIA RTX PRO 6000 Blackwell Server Edition MIG {part}" for part in ("1g.24gb", "2g.48gb")
)
# Maps a pool to its GPUs, and these to their compute capability.
POOLS: Mapping[str, Mapping[str, tuple[int, int]]] = {
    "AMPERE_16": {"NVIDIA RTX A4000": (8, 6), "NVIDIA RTX A4500": (8, 6),
                  "NVIDIA RTX 4000 Ada Generation": (8, 9),
                  "NVIDIA RTX 2000 Ada Generation": (8, 9)},
    "AMPERE_24": {"NVIDIA L4": (8, 9), "NVIDIA RTX A5000": (8, 6),
                  "NVIDIA GeForce RTX 3090": (8, 6), _QUARTER: (12, 0)},
    "ADA_24": {"NVIDIA GeForce RTX 4090": (8, 9), "NVIDIA L4": (8, 9)},
    "ADA_32_PRO": {"NVIDIA GeForce RTX 5090": (12, 0)},
    "AMPERE_48": {"NVIDIA RTX A6000": (8, 6), "NVIDIA A40": (8, 6)},
    "ADA_48_PRO": {"NVIDIA L40S": (8, 9), "NVIDIA L40": (8, 9),
                   "NVIDIA RTX 6000 Ada Generation": (8, 9), _HALF: (12, 0)},
    "AMPERE_80": {"NVIDIA A100 80GB PCIe": (8, 0), "NVIDIA A100-SXM4-80GB": (8, 0)},
    "ADA_80_PRO": {"NVIDIA H100 80GB HBM3": (9, 0), "NVIDIA H100 PCIe": (9, 0),
                   "NVIDIA H100 NVL": (9, 0)},
    "HOPPER_141": {"NVIDIA H200": (9, 0)},
    "BLACKWELL_96": {"NVIDIA RTX PRO 6000 Blackwell Server Edition": (12, 0),
                     "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": (12, 0),
                     "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition": (12, 0)},
    "BLACKWELL_180": {"NVIDIA B200": (10, 0)},
}  # fmt: skip
# Rented as Pods; no pool of endpoints has them.
PODS: Mapping[str, tuple[int, int]] = {
    "NVIDIA GeForce RTX 3070": (8, 6), "NVIDIA GeForce RTX 3080": (8, 6),
    "NVIDIA GeForce RTX 3080 Ti": (8, 6), "NVIDIA GeForce RTX 3090 Ti": (8, 6),
    "NVIDIA GeForce RTX 4070 Ti": (8, 9), "NVIDIA GeForce RTX 4080": (8, 9),
    "NVIDIA GeForce RTX 4080 SUPER": (8, 9), "NVIDIA GeForce RTX 5080": (12, 0),
    "NVIDIA RTX 4000 SFF Ada Generation": (8, 9), "NVIDIA RTX 5000 Ada Generation": (8, 9),
    "NVIDIA RTX A2000": (8, 6), "NVIDIA A30": (8, 0), "NVIDIA B300 SXM6 AC": (10, 3),
}  # fmt: skip
GPUS = {name: capability for pool in POOLS.values() for name, capability in pool.items()}
# A host reports one of these. 12.7 is a level of drivers: there is no such toolkit.
CUDA_VERSIONS = ("11.8", *(f"12.{minor}" for minor in range(10)), "13.0")

_SHOWN = 60  # characters of a value in a message


def pool_of(gpu: str) -> str:
    """Finds the pool of a GPU; of several the one with the fewest kinds of GPU."""
    return min((pool for pool in POOLS if gpu in POOLS[pool]), key=lambda pool: len(POOLS[pool]))


def instead(name: str, known: Iterable[str]) -> str:
    """Ends a sentence about an unknown name with the known one that is near, or with all.

    A number in common, as the 4090, says more than letters do.
    """
    known, name = list(known), name[:_SHOWN]
    numbers = {word for word in name.split() if any(letter.isdigit() for letter in word)}
    near = [one for one in known if numbers & {*one.split()}] or get_close_matches(name, known)
    return f"is {near[0]} meant?" if near else f"known are {', '.join(known)}."


def instead_of_pool(name: str) -> str:
    """Ends a sentence about an unknown pool with its whole family, whose names are alike."""
    family = [pool for pool in POOLS if pool.split("_")[0] == name.upper().split("_")[0]]
    ada, blackwell = pool_of("NVIDIA GeForce RTX 4090"), pool_of("NVIDIA GeForce RTX 5090")
    homes = f"the RTX 4090 is in {ada}, the RTX 5090 in {blackwell}"
    return f"known are {', '.join(family or POOLS)}; {homes}."


def short(value: object) -> str:
    """Writes a value of a JSON file for a message: in ASCII, and not longer than a line."""
    text = json.dumps(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
