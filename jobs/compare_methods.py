"""All methods on the handwritten digits: the same teacher, data, evaluator and budget of generated images.

python jobs/compare_methods.py --out comparison.json            everything, within 45 minutes on two cores
python jobs/compare_methods.py --only sid sida --images 50000   some of it, in less
python jobs/compare_methods.py --preset long                    the best method for longer, 20 to 30 minutes

Runs go on where they stopped; figures, grids and the parent run are in MLflow (runs/mlflow.db).
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from raydistill.errors import RayDistillError
from raydistill.runtime import digits
from raydistill.runtime.compare import compare, plot_png, row, table
from raydistill.runtime.settings import RunConfig

RUNS: dict[str, Callable[[int], RunConfig]] = {
    "dmd2": digits.dmd2,
    "sid": digits.sid,
    "sida": digits.sida,
    **{f"moment_matching_{steps}": partial(digits.moment_matching, steps) for steps in (1, 2, 4, 8)},
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=RUNS, help="some of the runs")
    parser.add_argument(
        "--images",
        type=int,
        help=f"generated for training in each run ({digits.IMAGES}; long: {digits.LONG})",
    )
    parser.add_argument("--preset", choices=["long"], help="the long recipe of the best method alone")
    parser.add_argument("--at-once", type=int, default=2, help="runs at a time, one core each (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of every run (%(default)s)")
    parser.add_argument("--runs", default="runs", help="folder of the runs (%(default)s)")
    parser.add_argument("--tracking-uri", help="MLflow (default: mlflow.db in the folder of the runs)")
    parser.add_argument("--out", type=Path, help="write the table as JSON, beside it the plot as PNG")
    arguments = parser.parse_args()
    if arguments.at_once < 1 or (arguments.images is not None and arguments.images < 1):
        parser.error("--images and --at-once must be at least 1")
    if arguments.preset == "long":
        if arguments.only:
            parser.error("--preset long is one run: leave --only out")
        name, configs = "digits_long", [digits.long(arguments.images or digits.LONG)]
    else:
        images = arguments.images or digits.IMAGES
        name, configs = "digits_methods", [RUNS[each](images) for each in arguments.only or RUNS]
    configs = [
        replace(
            config,
            seed=arguments.seed,
            output_dir=arguments.runs,
            tracking=replace(config.tracking, uri=arguments.tracking_uri),
        )
        for config in configs
    ]
    out = arguments.out or Path(arguments.runs) / name / "comparison.json"
    if out.suffix != ".json":
        parser.error(f"--out {out} must end in .json; the plot is written beside it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.touch()
    except OSError as error:
        parser.error(f"--out {out} can't be written: {error.strerror}")
    try:
        summaries, parent = compare(name, configs, at_once=arguments.at_once)
    except RayDistillError as error:
        print(f"compare_methods: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    rows = [row(summary) for summary in summaries]
    print(table(rows))
    out.write_text(json.dumps({"rows": rows, "runs": arguments.runs}, indent=1) + "\n")
    picture = out.with_suffix(".png")
    picture.write_bytes(plot_png(rows, "handwritten digits, equal budgets of generated images"))
    for file in (out, picture):
        parent.artifact(str(file))
    parent.finish()
    print(f"written: {out}, {picture}; compare in MLflow under the parent run {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
