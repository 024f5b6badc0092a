"""Submits a job to Ray and follows it to its end, whatever becomes of the log stream.

Ray's own `ray job submit` stops following when the log's websocket breaks (ray#51601, #60665). Here the job's
status decides: a broken stream is attached again and continues where it stopped, and what a stream that hangs
still owes is fetched once the job has ended.
"""

import asyncio
import contextlib
import logging
import os
import shlex
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from raydistill.errors import RayDistillError
from raydistill.runtime import local_cluster
from raydistill.tracking import without_secrets

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

_POLL_S = 1.0
_DRAIN_S = 3.0
# A stream that has told nothing for this long may hang; attaching again costs one reading of the log.
_SILENCE_S = 60.0


class JobGoesOnError(KeyboardInterrupt):
    """Ctrl-C, and the person who pressed it wants the job to go on."""


class TerminatedError(KeyboardInterrupt):
    """SIGTERM to the process that follows a job: nobody is there to be asked."""


@dataclass(frozen=True, kw_only=True)
class JobResult:
    """How a followed job ended."""

    submission_id: str
    status: str
    """SUCCEEDED, FAILED or STOPPED."""
    exit_code: int
    """The job's own where Ray knows it; else 0 for SUCCEEDED, 130 for STOPPED, 1 for FAILED."""
    message: str
    """Ray's words where the job failed without an exit code of its command; else empty."""


def submit_and_follow(
    entrypoint: Sequence[str],
    working_dir: str | os.PathLike[str] = ".",
    address: str = "auto",
    *,
    write: Callable[[str], object] | None = None,
    lost_after_s: float = 60.0,
) -> JobResult:
    """Run `entrypoint` as a Ray job, pass its output on, and return when it has ended.

    With `address="auto"` the job runs in `working_dir` itself, on this machine's head, which is started if
    there is none. With the URL of a head, `working_dir` is uploaded, and what the job writes stays on the
    cluster. Ctrl-C asks whether to stop the job (without a terminal it is stopped) and then raises
    KeyboardInterrupt, JobGoesOnError if the answer was no.

    Args:
        entrypoint: the command and its arguments, for example `["python", "jobs/dmd2_coco.py"]`.
        write: takes the output; stdout if None.
        lost_after_s: how long the head may be unreachable before the job is given up as lost.

    Raises RayDistillError if no head answers at `address`, the submission is refused, or the head is lost.
    """
    folder = Path(working_dir).resolve()
    if not folder.is_dir():
        raise RayDistillError(f"working dir {folder} is no folder")
    local = address in ("auto", local_cluster.ADDRESS)
    client = connect(address)
    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)  # every socket that closes
    command = shlex.join(entrypoint)
    if local:
        # A head that was started by hand may know another `python` than raydistill's.
        path = f"{shlex.quote(str(Path(sys.executable).parent))}:$PATH"
        shell = f"cd {shlex.quote(str(folder))} && export PATH={path} && exec {command}"
        submission_id = _submit(client, shell, {}, lost_after_s)
    else:
        submission_id = _submit(client, command, {"working_dir": str(folder)}, lost_after_s)
    where = f"{submission_id} at {client.get_address()}"
    print(f"raydistill: job {where}: {without_secrets(command)}", file=sys.stderr, flush=True)
    return follow(client, submission_id, write=write, lost_after_s=lost_after_s)


def connect(address: str) -> "JobSubmissionClient":
    """A client for the head at `address`: `auto` (started if need be) or `http://HOST:PORT`; sends the token.

    Raises RayDistillError if no head answers there or if it refuses the token.
    """
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    url = local_cluster.up().address if address in ("auto", local_cluster.ADDRESS) else address
    try:
        with _without_address_variables():
            return JobSubmissionClient(url, headers=local_cluster.auth_headers())
    except AuthenticationError:
        raise local_cluster.token_refused(url) from None
    except (ConnectionError, RuntimeError) as error:
        raise RayDistillError(f"no Ray head to submit to at {url}: {error}") from error


def _submit(
    client: "JobSubmissionClient", entrypoint: str, runtime_env: dict[str, str], lost_after_s: float
) -> str:
    # An id of our own: a submission whose answer got lost is repeated without running twice.
    submission_id = f"raydistill_{uuid.uuid4().hex[:16]}"
    deadline = time.monotonic() + lost_after_s
    while True:
        try:
            return client.submit_job(
                entrypoint=entrypoint, submission_id=submission_id, runtime_env=runtime_env
            )
        except (OSError, RuntimeError, ValueError) as error:
            if "already exists" in str(error):
                return submission_id
            if not isinstance(error, OSError) or time.monotonic() > deadline:
                raise RayDistillError(f"{client.get_address()} did not take the job: {error}") from error
            time.sleep(_POLL_S)


def follow(
    client: "JobSubmissionClient",
    submission_id: str,
    *,
    write: Callable[[str], object] | None = None,
    lost_after_s: float = 60.0,
) -> JobResult:
    """Pass the output of a submitted job on until it has ended; Ctrl-C as in `submit_and_follow`."""
    log = _Output(write or _to_stdout)
    try:
        details = asyncio.run(_follow(client, submission_id, log, lost_after_s))
    except KeyboardInterrupt as interrupt:
        if not isinstance(interrupt, TerminatedError) and _is_to_go_on(client, submission_id):
            raise JobGoesOnError from None
        _stop(client, submission_id, log, lost_after_s)
        raise
    status = str(getattr(details.status, "value", details.status))
    exit_code, message = details.driver_exit_code, ""
    if exit_code is None:
        message = details.message if status == "FAILED" else ""
        exit_code = {"SUCCEEDED": 0, "STOPPED": 130}.get(status, 1)
    return JobResult(
        submission_id=submission_id,
        status=status,
        exit_code=exit_code,
        message=message or "",
    )


def stop_jobs(address: str) -> None:
    """Ask every job that runs on a head to stop and wait until it has written what it keeps.

    Raises RayDistillError if the head does not answer.
    """
    client = connect(address)

    def running() -> list[str]:
        jobs = [job for job in client.list_jobs() if not job.status.is_terminal()]
        return [job.submission_id for job in jobs if job.submission_id]

    try:
        stopped = running()
        for submission_id in stopped:
            print(f"raydistill: stopping job {submission_id}", file=sys.stderr, flush=True)
            client.stop_job(submission_id)
        deadline = time.monotonic() + local_cluster.JOB_STOP_WAIT_S + 5.0
        while set(stopped) & set(running()) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        if stopped:  # whoever follows them has yet to fetch the ends of their logs
            time.sleep(_DRAIN_S + 2 * _POLL_S)
    except (OSError, RuntimeError) as error:
        raise RayDistillError(f"{address} could not stop its jobs: {error}") from error


class _Output:
    """The job's output, passed on once although each stream tells it from the start."""

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write = write
        self._written = 0
        self._position = 0
        self.last_text = time.monotonic()

    def restart(self) -> None:
        """The next text is the output's beginning again."""
        self._position = 0
        self.last_text = time.monotonic()

    def feed(self, text: str) -> None:
        new = text[max(self._written - self._position, 0) :]
        self._position += len(text)
        self.last_text = time.monotonic()
        if new:
            self._written += len(new)
            self._write(new)


def _to_stdout(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


async def _follow(
    client: "JobSubmissionClient", submission_id: str, log: _Output, lost_after_s: float
) -> "JobDetails":
    stream: asyncio.Task[None] | None = None
    answered = time.monotonic()
    while True:
        if stream is None or stream.done():
            stream = asyncio.create_task(_attach(client, submission_id, log))
        await asyncio.wait({stream}, timeout=_POLL_S)
        if stream.done():
            stream.result()  # raises if passing the output on failed, as when stdout is closed
            await asyncio.sleep(0.2)  # a stream that is refused at once must not turn this into a busy loop
        elif time.monotonic() - log.last_text > _SILENCE_S:
            await _end(stream)
        try:
            details = await asyncio.to_thread(client.get_job_info, submission_id)
        except (OSError, RuntimeError) as error:
            if time.monotonic() - answered > lost_after_s:
                raise RayDistillError(
                    f"the Ray head at {client.get_address()} has not answered for {lost_after_s:.0f} s, "
                    f"and job {submission_id} may have ended with it: {error}"
                ) from error
            continue
        answered = time.monotonic()
        if details.status.is_terminal():
            await asyncio.wait({stream}, timeout=_DRAIN_S)
            await _end(stream)
            try:
                text = await asyncio.to_thread(client.get_job_logs, submission_id)
            except (OSError, RuntimeError):  # the head was told to stop as well
                print("raydistill: the head went away; the job's last lines may be missing", file=sys.stderr)
            else:
                log.restart()
                log.feed(text)
            return details


async def _attach(client: "JobSubmissionClient", submission_id: str, log: _Output) -> None:
    """Pass one log stream on until it ends or breaks; whether the job has ended is not its to say."""
    import aiohttp

    log.restart()
    texts = aiter(client.tail_job_logs(submission_id))
    while True:
        try:
            text = await anext(texts)
        except (StopAsyncIteration, aiohttp.ClientError, RuntimeError, OSError):
            return
        log.feed(text)


async def _end(stream: asyncio.Task[None]) -> None:
    stream.cancel()
    await asyncio.wait({stream})


def _is_to_go_on(client: "JobSubmissionClient", submission_id: str) -> bool:
    """Ask the person at the terminal, if there is one; Ctrl-C again means yes."""
    if sys.stdin is None or not sys.stdin.isatty():
        return False
    try:
        answer = input(f"\nStop job {submission_id} too? [Y/n] ")
    except (EOFError, KeyboardInterrupt):
        answer = "n"
    if answer.strip().lower() not in ("n", "no"):
        return False
    address = f"{local_cluster.__name__}://{client.get_address().rpartition('//')[2]}"
    print(
        f"job {submission_id} goes on; `ray job logs --address {address} --follow {submission_id}` shows it",
        file=sys.stderr,
    )
    return True


def _stop(client: "JobSubmissionClient", submission_id: str, log: _Output, lost_after_s: float) -> None:
    print(f"raydistill: stopping job {submission_id}", file=sys.stderr, flush=True)
    try:
        client.stop_job(submission_id)
    except (OSError, RuntimeError) as error:
        raise RayDistillError(f"job {submission_id} could not be stopped: {error}") from error
    details = asyncio.run(_follow(client, submission_id, log, lost_after_s))
    print(f"raydistill: job {submission_id} {details.status}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _without_address_variables() -> Iterator[None]:
    """Ray lets these variables win over the address that its client is given."""
    names = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
    held = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(held)
