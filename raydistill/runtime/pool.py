"""A pool of teachers behind Ray actors, and the ranks' side of it.

    rank --query--> the replica with the fewest of this rank's queries --answer--> rank
    rank --how many are out--> _PoolManager, which starts and ends replicas between placement.teacher_replicas and
                               placement.max_teacher_replicas and holds the weights, once, in the object store

Queries are pure functions of their inputs, so a query whose replica died goes to another one, a slow one may be asked
of two, and losing a replica loses nothing. A named pool (placement.teacher_service) outlives its job and serves
several; the guidance scale travels in the query, so they may differ in it.
"""

from __future__ import annotations

import itertools
import logging
import os
import socket
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch import Tensor

from raydistill.errors import ConfigError, PlacementError, RayDistillError
from raydistill.methods.method import Query
from raydistill.models.denoiser import Cond, Denoiser
from raydistill.models.diffusers_hub import DenoiserParts
from raydistill.roles.teacher import KeptGraphs, Pending, TeacherScorer
from raydistill.runtime import wire
from raydistill.runtime.actors import get
from raydistill.runtime.build import build_pipeline, pick_device, tuned_teacher
from raydistill.runtime.settings import RunConfig, config_from_dict, to_dict

log = logging.getLogger(__name__)

NAMESPACE = "raydistill"
_SERVICE = "teacher_service/"
_TELL_S = 60.0
_REPORT_S = 1.0
_SHRINK_AFTER_S = 30.0
_NO_REPLICA_POLL_S = 0.2
_FIRST_REPLICA_S = 5.0
_CONNECT_S = 5.0


@dataclass(frozen=True)
class PoolSpec:
    """What a pool is made of, taken from the settings of the run that started it."""

    identity: str
    """The teacher: hash of its weights, and the arithmetic it computes in."""
    path: str
    minimum: int
    maximum: int
    cpus: float
    gpus: float
    kept_graphs: int
    compile: bool


def teacher_identity(config: RunConfig, fingerprint: str) -> str:
    """What two runs must have in common to share a teacher."""
    layout = "channels_last" if config.train.channels_last else "contiguous"
    return f"{fingerprint[:16]}/{config.teacher.prediction}/{config.teacher.dtype}/{layout}"


class _TeacherActor:
    """One replica: a teacher on shared weights."""

    def __init__(
        self, parts: DenoiserParts, weights: Mapping[str, Any], null: Mapping[str, Any], spec: PoolSpec
    ):
        self._built: tuple[KeptGraphs, torch.device] | None = None
        self._parts, self._weights, self._null, self._spec = parts, weights, null, spec
        if not spec.gpus:
            torch.set_num_threads(max(1, int(spec.cpus)))

    def ready(self) -> None:
        """Answers when the process is there."""

    def _service(self) -> tuple[KeptGraphs, torch.device]:
        # built by the first call, not by the constructor, so that a failure reaches the caller as itself
        if self._built is None:
            device = pick_device(self._spec.gpus, "placement.gpus_per_teacher")
            denoiser = self._parts.build(wire.shared_weights(self._weights)).to(device)
            if self._spec.compile:
                denoiser.unet.compile()
            null = Cond({name: wire.unpack(array, device) for name, array in self._null.items()})
            self._built = KeptGraphs(TeacherScorer(denoiser, null.expand), self._spec.kept_graphs), device
        return self._built

    def answer(self, packed: Mapping[str, Any], key: str, keep: bool, dtype: wire.WireDtype) -> Any:
        service, device = self._service()
        return wire.pack(service.answer(wire.unpack_query(packed, device, differentiable=keep), key), dtype)

    def vjp(
        self, packed: Mapping[str, Any] | None, key: str, cotangent: Any, dtype: wire.WireDtype
    ) -> Any | None:
        """Without `packed` None where the graph is gone: the caller then asks again with it."""
        service, device = self._service()
        if packed is not None:
            service.answer(wire.unpack_query(packed, device, differentiable=True), key)
        gradient = service.vjp(key, wire.unpack(cotangent, device))
        return None if gradient is None else wire.pack(gradient, dtype)


def wanted_replicas(now: int, outstanding: int, idle_s: float, minimum: int, maximum: int) -> int:
    """How many replicas there should be: one more while queries wait two deep, one less after half a minute's rest.

    outstanding: queries asked and not answered; idle_s: time since there were more of them than one replica less
    could serve at once.
    """
    if outstanding > 2 * now:
        now += 1
    elif idle_s > _SHRINK_AFTER_S:
        now -= 1
    return min(max(now, minimum), maximum)


class _PoolManager:
    """Starts and ends replicas; Ray itself restarts those that die."""

    def __init__(self, config: dict[str, Any]):
        self._config = config_from_dict(config)
        self._replicas: dict[str, Any] = {}
        self._starting: dict[str, tuple[Any, Any]] = {}
        self._outstanding: dict[str, tuple[int, float]] = {}
        self._busy_at = time.monotonic()
        self._args: tuple[Any, ...] | None = None
        self._spec: PoolSpec | None = None

    def spec(self) -> PoolSpec:
        """What the pool serves; loads the weights and starts the first replicas when it is first asked."""
        if self._spec is None:
            self._spec = self._start()
        return self._spec

    def handles(self) -> dict[str, Any]:
        """The replicas that are there; waits some seconds for the first."""
        self.spec()
        self._welcome(0.0 if self._replicas else _FIRST_REPLICA_S)
        return dict(self._replicas)

    def report(self, client: str, outstanding: int) -> dict[str, Any]:
        """A client's number of unanswered queries; answers with the replicas to send the next ones to."""
        spec = self.spec()
        self._welcome(0.0)
        now = time.monotonic()
        self._outstanding[client] = (outstanding, now)
        # a client that was killed says nothing any more
        self._outstanding = {c: v for c, v in self._outstanding.items() if now - v[1] < 10 * _REPORT_S}
        self._scale(spec, sum(count for count, _ in self._outstanding.values()), now)
        return dict(self._replicas)

    def _welcome(self, timeout_s: float) -> None:
        """Let replicas whose process is there take queries: one that finds no room must not attract any."""
        if not self._starting:
            return
        waiting = [reference for _, reference in self._starting.values()]
        there = ray.wait(waiting, num_returns=1, timeout=timeout_s)[0]
        there += ray.wait(waiting, num_returns=len(waiting), timeout=0)[0]
        for name, (handle, reference) in list(self._starting.items()):
            if reference in there:
                del self._starting[name]
                self._replicas[name] = handle

    def _scale(self, spec: PoolSpec, outstanding: int, now: float) -> None:
        if outstanding >= len(self._replicas):
            self._busy_at = now
        count = len(self._replicas) + len(self._starting)
        wanted = wanted_replicas(count, outstanding, now - self._busy_at, spec.minimum, spec.maximum)
        if wanted != count:
            self._busy_at = now
        if wanted > count:
            self._add(spec)
        elif wanted < count and self._starting:
            ray.kill(self._starting.popitem()[1][0])
        elif wanted < count:
            # what it has in hand is asked of another replica
            ray.kill(self._replicas.popitem()[1])

    def _start(self) -> PoolSpec:
        config = self._config
        pipeline = build_pipeline(config)
        null = {name: wire.pack(tensor) for name, tensor in pipeline.null_cond(1).tensors.items()}
        fingerprint = pipeline.fingerprint
        denoiser = tuned_teacher(config, pipeline, torch.device("cpu"))
        weights = ray.put(wire.pack_weights(denoiser.state_dict()))
        self._args = (DenoiserParts.of(denoiser), weights, null)
        placement = config.placement
        spec = PoolSpec(
            identity=teacher_identity(config, fingerprint),
            path=config.teacher.path,
            minimum=placement.teacher_replicas,
            maximum=max(placement.teacher_replicas, placement.max_teacher_replicas),
            cpus=placement.cpus_per_teacher,
            gpus=placement.gpus_per_teacher,
            kept_graphs=placement.teacher_kept_graphs,
            compile=config.train.compile,
        )
        for _ in range(spec.minimum):
            self._add(spec)
        return spec

    def _add(self, spec: PoolSpec) -> None:
        assert self._args is not None
        options = {"num_cpus": spec.cpus, "num_gpus": spec.gpus, "max_restarts": -1, "max_task_retries": 0}
        # a name that no replica had before, also of a manager that was here before this one
        name = uuid.uuid4().hex[:8]
        handle = ray.remote(_TeacherActor).options(**options).remote(*self._args, spec)
        self._starting[name] = handle, handle.ready.remote()


def start_pool(config: RunConfig) -> Any:
    """The manager of the run's own pool, or of the named service, which is started if it is not there.

    Raises ConfigError if its teacher can't be loaded.
    """
    options: dict[str, Any] = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1}
    name = config.placement.teacher_service
    if name:
        options |= {
            "name": f"{_SERVICE}{name}",
            "namespace": NAMESPACE,
            "lifetime": "detached",
            "get_if_exists": True,
        }
    else:
        here = ray.get_runtime_context().get_node_id()
        options |= {"scheduling_strategy": NodeAffinitySchedulingStrategy(here, soft=False)}
    manager = ray.remote(_PoolManager).options(**options).remote(to_dict(config))
    try:
        get(manager.spec.remote())
    except RayDistillError:
        ray.kill(manager)  # its name is free for a job whose teacher can be loaded
        raise
    return manager


def require_same_teacher(config: RunConfig, manager: Any, fingerprint: str) -> None:
    """Raise PlacementError if the pool serves another teacher than this run's."""
    spec = get(manager.spec.remote())
    mine = teacher_identity(config, fingerprint)
    if spec.identity != mine:
        raise PlacementError(
            f"placement.teacher_service={config.placement.teacher_service!r} serves the teacher {spec.path} "
            f"({spec.identity}), this run's is {config.teacher.path} ({mine}): choose another "
            "placement.teacher_service, or the same teacher.path, teacher.dtype, teacher.prediction and "
            "train.channels_last"
        )


def join_cluster() -> None:
    """Join the cluster of RAY_ADDRESS, or the head of this machine. Raises PlacementError if none answers.

    Ray itself would wait for minutes for a head that is gone.
    """
    address = os.environ.get("RAY_ADDRESS", "auto")
    if address == "auto":
        remembered = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"
        address = remembered.read_text().strip() if remembered.is_file() else ""
    try:
        if "://" not in address:
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()
        ray.init(address=address, logging_level="WARNING")
    except (OSError, RuntimeError, ValueError) as error:
        where = f"at {address}" if address else "on this machine"
        raise PlacementError(
            f"no Ray cluster answers {where} ({type(error).__name__}): start one (raydistill up), or set RAY_ADDRESS"
        ) from error


def services() -> dict[str, dict[str, Any]]:
    """The named pools on the cluster that this process has joined: teacher, its identity and number of replicas."""
    found = {}
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if actor["namespace"] == NAMESPACE and actor["name"].startswith(_SERVICE):
            manager = ray.get_actor(actor["name"], namespace=NAMESPACE)
            try:
                spec, replicas = get(manager.spec.remote()), get(manager.handles.remote())
            except (RayDistillError, ray.exceptions.RayError):  # it is ending
                continue
            found[actor["name"].removeprefix(_SERVICE)] = {
                "teacher": spec.path, "identity": spec.identity, "replicas": len(replicas),
            }  # fmt: skip
    return found


def stop_service(name: str) -> None:
    """End a named pool and its replicas. Raises PlacementError if there is none."""
    try:
        manager = ray.get_actor(f"{_SERVICE}{name}", namespace=NAMESPACE)
    except ValueError:
        there = ", ".join(services()) or "none"
        raise PlacementError(
            f"no teacher service {name!r} runs on this cluster; there are: {there}"
        ) from None
    ray.kill(manager)


@dataclass
class _Replica:
    handle: Any
    out: set[Any] = field(default_factory=set)


class TeacherPool:
    """A rank's side of a pool: a `Scorer`."""

    def __init__(
        self,
        manager: Any,
        denoiser: Denoiser,
        *,
        device: torch.device | str = "cpu",
        wire_dtype: wire.WireDtype = "fp32",
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
        self._chunk_size = chunk_size
        self._timeout_s = timeout_s
        self._client = uuid.uuid4().hex
        self._keys = itertools.count()
        self._replicas: dict[str, _Replica] = {}
        self._report: Any = None
        self._reported = 0.0
        self._waited_s = 0.0
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
        """Seconds waited for answers, and calls repeated because a replica died or was slow."""
        waited, self._waited_s = self._waited_s, 0.0
        return {
            "time/teacher_wait_s": waited,
            "teacher/retries": float(self._retries),
            "teacher/replicas": float(len(self._replicas)),
        }

    # the rest is for tickets

    def new_key(self) -> str:
        return f"{self._client}/{next(self._keys)}"

    def pack(self, query: Query) -> dict[str, Any]:
        return wire.pack_query(query, self._dtype)

    def call(self, send: Callable[[Any], Any], prefer: str | None = None) -> _Call:
        """Send a call to the least loaded replica, or to the preferred one if it is still there."""
        while not self._replicas:
            log.warning(
                "no teacher replica is there yet (placement.cpus_per_teacher, placement.gpus_per_teacher)"
            )
            self._refresh()
        self._settle()
        if prefer is None or prefer not in self._replicas:
            prefer = min(self._replicas, key=lambda name: len(self._replicas[name].out))
        replica = self._replicas[prefer]
        reference = send(replica.handle)
        replica.out.add(reference)
        self._exchange_with_manager()
        return _Call(prefer, reference, send)

    def result(self, call: _Call) -> tuple[Any, str]:
        """(the answer, the replica that gave it); asks others if need be. Raises what the teacher raised."""
        started = time.monotonic()
        calls = [call]
        told = asked = started
        while True:
            ready, _ = ray.wait([c.reference for c in calls], timeout=min(_REPORT_S, self._timeout_s))
            now = time.monotonic()
            if ready:
                done = next(c for c in calls if c.reference == ready[0])
                calls.remove(done)
                if done.replica in self._replicas:
                    self._replicas[done.replica].out.discard(done.reference)
                try:
                    value = get(done.reference)
                except (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError) as error:
                    self._lost(done, error)
                    if not calls:
                        calls.append(self._again(call.send, avoid={done.replica}))
                        asked = now
                    continue
                self._waited_s += now - started
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
        others = [name for name in self._replicas if name not in avoid]
        if others:
            return self.call(send, min(others, key=lambda name: len(self._replicas[name].out)))
        time.sleep(_NO_REPLICA_POLL_S)  # the only one: Ray restarts it, or the manager has another
        self._refresh()
        return self.call(send)

    def _lost(self, call: _Call, error: Exception) -> None:
        log.warning(
            "teacher replica %s was lost, its query is asked again: %s", call.replica, type(error).__name__
        )
        if isinstance(error, ray.exceptions.ActorUnavailableError) and call.replica in self._replicas:
            self._replicas[call.replica].out.clear()  # Ray restarts it
        else:
            self._replicas.pop(call.replica, None)

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
        if self._report is None and now - self._reported >= _REPORT_S:
            self._reported = now
            self._settle()
            out = sum(len(replica.out) for replica in self._replicas.values())
            self._report = self._manager.report.remote(self._client, out)

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
    return Query(
        network=query.network,
        want=query.want,
        x_t=query.x_t[start:end],
        t=query.t[start:end],
        cond=cond,
        guidance_scale=query.guidance_scale,
    )


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
        keep, dtype = query.x_t.requires_grad, pool._dtype
        # put once: a retry sends the reference
        self._packed = packed = ray.put(pool.pack(query))
        key = (
            self._key
        )  # the call must not hold its ticket: the query would stay in the store until a cycle is found
        self._call: _Call | None = pool.call(lambda replica: replica.answer.remote(packed, key, keep, dtype))
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
        dtype = self._pool._dtype
        sent = ray.put(wire.pack(cotangent, dtype))
        pool = self._pool
        first = pool.call(
            lambda replica: replica.vjp.remote(None, self._key, sent, dtype), prefer=self._answered_by
        )
        value, replica = pool.result(first)
        if value is None:
            again = pool.call(lambda r: r.vjp.remote(self._packed, self._key, sent, dtype), prefer=replica)
            value, _ = pool.result(again)
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
        self._feature_channels = _feature_channels(like)

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        query = Query(network="teacher", want="x0", x_t=x_t, t=t, cond=cond)
        return self._pool[0].submit(query).answer()

    def features(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        query = Query(network="teacher", want="features", x_t=x_t, t=t, cond=cond)
        return self._pool[0].submit(query).answer()

    @property
    def feature_channels(self) -> int:
        if self._feature_channels is None:
            return super().feature_channels
        return self._feature_channels


def _feature_channels(denoiser: Denoiser) -> int | None:
    try:
        return denoiser.feature_channels
    except ConfigError:
        return None
