"""Adapters in one shared base against plain networks that have them merged into their weights."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from raydistill.errors import CheckpointError, ConfigError
from raydistill.models.denoiser import Cond, Denoiser
from raydistill.models.edm_net import EDMDenoiser, EDMNetConfig
from raydistill.models.gaussian import GaussianMixtureDenoiser
from raydistill.models.lora import AdaptedDenoiser, Lora, SharedBase, for_diffusers, merged
from tests.tiny import tiny_pipeline

LORA = {"generator": Lora(4, 8.0, "all"), "critic": Lora(2, 2.0, "attention")}


def unet() -> tuple[Denoiser, Tensor, Tensor, Cond]:
    torch.manual_seed(1)
    cond = Cond({"text": torch.randn(2, 3, 64)})
    return tiny_pipeline().denoiser, torch.randn(2, 3, 8, 8), torch.tensor([700.0, 300.0]), cond


def edm() -> tuple[Denoiser, Tensor, Tensor, Cond]:
    torch.manual_seed(1)
    denoiser = EDMDenoiser.random(EDMNetConfig.digits(), seed=0)
    with torch.no_grad():
        for weight in denoiser.parameters():
            weight += 0.05 * torch.randn_like(weight)  # EDM begins with layers that answer nearly 0
    return denoiser, torch.randn(2, 1, 8, 8), torch.tensor([2.0, 0.5]), Cond({"label": torch.tensor([3, 0])})


NETWORKS = {"unet": unet, "edm": edm}
Network = Callable[[], tuple[Denoiser, Tensor, Tensor, Cond]]


def shared(denoiser: Denoiser) -> tuple[SharedBase, dict[str, AdaptedDenoiser]]:
    """A base with a generator's and a critic's adapter, both of which change its answers."""
    base = SharedBase(denoiser)
    views = {name: base.add(name, lora, dtype="fp32", seed=0) for name, lora in LORA.items()}
    draws = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for view in views.values():
            for name, weight in view.named_parameters():
                if "lora_B" in name:
                    weight.normal_(std=0.1, generator=draws)
    return base, views


def plain(original: Denoiser, view: AdaptedDenoiser, name: str) -> Denoiser:
    """A network of its own with the adapter's change in its weights."""
    alone = copy.deepcopy(original)
    alone.load_state_dict(merged(original.state_dict(), view.state_dict(), LORA[name].scale))
    return alone


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_each_role_answers_as_a_network_of_its_own_with_the_adapter_merged(network: Network) -> None:
    denoiser, x, t, cond = network()
    original = copy.deepcopy(denoiser)
    base, views = shared(denoiser)
    teacher = original(x, t, cond)
    for name, view in views.items():
        alone = plain(original, view, name)
        for ask in ("forward", "features"):
            found, expected = getattr(view, ask)(x, t, cond), getattr(alone, ask)(x, t, cond)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert (view(x, t, cond) - teacher).abs().max() > 1e-3
        assert torch.equal(base.teacher()(x, t, cond), teacher)
        assert torch.equal(denoiser(x, t, cond), teacher)
    assert not torch.allclose(views["generator"](x, t, cond), views["critic"](x, t, cond), atol=1e-3)


def test_a_new_adapter_changes_nothing_and_is_drawn_from_seed_and_name_alone() -> None:
    denoiser, x, t, cond = unet()
    expected = copy.deepcopy(denoiser)(x, t, cond)
    base = SharedBase(denoiser)
    state = torch.random.get_rng_state()
    both = [base.add(name, LORA["generator"], dtype="fp32", seed=3) for name in ("generator", "critic")]
    assert torch.equal(torch.random.get_rng_state(), state)
    for view in both:
        assert torch.equal(view(x, t, cond), expected)
    alone = SharedBase(unet()[0]).add("critic", LORA["generator"], dtype="fp32", seed=3)
    for name, weight in alone.state_dict().items():
        assert torch.equal(weight, both[1].state_dict()[name])
    names = [name for name in alone.state_dict() if "lora_A" in name]
    assert not torch.equal(both[0].state_dict()[names[0]], both[1].state_dict()[names[0]])
    assert all(weight.requires_grad for view in both for weight in view.parameters())


def gradients(denoiser: Denoiser, x: Tensor, t: Tensor, cond: Cond, *, again: bool) -> list[Tensor]:
    """Of a loss whose graph goes through generator, teacher and critic, with respect to x and all adapters.

    The backward pass runs when every forward pass is over, the last of them without any adapter.
    """
    base, views = shared(denoiser)
    if again:
        base.checkpoint_activations()
    x = x.clone().requires_grad_()
    made = views["generator"](x, t, cond)
    judged = base.teacher()(made, t, cond) - 2 * views["critic"](made, t, cond)
    loss = judged.square().mean() + views["critic"].features(made, t, cond).square().mean()
    with torch.no_grad():
        base.teacher()(x, t, cond)
    wanted = [x, *views["generator"].parameters(), *views["critic"].parameters()]
    return list(torch.autograd.grad(loss, wanted))


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_recomputed_activations_are_those_of_the_adapter_that_made_them(network: Network) -> None:
    denoiser, x, t, cond = network()
    kept = gradients(copy.deepcopy(denoiser), x, t, cond, again=False)
    recomputed = gradients(denoiser, x, t, cond, again=True)
    assert all(float(each.abs().max()) > 0 for each in kept)
    for one, other in zip(kept, recomputed, strict=True):
        assert torch.equal(one, other)


def test_gradients_are_those_of_plain_networks_by_the_chain_rule() -> None:
    denoiser, x, t, cond = unet()
    original = copy.deepcopy(denoiser)
    found = gradients(denoiser, x, t, cond, again=False)
    _, views = shared(copy.deepcopy(original))
    adapters = {name: dict(view.named_parameters()) for name, view in views.items()}
    teacher = original.state_dict()

    def call(name: str, *inputs: object) -> Tensor:
        weights = merged(teacher, adapters[name], LORA[name].scale)
        answer: Tensor = torch.func.functional_call(original, weights, inputs)
        return answer

    x = x.clone().requires_grad_()
    made = call("generator", x, t, cond)
    loss = (original(made, t, cond) - 2 * call("critic", made, t, cond)).square().mean()
    features = plain_features(original, merged(teacher, adapters["critic"], LORA["critic"].scale))
    loss = loss + features(made, t, cond).square().mean()
    wanted = [x, *adapters["generator"].values(), *adapters["critic"].values()]
    for one, other in zip(found, torch.autograd.grad(loss, wanted), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5 * float(other.abs().max()) + 1e-8)


def plain_features(denoiser: Denoiser, weights: dict[str, Tensor]) -> Callable[..., Tensor]:
    class Features(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = denoiser

        def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
            return self.inner.features(x_t, t, cond)

    named = {f"inner.{name}": weight for name, weight in weights.items()}
    return lambda *inputs: torch.func.functional_call(Features(), named, inputs)


def test_a_call_that_fails_leaves_no_adapter_on() -> None:
    denoiser, x, t, cond = unet()
    expected = denoiser(x, t, cond)
    _, views = shared(denoiser)
    with pytest.raises(KeyError):
        views["generator"](x, t, Cond({}))
    assert torch.equal(denoiser(x, t, cond), expected)
    assert not torch.equal(views["generator"](x, t, cond), expected)
    assert torch.equal(denoiser(x, t, cond), expected)


def test_adapters_of_a_bf16_base_are_fp32_from_the_start_and_keep_its_arithmetic() -> None:
    denoiser, x, t, cond = unet()
    fine = SharedBase(copy.deepcopy(denoiser)).add("critic", LORA["critic"], dtype="fp32", seed=0)
    expected = copy.deepcopy(denoiser).cast("bf16")(x, t, cond)
    base = SharedBase(denoiser.cast("bf16"))
    view = base.add("critic", LORA["critic"], dtype="bf16", seed=0)
    for name, weight in view.state_dict().items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, fine.state_dict()[name])
    # as long as B is 0, critic and teacher differ by nothing, not even by rounding
    assert torch.equal(base.teacher()(x, t, cond), expected)
    assert torch.equal(view(x, t, cond), expected)
    view(x, t, cond).square().mean().backward()
    assert all(w.grad is not None and w.grad.dtype == torch.float32 for w in view.parameters())
    assert all(
        weight.dtype == torch.bfloat16 for name, weight in denoiser.named_parameters() if "lora" not in name
    )


def test_only_adapters_are_weights_of_a_role() -> None:
    base, views = shared(unet()[0])
    for view in views.values():
        assert {name.split(".")[-2] for name in view.state_dict()} == {"lora_A", "lora_B"}
        assert len(list(view.parameters())) == len(view.state_dict())
    assert not list(base.teacher().parameters())
    frozen = [weight for name, weight in base.denoiser.named_parameters() if "lora" not in name]
    assert frozen
    assert not any(weight.requires_grad for weight in frozen)


def test_an_adapter_of_another_network_is_refused_and_a_network_without_known_places_too() -> None:
    original = unet()[0].state_dict()
    _, views = shared(edm()[0])
    with pytest.raises(CheckpointError, match=r"no layer of this teacher \(teacher\.path\)"):
        merged(original, views["generator"].state_dict(), 1.0)
    mixture = GaussianMixtureDenoiser.__new__(GaussianMixtureDenoiser)
    with pytest.raises(ConfigError, match=r"generator\.lora_rank"):
        _ = mixture.lora_targets


def test_the_scale_is_in_what_diffusers_reads() -> None:
    original, *_ = unet()
    _, views = shared(copy.deepcopy(original))
    state = views["generator"].state_dict()
    scale = LORA["generator"].scale
    weights = merged(original.state_dict(), state, scale)
    read = {f"adapter.{name}": weight for name, weight in for_diffusers(state, scale).items()}
    for name, weight in merged(original.state_dict(), read, 1.0).items():
        torch.testing.assert_close(weight, weights[name])
