"""What users do to a network besides training it: its zeros stay zeros, and exactly those."""

import copy
import io
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from espalier.errors import MethodError
from espalier.graph import shrink
from espalier.methods import Run, start
from espalier.sparsity import Plan, scheme
from tests.methods.networks import EXAMPLE, Net, batch

SCHEMES = {
    "conv1": scheme("filter", 0.5),
    "conv2": scheme("block_punched", 0.3, m=4, n=4),
    "fc": scheme("weight+unify", 0.5),
}


def begin(model: nn.Module, schemes: dict | None = None) -> Run:
    return start(model, Plan.of(schemes or SCHEMES, unfit="dense"), "admm", EXAMPLE, steps=8)


def train(model: nn.Module, after: Callable[[], None], steps: int = 8, weights: nn.Module | None = None) -> None:
    optimizer = torch.optim.SGD((weights or model).parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    model.train()
    for step in range(steps):
        x, y = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        after()


def finished() -> tuple[Net, Run]:
    torch.manual_seed(0)
    model = Net()
    run = begin(model)
    train(model, run.step)
    run.finish()
    return model, run


def zeros(module: nn.Module) -> dict[str, Tensor]:
    return {name.replace("_orig_mod.", ""): p == 0 for name, p in module.named_parameters() if p.ndim > 1}


def check_held(module: nn.Module, run: Run) -> None:
    """Every pruned weight is zero, and that means something: a good part is pruned."""
    found = {name.removeprefix("module."): value for name, value in zeros(module).items()}
    for site, mask in run.masks.items():
        assert found[site][~mask].all(), f"{site}: a pruned weight came back"
    assert sum(int(m.sum()) for m in run.masks.values()) < 0.6 * sum(m.numel() for m in run.masks.values())


def test_training_without_the_run_would_be_noticed() -> None:
    model, run = finished()
    check_held(model, run)
    train(model, lambda: None)  # momentum and gradients bring them back
    with pytest.raises(AssertionError, match="came back"):
        check_held(model, run)


def test_clipped_and_accumulated_gradients() -> None:
    model, run = finished()
    before = model.conv2.weight.detach().clone()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(4):
        for _ in range(3):
            x, y = torch.randn(8, 2, 6, 6), torch.randint(0, 4, (8,))
            (F.cross_entropy(model(x), y) / 3).backward()
            run.add_penalty_gradients()  # nothing any more, once finished
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
        run.step()
        check_held(model, run)
    assert not torch.equal(model.conv2.weight, before)


def test_penalty_gradients_are_the_gradients_of_the_penalty() -> None:
    torch.manual_seed(0)
    models = [Net(), Net()]
    models[1].load_state_dict(models[0].state_dict())
    runs = [begin(model) for model in models]
    x, y = torch.randn(16, 2, 6, 6), torch.randint(0, 4, (16,))
    with torch.no_grad():  # away from where the run began, so that it pulls
        for model in models:
            for p in model.parameters():
                p.mul_(1.5)
    (F.cross_entropy(models[0](x), y) + runs[0].penalty()).backward()
    F.cross_entropy(models[1](x), y).backward()
    unpulled = models[1].conv2.weight.grad.clone()
    with torch.no_grad():  # as an optimizer's hook may be called
        assert runs[1].add_penalty_gradients() == pytest.approx(float(runs[0].penalty()))
    for a, b in zip(models[0].parameters(), models[1].parameters()):
        torch.testing.assert_close(a.grad, b.grad)
    assert not torch.equal(unpulled, models[1].conv2.weight.grad)


@pytest.mark.parametrize("when", ["begun before", "begun after"])
def test_an_average_of_the_weights(when: str) -> None:
    torch.manual_seed(0)
    model = Net()
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    run = begin(model)

    def after() -> None:
        run.step()
        averaged.update_parameters(model)

    train(model, after)
    run.finish()
    if when == "begun before":  # it remembers weights of before
        with pytest.raises(AssertionError, match="came back"):
            check_held(averaged.module, run)
        run.hold(averaged.module)
    else:
        averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    train(model, after)
    check_held(averaged.module, run)
    run.hold(averaged.module)  # the average of tied magnitudes is tied; its norms are buried
    small = shrink(averaged.module.eval(), EXAMPLE)
    x = torch.randn(3, 2, 6, 6)
    torch.testing.assert_close(small(x), averaged.module(x), rtol=1e-4, atol=1e-4)
    assert small.conv1.weight.shape[0] <= 4
    with pytest.raises(MethodError, match=r"pass the module itself, such as ema\.module"):
        run.hold(averaged)


def test_hold_before_the_end_is_refused() -> None:
    model = Net()
    with pytest.raises(MethodError, match="finish"):
        begin(model).hold(model)


def test_deep_copies_and_state_dicts() -> None:
    model, run = finished()
    twin = copy.deepcopy(model)
    check_held(twin, run)
    train(twin, lambda: run.hold(twin))
    check_held(twin, run)
    assert not torch.equal(twin.conv2.weight, model.conv2.weight)
    saved = io.BytesIO()
    torch.save([twin.state_dict(), run.state_dict()], saved)
    saved.seek(0)
    state, run_state = torch.load(saved, weights_only=True)
    fresh = Net()
    again = begin(fresh)
    fresh.load_state_dict(state)
    again.load_state_dict(run_state)
    train(fresh, again.step)
    check_held(fresh, again)
    assert all(torch.equal(mask, again.masks[site]) for site, mask in run.masks.items())


@pytest.mark.parametrize("started_on", ["the module", "the compiled one"])
def test_a_compiled_module(started_on: str) -> None:
    torch.manual_seed(0)
    model, plain = Net(), Net()
    plain.load_state_dict(model.state_dict())
    compiled = torch.compile(model, backend="aot_eager")
    if started_on == "the module":
        run = begin(model)
    else:
        run = begin(compiled, {f"_orig_mod.{name}": row for name, row in SCHEMES.items()})
    eager = begin(plain)
    for module, of in ((compiled, run), (plain, eager)):
        train(module, of.step)
        of.finish()
        train(module, of.step)
    for a, b in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    eager.hold(model)  # names with and without the wrapper are the same
    run.hold(plain)
    check_held(model, eager)


def test_training_for_quantisation_that_follows() -> None:
    from torch.ao import quantization as quant  # deprecated for torchao, and what PyTorch comes with

    model, run = finished()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.train()
        wrapped = nn.Sequential(quant.QuantStub(), model, quant.DeQuantStub())
        wrapped.qconfig = quant.get_default_qat_qconfig("x86")
        quant.prepare_qat(wrapped, inplace=True)
        train(wrapped, lambda: run.hold(wrapped[1]))
        check_held(wrapped[1], run)
        for site, mask in run.masks.items():
            layer = wrapped[1].get_submodule(site.rpartition(".")[0])
            seen = layer.weight_fake_quant(layer.weight)
            assert not seen[~mask].any(), f"{site}: a zero is not a zero for the quantised network"
            assert seen[mask].any() and not torch.equal(seen, layer.weight)
        levels = quant.convert(wrapped.eval())[1].conv2.weight()
    assert not levels.int_repr()[~run.masks["conv2.weight"]].any()
