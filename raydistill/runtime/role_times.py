"""Seconds of the phases of a window, measured on one device, and the file that carries them to `raydistill plan`.

The trainer's own code runs; each of its phases is timed from outside, the innermost one that is running gets the time,
so the phases add up to the window.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from raydistill.errors import ConfigError
from raydistill.methods.method import Work
from raydistill.runtime.plan import Plan
from raydistill.runtime.settings import RunConfig
from raydistill.runtime.simulate import RoleSeconds
from raydistill.runtime.trainer import Trainer

_NETWORK = "GFLOP of a sample's forward pass"
_BOTH = "through teacher and critic"


class Phases:
    """A clock that runs for one phase at a time."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stack: list[str] = []
        self._since = 0.0
        self.seconds: dict[str, float] = {}

    def _switch(self) -> None:
        """Give the time since the last switch to the phase that ran."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        if self._stack:
            phase = self._stack[-1]
            self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._since
        self._since = now

    def enter(self, phase: str) -> None:
        self._switch()
        self._stack.append(phase)

    def leave(self) -> None:
        self._switch()
        self._stack.pop()

    def timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time counted as this phase's but for what is timed inside it."""

        def call(*args: Any, **named: Any) -> Any:
            self.enter(phase)
            try:
                return function(*args, **named)
            finally:
                self.leave()

        return call

    def take(self) -> dict[str, float]:
        """Seconds by phase since this was last asked."""
        seconds, self.seconds = self.seconds, {}
        return seconds


def measure(trainer: Trainer, windows: int, before: Callable[[], None] = lambda: None) -> RoleSeconds:
    """Medians of so many windows of a trainer that holds all three networks; it should be warm.

    before: called before each window, outside its time.
    """
    with timed_phases(trainer) as phases:
        rows = []
        for _ in range(windows):
            before()
            rows.append(window_phases(trainer, phases))
    return medians(rows)


def window_phases(trainer: Trainer, phases: Phases) -> RoleSeconds:
    """The phases of one window, inside `timed_phases`; they add up to its time."""
    phases.take()
    phases.enter("generator_update")  # what belongs to no other phase
    trainer.window()
    phases.leave()
    took = {name.name: phases.seconds.get(name.name, 0.0) for name in fields(RoleSeconds)}
    r, first = trainer.method.critic_updates_per_generator, trainer.method.critic_first
    work = _work(trainer)
    # gradients through both networks come in one backward pass
    both, teachers = phases.seconds.get(_BOTH, 0.0), work.teacher_answer + work.critic_answer
    took["critic_answer"] += both * work.critic_answer / teachers
    teacher = took["teacher_answer"] + both * work.teacher_answer / teachers
    asked = r * work.teacher_for_critic if first else 0.0
    for_critic = teacher * asked / (asked + work.teacher_answer) if asked else 0.0
    return RoleSeconds(
        generator_update=took["generator_update"] + took["generator_step"],
        sample=took["sample"] / (r + first),
        critic_answer=took["critic_answer"],
        critic_update=(took["critic_update"] + took["critic_step"]) / r,
        teacher_answer=teacher - for_critic,
        generator_step=took["generator_step"],
        critic_step=took["critic_step"] / r,
        teacher_for_critic=for_critic / r,
    )


def _work(trainer: Trainer) -> Work:
    """By which the seconds of phases that can't be told apart are shared out."""
    backward = 3.0 if trainer.config.train.activation_checkpointing else 2.0
    guided = trainer.config.teacher.guidance_scale != 1
    return trainer.method.work(encoder_share=0.5, backward=backward, guided=guided)


def medians(rows: Sequence[RoleSeconds]) -> RoleSeconds:
    """Phase by phase."""
    return RoleSeconds(
        **{
            field.name: statistics.median(getattr(row, field.name) for row in rows)
            for field in fields(RoleSeconds)
        }
    )


@contextmanager
def timed_phases(trainer: Trainer) -> Iterator[Phases]:
    """A clock on the phases of a trainer that holds all three networks."""
    phases = Phases(trainer.device)
    gan = trainer.method.needs.gan_head
    own_features = trainer.method.needs.head_features == "critic"
    answerer = "critic_answer" if own_features else "teacher_answer"
    through = trainer.method.needs.teacher == "vjp" and not gan
    if through:
        answerer = _BOTH
    backward = trainer.generator.backward

    def through_answers(x: Any, leaf: Any, losses: Any, micro_batches: int, others_done: Any = None) -> None:
        # until others_done the loss terms are differentiated at the samples, through the network of the GAN's features
        phases.enter(answerer)

        def done() -> None:
            phases.leave()
            if others_done is not None:
                others_done()

        backward(x, leaf, losses, micro_batches, done)

    wrapped: list[tuple[Any, str, Callable[..., Any]]] = [
        (owner, name, phases.timed(phase, getattr(owner, name)))
        for owner, name, phase in (
            (trainer, "generator_update", "generator_update"),
            (trainer, "critic_update", "critic_update"),
            (trainer.generator, "sample", "sample"),
            (trainer.generator, "step", "generator_step"),
            (trainer.critic, "step", "critic_step"),
            (trainer.critic, "answer", "critic_answer"),
            (trainer.teacher, "answer", "teacher_answer"),
        )
    ]
    if gan or through:
        wrapped.append((trainer.generator, "backward", through_answers))
    if gan and not own_features:
        critic = trainer.critic.critic
        wrapped.append((critic, "logits", phases.timed("teacher_answer", critic.logits)))
    for owner, name, wrapper in wrapped:
        setattr(owner, name, wrapper)
    try:
        yield phases
    finally:
        for owner, name, _ in wrapped:
            delattr(owner, name)  # the class's own appears again


def workload(config: RunConfig, plan: Plan) -> dict[str, Any]:
    """What the seconds of a phase depend on beside device and batch size, by the settings' names."""
    train = config.train
    return {
        _NETWORK: float(f"{plan.gflop_per_forward:.6g}"),
        "teacher.guidance_scale": "other than 1" if config.teacher.guidance_scale != 1 else "1",
        "teacher.dtype": config.teacher.dtype,
        **{f"the method's {name} in passes": round(passes, 4) for name, passes in asdict(plan.work).items()},
        "train.dtype": train.dtype,
        "train.channels_last": train.channels_last,
        "train.compile": train.compile,
        "train.activation_checkpointing": train.activation_checkpointing,
    }


def entry(seconds: RoleSeconds, config: RunConfig, plan: Plan) -> dict[str, Any]:
    """A measurement's part of the file; its device, batch size and name stand beside it."""
    return {"role_seconds": asdict(seconds), "workload": workload(config, plan)}


@dataclass(frozen=True)
class RoleTimes:
    """Measured seconds, for the batch size of the run that they are to predict."""

    seconds: RoleSeconds
    source: str
    """Where they come from, in words."""


def read(path: Path, config: RunConfig, plan: Plan, job: str) -> RoleTimes:
    """The role times of a run from what `jobs/bench_step.py --out` wrote.

    Another batch size is scaled in proportion, the optimiser's steps left as they are. Raises ConfigError if the file
    can't be read or has no measurement of this network with these settings.
    """
    again = f"python jobs/bench_step.py --job {job} --out {path}"
    try:
        results = json.loads(path.read_text())["results"]
        found = [result for result in results if "role_seconds" in result]
        wanted = workload(config, plan)
        matching = [result for result in found if result["workload"] == wanted]
        if matching:
            size = config.train.batch_size
            best = min(matching, key=lambda result: abs(result["batch_size"] - size))
            return _for_batch(best, size, path)
        nearest = min(found, key=lambda result: _different(result["workload"], wanted), default=None)
        named = None if nearest is None else f"{nearest['size']}: {_difference(nearest['workload'], wanted)}"
    except OSError as error:
        raise ConfigError(
            f"--role-times {path} can't be read ({error.strerror}): write it with {again}"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"--role-times {path} is no file of role times ({type(error).__name__}: {error}): write it with {again}"
        ) from error
    if named is None:
        raise ConfigError(
            f"--role-times {path} has no role times, an older bench_step wrote it: write it with {again}"
        )
    raise ConfigError(
        f"--role-times {path} was measured with another network or other settings than this job's (the nearest, "
        f"{named}): measure with {again}, or set the job as it was measured"
    )


def _for_batch(result: Mapping[str, Any], size: int, path: Path) -> RoleTimes:
    values = {field.name: float(result["role_seconds"][field.name]) for field in fields(RoleSeconds)}
    if not all(value >= 0 for value in values.values()) or not sum(values.values()) > 0:
        raise ValueError("role_seconds must not be negative, nor all 0")
    seconds, measured = RoleSeconds(**values), int(result["batch_size"])
    source = f"measured at batch {measured} on {result['device']} ({path.name}, {result['size']})"
    if measured != size:
        source += f", taken {size / measured:g} times for batch {size}, the optimiser's steps once"
    return RoleTimes(scaled(seconds, size / measured), source)


def scaled(seconds: RoleSeconds, times: float) -> RoleSeconds:
    """For so many times the batch: the optimiser's steps stay."""
    return replace(
        seconds,
        generator_update=(seconds.generator_update - seconds.generator_step) * times + seconds.generator_step,
        sample=seconds.sample * times,
        critic_answer=seconds.critic_answer * times,
        critic_update=(seconds.critic_update - seconds.critic_step) * times + seconds.critic_step,
        teacher_answer=seconds.teacher_answer * times,
        teacher_for_critic=seconds.teacher_for_critic * times,
    )


def _different(measured: Mapping[str, Any], wanted: Mapping[str, Any]) -> int:
    # another network is further away than any setting
    return sum(
        (len(wanted) if name == _NETWORK else 1) for name in wanted if measured.get(name) != wanted[name]
    )


def _difference(measured: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} was {measured.get(name)}, the job's is {value}"
        for name, value in wanted.items()
        if measured.get(name) != value
    )
