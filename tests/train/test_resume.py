"""A run that was stopped, in whatever way, ends bit for bit as one that was not; checkpoints are whole or not there."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from espalier.errors import TrainingError
from espalier.methods import start
from espalier.sparsity import Plan
from espalier.train import Recipe, build, fit, load_data, seed_everything
from espalier.train.checkpoint import read_checkpoint, write_checkpoint
from tests.train.trainer import RECIPE, Drifting, data, network, slowly, train

STEPS = RECIPE.epochs * data().train.steps(RECIPE.batch_size)


def differing(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    return [name for name in {**a, **b} if a[name].shape != b[name].shape or not torch.equal(a[name], b[name])]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the processes that are killed
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    """What an uninterrupted run comes to."""
    torch.set_num_threads(1)
    return train(None)


class StopAt:
    """Ctrl-C in the middle of a step: after the optimizer's, before the hooks'."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, step: int, times: int = 1) -> None:
        self.count = 0
        inner = Drifting.step

        def stepped(hooks: Drifting) -> None:
            self.count += 1
            if self.count == step:
                for _ in range(times):
                    os.kill(os.getpid(), signal.SIGINT)
            inner(hooks)

        monkeypatch.setattr(Drifting, "step", stepped)


@pytest.mark.parametrize("step", [1, 7, 14, 15, 16, STEPS // 2, STEPS - 1, STEPS])
def test_ctrl_c_loses_nothing(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[str, Any]
) -> None:
    path, handler = tmp_path / "run.pt", signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patched:
        StopAt(patched, step)
        with pytest.raises(KeyboardInterrupt):
            train(path)
    assert signal.getsignal(signal.SIGINT) is handler
    state = read_checkpoint(path)
    per_epoch = STEPS // RECIPE.epochs
    assert state["epoch"] * per_epoch + state["batch"] == step == state["hooks"]["count"]
    seed_everything(12345)  # whatever happened since
    assert not differing(train(path), whole)


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[str, Any]) -> None:
    path = tmp_path / "run.pt"
    with monkeypatch.context() as patched:
        StopAt(patched, STEPS // 2, times=2)
        with pytest.raises(KeyboardInterrupt):
            train(path)
    assert read_checkpoint(path)["batch"] == 0  # that of the last whole epoch
    assert not differing(train(path), whole)


@pytest.mark.parametrize("epoch", [2, RECIPE.epochs])
def test_ctrl_c_between_two_epochs_is_heard(epoch: int, tmp_path: Path, whole: dict[str, Any]) -> None:
    def press(row: Any) -> None:
        if row.epoch == epoch:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run.pt", on_epoch=press)
    state = read_checkpoint(tmp_path / "run.pt")
    assert (state["epoch"], state["batch"]) == (epoch, 0)
    assert not differing(train(tmp_path / "run.pt"), whole)


def test_a_finished_run_is_not_run_again(tmp_path: Path, whole: dict[str, Any]) -> None:
    path = tmp_path / "run.pt"
    assert not differing(train(path), whole)
    written = path.stat().st_mtime_ns
    assert not differing(train(path), whole)
    assert path.stat().st_mtime_ns == written
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("schedule", ["cosine", "step", "constant"])
def test_every_optimizer_and_schedule_resumes(optimizer: Any, schedule: Any, tmp_path: Path) -> None:
    recipe = replace(RECIPE, epochs=2, optimizer=optimizer, schedule=schedule, lr=0.01, accumulate=2)
    want = train(None, recipe)

    def stop(_: object) -> None:
        raise RuntimeError("killed between two epochs")

    with pytest.raises(RuntimeError, match="killed"):
        train(tmp_path / "run.pt", recipe, on_epoch=stop)
    assert not differing(train(tmp_path / "run.pt", recipe), want)


@pytest.mark.parametrize("method", ["admm", "magnitude"])
def test_a_method_at_work_resumes(method: str, tmp_path: Path) -> None:
    digits, recipe = load_data("digits"), Recipe(epochs=3, batch_size=256, seed=1)

    def go(path: Path | None, stop: bool = False) -> dict[str, Any]:
        seed_everything(0)
        model = build("lenet_digits", width=8)
        steps = recipe.epochs * digits.train.steps(recipe.batch_size)
        run = start(model, Plan.uniform("filter", 0.5), method, torch.zeros(1, 1, 8, 8), steps=steps)

        def after(row: Any) -> None:
            if stop and row.epoch == 2:
                raise InterruptedError

        fit(model, digits, recipe, hooks=run, checkpoint=path, resume=True, progress=False, on_epoch=after)
        run.finish()
        return model.state_dict()

    want = go(None)
    with pytest.raises(InterruptedError):
        go(tmp_path / "run.pt", stop=True)
    assert not differing(go(tmp_path / "run.pt"), want)


@pytest.mark.parametrize("save_every_s", [1e9, 0.0], ids=["saved each epoch", "saved each step"])
def test_killed_again_and_again(save_every_s: float, tmp_path: Path, whole: dict[str, Any]) -> None:
    """SIGKILL at random moments, that of writing a checkpoint among them."""
    path, result, moments = tmp_path / "run.pt", tmp_path / "result.pt", random.Random(save_every_s)
    context = multiprocessing.get_context("forkserver")  # PyTorch and Fabric are loaded once, not after every kill
    context.set_forkserver_preload(["tests.train.trainer", "lightning_fabric"])
    kills = 0
    for attempt in range(4):
        process = context.Process(target=slowly, args=(path, result, save_every_s))
        process.start()
        seen = path.stat().st_mtime_ns if path.exists() else 0
        while attempt < 3 and process.is_alive():  # once it has got on, kill it soon
            if path.exists() and path.stat().st_mtime_ns != seen:
                time.sleep(moments.uniform(0, 0.06))
                process.kill()
                process.join()
                kills += process.exitcode == -signal.SIGKILL
                read_checkpoint(path)  # whole
            else:
                time.sleep(0.001)
        process.join()
        if result.exists():
            break
    assert kills >= 1, "the run was over before it could be killed: make it longer"
    assert not differing(torch.load(result, weights_only=True), whole)


# -- what cannot go on -----------------------------------------------------------------------------


def stopped(path: Path, **changes: Any) -> None:
    fit(network(), data(), replace(RECIPE, **changes), checkpoint=path, progress=False)


def test_a_checkpoint_of_something_else_is_refused_and_the_network_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    stopped(path, epochs=1)
    recipe = replace(RECIPE, epochs=1)

    def refused(words: str, model: nn.Module | None = None, **options: Any) -> None:
        model = model or network()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        given = {"data": data(), "recipe": recipe, "checkpoint": path, "resume": True, "progress": False, **options}
        with pytest.raises(TrainingError, match=words):
            fit(model, **given)
        assert not differing(before, model.state_dict())

    refused("another recipe: lr was 0.05, is 0.2", recipe=replace(recipe, lr=0.2))
    refused("another recipe: epochs was 1, is 4", recipe=RECIPE)
    refused("another network: .*weight", nn.Sequential(nn.Flatten(), nn.Linear(432, 4)))
    refused("another run: phase was train, is shape", phase="shape")
    refused(r"another run: data was synthetic:3x12x12:4", data=load_data("synthetic:3x12x12:3"))
    model = network()
    refused("another run: hooks was False, is True", model, hooks=Drifting(model[0].weight))
    whole_file = path.read_bytes()
    for broken in (whole_file[: len(whole_file) // 2], b"", b"what is this"):
        path.write_bytes(broken)
        refused("cannot be read as a checkpoint")
    torch.save({"format": "another"}, path)
    refused("is no checkpoint of this version")
    assert stopped(path, epochs=1) is None  # without resume it is written over


def test_a_checkpoint_cannot_run_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "evil"),)

    torch.save({"format": "espalier checkpoint 1", "recipe": Evil()}, tmp_path / "run.pt")
    with pytest.raises(TrainingError, match="cannot be read as a checkpoint"):
        read_checkpoint(tmp_path / "run.pt")
    assert not (tmp_path / "evil").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_named_and_the_checkpoint_before_it_stays(tmp_path: Path, whole: dict[str, Any]) -> None:
    path = tmp_path / "run.pt"

    def fill(row: Any) -> None:
        if row.epoch == 2:
            (tmp_path / "run.pt.part").symlink_to("/dev/full")  # whoever writes there hears that the disk is full

    with pytest.raises(TrainingError, match=r"run\.pt: .*No space left.*one before it is whole"):
        train(path, on_epoch=fill)
    assert read_checkpoint(path)["epoch"] == 2
    assert not differing(train(path), whole)


def test_a_file_size_limit_and_a_folder_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="cannot write the checkpoint"):
        write_checkpoint(tmp_path / "file" / "run.pt", {"epoch": 1})
    resource = pytest.importorskip("resource")
    limits, path = resource.getrlimit(resource.RLIMIT_FSIZE), tmp_path / "run.pt"
    write_checkpoint(path, {"epoch": 1})
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        with pytest.raises(TrainingError, match=r"run\.pt: .*make room"):
            write_checkpoint(path, {"epoch": 2, "much": torch.zeros(1_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert read_checkpoint(path)["epoch"] == 1 and not path.with_name("run.pt.part").exists()


def test_a_state_that_lacks_anything_would_be_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[str, Any]
) -> None:
    """The broken ones that must fail: checkpoints in which one thing is not as it was."""
    path, fresh = tmp_path / "run.pt", tmp_path / "fresh.pt"
    with monkeypatch.context() as patched:
        StopAt(patched, STEPS // 2 + 3)
        with pytest.raises(KeyboardInterrupt):
            train(path)
    with monkeypatch.context() as patched:
        StopAt(patched, 1)
        with pytest.raises(KeyboardInterrupt):
            train(fresh)
    good, other = read_checkpoint(path), read_checkpoint(fresh)
    for part in ("model", "optimizer", "hooks", "epoch", "batch", "sums", "history", "random"):
        write_checkpoint(path, {**good, part: other[part]})
        assert differing(train(path), whole), f"{part} is saved in vain"
