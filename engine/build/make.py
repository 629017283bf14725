"""Carries out an order for a package, stage by stage."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from engine.build.calibration import load_activations
from engine.build.native import build_native
from engine.build.provenance import engine_version, own_sources, toolchain, wheels
from engine.build.quantize import Made, Quantization, groups, package_bytes, padded_ffn
from engine.build.report import TensorError, lines, report
from engine.build.tensorrt import build_program, unavailable
from engine.clock import over
from engine.config import LIMITS, ModelConfig
from engine.denoise.block import WEIGHT_FORMS
from engine.diskcache import remembered_sha256
from engine.errors import BadRequest
from engine.machine.heap import keep_freed_memory
from engine.models.checkpoint import Checkpoint
from engine.models.latent_colours import latent_colours, name_of
from engine.models.locate import TEXT_ENCODER, find_model
from engine.models.lora import Lora
from engine.models.lora_roles import role_of
from engine.models.text import find_tokenizer, store_prompts
from engine.models.vae import load_vae
from engine.package.contents import REPORT
from engine.package.folder import PackageWriter
from engine.package.manifest import (
    PROMPTS,
    ROTATION,
    ROTATION_GROUP,
    Manifest,
    MergedLora,
    Native,
    PreviewColours,
    Prompts,
    Rotation,
    SourceFile,
    WeightsForm,
    kernel_path,
)
from engine.package.search import package_home
from engine.stage_dump import ACTIVATIONS
from kernels.arch import Arch

log = logging.getLogger(__name__)

PROGRAMS = ("native", "tensorrt")
AHEAD = 2  # groups that are made while one is written; each needs 0.4 GB at 14B
PLANS = "plans"
PLAN_SECONDS = 300.0  # a plan of the 14B model takes less than a second


@dataclass(frozen=True, slots=True)
class Order:
    """The ingredients of a package."""

    arch: Arch
    checkpoint: Path
    loras: tuple[tuple[Path, float], ...] = ()
    programs: tuple[str, ...] = ("native",)
    weights: WeightsForm | None = None  # None: what is best for the programs
    calibration: Path | None = None  # a folder of `generate --stages`
    prompts: Path | None = None  # a text file, a prompt a line
    models: Path = Path()  # where the text encoder for them is
    vae: Path | None = None  # to which the colours of previews are fitted


def make_package(order: Order, out: Path, state: Path) -> Path:
    """Builds `out`/KIND/ARCH and returns it. `state` keeps compilers and what can be made again.

    Mistakes in the order are found before the first weight is read. A build that was stopped goes
    on when it is ordered again. Raises an `EngineError`.
    """
    form, engine = weights_form(order), engine_version()
    loras = [Lora(*lora) for lora in order.loras]
    checkpoint = Checkpoint(order.checkpoint, loras=loras)
    kind = checkpoint.config.kind.name
    job = quantization(order, form, checkpoint)
    prompts = None
    if order.prompts is not None:
        prompts = read_prompts(order.prompts), find_encoder(order.models)
    kernels = build_native(checkpoint.config, job.allowed, order.arch, state)
    home = package_home(out, kind, order.arch)
    with PackageWriter(home, _identity(order, checkpoint, form)) as writer:
        writer.claim(kind)
        with ThreadPoolExecutor(1, "sources") as pool:
            sources = pool.submit(_sources, checkpoint, loras, state)
            errors = write_weights(writer, job)
            made_of = sources.result()
        add_report(writer, errors)
        for kernel in kernels:
            writer.add_file(kernel_path(kernel.name), kernel.data)
        tensorrt = add_tensorrt(writer, order, checkpoint.config, form)
        stored = None if prompts is None else add_prompts(writer, *prompts, order.models, state)
        colours = None if order.vae is None else preview_colours(order.vae, state)
        return writer.finish(
            Manifest(
                model_kind=kind,
                arch=order.arch.name,
                driver_floor="{}.{}".format(*order.arch.driver),
                engine=engine,
                toolchain=toolchain(kernels),
                wheels=wheels(kernels),
                sources=made_of,
                model=checkpoint.config,
                padded_ffn=padded_ffn(checkpoint.config),
                weights=form,
                rotation=rotation_of(errors),
                native=Native(tuple(kernel.record() for kernel in kernels)),
                tensorrt=tensorrt,
                prompts=stored,
                colours=colours,
            )
        )


def weights_form(order: Order) -> WeightsForm:
    """Chooses the form of the weights. Raises `BadRequest` if the order contradicts itself."""
    strange = set(order.programs) - set(PROGRAMS)
    if strange or "native" not in order.programs:
        raise BadRequest(
            f"--programs is {','.join(order.programs)!r}; native or native,tensorrt is expected."
        )
    asked = "tensorrt" in order.programs
    form: WeightsForm = order.weights or ("fp8" if asked else "int8")
    if asked and (reason := unavailable(order.arch, form)):
        raise BadRequest(f"There can be no TensorRT program: {reason}")
    if WEIGHT_FORMS[form].codes not in order.arch.codes:
        raise BadRequest(
            f"--weights is {form}, and {order.arch.name} ({order.arch.gpus}) has no tensor cores "
            "that multiply them. Leave it out: int8 is built."
        )
    if asked and order.weights is None:
        log.info("TensorRT takes fp8 weights, which are less exact than int8: fp8 is built.")
    return form


def quantization(order: Order, form: WeightsForm, checkpoint: Checkpoint) -> Quantization:
    seen = order.calibration and load_activations(order.calibration, checkpoint.config)
    return Quantization(checkpoint, WEIGHT_FORMS[form], seen, order.arch.codes)


def write_weights(writer: PackageWriter, job: Quantization) -> list[TensorError]:
    """Writes all groups in load order, and returns how far each tensor is from what it was.

    The next groups are made while one is written, each by one thread: PyTorch's own would wait for
    each other.
    """
    writer.expect(package_bytes(job.weights))
    keep_freed_memory()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    order, errors = list(groups(job)), []
    coming: dict[int, Future[Made]] = {}
    with ThreadPoolExecutor(AHEAD, "quantise") as pool:

        def make(n: int) -> tuple[Mapping[str, Tensor], Mapping[str, object]]:
            for k in range(n, min(n + 1 + AHEAD, len(order))):
                if k not in coming:
                    coming[k] = pool.submit(order[k].make)
            tensors, made = coming.pop(n).result()
            return tensors, {"errors": [asdict(error) for error in made]}

        try:
            for n, group in enumerate(over(order, "quantise", "group")):
                facts = writer.write(group.name, partial(make, n))
                errors += [TensorError(**fact) for fact in facts["errors"]]  # pyright: ignore
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            torch.set_num_threads(threads)
    return errors


def rotation_of(errors: Sequence[TensorError]) -> Rotation | None:
    """Says which linears are rotated: those whose rows are INT8 (`kernels.fp8.FORMS`)."""
    linears = tuple(error.name for error in errors if error.dtype == "int8")
    return Rotation(ROTATION, ROTATION_GROUP, linears) if linears else None


def add_report(writer: PackageWriter, errors: Sequence[TensorError]) -> None:
    writer.add_file(REPORT, json.dumps(report(errors), indent=1).encode())
    for line in lines(errors):
        log.info(line)


def add_tensorrt(
    writer: PackageWriter, order: Order, config: ModelConfig, form: WeightsForm
) -> Mapping[str, object]:
    """Adds the program if it is asked for. Returns its facts, or why there is none."""
    if "tensorrt" not in order.programs:
        reason = unavailable(order.arch, form) or "it was not asked for."
        return {"absent": reason}
    with TemporaryDirectory(prefix="scail-plans-") as folder:
        built = replace(config, ffn=padded_ffn(config))
        program = build_program(built, order.arch, Path(folder), timeout_s=PLAN_SECONDS)
        for path in sorted(Path(folder).iterdir()):
            writer.add_file(f"{PLANS}/{path.name}", path.read_bytes())
    return asdict(program)


def find_encoder(models: Path) -> Path:
    """Finds the text encoder, which needs a tokenizer beside it. Raises `MissingModel`."""
    encoder = find_model(models, TEXT_ENCODER)
    find_tokenizer(encoder, models)
    return encoder


def add_prompts(
    writer: PackageWriter, prompts: Sequence[str], encoder: Path, models: Path, state: Path
) -> Prompts:
    # BF16 as the worker computes in; FP32 would need 23 GB
    stored = store_prompts(prompts, encoder, models, state / "prompts", torch.bfloat16)
    writer.add_file(PROMPTS, stored.dump())
    return Prompts(len(stored.rows), stored.encoder_sha256)


def preview_colours(path: Path, state: Path) -> PreviewColours:
    """Fits what previews are made with to a VAE. Raises what loading it raises."""
    vae = load_vae(path, torch.device("cpu"), torch.float32)
    made = latent_colours(vae, state / "colours")
    return PreviewColours(name_of(vae), tuple(made.values))


def read_prompts(path: Path) -> list[str]:
    """Reads a prompt from each line of a UTF-8 file that is not empty. Raises `BadRequest`."""
    try:
        prompts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise BadRequest(f"{path} is no text file of prompts: {error}.") from error
    prompts = list(dict.fromkeys(prompt for prompt in prompts if prompt))
    if not prompts:
        raise BadRequest(f"{path} holds no prompt; one a line is expected.")
    for number, prompt in enumerate(prompts, start=1):
        if len(prompt) > LIMITS.max_prompt_chars:
            raise BadRequest(
                f"{path}: prompt {number} has {len(prompt)} characters; at most "
                f"{LIMITS.max_prompt_chars} fit."
            )
    return prompts


def _sources(checkpoint: Checkpoint, loras: Sequence[Lora], state: Path) -> tuple[SourceFile, ...]:
    """Hashes the files while weights are read from them."""
    files: list[tuple[Path, MergedLora | None]] = [(path, None) for path in checkpoint.files]
    for lora in loras:
        files.append((lora.path, MergedLora(lora.strength, role_of(lora), lora.rank)))
    return tuple(
        SourceFile(
            "".join(c if c.isprintable() else "?" for c in path.name),
            path.stat().st_size,
            remembered_sha256(path, state / "hashes"),
            merged,
        )
        for path, merged in files
    )


def _identity(order: Order, checkpoint: Checkpoint, form: WeightsForm) -> str:
    """Digests all that decides the weights' bytes: a build goes on only if it is the same."""
    given = [*checkpoint.files, *(path for path, _ in order.loras)]
    if order.calibration is not None:
        given.append(order.calibration / ACTIVATIONS)
    stats = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in given]
    strengths = [strength for _, strength in order.loras]
    facts = [order.arch.name, form, stats, strengths, torch.__version__, own_sources()]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
