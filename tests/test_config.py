"""Overrides, JSON and the settings table, on a tree shaped like a run's."""

import dataclasses
import enum
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import Field

from raydistill.config import apply_overrides, describe, flatten, from_dict, to_dict
from raydistill.errors import ConfigError


class Precision(enum.Enum):
    FP32 = "fp32"
    BF16 = "bf16"


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    lr: float = 1e-4
    """Step size of AdamW."""
    betas: tuple[float, float] = (0.0, 0.999)
    """AdamW's two decay rates."""
    clip_norm: float = 10.0
    """Gradient norm above which a step is scaled down; inf turns it off."""


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    critic_updates_per_generator: Annotated[int, Field(ge=1)] = 5
    """Critic optimiser steps for one generator optimiser step."""
    features: Literal["critic", "teacher"] = "critic"
    """Whose bottleneck the GAN head reads."""
    steps: tuple[int, ...] = (999,)
    """Timesteps of the generator, noisiest first."""
    gan: bool = True
    """Train with the GAN term."""
    optimizer: OptimizerConfig = OptimizerConfig()


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    shards: str
    """Folder, glob or s3:// URL of the shards."""
    fields: tuple[str, ...] = ("image", "text")
    """What a sample must hold."""
    cache_dir: Path | None = None
    """Where remote shards are kept; none streams them."""
    renames: dict[str, str] = field(default_factory=dict)
    """Shard key to field name."""


@dataclass(frozen=True, kw_only=True)
class Run:
    name: str = "run"
    """Folder of the run under output_dir."""
    batch_size: int = 32
    """Samples of one optimiser step, over all ranks."""
    micro_batch_size: int | None = None
    """Samples of one forward pass on one rank; none means the whole share of the rank."""
    precision: Precision = Precision.FP32
    """Number format of the networks."""
    method: MethodConfig = MethodConfig()
    data: DataConfig
    evaluation: OptimizerConfig | None = OptimizerConfig()

    def __post_init__(self) -> None:
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ConfigError(f"batch_size {self.batch_size} is not a multiple of {self.micro_batch_size}")


@pytest.fixture
def run() -> Run:
    return Run(data=DataConfig(shards="/data/shards"))


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("method.critic_updates_per_generator=10", "method.critic_updates_per_generator", 10),
        ("method.optimizer.lr=5", "method.optimizer.lr", 5.0),
        ("method.optimizer.lr=.5e-3", "method.optimizer.lr", 5e-4),
        ("method.optimizer.clip_norm=inf", "method.optimizer.clip_norm", float("inf")),
        ("method.optimizer.betas=[0.5, 0.9]", "method.optimizer.betas", (0.5, 0.9)),
        ("method.optimizer.betas=(0.5, 0.9)", "method.optimizer.betas", (0.5, 0.9)),
        ("method.optimizer.betas=0.5,0.9", "method.optimizer.betas", (0.5, 0.9)),
        ("method.steps=999,749,499,249", "method.steps", (999, 749, 499, 249)),
        ("method.steps=999", "method.steps", (999,)),
        ("method.features=teacher", "method.features", "teacher"),
        ("method.gan=False", "method.gan", False),
        ("method.gan=off", "method.gan", False),
        ("method.gan=1", "method.gan", True),
        ("data.fields=image, latent", "data.fields", ("image", "latent")),
        ("data.fields=", "data.fields", ()),
        ("data.cache_dir=/var/cache", "data.cache_dir", Path("/var/cache")),
        ("data.cache_dir=none", "data.cache_dir", None),
        ('data.renames={"txt": "text"}', "data.renames", {"txt": "text"}),
        ("data.shards=s3://bucket/a,b=c.tar", "data.shards", "s3://bucket/a,b=c.tar"),
        ("micro_batch_size=8", "micro_batch_size", 8),
        ("micro_batch_size=null", "micro_batch_size", None),
        ("precision=bf16", "precision", Precision.BF16),
        ("name=5", "name", "5"),
        ("name=none", "name", "none"),
        ("name=true", "name", "true"),
        ("evaluation=none", "evaluation", None),
    ],
)
def test_an_override_is_read_as_its_annotation_says(run: Run, text: str, name: str, value: object) -> None:
    changed = apply_overrides(run, [text])
    read = changed
    for part in name.split("."):
        read = getattr(read, part)
    assert read == value
    assert type(read) is type(value)


def test_only_what_is_named_changes_and_the_original_stays(run: Run) -> None:
    changed = apply_overrides(run, ["method.optimizer.lr=1", "batch_size=64"])
    assert dataclasses.replace(
        changed, batch_size=32, method=dataclasses.replace(changed.method, optimizer=OptimizerConfig())
    ) == Run(data=DataConfig(shards="/data/shards"))
    assert run == Run(data=DataConfig(shards="/data/shards"))
    assert apply_overrides(run, []) is run


def test_the_later_of_two_overrides_of_one_setting_wins(run: Run) -> None:
    assert apply_overrides(run, ["batch_size=1", "batch_size=2"]).batch_size == 2


def test_a_check_over_two_settings_sees_both_new_values(run: Run) -> None:
    start = apply_overrides(run, ["micro_batch_size=32"])
    changed = apply_overrides(start, ["batch_size=9", "micro_batch_size=3"])
    assert (changed.batch_size, changed.micro_batch_size) == (9, 3)
    with pytest.raises(ConfigError, match="batch_size 9 is not a multiple of 32"):
        apply_overrides(start, ["batch_size=9"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("batch_size=abc", ["batch_size=abc", "integer", "32"]),
        ("batch_size=5.0", ["batch_size=5.0", "integer"]),
        ("batch_size=true", ["batch_size=true", "integer"]),
        ("method.optimizer.lr=nan", ["method.optimizer.lr=nan", "number"]),
        ("method.optimizer.lr=NaN", ["method.optimizer.lr=NaN", "number"]),
        ("method.gan=maybe", ["method.gan=maybe", "boolean"]),
        ("method.features=generator", ["method.features=generator", "'critic' or 'teacher'"]),
        (
            "method.critic_updates_per_generator=0",
            ["method.critic_updates_per_generator=0", "greater than or equal to 1"],
        ),
        ("method.optimizer.betas=1,2,3", ["method.optimizer.betas=1,2,3", "tuple"]),
        ("method.steps=999,a", ["method.steps=999,a"]),
        ("precision=fp8", ["precision=fp8", "'fp32' or 'bf16'"]),
        ("method={}", ["method={}", "section", "method.gan"]),
        ("batch_size", ["'batch_size'", "name=value"]),
        ("=5", ["'=5'", "name=value"]),
    ],
)
def test_a_bad_override_is_refused_in_one_line_with_its_value(run: Run, text: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        apply_overrides(run, [text])
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("text", "nearest"),
    [
        ("method.critic_updates=5", "method.critic_updates_per_generator"),
        ("critic_updates_per_generator=5", "method.critic_updates_per_generator"),
        ("method.optimiser.lr=5", "method.optimizer.lr"),
        ("method.lr=5", "method.optimizer.lr"),
        ("batchsize=5", "batch_size"),
        ("batch_size.x=5", "batch_size"),
        ("data.shard=x", "data.shards"),
        ("method.features.critic=1", "method.features"),
    ],
)
def test_an_unknown_name_is_answered_with_the_value_and_the_nearest_valid_name(
    run: Run, text: str, nearest: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        apply_overrides(run, [text])
    assert f"'{text}'" in str(caught.value)
    assert f"did you mean {nearest}?" in str(caught.value)


def test_json_brings_the_same_tree_back(run: Run) -> None:
    changed = apply_overrides(
        run,
        [
            "precision=bf16",
            "data.cache_dir=/c",
            "method.steps=3,2,1",
            "method.optimizer.clip_norm=inf",
            "evaluation=none",
        ],
    )
    assert from_dict(run, json.loads(json.dumps(to_dict(changed)))) == changed
    assert from_dict(Run, json.loads(json.dumps(to_dict(changed)))) == changed


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    lr=st.floats(allow_nan=False),
    steps=st.lists(st.integers(min_value=0, max_value=10**12)),
    name=st.text(),
    gan=st.booleans(),
)
def test_any_value_survives_json_and_an_override_of_its_flat_form(
    lr: float, steps: list[int], name: str, gan: bool
) -> None:
    start = Run(data=DataConfig(shards="s"))
    method = MethodConfig(steps=tuple(steps), gan=gan, optimizer=OptimizerConfig(lr=lr))
    config = dataclasses.replace(start, name=name, method=method)
    assert from_dict(start, json.loads(json.dumps(to_dict(config)))) == config
    flat = {key: json.dumps(value) if key == "name" else value for key, value in flatten(config).items()}
    assert apply_overrides(start, [f"{key}={value}" for key, value in flat.items()]) == config


def test_a_saved_config_with_an_unknown_setting_is_refused(run: Run) -> None:
    data = to_dict(run)
    data["method"]["critic_updates"] = 5
    with pytest.raises(
        ConfigError, match=r"method\.critic_updates=5; did you mean method\.critic_updates_per_generator"
    ):
        from_dict(run, data)


def test_a_saved_config_that_lacks_a_setting_takes_it_from_the_template(run: Run) -> None:
    template = dataclasses.replace(run, batch_size=7)
    assert from_dict(template, {"name": "x"}) == dataclasses.replace(template, name="x")
    with pytest.raises(ConfigError, match=r"data\.shards is missing and DataConfig has no default"):
        from_dict(Run, {"data": {}})


def test_a_saved_value_of_the_wrong_type_is_refused(run: Run) -> None:
    with pytest.raises(ConfigError, match=r"method\.gan='yes' is refused"):
        from_dict(run, {"method": {"gan": "yes"}})


def test_flatten_gives_scalars_under_dotted_names(run: Run) -> None:
    flat = flatten(run)
    assert flat["method.optimizer.betas"] == "[0.0,0.999]"
    assert flat["data.cache_dir"] is None
    assert flat["precision"] == "fp32"
    assert flat["batch_size"] == 32
    assert all(value is None or isinstance(value, (str, int, float, bool)) for value in flat.values())


def test_a_value_without_json_form_is_named(run: Run) -> None:
    broken = dataclasses.replace(run, name=object())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="name is <object object"):
        to_dict(broken)


def test_describe_shows_each_setting_with_value_and_help(run: Run) -> None:
    lines = {line.split()[0]: line for line in describe(run, width=200).splitlines()}
    assert set(lines) == set(flatten(run))
    assert "5" in lines["method.critic_updates_per_generator"]
    assert (
        "Critic optimiser steps for one generator optimiser step."
        in lines["method.critic_updates_per_generator"]
    )
    assert "[critic | teacher]" in lines["method.features"]
    assert max(len(line) for line in describe(run).splitlines()) <= 110


def test_describe_keeps_the_help_of_inherited_and_overridden_fields() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Base:
        num_steps: int = 1
        """Steps of the sampler."""
        seed: int = 0
        """First key of every draw."""

    @dataclass(frozen=True, kw_only=True)
    class Derived(Base):
        seed: int = 3
        """Another meaning."""

    table = describe(Derived())
    assert "Steps of the sampler." in table
    assert "Another meaning." in table
    assert "First key" not in table


def test_describe_does_not_shorten_a_long_value(run: Run) -> None:
    long = "/a/very/long/path" * 6
    assert long in describe(apply_overrides(run, [f"data.shards={long}"]))
