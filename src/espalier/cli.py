"""The command line: espalier compress | info | run | bench. Every option can also come from a file by --config."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from espalier.cli_mapping import MAPPING_COMMANDS
from espalier.compress import compress
from espalier.errors import DataError, EspalierError
from espalier.graph import capture, shrink
from espalier.mapping import uniform
from espalier.methods import get, start
from espalier.report import BenchReport, size
from espalier.runtime import bench, compile, layers, machine, peak_gflops, rival
from espalier.store import info, load
from espalier.train import DATA, Recipe, build, example_shape

INTERRUPTED = 130
FAILED = 2


def compress_command(
    model: str,
    data: str = "",
    density: float | None = None,
    plan: str | None = None,
    speedup: float | None = None,
    latency_ms: float | None = None,
    size_mb: float | None = None,
    macs: float | None = None,
    nonzero: float | None = None,
    allocation: Literal["rule", "sensitivity", "method"] | None = None,
    scheme: str | None = None,
    method: str = "admm",
    scheme_options: dict[str, Any] | None = None,
    method_options: dict[str, Any] | None = None,
    max_drop: float = 1.0,
    epochs: int = 30,
    dense_epochs: int | None = None,
    weights: str | None = None,
    data_root: str | None = None,
    out: str = "out",
    seed: int = 0,
    threads: int | None = None,
    resume: bool = False,
    distill: float | None = None,
    precision: str | None = None,
    devices: int = 1,
    num_nodes: int = 1,
    strategy: Literal["auto", "ddp", "fsdp"] = "auto",
    accelerator: str = "auto",
    recipe: Recipe | None = None,
) -> None:
    """Train a network into a smaller, faster one and measure it.

    Args:
        model: a name of the zoo, or package.module:factory
        data: digits, mnist, cifar10, cifar100, folder:PATH, hub:NAME or synthetic:CxHxW:CLASSES
        density: kept share of conv and linear weights, 0..1
        plan: a plan file (TOML) instead of a density
        speedup: or how many times faster than the dense network; schemes and densities are then found by rule
        latency_ms: or milliseconds of one sample, at most
        size_mb: or 10^6 bytes of stored weights, at most
        macs: or useful multiply-accumulates, at most; below 1 a share of the dense ones
        nonzero: or how many conv and linear weights are kept
        allocation: how density or nonzero are split over the layers; default: rule
        scheme: what may die together; several joined by +; default: filter+column. Given, size_mb or macs is split
            over the layers by sensitivity, all in this scheme
        method: how the weights get there
        scheme_options: such as {"m": 4, "n": 4}
        method_options: such as {"every": 3}
        max_drop: points of accuracy that may be lost
        epochs: of shaping and retraining together
        dense_epochs: of training the dense network first; default: as many as epochs, none when weights are given
        weights: safetensors file of the dense network
        data_root: the folder of the data set's files
        out: the folder for model.esp, plan.toml and report.json
        seed: of everything random
        threads: of the measured latencies
        resume: go on with a run that was stopped
        distill: share of the loss that the dense network teaches, 0..1
        precision: of training, such as bf16-mixed
        devices: processes on each node that train together
        num_nodes: machines that train together; start the same command on each, as torchrun or SLURM does
        strategy: ddp, or fsdp to share out gradients and optimizer states
        accelerator: auto, cpu or cuda
        recipe: how to train: batch_size, lr, momentum, weight_decay and so on
    """
    options = {k: v for k, v in locals().items() if k not in ("model", "data")}
    if not data:
        raise DataError(f"say which data to train on: --data {', '.join(DATA)}")
    compress(model, data, **options)


def info_command(file: str) -> None:
    """Say what an .esp file holds.

    Args:
        file: an .esp file
    """
    facts = info(file)
    console = Console()
    table = Table(title=f"{file}: {facts.size_bytes:,} bytes, version {facts.version}")
    for heading in ("tensor", "shape", "dtype", "density", "coding", "bytes"):
        table.add_column(heading, justify="right" if heading in ("density", "bytes") else "left")
    for row in facts.tensors:
        table.add_row(
            row.name, str(list(row.shape)), row.dtype, f"{row.density:.4f}", row.coding, f"{row.stored_bytes:,}"
        )
    console.print(table)
    program = load(file)
    console.print(f"sizes: {asdict(size(program.graph))}")
    for name in program.fallbacks:
        console.print(f"runs through PyTorch: {name}")


def run_command(file: str, input: str = "", output: str = "", threads: int | None = None) -> None:
    """Run an .esp file on arrays.

    Args:
        file: an .esp file
        input: a .npy file; for a network with several inputs as many, comma-separated
        output: the .npy file to write (.npz when the network has several outputs)
        threads: how many threads the engine may use
    """
    if not input or not output:
        raise DataError("run needs --input x.npy and --output y.npy")
    program = load(file, threads=threads)
    result = program(*[_read_array(path) for path in input.split(",")])
    arrays = _flat(result)
    try:
        with open(output, "wb") as stream:
            if len(arrays) == 1:
                np.save(stream, arrays[0])
            else:
                np.savez(stream, *arrays)  # arr_0, arr_1, ...
    except OSError as error:
        raise DataError(f"cannot write {output}: {error.strerror}") from error
    Console().print(f"{output}: {', '.join(str(list(array.shape)) for array in arrays)}", highlight=False)


def bench_command(
    file_or_model: str,
    threads: int = 1,
    against: str = "",
    density: float | None = None,
    scheme: str = "block_punched",
    batch: int = 1,
    rounds: int = 30,
    tune: bool = False,
    json: str | None = None,
    picture: str | None = None,
) -> None:
    """Time a network on the engine, beside other engines in the same run, and every step of it.

    Args:
        file_or_model: an .esp file, a name of the zoo, or package.module:factory
        threads: threads for every engine
        against: other engines, comma-separated: torch, torch_compile, onnxruntime, openvino
        density: cut a model to this density first, by magnitude and without training, to see what it would gain
        scheme: the scheme to cut it by
        batch: samples at once
        rounds: measurements of each engine
        tune: measure on this machine which format runs each layer fastest, instead of estimating
        json: a file for all figures
        picture: a .svg or .html file for bars of engines and steps
    """
    names = [name.strip() for name in against.split(",") if name.strip()]
    rivals = {name: rival(name) for name in names}
    module, example = _open(file_or_model, batch)
    dense = module
    if density is not None:
        module = _cut(module, example, density, scheme)
    torch.set_num_threads(threads)
    program = compile(module, example, threads=threads, tune=tune)
    candidates: dict[str, Callable[[], object]] = {"espalier": lambda: program(example)}
    if density is not None:
        whole = compile(dense, example, threads=threads)
        candidates["espalier, uncut"] = lambda: whole(example)
    for name, make in rivals.items():
        candidates[name] = make(dense.eval(), example, threads)
    timings = bench(candidates, rounds=rounds)
    facts = machine()
    report = BenchReport(
        f"{file_or_model}, batch {batch}, {threads} threads, {facts['cpu']}",
        timings,
        layers(program, example),
        peak_gflops(threads),
        {**facts, "threads": threads, "batch": batch, "density": density, "scheme": scheme},
        program.fallbacks,
    )
    report.show(Console())
    if json is not None:
        report.write_json(json)
    if picture is not None:
        report.write_picture(picture)


COMMANDS: dict[str, Any] = {
    "compress": compress_command,
    "info": info_command,
    "run": run_command,
    "bench": bench_command,
    **MAPPING_COMMANDS,
}


def main(arguments: list[str] | None = None) -> int:
    """Entry point of ``espalier``; returns the exit status.

    0: done. 2: an error, told on stderr. 130: interrupted by Ctrl-C.
    """
    console = Console(stderr=True)
    try:
        given = sys.argv[1:] if arguments is None else arguments
        auto_cli(COMMANDS, args=[_underscores(argument) for argument in given], prog="espalier")
    except EspalierError as error:
        console.print(f"espalier: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return FAILED
    except KeyboardInterrupt:
        console.print("espalier: interrupted. What was finished is kept; go on with --resume")
        return INTERRUPTED
    return 0


def _underscores(argument: str) -> str:
    """Options may be written with dashes or underscores (``--max-drop`` is ``--max_drop``), flags without "true"."""
    if argument == "--resume":
        return "--resume=true"
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def _read_array(path: str) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: cannot be read as a .npy array: {error}") from error


def _flat(result: Any) -> list[np.ndarray]:
    if isinstance(result, dict):
        return [array for value in result.values() for array in _flat(value)]
    if isinstance(result, (list, tuple)):
        return [array for value in result for array in _flat(value)]
    return [np.asarray(result)]


def _open(name: str, batch: int) -> tuple[nn.Module, Tensor]:
    """The module of a file or of the zoo, and an example input of `batch` samples."""
    if Path(name).suffix == ".esp":
        program = load(name)
        shape = program.graph.values[program.graph.inputs[0]].shape
        return program.to_module(), torch.randn(batch, *shape[1:])
    return build(name).eval(), torch.randn(batch, *example_shape(name))


def _cut(module: nn.Module, example: Tensor, density: float, scheme: str) -> nn.Module:
    """A copy cut to `density` by magnitude, without training: what the speed would be."""
    cut = copy.deepcopy(module)
    run = start(cut, uniform(capture(cut, example), density, scheme), get("magnitude"), example)
    run.finish()
    return shrink(cut, example)


if __name__ == "__main__":
    sys.exit(main())
