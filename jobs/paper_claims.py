"""The papers' claims about their methods, tried on the handwritten digits with several seeds.

python jobs/paper_claims.py                     all of them, three seeds, under an hour on two cores
python jobs/paper_claims.py --claims sid        one method's
python jobs/paper_claims.py --images 100000     more training in each run

Each claim is printed with the figures of every seed, their mean and standard deviation, and whether the miniature shows
it: by the mean beyond the sum of the standard errors, where it is about one thing being lower than another.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from raydistill.errors import RayDistillError
from raydistill.runtime import digits
from raydistill.runtime.compare import Summary, compare
from raydistill.runtime.settings import ASSETS, RunConfig

FOUR = (80.0, 17.5, 2.52, 0.17)
"""Karras levels of four steps, u = 1, 3/4, 1/2 and 1/4 of sigma in [0.002, 80] (arXiv:2206.00364, eq. 5)."""
NO_GAN = {"gan_weight_generator": 0.0, "gan_weight_critic": 0.0}
RUNS: dict[str, dict[str, Callable[[int], RunConfig]]] = {
    "dmd2": {
        "ratio 1": lambda n: digits.dmd2(n, critic_updates_per_generator=1, **NO_GAN),
        "ratio 5": lambda n: digits.dmd2(n, critic_updates_per_generator=5, **NO_GAN),
        "ratio 5, GAN": lambda n: digits.dmd2(n, critic_updates_per_generator=5),
        "4 steps, backward simulation": lambda n: digits.dmd2(n, timesteps=FOUR),
        "4 steps, re-noised data": lambda n: digits.dmd2(n, timesteps=FOUR, rollout="real_data"),
    },
    "sid": {
        "alpha 1.2": lambda n: digits.sid(n, alpha=1.2),
        "alpha 0": lambda n: digits.sid(n, alpha=0.0),
        "alpha -0.25": lambda n: digits.sid(n, alpha=-0.25),
    },
    "moment_matching": {f"{k} steps": partial(digits.moment_matching, k) for k in (1, 4, 8)},
}


@dataclass(frozen=True)
class Figures:
    """One figure of several seeds."""

    name: str
    values: Sequence[float]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def error(self) -> float:
        """Standard error of the mean."""
        return statistics.stdev(self.values) / math.sqrt(len(self.values)) if len(self.values) > 1 else 0.0

    def __str__(self) -> str:
        spread = statistics.stdev(self.values) if len(self.values) > 1 else 0.0
        return f"{self.name} {self.mean:.4g} +- {spread:.2g} ({', '.join(f'{v:.4g}' for v in self.values)})"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--claims", nargs="+", choices=RUNS, default=list(RUNS), help="of which methods")
    parser.add_argument("--images", type=int, default=40_000, help="of each run (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each setting (%(default)s)")
    parser.add_argument("--at-once", type=int, default=2, help="runs at a time, one core each (%(default)s)")
    parser.add_argument("--runs", default="runs/claims", help="folder of the runs (%(default)s)")
    parser.add_argument("--out", type=Path, help="write all figures as JSON")
    arguments = parser.parse_args()
    if min(arguments.images, arguments.seeds, arguments.at_once) < 1:
        parser.error("--images, --seeds and --at-once must be at least 1")
    if arguments.out:
        try:
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.touch()
        except OSError as error:
            parser.error(f"--out {arguments.out} can't be written: {error.strerror}")
    configs = [
        replace(
            make(arguments.images),
            name=f"{method}-{label.replace(', ', '-').replace(' ', '_')}-seed{seed}",
            seed=seed,
            output_dir=arguments.runs,
        )
        for method in arguments.claims
        for label, make in RUNS[method].items()
        for seed in range(arguments.seeds)
    ]
    try:
        summaries, parent = compare("paper_claims", configs, at_once=arguments.at_once)
    except RayDistillError as error:
        print(f"paper_claims: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    parent.finish()
    found: dict[str, dict[str, list[Summary]]] = {}
    rest = iter(summaries)
    for method in arguments.claims:
        found[method] = {label: [next(rest) for _ in range(arguments.seeds)] for label in RUNS[method]}
    claims = {"dmd2": dmd2, "sid": sid, "moment_matching": moment_matching}
    lines = [line for method in arguments.claims for line in claims[method](found[method])]
    print("\n".join(lines))
    if arguments.out:
        kept = {
            method: {
                label: [{"toyfid": s["toyfid_end"], "curve": s["curve"], "images": s["images"]} for s in runs]
                for label, runs in by_label.items()
            }
            for method, by_label in found.items()
        }
        arguments.out.write_text(json.dumps({"lines": lines, "figures": kept}, indent=1) + "\n")
        print(f"written: {arguments.out}")
    return 0


def dmd2(found: dict[str, list[Summary]]) -> list[str]:
    """arXiv:2405.14867: two time scales (section 4.2), the GAN (4.3), backward simulation (4.5)."""
    swings = {
        label: Figures(label, [brightness_swing(run) for run in found[label]])
        for label in ("ratio 1", "ratio 5")
    }
    return [
        claim(
            "DMD2: without regression, R = 1 swings in mean brightness and R = 5 mends it "
            "(standard deviation over the second half of the run)",
            swings["ratio 5"],
            swings["ratio 1"],
        ),
        claim("DMD2: R = 5 ends lower than R = 1", ends(found, "ratio 5"), ends(found, "ratio 1")),
        claim("DMD2: the GAN improves the result", ends(found, "ratio 5, GAN"), ends(found, "ratio 5")),
        claim(
            "DMD2: in four steps, backward simulation beats re-noised data",
            ends(found, "4 steps, backward simulation"),
            ends(found, "4 steps, re-noised data"),
        ),
    ]


def sid(found: dict[str, list[Summary]]) -> list[str]:
    """arXiv:2404.04057: figure 3's straight lines, and the ablation of alpha."""
    fits = [power_law(run) for run in found["alpha 1.2"]]
    slope = Figures("slope", [fit[0] for fit in fits])
    straight = Figures("R^2", [fit[1] for fit in fits])
    verdict = "shown" if min(straight.values) > 0.9 and max(slope.values) < 0 else "NOT shown"
    lines = [f"SiD: log toyfid falls about linearly with log images: {slope}; {straight}: {verdict}"]
    good = ends(found, "alpha 1.2")
    return lines + [
        claim(f"SiD: {bad} fails (twice as high and more)", twice(good), ends(found, bad))
        for bad in ("alpha 0", "alpha -0.25")
    ]


def moment_matching(found: dict[str, list[Summary]]) -> list[str]:
    """arXiv:2406.04103: more steps are better, and eight beat the teacher's own sampler."""
    eight, four, one = (ends(found, f"{k} steps") for k in (8, 4, 1))
    # by jobs/train_digits_teacher.py, with the same noise and reference
    printed = json.loads((ASSETS / "digits_teacher" / "figures.json").read_text())
    lines = [
        claim("moment matching: 8 steps beat 4", eight, four),
        claim("moment matching: 4 steps beat 1", four, one),
    ]
    for sampler in ("ancestral", "heun"):
        for steps in (8, 16, 32):
            teacher = Figures(f"teacher, {steps} {sampler} steps", [printed[f"{sampler}_{steps}"]["toyfid"]])
            lines.append(
                claim(f"moment matching: 8 steps beat the teacher's {steps} {sampler} ones", eight, teacher)
            )
    return lines


def claim(words: str, lower: Figures, higher: Figures) -> str:
    """A line that says whether the first is lower."""
    shown = higher.mean - lower.mean > lower.error + higher.error
    return f"{words}: {lower} against {higher}: {'shown' if shown else 'NOT shown'}"


def ends(found: dict[str, list[Summary]], label: str) -> Figures:
    return Figures(label, [run["toyfid_end"] for run in found[label]])


def twice(figures: Figures) -> Figures:
    return Figures(f"twice {figures.name}", [2 * value for value in figures.values])


def brightness_swing(run: Summary) -> float:
    """Standard deviation of the batches' mean brightness over the second half of a run."""
    means: dict[int, float] = {}
    for line in (Path(run["run_dir"]) / "metrics.jsonl").read_text().splitlines():
        entry: dict[str, Any] = json.loads(line)
        value = entry.get("values", {}).get("sample/mean")
        if value is not None:
            means[entry["step"]] = value
    half = run["generator_updates"] / 2
    return statistics.pstdev(value for step, value in means.items() if step > half)


def power_law(run: Summary) -> tuple[float, float]:
    """(slope, R^2) of log toyfid against log images, without the start."""
    per_update = run["images"] / run["generator_updates"]
    x = [math.log(step * per_update) for step, _, _ in run["curve"] if step]
    y = [math.log(value) for step, value, _ in run["curve"] if step]
    slope, _ = statistics.linear_regression(x, y)
    return slope, statistics.correlation(x, y) ** 2


if __name__ == "__main__":
    sys.exit(main())
