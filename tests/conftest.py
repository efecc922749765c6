"""Lightning's metrics import torchvision where it is installed, so it must be one that can be imported.

Here, for all tests: pytest-xdist's first process imports what a warning in another process names.
"""

import tests.networks.torchvision_models  # noqa: F401
