"""NVIDIA's EDM checkpoints (network-snapshot-*.pkl of arXiv:2206.00364), read without executing anything.

Such a file is a pickle that carries its own source code: unpickled in the usual way it runs that code. Here every
global that the pickle names is replaced by a stand-in that only keeps what it is given, and any other is refused.
The network's shape follows from the arguments that the file recorded, the weights are renamed to ours.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from raydistill.diffusion.schedules import EDMSchedule
from raydistill.errors import ConfigError
from raydistill.models.edm_net import EDMDenoiser, EDMNetConfig


def load_edm_pickle(path: str | Path) -> tuple[EDMNetConfig, dict[str, Tensor]]:
    """Configuration and weights (fp32, named as in `EDMNet`) of the network that the file calls "ema".

    Raises ConfigError, naming teacher.path, for a file that can't be read, one that asks for a global which such
    files don't need, and a network that is not EDM's preconditioning of a DDPM++ or ADM U-Net.
    """
    where = f"teacher.path={str(path)!r}"
    content = _unpickle(Path(path), where)
    try:
        return _read_network(content)
    except _UnsupportedError as error:
        raise ConfigError(f"{where}: {_line(error)}") from None
    except ConfigError as error:
        raise ConfigError(f"{where}: its network is not supported: {_line(error)}") from None
    except Exception as error:
        # whoever wrote the file chose every value in it, so anything may be missing or of another type
        raise ConfigError(
            f"{where} is no EDM network snapshot ({type(error).__name__}: {_line(error)})"
        ) from None


def own_name(name: str) -> str:
    """`EDMNet`'s name of a weight of NVIDIA's SongUNet or DhariwalUNet.

    "enc.32x32_block0.norm0.weight" -> "encoder.32x32_block0.norm0.weight".
    """
    name = re.sub(r"^dec\.\d+x\d+_aux_(norm|conv)\.", r"out_\1.", name)
    for theirs, ours in (
        ("enc.", "encoder."),
        ("dec.", "decoder."),
        ("map_layer", "embed"),
        ("map_", "embed_"),
    ):
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


class _UnsupportedError(Exception):
    """The file was understood, but `EDMNet` is another network."""


class _ForbiddenGlobalError(Exception):
    """The pickle names a global that is not in the table."""


class _StandIn:
    """What the pickle gets instead of a class or function of its own.

    All stand-ins are classes with a `__setstate__`: without one, a pickle could set attributes of whatever it got.
    """

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError(f"{type(self).__name__.strip('_')} takes no state")


class _Mapping(dict[Any, Any], _StandIn):
    pass


class _Persistent(_StandIn):
    """An instance of a class whose source travels in the file; the source is dropped unread."""

    def __init__(self, meta: dict[str, Any]):
        self.class_name: str = meta["class_name"]
        self.state: dict[str, Any] = meta["state"]


class _ModuleDict(_StandIn):
    state: dict[str, Any]

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Storage(_StandIn):
    """Numbers of a tensor, saved by torch.save inside the pickle."""

    def __init__(self, data: bytes):
        self.typed = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        if not isinstance(self.typed, torch.storage.TypedStorage):
            raise pickle.UnpicklingError(f"a {type(self.typed).__name__} stands where a storage belongs")


class _Tensor(_StandIn):
    """A view of a storage; `read` copies it."""

    def __init__(
        self, storage: _Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
    ):
        self._layout = storage, offset, size, stride

    def read(self) -> Tensor:
        storage, offset, size, stride = self._layout
        if not storage.typed.dtype.is_floating_point:
            raise _UnsupportedError(f"a weight holds {storage.typed.dtype}, not real numbers")
        flat = torch.empty(0, dtype=storage.typed.dtype).set_(storage.typed)
        if math.prod(size) > flat.numel():
            raise _UnsupportedError(f"a weight of {math.prod(size)} numbers has {flat.numel()} in the file")
        # as_strided refuses what reaches beyond the storage
        return torch.as_strided(flat, size, stride, offset).to(torch.float32, copy=True).contiguous()


class _Parameter(_StandIn):
    def __init__(self, data: _Tensor, *_: Any):
        self.data = data


class _NumpyDtype(_StandIn):
    def __init__(self, code: str, *_: Any):
        if not re.fullmatch(r"[fiu][1248]|b1", code):
            raise pickle.UnpicklingError(f"numpy dtype {code!r} is not numeric")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _NumpyScalar(_StandIn):
    def __new__(cls, dtype: _NumpyDtype, data: bytes) -> Any:
        return np.frombuffer(data, dtype.dtype, count=1)[0].item()


_GLOBALS: dict[tuple[str, str], type] = {
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _Persistent,
    ("dnnlib.util", "EasyDict"): _Mapping,
    ("collections", "OrderedDict"): _Mapping,
    ("torch.nn.modules.container", "ModuleDict"): _ModuleDict,
    ("torch._utils", "_rebuild_parameter"): _Parameter,
    ("torch._utils", "_rebuild_tensor_v2"): _Tensor,
    ("torch.storage", "_load_from_bytes"): _Storage,
    # square roots among the settings are numpy numbers; numpy 2 moved the function
    ("numpy", "dtype"): _NumpyDtype,
    ("numpy.core.multiarray", "scalar"): _NumpyScalar,
    ("numpy._core.multiarray", "scalar"): _NumpyScalar,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        try:
            return _GLOBALS[module_name, global_name]
        except KeyError:
            raise _ForbiddenGlobalError(f"{module_name}.{global_name}") from None


def _check_memo(file: BinaryIO) -> None:
    """Refuse an index that a few bytes of the file would make the unpickler reserve gigabytes for."""
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT"):
            assert argument is not None
            if argument > size:
                raise pickle.UnpicklingError(f"memo index {argument} in a file of {size} bytes")
    file.seek(0)


def _unpickle(path: Path, where: str) -> Any:
    try:
        with path.open("rb") as file:
            _check_memo(file)
            return _Unpickler(file).load()
    except OSError as error:
        raise ConfigError(f"{where} can't be read: {error.strerror or error}") from None
    except Exception as error:
        # torch's own restricted reader says so in its text only
        nested = re.search(r"GLOBAL ([\w.]+)", str(error))
        name = str(error) if isinstance(error, _ForbiddenGlobalError) else nested and nested[1]
        if name:
            raise ConfigError(
                f"{where} asks for the global {_line(name)}, which no EDM network snapshot needs; refused: "
                "nothing is executed from a checkpoint"
            ) from None
        raise ConfigError(
            f"{where} is truncated or no pickle ({type(error).__name__}: {_line(error)})"
        ) from None


# Settings of the U-Nets: NVIDIA's defaults where a snapshot recorded none, and those that have one value in EDMNet.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "SongUNet": {
        "augment_dim": 0, "model_channels": 128, "channel_mult": [1, 2, 2, 2], "num_blocks": 4,
        "attn_resolutions": [16], "dropout": 0.1,
    },
    "DhariwalUNet": {
        "augment_dim": 0, "model_channels": 192, "channel_mult": [1, 2, 3, 4], "num_blocks": 3,
        "attn_resolutions": [32, 16, 8], "dropout": 0.1,
    },
}  # fmt: skip
_FIXED: dict[str, dict[str, Any]] = {
    "SongUNet": {
        "embedding_type": "positional", "encoder_type": "standard", "decoder_type": "standard",
        "channel_mult_noise": 1, "channel_mult_emb": 4, "resample_filter": [1, 1],
    },
    "DhariwalUNet": {"channel_mult_emb": 4},
}  # fmt: skip
# of training alone
_IGNORED = ("label_dropout",)


def _read_network(content: Any) -> tuple[EDMNetConfig, dict[str, Tensor]]:
    if not isinstance(content, dict) or not isinstance(content.get("ema"), _Persistent):
        raise _UnsupportedError('the file holds no network called "ema"')
    outer = content["ema"]
    if outer.class_name != "EDMPrecond":
        raise _UnsupportedError(
            f"its network is a {outer.class_name}; only EDM's own parametrisation (EDMPrecond) can be loaded, not VP, "
            "VE or iDDPM ones"
        )
    model = outer.state["_modules"]["model"]
    if model.class_name not in _FIXED:
        raise _UnsupportedError(f"its model_type is {model.class_name}, not one of {', '.join(_FIXED)}")
    config = _config(outer.state, model.class_name, model.state["_init_kwargs"])
    weights = {own_name(name): tensor.read() for name, tensor in _parameters(model, "").items()}
    EDMDenoiser.from_weights(config, weights)  # checks names and shapes
    return config, weights


def _config(outer: Mapping[str, Any], class_name: str, settings: Mapping[str, Any]) -> EDMNetConfig:
    settings = dict(settings)
    size, channels = settings.pop("img_resolution"), settings.pop("in_channels")
    if settings.pop("out_channels") != channels:
        raise _UnsupportedError("its network puts out another number of channels than it takes")
    for name, only in _FIXED[class_name].items():
        value = settings.pop(name, only)
        if (list(value) if isinstance(value, (list, tuple)) else value) != only:
            raise _UnsupportedError(
                f"its {class_name} has {name}={reprlib.repr(value)}; only {only!r} can be loaded"
            )
    label_dim = settings.pop("label_dim", 0)
    values = {name: settings.pop(name, default) for name, default in _DEFAULTS[class_name].items()}
    unknown = sorted(settings.keys() - set(_IGNORED))
    if unknown:
        raise _UnsupportedError(f"its {class_name} has the unknown setting {unknown[0]!r}")
    for name in ("sigma_data", "sigma_min", "sigma_max"):
        if not isinstance(outer.get(name), (int, float)):
            raise _UnsupportedError(f"its network has no {name}, which EDM's parametrisation needs")
    sampled = EDMSchedule()  # networks accept levels from 0 to infinity, EDM samples between these two
    return EDMNetConfig(
        family="ddpmpp" if class_name == "SongUNet" else "adm",
        image_size=_whole(size),
        channels=_whole(channels),
        label_dim=_whole(label_dim),
        augment_dim=_whole(values["augment_dim"]),
        base_channels=_whole(values["model_channels"]),
        channel_mult=tuple(_whole(mult) for mult in values["channel_mult"]),
        blocks_per_level=_whole(values["num_blocks"]),
        attention_sizes=tuple(_whole(edge) for edge in values["attn_resolutions"]),
        dropout=float(values["dropout"]),
        sigma_data=float(outer["sigma_data"]),
        sigma_min=max(float(outer["sigma_min"]), sampled.sigma_min),
        sigma_max=min(float(outer["sigma_max"]), sampled.sigma_max),
    )


def _parameters(
    module: _Persistent | _ModuleDict, prefix: str, seen: set[int] | None = None
) -> dict[str, _Tensor]:
    """Dotted name to parameter, through all submodules; buffers (box filters) are not kept.

    No network holds a module twice; a file that does could make the walk endless.
    """
    seen = set() if seen is None else seen
    if id(module) in seen:
        raise _UnsupportedError(f"its module {prefix or 'model'} stands in two places")
    seen.add(id(module))
    found = {
        f"{prefix}{name}": parameter.data
        for name, parameter in module.state["_parameters"].items()
        if parameter is not None
    }
    for name, child in module.state["_modules"].items():
        if child is not None:
            found |= _parameters(child, f"{prefix}{name}.", seen)
    return found


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise _UnsupportedError(
            f"{reprlib.repr(value)} stands where a whole number belongs among its settings"
        )
    return value


def _line(error: Exception | str) -> str:
    """Its message on one line of bounded length, as the file may have chosen the words."""
    text = str(error).strip().partition("\n")[0]
    return "".join(c if c.isprintable() else "?" for c in text[:200])
