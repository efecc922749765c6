"""The command line: espalier compress | info | run | bench, and those of cli_mapping.

Every option can also come from a file by --config.
"""

from __future__ import annotations

import copy
import io
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jsonargparse import auto_cli
from rich.table import Table
from torch import Tensor, nn

from espalier import __version__
from espalier.cli_mapping import MAPPING_COMMANDS
from espalier.cli_options import Parser, at_least_one, shortened, written
from espalier.compress import compress
from espalier.errors import DataError, EspalierError
from espalier.graph import Value, capture, shrink, to_module
from espalier.mapping import uniform
from espalier.methods import get, start
from espalier.report import BenchReport, screen, size, tell
from espalier.runtime import bench, compile, layers, machine, peak_gflops, rival
from espalier.store import info, load, load_graph, write_whole
from espalier.train import DATA, Recipe, build, example_shape

INTERRUPTED = 130
RESUMED = {
    "compress": "the same command and --resume",
    "search": "the same command",
    "sensitivity": "the same command",
}
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
    allocation: Literal["error", "sensitivity", "rule", "method"] | None = None,
    scheme: str | None = None,
    method: str = "magnitude",
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
        allocation: how that is split over the layers: error, sensitivity, rule (one density) or method; default: error,
            with a scheme and size_mb or macs sensitivity
        scheme: what may die together: filter, column, channel, shape, layer, block_punched, block_column, block_row,
            kernel, pattern, n_m, micro_block, weight or unify; several joined by +; default: filter+column
        method: magnitude (along a ramp), admm, primal_proximal, reweighted, selective_decay or structure_parameters
        scheme_options: such as {"m": 4, "n": 4}
        method_options: such as {"score": "taylor"}
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
    if not data:
        raise DataError(f"say which data to train on: --data {', '.join(DATA)}")
    compress(**locals())


def info_command(file: str) -> None:
    """Say what an .esp file holds.

    Args:
        file: an .esp file
    """
    facts = info(file)
    console = screen()
    table = Table(title=f"{file}: {facts.size_bytes:,} bytes, version {facts.version}", box=None, pad_edge=False)
    for heading in ("tensor", "shape", "dtype", "density", "coding", "bytes"):
        justify: Any = "right" if heading in ("density", "bytes") else "left"
        table.add_column(heading, justify=justify, overflow="fold")
    for row in facts.tensors:
        shape = "x".join(map(str, row.shape)) or "1"
        table.add_row(row.name, shape, row.dtype, f"{row.density:.4f}", row.coding, f"{row.stored_bytes:,}")
    console.print(table, markup=False)
    program = load(file)
    values, counted = program.graph.values, size(program.graph)
    for what, names in (("takes", program.graph.inputs), ("gives", program.graph.outputs)):
        tell(console, f"{what}: {', '.join(_described(values[name]) for name in names)}")
    tell(
        console,
        f"{counted.nonzero:,} of {counted.weights:,} conv and linear weights are not zero (density "
        f"{counted.density:.4f}), {counted.parameters:,} parameters in all",
    )
    tell(console, f"{counted.useful_macs:,} of {counted.macs:,} multiply-accumulates have a weight that is not zero")
    for key, value in facts.metadata.items():
        tell(console, f"{key}: {value}")
    for name in program.fallbacks:
        tell(console, f"runs through PyTorch: {name}")


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
    at_least_one(threads=threads)
    program = load(file, threads=threads)
    result = program(*[_read_array(path) for path in input.split(",")])
    arrays, stream = _flat(result), io.BytesIO()
    if len(arrays) == 1:
        np.save(stream, arrays[0])
    else:
        np.savez(stream, *arrays)  # arr_0, arr_1, ...
    write_whole(output, [stream.getvalue()])
    tell(screen(), f"{output}: {', '.join(str(list(array.shape)) for array in arrays)}")


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
    at_least_one(threads=threads, batch=batch, rounds=rounds)
    names = [name.strip() for name in against.split(",") if name.strip()]
    rivals = {name: rival(name) for name in names}
    module, example = _open(file_or_model, batch)
    dense = module
    if density is not None:
        module = _cut(module, example, density, scheme)
    torch.set_num_threads(threads)
    program = compile(module, example, threads=threads, tune=tune)
    candidates: dict[str, Callable[[], object]] = {"espalier": program.bind(example)}
    if density is not None:
        whole = compile(dense, example, threads=threads)
        candidates["espalier, uncut"] = whole.bind(example)
    for name, make in rivals.items():
        candidates[name] = make(dense.eval(), example, threads)
    timings = bench(candidates, rounds=rounds)
    facts = machine()
    report = BenchReport(
        f"{file_or_model}, batch {len(example)}, {threads} thread{'s' * (threads > 1)}, {facts['cpu']}",
        timings,
        layers(program, example),
        peak_gflops(threads),
        {**facts, "threads": threads, "batch": len(example), "density": density, "scheme": scheme},
        program.fallbacks,
    )
    report.show(screen())
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
    console = screen(stderr=True)
    given = sys.argv[1:] if arguments is None else arguments
    try:
        auto_cli(COMMANDS, written(given, COMMANDS.values()), parser_class=Parser, prog="espalier", version=__version__)
    except EspalierError as error:
        tell(console, f"espalier: {error}", style="red")
        return FAILED
    except ValueError as error:
        if (told := shortened(str(error))) == str(error):
            raise
        tell(console, f"espalier: {told}", style="red")  # of an option's value that jsonargparse was the first to try
        return FAILED
    except KeyboardInterrupt:
        again = RESUMED.get(given[0], "") if given else ""
        tell(console, f"espalier: interrupted{again and '. What was finished is kept; go on with '}{again}")
        return INTERRUPTED
    return 0


def _read_array(path: str) -> np.ndarray:
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: cannot be read as a .npy array: {error}") from error
    if not isinstance(found, np.ndarray):
        raise DataError(f"{path}: holds several arrays ({', '.join(found)}); save each as a .npy file of its own")
    return found


def _described(value: Value) -> str:
    shape = ["N" if value.batched and not k else str(size) for k, size in enumerate(value.shape)]
    return f"{value.name} {str(value.dtype).removeprefix('torch.')}[{', '.join(shape)}]"


def _flat(result: Any) -> list[np.ndarray]:
    if isinstance(result, dict):
        return [array for value in result.values() for array in _flat(value)]
    if isinstance(result, (list, tuple)):
        return [array for value in result for array in _flat(value)]
    return [np.asarray(result)]


def _open(name: str, batch: int) -> tuple[nn.Module, Tensor]:
    """The module of a file or of the zoo, and an example input of `batch` samples. Raises DataError for several."""
    if Path(name).suffix != ".esp":
        return build(name).eval(), torch.randn(batch, *example_shape(name))
    graph = load_graph(name)
    values = [graph.values[value] for value in graph.inputs]
    if len(values) != 1:
        raise DataError(f"{name} takes {len(values)} inputs ({', '.join(graph.inputs)}): time it by es.bench")
    shape = (batch, *values[0].shape[1:]) if values[0].batched else values[0].shape
    make = torch.randn if values[0].dtype.is_floating_point else torch.zeros
    return to_module(graph), make(shape, dtype=values[0].dtype)


def _cut(module: nn.Module, example: Tensor, density: float, scheme: str) -> nn.Module:
    """A copy cut to `density` by magnitude, without training: what the speed would be."""
    cut = copy.deepcopy(module)
    run = start(cut, uniform(capture(cut, example), density, scheme), get("magnitude"), example)
    run.finish()
    return shrink(cut, example)


if __name__ == "__main__":
    sys.exit(main())
