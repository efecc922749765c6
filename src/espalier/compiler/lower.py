"""Lowering: a graph becomes a program; what the engine lacks becomes pieces for PyTorch between programs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from espalier.compiler.bands import lives, through_bands
from espalier.compiler.depth_first import depth_first
from espalier.compiler.emit import Emitter
from espalier.compiler.fuse import fold_constants, fuse
from espalier.compiler.layout import Place
from espalier.compiler.memory import Interval, allocate, in_place
from espalier.compiler.plan_layout import plan_layout
from espalier.compiler.program import Operand, Program, Step, TensorSpec, dense_strides
from espalier.compiler.row_bands import through_rows
from espalier.compiler.samples import follows, track
from espalier.compiler.support import LOWERINGS, why_not
from espalier.errors import CompileError
from espalier.graph.ir import Graph, Node


@dataclass(frozen=True)
class Piece:
    """Part of a graph that runs in one go: by the engine (`program`), or by PyTorch (`reasons`: node -> why).

    code: the bytes of the program, until the engine has loaded them. They hold all arrays: its steps have none.
    """

    graph: Graph
    program: Program | None = None
    reasons: tuple[tuple[str, str], ...] = ()
    code: bytes = b""


def lower(graph: Graph, threads: int = 1) -> Program:
    """The program of a whole graph, fused or not. threads: that it is meant for; any number can run it.

    Raises CompileError, naming nodes and their place in the user's code, where the engine cannot run all of it
    (`split` hands those parts to PyTorch).
    """
    batch = batch_of(graph)
    graph = fold_constants(graph)
    samples = track(graph, batch)
    refused = [
        f"{node.name} ({node.op}) at {node.place or 'unknown place'}: {reason}"
        for node in graph.nodes
        if (reason := why_not(graph, node, batch, samples))
    ]
    refused += _strange_ends(graph, batch)
    if refused:
        raise CompileError("the engine cannot run all of this graph: " + "; ".join(refused[:5]))
    fused = any("activation" in node.attrs for node in graph.nodes)
    return _program(graph if fused else fuse(graph), batch, threads)


def split(graph: Graph, threads: int = 1) -> tuple[Piece, ...]:
    """The whole graph as pieces in the order in which they run: as few as a greedy order gives.

    threads: that its programs are meant for; any number can run them.

    Values that depend on no input are computed before, so that no piece runs for them.
    """
    batch = batch_of(graph)
    graph = fold_constants(graph)
    samples = track(graph, batch)
    reasons = {node.name: why_not(graph, node, batch, samples) for node in graph.nodes}
    pieces = []
    for native, nodes in _runs(graph, reasons):
        part = subgraph(graph, nodes)
        why = tuple((n.name, reasons[n.name]) for n in nodes if reasons[n.name])
        if native and any(LOWERINGS[n.op].fresh for n in nodes) and not _strange_ends(part, batch):
            program = _program(fuse(part), batch, threads)
            pieces.append(Piece(part, program.without_arrays(), code=program.to_bytes()))
        else:
            pieces.append(Piece(part, None, why))
    return tuple(pieces)


def native_nodes(graph: Graph, threads: int = 1) -> Iterator[tuple[Graph, Node]]:
    """The conv and linear nodes that the engine will run, each with the fused graph that it is part of."""
    for piece in split(graph, threads):
        if piece.program is not None:
            part = depth_first(fuse(piece.graph), _sharing(batch_of(graph), threads))
            yield from ((part, node) for node in part.nodes if node.op in ("conv", "linear"))


def alone(graph: Graph, node: Node) -> Graph:
    """The graph of one node of a fused graph."""
    return subgraph(replace(graph, outputs=()), [node], node.outputs)


def program_of(graph: Graph) -> Program:
    """The program of a fused graph that the engine can run as it is."""
    return _program(graph, batch_of(graph))


def batch_of(graph: Graph) -> int:
    """Size of dimension 0 of the inputs at which the graph was captured; 0 where there is none."""
    shapes = [graph.values[name].shape for name in graph.inputs if graph.values[name].shape]
    return shapes[0][0] if shapes else 0


def _sharing(batch: int, threads: int) -> int:
    """How many threads share a sample; 1 where each takes whole samples. Captured batches of 1 are told as 2."""
    return 1 if batch > 2 and batch >= threads else threads


def _strange_ends(graph: Graph, batch: int) -> list[str]:
    """Inputs and outputs that are no batches of float32 samples."""
    found = []
    for name in (*graph.inputs, *graph.outputs):
        value = graph.values[name]
        if name in graph.tensors or str(value.dtype) != "torch.float32" or not value.shape:
            found.append(f"{name} is no batch of float32 samples")
        elif not follows(graph, value, batch) or len(value.shape) > 5:
            found.append(f"{name} does not follow the batch")
    return found


def _runs(graph: Graph, reasons: dict[str, str]) -> list[tuple[bool, list[Node]]]:
    """Nodes in runs of one kind: each run takes every node of its kind that can come, in the graph's order."""
    known = {*graph.inputs, *graph.tensors}
    left, runs = list(graph.nodes), []
    while left:
        native = not reasons[left[0].name]
        run, later = [], []
        for node in left:
            ready = all(name is None or name in known for name in node.inputs)
            if ready and (not reasons[node.name]) == native:
                run.append(node)
                known |= set(node.outputs)
            else:
                later.append(node)
        runs.append((native, run))
        left = later
    return runs


def subgraph(graph: Graph, nodes: Sequence[Node], kept: Sequence[str] = ()) -> Graph:
    """The graph of some nodes: inputs are what they read from outside, outputs what is read outside."""
    inside = {node.name for node in nodes}
    made = {name for node in nodes for name in node.outputs}
    read = [name for node in nodes for name in node.inputs if name is not None]
    readers = graph.readers()
    wanted = {*graph.outputs, *kept}
    outputs = [n for n in made if n in wanted or any(r.name not in inside for r in readers[n])]
    order = {name: k for k, name in enumerate(n for node in nodes for n in node.outputs)}
    outputs.sort(key=order.__getitem__)
    tensors = {name: graph.tensors[name] for name in dict.fromkeys(read) if name in graph.tensors}
    inputs = tuple(dict.fromkeys(n for n in read if n not in made and n not in tensors))
    names = {*inputs, *made, *tensors}
    return replace(
        graph,
        inputs=inputs,
        outputs=tuple(outputs),
        nodes=tuple(nodes),
        values={name: value for name, value in graph.values.items() if name in names},
        tensors=tensors,
        parameters=graph.parameters & set(tensors),
        output_tree=list(range(len(outputs))),
        aliases={},
    )


def _program(graph: Graph, batch: int, threads: int = 1) -> Program:
    """Steps for a fused graph that the engine can run."""
    threads = _sharing(batch, threads)
    graph = depth_first(graph, threads)
    fresh = {name for node in graph.nodes if LOWERINGS[node.op].fresh for name in node.outputs}
    samples = track(graph, batch)
    layout = plan_layout(graph, graph.nodes, graph.inputs, fresh, samples.shapes)
    e = Emitter(graph, layout, batch, samples=samples)
    for index, name in enumerate(graph.inputs):
        shape = layout.shapes[name]
        e.places[name] = Place(shape, dense_strides(shape), space="input", index=index)
    for node in graph.nodes:
        LOWERINGS[node.op].emit(e, node)
    for index, name in enumerate(graph.outputs):
        shape = layout.shapes[name]
        out = Place(shape, dense_strides(shape), space="output", index=index)
        e.copy(e.places[name], out, f"{name}/output")
    steps, size, scratch_size = _in_arena(e, threads)
    inputs, outputs = (tuple(TensorSpec(n, layout.shapes[n]) for n in names) for names in (graph.inputs, graph.outputs))
    return Program(inputs, outputs, steps, size, scratch_size)


def _in_arena(e: Emitter, threads: int) -> tuple[tuple[Step, ...], int, int]:
    """Steps whose operands lie in one arena or the scratch, and the sizes of both in bytes."""
    e.steps, made = through_rows(e.steps, threads)
    e.storages |= made
    e.steps, own = _tasks(e.steps)
    e.steps = through_bands(e.steps)
    scratch, scratch_size = _in_scratch(e.steps, {name: e.storages[name].size_bytes for name in own})
    renamed = in_place(e.steps, {name: s.size_bytes for name, s in e.storages.items()})
    e.steps = [_with_storages(step, renamed) for step in e.steps]
    alive: dict[str, tuple[int, int]] = {}
    for step, (first, last) in zip(e.steps, lives(e.steps)):
        for name in _storages(step):
            if name not in own:
                alive[name] = (alive.get(name, (first, last))[0], last)
    arena = allocate([Interval(n, e.storages[n].size_bytes, a, b) for n, (a, b) in alive.items()])

    def settled(operand: Operand) -> Operand:
        if not operand.storage:
            return operand
        if operand.storage in own:
            return replace(operand, space="scratch", offset=operand.offset + scratch[operand.storage] // 4, storage="")
        return replace(operand, offset=operand.offset + arena.offsets[operand.storage] // 4, storage="")

    steps = [replace(s, out=settled(s.out), a=settled(s.a), b=settled(s.b)) for s in e.steps]
    return tuple(steps), arena.size_bytes, scratch_size


def _in_scratch(steps: Sequence[Step], sizes: dict[str, int], align: int = 64) -> tuple[dict[str, int], int]:
    """Where the storages of tasks lie in a thread's scratch, each task's behind one another; and how large it is."""
    offsets, ends = dict[str, int](), dict[int, int]()
    for step in steps:
        for name in _storages(step):
            if name in sizes and name not in offsets:
                offsets[name] = ends.get(step.task, 0)
                ends[step.task] = offsets[name] + -(-sizes[name] // align) * align
    return offsets, max(ends.values(), default=0)


def _tasks(steps: list[Step]) -> tuple[list[Step], set[str]]:
    """Steps of which only whole tasks still say so, and the storages that one task alone writes and reads."""
    touched: dict[str, list[int]] = {}
    for number, step in enumerate(steps):
        for name in _storages(step):
            touched.setdefault(name, []).append(number)
    own, whole = set(), set()
    for name, numbers in touched.items():
        tasks = {steps[number].task for number in numbers}
        if len(tasks) == 1 and 0 not in tasks and len(numbers) == 2 and numbers[1] == numbers[0] + 1:
            own.add(name)
            whole |= tasks
    return [step if step.task in whole else replace(step, task=0) for step in steps], own


def _with_storages(step: Step, renamed: dict[str, str]) -> Step:
    out, a, b = (
        replace(o, storage=renamed[o.storage]) if o.storage in renamed else o for o in (step.out, step.a, step.b)
    )
    return replace(step, out=out, a=a, b=b)


def _storages(step: Step) -> Iterable[str]:
    return (operand.storage for operand in (step.out, step.a, step.b) if operand.storage)
