"""Latency of zoo networks, dense and block-punched, on the engine and on its rivals, in turns in one run.

    python benchmarks/latency.py --threads 4 --networks resnet50,resnet18_cifar

Random weights and one-shot magnitude masks (accuracy is another benchmark). Rivals run the unpruned network: they gain
nothing from zeros. Medians and quartiles of interleaved rounds, batch 1, fp32.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

import espalier as es
from espalier.runtime import rival
from espalier.train import build, example_shape

RESULTS = Path(__file__).parent / "results" / "latency.json"


def punched(module: nn.Module, example: torch.Tensor, density: float) -> nn.Module:
    """The network with every layer that can take it cut to `density` in blocks of 8 filters x 4 channels."""
    run = es.start(module, es.Plan.uniform("block_punched", density), "magnitude", example)
    run.finish()
    return module


def measure(name: str, threads: int, densities: list[float], rivals: list[str], rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    example = torch.randn(1, *example_shape(name))
    dense = build(name).eval()
    programs = {"espalier 1.0": es.compile(dense, example, threads=threads)}
    for density in densities:
        torch.manual_seed(0)
        cut = punched(build(name).eval(), example, density)
        programs[f"espalier {density}"] = es.compile(cut, example, threads=threads)
    candidates: dict[str, Any] = {key: (lambda p=program: p(example)) for key, program in programs.items()}
    candidates |= {key: rival(key)(dense, example, threads) for key in rivals}
    timings = es.bench(candidates, rounds=rounds, seconds=0.03)
    fastest = min(timings[key].median_ms for key in rivals)
    print(f"{name}, {threads} threads")
    for key, timing in timings.items():
        spread = f"{timing.low_ms:.3f} .. {timing.high_ms:.3f}"
        speed = fastest / timing.median_ms
        print(f"  {key:14s} {timing.median_ms:9.3f} ms  ({spread})  {speed:5.2f}x of the fastest rival")
    return {
        "network": name,
        "threads": threads,
        "timings": {key: dataclasses.asdict(timing) for key, timing in timings.items()},
        "of_fastest_rival": {key: fastest / timings[key].median_ms for key in programs},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default="resnet18_cifar,resnet50,mobilenetv2")
    parser.add_argument("--threads", default="1,4")
    parser.add_argument("--densities", default="0.2,0.1")
    parser.add_argument("--rivals", default="torch,onnxruntime,openvino")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    densities = [float(density) for density in arguments.densities.split(",")]
    rows = [
        measure(name, int(threads), densities, arguments.rivals.split(","), arguments.rounds)
        for name in arguments.networks.split(",")
        for threads in arguments.threads.split(",")
    ]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"rows": rows, "machine": es.machine()}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
