"""Snapshots on their way to checkpoint.uri: sent by a thread of rank 0, fetched before a run begins.

    snapshot committed locally --changed()--> thread: what is here and not there, the newest first

The thread looks at both folders rather than at a queue: an outage leaves nothing to remember, and what retention
deletes meanwhile, because it is neither new nor best nor awaited, needs no sending. Training never waits for it but at
the end, for checkpoint.upload_wait_s.
"""

from __future__ import annotations

import logging
import threading
import time

from raydistill.checkpoint import Mirror, Snapshots
from raydistill.errors import CheckpointError, ConfigError
from raydistill.object_store import fault_of
from raydistill.runtime.session import LEDGER
from raydistill.runtime.settings import RunConfig
from raydistill.tracking import JOURNAL_FILES, hand_over, previous_run_id

log = logging.getLogger(__name__)

_FIRST_PAUSE_S = 0.5
_ATTEMPTS_AT_START = 5
_TELL_S = 10.0
# The ledger names figures that the journal holds, and metrics.sent a place in it: the journal's copy must be newer.
_FILES = (LEDGER, "starts.jsonl", "artifacts/*", "artifacts/*/*", *JOURNAL_FILES)


def open_mirror(config: RunConfig, snapshots: Snapshots) -> Mirror | None:
    """The run's copy at checkpoint.uri, if it has one. Raises ConfigError; nothing is asked yet."""
    if config.copies_url is None:
        return None
    return Mirror(config.copies_url, snapshots, files=_FILES, endpoint_url=config.checkpoint.endpoint_url)


class Uploads:
    """Sends snapshots while training goes on."""

    def __init__(self, mirror: Mirror, retry_max_s: float):
        self._mirror = mirror
        self._retry_max_s = retry_max_s
        self._asked, self._answered = 1, 0
        self._wake, self._state = threading.Event(), threading.Condition()
        self._ending = False
        self._there: set[int] | None = None
        self._waiting: list[int] = []
        self._failures = 0
        self._seconds, self._bytes, self._sent_now = 0.0, 0, 0
        self._why, self._away_since = "", 0.0
        self._thread = threading.Thread(target=self._send_for_ever, name="uploads", daemon=True)
        self._wake.set()
        self._thread.start()

    def changed(self) -> None:
        """There may be something new to send."""
        with self._state:
            self._asked += 1
        self._wake.set()

    def figures(self, now: int) -> dict[str, float]:
        """What waits and how far the store is behind; `now`: generator updates made."""
        newest = max(self._there or {0})
        return {
            "upload/lag_updates": float(max(0, now - newest)),
            "upload/waiting": float(len(self._waiting)),
            "upload/retries": float(self._failures),
            "upload/seconds": self._seconds,
            "upload/bytes": float(self._bytes),
        }

    def finish(self, timeout_s: float) -> bool:
        """Send what is left, waiting for so long at most; whether everything is there. Says how far it is."""
        self._ending = True
        self.changed()
        started = told = time.monotonic()
        while True:
            with self._state:
                if self._answered == self._asked:
                    return True
                self._state.wait(0.5)
            now = time.monotonic()
            if now - started > timeout_s:
                log.warning(
                    "after checkpoint.upload_wait_s=%g s the snapshots of update(s) %s are not in %s yet (%s)",
                    timeout_s, _listed(self._waiting), self._mirror.url, self._why or "still sending",
                )  # fmt: skip
                return False
            if now - told > _TELL_S:
                told = now
                log.warning(
                    "waiting for uploads to %s: update(s) %s are left, %.1f MiB of the one in hand sent%s",
                    self._mirror.url, _listed(self._waiting), self._sent_now / 2**20,
                    f" ({self._why})" if self._why else "",
                )  # fmt: skip

    def _send_for_ever(self) -> None:
        pause = 0.0
        while True:
            # while the store is away new snapshots arrive all the time; they end no pause
            if pause:
                time.sleep(pause)
            else:
                self._wake.wait()
            self._wake.clear()
            with self._state:
                asked = self._asked
            try:
                self._send_all()
            except Exception as error:  # training goes on whatever the store does
                self._failures += 1
                self._why = (
                    str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
                )
                if not self._away_since:
                    self._away_since = time.monotonic()
                    log.warning("%s; snapshots wait in %s", self._why, self._mirror.local.root)
                pause = min(max(2 * pause, _FIRST_PAUSE_S), self._retry_max_s)
                continue
            pause = 0.0
            with self._state:
                self._answered = asked
                self._state.notify_all()

    def _send_all(self) -> None:
        if self._there is None:
            self._there = set(self._mirror.steps())
        while waiting := self._look():
            step, started, self._sent_now = waiting[-1], time.monotonic(), 0
            size = self._mirror.push(step, self._count)
            if self._away_since:
                away = time.monotonic() - self._away_since
                log.warning("%s takes snapshots again after %.1f s", self._mirror.url, away)
            self._away_since, self._why = 0.0, ""
            if size is None:
                continue  # deleted meanwhile: there is a newer one
            self._seconds, self._bytes = time.monotonic() - started, size
            self._there.add(step)
        if self._ending:
            self._mirror.push_files()

    def _look(self) -> list[int]:
        assert self._there is not None
        self._waiting = [step for step in self._mirror.local.steps() if step not in self._there]
        return self._waiting

    def _count(self, num_bytes: int) -> None:
        self._sent_now += num_bytes


def fetch_run(config: RunConfig) -> None:
    """Take what checkpoint.uri has and output_dir has not, so that the run goes on where it got to on another machine.

    A store that is away is no reason to stop a run that has snapshots of its own.

    Raises CheckpointError, in one line that names the setting, for a store that can't be used, and ConfigError if
    resume=false would mix a new run with an old one's copies.
    """
    local = Snapshots(f"{config.run_dir}/snapshots", config.checkpoint.keep)
    mirror = open_mirror(config, local)
    if mirror is None:
        return
    mlflow_run = previous_run_id(config.run_dir)
    pause, attempt = _FIRST_PAUSE_S, 0
    while True:
        attempt += 1
        try:
            mirror.introduce()
            there = mirror.steps()
            if there and not config.resume:
                raise ConfigError(
                    f"resume=false: checkpoint.uri={config.checkpoint.uri!r} holds snapshots of an earlier run "
                    f"{config.name!r} (updates {_listed(there)}); choose another name, or remove {mirror.url}"
                )
            fetched = mirror.fetch(lambda line: log.warning("fetching %s", line))
            break
        except CheckpointError as error:
            fault = fault_of(error.__cause__) if error.__cause__ else None
            if fault is None or not fault.passing:
                raise
            if local.steps() and config.resume:
                log.warning("%s; the run goes on from %s, copies are made when it is back", error, local.root)
                return
            if attempt == _ATTEMPTS_AT_START:
                raise CheckpointError(
                    f"{error}; {local.root} has no snapshot either, so it can't be known where the run stands: try "
                    "again when the store is back, or see checkpoint.endpoint_url"
                ) from error
            log.warning("%s; next attempt in %.1f s", error, pause)
        time.sleep(pause)
        pause *= 2
    if fetched:
        log.warning("fetched update(s) %s from %s", _listed(sorted(fetched)), mirror.url)
        if config.tracking.uri is None:
            # the MLflow file beside the other machine's folder stayed there
            hand_over(config.run_dir, mlflow_run)


def require_uploaded(config: RunConfig) -> None:
    """Raise CheckpointError unless checkpoint.uri has every snapshot that output_dir has."""
    local = Snapshots(f"{config.run_dir}/snapshots", config.checkpoint.keep)
    mirror = open_mirror(config, local)
    if mirror is None:
        return
    missing = sorted(set(local.steps()) - set(mirror.steps()))
    if missing:
        raise CheckpointError(
            f"the run is complete, but its snapshots of update(s) {_listed(missing)} are only in {local.root}, not in "
            f"checkpoint.uri={config.checkpoint.uri!r}; the same command sends them"
        )


def _listed(steps: list[int]) -> str:
    return ", ".join(map(str, steps)) or "none"
