"""Lightning's metrics import torchvision where it is installed, so it must be one that can be imported."""

import tests.networks.torchvision_models  # noqa: F401
