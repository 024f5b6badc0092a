"""Does the suite notice when a stop-gradient, a normaliser or a vector-Jacobian product is taken out of a method?

    python tests/mutations.py [--only NAME ...] [--list] [--ray]

Each mutation is one edit of one file. It is made in a copy of the package and its tests, never in place, and the tests
named beside it must then fail. Before, all of these tests must pass on the unchanged copy. Exit code 1 if a mutation
survives, breaks more than it should, or no longer applies.

Not listed is what can't be noticed because something else does the same, such as a detach inside of a detached product
(the samples in DMD2's g).
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_CAUGHT, _PASSED = 1, 0  # pytest's exit codes; any other says that no test has judged
_LIMIT_S = 300.0
_NO_ASSERTION = re.compile(r"- (Name|Syntax|Indentation|Import|Unbound\w+)Error")
_CHILD = """
import sys
from pathlib import Path
import pytest
import raydistill
assert Path(raydistill.__file__).is_relative_to(Path.cwd()), raydistill.__file__
sys.exit(pytest.main(sys.argv[1:]))
"""

DMD2 = ("tests/methods/test_dmd2.py",)
WARM_UP = ("tests/methods/test_dmd2_warm_up.py",)
COMPACT = ("tests/roles/test_compact_adam.py",)
SID = ("tests/methods/test_sid.py",)
MOMENT = ("tests/methods/test_moment_matching.py",)
INSTANT = ("tests/roles/test_instant_critic.py",)
ROLES = ("tests/roles/test_gradients.py",)
LORA = ("tests/models/test_lora.py",)
SHARDING = ("tests/runtime/test_sharding.py", "-m", "not ray")


@dataclass(frozen=True)
class Mutation:
    """One edit that must not go unnoticed."""

    name: str
    file: str
    """From raydistill/ on."""
    old: str
    """Occurs exactly once in it."""
    new: str
    tests: tuple[str, ...]
    """pytest's arguments: where it is noticed."""
    ray: bool = False
    """Whether these start Ray."""


def _of(file: str, tests: tuple[str, ...], *edits: tuple[str, str, str]) -> list[Mutation]:
    return [Mutation(name, file, old, new, tests) for name, old, new in edits]


MUTATIONS = [
    *_of(
        "methods/dmd2.py",
        DMD2,
        ("dmd2: target keeps its graph", "F.mse_loss(x, (x - g).detach())", "F.mse_loss(x, x - g)"),
        (
            "dmd2: x_t of the score queries keeps its graph",
            'self.schedule.add_noise(x.detach(), t, draws.normal("dm/noise"',
            'self.schedule.add_noise(x, t, draws.normal("dm/noise"',
        ),
        (
            "dmd2: no normaliser",
            "return (x0_fake - x0_real) / normaliser",
            "return x0_fake - x0_real",
        ),
        (
            "dmd2: normaliser over the batch",
            ".abs().mean(dim=tuple(range(1, x.ndim)), keepdim=True)",
            ".abs().mean()",
        ),
        (
            "dmd2: GAN's gradient cut at x_t",
            'self.schedule.add_noise(x, t_gan, draws.normal("gan/noise"',
            'self.schedule.add_noise(x.detach(), t_gan, draws.normal("gan/noise"',
        ),
        (
            "dmd2: GAN's gradient cut at the logit",
            'F.softplus(-answers["logit"])',
            'F.softplus(-answers["logit"].detach())',
        ),
        (
            "dmd2: critic's loss without its weight",
            "(weight * (critic(x_t, t, cond) - x) ** 2)",
            "((critic(x_t, t, cond) - x) ** 2)",
        ),
        (
            "dmd2: discriminator doesn't learn from generated samples",
            "(F.softplus(fake) + F.softplus(-true))",
            "(F.softplus(fake.detach()) + F.softplus(-true))",
        ),
        (
            "dmd2: discriminator doesn't learn from real samples",
            "(F.softplus(fake) + F.softplus(-true))",
            "(F.softplus(fake) + F.softplus(-true.detach()))",
        ),
        (
            "dmd2: rollout keeps its graph",
            "        with torch.no_grad():\n            for step in range(last):",
            "        with torch.enable_grad():\n            for step in range(last):",
        ),
    ),
    *_of(
        "methods/dmd2.py",
        WARM_UP,
        (
            "dmd2: warm-up's pairs of another noise",
            'noise = draws.normal("rollout/noise", x.shape[1:])',
            'noise = draws.normal("dm/noise", x.shape[1:])',
        ),
        (
            "dmd2: warm-up's samples without guidance",
            "guidance_scale=self.guidance_scale, steps=",
            "guidance_scale=1.0, steps=",
        ),
    ),
    *_of(
        "roles/compact_adam.py",
        COMPACT,
        (
            "compact AdamW: second moment rounded to nearest",
            "second.copy_(_rounded(v.clone(), draws))",
            "second.copy_(v)",
        ),
    ),
    *_of(
        "methods/sid.py",
        SID,
        (
            "sid: x_t detached",
            'self.schedule.add_noise(x, t, draws.normal("sid/noise"',
            'self.schedule.add_noise(x.detach(), t, draws.normal("sid/noise"',
        ),
        (
            "sid: gradient through the teacher cut",
            'config, real, fake = self.config, answers["real"], answers["fake"]',
            'config, real, fake = self.config, answers["real"].detach(), answers["fake"]',
        ),
        (
            "sid: gradient through the critic cut",
            'config, real, fake = self.config, answers["real"], answers["fake"]',
            'config, real, fake = self.config, answers["real"], answers["fake"].detach()',
        ),
        (
            "sid: gradient through both cut, which is DMD's",
            'config, real, fake = self.config, answers["real"], answers["fake"]',
            'config, real, fake = self.config, answers["real"].detach(), answers["fake"].detach()',
        ),
        ("sid: w keeps its graph", "(x - x0_real).detach().abs()", "(x - x0_real).abs()"),
        (
            "sid: no w",
            "(weight * sid_loss(x, real, fake, config.alpha))",
            "(sid_loss(x, real, fake, config.alpha))",
        ),
        (
            "sid: w over the batch",
            "(x - x0_real).detach().abs().flatten(1).mean(1)",
            "(x - x0_real).detach().abs().mean().expand(len(x))",
        ),
        ("sid: w without its least distance", "1 / distance.clamp(min=_MIN_DISTANCE)", "1 / distance"),
        ("sid: no alpha term", "((x0_real - x) - alpha * apart)", "(x0_real - x)"),
        ("sid: alpha term without a graph", "- alpha * apart)", "- alpha * apart.detach())"),
        (
            "sid: critic's loss without its weight",
            "(weight * error).mean()",
            "error.mean()",
        ),
        (
            "sid: critic's error averaged over elements",
            ".square().flatten(1).sum(1)  # [B]",
            ".square().flatten(1).mean(1)",
        ),
        (
            "sida: logit map's gradient cut at x_t",
            "own = x_t.view_as(x_t)",
            'own = (x_t.detach() if want == "logit_map" else x_t).view_as(x_t)',
        ),
        (
            "sida: logit map's gradient cut at the logits",
            'answers["logit_map"], weight',
            'answers["logit_map"].detach(), weight',
        ),
        (
            "sida: generator's logits not clamped",
            "F.softplus(-logits.clamp(-_MAX_LOGIT, _MAX_LOGIT))",
            "F.softplus(-logits)",
        ),
        (
            "sida: generator's cross-entropy without w",
            ".mean() * weight).mean()",
            ".mean()).mean()",
        ),
        (
            "sida: discriminator's loss without its weight",
            "(weight * (F.softplus(-real)",
            "((F.softplus(-real)",
        ),
        (
            "sida: discriminator learns nothing from generated samples",
            "F.softplus(fake).mean()",
            "F.softplus(fake.detach()).mean()",
        ),
        (
            "sida: discriminator learns nothing from real samples",
            "F.softplus(-real).mean()",
            "F.softplus(-real.detach()).mean()",
        ),
        ("sida: losses not halved", 'terms = {"sid": 0.5 * terms["sid"]', 'terms = {"sid": terms["sid"]'),
        (
            "lsg: generator's loss asks the critic without guidance",
            'ask("critic", guidance_scale=self.config.guidance_scale_critic)',
            'ask("critic")',
        ),
        (
            "lsg: critic trained without guidance",
            "critic(x_t, t, seen, self.config.guidance_scale_critic_training)",
            "critic(x_t, t, seen)",
        ),
        ("lsg: no prompt dropped", "if self._prompt_dropout > 0:", "if False:"),
    ),
    *_of(
        "models/denoiser.py",
        SID,
        (
            "lsg: no gradient through the unconditional half",
            "return guide(x0_cond, x0_uncond, guidance_scale)",
            "return guide(x0_cond, x0_uncond.detach(), guidance_scale)",
        ),
    ),
    *_of(
        "methods/moment_matching.py",
        MOMENT,
        (
            "moment matching: z_s keeps its graph",
            "posterior(z_t, x.detach(), t, s,",
            "posterior(z_t, x, t, s,",
        ),
        ("moment matching: gap keeps its graph", "* x * gap.detach())", "* x * gap)"),
        (
            "moment matching: x in the critic's loss keeps its graph",
            "(weight * (x.detach() - x0) ** 2)",
            "(weight * (x - x0) ** 2)",
        ),
        (
            "moment matching: teacher's answer keeps its graph",
            '(answers["real"].detach() - x0)',
            '(answers["real"] - x0)',
        ),
        (
            "moment matching: deterministic step to z_s",
            'return mean + variance.sqrt() * draws.normal("posterior/noise", x.shape[1:]), s',
            "return mean, s",
        ),
        ("moment matching: sign", 'answers["fake"] - answers["real"]', 'answers["real"] - answers["fake"]'),
        ("moment matching: generator's loss without w(s)", "(self._weight(s, x) * x * gap", "(x * gap"),
        (
            "moment matching: critic's loss without w(s)",
            "(weight * (x.detach() - x0) ** 2)",
            "((x.detach() - x0) ** 2)",
        ),
        (
            "moment matching: critic without the teacher's term",
            "if self._ask_for_critic:\n            terms",
            "if False:\n            terms",
        ),
    ),
    *_of(
        "roles/instant_critic.py",
        INSTANT,
        ("instant: sign of nu", "-self._preconditioned(", "self._preconditioned("),
        ("instant: no bias correction", "(v / (1 - decay**self.steps)).sqrt()", "v.sqrt()"),
        (
            "instant: no preconditioner",
            "return gradient / ((v / (1 - decay**self.steps)).sqrt() + self.config.eps)",
            "return gradient",
        ),
        (
            "instant: the answer itself, not its change",
            "(weights,), (direction,))[1]",
            "(weights,), (direction,))[0]",
        ),
        (
            "instant: tangents reach the critic's weights",
            "            frozen_weights(self.critic),\n",
            "",
        ),
        (
            "instant: gradients of one update left for the next",
            "        self.zero_grad()\n        return values",
            "        return values",
        ),
    ),
    *_of(
        "models/lora.py",
        LORA,
        (
            "lora: recomputed without its adapter",
            "checkpoint_activations(self._as_now)",
            "checkpoint_activations()",
        ),
        (
            "lora: only the newest adapter is trained",
            "for each in self._adapters:",
            "for each in self._adapters[-1:]:",
        ),
        ("lora: left on after a call", "= before, before_dtype", "= active, before_dtype"),
        ("lora: merged without its scale", "weight + (scale * change)", "weight + change"),
        (
            "lora: drawn in the base's precision",
            "layer.reset_lora_parameters(name, True)",
            "pass",
        ),
    ),
    *_of(
        "roles/critic.py",
        ROLES,
        (
            "critic: answers reach its weights",
            "torch.set_grad_enabled(x_t.requires_grad), frozen_weights(self.critic):",
            "torch.set_grad_enabled(x_t.requires_grad):",
        ),
        (
            "critic: answers without a graph",
            "torch.set_grad_enabled(x_t.requires_grad), frozen",
            "torch.no_grad(), frozen",
        ),
        (
            "critic: sum over micro-batches",
            "(losses.total() / num_micro_batches).backward()",
            "losses.total().backward()",
        ),
    ),
    *_of(
        "roles/teacher.py",
        ROLES,
        ("teacher: weights not frozen", "denoiser.eval().requires_grad_(False)", "denoiser.eval()"),
        (
            "teacher: answers without a graph",
            "torch.set_grad_enabled(query.x_t.requires_grad)",
            "torch.no_grad()",
        ),
        (
            "kept graphs: the gradient without its cotangent",
            "torch.autograd.grad(answer, x_t, cotangent)",
            "torch.autograd.grad(answer.sum(), x_t)",
        ),
    ),
    *_of(
        "roles/generator.py",
        ROLES,
        ("generator: sum over micro-batches", "x.backward(field / num_micro_batches)", "x.backward(field)"),
        ("generator: one loss term only", "field += gradient", "field = gradient"),
    ),
    *_of(
        "runtime/trainer.py",
        ("tests/runtime/test_loop.py", "-k", "no_gradient"),
        (
            "trainer: the critic's fresh samples keep the generator's graph",
            'self.draws_of("critic", step, prompts), grad=False)',
            'self.draws_of("critic", step, prompts), grad=True)',
        ),
        (
            "trainer: the generator's own samples keep its graph for the critic",
            "        return x.detach()\n",
            "        return x\n",
        ),
    ),
    *_of(
        "runtime/trainer.py",
        ("tests/runtime/test_loop.py", "-k", "checkpointing or real_batch"),
        (
            "trainer: the critic's weights not frozen while answers are differentiated",
            "        with frozen_weights(self.critic.critic):\n            self.kept",
            "        if True:\n            self.kept",
        ),
        (
            "trainer: one real batch for the critic's and the generator's update",
            "return update * (r + 1) + (r if k is None else k)",
            "return update * (r + 1) + (k or 0)",
        ),
    ),
    *_of(
        "roles/generator.py",
        ("tests/runtime/test_loop.py", "-k", "rests"),
        (
            "sida: gradients accumulated at rest are kept",
            "        self.optimizer.zero_grad()\n        return _with_std",
            "        return _with_std",
        ),
    ),
    *_of(
        "runtime/apart.py",
        ("tests/runtime/test_apart.py", "-k", "bit_for_bit and (sid or gan)"),
        (
            "roles apart: no gradient through the critic's answers",
            "return ctx.answer.vjp(cotangents[0], ctx.shape), None",
            "return torch.zeros(len(cotangents[0]), *ctx.shape), None",
        ),
        (
            "roles apart: the gradient without its cotangent",
            "answers[number], asked[number].x_t, cotangent, retain_graph=True",
            "answers[number], asked[number].x_t, torch.ones_like(cotangent), retain_graph=True",
        ),
    ),
    Mutation(
        "teacher pool: no gradient through its answers",
        "runtime/pool.py",
        "return ctx.ticket.vjp(cotangents[0]), None",
        "return torch.zeros_like(cotangents[0]), None",
        ("tests/runtime/test_pool.py", "-k", "gradient_through_the_remote_teacher"),
        ray=True,
    ),
    *_of(
        "roles/optimizer.py",
        SHARDING,
        (
            "sharded: gradients are averaged twice",
            "mine.grad = held(weight.grad)",
            "mine.grad = held(weight.grad) / self.world.size",
        ),
        ("sharded: the norm of one rank's rows alone", "        self.world.sum_(squared)\n", ""),
    ),
    *_of(
        "checkpoint/sharded.py",
        SHARDING,
        (
            "sharded: rows are counted from another rank's first",
            "slice(low - rows.start, high - rows.start)",
            "slice(low - start, high - start)",
        ),
    ),
]


def mutated(mutation: Mutation, package: Path) -> str | None:
    """The file's text with the edit; None unless the old text is there exactly once."""
    text = (package / mutation.file).read_text()
    return text.replace(mutation.old, mutation.new) if text.count(mutation.old) == 1 else None


def run_tests(copy: Path, arguments: Iterable[str]) -> tuple[int, str]:
    """pytest's exit code, and its first failure or else the end of its output; in a process on the copy."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(copy),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "400",  # or pytest leaves out what failed
    }
    command = [sys.executable, "-c", _CHILD, "-x", "-q", "--tb=line", "-p", "no:cacheprovider", *arguments]
    try:
        done = subprocess.run(
            command, cwd=copy, env=environment, capture_output=True, text=True, timeout=_LIMIT_S
        )
    except subprocess.TimeoutExpired:
        return -1, f"no answer within {_LIMIT_S:.0f} s"
    output = (done.stdout + done.stderr).strip()
    failed = [line for line in output.splitlines() if line.startswith("FAILED ")]
    return done.returncode, failed[0].removeprefix("FAILED ") if failed else output[-2000:]


def copied(into: Path) -> Path:
    """What the tests need of the working tree."""
    for name in ("raydistill", "tests", "jobs"):
        shutil.copytree(ROOT / name, into / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", into)
    return into


def judge(mutation: Mutation, copy: Path) -> tuple[bool, str]:
    """Whether the mutation was noticed, and what to say of it."""
    file = copy / "raydistill" / mutation.file
    original, edited = file.read_text(), mutated(mutation, copy / "raydistill")
    if edited is None:
        return False, "DOES NOT APPLY: its old text must occur exactly once"
    file.write_text(edited)
    try:
        code, told = run_tests(copy, mutation.tests)
    finally:
        file.write_text(original)
    if code == _PASSED:
        return False, "SURVIVED"
    if code != _CAUGHT or _NO_ASSERTION.search(told):
        return False, f"BROKEN: {told}"
    return True, f"caught by {told[:240]}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="NAME", action="append", help="those whose name holds this")
    parser.add_argument("--list", action="store_true", help="name them and end")
    parser.add_argument("--ray", action="store_true", help="also those whose tests start Ray")
    arguments = parser.parse_args()
    chosen = [m for m in MUTATIONS if arguments.ray or not m.ray]
    if arguments.only:
        chosen = [m for m in MUTATIONS if any(part in m.name for part in arguments.only)]
    if arguments.list:
        print("\n".join(f"{m.name:<60} raydistill/{m.file}" for m in chosen))
        return 0
    with tempfile.TemporaryDirectory(prefix="mutations") as folder:
        copy = copied(Path(folder))
        for tests in dict.fromkeys(m.tests for m in chosen):
            code, told = run_tests(copy, tests)
            if code != _PASSED:
                print(f"{' '.join(tests)} must pass before anything is changed: {told}")
                return 1
        unnoticed = 0
        for mutation in chosen:
            started = time.monotonic()
            noticed, told = judge(mutation, copy)
            unnoticed += not noticed
            print(f"{mutation.name}: {told} ({time.monotonic() - started:.0f} s)", flush=True)
    print(f"{len(chosen) - unnoticed} of {len(chosen)} mutations were caught")
    return int(unnoticed > 0)


if __name__ == "__main__":
    sys.exit(main())
