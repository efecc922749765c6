"""torchvision.models, also where torchvision's own operators do not fit a PyTorch from another index.

Its modules ask for two of those operators while they are imported; where they are missing they are stated here.
"""

import sys

import torch

try:
    from torchvision import models
except RuntimeError:  # operator torchvision::nms does not exist
    for _name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[_name]
    _LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
    for _name in ("nms", "qnms"):
        _LIBRARY.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    from torchvision import models

__all__ = ["models"]
