"""A rank's side of a pool of teachers.

    rank --query--> the replica with the fewest of this rank's queries --answer--> rank

Queries are pure functions of their inputs, so a query whose replica died goes to another one, a slow one may be asked
of two, and losing a replica loses nothing.
"""

from __future__ import annotations

import itertools
import logging
import time
import uuid
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field, replace
from typing import Any

import ray
import torch
from torch import Tensor

from raydistill.errors import ConfigError, PlacementError
from raydistill.methods.method import Query
from raydistill.models.denoiser import Cond, Denoiser
from raydistill.roles.teacher import Pending
from raydistill.runtime import wire
from raydistill.runtime.actors import get
from raydistill.runtime.teachers import REPORT_S

log = logging.getLogger(__name__)

_LOST = (
    ray.exceptions.RayActorError,
    ray.exceptions.ObjectLostError,
    ray.exceptions.RayDirectTransportError,
)
"""What a replica that died leaves behind, before and after its answer."""
_TELL_S = 60.0
_NO_REPLICA_POLL_S = 0.2
_PASS_OVER_S = 5.0


@dataclass
class _Replica:
    handle: Any
    out: set[Any] = field(default_factory=set)
    passed_over_until: float = 0.0
    """While Ray restarts it, on the clock of time.monotonic()."""


class TeacherPool:
    """A rank's side of a pool: a `Scorer`."""

    def __init__(
        self,
        manager: Any,
        denoiser: Denoiser,
        *,
        device: torch.device | str = "cpu",
        wire_dtype: wire.WireDtype = "fp32",
        transport: wire.Transport = "object_store",
        chunk_size: int | None = None,
        timeout_s: float = 300.0,
    ):
        """denoiser: for its schedule and number of feature channels only.

        chunk_size: samples of a call, none: a query is one call. timeout_s: after which a query is also asked of
        another replica.
        """
        self._manager = manager
        self._device = device
        self._dtype = wire_dtype
        self._transport = transport
        self._chunk_size = chunk_size
        self._timeout_s = timeout_s
        self._client = uuid.uuid4().hex
        self._keys = itertools.count()
        self._replicas: dict[str, _Replica] = {}
        self._report: Any = None
        self._most_out = 0
        """Queries that were out at a time since the last report."""
        self._reported = 0.0
        self._waited_s = 0.0
        self._bytes = 0
        self._retries = 0
        self.denoiser: Denoiser = RemoteDenoiser(self, denoiser)
        self._refresh()

    def submit(self, query: Query) -> Pending:
        """Send the query; returns at once."""
        size = len(query.x_t)
        chunk = self._chunk_size or size
        if chunk >= size:
            return _Ticket(self, query)
        return _Tickets([_Ticket(self, _rows(query, n, n + chunk)) for n in range(0, size, chunk)])

    def figures(self) -> dict[str, float]:
        """Seconds waited for answers, bytes moved, and calls repeated because a replica died or was slow."""
        waited, self._waited_s = self._waited_s, 0.0
        moved, self._bytes = self._bytes, 0
        return {
            "time/teacher_wait_s": waited,
            "traffic/teacher_bytes": float(moved),
            "teacher/retries": float(self._retries),
            "teacher/replicas": float(len(self._replicas)),
        }

    # the rest is for tickets

    def put(self, packed: Any) -> Any:
        """A reference to a packed value for the replicas."""
        self._bytes += wire.num_bytes(packed)
        return wire.put(packed, self._transport)

    def new_key(self) -> str:
        return f"{self._client}/{next(self._keys)}"

    def call(self, send: Callable[[Any], Any], prefer: str | None = None) -> _Call:
        """Send a call to the least loaded replica, or to the preferred one if it is still there."""
        unavailable: set[str] = set()
        while True:
            self._require_replicas()
            self._settle()
            if prefer is None or prefer not in self._replicas:
                prefer = self._least_loaded(unavailable)
            if prefer is None:
                time.sleep(_NO_REPLICA_POLL_S)  # Ray restarts them
                self._refresh()
                unavailable.clear()
                continue
            try:
                reference = send(self._replicas[prefer].handle)
            except _LOST as error:  # with nixl an actor is asked for its transport first
                self._lost(prefer, error)
                unavailable.add(prefer)
                prefer = None
                continue
            self._replicas[prefer].out.add(reference)
            self._most_out = max(self._most_out, sum(len(each.out) for each in self._replicas.values()))
            self._exchange_with_manager()
            return _Call(prefer, reference, send)

    def _require_replicas(self) -> None:
        told = -_TELL_S
        while not self._replicas:
            if time.monotonic() - told >= _TELL_S:
                told = time.monotonic()
                log.warning(
                    "waiting for a teacher replica (placement.cpus_per_teacher, placement.gpus_per_teacher)"
                )
            self._refresh()
            if not self._replicas:
                time.sleep(_NO_REPLICA_POLL_S)

    def _least_loaded(self, avoid: Set[str]) -> str | None:
        """Of those that are not being restarted, if there are any."""
        now = time.monotonic()
        others = {name: each for name, each in self._replicas.items() if name not in avoid}
        return min(
            others,
            key=lambda name: (others[name].passed_over_until > now, len(others[name].out)),
            default=None,
        )

    def result(self, call: _Call) -> tuple[Any, str]:
        """(the answer, the replica that gave it); asks others if need be. Raises what the teacher raised."""
        started = time.monotonic()
        calls = [call]
        told = asked = started
        while True:
            ready, _ = ray.wait([c.reference for c in calls], timeout=min(REPORT_S, self._timeout_s))
            now = time.monotonic()
            if ready:
                done = next(c for c in calls if c.reference == ready[0])
                calls.remove(done)
                if done.replica in self._replicas:
                    self._replicas[done.replica].out.discard(done.reference)
                try:
                    value = get(done.reference)
                except _LOST as error:
                    self._lost(done.replica, error)
                    if not calls:
                        calls.append(self._again(call.send, avoid={done.replica}))
                        asked = now
                    continue
                self._waited_s += now - started
                self._bytes += wire.num_bytes(value)
                return value, done.replica
            self._exchange_with_manager()
            if now - told >= _TELL_S:
                told = now
                log.warning(
                    "waiting for the teacher for %.0f s: asked of replica(s) %s of %d",
                    now - started, ", ".join(c.replica for c in calls), len(self._replicas),
                )  # fmt: skip
            if now - asked >= self._timeout_s and len(self._replicas) > len(calls):
                asked = now
                calls.append(self._again(call.send, avoid={each.replica for each in calls}))

    def _again(self, send: Callable[[Any], Any], avoid: set[str]) -> _Call:
        self._retries += 1
        if other := self._least_loaded(avoid):
            return self.call(send, other)
        time.sleep(_NO_REPLICA_POLL_S)  # the only one: Ray restarts it, or the manager has another
        self._refresh()
        return self.call(send)

    def _lost(self, replica: str, error: Exception) -> None:
        log.warning(
            "teacher replica %s was lost, its query is asked again: %s", replica, type(error).__name__
        )
        if isinstance(error, ray.exceptions.ActorUnavailableError) and replica in self._replicas:
            # Ray restarts it, if it finds room; until the manager knows, others are asked
            self._replicas[replica].out.clear()
            self._replicas[replica].passed_over_until = time.monotonic() + _PASS_OVER_S
        else:
            self._replicas.pop(replica, None)

    def _refresh(self) -> None:
        """Ask the manager for the replicas. Raises PlacementError if it was stopped for good."""
        try:
            self._take_handles(get(self._manager.handles.remote()))
        except ray.exceptions.ActorUnavailableError:  # Ray restarts it
            time.sleep(_NO_REPLICA_POLL_S)
        except ray.exceptions.RayActorError as error:
            raise PlacementError(
                "the teacher pool was stopped (placement.teacher_service; raydistill teachers lists what runs): "
                f"{type(error).__name__}"
            ) from error

    def _exchange_with_manager(self) -> None:
        """Report what is out about once a second, without waiting for the answer."""
        now = time.monotonic()
        if self._report is not None and ray.wait([self._report], timeout=0)[0]:
            report, self._report = self._report, None
            try:
                self._take_handles(ray.get(report))
            except ray.exceptions.RayError as error:  # Ray restarts the manager
                log.warning("the teacher pool's manager does not answer: %s", type(error).__name__)
        if self._report is None and now - self._reported >= REPORT_S:
            self._reported = now
            self._settle()
            most, self._most_out = (
                self._most_out,
                sum(len(replica.out) for replica in self._replicas.values()),
            )
            self._report = self._manager.report.remote(self._client, most)

    def _settle(self) -> None:
        for replica in self._replicas.values():
            if replica.out:
                waiting = list(replica.out)
                replica.out.difference_update(ray.wait(waiting, num_returns=len(waiting), timeout=0)[0])

    def _take_handles(self, handles: Mapping[str, Any]) -> None:
        self._replicas = {
            name: self._replicas.get(name, _Replica(handle)) for name, handle in handles.items()
        }


def _rows(query: Query, start: int, end: int) -> Query:
    cond = Cond({name: tensor[start:end] for name, tensor in query.cond.tensors.items()})
    return replace(query, x_t=query.x_t[start:end], t=query.t[start:end], cond=cond)


@dataclass(frozen=True)
class _Call:
    replica: str
    reference: Any
    send: Callable[[Any], Any]


class _Ticket:
    """A query that is on its way to a replica."""

    def __init__(self, pool: TeacherPool, query: Query):
        self._pool = pool
        self._query = query
        self._key = pool.new_key()
        keep, dtype, transport = query.x_t.requires_grad, pool._dtype, pool._transport
        # put once: a retry sends the reference
        self._packed = packed = pool.put(wire.pack_query(query, dtype, transport))
        key = (
            self._key
        )  # the call must not hold its ticket: the query would stay in the store until a cycle is found
        self._call: _Call | None = pool.call(
            lambda replica: wire.returning(replica.answer, transport).remote(
                packed, key, keep, dtype, time.time()
            )
        )
        self._answered_by: str | None = None

    def answer(self) -> Tensor:
        if not self._query.x_t.requires_grad:
            return self.wait()
        answer: Tensor = _Remote.apply(self._query.x_t, self)  # type: ignore[no-untyped-call]
        return answer

    def wait(self) -> Tensor:
        """The answer without a graph."""
        assert self._call is not None
        value, self._answered_by = self._pool.result(self._call)
        self._call = None
        return wire.unpack(value, self._pool._device)

    def vjp(self, cotangent: Tensor) -> Tensor:
        """Gradient of <answer, cotangent> with respect to x_t, from the kept graph or from a second forward pass."""
        pool, key = self._pool, self._key
        dtype, transport = pool._dtype, pool._transport
        sent = pool.put(wire.pack(cotangent, dtype, transport))

        def ask(replica: Any, packed: Any) -> Any:
            return wire.returning(replica.vjp, transport).remote(packed, key, sent, dtype, time.time())

        first = pool.call(lambda replica: ask(replica, None), prefer=self._answered_by)
        value, replica = pool.result(first)
        if not len(value):
            value, _ = pool.result(pool.call(lambda replica: ask(replica, self._packed), prefer=replica))
        return wire.unpack(value, pool._device)


class _Tickets:
    """A query in chunks that different replicas may answer."""

    def __init__(self, tickets: list[_Ticket]):
        self._tickets = tickets

    def answer(self) -> Tensor:
        return torch.cat([ticket.answer() for ticket in self._tickets])


class _Remote(torch.autograd.Function):
    """Forward: the answer to a query sent before. Backward: the remote network's vector-Jacobian product."""

    @staticmethod
    def forward(ctx: Any, x_t: Tensor, ticket: _Ticket) -> Tensor:
        ctx.ticket = ticket
        return ticket.wait()

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, None]:
        return ctx.ticket.vjp(cotangents[0]), None


class RemoteDenoiser(Denoiser):
    """A denoiser that lives in a pool: an ordinary module whose forward and backward passes are remote calls."""

    def __init__(self, pool: TeacherPool, like: Denoiser):
        super().__init__()
        self.schedule = like.schedule
        self._pool = (pool,)  # in a tuple, so that nobody takes it for a part
        self._feature_shape = _feature_shape(like)

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        query = Query(network="teacher", want="x0", x_t=x_t, t=t, cond=cond)
        return self._pool[0].submit(query).answer()

    def features(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        query = Query(network="teacher", want="features", x_t=x_t, t=t, cond=cond)
        return self._pool[0].submit(query).answer()

    @property
    def feature_shape(self) -> tuple[int, int, int]:
        return self._feature_shape or super().feature_shape


def _feature_shape(denoiser: Denoiser) -> tuple[int, int, int] | None:
    try:
        return denoiser.feature_shape
    except ConfigError:
        return None
