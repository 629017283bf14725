"""The worker on RunPod, `python handler.py`. Here alone an exception becomes a response.

Importing this costs nothing; the engine and the platform's library are imported to serve.
"""

import asyncio
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import TYPE_CHECKING

from engine.command_line import program
from engine.errors import EngineError
from engine.worker.ending import Ended, end_children, end_on_signals
from engine.worker.joblog import Redactor, job_named, log_as_json, name_of
from engine.worker.runpod_library import import_runpod

if TYPE_CHECKING:
    from engine.worker.progress import ProgressReport
    from engine.worker.service import Response, Worker

log = logging.getLogger("engine.handler")

_UNFORESEEN = "The worker failed in a way nobody foresaw, and is replaced. Send the job again."


async def respond(
    worker: "Worker", job: Mapping[str, object], report: "ProgressReport"
) -> "Response":
    """Answers a job as the platform hands it over: with its output, or with what went wrong.

    Only being cancelled is raised: the platform waits for nothing then.
    """
    with job_named(name_of(job)):
        try:
            return await worker.answer(job, report)
        except EngineError as error:
            log.warning("%s: %s", error.code, error)
            return _failure(str(error), error.code, worker.endpoint.redact, replaced=error.fatal)
        except Exception:
            log.exception("unforeseen")
            return _failure(_UNFORESEEN, EngineError.code, worker.endpoint.redact, replaced=True)


def _failure(sentence: str, code: str, redact: Redactor, *, replaced: bool) -> "Response":
    failure: Response = {"error": redact.tell(sentence), "code": code}
    return failure | {"refresh_worker": True} if replaced else failure


def main() -> None:
    """Loads, then serves until told to stop. A machine that cannot serve ends with a sentence."""
    ended: list[Ended] = []
    end_on_signals(ended)
    os.environ.setdefault("RUNPOD_LOG_LEVEL", "INFO")  # below that it prints whole results
    platform = ThreadPoolExecutor(1).submit(import_runpod)  # beside the loading

    from engine.worker.endpoint import read_endpoint
    from engine.worker.fitness import fitness_checks
    from engine.worker.renderer import load_renderer
    from engine.worker.scratch import Scratch
    from engine.worker.service import Worker

    endpoint = read_endpoint()
    log_as_json(endpoint.redact)
    try:
        scratch = Scratch(endpoint.scratch)
    except EngineError as error:
        sys.exit(f"error: {error}")
    worker = Worker(endpoint, scratch)
    ended.append(worker)
    checks = fitness_checks(scratch)
    try:
        try:
            worker.start(load_renderer)
        except Exception as error:
            if not endpoint.on_runpod:
                raise
            checks = [_refusal(error)]  # the platform is told, and ends this process
        _serve(platform.result(), worker, checks)
    except EngineError as error:
        sys.exit(f"error: {endpoint.redact.tell(str(error))}")
    finally:
        worker.close()
        end_children()


def _refusal(error: Exception) -> Callable[[], None]:
    """Makes a check that fails with what went wrong before."""

    def start() -> None:
        raise error

    return start


def _serve(runpod: ModuleType, worker: "Worker", checks: Sequence[Callable[[], None]]) -> None:
    """Serves. `runpod` is the platform's library, which reads the command line until stopped."""
    for check in checks:
        runpod.serverless.register_fitness_check(check)
    is_heard = worker.endpoint.on_runpod  # elsewhere nobody listens

    async def handle(job: dict[str, object]) -> "Response":
        def report(progress: Mapping[str, object]) -> None:
            if is_heard:
                runpod.serverless.progress_update(job, progress)

        response = await respond(worker, job, report)
        if worker.is_ending:  # unanswered, a job goes to another worker
            await asyncio.Event().wait()
        return response

    runpod.serverless.start({"handler": handle})


if __name__ == "__main__":
    program(main, output_matters=False)
