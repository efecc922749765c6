"""The five lines (marked) that bring Espalier into a training loop of your own."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import espalier as es


def main(epochs: int = 8) -> tuple[nn.Module, float]:
    """Train a small network on the digits into 10 % of its weights; returns it shrunk, and its accuracy."""
    torch.manual_seed(0)
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    y = torch.tensor(digits.target)
    train, test = slice(0, 1400), slice(1400, None)
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 10),
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    batches = [slice(k, k + 50) for k in range(0, 1400, 50)]

    example = x[:1]
    plan = es.uniform(es.capture(model, example), 0.1, "block_punched")
    run = es.start(model, plan, "admm", example, steps=epochs * len(batches))  # 1
    for epoch in range(2 * epochs):
        model.train()
        for batch in batches:
            loss = F.cross_entropy(model(x[train][batch]), y[train][batch])
            loss = loss + run.penalty()  # 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.step()  # 3
        if epoch == epochs - 1:
            run.finish()  # 4: the weights lie in the plan; the epochs that follow retrain them there
    small = es.shrink(model.eval(), example)  # 5
    accuracy = float((small(x[test]).argmax(1) == y[test]).float().mean())
    print(f"accuracy {100 * accuracy:.1f} % with {es.size(es.capture(small, example)).nonzero} weights")
    return small, accuracy


if __name__ == "__main__":
    main()
