"""The files of a job from wherever they are, as one request for the pipeline."""

import base64

import pytest

from benchmarks.clip.scene import served
from engine.errors import BadMedia, EngineError
from engine.flow import Reference
from engine.worker.gather import Gathering, gather
from engine.worker.progress import JobProgress
from tests.support.job_bodies import scail2_job
from tests.support.scail2 import dance, labels, noise, npz, png, square

FILES = {
    "me.png": png(noise()), "dance.mp4": dance(), "mask.npz": npz(labels()),
    "who.png": png(square()), "back.png": png(noise()[::-1]), "of_back.png": png(square(left=8)),
}  # fmt: skip


@pytest.fixture
def to(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "job").mkdir()
    for name, data in FILES.items():
        (tmp_path / "there" / name).write_bytes(base64.b64decode(data))
    with served(tmp_path / "there") as network:
        progress = JobProgress(lambda _: None, None)
        yield Gathering(tmp_path / "job", (tmp_path / "there",), None, progress, network)


def held(way, name):
    return {"url": f"http://files.example/{name}", "path": name, "base64": FILES[name]}[way]


@pytest.mark.parametrize("way", ["url", "path", "base64"])
def test_all_media_of_a_job_come_as_addresses_files_or_base64(to, way):
    made = scail2_job(
        mode="replacement",
        image_url=held(way, "me.png") if way == "url" else None,
        **{} if way == "url" else {f"image_{way}": held(way, "me.png")},
        **{f"video_{way}": held(way, "dance.mp4"), f"mask_{way}": held(way, "mask.npz"),
           f"reference_mask_{way}": held(way, "who.png")},
        references=[{way: held(way, "back.png"), f"mask_{way}": held(way, "of_back.png")}],
    )  # fmt: skip
    request = gather(made, to)
    further = request.references[0]
    found = {
        "me.png": request.image, "dance.mp4": request.motion, "mask.npz": request.mask,
        "who.png": request.reference_mask, "back.png": further.image, "of_back.png": further.mask,
    }  # fmt: skip
    for name, path in found.items():
        assert path.read_bytes() == base64.b64decode(FILES[name])
        assert path.parent == to.folder
    assert request.mask.name == f"mask_{way}.npz"
    assert further.mask.name == f"references.0.mask_{way}.png"


def test_what_is_not_named_is_not_fetched(to):
    made = scail2_job(image_url=held("url", "me.png"), video_path="dance.mp4",
                      reference_path=["back.png"])  # fmt: skip
    request = gather(made, to)
    assert (request.mask, request.reference_mask) == (None, None)
    assert request.references == (Reference(to.folder / "reference_path.0.png"),)


def test_a_file_of_another_kind_is_refused_by_the_name_of_its_field(to):
    for fields, sentence in (
        ({"reference_path": ["dance.mp4"]}, "reference_path.0 is a video; a JPEG, PNG"),
        ({"mask_path": "none"}, "mask_path names no file"),
        ({"image_path": "mask.npz", "image_url": None}, "image_path is a ZIP or .npz file"),
        ({"video_path": "mask.npz"}, "video_path is a ZIP or .npz file"),
    ):
        given = {"image_url": held("url", "me.png"), "video_path": "dance.mp4"} | fields
        with pytest.raises(EngineError, match=sentence):
            gather(scail2_job(**given), to)
        for left in to.folder.iterdir():
            left.unlink()


def test_a_host_that_has_no_such_mask_is_named(to):
    made = scail2_job(image_url=held("url", "me.png"), mask_url="http://files.example/none.npz",
                      video_path="dance.mp4")  # fmt: skip
    with pytest.raises(BadMedia, match=r"mask_url: files.example answers 404"):
        gather(made, to)
