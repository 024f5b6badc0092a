"""NVIDIA's checkpoints: their weights give their networks' answers, and no byte of them is executed.

The files are pickled here from classes under NVIDIA's module names, which exist while a file is written and not while
it is read. The answers come from a second implementation of the two networks that knows NVIDIA's names only.
"""

import builtins
import collections
import io
import math
import os
import pickle
import random
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raydistill.errors import ConfigError
from raydistill.models import edm_pickle
from raydistill.models.denoiser import Cond
from raydistill.models.edm_net import EDMDenoiser, EDMNetConfig
from raydistill.models.edm_pickle import load_edm_pickle
from raydistill.models.edm_pipeline import edm_on_meta, load_edm_pipeline

SONG = {
    "img_resolution": 8, "in_channels": 3, "out_channels": 3, "label_dim": 4, "augment_dim": 9, "model_channels": 16,
    "channel_mult": [2, 1], "num_blocks": 2, "attn_resolutions": [8], "dropout": 0.13, "embedding_type": "positional",
    "encoder_type": "standard", "decoder_type": "standard", "channel_mult_noise": 1, "resample_filter": [1, 1],
}  # fmt: skip
ADM = {
    "img_resolution": 8, "in_channels": 3, "out_channels": 3, "label_dim": 4, "model_channels": 64,
    "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [8],
}  # fmt: skip
KINDS = {"SongUNet": SONG, "DhariwalUNet": ADM}
BOTH = pytest.mark.parametrize("kind", KINDS)


class Reference:
    """The two networks as functions of parameters under NVIDIA's names, which are drawn when first asked for."""

    def __init__(self, kind: str):
        self.song = kind == "SongUNet"
        self.settings: dict[str, Any] = KINDS[kind]
        self.parameters: dict[str, Tensor] = {}
        self._generator = torch.Generator().manual_seed(7)

    def __call__(self, x: Tensor, noise: Tensor, classes: Tensor) -> Tensor:
        s, song = self.settings, self.song
        base, mult, blocks = s["model_channels"], s["channel_mult"], s["num_blocks"]
        half = base // 2
        powers = torch.arange(half, dtype=torch.float64) / (half - song)
        angle = torch.outer(noise, (1 / 10000) ** powers)
        if song:
            emb = torch.cat([angle.sin(), angle.cos()], 1)
            emb = emb + self.linear("map_label", classes * math.sqrt(s["label_dim"]), base)
            self.parameter("map_augment.weight", base, s["augment_dim"])  # only ever sees zeros
            emb = F.silu(
                self.linear("map_layer1", F.silu(self.linear("map_layer0", emb, 4 * base)), 4 * base)
            )
        else:
            emb = torch.cat([angle.cos(), angle.sin()], 1)
            emb = self.linear("map_layer1", F.silu(self.linear("map_layer0", emb, 4 * base)), 4 * base)
            emb = F.silu(emb + classes @ self.parameter("map_label.weight", 4 * base, s["label_dim"]).T)
        at = s["attn_resolutions"]
        skips = []
        for level, m in enumerate(mult):
            size = s["img_resolution"] >> level
            if level == 0:
                x = self.conv(f"enc.{size}x{size}_conv", x, base if song else base * m, 3)
            else:
                x = self.block(f"enc.{size}x{size}_down", x, emb, x.shape[1], resample="down")
            skips.append(x)
            for i in range(blocks):
                x = self.block(f"enc.{size}x{size}_block{i}", x, emb, base * m, attention=size in at)
                skips.append(x)
        for level, m in reversed(list(enumerate(mult))):
            size = s["img_resolution"] >> level
            if level == len(mult) - 1:
                x = self.block(f"dec.{size}x{size}_in0", x, emb, x.shape[1], attention=True)
                x = self.block(f"dec.{size}x{size}_in1", x, emb, x.shape[1])
            else:
                x = self.block(f"dec.{size}x{size}_up", x, emb, x.shape[1], resample="up")
            for i in range(blocks + 1):
                x = torch.cat([x, skips.pop()], 1)
                attention = size in at and (i == blocks or not song)
                x = self.block(f"dec.{size}x{size}_block{i}", x, emb, base * m, attention=attention)
        size = s["img_resolution"]
        norm, conv = (
            (f"dec.{size}x{size}_aux_norm", f"dec.{size}x{size}_aux_conv")
            if song
            else ("out_norm", "out_conv")
        )
        return self.conv(conv, F.silu(self.norm(norm, x)), 3, 3)

    def block(
        self, name: str, x: Tensor, emb: Tensor, out: int, attention: bool = False, resample: str = ""
    ) -> Tensor:
        def resampled(x: Tensor) -> Tensor:
            if resample == "up":
                return x.repeat_interleave(2, 2).repeat_interleave(2, 3)
            return x.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).mean((3, 5)) if resample else x

        h = self.conv(f"{name}.conv0", resampled(F.silu(self.norm(f"{name}.norm0", x))), out, 3)
        affine = self.linear(f"{name}.affine", emb, out if self.song else 2 * out)[:, :, None, None]
        if self.song:
            h = self.norm(f"{name}.norm1", h + affine)
        else:
            h = self.norm(f"{name}.norm1", h) * (1 + affine[:, :out]) + affine[:, out:]
        h = self.conv(f"{name}.conv1", F.silu(h), out, 3)
        if x.shape[1] != out or (resample and self.song):
            x = self.conv(f"{name}.skip", resampled(x), out, 1)
        else:
            x = resampled(x)
        gain = 0.5**0.5 if self.song else 1.0
        x = (x + h) * gain
        if attention:
            heads = 1 if self.song else out // 64
            qkv = self.conv(f"{name}.qkv", self.norm(f"{name}.norm2", x), 3 * out, 1)
            # of one head's channels the query, key and value lie side by side
            q, k, v = qkv.unflatten(1, (heads, out // heads, 3)).flatten(4).permute(3, 0, 1, 4, 2)
            a = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(x.shape)
            x = (x + self.conv(f"{name}.proj", a, out, 1)) * gain
        return x

    def parameter(self, name: str, *shape: int) -> Tensor:
        if name not in self.parameters:
            drawn = torch.randn(shape, generator=self._generator)
            if len(shape) > 1:
                drawn /= math.prod(shape[1:]) ** 0.5
            self.parameters[name] = drawn
        return self.parameters[name].double()

    def linear(self, name: str, x: Tensor, out: int) -> Tensor:
        return F.linear(
            x, self.parameter(f"{name}.weight", out, x.shape[1]), self.parameter(f"{name}.bias", out)
        )

    def conv(self, name: str, x: Tensor, out: int, kernel: int) -> Tensor:
        weight = self.parameter(f"{name}.weight", out, x.shape[1], kernel, kernel)
        return F.conv2d(x, weight, self.parameter(f"{name}.bias", out), padding=kernel // 2)

    def norm(self, name: str, x: Tensor) -> Tensor:
        channels = x.shape[1]
        weight, bias = self.parameter(f"{name}.weight", channels), self.parameter(f"{name}.bias", channels)
        return F.group_norm(x, min(32, channels // 4), weight, bias, eps=1e-6 if self.song else 1e-5)


def reference_answer(kind: str) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor, Tensor], Tensor]:
    """NVIDIA-named parameters, inputs, and the network's output for them."""
    network = Reference(kind)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    inputs = x, torch.tensor([-1.3, 0.4], dtype=torch.float64), torch.eye(4, dtype=torch.float64)[[3, 1]]
    answer = network(*inputs)
    return network.parameters, inputs, answer


@contextmanager
def nvidias_modules() -> Iterator[types.SimpleNamespace]:
    """Throw-away `torch_utils.persistence` and `dnnlib.util`, to pickle by."""
    modules = {
        name: types.ModuleType(name)
        for name in ("torch_utils", "torch_utils.persistence", "dnnlib", "dnnlib.util")
    }

    def _reconstruct_persistent_obj(meta: dict[str, Any]) -> None:
        raise AssertionError("the file's own code was called")

    class EasyDict(dict[str, Any]):
        pass

    _reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    EasyDict.__module__, EasyDict.__qualname__ = "dnnlib.util", "EasyDict"
    vars(modules["torch_utils.persistence"])["_reconstruct_persistent_obj"] = _reconstruct_persistent_obj
    vars(modules["dnnlib.util"])["EasyDict"] = EasyDict

    class Persistent(nn.Module):
        """Pickles as NVIDIA's persistent classes do: class name, state and source text."""

        def __init__(self, class_name: str, **kwargs: Any):
            super().__init__()
            self._class_name = class_name
            self._init_args, self._init_kwargs = (), EasyDict(kwargs)

        def __reduce__(self) -> Any:
            state = {name: value for name, value in vars(self).items() if name != "_class_name"}
            source = "raise AssertionError('the source was executed')"
            meta = {
                "type": "class",
                "version": 6,
                "module_src": source,
                "class_name": self._class_name,
                "state": state,
            }
            return _reconstruct_persistent_obj, (meta,), None

    sys.modules |= modules
    try:
        yield types.SimpleNamespace(Persistent=Persistent, EasyDict=EasyDict)
    finally:
        for name in modules:
            del sys.modules[name]


def snapshot(
    kind: str,
    parameters: dict[str, Tensor],
    *,
    settings: dict[str, Any] | None = None,
    precond: str = "EDMPrecond",
    more: Callable[[Any], None] | None = None,
) -> bytes:
    """A network-snapshot-*.pkl. settings: changed ones of the U-Net. more: a last change to the outer module."""
    with nvidias_modules() as nvidia:
        unet = nvidia.Persistent(kind, **(KINDS[kind] | (settings or {})))
        unet.map_noise = nvidia.Persistent("PositionalEmbedding", num_channels=16)
        for name, value in parameters.items():
            *path, last = name.split(".")
            module = unet
            for depth, part in enumerate(path):
                if part not in module._modules:
                    inside = nn.ModuleDict() if part in ("enc", "dec") else nvidia.Persistent("Layer")
                    inside.skip_scale = np.sqrt(0.5)
                    if depth:
                        inside.register_buffer("resample_filter", torch.ones(1, 1, 2, 2) / 4)
                        inside.register_parameter("absent", None)
                    module._modules[part] = inside
                module = module._modules[part]
            module.register_parameter(last, nn.Parameter(value.clone(), requires_grad=False))
        outer = nvidia.Persistent(precond, img_resolution=8, img_channels=3, label_dim=4, model_type=kind)
        outer.sigma_min, outer.sigma_max, outer.sigma_data, outer.use_fp16 = 0, float("inf"), 0.5, False
        outer.model = unet
        if more:
            more(outer)
        loss = nvidia.Persistent("EDMLoss", P_mean=-1.2)
        settings = nvidia.EasyDict(path="/data", use_labels=True)
        return pickle.dumps({"ema": outer, "loss_fn": loss, "dataset_kwargs": settings})


@pytest.fixture(scope="module")
def song() -> dict[str, Tensor]:
    return reference_answer("SongUNet")[0]


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(ConfigError) as error:
        load_edm_pickle(path)
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(f"teacher.path={str(path)!r}")
    return message


@BOTH
def test_the_weights_give_the_answers_of_nvidias_network(tmp_path: Path, kind: str) -> None:
    parameters, inputs, answer = reference_answer(kind)
    path = write(tmp_path / "network-snapshot.pkl", snapshot(kind, parameters))
    config, weights = load_edm_pickle(path)
    assert len(weights) == len(parameters)
    assert all(weight.dtype == torch.float32 for weight in weights.values())
    net = EDMDenoiser.from_weights(config, weights).double().eval().net
    torch.testing.assert_close(net(*inputs), answer, rtol=1e-11, atol=1e-11)


def test_the_configuration_is_read_from_what_the_file_recorded(
    tmp_path: Path, song: dict[str, Tensor]
) -> None:
    config, _ = load_edm_pickle(write(tmp_path / "a.pkl", snapshot("SongUNet", song)))
    assert config == EDMNetConfig(
        family="ddpmpp", image_size=8, channels=3, label_dim=4, base_channels=16, channel_mult=(2, 1),
        blocks_per_level=2, attention_sizes=(8,), dropout=0.13, augment_dim=9, sigma_data=0.5, sigma_min=0.002,
        sigma_max=80.0,
    )  # fmt: skip


def test_a_pipeline_is_loaded_from_the_file(tmp_path: Path, song: dict[str, Tensor]) -> None:
    path = str(write(tmp_path / "a.pkl", snapshot("SongUNet", song)))
    pipeline = load_edm_pipeline(path)
    config, weights = load_edm_pickle(path)
    x, sigma, cond = torch.randn(2, 3, 8, 8), torch.tensor([0.5, 2.0]), pipeline.encode_text(["3", "0"])
    direct = EDMDenoiser.from_weights(config, weights).eval()
    assert torch.equal(
        pipeline.denoiser(x, sigma, cond), direct(x, sigma, Cond({"label": torch.tensor([3, 0])}))
    )
    assert edm_on_meta(path)[0].config == config


def test_it_is_read_where_nvidias_modules_do_not_exist(tmp_path: Path, song: dict[str, Tensor]) -> None:
    path = write(tmp_path / "a.pkl", snapshot("SongUNet", song))
    code = (
        "import sys\n"
        "from raydistill.models.edm_pickle import load_edm_pickle\n"
        f"config, weights = load_edm_pickle({str(path)!r})\n"
        "assert not {'torch_utils', 'dnnlib', 'training'} & set(sys.modules)\n"
        "print(len(weights), float(sum(w.double().sum() for w in weights.values())))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    count, total = done.stdout.split()
    assert int(count) == len(song)
    assert float(total) == pytest.approx(float(sum(w.double().sum() for w in song.values())), rel=1e-9)


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function: Any, *args: Any):
        self._call = function, args

    def __reduce__(self) -> Any:
        return self._call


def inside_a_tensor(marker: Path) -> Any:
    buffer = io.BytesIO()
    torch.save(Call(os.system, f"touch {marker}"), buffer, _use_new_zipfile_serialization=False)
    return Call(torch.storage._load_from_bytes, buffer.getvalue())


def inside_a_zip(marker: Path) -> Any:
    buffer = io.BytesIO()
    torch.save(Call(os.system, f"touch {marker}"), buffer)
    return Call(torch.storage._load_from_bytes, buffer.getvalue())


@pytest.mark.parametrize(
    ("evil", "name"),
    [
        (lambda marker: Call(os.system, f"touch {marker}"), "posix.system"),
        (lambda marker: Call(builtins.eval, f"open({str(marker)!r}, 'w')"), "builtins.eval"),
        (lambda marker: Call(builtins.exec, f"open({str(marker)!r}, 'w')"), "builtins.exec"),
        (lambda marker: Call(subprocess.Popen, ["touch", str(marker)]), "subprocess.Popen"),
        (lambda marker: Call(getattr, collections.OrderedDict, "fromkeys"), "builtins.getattr"),
        (lambda marker: Call(torch.load, str(marker)), "torch.serialization.load"),
        (inside_a_tensor, "posix.system"),
        (inside_a_zip, "posix.system"),
    ],
)
@pytest.mark.parametrize("where", ["top", "beside", "state"])
def test_a_file_that_wants_to_call_something_is_refused_and_nothing_happens(
    tmp_path: Path, song: dict[str, Tensor], evil: Callable[[Path], Any], name: str, where: str
) -> None:
    marker = tmp_path / "it-ran"
    if where == "top":
        content = pickle.dumps(evil(marker))
    elif where == "beside":
        content = pickle.dumps({"augment_pipe": evil(marker)})
    else:
        content = snapshot("SongUNet", song, more=lambda outer: vars(outer).update(hook=evil(marker)))
    message = refusal(write(tmp_path / "a.pkl", content))
    assert f"global {name}," in message
    assert "refused: nothing is executed from a checkpoint" in message
    assert not marker.exists()


def test_the_evil_files_would_run_in_an_ordinary_unpickler(tmp_path: Path) -> None:
    marker = tmp_path / "it-ran"
    pickle.loads(pickle.dumps(Call(os.system, f"touch {marker}")))
    assert marker.exists()


@pytest.mark.parametrize(
    "name", ["collections OrderedDict", "dnnlib.util EasyDict", "torch._utils _rebuild_parameter"]
)
@pytest.mark.parametrize(
    "state", [b"}\x8c\x05extraK\x01s", b"N}\x8c\x05extraK\x01s\x86"], ids=["dict", "slots"]
)
def test_a_file_cannot_change_the_stand_ins(tmp_path: Path, name: str, state: bytes) -> None:
    module, attribute = name.split()
    content = b"\x80\x04c" + module.encode() + b"\n" + attribute.encode() + b"\n" + state + b"b."
    refusal(write(tmp_path / "a.pkl", content))
    assert not hasattr(edm_pickle._GLOBALS[module, attribute], "extra")


def test_a_numpy_object_is_refused(tmp_path: Path) -> None:
    message = refusal(write(tmp_path / "a.pkl", pickle.dumps({"ema": np.dtype("O")})))
    assert "numpy dtype 'O8' is not numeric" in message


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path: Path, song: dict[str, Tensor]) -> None:
    content = snapshot("SongUNet", song)
    for length in [*range(0, 400, 7), len(content) // 2, len(content) - 1]:
        assert "truncated or no pickle" in refusal(write(tmp_path / "a.pkl", content[:length]))


def test_a_memo_index_cannot_fill_the_memory(tmp_path: Path) -> None:
    content = b"\x80\x02}" + pickle.LONG_BINPUT + (2**31).to_bytes(4, "little") + b"."
    assert "memo index 2147483648 in a file of 9 bytes" in refusal(write(tmp_path / "a.pkl", content))


def test_a_damaged_file_is_read_or_refused(tmp_path: Path, song: dict[str, Tensor]) -> None:
    content = snapshot("SongUNet", song)
    chance = random.Random(9)
    refusals = []
    for _ in range(60):
        damaged = bytearray(content)
        for _ in range(3):
            damaged[chance.randrange(6000)] = chance.randrange(256)
        path = write(tmp_path / "a.pkl", bytes(damaged))
        try:
            load_edm_pickle(path)
        except ConfigError as error:
            refusals.append(str(error))
    assert len(refusals) > 20
    assert not any("\n" in message for message in refusals)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"precond": "VEPrecond"}, "its network is a VEPrecond; only EDM's own parametrisation"),
        (
            {"settings": {"embedding_type": "fourier"}},
            "embedding_type='fourier'; only 'positional' can be loaded",
        ),
        (
            {"settings": {"encoder_type": "residual"}},
            "encoder_type='residual'; only 'standard' can be loaded",
        ),
        (
            {"settings": {"resample_filter": [1, 3, 3, 1]}},
            "resample_filter=[1, 3, 3, 1]; only [1, 1] can be loaded",
        ),
        ({"settings": {"out_channels": 6}}, "puts out another number of channels"),
        ({"settings": {"novelty": 1}}, "unknown setting 'novelty'"),
        ({"settings": {"model_channels": 24}}, "weight "),
        ({"settings": {"model_channels": "a"}}, "'a' stands where a whole number belongs"),
        ({"settings": {"num_blocks": 10**9}}, "blocks_per_level=1000000000 must be from 1 to 64"),
        ({"settings": {"num_blocks": 0}}, "blocks_per_level=0 must be from 1 to 64"),
        ({"more": lambda outer: vars(outer).pop("sigma_data")}, "has no sigma_data"),
        ({"more": lambda outer: vars(outer.model).update(_class_name="DiT")}, "model_type is DiT"),
        (
            {"more": lambda outer: outer.model._modules.pop("map_layer1")},
            "weight embed1.bias has shape missing",
        ),
        ({"more": lambda outer: vars(outer).pop("_modules")}, "is no EDM network snapshot (KeyError"),
        ({"more": lambda outer: outer.model._modules.update(self=outer.model)}, "stands in two places"),
    ],
)
def test_a_network_that_is_not_ours_is_refused(
    tmp_path: Path, song: dict[str, Tensor], change: dict[str, Any], message: str
) -> None:
    assert message in refusal(write(tmp_path / "a.pkl", snapshot("SongUNet", song, **change)))


@pytest.mark.parametrize(
    ("offset", "size", "stride", "complaint"),
    [
        (2, (4,), (1,), "out of bounds"),
        (0, (64,), (1,), "a weight of 64 numbers has 4 in the file"),
        (0, (10**5, 10**5), (0, 0), "a weight of 10000000000 numbers has 4 in the file"),
    ],
)
def test_a_weight_that_reaches_beyond_its_numbers_is_refused(
    tmp_path: Path, song: dict[str, Tensor], offset: int, size: Any, stride: Any, complaint: str
) -> None:
    class Beyond(nn.Parameter):
        def __reduce_ex__(self, protocol: Any) -> Any:
            return torch._utils._rebuild_tensor_v2, (
                torch.zeros(4)._typed_storage(),
                offset,
                size,
                stride,
                False,
                None,
            )

    def shorten(outer: Any) -> None:
        bias = outer.model.map_layer0.bias
        call = Call(torch._utils._rebuild_parameter, Beyond(bias.data), False, collections.OrderedDict())
        outer.model.map_layer0._parameters["bias"] = call

    assert complaint in refusal(write(tmp_path / "a.pkl", snapshot("SongUNet", song, more=shorten)))


def test_a_module_that_stands_in_two_places_is_refused(tmp_path: Path, song: dict[str, Tensor]) -> None:
    def double(outer: Any) -> None:
        outer.model._modules["again"] = outer.model._modules["map_layer0"]

    assert "stands in two places" in refusal(
        write(tmp_path / "a.pkl", snapshot("SongUNet", song, more=double))
    )


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", pickle.dumps([1, 2]), pickle.dumps({"ema": 3})])
def test_what_is_no_snapshot_is_refused(tmp_path: Path, content: bytes) -> None:
    refusal(write(tmp_path / "a.pkl", content))


def test_a_missing_file_is_an_error_of_one_line(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "absent.pkl")
