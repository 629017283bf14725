"""Runs every check and measurement that a GPU can answer, and keeps them in one JSON file.

Run by `first_hour.sh`. A step that fails or takes too long is recorded with what it said, and the
next one runs. Steps are programs that also run alone: their commands are in the file.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.record import write_json
from engine import command_line
from engine.config import state_dir
from engine.errors import UnsupportedGpu
from engine.machine.device import find_device
from engine.machine.gpu import find_gpu
from kernels.arch import ARCHS, SM89

ROOT = Path(__file__).resolve().parents[1]
DEMO = ("--image", "engine/demo/dancer.png", "--joints", "engine/demo/dance.npz")
DEVICE = re.compile(r"GPU-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
TAIL_LINES, TAIL_CHARS = 30, 6000


@dataclass(frozen=True, slots=True)
class HourStep:
    name: str
    answers: str  # the question
    command: tuple[str, ...]
    limit_s: float


@dataclass(frozen=True, slots=True)
class Done:
    step: str
    answers: str
    command: str
    ok: bool
    seconds: float
    found: tuple[object, ...]  # the JSON that it printed
    said: str  # the end of all else


def steps(
    arch: str, folder: Path, package: Path | None, models: Path | None, dry: bool
) -> list[HourStep]:
    """The steps in order of what is most worth knowing. `folder` takes what they make."""
    python, tiny = sys.executable, folder / "tiny"
    bench = (python, "benchmarks/run.py")
    clip = (python, "-m", "engine", "generate", *DEMO)
    small = ("--steps", "2", "--width", "64", "--height", "64", "--frames", "5")
    size = small if dry else ("--width", "256", "--height", "448")
    tried = ("--dry",) if dry else ()
    query = "name,driver_version,clocks.sm,clocks.max.sm,power.draw,power.limit,memory.used"
    found = [
        HourStep("info", "which GPU, driver and limits", (python, "-m", "engine", "info"), 60),
        HourStep("smi", "clocks, power and other programs",
            ("nvidia-smi", f"--query-gpu={query},memory.total", "--format=csv"), 60),
        HourStep("kernels", "do all load, is each right, how fast is it",
            (*bench, "gpu", "--out", str(folder / "gpu.jsonl"), *tried,
             *(("--only", "rms") if dry else ())), 1800),
        HourStep("twins", "does each kernel give what the virtual GPU computes, to the last bit",
            (*bench, "twins", "--out", str(folder / "twins.jsonl"), *tried,
             *(("--only", "rms") if dry else ())), 1800),
        HourStep("tiny package", "does a build work here",
            (python, "build_engine.py", "--preset", "tiny", "--arch", arch, "--out", str(tiny)),
            900),
        HourStep("clip", "does the whole program run",
            (*clip, *size, "--package", str(tiny), "--out", str(folder / "a.mp4")), 900),
        HourStep("forward", "which variants win, how long is a step, how much memory",
            (*bench, "forward", "--out", str(folder / "forward.jsonl"), *tried), 1800),
        HourStep("cold start", "how long until the first job and the first forward",
            (*bench, "cold-start", *(("--runs", "1") if dry else ())), 1800),
    ]  # fmt: skip
    if package is not None:
        held = ("--package", str(package), *(("--models", str(models)) if models else ()))
        out = ("--stages", str(folder / "stages"), "--out", str(folder / "b.mp4"))
        real = (*clip, "--recipe", "production", *held, *out)
        found.append(HourStep("real clip", "how long is a clip of a real package", real, 3600))
        cold = (*bench, "cold-start", *held)
        found.append(HourStep("real cold start", "the same with all weights", cold, 3600))
    return [step for step in found if not dry or step.name != "smi"]


def run(step: HourStep, away: Mapping[str, str], hidden: bool = False) -> Done:
    """Runs a step. `away`: texts of this machine, and what is written in their place. With `hidden`
    it is not shown the GPU.
    """
    begin = time.monotonic()
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if hidden else {})
    try:
        with subprocess.Popen(
            step.command, cwd=ROOT, env=environment, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, start_new_session=True,
        ) as process:  # fmt: skip
            try:
                out, _ = process.communicate(timeout=step.limit_s)
            except BaseException as error:
                os.killpg(process.pid, signal.SIGKILL)  # its own children too
                out, _ = process.communicate()
                if not isinstance(error, subprocess.TimeoutExpired):
                    raise
                out += f"\nstopped after {step.limit_s:.0f} s".encode()
        ok, text = process.returncode == 0, out.decode(errors="replace")
    except OSError as error:
        ok, text = False, f"{step.command[0]}: {error.strerror}"
    command = " ".join(step.command)
    for secret, shown in away.items():
        text, command = text.replace(secret, shown), command.replace(secret, shown)
    text = DEVICE.sub("GPU-", text)
    found, said = parsed(text)
    return Done(step.name, step.answers, command, ok, time.monotonic() - begin, found, said)


def parsed(text: str) -> tuple[tuple[object, ...], str]:
    """The JSON objects of an output that begin a line, and the end of the rest."""
    text, found, rest = text.replace("\r", "\n"), [], []
    while text:
        line, _, after = text.partition("\n")
        try:
            one, length = json.JSONDecoder().raw_decode(text if line.startswith("{") else "")
        except ValueError:
            rest.append(line)
        else:
            found.append(one)
            after = text[length:].removeprefix("\n")
        text = after
    return tuple(found), "\n".join(rest[-TAIL_LINES:])[-TAIL_CHARS:]


def main(argv: Sequence[str] | None = None) -> None:
    parser = command_line.Parser(
        prog="benchmarks/first_hour.py", description=(__doc__ or "").partition("\n")[0]
    )
    add = parser.add_argument
    add("--out", type=command_line.path, default=Path("first_hour.json"), metavar="FILE")
    add("--package", type=command_line.path, metavar="DIR", help="of build_engine.py, for this GPU")
    add("--models", type=command_line.path, metavar="DIR", help="VAE and encoders beside --package")
    add("--dry", action="store_true", help="on a CPU, tiny")
    args = parser.parse_args(argv)
    command_line.run(_measure, args, out_of_memory="Take a machine with more memory.")


def _measure(args: Namespace) -> None:
    """Runs the steps. Raises `UnsupportedGpu` where they would say nothing, and `OSError`."""
    gpu = find_gpu()
    if not args.dry:
        find_device()  # a GPU that PyTorch cannot use would be an hour on the CPU
    arch = next((a for a in ARCHS if gpu is not None and a.capability == gpu.capability), None)
    if arch is None and not args.dry:
        has = "there is no GPU" if gpu is None else f"{gpu.name} is of no architecture known"
        raise UnsupportedGpu(f"{has[0].upper()}{has[1:]} here. Use --dry to try the steps without.")
    done: list[Done] = []
    with TemporaryDirectory(prefix="first-hour-") as folder:
        chosen = steps((arch or SM89).name, Path(folder), args.package, args.models, args.dry)
        away = {
            folder: "TMP", str(ROOT): ".", str(state_dir()): "STATE", str(Path.home()): "~",
            os.uname().nodename: "HOST",
        }  # fmt: skip
        for step in chosen:
            done.append(run(step, away, hidden=args.dry))
            write_json(args.out, {"first_hour": [asdict(one) for one in done]})
            print(f"{'ok' if done[-1].ok else 'FAILED':8}{step.name:18}{done[-1].seconds:6.0f} s")
    print(f"Send {args.out} back.")
    if not all(one.ok for one in done):
        sys.exit("error: some steps failed; what they said is in the file.")


if __name__ == "__main__":
    command_line.end_on_signals()
    command_line.program(main)
