"""The callback in Lightning's own Trainer: the oracle is the same training by hand."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import espalier as es
from espalier.errors import MethodError, MissingExtraError
from espalier.integrations import lightning as integration
from espalier.integrations.lightning import PruningCallback
from espalier.methods import get
from espalier.sparsity import Plan, scheme

PLAN = Plan.of({"conv2": scheme("filter", 0.25), "fc": scheme("column", 0.5)}, unfit="dense")
EXAMPLE = torch.zeros(1, 2, 6, 6)
METHOD = get("admm", rho_start=0.1, rho_end=1.0, updates=8)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.conv2, self.fc = nn.Conv2d(2, 8, 3), nn.Conv2d(8, 12, 3), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.conv2(F.relu(self.conv1(x)))).mean((2, 3)))


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = Net()

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def training_step(self, batch: Any, index: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def batches() -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(96) % 4
    x = torch.randn(96, 2, 6, 6, generator=generator) + y[:, None, None, None]
    return DataLoader(TensorDataset(x, y), batch_size=8)  # 12 a epoch, in their order


def trainer(folder: Path, epochs: int, callback: Any, **options: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    options.setdefault("enable_checkpointing", False)
    return pl.Trainer(max_epochs=epochs, callbacks=[callback], default_root_dir=folder, **quiet, **options)


def by_hand(epochs: int, accumulate: int, clip: float) -> Net:
    model, data = Net(), list(batches())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    steps = epochs * len(data) // accumulate
    run = es.start(model, PLAN, METHOD, EXAMPLE, steps=steps // 2)
    for step in range(steps):
        optimizer.zero_grad()
        first = step * accumulate
        for k in range(first, first + accumulate):
            x, y = data[k % len(data)]
            (F.cross_entropy(model(x), y) / accumulate).backward()
        run.add_penalty_gradients()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        run.step()
        if step + 1 == steps // 2:
            run.finish()
    return model


@pytest.mark.parametrize("accumulate,clip,attribute", [(1, 0.0, None), (2, 0.5, "model")])
def test_it_is_the_loop_by_hand(accumulate: int, clip: float, attribute: str | None, tmp_path: Path) -> None:
    module, callback = Module(), PruningCallback(_plan(attribute), METHOD, example_inputs=EXAMPLE, module=attribute)
    options: dict[str, Any] = {"accumulate_grad_batches": accumulate, "gradient_clip_val": clip or None}
    trainer(tmp_path, 4, callback, **options).fit(module, batches())
    want = by_hand(4, accumulate, clip)
    for ours, theirs in zip(module.model.parameters(), want.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    mask = next(m for site, m in callback.run.masks.items() if "conv2" in site)
    assert mask.any(1).flatten(1).any(1).sum() == 3 and not module.model.conv2.weight[~mask].any()
    small = es.shrink(module.model, EXAMPLE)
    assert small.conv2.weight.shape[0] <= 3


def _plan(attribute: str | None) -> Plan:
    prefix = "" if attribute else "model."
    return Plan.of({f"{prefix}conv2": scheme("filter", 0.25), f"{prefix}fc": scheme("column", 0.5)}, unfit="dense")


def test_lightnings_checkpoints_hold_the_run(tmp_path: Path) -> None:
    def go(epochs: int, checkpoint: Path | None) -> Module:
        module = Module()
        callback = PruningCallback(_plan("model"), METHOD, example_inputs=EXAMPLE, module="model", shaping=0.5)

        class Stop(pl.Callback):
            def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
                if trainer.current_epoch + 1 == epochs:
                    trainer.save_checkpoint(tmp_path / "half.ckpt")
                    trainer.should_stop = True

        runner = trainer(tmp_path, 4, callback)
        runner.callbacks.append(Stop())
        runner.fit(module, batches(), ckpt_path=checkpoint, weights_only=True)
        return module

    whole = go(4, None)
    go(1, None)  # stopped while it is shaped
    resumed = go(4, tmp_path / "half.ckpt")
    for ours, theirs in zip(resumed.parameters(), whole.parameters()):
        assert torch.equal(ours, theirs)


def test_what_goes_wrong_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    callback = PruningCallback(PLAN, METHOD, example_inputs=EXAMPLE, module="network")
    with pytest.raises(MethodError, match="no module 'network'"):
        trainer(tmp_path, 1, callback).fit(Module(), batches())
    with pytest.raises(MethodError, match="there is none yet"):
        print(callback.run)
    with pytest.raises(MethodError, match="shaping is 2"):
        PruningCallback(PLAN, METHOD, example_inputs=EXAMPLE, shaping=2)
    endless = PruningCallback(_plan(None), METHOD, example_inputs=EXAMPLE)
    with pytest.raises(MethodError, match="say how long it is"):
        trainer(tmp_path, -1, endless).fit(Module(), batches())
    monkeypatch.setattr(integration, "Callback", None)
    with pytest.raises(MissingExtraError, match=r"espalier\[lightning\]"):
        PruningCallback(PLAN, METHOD, example_inputs=EXAMPLE)
