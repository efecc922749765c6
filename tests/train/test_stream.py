"""Pictures read when they are needed: the batches, the training and the errors of those in memory; ahead, not all."""

from __future__ import annotations

import copy
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from espalier.errors import DataError
from espalier.train import Data, Recipe, Split, evaluate, fit, load_data, seed_everything
from espalier.train import pictures as pictures_module
from espalier.train.stream import AHEAD, Stream
from tests.train.writers import write_pictures


@pytest.fixture
def both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Data, Data]:
    write_pictures(tmp_path, ("train", "test"), per_class=20)
    held = load_data(f"folder:{tmp_path}", holdout=0.2)
    monkeypatch.setattr(pictures_module, "IN_MEMORY_BYTES", 1000)
    streamed = load_data(f"folder:{tmp_path}", holdout=0.2)
    assert isinstance(held.train.images, torch.Tensor) and isinstance(streamed.train.images, Stream)
    return held, streamed


def test_batches_are_those_of_pictures_in_memory(both: tuple[Data, Data]) -> None:
    ways: list[dict[str, Any]] = [{}, {"shuffle": True, "augment": True, "seed": 3, "epoch": 2}, {"first": 2}]
    for options in [*ways, {**ways[1], "first": 1, "part": slice(1, None, 2)}]:
        for name in ("train", "holdout", "test"):
            held, streamed = (list(getattr(data, name).batches(3, **options)) for data in both)
            assert len(held) == len(streamed) > 0
            for (x, y), (z, w) in zip(held, streamed):
                assert torch.equal(x, z) and torch.equal(y, w)
    assert both[0].shape == both[1].shape


def network() -> nn.Sequential:
    seed_everything(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(294, 2))


def test_training_is_the_same_and_resumes(both: tuple[Data, Data], tmp_path: Path) -> None:
    recipe, models = Recipe(epochs=3, batch_size=8, lr=0.02), [network(), network()]
    for model, data in zip(models, both):
        fit(model, data, recipe, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(*(model.state_dict().values() for model in models)))
    assert evaluate(models[0], both[0].test) == evaluate(models[1], both[1].test)

    def stop(row: Any) -> None:
        if row.epoch == 2:
            raise InterruptedError

    options: dict[str, Any] = {"checkpoint": tmp_path / "run.pt", "resume": True, "progress": False}
    with pytest.raises(InterruptedError):
        fit(network(), both[1], recipe, on_epoch=stop, **options)
    resumed = network()
    fit(resumed, both[1], recipe, **options)
    assert all(torch.equal(a, b) for a, b in zip(resumed.state_dict().values(), models[0].state_dict().values()))


def test_parts_of_a_batch_are_the_batch(both: tuple[Data, Data]) -> None:
    options: dict[str, Any] = {"shuffle": True, "augment": True, "seed": 1}
    whole = list(both[0].train.batches(9, **options))
    parts = [list(both[1].train.batches(9, part=slice(rank, None, 2), **options)) for rank in (0, 1)]
    for k, (x, y) in enumerate(whole):
        assert len(x) == both[0].train.size_of(k, 9)
        for rank in (0, 1):
            assert torch.equal(parts[rank][k][0], x[rank::2]) and torch.equal(parts[rank][k][1], y[rank::2])


def test_it_reads_ahead_by_threads_and_stops_when_nobody_listens() -> None:
    read, names = [], set()

    def slowly(number: int) -> np.ndarray:
        time.sleep(0.001)
        read.append(number)
        names.add(threading.current_thread().name)
        return np.full((2, 2, 3), number, np.uint8)

    split = Split(Stream(slowly, torch.arange(200), (3, 2, 2)), torch.arange(200), ((0.0,) * 3, (1.0,) * 3))
    batches = split.batches(10)
    assert not read, "nothing is read before it is asked for"
    first, _ = next(batches)
    assert (first[:, 0, 0, 0] * 255).round().tolist() == list(range(10))
    time.sleep(0.3)
    assert sorted(read) == list(range(10 * (1 + AHEAD))), "the next batches, and no more"
    batches.close()
    time.sleep(0.05)
    assert len(read) == 10 * (1 + AHEAD) and all(name.startswith("espalier-read") for name in names)
    some = copy.copy(split).only(torch.tensor([7, 3]))
    assert len(some) == 2 and (next(some.batches(2))[0][:, 0, 0, 0] * 255).round().tolist() == [7, 3]


def test_a_picture_that_cannot_be_read_is_named_when_its_batch_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pictures(tmp_path, ("train", "test"), per_class=20)
    monkeypatch.setattr(pictures_module, "IN_MEMORY_BYTES", 1000)
    (tmp_path / "test" / "dog" / "19.png").write_bytes(b"no picture")
    data = load_data(f"folder:{tmp_path}")
    with pytest.raises(DataError, match=r"19\.png: no picture that can be read"):
        evaluate(network(), data.test)
