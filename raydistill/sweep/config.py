"""What a sweep varies, what it looks for, and what of that can't work."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from raydistill.config import apply_overrides, flatten
from raydistill.errors import ConfigError
from raydistill.eval.protocol import higher_is_better
from raydistill.runtime.settings import RunConfig, validate

Search = Literal["grid", "random", "optuna"]
Settings = dict[str, Any]
"""Of a trial: dotted names and values."""


@dataclass(frozen=True)
class Range:
    """Numbers from low to high: even, even in the logarithm, or whole ones (high excluded)."""

    kind: Literal["uniform", "loguniform", "randint"]
    low: float
    high: float

    def __post_init__(self) -> None:
        finite = math.isfinite(self.low) and math.isfinite(self.high)
        if self.kind not in ("uniform", "loguniform", "randint") or not (finite and self.low < self.high):
            raise ConfigError(f"{self} is no range: uniform, loguniform or randint with LOW below HIGH")
        if self.kind == "loguniform" and self.low <= 0:
            raise ConfigError(f"{self}: LOW must be above 0")
        if self.kind == "randint" and (self.low % 1 or self.high % 1):
            raise ConfigError(f"{self}: LOW and HIGH must be whole numbers")

    def __str__(self) -> str:
        return f"{self.kind}({self.low:g},{self.high:g})"


Values = Sequence[Any] | Range
"""What a setting takes: one of these values, or a number of a range."""
_RANGE = re.compile(r"(uniform|loguniform|randint)\(([^,()]+),([^,()]+)\)")
_FIXED = (
    "name", "output_dir", "resume", "train.generator_updates", "evaluator.", "checkpoint.", "placement.", "tracking.",
    "prepare.",
)  # fmt: skip
_SHARED = ("teacher.guidance_scale", "teacher.preflight")
"""Of the teacher's settings those that trials of one teacher may differ in; the scale travels with the query."""


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """A sweep: its runs but for what is varied, the space, and how it is searched."""

    run: RunConfig
    """What the trials have in common; its name is the sweep's."""
    space: Mapping[str, Values]
    """Dotted settings and what they take."""
    metric: str | None = None
    """Figure of the evaluator that trials are judged by, and each one's best snapshot; none: evaluator.best_by's."""
    search: Search = "grid"
    """grid: all combinations of the values; random and optuna (TPE) draw `num_trials` of the space."""
    num_trials: int = 16
    """Trials of a random or optuna search."""
    asha: bool = True
    """Stop trials whose figure is behind the others' at the same update (ASHA, arXiv:1810.05934)."""
    grace_updates: int | None = None
    """Generator updates before a trial may be stopped; none: until its first evaluation."""
    reduction_factor: float = 2.0
    """At each of ASHA's rungs one trial in so many goes on; the next rung is so many times as far."""
    max_at_once: int = 0
    """Trials at a time; 0: as many as the cluster has room for."""
    share_teacher: bool = True
    """One teacher service for all trials; false: a teacher in every trial's workers."""

    @property
    def name(self) -> str:
        return self.run.name

    @property
    def folder(self) -> str:
        """Where sweep.json is; the trials' runs are beside it."""
        return self.run.run_dir

    @property
    def figure(self) -> str:
        """The metric's whole name."""
        return self.metric or self.run.evaluator.best_metric

    @property
    def mode(self) -> Literal["min", "max"]:
        return "max" if higher_is_better(self.figure) else "min"

    @property
    def own_service(self) -> str:
        """The name of the teacher service that ends with the sweep."""
        return own_service(self.run)

    @property
    def count(self) -> int:
        """Trials of the whole sweep."""
        return self.num_trials if self.search == "optuna" else len(trials_of(self))

    @property
    def grace(self) -> int:
        return self.grace_updates or self.run.evaluator.every


def own_service(run: RunConfig) -> str:
    """Its folder is part of the name: sweeps of one name may run on one cluster."""
    return f"sweep-{run.name}-{hashlib.sha256(run.run_dir.encode()).hexdigest()[:8]}"


def parse_space(texts: Sequence[str]) -> dict[str, Values]:
    """NAME=1,2,5 or NAME=[[625],[999,499]] or NAME=uniform(1,4), loguniform(1e-5,1e-3), randint(1,10).

    Raises ConfigError for anything else.
    """
    space: dict[str, Values] = {}
    for text in texts:
        name, _, values = (part.strip() for part in text.partition("="))
        try:
            if matched := _RANGE.fullmatch(values):
                kind, low, high = matched.groups()
                space[name] = Range(kind, float(low), float(high))  # type: ignore[arg-type]
            elif values.startswith("["):
                space[name] = list(json.loads(values))
            else:
                space[name] = [part.strip() for part in values.split(",") if part.strip()]
            if not name or not space[name]:
                raise ValueError("nothing to vary")
        except (ConfigError, ValueError) as error:
            raise ConfigError(
                f"--over {text!r} ({error}) must be NAME=VALUE,VALUE or NAME=[JSON,JSON] or NAME=uniform(LOW,HIGH), "
                "loguniform(LOW,HIGH) or randint(LOW,HIGH)"
            ) from None
    return space


def trial_config(run: RunConfig, settings: Mapping[str, Any], name: str) -> RunConfig:
    """The run of a trial. Raises ConfigError for an unknown setting or a refused value.

    No trial is registered as a model: tracking.register_as is for the sweep's best one.
    """
    texts = [
        f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items()
    ]
    made = apply_overrides(run, texts)
    return replace(made, name=name, tracking=replace(made.tracking, register_as=None))


def checked(config: SweepConfig) -> SweepConfig:
    """The sweep with absolute paths, a shared teacher's placement, and values of the settings' own types.

    Raises ConfigError or PlacementError for what can't work, before anything is started.
    """
    from raydistill.runtime.build import denoiser_on_meta, method_for
    from raydistill.runtime.run import resolve

    run = resolve(config.run)
    validate(run)
    _check_search(config, run)
    space = {name: _checked_values(config, run, name, values) for name, values in config.space.items()}
    own = [
        name
        for name in space
        if (name.startswith("teacher.") and name not in _SHARED)
        or name in ("train.channels_last", "train.compile")
    ]
    if not config.share_teacher and run.placement.teacher_service:
        raise ConfigError(
            f"--own-teachers and placement.teacher_service={run.placement.teacher_service!r}: leave one of them out"
        )
    if config.share_teacher and own:
        raise ConfigError(
            f"trials that differ in {', '.join(own)} can't share one teacher: --own-teachers gives each its own"
        )
    placement = run.placement
    if config.share_teacher:
        mode: Any = "teachers" if placement.mode == "colocated" else placement.mode
        service = placement.teacher_service or own_service(run)
        placement = replace(placement, mode=mode, teacher_service=service)
    best_by = next(short for short, name in run.evaluator.figures.items() if name == config.figure)
    evaluator = replace(run.evaluator, best_by=best_by, may_skip=False)  # type: ignore[arg-type]
    run = replace(run, placement=placement, resume=True, evaluator=evaluator)
    config = replace(config, run=run, space=space)
    if config.search != "optuna":  # whose combinations are not known yet
        schedule = None
        for number, settings in enumerate(trials_of(config)):
            trial = trial_config(run, settings, f"{run.name}-{number:03d}")
            validate(trial)
            if schedule is None or config.space.keys() & {"teacher.path", "teacher.prediction"}:
                schedule = denoiser_on_meta(trial)[0].schedule
            method_for(trial, schedule)
    return config


def _check_search(config: SweepConfig, run: RunConfig) -> None:
    if not config.space:
        raise ConfigError("a sweep needs something to vary: --over NAME=VALUE,VALUE")
    if fixed := [name for name in config.space if name.startswith(_FIXED)]:
        raise ConfigError(
            f"{', '.join(fixed)} can't be varied: trials are compared by one evaluator at the same updates, and "
            "a sweep names, places and records them itself"
        )
    if not run.evaluator.enabled:
        raise ConfigError("evaluator.enabled=false: a sweep judges its trials by the evaluator's figures")
    if run.placement.session == "inline":
        raise ConfigError("placement.session=inline: a sweep's trials run under Ray, leave it out")
    figures = run.evaluator.figures.values()
    if config.figure not in figures:
        raise ConfigError(
            f"--metric {config.figure!r} is reported by no trial; their evaluator reports {', '.join(figures)}"
        )
    for name, value, least in (
        ("num-trials", config.num_trials, 1),
        ("at-once", config.max_at_once, 0),
        ("grace-updates", config.grace, 1),
    ):
        if value < least:
            raise ConfigError(f"--{name} {value} must be at least {least}")
    if not 1 < config.reduction_factor < math.inf:
        raise ConfigError(f"--reduction-factor {config.reduction_factor:g} must be above 1")


def _checked_values(config: SweepConfig, run: RunConfig, name: str, values: Values) -> Values:
    if isinstance(values, Range):
        if config.search == "grid":
            raise ConfigError(
                f"{name}={values}: a grid has no points in a range; give values, or --search random or optuna"
            )
        last = values.high - 1 if values.kind == "randint" else math.nextafter(values.high, values.low)
        for value in (values.low, last):
            value = int(value) if values.kind == "randint" else value
            validate(trial_config(run, {name: value}, run.name))
        return values
    typed = []
    for value in values:
        tried = trial_config(run, {name: value}, run.name)
        validate(tried)
        typed.append(flatten(tried)[name])
    return typed


def draw(generator: random.Random, values: Values) -> Any:
    """One value."""
    if not isinstance(values, Range):
        return generator.choice(list(values))
    if values.kind == "randint":
        return generator.randrange(int(values.low), int(values.high))
    if values.kind == "uniform":
        return generator.uniform(values.low, values.high)
    # ratio ** u spans the range for u in [0, 1)
    return float(values.low * (values.high / values.low) ** generator.random())


def trials_of(config: SweepConfig) -> list[Settings]:
    """The settings of all trials of a grid or random search, in order; the same for the same seed."""
    if config.search == "grid":
        lists = [list(values) for values in config.space.values() if not isinstance(values, Range)]
        return [dict(zip(config.space, chosen, strict=True)) for chosen in itertools.product(*lists)]
    generator = random.Random(config.run.seed)
    return [
        {name: draw(generator, values) for name, values in config.space.items()}
        for _ in range(config.num_trials)
    ]
