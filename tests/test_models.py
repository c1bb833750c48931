import pytest
import torch
import torchvision

from brfx.errors import BrfxError
from brfx.models import build_model, model_names, published_weights


def test_names_are_torchvisions_float_models_and_the_cifar_resnets():
    names = model_names()
    assert {"resnet20", "resnet32", "resnet44", "resnet56", "resnet110"} <= set(names)
    float_names = [n for n in torchvision.models.list_models() if not n.startswith("quantized_")]
    assert len(names) == len(float_names) + 5
    assert set(float_names) < set(names)


@pytest.mark.parametrize(("depth", "parameters"), [(20, 269_722), (32, 464_154), (44, 658_586), (56, 853_018)])
def test_cifar_resnets_have_the_published_size(depth, parameters):
    """He et al., table 6 (0.27, 0.46, 0.66, 0.85 M), exact for option A."""
    model = build_model(f"resnet{depth}")
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.eval()(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_num_classes_and_stem():
    model = build_model("resnet18", 7, cifar_stem=True)
    assert model.conv1.stride == (1, 1)
    assert model.eval()(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    with pytest.raises(BrfxError, match="has none"):
        build_model("vgg11", cifar_stem=True)


def test_unknown_names_bring_the_nearest():
    with pytest.raises(BrfxError, match=r"resnet_20.*did you mean .*resnet20"):
        build_model("resnet_20")
    with pytest.raises(BrfxError, match="unknown model"):
        build_model("quantized_resnet18")


def test_a_file_of_the_users_own(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("from torch import nn\ndef make(num_classes=3): return nn.Linear(2, num_classes)\nnumber = 3\n")
    assert build_model(f"{file}:make", 5).out_features == 5
    assert build_model(f"{file}:make").out_features == 3
    for name, message in [
        (f"{file}:absent", "no function 'absent'"),
        (f"{file}:number", "no function 'number'"),
        (str(file), "say which function"),
        (f"{tmp_path}/none.py:make", "no such file"),
    ]:
        with pytest.raises(BrfxError, match=message):
            build_model(name)


def test_a_factory_is_called_as_it_is_where_it_takes_no_number_of_classes(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from torch import nn\n"
        "def plain(): return nn.Linear(2, 3)\n"
        "def anything(**settings): return nn.Linear(2, settings['num_classes'])\n"
        "def wide(width, num_classes=3): return nn.Linear(width, num_classes)\n"
    )
    assert build_model(f"{file}:plain", 5).out_features == 3
    assert build_model(f"{file}:anything", 5).out_features == 5
    with pytest.raises(BrfxError, match="wide takes width: give a function that is called with no argument"):
        build_model(f"{file}:wide", 5)


def test_a_package_that_a_file_misses_is_named(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("import no_such_package.inner\n")
    with pytest.raises(BrfxError, match=r"mine\.py: imports no_such_package, which is not installed here"):
        build_model(f"{file}:make")


def test_published_weights_are_named_and_not_downloaded(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    found = published_weights("resnet18")
    assert found.url == "https://download.pytorch.org/models/resnet18-f37072fd.pth"
    assert found.path == tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    model = build_model("resnet18")
    assert found.normalization(model) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert published_weights("googlenet").normalization(build_model("googlenet")) == ((0.5,) * 3, (0.5,) * 3)
    assert published_weights("ssdlite320_mobilenet_v3_large").mean is None  # the detectors normalize images themselves
    assert published_weights("resnet20") is None and published_weights("mine.py:make") is None
    assert not list(tmp_path.iterdir())
