"""Lets a torchvision built for another torch be imported.

torchvision registers fake kernels for two of its compiled operators while it is imported. Where its binary does not
fit the installed torch (a CPU torch beside PyPI's CUDA torchvision), the operators are missing and the import fails
with `operator torchvision::nms does not exist`, which takes diffusers, transformers and clean-fid down with it. None
of them calls these operators here, so declaring their schemas is enough. With a matching pair nothing is done.
"""

import sys
from typing import Any

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_libraries: list[Any] = []


def ensure_torchvision_importable() -> bool:
    """Import torchvision, declaring the missing operator schemas if it fails for want of them.

    Returns True if schemas were declared, False if nothing had to be done (a matching pair, or no torchvision).
    """
    try:
        import torchvision
    except ModuleNotFoundError:
        return False
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
    else:
        return False
    import torch

    for name in [
        module for module in sys.modules if module == "torchvision" or module.startswith("torchvision.")
    ]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        library.define(schema)
    _libraries.append(library)  # a collected Library takes its operators away
    import torchvision  # noqa: F401

    return True
