"""What a method costs: a training step with each against a dense one. ResNet-18 for CIFAR, batch 128.

    python benchmarks/overhead.py [--device cuda] [--batch 128] [--steps 20] [--threads 4]

Steps of all methods and of the dense network take turns, so that whatever else the machine does falls on all alike.
What a method does at milestones only is timed apart and spread over a run of `--run-steps`. The overhead is the median
of a method's step and its share of the milestones, over the median of the dense one's.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import espalier as es
from espalier.methods import METHODS, Run
from espalier.methods.base import Progress
from espalier.train import build, seed_everything

RESULTS = Path(__file__).parent / "results" / "overhead.json"
LIMIT = 0.10
SETTINGS: dict[str, dict[str, Any]] = {"magnitude": {"ramp": "cubic", "score": "taylor", "regrow": True, "until": 1.0}}
DENSITY = 0.2


class Lane:
    """A network in training, with a method or without."""

    def __init__(self, name: str, model: nn.Module, run: Run | None, device: torch.device) -> None:
        self.name, self.model, self.run, self.device = name, model.to(device), run, device
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
        self.seconds: list[float] = []

    def step(self, x: torch.Tensor, y: torch.Tensor) -> float:
        """One training step; its seconds."""
        self._wait()
        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(x), y)
        if self.run is not None:
            loss = loss + self.run.penalty()
        loss.backward()
        self.optimizer.step()
        if self.run is not None:
            self.run.step()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def measure(scheme: str, device: torch.device, batch: int, steps: int, run_steps: int) -> list[dict[str, Any]]:
    """The rows of the table for one scheme."""
    seed_everything(0)
    base, example = build("resnet18_cifar"), torch.zeros(1, 3, 32, 32)
    x, y = torch.randn(batch, 3, 32, 32, device=device), torch.randint(0, 10, (batch,), device=device)
    lanes = [Lane("dense", copy.deepcopy(base), None, device)]
    for name, made in METHODS.items():
        model = copy.deepcopy(base)
        plan = es.uniform(es.capture(model, example), DENSITY, scheme)
        run = es.start(model, plan, made(**SETTINGS.get(name, {})), example, steps=run_steps)
        lanes.append(Lane(name, model, run, device))
    rows = []
    for k in range(steps + 1):
        for lane in lanes[k % len(lanes) :] + lanes[: k % len(lanes)]:
            seconds = lane.step(x, y)
            if k:  # the first warms up
                lane.seconds.append(seconds)
            print(f"{scheme} step {k}/{steps} {lane.name} {seconds * 1e3:.1f} ms", flush=True)
    dense = statistics.median(lanes[0].seconds)
    for lane in lanes:
        quartiles = statistics.quantiles(lane.seconds, n=4) if len(lane.seconds) > 1 else lane.seconds * 3
        milestone_ms, count = milestone(lane, run_steps)
        step = statistics.median(lane.seconds)
        spread = milestone_ms / 1e3 * count / run_steps
        rows.append(
            {
                "scheme": scheme,
                "method": lane.name,
                "median_ms": step * 1e3,
                "quartiles_ms": [quartiles[0] * 1e3, quartiles[-1] * 1e3],
                "milestone_ms": milestone_ms,
                "milestones": count,
                "overhead": (step + spread) / dense - 1,
            }
        )
        print(f"{scheme:15s} {lane.name:22s} {step * 1e3:9.1f} ms  overhead {100 * rows[-1]['overhead']:+6.2f} %")
    return rows


def milestone(lane: Lane, run_steps: int) -> tuple[float, int]:
    """What a step of the method costs at a milestone, in ms (forward and backward left out), and how many there are."""
    if lane.run is None:
        return 0.0, 0
    settings = vars(lane.run.method)
    count = max((int(settings[field]) for field in ("updates", "milestones") if field in settings), default=0)
    timings = []
    for k in range(1, 4):
        lane.run._progress = Progress(k * max(1, run_steps // count) - 1, run_steps)
        lane._wait()
        start = time.perf_counter()
        lane.run.step()
        lane._wait()
        timings.append(time.perf_counter() - start)
    return statistics.median(timings) * 1e3, count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--run-steps", type=int, default=10_000)
    parser.add_argument("--threads", type=int, default=0, help="of PyTorch; by default as many as it uses")
    parser.add_argument("--schemes", default="filter+column,block_punched,weight")
    parser.add_argument("--out", default=str(RESULTS))
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device, rows = torch.device(arguments.device), []
    for scheme in arguments.schemes.split(","):
        rows += measure(scheme, device, arguments.batch, arguments.steps, arguments.run_steps)
    report = {
        "claim": "a method costs at most 10 % of a dense training step (ResNet-18 for CIFAR, batch 128)",
        "rows": rows,
        "worst": max(row["overhead"] for row in rows),
        "limit": LIMIT,
        "batch": arguments.batch,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "machine": es.machine(),
        "threads": torch.get_num_threads(),
    }
    Path(arguments.out).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
