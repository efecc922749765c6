"""The zoo: every network builds, has the published number of parameters, runs, exports, and takes weights."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from espalier.errors import DataError, UnknownNameError
from espalier.train import ZOO, build, example_shape, inner_widths, load_weights, read_weights

# Published numbers (torchvision's tables, the ResNet and DenseNet papers, the weights' own sources): not read from ZOO.
PARAMETERS = {
    "lenet5": 431_080,
    "resnet20": 269_722,
    "resnet32": 464_154,
    "resnet44": 658_586,
    "resnet56": 853_018,
    "resnet20b": 272_474,
    "resnet56_bottleneck_cifar": 614_452,
    "resnet18": 11_689_512,
    "resnet50": 25_557_032,
    "vgg16": 138_357_544,
    "vgg16_bn": 138_365_992,
    "mobilenetv2": 3_504_872,
    "alexnet": 61_100_840,
    "squeezenet10": 1_248_424,
    "densenet40": 1_019_722,
}
# One of each kind: deeper ones of the same blocks, and those of over 50 million weights, would only take longer.
EXPORTED = sorted(set(ZOO) - {"resnet32", "resnet44", "resnet56", "resnet18", "alexnet", "vgg16", "vgg16_bn"})


def on_meta(name: str, **options: Any) -> nn.Module:
    with torch.device("meta"):
        return build(name, **options)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", ZOO)
def test_parameters(name: str) -> None:
    assert parameters(on_meta(name)) == ZOO[name].parameters == PARAMETERS.get(name, ZOO[name].parameters)


@pytest.mark.parametrize("name", ZOO)
def test_outputs_have_a_row_a_sample_and_a_column_a_class(name: str) -> None:
    for classes in (None, 7):
        model = on_meta(name, classes=classes)
        out = model(torch.empty(2, *example_shape(name), device="meta"))
        assert out.shape == (2, classes or ZOO[name].classes)


@pytest.mark.parametrize("name", EXPORTED)
def test_exports(name: str) -> None:
    model = build(name).eval()
    channels, height, width = example_shape(name)
    x = torch.randn(2, channels, min(height, 64), min(width, 64))
    exported = torch.export.export(model, (x,)).module()
    with torch.inference_mode():
        assert torch.equal(exported(x), model(x))


def test_random_weights_come_from_the_seed_and_have_a_sane_scale() -> None:
    torch.manual_seed(0)
    first, second = build("resnet20").train(), build("resnet20")
    torch.manual_seed(0)
    again = build("resnet20")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters()))
    assert not torch.equal(first.conv1.weight, second.conv1.weight)
    assert 0.05 < float(first(torch.randn(16, 3, 32, 32)).detach().std()) < 20


@pytest.mark.parametrize(
    "options,names",
    [
        ({}, {"linear.weight"}),
        ({"shortcut": "B"}, {"fc.weight", "layer2.0.downsample.0.weight", "layer3.0.downsample.1.running_mean"}),
        ({"shortcut": "B", "classifier": "linear"}, {"linear.weight", "layer2.0.downsample.0.weight"}),
    ],
)
def test_names_of_cifar_resnets(options: dict[str, Any], names: set[str]) -> None:
    model = on_meta("resnet20", **options)
    assert names | {"conv1.weight", "bn1.weight", "layer1.2.bn2.bias"} <= set(model.state_dict())
    assert ("layer2.0.downsample.0.weight" in model.state_dict()) == (options.get("shortcut") == "B")


def test_option_a_is_every_other_pixel_between_zero_channels() -> None:
    shortcut = build("resnet20").layer2[0].downsample
    x = torch.randn(2, 16, 5, 6)
    y = shortcut(x)
    assert y.shape == (2, 32, 3, 3)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert not y[:, :8].any() and not y[:, 24:].any()


def test_tensorflow_padding_moves_the_windows_by_a_pixel() -> None:
    ours, theirs = on_meta("mobilenetv2", tensorflow=True, folded=True), on_meta("mobilenetv2", folded=True)
    assert set(ours.state_dict()) == set(theirs.state_dict())
    assert "features.0.0.bias" in ours.state_dict() and "features.0.1.weight" not in ours.state_dict()
    stem = build("mobilenetv2", tensorflow=True, folded=True).features[0]
    x = torch.randn(1, 3, 8, 8)
    padded = nn.functional.pad(x, (0, 1, 0, 1))
    want = nn.functional.conv2d(padded, stem[1].weight, stem[1].bias, stride=2).clamp(0, 6)
    torch.testing.assert_close(stem(x), want)


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(UnknownNameError, match=r"did you mean 'resnet\d+'.*lenet5"):
        build("resnet2")
    with pytest.raises(UnknownNameError, match="Known: A, B"):
        build("resnet20", shortcut="C")
    with pytest.raises(DataError, match=r"unexpected keyword argument 'width'.*It takes classes"):
        build("resnet20", width=3)
    with pytest.raises(DataError, match="9 blocks, but there are 3 widths"):
        build("resnet20", widths=[1, 2, 3])


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "zoo_test_nets.py").write_text(
        "from torch import nn\n"
        "def make(classes=3, width=4): return nn.Linear(width, classes)\n"
        "def plain(): return nn.Linear(2, 2)\n"
        "def wrong(): return 5\n"
        "make.shape = (1, 2, 2)\n"
        "number = 5\n"
    )
    yield
    sys.modules.pop("zoo_test_nets", None)


@pytest.mark.usefixtures("nets")
def test_factories_in_the_current_directory() -> None:
    assert build("zoo_test_nets:make").out_features == 3
    assert build("zoo_test_nets:make", classes=5, width=2).weight.shape == (5, 2)
    assert build("zoo_test_nets:plain", classes=5).out_features == 2  # takes no `classes`, so is given none
    assert example_shape("zoo_test_nets:make") == (1, 2, 2)
    for name, words in (
        ("zoo_test_nets:absent", "no attribute 'absent'"),
        ("no_such_module:make", "No module named"),
        (":make", "Write package.module:factory"),
        ("zoo_test_nets:number", "is a int"),
        ("zoo_test_nets:wrong", "made a int"),
    ):
        with pytest.raises(DataError, match=words):
            build(name)
    with pytest.raises(DataError, match=r"set plain.shape = "):
        example_shape("zoo_test_nets:plain")


# -- weights ---------------------------------------------------------------------------------------


def test_weights_come_back(tmp_path: Path) -> None:
    path, model, other = tmp_path / "w.safetensors", build("resnet20"), build("resnet20")
    state = {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    save_file(state, path)
    load_weights(other, path)
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in state.items())


def test_weights_that_do_not_fit_are_named_and_leave_the_model_alone(tmp_path: Path) -> None:
    path, model = tmp_path / "w.safetensors", build("lenet_digits")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    given = {k: torch.ones_like(v) for k, v in before.items() if k != "fc1.bias"}
    save_file({**given, "fc2.weight": torch.zeros(3, 256), "extra": torch.zeros(1)}, path)
    with pytest.raises(DataError) as caught:
        load_weights(model, path)
    for words in (
        "missing: fc1.bias",
        "left over: extra",
        "fc2.weight: [3, 256] in the file, [10, 256]",
        "w.safetensors",
    ):
        assert words in str(caught.value)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_packed_weights(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    q, scale = torch.randint(-127, 128, (4, 3, 3, 3), dtype=torch.int8), torch.rand(4)
    codes, book = torch.randint(0, 5, (6, 2), dtype=torch.uint8), torch.randn(5)
    packed = {"a.weight.q": q, "a.weight.scale": scale, "b.weight.codes": codes, "b.weight.codebook": book}
    plain = {"c.scale": torch.ones(2)}  # a tensor that is just called so
    save_file({**packed, **plain}, path)
    read = read_weights(path)
    assert set(read) == {"a.weight", "b.weight", "c.scale"}
    assert torch.equal(read["a.weight"], q.float() * scale[:, None, None, None])
    assert torch.equal(read["b.weight"], book[codes.long()])
    for broken, words in (
        ({"a.weight.q": q}, "a.weight.scale is missing"),
        ({"a.weight.q": q, "a.weight.scale": torch.rand(3)}, "3 scales for 4 filters"),
        ({"b.weight.codes": codes + 9, "b.weight.codebook": book}, "only 5 in its codebook"),
    ):
        save_file(broken, path)
        with pytest.raises(DataError, match=words):
            read_weights(path)


def test_files_that_are_no_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    with pytest.raises(DataError, match="cannot be read"):
        load_weights(build("lenet5"), path)
    path.write_bytes(b"\x80\x02}q\x00.")
    for read in (read_weights, inner_widths):
        with pytest.raises(DataError, match="cannot be read as safetensors"):
            read(path)


def test_a_narrowed_network_takes_its_widths_from_its_file(tmp_path: Path) -> None:
    path, widths = tmp_path / "thin.safetensors", (11, 8, 9, 22, 20, 32, 52, 56, 64)
    narrow = build("resnet20", shortcut="B", widths=widths)
    assert parameters(narrow) == 235_774  # the number of the published file of these widths
    save_file(narrow.state_dict(), path)
    assert inner_widths(path) == widths
    again = build("resnet20b", widths=path)
    load_weights(again, path)
    with torch.inference_mode():
        x = torch.randn(2, 3, 32, 32)
        assert torch.equal(again.eval()(x), narrow.eval()(x))
    with pytest.raises(DataError, match="does not fit"):
        load_weights(build("resnet20b"), path)
