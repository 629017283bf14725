"""A package from a file of any format has that format's error and the package's own, as squares,
or that of the format alone where its codes are copied.
"""

import math

import pytest

from tests.support.layouts import LAYOUTS
from tests.support.nano_layouts import (
    FORMS,
    NAMES,
    linears,
    lost,
    nano_weights,
    package_of,
    stored,
    write,
)

COPIED = {
    "fp8e4nv": ("FP8 scale_weight", "FP8 comfy_quant", "FP8 rows", "FP8 cast", "MXFP8",
                "MXFP8 in U8, untold"),
    "i8r": ("ConvRot",),
}  # fmt: skip
OTHERS = [layout for layout in LAYOUTS if layout not in NAMES]


@pytest.fixture(scope="module")
def from_fp32(tmp_path_factory):
    """What the linears of packages from FP32 have lost, by form."""
    path = write("FP32", nano_weights(), tmp_path_factory.mktemp("exact"))
    assert lost(stored(path), nano_weights()) == 0
    return {form: lost(linears(package_of(path, form)), nano_weights()) for form in FORMS}


@pytest.mark.slow
@pytest.mark.parametrize("layout", [*NAMES, *OTHERS])
def test_a_package_from_any_layout_of_the_nano_model_loses_what_its_format_says(
    tmp_path, from_fp32, layout
):
    path = write(layout, nano_weights(), tmp_path)
    own = lost(stored(path), nano_weights())
    for form in FORMS:
        made = package_of(path, form)
        is_copied = layout in COPIED[form.name]
        assert len(made.copied) == (8 * 6 if is_copied else 0)
        got = lost(linears(made), nano_weights())
        expected = own if is_copied else math.hypot(own, from_fp32[form])
        # rounding to steps that often are those of the file's groups loses less
        assert 0.93 * expected <= got <= 1.05 * expected, form
