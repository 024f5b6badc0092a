"""Teachers behind Ray actors: the replicas, the manager of a pool of them, and pools that outlive a job.

    rank --how many queries are out--> _PoolManager, which starts and ends replicas between placement.teacher_replicas
                                       and placement.max_teacher_replicas and holds the weights, once a node

A named pool (placement.teacher_service) serves several jobs; the guidance scale travels in the query, so they may
differ in it. The ranks' side is `raydistill.runtime.pool`.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import socket
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raydistill.errors import PlacementError, RayDistillError
from raydistill.models.denoiser import Cond, Denoiser, Packed, with_weights
from raydistill.roles.teacher import KeptGraphs, TeacherScorer
from raydistill.runtime import wire
from raydistill.runtime.actors import get
from raydistill.runtime.build import build_pipeline, pick_device, tuned_teacher
from raydistill.runtime.local_cluster import address_to_join
from raydistill.runtime.prometheus import Figures, latency
from raydistill.runtime.settings import RunConfig, config_from_dict, to_dict

log = logging.getLogger(__name__)

NAMESPACE = "raydistill"
_SERVICE = "teacher_service/"
REPORT_S = 1.0
"""Seconds between a client's reports to the manager."""
_FIRST_REPLICA_S = 5.0
_CONNECT_S = 5.0


@dataclass(frozen=True)
class PoolSpec:
    """What a pool is made of, taken from the settings of the run that started it."""

    identity: str
    """The teacher: hash of its weights, and the arithmetic it computes in."""
    path: str
    name: str
    """The run's whose pool it is, or service/NAME: its label in Prometheus."""
    minimum: int
    maximum: int
    idle_s: float
    cpus: float
    gpus: float
    kept_graphs: int
    compile: bool
    transport: wire.Transport


def _give_back_memory() -> None:
    """Weights that are in the object store would stay here, too: networks hold themselves in cycles until Python looks
    for such, and what is freed stays with glibc."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def teacher_identity(config: RunConfig, fingerprint: str) -> str:
    """What two runs must have in common to share a teacher."""
    layout = "channels_last" if config.train.channels_last else "contiguous"
    compiled = "/compiled" if config.train.compile else ""
    return f"{fingerprint[:16]}/{config.teacher.prediction}/{config.teacher.dtype}/{layout}{compiled}"


def _label(config: RunConfig) -> str:
    service = config.placement.teacher_service
    return f"service/{service}" if service else config.name


class _TeacherActor:
    """One replica: a teacher on shared weights."""

    def __init__(
        self, parts: Packed, weights: Mapping[str, Any], null: Mapping[str, Any] | None, spec: PoolSpec
    ):
        """parts: the teacher without its weights; null: of one sample, None where it has none."""
        self._built: tuple[KeptGraphs, torch.device] | None = None
        self._parts, self._weights, self._null, self._spec = parts, weights, null, spec
        self._latency = latency(spec.name)

    def ready(self) -> None:
        """Answers when the process is there, and has imported what the teacher is made of."""
        self._parts.kind.import_libraries()

    def _service(self) -> tuple[KeptGraphs, torch.device]:
        # built by the first call, not by the constructor, so that a failure reaches the caller as itself
        if self._built is None:
            if not self._spec.gpus:
                torch.set_num_threads(max(1, int(self._spec.cpus)))  # of this thread, which answers
            device = pick_device(self._spec.gpus, "placement.gpus_per_teacher")
            denoiser = with_weights(self._parts.unpack(), wire.shared_weights(self._weights)).to(device)
            if self._spec.compile:
                denoiser.network.compile()
            null = None
            if self._null is not None:
                null = Cond({name: wire.unpack(array, device) for name, array in self._null.items()}).expand
            self._built = KeptGraphs(TeacherScorer(denoiser, null), self._spec.kept_graphs), device
        return self._built

    def answer(
        self, packed: Mapping[str, Any], key: str, keep: bool, dtype: wire.WireDtype, asked_at: float
    ) -> Any:
        """asked_at: seconds since 1970, by the asking node's clock; here and below."""
        service, device = self._service()
        answer = service.answer(wire.unpack_query(packed, device, differentiable=keep), key)
        return self._reply(answer, dtype, asked_at)

    def vjp(
        self,
        packed: Mapping[str, Any] | None,
        key: str,
        cotangent: Any,
        dtype: wire.WireDtype,
        asked_at: float,
    ) -> Any:
        """Without `packed` an empty one where the graph is gone: the caller then asks again with it."""
        service, device = self._service()
        if packed is not None:
            service.answer(wire.unpack_query(packed, device, differentiable=True), key)
        gradient = service.vjp(key, wire.unpack(cotangent, device))
        return self._reply(torch.empty(0) if gradient is None else gradient, dtype, asked_at)

    def _reply(self, answer: torch.Tensor, dtype: wire.WireDtype, asked_at: float) -> Any:
        packed = wire.pack(answer, dtype, self._spec.transport)
        self._latency.observe(max(time.time() - asked_at, 0.0))  # clocks of two nodes may differ
        return packed


def wanted_replicas(
    now: int, outstanding: int, idle_s: float, *, minimum: int, maximum: int, rest_s: float
) -> int:
    """How many replicas there should be: one more while queries wait two deep, one less after `rest_s` of rest.

    outstanding: queries asked and not answered; idle_s: time since there were more of them than one replica less
    could serve at once.
    """
    if outstanding > 2 * now:
        now += 1
    elif idle_s > rest_s:
        now -= 1
    return min(max(now, minimum), maximum)


def _death(reference: Any) -> ray.exceptions.RayActorError | None:
    """What the actor of a call that is over died of; None if it answered."""
    try:
        ray.get(reference)
    except ray.exceptions.RayActorError as error:
        return error
    return None


class _PoolManager:
    """Starts and ends replicas; Ray itself restarts those that die."""

    def __init__(self, config: dict[str, Any], nodes: Sequence[str]):
        self._config = config_from_dict(config)
        self._nodes = list(nodes)
        self._replicas: dict[str, Any] = {}
        self._starting: dict[str, tuple[Any, Any]] = {}
        self._pings: dict[str, Any] = {}
        self._unmade: dict[str, str] = {}
        """Replicas whose process could not make them, and why."""
        self._outstanding: dict[str, tuple[int, float]] = {}
        self._busy_at = time.monotonic()
        self._figures = Figures(_label(self._config))
        self._args: tuple[Any, ...] | None = None
        self._spec: PoolSpec | None = None
        self._own_copies = 0
        self._lock = threading.RLock()

    def spec(self) -> PoolSpec:
        """What the pool serves; loads the weights and starts the first replicas when it is first asked."""
        with self._lock:
            if self._spec is None:
                self._spec = self._start()
                threading.Thread(target=self._watch, daemon=True, name="scale").start()
            return self._spec

    def handles(self) -> dict[str, Any]:
        """The replicas that are there; waits some seconds for the first."""
        with self._lock:
            self.spec()
            self._welcome(0.0 if self._replicas else _FIRST_REPLICA_S)
            return dict(self._replicas)

    def report(self, client: str, outstanding: int) -> dict[str, Any]:
        """The most queries that a client had out at a time since its last report; answers with the replicas to use."""
        with self._lock:
            self.spec()
            self._outstanding[client] = (outstanding, time.monotonic())
            self._scale(may_grow=True)
            return dict(self._replicas)

    def shared(self) -> tuple[Packed, Any, PoolSpec]:
        """The teacher without its weights, and the reference to these in the object store."""
        with self._lock:
            spec = self.spec()
            assert self._args is not None
            parts, weights, _ = self._args
            return parts, weights, spec

    def count_copy(self) -> None:
        """An evaluator could not use the weights here and has loaded its own."""
        self._own_copies += 1

    def copies(self) -> int:
        """Of the weights in the memory of nodes: one on each where they lie, which all its processes map, and those
        counted besides. GPUs have their own."""
        _, weights, _ = self.shared()
        (where,) = ray.experimental.get_object_locations([weights]).values()
        return len(where["node_ids"]) + self._own_copies

    def _watch(self) -> None:
        """Also without reports: what died is taken off the list, and a service that nobody uses shrinks."""
        while True:
            time.sleep(REPORT_S)
            with self._lock:
                self._take_off_the_dead()
                with contextlib.suppress(PlacementError):  # whoever asks is told
                    # a report of a queue is good for one replica, not for one a second
                    self._scale(may_grow=False)
                waiting, replicas = sum(out for out, _ in self._outstanding.values()), len(self._replicas)
            self._figures.update({"teacher/queue": waiting, "teacher/replicas": replicas})

    def _take_off_the_dead(self) -> None:
        """Replicas that Ray restarts start anew: one that finds no room any more must not attract queries."""
        self._pings = {name: ping for name, ping in self._pings.items() if name in self._replicas}
        for name, handle in list(self._replicas.items()):
            ping = self._pings.get(name)
            if ping is None:
                ping = self._pings[name] = handle.ready.remote()
            if not ray.wait([ping], timeout=0)[0]:
                continue
            del self._pings[name]
            if _death(ping):
                del self._replicas[name]
                self._starting[name] = handle, handle.ready.remote()

    def _welcome(self, timeout_s: float) -> None:
        """Let replicas whose process is there take queries: one that finds no room must not attract any."""
        waiting = [reference for _, reference in self._starting.values()]
        there = ray.wait(waiting, num_returns=1, timeout=timeout_s)[0] if waiting else []
        there += ray.wait(waiting, num_returns=len(waiting), timeout=0)[0] if waiting else []
        for name, (handle, reference) in list(self._starting.items()):
            if reference not in there:
                continue
            death = _death(reference)
            if death is None:
                del self._starting[name]
                self._replicas[name] = handle
            elif death.actor_init_failed:  # Ray does not try that again
                del self._starting[name]
                self._unmade[name] = str(death).strip().splitlines()[-1].strip()
                log.warning("teacher replica %s can't be made: %s", name, self._unmade[name])
            else:
                self._starting[name] = handle, handle.ready.remote()
        if self._unmade and not (self._replicas or self._starting):
            raise PlacementError(
                f"no teacher replica can be made where it was placed: {next(iter(self._unmade.values()))} (do all "
                "nodes have this raydistill and its packages? placement.mode=colocated needs no replicas)"
            )

    def _scale(self, *, may_grow: bool) -> None:
        assert self._spec is not None
        spec, now = self._spec, time.monotonic()
        self._welcome(0.0)
        # a client that was killed says nothing any more
        self._outstanding = {c: v for c, v in self._outstanding.items() if now - v[1] < 10 * REPORT_S}
        outstanding = sum(count for count, _ in self._outstanding.values())
        if outstanding >= len(self._replicas):
            self._busy_at = now
        count = len(self._replicas) + len(self._starting) + len(self._unmade)
        wanted = wanted_replicas(
            count, outstanding, now - self._busy_at,
            minimum=spec.minimum, maximum=spec.maximum, rest_s=spec.idle_s,
        )  # fmt: skip
        if wanted > count and not may_grow:
            return
        if wanted != count:
            self._busy_at = now
        if wanted > count:
            self._add(spec)
        elif wanted < count and self._starting:
            ray.kill(self._starting.popitem()[1][0])
        elif wanted < count and self._replicas:
            # what it has in hand is asked of another replica
            ray.kill(self._replicas.popitem()[1])

    def _start(self) -> PoolSpec:
        config = self._config
        pipeline = build_pipeline(config)
        cond = pipeline.null_cond(1)
        null = None if cond is None else {name: wire.pack(tensor) for name, tensor in cond.tensors.items()}
        fingerprint = pipeline.fingerprint
        denoiser = tuned_teacher(config, pipeline, torch.device("cpu"))
        weights = ray.put(wire.pack_weights(denoiser.state_dict()))
        self._args = (Packed.of(denoiser), weights, null)
        del pipeline, denoiser
        _give_back_memory()
        placement = config.placement
        spec = PoolSpec(
            identity=teacher_identity(config, fingerprint),
            path=config.teacher.path,
            name=_label(config),
            minimum=placement.teacher_replicas,
            maximum=max(placement.teacher_replicas, placement.max_teacher_replicas),
            idle_s=placement.teacher_idle_s,
            cpus=placement.cpus_per_teacher,
            gpus=placement.gpus_per_teacher,
            kept_graphs=placement.teacher_kept_graphs,
            compile=config.train.compile,
            transport=wire.require_transport(placement.teacher_transport),
        )
        for _ in range(spec.minimum):
            self._add(spec)
        return spec

    def _add(self, spec: PoolSpec) -> None:
        assert self._args is not None
        options: dict[str, Any] = {"num_cpus": spec.cpus, "num_gpus": spec.gpus}
        options |= {"max_restarts": -1, "max_task_retries": 0}
        # soft: where that node has gone since, any other does
        options["scheduling_strategy"] = (
            NodeAffinitySchedulingStrategy(self._nodes.pop(0), soft=True) if self._nodes else "SPREAD"
        )
        # a name that no replica had before, also of a manager that was here before this one
        name = uuid.uuid4().hex[:8]
        direct = spec.transport == "nixl"
        handle = (
            ray.remote(enable_tensor_transport=direct)(_TeacherActor)
            .options(**options)
            .remote(*self._args, spec)
        )
        self._starting[name] = handle, handle.ready.remote()


def start_pool(config: RunConfig, nodes: Sequence[str] = ()) -> Any:
    """The manager of the run's own pool, or of the named service, which is started if it is not there.

    nodes: ids of those where the first replicas are to be, one each; the others spread over the cluster.

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
    manager = ray.remote(_PoolManager).options(**options).remote(to_dict(config), nodes)
    try:
        get(manager.spec.remote())
    except RayDistillError:
        ray.kill(manager)  # its name is free for a job whose teacher can be loaded
        raise
    return manager


def shared_teacher(config: RunConfig, fingerprint: str) -> Denoiser | None:
    """The teacher on the weights that the run's service has in the object store; None if none such runs.

    The evaluator computes in fp32, so a service in another arithmetic is no substitute for a copy of its own.
    """
    if not config.placement.teacher_service:
        return None
    try:
        manager = ray.get_actor(f"{_SERVICE}{config.placement.teacher_service}", namespace=NAMESPACE)
    except ValueError:
        return None
    parts, weights, spec = get(manager.shared.remote())
    exact = replace(
        config, teacher=replace(config.teacher, dtype="fp32"), train=replace(config.train, compile=False)
    )
    if spec.identity != teacher_identity(exact, fingerprint):
        ray.get(manager.count_copy.remote())
        return None
    return with_weights(parts.unpack(), wire.shared_weights(ray.get(weights)))


def require_same_teacher(config: RunConfig, manager: Any, fingerprint: str) -> PoolSpec:
    """What the pool serves. Raises PlacementError if it is another teacher than this run's."""
    spec: PoolSpec = get(manager.spec.remote())
    mine = teacher_identity(config, fingerprint)
    if spec.identity != mine:
        raise PlacementError(
            f"placement.teacher_service={config.placement.teacher_service!r} serves the teacher {spec.path} "
            f"({spec.identity}), this run's is {config.teacher.path} ({mine}): choose another "
            "placement.teacher_service, or the same teacher.path, teacher.dtype, teacher.prediction, "
            "train.channels_last and train.compile"
        )
    wire.require_transport(spec.transport)
    return spec


def join_cluster() -> None:
    """Join the cluster of RAY_ADDRESS, or the head of this machine. Raises PlacementError if none answers.

    Ray itself would wait for minutes for a head that is gone.
    """
    address = address_to_join()
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
