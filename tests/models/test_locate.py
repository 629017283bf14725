"""The best name of a model is found wherever people put it; what cannot be looked into is told."""

import pytest

from engine.errors import MissingModel
from engine.models.locate import IMAGE_ENCODER, VAE, find_model
from tests.support.permissions import bound_by_modes, shared_folder


@pytest.mark.parametrize("folder", VAE.folders)
def test_a_model_is_found_in_its_folder_and_anywhere_else(tmp_path, folder):
    path = tmp_path / folder / "wan_2.1_vae.safetensors"
    path.parent.mkdir(exist_ok=True)
    path.touch()
    assert find_model(tmp_path, VAE) == path


def test_the_best_name_wins_over_the_nearest_folder(tmp_path):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / VAE.names[1]).touch()
    (tmp_path / VAE.names[0]).touch()
    assert find_model(tmp_path, VAE) == tmp_path / VAE.names[0]


def test_a_missing_model_is_told_with_the_names_that_would_do(tmp_path):
    (tmp_path / "clip_vision_h.safetensors").mkdir()  # a folder is not a model
    with pytest.raises(MissingModel, match=r"No image encoder .* clip_vision_h\.safetensors"):
        find_model(tmp_path, IMAGE_ENCODER)


@pytest.mark.parametrize("name", ["none", "a\0b", "file"])
def test_a_models_folder_that_is_none_is_told(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(MissingModel, match="There is no models folder"):
        find_model(tmp_path / name, VAE)


def test_a_models_folder_with_too_long_a_name_is_told(tmp_path):
    with pytest.raises(MissingModel, match=r"^The VAE cannot be .*: File name too long\.$"):
        find_model(tmp_path / ("m" * 256), VAE)


@pytest.mark.parametrize("closed", [".", "vae"])
def test_a_folder_that_may_not_be_entered_is_named(closed):
    with shared_folder() as models:
        (models / "vae").mkdir()
        (models / "vae" / VAE.names[0]).touch()
        (models / closed).chmod(0)
        with (
            bound_by_modes(),
            pytest.raises(MissingModel, match=rf"{models}\S* cannot be read: Permission denied\.$"),
        ):
            find_model(models, VAE)
        (models / closed).chmod(0o755)
