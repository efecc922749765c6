"""Purification and unused path removal after every method: what was gone stays gone, and training goes on."""

import copy

import pytest
import torch
from tests.conformance.test_methods import EXAMPLE, STEPS, begin, train
from torch.nn import functional as F

from espalier.graph import capture, shrink
from espalier.methods import METHODS, purify
from espalier.store import load, save
from espalier.train.score import Score

SITES = ("conv1", "conv2", "conv3")


@pytest.mark.parametrize("name", ["filter+column", "micro_block+unify"])
@pytest.mark.parametrize("method", METHODS)
def test_after_every_method(method: str, name: str, tmp_path) -> None:
    model, run, optimizer = begin(method, name, sites=SITES)
    train(model, run, optimizer, 0, STEPS)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(200, 2, 6, 6, generator=generator), torch.randint(0, 4, (200,), generator=generator)

    def evaluate() -> Score:
        with torch.no_grad():
            out = model.eval()(x)
        return Score(float((out.argmax(1) == y).float().mean()), float(F.cross_entropy(out, y)), len(y))

    masks, first = {site: mask.clone() for site, mask in run.masks.items()}, evaluate()
    report = purify(run, evaluate, 8.0, errors=0.0, max_evaluations=60)
    assert report.after >= report.before - 8.0 and report.before == 100 * first.accuracy
    assert report.removed, "nothing was purified with 8 points to spend"
    for site, mask in run.masks.items():
        assert not (mask & ~masks[site]).any(), "what was gone came back"
        kept = int(masks[site].sum()) - report.removed.get(site, 0)
        assert int(mask.sum()) == kept, "what is reported is not what was removed"
    train(model, run, optimizer, STEPS, STEPS + 3)  # and retrained in what is left
    for target in run.targets:
        weight = target.weight.detach()
        assert not weight[~run.masks[target.site]].any()
        torch.testing.assert_close(run._frozen[target.site].apply(weight), weight)  # ties and all
    small = shrink(copy.deepcopy(model).eval(), EXAMPLE)
    torch.testing.assert_close(small(x), model.eval()(x), rtol=1e-4, atol=1e-4)
    save(small, EXAMPLE, tmp_path / "m.esp")
    torch.testing.assert_close(load(tmp_path / "m.esp")(x), model(x).detach(), rtol=1e-4, atol=1e-4)
    assert capture(small, EXAMPLE).sites()
