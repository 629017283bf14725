"""Reads how the operator set the endpoint up: folders, whether a CPU will do, the bucket."""

import os
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from engine.config import models_dir, state_dir
from engine.errors import BadRequest, Unavailable
from engine.jobs.job import Bucket
from engine.worker.bucket import place_of
from engine.worker.joblog import Redactor

_PACKAGES = (Path("/opt/scail/packages"), Path("/runpod-volume/packages"))  # image, volume
_INPUTS = "/runpod-volume/input:/ComfyUI/input"
_BUCKET = ("BUCKET_ENDPOINT_URL", "BUCKET_ACCESS_KEY_ID", "BUCKET_SECRET_ACCESS_KEY")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """The set-up of one endpoint, from the environment of its worker."""

    package: Path  # or a folder of packages
    models: Path
    state: Path
    scratch: Path  # holds the files of jobs while they run
    inputs: tuple[Path, ...]  # folders whose files a job may name
    allows_cpu: bool
    on_runpod: bool  # False: on somebody's own machine
    bucket: Bucket | None = field(repr=False)
    redact: Redactor = field(repr=False)

    def check(self) -> None:
        """Raises `Unavailable` for settings that contradict each other, or that say nothing."""
        given = [name for name in _BUCKET if os.environ.get(name)]
        if given and self.bucket is None:
            missing = " and ".join(name for name in _BUCKET if name not in given)
            raise Unavailable(f"{' and '.join(given)} is set, {missing} is not: set all or none.")
        if self.bucket is not None:
            try:
                place_of(self.bucket)
            except BadRequest as error:
                raise Unavailable(str(error)) from error


def read_endpoint() -> Endpoint:
    """Reads the endpoint from the environment."""
    environment = os.environ
    roots = environment.get("SCAIL_INPUTS", _INPUTS).split(":")
    return Endpoint(
        package=_package(environment.get("SCAIL_PACKAGE")),
        models=models_dir(),
        state=state_dir(),
        scratch=Path(environment.get("TMPDIR") or tempfile.gettempdir()) / "scail-jobs",
        inputs=tuple(Path(root) for root in roots if root),
        allows_cpu=environment.get("SCAIL_ALLOW_CPU") == "1",
        on_runpod="RUNPOD_WEBHOOK_GET_JOB" in environment,
        bucket=_bucket(*(environment.get(name) for name in (*_BUCKET, "BUCKET_NAME"))),
        redact=Redactor.of(environment),
    )


def _package(given: str | None) -> Path:
    if given:
        return Path(given)
    return next((folder for folder in _PACKAGES if folder.is_dir()), _PACKAGES[0])


def _bucket(
    url: str | None, key: str | None, secret: str | None, name: str | None
) -> Bucket | None:
    if not (url and key and secret):
        return None
    return Bucket(url, key, secret, name or None, is_operators=True)


def region_of(endpoint_url: str) -> str:
    """Finds the region in the address of a bucket; signatures must name it too."""
    named = re.search(r"\bs3[.-]([a-z]{2}(?:-[a-z]+)+-\d)\b", endpoint_url)
    return named[1] if named else "us-east-1"
