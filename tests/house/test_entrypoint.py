"""The start of a container: `entrypoint.sh` with small programs in place of others."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


class Container:
    """Folders like those of a container, and programs that say how they were called."""

    def __init__(self, folder, user=10001):
        self.home, self.volume = folder / "home", folder / "volume"
        self.programs, self.calls = folder / "bin", folder / "calls"
        for path in (self.home, self.programs):
            path.mkdir()
        self.calls.touch()
        self.program("id", f"echo {user}")
        self.program("setpriv", 'while [[ $1 == --* ]]; do shift; done; exec "$@"')
        self.program("worker", "env")
        self.program("hf", "exit 9")
        self.program("python", "exit 9")

    def program(self, name, body):
        path = self.programs / name
        path.write_text(f'#!/bin/bash\necho {name} "$@" >> "{self.calls}"\n{body}\n')
        path.chmod(0o755)

    def package(self, place, at="preview/sm89", manifest=""):
        folder = place / "packages" / at
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(manifest, encoding="utf-8")
        (place / "models").mkdir(exist_ok=True)
        return place

    def start(self, *command, **settings):
        environment = {
            "PATH": f"{self.programs}:{os.environ['PATH']}",
            "SCAIL_HOME": str(self.home),
            "SCAIL_VOLUME": str(self.volume),
            "SCAIL_ARCH": "sm89",
        }
        return subprocess.run(
            ["bash", str(ROOT / "entrypoint.sh"), *(command or ("worker",))],
            env=environment | settings, capture_output=True, text=True, check=False, timeout=30,
        )  # fmt: skip

    def settings(self, **given):
        """Returns the environment that the worker finds."""
        done = self.start(**given)
        assert done.returncode == 0, done.stderr
        return dict(line.partition("=")[::2] for line in done.stdout.splitlines())

    def called(self, name):
        lines = self.calls.read_text("utf-8").splitlines()
        return [line for line in lines if line.partition(" ")[0] == name]


@pytest.fixture
def container(tmp_path):
    return Container(tmp_path)


def test_baked_weights_come_before_those_of_the_volume(container):
    baked = container.package(container.home / "weights")
    container.package(container.volume)
    found = container.settings()
    assert found["SCAIL_PACKAGE"] == f"{baked}/packages"
    assert found["SCAIL_MODELS"] == f"{baked}/models"


@pytest.mark.parametrize("at", ["preview/sm89", "scail2/sm89", "sm89"])
def test_a_package_is_found_whatever_its_kind_and_where_packages_once_lay(container, at):
    manifest = '{"schema": 2, "digest": "ab"}'
    baked = container.package(container.home / "weights", at, manifest)
    container.package(container.volume)
    assert container.settings()["SCAIL_PACKAGE"] == f"{baked}/packages"


def test_a_package_of_the_older_schema_is_built_again_where_a_checkpoint_is_named(container):
    container.package(container.volume, "sm89", '{"schema": 1, "digest": "ab"}')
    made = container.volume / "packages" / "scail2" / "sm89"
    container.program("python", f'mkdir -p "{made}"; touch "{made}/manifest.json"')
    for _ in range(2):
        assert container.start(SCAIL_CHECKPOINT="c.pt").returncode == 0
    assert len(container.called("python")) == 1


def test_a_package_of_the_older_schema_is_left_to_the_worker_where_none_can_be_built(container):
    container.package(container.volume, "sm89", '{"schema": 1, "digest": "ab"}')
    assert container.settings()["SCAIL_PACKAGE"] == f"{container.volume}/packages"


def test_the_model_cache_is_used_for_the_repository_that_is_named(container):
    hub = container.volume / "huggingface-cache" / "hub"
    cached = container.package(hub / "models--me--scail" / "snapshots" / "abc")
    volume = container.package(container.volume)
    assert container.settings(WEIGHTS_REPO="me/scail")["SCAIL_PACKAGE"] == f"{cached}/packages"
    assert container.settings(WEIGHTS_REPO="me/other")["SCAIL_PACKAGE"] == f"{volume}/packages"
    assert container.settings()["SCAIL_PACKAGE"] == f"{volume}/packages"
    assert container.called("hf") == []


def test_what_the_operator_names_is_not_looked_for(container):
    container.package(container.volume)
    found = container.settings(SCAIL_PACKAGE="/mine", SCAIL_MODELS="/too", WEIGHTS_REPO="me/scail")
    assert (found["SCAIL_PACKAGE"], found["SCAIL_MODELS"]) == ("/mine", "/too")


def test_named_models_stay_beside_a_found_package(container):
    container.package(container.volume)
    assert container.settings(SCAIL_MODELS="/mine")["SCAIL_MODELS"] == "/mine"


def test_a_package_of_another_architecture_is_none(container):
    container.package(container.volume)
    done = container.start("worker", SCAIL_ARCH="sm120")
    assert f"no package for sm120 in: {container.home}/weights {container.volume}." in done.stderr
    assert f"SCAIL_PACKAGE={container.volume}/packages\n" in done.stdout  # the worker judges it


def test_of_two_architectures_the_one_of_the_gpu_is_looked_for(container):
    both = {"SCAIL_ARCH": "sm86 sm80"}
    container.package(container.home / "weights", "preview/sm80")
    container.package(container.volume, "preview/sm86")
    for capability, place in (("8.0", container.home / "weights"), ("8.6", container.volume)):
        container.program("nvidia-smi", f"echo {capability}; echo 9.0")
        assert container.settings(**both)["SCAIL_PACKAGE"] == f"{place}/packages"
    container.program("nvidia-smi", "echo 7.5")  # of neither: whatever is there, and the worker
    assert container.settings(**both)["SCAIL_PACKAGE"] == f"{container.home}/weights/packages"


def test_the_image_build_fetches_both_architectures_and_asks_no_gpu(container):
    made = container.home / "weights/packages/preview/sm80"
    container.program("hf", f'mkdir -p "{made}"; touch "{made}/manifest.json"')
    container.program("nvidia-smi", "echo 8.0")
    done = container.start("fetch", WEIGHTS_REPO="me/scail", SCAIL_ARCH="sm86 sm80")
    assert done.returncode == 0, done.stderr
    (call,) = container.called("hf")
    for name in ("sm86", "sm80"):
        assert f"--include packages/*/{name}/* --include packages/{name}/*" in call
    assert container.called("nvidia-smi") == []


@pytest.mark.parametrize(("gpu", "built"), [("echo 8.0", ["sm80"]), ("exit 9", ["sm86", "sm80"])])
def test_a_checkpoint_is_built_for_the_gpu_and_for_both_where_none_is(container, gpu, built):
    container.volume.mkdir()
    container.program("python", "true")
    container.program("nvidia-smi", gpu)
    done = container.start(SCAIL_CHECKPOINT="c.pt", SCAIL_ARCH="sm86 sm80")
    assert done.returncode == 0, done.stderr
    assert container.called("python") == [
        f"python build_engine.py --arch {name} --checkpoint c.pt --out {container.volume}/packages"
        for name in built
    ]


def test_a_build_that_fails_for_the_first_architecture_starts_no_worker(container):
    container.volume.mkdir()
    container.program("nvidia-smi", "exit 9")
    done = container.start(SCAIL_CHECKPOINT="c.pt", SCAIL_ARCH="sm86 sm80")
    assert (done.returncode, len(container.called("python"))) == (9, 1)
    assert container.called("worker") == []


HF = """for last; do true; done
mkdir -p "$last/packages/scail2/sm89" "$last/models"
echo "$HF_TOKEN" > "$last/packages/scail2/sm89/manifest.json"
"""


def test_a_repository_is_fetched_to_the_volume_with_the_token(container):
    container.volume.mkdir()
    container.program("hf", HF)
    found = container.settings(WEIGHTS_REPO="me/scail", HF_TOKEN="hf_1", WEIGHTS_REVISION="v2")
    assert container.called("hf") == [
        "hf download me/scail --revision v2 --include packages/*/sm89/* --include packages/sm89/* "
        f"--include models/* --local-dir {container.volume}"
    ]
    assert (container.volume / "packages/scail2/sm89/manifest.json").read_text("utf-8") == "hf_1\n"
    assert found["SCAIL_PACKAGE"] == f"{container.volume}/packages"
    assert "HF_TOKEN" not in found  # the worker has no use for it
    assert found["HF_HUB_OFFLINE"] == "1"


def test_without_a_volume_a_repository_is_fetched_into_the_container(container):
    container.program("hf", HF)
    found = container.settings(WEIGHTS_REPO="me/scail")
    assert found["SCAIL_PACKAGE"] == f"{container.home}/weights/packages"


def test_the_image_build_fetches_into_the_image_and_starts_nothing(container):
    container.program("hf", HF)
    done = container.start("fetch", WEIGHTS_REPO="me/scail", HF_TOKEN="")
    assert (done.returncode, done.stdout) == (0, "")
    assert (container.home / "weights/packages/scail2/sm89/manifest.json").exists()


def test_a_repository_without_the_package_is_refused(container):
    container.program("hf", "true")
    done = container.start(WEIGHTS_REPO="me/scail")
    assert done.returncode == 1
    assert done.stderr.endswith(
        "entrypoint: me/scail has no packages/KIND/sm89 of this engine. Upload one.\n"
    )
    assert container.called("worker") == []


def test_a_failed_download_starts_no_worker(container):
    done = container.start(WEIGHTS_REPO="me/scail")
    assert done.returncode == 9
    assert container.called("worker") == []


def test_a_checkpoint_becomes_a_package_on_the_volume_once(container):
    container.volume.mkdir()
    made = container.volume / "packages" / "preview" / "sm89"
    container.program("python", f'mkdir -p "{made}"; touch "{made}/manifest.json"; env >&2')
    for _ in range(2):
        done = container.start(SCAIL_CHECKPOINT="/volume/a b.safetensors", SCAIL_LORA="l.pt:0.5")
        assert done.returncode == 0, done.stderr
    assert container.called("python") == [
        "python build_engine.py --arch sm89 --checkpoint /volume/a b.safetensors "
        f"--lora l.pt:0.5 --out {container.volume}/packages"
    ]


def test_several_loras_are_named_with_commas(container):
    container.volume.mkdir()
    container.program("python", "true")
    container.start(SCAIL_CHECKPOINT="c.pt", SCAIL_LORA="/a b/steps.pt:0.8,dpo.pt:1.0")
    assert container.called("python") == [
        "python build_engine.py --arch sm89 --checkpoint c.pt --lora /a b/steps.pt:0.8 "
        f"--lora dpo.pt:1.0 --out {container.volume}/packages"
    ]


def test_a_build_uses_the_kernels_of_the_image_and_takes_no_empty_lora(container):
    container.volume.mkdir()
    container.program("python", 'echo "state $SCAIL_STATE" >&2')
    done = container.start(SCAIL_CHECKPOINT="c.pt", SCAIL_LORA="", SCAIL_STATE="/mine")
    assert f"state {container.home}/build\n" in done.stderr
    assert "SCAIL_STATE=/mine\n" in done.stdout
    assert "--lora" not in container.called("python")[0]


def test_a_checkpoint_without_a_volume_is_refused(container):
    done = container.start(SCAIL_CHECKPOINT="c.pt")
    assert done.returncode == 1
    assert "SCAIL_CHECKPOINT is built onto a network volume. Attach one." in done.stderr


def test_a_failed_build_starts_no_worker(container):
    container.volume.mkdir()
    assert container.start(SCAIL_CHECKPOINT="c.pt").returncode == 9
    assert container.called("worker") == []


def test_root_becomes_a_user_without_rights(tmp_path):
    container = Container(tmp_path, user=0)
    container.package(container.volume)
    assert container.start("worker", "--flag").returncode == 0
    calls = container.called("setpriv")
    assert calls[-1] == (
        "setpriv --reuid=scail --regid=scail --init-groups --no-new-privs worker --flag"
    )
    assert container.called("worker") == ["worker --flag"]


def test_a_volume_for_root_alone_keeps_the_worker_root_and_says_so(tmp_path):
    container = Container(tmp_path, user=0)
    container.package(container.volume)
    container.program("setpriv", "exit 1")
    done = container.start()
    assert (
        f"only root may read {container.volume}/packages, so the worker stays root" in done.stderr
    )
    assert container.called("worker") == ["worker"]


def test_the_exit_code_and_the_signals_are_those_of_the_worker(container):
    container.package(container.volume)
    container.program("worker", "exit 3")
    assert container.start().returncode == 3
    container.program("worker", "echo $$; echo $PPID")
    shell, parent = container.start().stdout.split()
    assert int(parent) == os.getpid() != int(shell)  # it took the entrypoint's place


def test_an_entrypoint_without_an_architecture_does_not_start(container):
    done = container.start(SCAIL_ARCH="")
    assert done.returncode == 1
    assert "SCAIL_ARCH: is set by the image" in done.stderr
