"""Killed with SIGKILL while each method is at work, again and again, training ends bit for bit like an unbroken run."""

from __future__ import annotations

import multiprocessing
import random
import signal
import time
from pathlib import Path

import torch

from espalier.methods import METHODS
from tests.methods.trainer import every, train


def test_every_method_survives_being_killed(tmp_path: Path) -> None:
    moments, killed = random.Random(0), dict.fromkeys(METHODS, 0)
    context = multiprocessing.get_context("forkserver")  # PyTorch and Fabric are loaded once, not after every kill
    context.set_forkserver_preload(["tests.methods.trainer", "lightning_fabric"])
    while not all((tmp_path / f"{name}.result").exists() for name in METHODS):
        process = context.Process(target=every, args=(tmp_path,))
        process.start()
        known = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.pt")}
        while process.is_alive():  # each method once, some steps after it has got on
            time.sleep(0.002)
            on = [n for n in METHODS if (p := tmp_path / f"{n}.pt").exists() and p.stat().st_mtime_ns != known.get(p)]
            due = [n for n in on if not killed[n] and not (tmp_path / f"{n}.result").exists()]
            if due:
                time.sleep(moments.uniform(0, 0.1))
                process.kill()
                process.join()
                if process.exitcode == -signal.SIGKILL:
                    killed[due[0]] += not (tmp_path / f"{due[0]}.result").exists()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
    assert sum(map(bool, killed.values())) >= len(METHODS) - 1, f"too quick to be killed: {killed}"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the processes that were killed
    try:
        for name in METHODS:
            whole, pieces = train(name, None), torch.load(tmp_path / f"{name}.result", weights_only=True)
            assert all(torch.equal(whole[key], pieces[key]) for key in whole), name
    finally:
        torch.set_num_threads(threads)
