"""EDM's networks: published sizes, preconditioning, derivatives of both modes, features, precisions, labels."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, jvp

from raydistill.errors import ConfigError, DataError
from raydistill.models.denoiser import Cond, parameter_count, skeleton, with_weights
from raydistill.models.edm_net import EDMDenoiser, EDMNet, EDMNetConfig
from raydistill.models.pipeline import trainable

SONG = EDMNetConfig(
    family="ddpmpp", image_size=8, channels=2, label_dim=5, base_channels=16, channel_mult=(2, 1), blocks_per_level=2,
    attention_sizes=(8,), augment_dim=3,
)  # fmt: skip
ADM = EDMNetConfig(
    family="adm", image_size=8, channels=2, label_dim=5, base_channels=32, channel_mult=(1, 4), blocks_per_level=1,
    attention_sizes=(4,),
)  # fmt: skip
BOTH = pytest.mark.parametrize("config", [SONG, ADM], ids=["ddpmpp", "adm"])


def awake(config: EDMNetConfig) -> EDMDenoiser:
    """Random weights in which no branch is silent, unlike at initialisation."""
    denoiser = EDMDenoiser.random(config, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in denoiser.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    return denoiser.eval()


def inputs(config: EDMNetConfig, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Cond]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(3, *EDMDenoiser.on_meta(config).sample_shape, generator=generator, dtype=dtype)
    return x, torch.tensor([0.02, 0.7, 20.0], dtype=dtype), Cond({"label": torch.tensor([4.0, 0.0, 2.0])})


@pytest.mark.parametrize(
    ("config", "count", "millions"),
    [(EDMNetConfig.cifar10(), 55_735_299, 55.7), (EDMNetConfig.imagenet64(), 295_899_267, 295.9)],
)
def test_published_shapes_have_the_published_parameter_counts(
    config: EDMNetConfig, count: int, millions: float
) -> None:
    assert parameter_count(EDMDenoiser.on_meta(config)) == count
    assert round(count / 1e6, 1) == millions


def test_the_digits_network_is_small_enough_to_be_shipped() -> None:
    assert 4 * parameter_count(EDMDenoiser.on_meta(EDMNetConfig.digits())) < 1.6e6


def test_preconditioning_is_edms_table_1() -> None:
    denoiser = awake(replace(SONG, sigma_data=0.3)).double()
    x, sigma, cond = inputs(SONG, torch.float64)
    classes = torch.eye(5, dtype=torch.float64)[[4, 0, 2]]
    s = sigma.reshape(-1, 1, 1, 1)
    total = s**2 + 0.3**2
    output = denoiser.net(x / total.sqrt(), sigma.log() / 4, classes)
    expected = 0.3**2 / total * x + s * 0.3 / total.sqrt() * output
    torch.testing.assert_close(denoiser(x, sigma, cond), expected, rtol=1e-12, atol=1e-12)


@BOTH
def test_a_network_begins_by_answering_with_the_skipped_part_alone(config: EDMNetConfig) -> None:
    denoiser = EDMDenoiser.random(config, seed=0)
    x, sigma, cond = inputs(config)
    c_skip = 0.25 / (sigma**2 + 0.25)
    expected = c_skip.reshape(-1, 1, 1, 1) * x
    torch.testing.assert_close(denoiser(x, sigma, cond), expected, rtol=0, atol=1e-3)


@BOTH
def test_initial_weights_follow_from_the_seed_and_leave_the_global_generator_alone(
    config: EDMNetConfig,
) -> None:
    before = torch.random.get_rng_state()
    one, same, other = (EDMDenoiser.random(config, seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["net.embed0.weight"], other["net.embed0.weight"])
    assert all(weight.isfinite().all() for weight in one.values())


@BOTH
def test_every_weight_matters_but_the_augmentation_labels_which_are_zero(config: EDMNetConfig) -> None:
    denoiser = awake(config)
    denoiser(*inputs(config)).square().sum().backward()
    for name, weight in denoiser.named_parameters():
        assert weight.grad is not None, name
        assert (name == "net.embed_augment.weight") == (not weight.grad.any()), name


@BOTH
def test_the_answer_depends_on_each_samples_own_class_and_noise(config: EDMNetConfig) -> None:
    denoiser = awake(config)
    x, sigma, cond = inputs(config)
    answer = denoiser(x, sigma, cond)
    relabelled = denoiser(x, sigma, Cond({"label": torch.tensor([4, 0, 3])}))
    assert torch.equal(relabelled[:2], answer[:2])
    assert not torch.allclose(relabelled[2], answer[2], atol=1e-3)
    apart = torch.cat(
        [
            denoiser(x[i : i + 1], sigma[i : i + 1], Cond({"label": cond.tensors["label"][i : i + 1]}))
            for i in range(3)
        ]
    )
    torch.testing.assert_close(apart, answer, rtol=1e-4, atol=1e-4)


@BOTH
def test_forward_mode_derivatives_agree_with_finite_differences(config: EDMNetConfig) -> None:
    """By the input and by the weights, as the parameter-space variant of moment matching takes them."""
    denoiser = awake(config).double()
    x, sigma, cond = inputs(config, torch.float64)
    weights = {name: weight.detach() for name, weight in denoiser.named_parameters()}
    generator = torch.Generator().manual_seed(4)

    def like(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float64)

    step = 1e-6
    v = like(x)
    _, along = jvp(lambda x: denoiser(x, sigma, cond), (x,), (v,))
    with torch.no_grad():
        difference = (denoiser(x + step * v, sigma, cond) - denoiser(x - step * v, sigma, cond)) / (2 * step)
    torch.testing.assert_close(along, difference, rtol=1e-6, atol=1e-7)

    u = {name: like(weight) for name, weight in weights.items()}

    def at(weights: dict[str, Tensor]) -> Tensor:
        return functional_call(denoiser, weights, (x, sigma, cond))

    _, along = jvp(at, (weights,), (u,))
    moved = [{name: weights[name] + sign * step * u[name] for name in weights} for sign in (1, -1)]
    with torch.no_grad():
        difference = (at(moved[0]) - at(moved[1])) / (2 * step)
    torch.testing.assert_close(along, difference, rtol=1e-5, atol=1e-6)


@BOTH
def test_second_derivatives_agree_with_finite_differences_of_the_gradient(config: EDMNetConfig) -> None:
    denoiser = awake(config).double()
    x, sigma, cond = inputs(config, torch.float64)

    def gradient(x: Tensor, create_graph: bool = False) -> Tensor:
        return torch.autograd.grad(denoiser(x, sigma, cond).square().sum(), x, create_graph=create_graph)[0]

    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    (product,) = torch.autograd.grad((gradient(leaf, create_graph=True) * v).sum(), leaf)
    step = 1e-6
    above, below = ((x + sign * step * v).requires_grad_() for sign in (1, -1))
    difference = (gradient(above) - gradient(below)) / (2 * step)
    torch.testing.assert_close(product, difference, rtol=1e-5, atol=1e-6)


@BOTH
def test_features_are_the_encoders_last_output_and_the_decoder_is_not_run(config: EDMNetConfig) -> None:
    denoiser = awake(config)
    seen: list[Tensor] = []
    decoded: list[Tensor] = []
    last = list(denoiser.net.encoder.values())[-1]
    last.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    denoiser.net.decoder["4x4_in0"].register_forward_hook(lambda _m, _i, output: decoded.append(output))
    denoiser(*inputs(config))
    features = denoiser.features(*inputs(config))
    assert torch.equal(features, seen[0])
    assert features.shape[1:] == denoiser.feature_shape
    assert len(decoded) == 1


@BOTH
def test_recomputed_activations_give_the_same_gradients(config: EDMNetConfig) -> None:
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    gradients = []
    for recompute in (False, True):
        denoiser = awake(config)
        denoiser.net.decoder["8x8_block0"].register_forward_pre_hook(count)
        if recompute:
            denoiser.checkpoint_activations()
        denoiser(*inputs(config)).square().sum().backward()
        gradients.append([weight.grad for weight in denoiser.parameters()])
    assert calls == 3
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True) if a is not None and b is not None)


@BOTH
@pytest.mark.parametrize(
    "how", [lambda d: d.cast("bf16"), lambda d: trainable(d, "bf16")], ids=["cast", "autocast"]
)
def test_bf16_answers_in_fp32_and_nearly_the_same(
    config: EDMNetConfig, how: Callable[[EDMDenoiser], EDMDenoiser]
) -> None:
    # weights as at the start of training but for the silent layers, so that activations are of order one
    denoiser = EDMDenoiser.random(config, seed=1)
    with torch.no_grad():
        for name, weight in denoiser.named_parameters():
            if name.endswith(("conv1.weight", "proj.weight", "out_conv.weight")):
                weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(6)))
                weight.div_(weight[0].numel() ** 0.5)
    exact = denoiser(*inputs(config))
    low = how(denoiser)
    answer, features = low(*inputs(config)), low.features(*inputs(config))
    assert answer.dtype == torch.float32
    assert features.dtype == torch.bfloat16
    assert not torch.equal(answer, exact)
    assert (answer - exact).norm() < 0.03 * exact.norm()


def test_dropout_is_off_in_a_trainable_copy() -> None:
    denoiser = trainable(awake(replace(SONG, dropout=0.5)), "fp32").train()
    assert torch.equal(denoiser(*inputs(SONG)), denoiser(*inputs(SONG)))


def test_a_skeleton_is_made_whole_by_its_weights() -> None:
    denoiser = awake(ADM)
    twin = with_weights(skeleton(denoiser), denoiser.state_dict())
    assert torch.equal(twin(*inputs(ADM)), denoiser(*inputs(ADM)))


@pytest.mark.parametrize("label", [5.0, -1.0, 2.5, math.nan])
def test_a_label_that_is_no_class_is_refused(label: float) -> None:
    x, sigma, _ = inputs(SONG)
    with pytest.raises(DataError, match=f"class label {label:g} is not a whole number from 0 to 4") as error:
        awake(SONG)(x, sigma, Cond({"label": torch.tensor([0.0, label, 1.0])}))
    assert "\n" not in str(error.value)


def test_an_unconditional_network_ignores_the_label() -> None:
    config = replace(SONG, label_dim=0)
    x, sigma, cond = inputs(config)
    denoiser = awake(config)
    assert torch.equal(denoiser(x, sigma, cond), denoiser(x, sigma, Cond({"label": torch.zeros(3)})))


def test_adm_has_a_head_for_every_64_channels() -> None:
    def heads(net: EDMNet, name: str) -> int:
        return int(dict(net.named_modules())[name].heads)

    net = EDMDenoiser.on_meta(EDMNetConfig.imagenet64()).net
    assert [
        heads(net, name) for name in ("encoder.32x32_block0", "encoder.8x8_block2", "decoder.8x8_in0")
    ] == [6, 12, 12]
    assert heads(net, "encoder.64x64_block0") == 0
    net = EDMDenoiser.on_meta(EDMNetConfig.cifar10()).net
    assert [heads(net, f"decoder.16x16_block{i}") for i in range(5)] == [0, 0, 0, 0, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"family": "ncsnpp"}, "family='ncsnpp' is not one of ddpmpp, adm"),
        ({"image_size": 9}, "image_size=9 can't be halved 1 times"),
        ({"channel_mult": ()}, "channel_mult="),
        ({"base_channels": 18}, "base_channels=18 must be a multiple of 4"),
        ({"blocks_per_level": 0}, "blocks_per_level=0 must be from 1 to 64"),
        ({"label_dim": -1}, "label_dim=-1 must be from 0 to 1000000"),
        ({"dropout": 1.0}, "dropout=1 must be in"),
        ({"sigma_data": 0.0}, "sigma_data must be positive"),
        ({"sigma_min": 90.0}, "sigma_min < sigma_max"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        replace(SONG, **change)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


def test_widths_that_no_group_norm_fits_are_refused() -> None:
    with pytest.raises(ConfigError, match="140 channels can't be normalised in 32 groups"):
        EDMDenoiser.on_meta(replace(SONG, base_channels=140, channel_mult=(1, 1)))


def test_weights_of_another_shape_are_refused() -> None:
    weights = EDMDenoiser.random(SONG, seed=0).net.state_dict()
    weights["embed0.bias"] = weights["embed0.bias"][:-1]
    with pytest.raises(
        ConfigError, match=r"weight embed0.bias has shape \(63,\), the configuration needs \(64,\)"
    ):
        EDMDenoiser.from_weights(SONG, weights)
