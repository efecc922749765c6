"""The zoo computes what the published networks compute: the top-1 of pretrained weights on the whole test sets.

    python benchmarks/pretrained.py --data FOLDER --weights FOLDER

--data: CIFAR-10 and CIFAR-100 as their sites distribute them. --weights: the safetensors files of ROWS. Ends with
status 1 if a network is more than 0.01 points away from its published figure. Nothing is chosen here, so the test set
may be used.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import espalier as es
from espalier.train import build, evaluate, load_data, load_weights
from espalier.train.split import Data, Norm

RESULTS = Path(__file__).parent / "results" / "pretrained.json"
TOLERANCE = 0.01  # points: one image of 10,000

IMAGENET: Norm = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALVES: Norm = ((0.5,) * 3, (0.5,) * 3)
CIFAR100: Norm = ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))


@dataclass(frozen=True)
class Row:
    """A weights file: its network in the zoo, its data set and normalisation, its published top-1 in per cent."""

    file: str
    model: str
    data: str
    norm: Norm
    top1: float
    source: str
    options: dict[str, Any] = field(default_factory=dict)
    thin: bool = False  # the widths of the blocks are in the file


AKAMASTER, DISTILLER = "akamaster/pytorch_resnet_cifar10", "IntelLabs/distiller"
ROWS = (
    Row("cifar10_resnet20", "resnet20", "cifar10", IMAGENET, 91.73, AKAMASTER),
    Row("cifar10_resnet32", "resnet32", "cifar10", IMAGENET, 92.63, AKAMASTER),
    Row("cifar10_resnet44", "resnet44", "cifar10", IMAGENET, 93.10, AKAMASTER),
    Row("cifar10_resnet56", "resnet56", "cifar10", IMAGENET, 93.39, AKAMASTER),
    Row("cifar10_resnet20_distiller", "resnet20", "cifar10", HALVES, 91.71, DISTILLER, {"shortcut": "B"}),
    Row("cifar10_resnet20_distiller_thin", "resnet20", "cifar10", HALVES, 91.54, DISTILLER, {"shortcut": "B"}, True),
    Row("cifar100_resnet56_bottleneck", "resnet56_bottleneck_cifar", "cifar100", CIFAR100, 66.79, "d-becking/nncodec2"),
)


def measure(row: Row, data: Data, weights: Path) -> dict[str, Any]:
    """The top-1 of a row on the test set, beside what was published."""
    path = weights / f"{row.file}.safetensors"
    model = build(row.model, **row.options, **({"widths": path} if row.thin else {}))
    load_weights(model, path)
    start = time.perf_counter()
    score = evaluate(model, data.normalised_by(*row.norm).test)
    made = {
        "weights": row.file,
        "source": row.source,
        "model": row.model,
        "data": f"{row.data} test",
        "images": score.n,
        "parameters": sum(p.numel() for p in model.parameters()),
        "top1": round(100 * score.accuracy, 4),
        "published_top1": row.top1,
        "loss": score.loss,
        "seconds": round(time.perf_counter() - start, 2),
    }
    print(f"{row.file:34s} {made['top1']:6.2f} %  published {row.top1:.2f} %  {made['parameters']:9,} parameters")
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data", help="folder of CIFAR-10 and CIFAR-100")
    parser.add_argument("--weights", default="weights", help="folder of the safetensors files")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    loaded = {name: load_data(name, arguments.data) for name in dict.fromkeys(row.data for row in ROWS)}
    rows = [measure(row, loaded[row.data], Path(arguments.weights)) for row in ROWS]
    report = {
        "claim": "pretrained weights reach their published top-1 in the networks of the zoo",
        "rows": rows,
        "machine": es.machine(),
        "threads": arguments.threads,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    wrong = [row["weights"] for row in rows if abs(row["top1"] - row["published_top1"]) > TOLERANCE + 1e-9]
    if wrong:
        print(f"not as published: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
