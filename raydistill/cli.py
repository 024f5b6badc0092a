"""The command line: a thin layer over `raydistill.runtime`, and what a job file calls.

Nothing heavy is imported before a command is known, so `raydistill --help` answers at once.
"""

import argparse
import contextlib
import importlib.util
import inspect
import json
import os
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from raydistill.errors import ConfigError, PlacementError, RayDistillError

if TYPE_CHECKING:
    from raydistill.runtime.placements import PlacementPlan
    from raydistill.runtime.plan import Plan
    from raydistill.runtime.settings import RunConfig
    from raydistill.sweep.config import SweepConfig

Recipe = Callable[[], "RunConfig"]

_EXAMPLES = """\
examples:
  raydistill train jobs/dmd2_coco.py                    the embedded teacher and data, on this machine
  raydistill train jobs/dmd2_coco.py --dry-run          what that would run, and with how much memory
  raydistill train jobs/dmd2_coco.py method.critic_updates_per_generator=10 name=ten
  raydistill submit -- python jobs/dmd2_coco.py         the same as a Ray job, on a local head
  raydistill sample runs/dmd2_coco --prompt "a red circle" --out circle.png
  raydistill evaluate runs/dmd2_coco --num-samples 2000
  raydistill report runs/dmd2_coco runs/ten --out report.html
  raydistill export runs/dmd2_coco one_step_pipeline    a folder for diffusers' from_pretrained
  raydistill methods --json

A failure that raydistill foresaw is one line on stderr and exit code 2; RAYDISTILL_TRACEBACK=1 shows where it
came from.
"""


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """The console script `raydistill`; ends the process with the command's exit code."""
    arguments = _parse(_parser(), argv)
    sys.exit(_guarded(lambda: arguments.command(arguments)))


def job_main(
    recipe: Recipe, presets: Mapping[str, Recipe] | None = None, argv: Sequence[str] | None = None
) -> NoReturn:
    """What a job file calls: run `recipe()` with the command line's overrides; ends the process.

    Args:
        recipe: the job's default run.
        presets: other runs of the same job, chosen by `--preset NAME`.
        argv: the command line without the program's name; the process's own if None.
    """
    examples = sys.modules[recipe.__module__].__doc__
    parser = argparse.ArgumentParser(
        description=inspect.cleandoc(recipe.__doc__ or ""), epilog=examples, formatter_class=_HELP
    )
    _add_run_arguments(parser, presets or {})
    arguments = _parse(parser, argv)
    sys.exit(_guarded(lambda: _run(recipe, presets or {}, arguments)))


def sweep_main(recipe: "Callable[[], SweepConfig]", argv: Sequence[str] | None = None) -> NoReturn:
    """What a sweep's job file calls: run `recipe()` with the command line's changes; ends the process."""
    parser = argparse.ArgumentParser(
        description=inspect.cleandoc(recipe.__doc__ or ""),
        epilog=sys.modules[recipe.__module__].__doc__,
        formatter_class=_HELP,
    )
    _add_sweep_arguments(parser)
    arguments = _parse(parser, argv)
    sys.exit(_guarded(lambda: _run_sweep(recipe(), arguments)))


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Overrides may stand before, between and after the options, which argparse alone does not allow."""
    arguments, rest = parser.parse_known_args(argv)
    if rest and (not hasattr(arguments, "overrides") or any(text.startswith("-") for text in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides += rest
    return arguments


def _guarded(command: Callable[[], int]) -> int:
    """The command's exit code; foreseen failures become one line and 2, Ctrl-C becomes 130."""
    try:
        return command()
    except RayDistillError as error:
        if os.environ.get("RAYDISTILL_TRACEBACK"):
            traceback.print_exc()
        sys.stdout.flush()
        from raydistill.tracking import without_secrets

        print(f"raydistill: error: {without_secrets(' '.join(str(error).split()))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("raydistill: interrupted", file=sys.stderr)
        return 130


def _run(recipe: Recipe, presets: Mapping[str, Recipe], arguments: argparse.Namespace) -> int:
    from raydistill.config import describe
    from raydistill.tracking import without_secrets

    config = _configured(recipe, presets, arguments)
    if arguments.help_settings:
        print(without_secrets(describe(config)))
        return 0
    if arguments.dry_run:
        return _dry_run(config)
    from raydistill.runtime.run import run
    from raydistill.runtime.summary import table

    summary = run(config)
    print(table(summary))
    where = Path(summary["run_dir"])
    if where.is_relative_to(Path.cwd()):
        where = where.relative_to(Path.cwd())
    # A promise to whoever reads the output: this is its last line.
    print(f"summary: {where}/summary.json", flush=True)
    return 0


def _sweep(arguments: argparse.Namespace) -> int:
    from raydistill.sweep.config import SweepConfig

    recipe, presets = load_job(arguments.job)
    made: object = recipe() if arguments.preset is None else None
    if isinstance(made, SweepConfig):
        return _run_sweep(made, arguments)
    run = _configured(recipe, presets, arguments)
    run = replace(run, name=f"sweep_{run.name}")
    return _run_sweep(SweepConfig(run=run, space={}), arguments)


def _run_sweep(config: "SweepConfig", arguments: argparse.Namespace) -> int:
    from raydistill.config import apply_overrides
    from raydistill.sweep.config import checked, parse_space, trials_of
    from raydistill.tracking import require_store

    given = {
        "metric": arguments.metric,
        "search": arguments.search,
        "num_trials": arguments.num_trials,
        "grace_updates": arguments.grace_updates,
        "reduction_factor": arguments.reduction_factor,
        "max_at_once": arguments.at_once,
        "asha": False if arguments.no_asha else None,
        "share_teacher": False if arguments.own_teachers else None,
    }
    if arguments.num_trials is not None and (arguments.search or config.search) == "grid":
        raise ConfigError(
            f"--num-trials {arguments.num_trials}: a grid has a trial for each combination; leave it out, or --search "
            "random or optuna"
        )
    config = replace(
        config,
        run=apply_overrides(config.run, arguments.overrides),
        space={**config.space, **parse_space(arguments.over)},
        **{name: value for name, value in given.items() if value is not None},
    )
    if arguments.dry_run:
        config = checked(config)
        require_store(config.run.tracking, config.run.run_dir)
        print(f"{config.name}: {config.search} search by {config.figure} ({config.mode})")
        for name, values in config.space.items():
            print(f"  {name}: {values}")
        if config.search != "optuna":
            for number, settings in enumerate(trials_of(config)):
                print(f"trial {number}: {settings}")
        else:
            print(f"{config.count} trials, each chosen when it begins, by the figures of those before it")
        return 0
    from raydistill.runtime.local_cluster import address_to_join, prepare_to_join

    # before Ray is imported, which reads how to authenticate then
    prepare_to_join(address_to_join() if os.environ.get("RAY_ADDRESS") else "")

    from raydistill.sweep.sweep import sweep

    board = sweep(config, resume=arguments.resume)
    print(f"\n{board.table()}")
    best, where = board.best, Path(board.config.folder)
    where = where.relative_to(Path.cwd()) if where.is_relative_to(Path.cwd()) else where
    if best is not None:
        print(
            f"best: {best.name} ({board.config.figure} {best.metric:.4g} at update {best.step}): {best.settings}"
        )
    results = board.results
    if results["export"]:
        print(f"exported: {where}/export (update {results['export_step']} of {best.name if best else ''})")
    else:
        print(f"not exported: {results['export_error']}")
    if "registered" in results:
        print(f"registered: {results['registered'] or 'not, see the warning'}")
    if results["report"]:
        print(f"report: {where}/report.html")
    print(f"sweep: {where}/sweep.json", flush=True)
    if board.failed:
        from raydistill.errors import TrainingError

        raise TrainingError(
            f"{len(board.failed)} of {len(board.rows)} trials failed, --resume tries them again; "
            f"{board.failed[0].name}: {board.failed[0].error}"
        )
    return 0


def _configured(recipe: Recipe, presets: Mapping[str, Recipe], arguments: argparse.Namespace) -> "RunConfig":
    from raydistill.config import apply_overrides
    from raydistill.sweep.config import SweepConfig

    if arguments.preset is not None and arguments.preset not in presets:
        known = ", ".join(presets) or "none, this job has no presets"
        raise ConfigError(f"--preset {arguments.preset!r} is unknown; valid: {known}")
    chosen = recipe if arguments.preset is None else presets[arguments.preset]
    made: RunConfig | SweepConfig = chosen()
    if isinstance(made, SweepConfig):
        raise ConfigError("this is a sweep's job file: start it with python, or with raydistill sweep")
    return apply_overrides(made, arguments.overrides)


def _checked(config: "RunConfig") -> "RunConfig":
    from raydistill.runtime.run import resolve
    from raydistill.runtime.settings import validate

    config = resolve(config)
    validate(config)
    return config


def _dry_run(config: "RunConfig") -> int:
    from raydistill.config import describe
    from raydistill.runtime.plan import plan
    from raydistill.runtime.services import require_evaluation, require_protocol_fits
    from raydistill.tracking import without_secrets

    config = _checked(config)
    require_protocol_fits(config)
    print(without_secrets(describe(config)), end="\n\n")
    print(plan(config).table())
    try:
        require_evaluation(config)
    except RayDistillError as error:
        print(f"\nwarning: a start would fail here: {' '.join(str(error).split())}")
    return 0


def load_job(name: str) -> tuple[Recipe, Mapping[str, Recipe]]:
    """Recipe and presets of a job file, or of the job that the registry has for a method's name."""
    from raydistill.methods import METHODS

    path = Path(METHODS[name].job if name in METHODS else name)
    if not path.is_file():
        known = ", ".join(METHODS)
        raise ConfigError(
            f"no job file {str(path)!r} here; give a path such as jobs/dmd2_coco.py or one of: {known}"
        )
    spec = importlib.util.spec_from_file_location("raydistill_job", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} is no job file: its name does not end in .py")
    # Registered, because dataclasses find the names in their annotations through sys.modules.
    job = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent.resolve()))  # as for python JOB, which may import its neighbours
    spec.loader.exec_module(job)
    if not callable(getattr(job, "recipe", None)):
        raise ConfigError(f"{path} is no job file: it defines no function `recipe` that returns a RunConfig")
    return job.recipe, getattr(job, "PRESETS", {})


def _train(arguments: argparse.Namespace) -> int:
    recipe, presets = load_job(arguments.job)
    return _run(recipe, presets, arguments)


def _plan(arguments: argparse.Namespace) -> int:
    from raydistill.runtime.fitting import remedy
    from raydistill.runtime.placements import compare, network, table
    from raydistill.runtime.plan import plan
    from raydistill.runtime.role_times import read

    devices, teachers = arguments.devices, arguments.teachers
    if len(teachers) not in (1, len(devices)):
        raise ConfigError(
            f"--teachers has {len(teachers)} numbers and --devices {len(devices)}: give one for all or one for each"
        )
    recipe, presets = load_job(arguments.job)
    config = _checked(_configured(recipe, presets, arguments))
    planned = plan(config)
    preset = f" --preset {arguments.preset}" if arguments.preset else ""
    job = arguments.job + preset
    times = read(arguments.role_times, config, planned, job) if arguments.role_times else None
    net = network(arguments.latency_us, arguments.gbit_per_s, times)
    print(planned.table())
    pairs = list(zip(devices, teachers * (len(devices) // len(teachers)), strict=True))
    found = [(number, compare(config, planned, number, of_them, times, net)) for number, of_them in pairs]
    print(f"\non {', '.join(map(str, devices))} device{'s' * (devices != [1])}:")
    limit = config.placement.device_gib if arguments.device_gib is None else arguments.device_gib
    try:
        print(table(config, found, limit, times, net))
    except PlacementError as error:
        if limit is None:
            raise
        raise PlacementError(f"{error}; {remedy(config, pairs, limit)}") from None
    if limit is not None:
        for (number, of_them), (_, row) in zip(pairs, found, strict=True):
            print(_micro_batch(config, planned, number, of_them, row, limit))
    return 0


def _micro_batch(
    config: "RunConfig",
    planned: "Plan",
    devices: int,
    teachers: int,
    row: "list[PlacementPlan]",
    limit: float,
) -> str:
    from raydistill.runtime.fitting import MARGIN, largest_micro_batch
    from raydistill.runtime.placements import suggested
    from raydistill.runtime.plan import GIB

    try:
        chosen = suggested(row, limit)
    except PlacementError:
        return f"micro-batch on {devices} devices: none fits"
    fitting = largest_micro_batch(config, planned, chosen, teachers, limit)
    if fitting is None:
        return f"micro-batch on {devices} devices: none fits"
    return (
        f"micro-batch on {devices} devices: train.micro_batch_size={fitting.micro_batch_size} at most, "
        f"{fitting.fullest_bytes / GIB:.2f} of {limit:g} GiB, with {MARGIN - 1:.0%} to spare"
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, at least 1")
    return int(text)


def _gib(text: str) -> float:
    if not 0 < float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} must be positive and finite")
    return float(text)


def _positives(text: str) -> list[int]:
    return [_positive(part) for part in text.split(",")]


def _sample(arguments: argparse.Namespace) -> int:
    from raydistill.runtime.commands import sample

    path = sample(
        arguments.run,
        prompts=arguments.prompt,
        out=arguments.out,
        num_images=arguments.num_images,
        seed=arguments.seed,
        step=arguments.step,
        weights=arguments.weights,
    )
    print(path)
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from raydistill.runtime.commands import evaluate

    metrics = evaluate(
        arguments.run,
        num_samples=arguments.num_samples,
        step=arguments.step,
        weights=arguments.weights,
        tracking_uri=arguments.tracking_uri,
        settings=arguments.overrides,
    )
    print(json.dumps(metrics, indent=2))
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from raydistill.runtime.commands import export, export_difference

    chosen = {"step": arguments.step, "weights": arguments.weights}
    more = {"single_file": arguments.single_file, "push_to": arguments.push_to}
    print(export(arguments.run, arguments.out, **chosen, **more))
    if arguments.single_file:
        print(arguments.single_file)
    if arguments.push_to:
        print(f"pushed to {arguments.push_to}")
    if arguments.check:
        difference = export_difference(arguments.run, arguments.out, prompts=arguments.check, **chosen)
        print(f"maximum difference of the folder's images from the run's own, of 1: {difference:.1e}")
    return 0


def _report(arguments: argparse.Namespace) -> int:
    if bool(arguments.runs) == (arguments.experiment is not None):
        raise ConfigError(
            "report needs runs (raydistill report runs/NAME ...) or --experiment NAME, one of the two"
        )
    from raydistill.report import write_experiment_report, write_report

    chosen = {"tracking_uri": arguments.tracking_uri}
    if arguments.experiment is not None:
        title = arguments.title or f"raydistill: experiment {arguments.experiment}"
        print(write_experiment_report(arguments.experiment, arguments.out, title, **chosen))
        return 0
    named = ", ".join(Path(run).name for run in arguments.runs[:3]) + ", ..." * (len(arguments.runs) > 3)
    print(write_report(arguments.runs, arguments.out, arguments.title or f"raydistill: {named}", **chosen))
    return 0


def _methods(arguments: argparse.Namespace) -> int:
    from raydistill.config import to_dict
    from raydistill.methods import METHODS

    rows = [{"name": name, **to_dict(entry)} for name, entry in METHODS.items()]
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return 0
    for row in rows:
        print(f"{row['name']}: {row['title']} (arXiv {row['paper']})")
        print(textwrap.indent(f"needs  {row['needs']}\njob    {row['job']}", "    "))
    return 0


def _submit(arguments: argparse.Namespace) -> int:
    from raydistill.runtime import local_cluster
    from raydistill.runtime.submit import JobGoesOnError, TerminatedError, submit_and_follow

    entrypoint = arguments.entrypoint[1:] if arguments.entrypoint[:1] == ["--"] else arguments.entrypoint
    if not entrypoint:
        raise ConfigError(
            "submit needs a command after --, for example: raydistill submit -- python jobs/dmd2_coco.py"
        )

    def terminated(signum: int, frame: object) -> None:
        raise TerminatedError

    signal.signal(signal.SIGTERM, terminated)
    started = stop_head = False
    try:
        if arguments.address == "auto":
            started = local_cluster.up().started_now
            stop_head = started and arguments.stop_head
        result = submit_and_follow(entrypoint, arguments.working_dir, arguments.address)
    except JobGoesOnError:
        stop_head = False
        raise
    finally:
        if stop_head:
            local_cluster.down()
    if result.message:
        print(result.message, file=sys.stderr)
    ending = f"{result.status}, exit code {result.exit_code}"
    print(f"raydistill: job {result.submission_id} {ending}", file=sys.stderr)
    if started and not stop_head:
        print("raydistill: the Ray head that this started goes on; raydistill down stops it", file=sys.stderr)
    return result.exit_code


def _teachers(arguments: argparse.Namespace) -> int:
    from raydistill.runtime.local_cluster import address_to_join, prepare_to_join

    prepare_to_join(address_to_join())

    from raydistill.runtime.teachers import join_cluster, services, stop_service

    join_cluster()
    if arguments.stop:
        stop_service(arguments.stop)
        print(f"stopped the teacher service {arguments.stop}")
        return 0
    found = services()
    for name, service in found.items():
        print(f"{name}: {service['replicas']} replica(s) of {service['teacher']} ({service['identity']})")
    if not found:
        print("no teacher service runs on this cluster")
    return 0


def _up(arguments: argparse.Namespace) -> int:
    from raydistill.runtime import local_cluster

    head = local_cluster.up()
    whose = "not ours to stop" if head.pid is None else f"`raydistill down` stops it; log: {head.log}"
    print(f"Ray head {'started' if head.started_now else 'runs'} at {head.address} ({whose})")
    print(f"for `ray job submit`: export RAY_API_SERVER_ADDRESS={local_cluster.ADDRESS}")
    return 0


def _down(arguments: argparse.Namespace) -> int:
    from raydistill.runtime import local_cluster
    from raydistill.runtime.submit import stop_jobs

    head = local_cluster.status()
    if head is not None and head.pid is not None:
        with contextlib.suppress(RayDistillError):  # a head that hangs is ended all the same
            stop_jobs(head.address)
    head = local_cluster.down()
    print(f"stopped the Ray head at {head.address}" if head else "no Ray head of ours runs")
    return 0


_HELP = argparse.RawDescriptionHelpFormatter


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="raydistill",
        description="Distils many-step diffusion models into few-step generators, with Ray.",
        epilog=_EXAMPLES,
        formatter_class=_HELP,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, command: Callable[[argparse.Namespace], int], text: str, more: str = "") -> Any:
        description = f"{text[0].upper()}{text[1:]}.\n\n{more}"
        each = commands.add_parser(name, help=text, description=description, formatter_class=_HELP)
        each.set_defaults(command=command)
        return each

    train = add("train", _train, "run a job file in this process", _TRAIN)
    _add_job_argument(train)
    _add_run_arguments(train, {})
    sweep = add("sweep", _sweep, "try settings against each other with Ray Tune", _SWEEP)
    _add_job_argument(sweep)
    sweep.add_argument("--preset", metavar="NAME", help="one of the job's other recipes")
    _add_sweep_arguments(sweep)
    plan = add("plan", _plan, "what a job would allocate and compute, without doing it", _PLAN)
    _add_job_argument(plan)
    _add_recipe_arguments(plan, {})
    plan.add_argument(
        "--devices",
        type=_positives,
        default=[3],
        metavar="N[,N]",
        help="to compare placements on, several numbers with commas (3)",
    )
    replicas = "teacher replicas of them, one number or one for each of --devices (1)"
    plan.add_argument("--teachers", type=_positives, default=[1], metavar="N[,N]", help=replicas)
    plan.add_argument(
        "--device-gib",
        type=_gib,
        metavar="GIB",
        help="memory of a device (placement.device_gib, else no limit)",
    )
    times = "seconds of the phases, as jobs/bench_step.py --out writes them (forward equivalents instead)"
    plan.add_argument("--role-times", type=Path, metavar="FILE", help=times)
    needs = "of a device's link; needs --role-times"
    plan.add_argument("--latency-us", type=float, metavar="US", help=f"microseconds {needs} (0)")
    plan.add_argument("--gbit-per-s", type=float, metavar="G", help=f"gigabits per second {needs} (no limit)")

    sample = add("sample", _sample, "draw images with a run's generator", _SAMPLE)
    _add_snapshot_arguments(sample)
    sample.add_argument("--prompt", action="append", required=True, metavar="TEXT", help="may be repeated")
    sample.add_argument(
        "--num-images", type=_positive, default=4, metavar="N", help="for each prompt (%(default)s)"
    )
    sample.add_argument("--seed", type=int, default=0, metavar="N", help="of the noise (%(default)s)")
    sample.add_argument("--out", default="samples.png", metavar="FILE", help="PNG to write (%(default)s)")
    evaluate = add("evaluate", _evaluate, "measure a run's generator", _EVALUATE)
    _add_snapshot_arguments(evaluate, "folder of a run, runs/NAME, or of its export, or models:/NAME@best")
    evaluate.add_argument("--num-samples", type=int, metavar="N", help="images; as the run's own by default")
    where = "MLflow that holds models:/NAME@best (MLFLOW_TRACKING_URI, else runs/mlflow.db)"
    evaluate.add_argument("--tracking-uri", metavar="URI", help=where)
    settings = "settings of the evaluator, as the run's own by default"
    evaluate.add_argument("overrides", nargs="*", metavar="evaluator.NAME=VALUE", help=settings)
    export = add("export", _export, "write a run's generator as a folder like its teacher's", _EXPORT)
    _add_snapshot_arguments(export)
    export.add_argument("out", metavar="FOLDER", help="folder to write; must not exist yet")
    check = (
        "load it (a diffusers folder with plain diffusers) and print how far its images of these prompts are from the "
        "run's own"
    )
    export.add_argument("--check", nargs="+", metavar="PROMPT", help=check)
    single = "also write the generator alone as one safetensors file, by diffusers' names of a UNet's weights"
    export.add_argument("--single-file", metavar="FILE", help=single)
    export.add_argument(
        "--push-to", metavar="HUB_ID", help="also upload the folder as a private model of the Hub (HF_TOKEN)"
    )

    report = add("report", _report, "compare runs on one HTML page", _REPORT)
    sources = "folder of a run or of a sweep, or the id of an MLflow run (a parent's: its children)"
    report.add_argument("runs", nargs="*", metavar="RUN", help=sources)
    report.add_argument("--experiment", metavar="NAME", help="all runs of an MLflow experiment instead")
    report.add_argument(
        "--tracking-uri", metavar="URI", help="MLflow's, for ids and experiments (sqlite runs/mlflow.db)"
    )
    report.add_argument(
        "--out", type=Path, default=Path("report.html"), metavar="FILE", help="to write (%(default)s)"
    )
    report.add_argument("--title", metavar="TEXT", help="the page's heading; names the runs by default")

    methods = add("methods", _methods, "the methods, with paper, needs and job")
    methods.add_argument("--json", action="store_true", help="as JSON")

    submit = add("submit", _submit, "run a command as a Ray job and follow it to its end", _SUBMIT)
    address = "a head, http://HOST:PORT, or auto for this machine's (%(default)s)"
    submit.add_argument("--address", default="auto", metavar="URL", help=address)
    submit.add_argument(
        "--working-dir", default=".", metavar="DIR", help="the command's folder (%(default)s)"
    )
    submit.add_argument(
        "--stop-head", action="store_true", help="stop the head afterwards if this started it"
    )
    submit.add_argument("entrypoint", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="what to run")
    teachers = add("teachers", _teachers, "list the teacher services of a cluster, or stop one", _TEACHERS)
    teachers.add_argument("--stop", metavar="NAME", help="end this service and its replicas")
    add("up", _up, "start a Ray head on this machine, if none runs", _UP)
    add("down", _down, "stop the Ray head that raydistill started, and no other")
    return parser


def _add_job_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job", metavar="JOB", help="a job file, jobs/dmd2_coco.py, or a method's name, dmd2")


def _add_recipe_arguments(parser: argparse.ArgumentParser, presets: Mapping[str, Recipe]) -> None:
    names = f": {', '.join(presets)}" if presets else ""
    parser.add_argument("--preset", metavar="NAME", help=f"one of the job's other recipes{names}")
    parser.add_argument("overrides", nargs="*", metavar="NAME=VALUE", help="settings by dotted name")


def _add_run_arguments(parser: argparse.ArgumentParser, presets: Mapping[str, Recipe]) -> None:
    _add_recipe_arguments(parser, presets)
    parser.add_argument("--dry-run", action="store_true", help="print settings and plan, then stop")
    parser.add_argument("--help-settings", action="store_true", help="print every setting with its meaning")


def _add_sweep_arguments(parser: argparse.ArgumentParser) -> None:
    over = "what a setting takes: values with commas, a JSON list, uniform(LOW,HIGH), loguniform(LOW,HIGH), randint(..)"
    parser.add_argument("--over", action="append", default=[], metavar="NAME=VALUES", help=over)
    parser.add_argument("overrides", nargs="*", metavar="NAME=VALUE", help="settings of all trials")
    searches = "all combinations (grid), or --num-trials of the space (random, optuna)"
    parser.add_argument("--search", choices=("grid", "random", "optuna"), help=searches)
    parser.add_argument("--num-trials", type=_positive, metavar="N", help="of a random or optuna search (16)")
    parser.add_argument("--metric", metavar="NAME", help="the evaluator's figure that decides (its toyfid)")
    parser.add_argument("--no-asha", action="store_true", help="stop no trial early")
    grace = "generator updates before ASHA may stop a trial (evaluator.every)"
    parser.add_argument("--grace-updates", type=_positive, metavar="N", help=grace)
    factor = "at each rung one trial in so many goes on (2)"
    parser.add_argument("--reduction-factor", type=float, metavar="F", help=factor)
    parser.add_argument(
        "--at-once", type=_positive, metavar="N", help="trials at a time (as many as have room)"
    )
    own = "a teacher in every trial's workers instead of one for all"
    parser.add_argument("--own-teachers", action="store_true", help=own)
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted sweep")
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything and list the trials, then stop"
    )


def _add_snapshot_arguments(parser: argparse.ArgumentParser, run: str = "folder of a run, runs/NAME") -> None:
    parser.add_argument("run", metavar="RUN", help=run)
    parser.add_argument("--step", type=int, metavar="N", help="of which snapshot; the newest by default")
    parser.add_argument("--weights", choices=("ema", "raw"), help="averaged or not; as the run by default")


_TRAIN = """\
Settings are dotted names: raydistill train jobs/dmd2_coco.py method.critic_updates_per_generator=10
--help-settings lists them all. A run that was interrupted goes on when started again."""
_SWEEP = """\
Trials are ordinary runs of the job, with Ray Train inside, on one teacher that they share. Those whose figure falls
behind are stopped. A sweep that was interrupted goes on with --resume: finished trials are kept, the others go on from
their snapshots.

  raydistill sweep jobs/dmd2_coco.py --over method.critic_updates_per_generator=1,2,5,10 \\
      --over teacher.guidance_scale=1,1.5,3 train.generator_updates=100 evaluator.every=50
  raydistill sweep jobs/dmd2_coco.py --search optuna --num-trials 20 --over "generator.lr=loguniform(1e-5,1e-3)\""""
_PLAN = """\
Roles, bytes per role (GiB) and network forwards per update; then the placements that so many devices allow, with what
moves between them, how long an update takes and who waits.

  raydistill plan jobs/dmd2_coco.py --devices 16 --teachers 4 --device-gib 80

With --device-gib also the largest micro-batch that fits, or where nothing fits the settings with which something would.

In seconds, with times measured on one such device and a network:

  python jobs/bench_step.py --job jobs/dmd2_coco.py --out step.json
  raydistill plan jobs/dmd2_coco.py train.batch_size=61440 --devices 64,512,4096 --teachers 4,32,256 \\
      --role-times step.json --latency-us 10 --gbit-per-s 200

The prediction leaves out that a rank is less efficient with few samples (its times shrink in proportion to them, but
for the optimiser's step), packing, data, snapshots and the averaging of figures."""
_SAMPLE = 'raydistill sample runs/dmd2_coco --prompt "a red circle" --prompt "a blue square" --out grid.png'
_EVALUATE = """\
Prints the metrics as JSON; a metric's name carries its number of samples. Of a model that was registered
(tracking.register_as), the registered files are evaluated, and give the figure of its tags again:

  raydistill evaluate models:/NAME@best --tracking-uri sqlite:///runs/mlflow.db

By a paper's protocol, with NVIDIA's detector file in this folder:

  raydistill evaluate runs/sid_cifar10 evaluator.protocol=edm-cifar10-50k evaluator.reference=cifar10-32x32.npz"""
_EXPORT = """\
Of a diffusers teacher: diffusers loads the folder, DiffusionPipeline.from_pretrained(FOLDER); its README.md says with
which steps, from which recipe, with which figures of which protocol.
Of a class-conditional one: edm.json and model.safetensors, which teacher.path takes."""
_REPORT = """\
One file that opens from the disk, without network or scripts: the evaluator's figures against updates, images and
seconds; a final table with the protocol; quality against accuracy with its Pareto front; a map over critic updates and
guidance; samples of the same noise across runs and over training, with the teacher's; losses. Runs that go on are
reported as far as they have come. Figures of different protocols are refused.

  raydistill report runs/dmd2_coco runs/ratio10
  raydistill report runs/sweep_dmd2_coco --out sweep.html
  raydistill report --experiment raydistill --tracking-uri http://127.0.0.1:5000"""
_SUBMIT = """\
Starts a head on 127.0.0.1 if none runs, sends Ray's auth token where one exists, and attaches to the log
again when it breaks off. Ctrl-C asks whether to stop the job. The exit code is the job's.

  raydistill submit -- python jobs/dmd2_coco.py train.generator_updates=200"""
_TEACHERS = """\
A run with placement.teacher_service=NAME starts the service or joins it; it outlives the run. Asks the cluster of
RAY_ADDRESS, or the head of this machine."""
_UP = "The head listens on 127.0.0.1:8265 (or RAYDISTILL_DASHBOARD_PORT) and outlives this command."


if __name__ == "__main__":
    main()
