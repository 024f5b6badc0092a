"""Results ahead of their consumer, in the consumer's order.

    consumer: take(k) ──> k+1 ... k+ahead are queued ──> worker threads compute ──> futures, kept by number
       ^                                                                              │
       └────────────────────────── take(k+1) waits for future k+1 only ───────────────┘

Which thread computes what, and when, changes nothing but the waiting: results are pure functions of their
number. Threads are daemons, so that a read that hangs doesn't keep the process alive, and hold no strong
reference to the owner, so that dropping it ends them.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Window(Generic[T]):
    """Computes number k, k+1, ... ahead. For one consumer."""

    def __init__(self, compute: Callable[[int], T], *, num_threads: int, ahead: int):
        """compute: a bound method, held weakly. num_threads: 0 computes in `take`. ahead: results kept."""
        self._compute: weakref.WeakMethod[Any] = weakref.WeakMethod(compute)
        self._ahead = max(ahead, num_threads)
        self._num_threads = num_threads
        self._futures: dict[int, Future[T]] = {}
        self._tasks: queue.SimpleQueue[tuple[int, Future[T]] | None] = queue.SimpleQueue()
        self._started = False
        self._end = weakref.finalize(self, _stop, self._tasks, num_threads)

    def take(self, number: int, timeout_s: float) -> T:
        """Result `number`; raises what computing it raised, or TimeoutError."""
        if self._num_threads == 0:
            result: T = self._compute()(number)  # type: ignore[misc]  # the owner is calling, so it is alive
            return result
        if not self._started:
            self._start()
        for skipped in [k for k in self._futures if not number <= k <= number + self._ahead]:
            self._futures.pop(skipped).cancel()
        for k in range(number, number + self._ahead + 1):
            if k not in self._futures:
                self._futures[k] = Future()
                self._tasks.put((k, self._futures[k]))
        # a result that failed or timed out is computed anew when it is asked for again
        return self._futures.pop(number).result(timeout_s)

    def close(self) -> None:
        """End the threads once they finish what they are at."""
        for future in self._futures.values():
            future.cancel()
        self._futures.clear()
        self._end()

    def _start(self) -> None:
        self._started = True
        for number in range(self._num_threads):
            threading.Thread(
                target=_work, args=(self._tasks, self._compute), name=f"data-{number}", daemon=True
            ).start()


def _work(tasks: queue.SimpleQueue[Any], compute: weakref.WeakMethod[Any]) -> None:
    while (task := tasks.get()) is not None:
        number, future = task
        if not future.set_running_or_notify_cancel():
            continue
        method = compute()
        if method is None:
            return
        try:
            future.set_result(method(number))
        except BaseException as error:
            future.set_exception(error)
        # while the thread waits for its next task, it must not keep the last result or the owner alive
        del method, future, task


def _stop(tasks: queue.SimpleQueue[Any], num_threads: int) -> None:
    for _ in range(num_threads):
        tasks.put(None)
