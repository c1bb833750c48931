"""The integer form against the trained model, layer by layer, and what it is made of."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models.video.swin_transformer import SwinTransformer3d
from torchvision.ops import StochasticDepth

import brfx
from brfx.errors import NotCalibratedError
from brfx.export.attention import as_matmul
from brfx.export.integer import integer_model
from brfx.export.layers import IntegerConv, IntegerProduct, Storage
from brfx.export.parity import compare_codes
from brfx.export.qonnx import _with_quant
from brfx.models import build_model
from brfx.nn import AlignedAdd, LSQActivationQuantizer, StreamAdd, StreamQuantizer
from brfx.train import reestimate_batch_norm


class Mixed(nn.Module):
    """Batch norm, ReLU6, a residual add, a projection, max-pooling between a quantizer and its layer, a linear."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.a, self.bn_a = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.b, self.bn_b = nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=2), nn.BatchNorm2d(16)
        self.project, self.head = nn.Conv2d(8, 16, 1, stride=2), nn.Linear(16, 4)

    def forward(self, x):
        x = F.max_pool2d(F.relu6(self.bn(self.stem(x))), 2)
        x = F.relu(self.bn_a(self.a(x)) + x)
        x = F.relu(self.bn_b(self.b(x)) + self.project(x))
        return self.head(x.mean((2, 3)))


def trained(model, images, **config):
    qmodel = brfx.prepare_qat(model, brfx.QATConfig(**config))
    brfx.calibrate(qmodel, [images], batch_statistics=True)
    reestimate_batch_norm(qmodel, [images])
    return qmodel.eval()


@pytest.fixture
def images():
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("settings", [{}, {"per_channel": True}, {"weight_grid": "symmetric"}, {"stream_bits": 1}])
def test_codes_are_the_trained_model_s_but_for_rounding_at_borders(images, bits, settings):
    if bits == 8 and "weight_grid" in settings:
        pytest.skip("no symmetric grid of 8 bits")
    torch.manual_seed(bits)
    qmodel = trained(Mixed(), images, bits=bits, **settings)
    integer = integer_model(qmodel)
    assert sorted(integer.layers) == ["a", "b", "head", "project", "stem"] and not integer.float_layers
    sites = compare_codes(qmodel, integer, images)
    assert len(sites) >= 4
    codes, flipped = sum(site.codes for site in sites), sum(site.flipped for site in sites)
    assert all(site.largest <= 1 for site in sites)
    assert flipped <= 0.005 * codes, sites


def test_the_model_is_left_as_it_was(images):
    qmodel = trained(Mixed(), images)
    before, keys = qmodel(images), list(qmodel.state_dict())
    integer_model(qmodel)
    assert torch.equal(qmodel(images), before) and list(qmodel.state_dict()) == keys


@pytest.mark.parametrize("input_bits", [2, 4, 8])
def test_pairs_of_products_fit_16_bits(input_bits):
    """Of stored codes, zero point included: CPUs without VNNI saturate such pairs."""
    qmodel = brfx.prepare_qat(build_model("resnet20", 10), brfx.QATConfig(input_bits=input_bits))
    brfx.calibrate(qmodel, [torch.randn(2, 3, 32, 32)])
    layers = [m for m in integer_model(qmodel.eval()).layers.values() if isinstance(m, IntegerConv)]
    assert len(layers) >= 19
    for layer in layers:
        assert 2 * layer.x.high * int(layer.weight.int().abs().max()) < 1 << 15


def test_weights_are_codes_times_headroom_and_sums_are_bounded(images):
    integer = integer_model(trained(Mixed(), images))
    conv = integer.layers["a"]
    assert isinstance(conv, IntegerConv) and conv.headroom >= 63 and conv.weight.dtype == torch.int8
    assert set(conv.weight.unique().tolist()) <= {k * conv.headroom for k in (-2, -1, 0, 1)}
    seen = F.conv2d(torch.full((1, 8, 9, 9), 3.0), conv.weight.float(), conv.bias.float(), padding=1).abs().max()
    assert seen <= conv.largest_sum <= integer.largest_sum < 2**31


def test_symmetric_weights_are_odd_integers_stored_in_their_own_bits(images):
    layers = integer_model(trained(Mixed(), images, weight_grid="symmetric")).layers
    for layer in layers.values():
        integers = layer.weight // layer.headroom
        assert set(integers.unique().tolist()) <= {-3, -1, 1, 3} and layer.storage == Storage(2, odd=True)
        assert torch.equal(2 * layer.storage.stored(integers) + 1, integers)
    signs = integer_model(trained(Mixed(), images, weight_bits=1)).layers.values()
    assert all(layer.storage == Storage(1) for layer in signs)


@pytest.mark.parametrize("weight_grid", ["signed", "symmetric"])
def test_a_channel_that_batch_norm_switches_off_is_its_bias(images, weight_grid):
    model = Mixed()
    with torch.no_grad():
        model.bn.weight[2], model.bn.bias[2] = 0.0, 0.7
    qmodel = trained(model, images, weight_grid=weight_grid)
    integer = integer_model(qmodel)
    assert all(site.largest <= 1 for site in compare_codes(qmodel, integer, images))
    assert (integer.layers["stem"].weight[2] == 0).all()
    assert integer.layers["stem"].storage == (Storage(2) if weight_grid == "signed" else Storage(3))


def test_each_call_of_a_stream_s_quantizer_is_compared(images):
    qmodel = trained(build_model("resnet20"), images)
    sites = compare_codes(qmodel, integer_model(qmodel), images)
    (stream,) = (name for name, module in qmodel.named_modules() if isinstance(module, StreamQuantizer))
    of_stream = [site for site in sites if site.site.partition("#")[0] == stream]
    assert [site.site for site in of_stream] == [stream, *(f"{stream}#{call}" for call in range(2, 11))]
    assert all(site.largest <= 1 for site in of_stream) and sum(site.codes for site in of_stream) > 20_000


def test_paper_placement_says_what_stays_float(images):
    integer = integer_model(trained(Mixed(), images, placement="paper"))
    assert "placement='deploy'" in integer.float_layers["stem"]


def test_uncalibrated(images):
    with pytest.raises(NotCalibratedError):
        integer_model(brfx.prepare_qat(Mixed()))


@pytest.mark.parametrize(("stream_bits", "share"), [(4, 0.0005), (8, 0.001)])  # finer codes have more borders
def test_few_codes_of_the_real_network_flip_before_its_biases_are_snapped(
    real_checkpoint, cifar10_test, stream_bits, share
):
    from brfx.data import Preprocessing
    from brfx.io.float_checkpoint import load_float

    model = build_model("resnet20", 10)
    load_float(model, real_checkpoint)
    images = Preprocessing(32).normalize(cifar10_test.images[:128])
    qmodel = trained(model, images, bits=4, stream_bits=stream_bits)
    sites = compare_codes(qmodel, integer_model(qmodel), images)
    assert sum(site.flipped for site in sites) < share * sum(site.codes for site in sites)


def test_with_biases_snapped_no_code_of_the_real_network_flips(real_checkpoint, cifar10_test):
    from brfx.data import Preprocessing
    from brfx.io.float_checkpoint import load_float

    model = build_model("resnet20", 10)
    load_float(model, real_checkpoint)
    images = Preprocessing(32).normalize(cifar10_test.images[:128])
    qmodel = trained(model, images)
    before = integer_model(qmodel)
    biases = {name: parameter.detach().clone() for name, parameter in qmodel.named_parameters() if "bias" in name}
    brfx.snap_biases(qmodel)
    after = integer_model(qmodel)
    assert sum(site.flipped for site in compare_codes(qmodel, after, images)) == 0
    assert torch.equal(after.model(images).argmax(1), qmodel(images).argmax(1))
    assert all(torch.equal(layer.bias, before.layers[name].bias) for name, layer in after.layers.items())
    for name, layer in after.layers.items():
        if isinstance(layer, IntegerConv):
            norm = name.replace("conv", "bn") + ".bias"
            moved = qmodel.get_parameter(norm) - biases[norm]
            assert moved.abs().max() > 0 and (moved.abs() <= 0.501 * layer.weight_scale.abs() * layer.x.scale).all()


def test_a_bias_without_a_batch_norm_is_snapped_and_a_shared_one_left(images):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), norm := nn.BatchNorm2d(4), nn.ReLU())
    model.extend([nn.Conv2d(4, 4, 1), norm, nn.ReLU()])
    qmodel = trained(model, images)
    assert set(integer_model(qmodel).biases) == {"0.bias"}
    brfx.snap_biases(qmodel)
    layer = integer_model(qmodel).layers["0"]
    torch.testing.assert_close(layer.bias * layer.weight_scale * layer.x.scale, qmodel.get_parameter("0.bias"))


def test_what_is_an_identity_in_eval_stands_in_no_layer_s_way(images):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        StochasticDepth(0.5, "row"),
        nn.Dropout(0.5),
        nn.ReLU(),
        nn.Conv2d(8, 4, 3),
    )
    integer = integer_model(trained(model, images))
    assert list(integer.layers) == ["0", "5"] and not integer.float_layers


class Joined(nn.Module):
    """Two convolutions that one quantizer takes, behind ReLUs, a concatenation, a shuffle and max-pooling."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.bn = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.relu_a, self.relu_b, self.pool = nn.ReLU(), nn.ReLU(), nn.MaxPool2d(2)
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x):
        x = torch.cat([self.relu_a(self.a(x)), self.relu_b(self.bn(self.b(x)))], 1)
        x = x.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2)
        return self.last(self.pool(x))


def test_the_parts_of_a_joined_value_are_made_on_its_grid(images):
    qmodel = trained(Joined(), images)
    grids = {name for name, module in qmodel.named_modules() if isinstance(module, LSQActivationQuantizer)}
    assert grids == {"a_input", "last_input", "last_output"}  # none of the parts has one of its own
    integer = integer_model(qmodel)
    assert set(integer.layers) == {"a", "b", "last"} and not integer.float_layers
    assert integer.layers["a"].y == integer.layers["b"].y == integer.layers["last"].x
    sites = compare_codes(qmodel, integer, images)
    assert [site.site for site in sites] == ["a_input", "last_input", "last_output"]
    assert [site.flipped for site in sites[:2]] == [0, 0] and sites[2].largest <= 1


def products(integer):
    return sum(isinstance(module, IntegerProduct) for module in integer.model.modules())


class Scaled(nn.Module):
    """Codes that a constant scales on their way into a layer, and into a matrix product."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.tokens = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 12, 3), nn.Flatten(2)

    def forward(self, x):
        x = self.tokens(self.second(0.3 * self.first(x).relu())).transpose(1, 2)
        q, k, v = x.chunk(3, -1)
        return torch.bmm(torch.matmul(q / 2, k.transpose(-2, -1)).softmax(-1), v)


def test_a_constant_factor_scales_the_grid_and_products_of_codes_are_integers(images):
    qmodel = trained(Scaled(), images, bits=4)
    integer = integer_model(qmodel)
    assert set(integer.layers) == {"first", "second"} and not integer.float_layers
    assert integer.layers["second"].x.scale == pytest.approx(0.3 * integer.layers["first"].y.scale)
    targets = [node.target for node in integer.model.graph.nodes]
    assert products(integer) == 2 and not {torch.matmul, torch.bmm} & set(targets)
    brfx.snap_biases(qmodel)
    torch.testing.assert_close(integer_model(qmodel).model(images), qmodel(images))


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("settings", [{}, {"kdim": 12, "vdim": 10}, {"add_bias_kv": True, "bias": False}])
def test_multi_head_attention_is_integers(settings, per_channel):
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 4, batch_first=True, **settings)

        def forward(self, q, k, v):
            return self.attention(q, k, v)[0]

    torch.manual_seed(0)
    inputs = (
        torch.randn(4, 7, 16),
        torch.randn(4, 5, settings.get("kdim", 16)),
        torch.randn(4, 5, settings.get("vdim", 16)),
    )
    qmodel = brfx.prepare_qat(Tokens(), brfx.QATConfig(bits=2, per_channel=per_channel)).eval()
    brfx.calibrate(qmodel, [inputs], forward=lambda model, batch: model(*batch))
    integer = integer_model(qmodel)
    assert set(integer.layers) == {f"attention.{part}" for part in ("q", "k", "v", "out")} and not integer.float_layers
    assert all(layer.weight.dtype == torch.int8 for layer in integer.layers.values())
    torch.testing.assert_close(integer.model(*inputs), qmodel(*inputs))
    left = {name for name, _ in integer.model.named_parameters()}
    assert left == ({"attention.bias_k", "attention.bias_v"} if "add_bias_kv" in settings else set())


def test_attention_without_codes_stays_float_and_is_named():
    model = nn.TransformerEncoderLayer(16, 4, 16, batch_first=True)
    qmodel = brfx.prepare_qat(model, brfx.QATConfig(weight_bits=2, act_bits=32)).eval()
    brfx.calibrate(qmodel, [torch.randn(2, 5, 16)])
    assert "self_attn" in integer_model(qmodel).float_layers


def test_a_function_that_changes_a_list_it_is_given_can_be_compared():
    torch.manual_seed(0)
    model = SwinTransformer3d([2, 4, 4], 16, [2], [2], [8, 4, 4], num_classes=5)  # a window larger than the video
    video = torch.randn(2, 3, 4, 32, 32)
    qmodel = brfx.prepare_qat(model).eval()
    brfx.calibrate(qmodel, [video], start="lsq")
    integer = integer_model(qmodel)
    assert compare_codes(qmodel, integer, video) and not integer.float_layers
    torch.testing.assert_close(integer.model(video), qmodel(video))


@pytest.mark.parametrize(
    "equation", ["b i d, b j d -> b i j", "bghij,bghjd->bghid", "id,jd->ji", "bid,bjd->jib", "bdi,bjd->bij"]
)
def test_an_einsum_is_a_product_of_matrices(equation):
    letters, (left, right) = dict(zip("bghijd", (2, 3, 2, 4, 5, 6), strict=True)), equation.split("->")[0].split(",")
    a, b = (torch.randn([letters[c] for c in term if c != " "]) for term in (left, right))
    forms = as_matmul(equation)
    assert forms is not None
    torch.testing.assert_close(
        (a.permute(forms[0]) @ b.permute(forms[1])).permute(forms[2]), torch.einsum(equation, a, b)
    )


@pytest.mark.parametrize("equation", ["bi,bi->b", "ij,ij->ij", "ii,ij->j", "abi,abj->ij", "b...d,b...d->b..."])
def test_other_einsums_are_left(equation):
    assert as_matmul(equation) is None


def test_attention_by_einsum_is_integers():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(8, 24)

        def forward(self, x):
            q, k, v = self.qkv(x).chunk(3, -1)
            scores = torch.einsum("b i d, b j d -> b i j", q, k).softmax(-1)
            return torch.einsum("b i j, b j d -> b d i", scores, v)

    x = torch.randn(3, 5, 8)
    qmodel = brfx.prepare_qat(Attention()).eval()
    brfx.calibrate(qmodel, [x])
    integer = integer_model(qmodel)
    assert products(integer) == 2 and torch.einsum not in [node.target for node in integer.model.graph.nodes]
    torch.testing.assert_close(integer.model(x), qmodel(x))


def test_codes_are_compared_before_an_activation_in_place_changes_them(images):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Hardswish(inplace=True), nn.Conv2d(4, 4, 3))
    qmodel = trained(model, images)
    brfx.snap_biases(qmodel)
    sites = compare_codes(qmodel, integer_model(qmodel), images)
    assert [site.site for site in sites] == ["0_input", "0_output", "2_input", "2_output"]
    assert [site.flipped for site in sites] == [0, 0, 0, 0]


@pytest.mark.parametrize("affine", [True, False])
def test_negative_factors_and_norms_without_any_fold(images, affine):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, affine=affine), nn.ReLU(), nn.Conv2d(8, 4, 1))
    with torch.no_grad():
        model[1].running_mean.uniform_(-0.5, 0.5)
        model[1].running_var.uniform_(0.5, 2)
        if affine:
            model[1].weight.uniform_(-2, -0.5)
    qmodel = trained(model, images)
    brfx.snap_biases(qmodel)
    (first, *_) = compare_codes(qmodel, integer_model(qmodel), images)
    assert first.codes and all(
        site.largest <= 1 and site.flipped <= 0.002 * site.codes
        for site in compare_codes(qmodel, integer_model(qmodel), images)
    )
    signs = torch.sign(integer_model(qmodel).layers["0"].weight_scale)
    assert (signs == (-1 if affine else 1)).all()


@pytest.mark.parametrize(("inputs", "fits"), [(132_000, True), (132_200, False)])
def test_a_sum_that_leaves_32_bits_is_refused_by_the_layer_s_name(inputs, fits):
    model = nn.Sequential(nn.Linear(inputs, 1))
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    qmodel = brfx.prepare_qat(model, brfx.QATConfig(bits=8))
    brfx.calibrate(qmodel, [torch.rand(2, inputs)])
    with torch.no_grad():
        qmodel.get_submodule("0").weight_quantizer.step.fill_(1 / 127)
    if fits:
        assert integer_model(qmodel).largest_sum == 128 * 127 * inputs < 2**31
    else:
        with pytest.raises(brfx.BrfxError, match=r"^0: its sums can reach"):
            integer_model(qmodel)


@pytest.mark.parametrize("stream_bits", [2, 8])
def test_every_form_takes_a_residual_add_s_integers_from_its_module(images, monkeypatch, stream_bits):
    """With other integers than are best, the network is another one: all forms are that one."""
    for kind in (AlignedAdd, StreamAdd):

        def units(self, step_out, step_in=None, own=kind.units):
            units = own(self, step_out, step_in)
            multiple = None if units.multiple is None else units.multiple + isinstance(self, AlignedAdd)
            return units._replace(zero_point=units.zero_point - 90, multiple=multiple)

        monkeypatch.setattr(kind, "units", units)
    torch.manual_seed(0)
    qmodel = trained(Mixed(), images, bits=2, stream_bits=stream_bits)
    brfx.snap_biases(qmodel)
    integer = integer_model(qmodel)
    assert all(site.flipped <= 0.005 * site.codes for site in compare_codes(qmodel, integer, images))
    torch.testing.assert_close(integer.model(images), qmodel(images), rtol=0.05, atol=0.05)
    adds = [module for module in _with_quant(qmodel).modules() if hasattr(module, "rounds_shortcut")]
    assert len(adds) == (2 if stream_bits == 2 else 1)
    for add, name in zip(adds, ("a", "b")[-len(adds) :], strict=True):
        grid = integer.layers[name].y
        assert float(add.branch.zero_point) + 128 == grid.zero_point
        assert float(add.branch.scale) == pytest.approx(grid.scale)
    assert (adds[0].factor is None) == (stream_bits == 8)


@pytest.mark.parametrize("where", ["conv1", "fc", ""])
@pytest.mark.parametrize("pre", [False, True])
def test_a_hook_that_no_file_would_run_is_refused_by_name(tiny, images, where, pre):
    module = tiny.get_submodule(where)
    if pre:
        module.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    else:
        module.register_forward_hook(lambda module, args, output: output * 2)
    qmodel = brfx.prepare_qat(tiny, None, images)
    brfx.calibrate(qmodel, [images])
    with pytest.raises(brfx.BrfxError, match=f"{where or type(tiny).__name__} has a hook"):
        integer_model(qmodel)


def test_a_bias_that_is_computed_is_not_snapped(images):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.ReLU())
    nn.utils.parametrize.register_parametrization(model[0], "bias", nn.Softplus())
    qmodel = brfx.prepare_qat(model, None, images)
    brfx.calibrate(qmodel, [images])
    before = qmodel.get_submodule("0").bias.clone()
    brfx.snap_biases(qmodel)
    assert torch.equal(qmodel.get_submodule("0").bias, before)
    assert list(integer_model(qmodel).biases) == ["2.bias"]
