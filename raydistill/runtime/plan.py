"""`plan(config)`: what a run will cost, before anything is allocated.

The networks are built on the meta device, without weights: parameters give the bytes, a forward pass under
`saved_tensors_hooks` the activations that a backward pass keeps, a FLOP counter the share e of the encoder half.

Forward equivalents (peers.md 3.2): a forward pass of the whole batch through the UNet is 1; its backward pass costs 2
with weight gradients and 1 with input gradients only; encoder-only passes cost e of it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from raydistill.methods.method import Work
from raydistill.models.denoiser import Cond, Denoiser, parameter_count
from raydistill.models.edm_pipeline import is_edm
from raydistill.models.heads import BottleneckHead
from raydistill.models.lora import SharedBase
from raydistill.roles.optimizer import OptimizerConfig
from raydistill.runtime.build import denoiser_on_meta, method_for, require_guidable
from raydistill.runtime.ranks import best_num_critic
from raydistill.runtime.settings import RunConfig, teacher_folder
from raydistill.runtime.simulate import Mode, RoleSeconds

T = TypeVar("T")

GIB = 2**30
_MOMENT_BYTES = {"fp32": 8, "bf16": 4}
"""Of Adam's two moments of a weight."""
ROLES_ON: dict[Mode, dict[str, tuple[str, ...]]] = {
    "colocated": {"worker": ("teacher", "generator", "critic")},
    "teachers": {"worker": ("generator", "critic"), "teacher": ("teacher",)},
    "disaggregated": {"generator": ("generator",), "critic": ("critic",), "teacher": ("teacher",)},
}
"""Which roles a device of each kind holds."""
_IN_WORDS = {
    "worker": "a worker", "generator": "a generator rank", "critic": "a critic rank", "teacher": "a teacher replica",
}  # fmt: skip


@dataclass(frozen=True)
class RoleBytes:
    """Bytes of one role on one device that holds it."""

    weights: int
    gradients: int = 0
    optimizer: int = 0
    ema: int = 0
    activations: int = 0
    gathered: int = 0
    """Whole weights and gradients of what computes, where the device holds shares of them."""

    @property
    def total(self) -> int:
        shares = self.weights + self.gradients + self.optimizer + self.ema
        return shares + self.activations + self.gathered

    def shared(self, share: float) -> RoleBytes:
        """With so much of weights, gradients, moments and EMA."""
        return replace(
            self,
            weights=round(self.weights * share),
            gradients=round(self.gradients * share),
            optimizer=round(self.optimizer * share),
            ema=round(self.ema * share),
        )


def share_of(dealt: float, ranks: int) -> float:
    """What each of so many ranks holds of a role's weights, `dealt` of which are dealt out over them."""
    return 1 - dealt + dealt / ranks


def bytes_together(roles: Sequence[RoleBytes]) -> int:
    """Of roles that share a process, at its peak: gradients are there for one of them at a time, each role's
    optimiser step drops its own; and one computes at a time, with its blocks gathered."""
    gradients, gathered = [role.gradients for role in roles], [role.gathered for role in roles]
    alone = sum(role.total for role in roles) - sum(gradients) - sum(gathered)
    return alone + max(gradients) + max(gathered)


@dataclass(frozen=True)
class Plan:
    """Bytes per role and work per generator update."""

    mode: Mode
    ranks: dict[str, int]
    """How many share a batch of generator and critic; activations are those of a rank's share."""
    bytes_by_role: dict[str, RoleBytes]
    sharded: dict[str, float]
    """How much of a trained role's weights is dealt out over its ranks: all but a GAN head, with
    placement.sharding=fsdp; nothing of roles that are not named."""
    forwards: dict[str, float]
    """Forward equivalents of one generator update with its R critic updates, by role."""
    work: Work
    """What the method's phases cost."""
    critic_first: bool
    """Whether a window's critic updates come before the generator's."""
    through_critic: bool
    """Whether the generator's gradient comes through the critic's answers."""
    seconds: RoleSeconds
    """The phases of a window, in forward equivalents."""
    sample_bytes: int
    """Of a batch of samples."""
    query_bytes: int
    """Of a batch of samples with their conditions."""
    encoder_share: float
    """e, the encoder half's share of a forward pass's FLOPs."""
    gflop_per_forward: float
    """Of one sample through the UNet."""
    batch_size: int

    @property
    def total_bytes(self) -> int:
        """Of all roles in one process, at its peak."""
        return bytes_together(list(self.bytes_by_role.values()))

    @property
    def device_bytes(self) -> dict[str, int]:
        """Of one device of each kind of the run's own placement, at its peak."""
        return {
            kind: bytes_together([self.bytes_by_role[role] for role in roles])
            for kind, roles in ROLES_ON[self.mode].items()
        }

    def table(self) -> str:
        """For `--dry-run` and `raydistill plan`."""
        widths = {"weights": 10, "gradients": 11, "optimiser": 11, "EMA": 8, "activations": 13}
        sharded = any(role.gathered for role in self.bytes_by_role.values())
        widths |= {"gathered": 10} if sharded else {}
        widths["total"] = 9
        title = "GiB, all on a worker" if self.mode == "colocated" else "GiB of each role"
        lines = [f"{title:<20}" + "".join(f"{name:>{width}}" for name, width in widths.items())]
        for name, role in self.bytes_by_role.items():
            cells = [role.weights, role.gradients, role.optimizer, role.ema, role.activations]
            cells += [role.gathered, role.total] if sharded else [role.total]
            lines.append(
                f"{name:<20}"
                + "".join(f"{c / GIB:>{w}.4f}" for c, w in zip(cells, widths.values(), strict=True))
            )
        for kind, num_bytes in self.device_bytes.items():
            held = ROLES_ON[self.mode][kind]
            name = (
                "together (one role's gradients at a time)"
                if self.mode == "colocated"
                else f"on {_IN_WORDS[kind]}: {', '.join(held)}"
            )
            lines.append(f"{name:<{20 + sum(widths.values()) - 9}}{num_bytes / GIB:>9.4f}")
        lines.append("")
        lines.append(
            "forward equivalents per generator update (1 = one batch through the UNet, backward pass 2):"
        )
        lines += [f"  {name:<18}{count:>8.2f}" for name, count in self.forwards.items()]
        total = sum(self.forwards.values())
        tflop = total * self.gflop_per_forward * self.batch_size / 1000
        lines.append(
            f"  {'together':<18}{total:>8.2f}   ({tflop:.3f} TFLOP; encoder half e = {self.encoder_share:.2f})"
        )
        return "\n".join(lines)


def plan(config: RunConfig) -> Plan:
    """The plan of a run. Raises ConfigError if the teacher's folder can't be read or can't be guided as asked."""
    require_guidable(config, not is_edm(teacher_folder(config.teacher)))
    return plan_for(config, *denoiser_on_meta(config))


def plan_for(config: RunConfig, denoiser: Denoiser, cond_shapes: dict[str, tuple[int, ...]]) -> Plan:
    """The plan for a network on the meta device and the shapes of one sample's conditions."""
    denoiser.network.train()
    if config.train.activation_checkpointing:
        denoiser.checkpoint_activations()
    networks = _networks(config, denoiser)

    def inputs(samples: int) -> tuple[Tensor, Tensor, Cond]:
        cond = {name: torch.empty(samples, *shape, device="meta") for name, shape in cond_shapes.items()}
        x = torch.empty(samples, *denoiser.sample_shape, device="meta")
        return x, torch.ones(samples, device="meta"), Cond(cond)

    one = inputs(1)
    micro = config.train.micro_batch(max(1, config.placement.workers))
    # one pass for both counts: on the meta device a big UNet's takes seconds
    flops, measured = _flops(lambda: _saved_bytes(denoiser, lambda: denoiser(*inputs(micro))))
    full = flops / micro
    with torch.no_grad():
        half, _ = _flops(lambda: denoiser.features(*one))
    share = half / full
    method = method_for(config, denoiser.schedule)
    r = method.critic_updates_per_generator
    backward = {
        # through a frozen base no gradients of weights are made; those of A and B are left out
        role: (1.0 if getattr(config, role).lora else 2.0) + config.train.activation_checkpointing
        for role in ("generator", "critic")
    }
    work = method.work(
        encoder_share=share, backward=backward["critic"], guided=config.teacher.guidance_scale != 1
    )
    batches = r + method.critic_first  # of samples in a window
    forwards = {
        "generator": backward["generator"] + batches * (1 + work.rollout),
        "critic": work.critic_answer + r * work.critic_update,
        "teacher": work.teacher_answer + r * work.teacher_for_critic,
    }

    seconds = RoleSeconds(
        generator_update=backward["generator"],
        sample=1 + work.rollout,
        critic_answer=work.critic_answer,
        critic_update=work.critic_update,
        teacher_answer=work.teacher_answer if method.critic_first else forwards["teacher"],
        teacher_for_critic=work.teacher_for_critic if method.critic_first else 0.0,
    )
    ranks = _ranks(config, seconds, critic_first=method.critic_first)

    def saved_bytes(role: str) -> int:
        of_rank, network = config.train.micro_batch(ranks[role]), networks[role]
        again = of_rank != micro or network is not denoiser
        saved = _saved_bytes(network, lambda: network(*inputs(of_rank))) if again else measured
        return saved * (2 if config.train.dtype == "bf16" else 4) // 4

    activations = saved_bytes("generator")
    same = ranks["critic"] == ranks["generator"] and networks["critic"] is networks["generator"]
    critic_activations = activations if same else saved_bytes("critic")
    head = 0
    if method.needs.gan_head:
        channels, size, _ = denoiser.feature_shape
        with torch.device("meta"):
            head = sum(p.numel() for p in BottleneckHead(channels, size).parameters())
    trained = {role: parameter_count(network) for role, network in networks.items()}
    ema = 4 * trained["generator"] if config.generator.ema_halflife_images > 0 else 0
    base = parameter_count(denoiser) * (2 if config.teacher.dtype == "bf16" else 4)
    roles = {
        "teacher": RoleBytes(weights=base, activations=int(activations * work.teacher_graphs)),
        "generator": _trained_bytes(config.generator, trained["generator"], ema, activations),
        "critic": _trained_bytes(
            config.critic, trained["critic"] + head, 0, int(critic_activations * work.critic_graphs)
        ),
    }
    sharded: dict[str, float] = {}
    if config.placement.sharding == "fsdp":
        sharded = {"generator": 1.0, "critic": trained["critic"] / (trained["critic"] + head)}
        for role, dealt in sharded.items():
            mine = roles[role].shared(share_of(dealt, ranks[role]))
            roles[role] = replace(mine, gathered=_gathered_bytes(denoiser))
    sample_bytes = 4 * one[0].numel() * config.train.batch_size
    cond_bytes = 4 * sum(math.prod(shape) for shape in cond_shapes.values()) * config.train.batch_size
    return Plan(
        mode=config.placement.mode,
        ranks=ranks,
        bytes_by_role=roles,
        sharded=sharded,
        forwards=forwards,
        work=work,
        critic_first=method.critic_first,
        through_critic=method.needs.critic == "vjp",
        seconds=seconds,
        sample_bytes=sample_bytes,
        query_bytes=sample_bytes + cond_bytes,
        encoder_share=share,
        gflop_per_forward=full / 1e9,
        batch_size=config.train.batch_size,
    )


def _trained_bytes(config: OptimizerConfig, parameters: int, ema: int, activations: int) -> RoleBytes:
    """Of fp32 weights with their gradients and Adam's two moments."""
    moments = _MOMENT_BYTES[config.moments] * parameters
    return RoleBytes(4 * parameters, 4 * parameters, moments, ema, activations)


def _gathered_bytes(denoiser: Denoiser) -> int:
    """Of a sharded network in a backward pass: weights and gradients of what is outside of blocks, weights of two
    blocks, the next one being gathered, and gradients of one."""
    blocks = [4 * parameter_count(block) for block in denoiser.blocks]
    outside, largest = 4 * parameter_count(denoiser) - sum(blocks), max(blocks, default=0)
    return 2 * outside + 3 * largest


def _networks(config: RunConfig, denoiser: Denoiser) -> dict[str, Denoiser]:
    """The trained roles' networks on the meta device, adapters in a copy of it."""
    networks = {"generator": denoiser, "critic": denoiser}
    base = SharedBase(copy.deepcopy(denoiser))
    for role in networks:
        if lora := getattr(config, role).lora:
            networks[role] = base.add(role, lora, dtype="fp32", seed=0)
    return networks


def _ranks(config: RunConfig, seconds: RoleSeconds, *, critic_first: bool) -> dict[str, int]:
    """How many ranks share a batch of each trained role. Raises PlacementError if they can't."""
    placement = config.placement
    if placement.mode != "disaggregated":
        least = 2 if placement.sharding == "fsdp" else 1
        return dict.fromkeys(("generator", "critic"), max(least, placement.workers))
    world = placement.workers or 2  # what 0 stands for
    critics = placement.critic_ranks or best_num_critic(
        world,
        config.train.batch_size,
        config.train.micro_batch_size,
        seconds,
        config.method.critic_updates_per_generator,
        placement.teacher_replicas,
        critic_first,
    )
    return {"generator": max(1, world - critics), "critic": critics}


def _flops(call: Callable[[], T]) -> tuple[int, T]:
    """What a call computes, and its result."""
    with FlopCounterMode(display=False) as counter:
        result = call()
    return counter.get_total_flops(), result


def _saved_bytes(denoiser: Denoiser, call: Callable[[], Tensor]) -> int:
    """Bytes of the distinct tensors that a backward pass of `call` would keep, the network's weights left out."""
    seen: dict[int, Tensor] = {}
    weights = {weight.untyped_storage()._cdata for weight in denoiser.network.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in weights:
            seen[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    total = sum(tensor.untyped_storage().nbytes() for tensor in seen.values())
    del result
    return total
