"""The methods: one file each, readable beside its paper; `METHODS` is the registry."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class MethodEntry:
    """One line of the registry; classes are named, not imported, so that listing methods stays light."""

    title: str
    paper: str
    """arXiv id."""
    method: str
    """"module:Class" of the Method."""
    config: str
    """"module:Class" of its settings."""
    needs: str
    """What it needs, in words."""
    job: str


METHODS: dict[str, MethodEntry] = {
    "dmd2": MethodEntry(
        title="Improved distribution matching distillation",
        paper="2405.14867",
        method="raydistill.methods.dmd2:DMD2",
        config="raydistill.methods.dmd2:DMD2Config",
        needs="teacher: score; critic: score and GAN head (vjp); real data: for the GAN",
        job="jobs/dmd2_coco.py",
    ),
    "moment_matching": MethodEntry(
        title="Multistep distillation by moment matching",
        paper="2406.04103",
        method="raydistill.methods.moment_matching:MomentMatching",
        config="raydistill.methods.moment_matching:MomentMatchingConfig",
        needs="teacher: score, also for the critic; critic: score; real data; instant: the teacher's parameters only",
        job="jobs/moment_matching_imagenet64.py",
    ),
    "sid": MethodEntry(
        title="Score identity distillation, with long-short guidance (LSG) and adversarial (SiDA) settings",
        paper="2404.04057",
        method="raydistill.methods.sid:SiD",
        config="raydistill.methods.sid:SiDConfig",
        needs="teacher: vjp; critic: vjp; real data: for SiDA",
        job="jobs/sid_cifar10.py",
    ),
}
