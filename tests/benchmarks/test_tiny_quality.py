"""Clips of the tiny model in 8 bits, uncalibrated, against the exact ones: as it is, and with
channels far larger than the rest (docs/reference/rotation.md 2).
"""

from dataclasses import replace

import pytest

from benchmarks.quality import suite
from benchmarks.quality.suite import measure_scene, tiny_scenes
from tests.support.compiled import STATE

LEAST_DB = 50.0  # the official recipe, which multiplies by guidance what conditions do not share
LEAST_OUTLIERS_DB = 45.0  # both recipes, the worst frame


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """What `int8` packages with the default attention make, by scene and recipe."""
    folder = tmp_path_factory.mktemp("tiny")
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SCAIL_STATE", str(STATE))
        patch.setattr(suite, "attentions", lambda arch: ["int8fp8", "sdpa"])
        for scene in tiny_scenes(folder):
            for row in measure_scene(replace(scene, builds=("int8",)), folder / scene.name):
                if row.attention == "int8fp8":
                    found[row.scene, row.recipe] = row
    return found


def test_the_official_recipe_stays_near_the_exact_clip(rows):
    assert rows["tiny", "official"].psnr_db >= LEAST_DB


@pytest.mark.parametrize("recipe", ["production", "official"])
def test_outliers_cost_little(rows, recipe):
    assert rows["outliers", recipe].worst_psnr_db >= LEAST_OUTLIERS_DB
