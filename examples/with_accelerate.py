"""The five lines (marked) in a loop of Hugging Face accelerate: any number of processes, accumulation, clipping.

Run it with ``python examples/with_accelerate.py`` or ``accelerate launch examples/with_accelerate.py``.
"""

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import espalier as es


def main(epochs: int = 8, accumulate: int = 2) -> tuple[nn.Module, float]:
    """Train a small network on the digits into 10 % of its weights; returns it shrunk, and its accuracy."""
    accelerator = Accelerator(gradient_accumulation_steps=accumulate)
    torch.manual_seed(0)
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    y = torch.tensor(digits.target)
    loader = DataLoader(TensorDataset(x[:1400], y[:1400]), batch_size=25, shuffle=True)
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 10),
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    example = x[:1]
    plan = es.uniform(es.capture(model, example), 0.1, "block_punched")
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    steps = epochs * -(-len(loader) // accumulate)
    run = es.start(model, plan, "admm", example.to(accelerator.device), steps=steps)  # 1: the module inside
    for epoch in range(2 * epochs):
        model.train()
        for images, labels in loader:
            with accelerator.accumulate(prepared):
                accelerator.backward(F.cross_entropy(prepared(images), labels))
                if accelerator.sync_gradients:  # where the optimizer steps: once, however many batches it accumulates
                    run.add_penalty_gradients()  # 2: after backward, so that it is not divided by the accumulation
                    accelerator.clip_grad_norm_(prepared.parameters(), 5.0)
                optimizer.step()
                if accelerator.sync_gradients:
                    run.step()  # 3
                optimizer.zero_grad()
        if epoch == epochs - 1:
            run.finish()  # 4
    small = es.shrink(model.eval().cpu(), example)  # 5
    accuracy = float((small(x[1400:]).argmax(1) == y[1400:]).float().mean())
    accelerator.print(f"accuracy {100 * accuracy:.1f} % with {es.size(es.capture(small, example)).nonzero} weights")
    return small, accuracy


if __name__ == "__main__":
    main()
