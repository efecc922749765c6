"""The callback in Hugging Face's own Trainer, on a ResNet of the library made from its configuration, offline."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

os.environ.setdefault("HF_HUB_OFFLINE", "1")
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

import espalier as es
from espalier.errors import MethodError, MissingExtraError
from espalier.integrations import transformers as integration
from espalier.integrations.transformers import FILE, PruningCallback
from espalier.methods import get
from espalier.sparsity import scheme

EXAMPLE = {"pixel_values": torch.zeros(1, 1, 16, 16)}
METHOD = get("admm", rho_start=0.1, rho_end=1.0, updates=8)


class Pictures(Dataset):
    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.labels = torch.arange(64) % 4
        self.images = torch.randn(64, 1, 16, 16, generator=generator) + self.labels[:, None, None, None]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, k: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.images[k], "labels": self.labels[k]}


def network() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "layer_type": "basic"}
    return ResNetForImageClassification(ResNetConfig(num_channels=1, num_labels=4, **sizes))


def callback_for(model: Any) -> PruningCallback:
    sites = es.capture(model, EXAMPLE).sites()
    inner = [name for name in sites if "stages.1" in name and "layer.0" in name and sites[name].shape[-1] == 3]
    assert inner
    return PruningCallback({name: scheme("filter", 0.25) for name in inner}, METHOD, example_inputs=EXAMPLE)


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "num_train_epochs": 4,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "seed": 3,
        **options,
    }
    return TrainingArguments(**settings)


def train(folder: Path, resume: str | None = None, penalty: bool = True, **options: Any) -> tuple[Any, PruningCallback]:
    model = network()
    callback = callback_for(model)
    if not penalty:
        callback.course.before = lambda: 0.0  # type: ignore[method-assign]
    made = Trainer(model, arguments(folder, **options), train_dataset=Pictures(), callbacks=[callback])
    made.train(resume_from_checkpoint=resume)
    return model, callback


def test_a_model_of_the_library_is_trained_into_its_plan_and_shrinks(tmp_path: Path) -> None:
    model, callback = train(tmp_path)
    assert callback.course.done == 16 and callback.course.steps == 8  # optimizer steps, not batches
    for site, mask in callback.run.masks.items():
        weight = dict(model.named_parameters())[site]
        assert mask.flatten(1).any(1).sum() == weight.shape[0] // 4 and not weight[~mask].any()
    without, _ = train(tmp_path, penalty=False)
    assert not torch.equal(model.classifier[1].weight, without.classifier[1].weight), "the penalty had no effect"
    x = {"pixel_values": torch.randn(2, 1, 16, 16)}
    small = es.shrink(model.eval(), EXAMPLE)
    torch.testing.assert_close(small(**x)["logits"], model(**x).logits, rtol=1e-4, atol=1e-4)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())


def test_a_resumed_training_is_the_unbroken_one(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 4}
    whole, _ = train(tmp_path / "a", **options)
    checkpoint = tmp_path / "a" / "checkpoint-4"
    assert (checkpoint / FILE).exists()
    resumed, _ = train(tmp_path / "a", resume=str(checkpoint), **options)
    for ours, theirs in zip(resumed.state_dict().values(), whole.state_dict().values()):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    (checkpoint / FILE).unlink()
    with pytest.raises(MethodError, match="is missing"):
        train(tmp_path / "a", resume=str(checkpoint), **options)


def test_without_the_package_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integration, "TrainerCallback", None)
    with pytest.raises(MissingExtraError, match=r"espalier\[transformers\]"):
        PruningCallback({}, METHOD, example_inputs=EXAMPLE)
