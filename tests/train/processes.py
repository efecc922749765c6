"""Python in processes of its own, which start others: what they say is told when they fail."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def ran(arguments: list[str], folder: Path, timeout: float = 240) -> None:
    """Run Python with these arguments, one thread each; processes meet on this machine's own address."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, f"status {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
