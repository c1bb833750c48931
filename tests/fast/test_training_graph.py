import re

import pytest
import torch
from torch import nn
from torch._inductor.utils import run_and_get_code

import brfx
from brfx.fast.saved_codes import apply_with_codes, dequantized, with_codes
from brfx.fast.training_graph import compile_chains, compile_weights, keep_codes, tile_norms
from brfx.graph.mode_branches import pruned
from brfx.nn import QuantizedClippedReLU, QuantizedLayer
from brfx.nn.layers import QuantizedConv2d
from brfx.train.step import build_step


class Blocks(nn.Module):
    """A stem, a residual block and a depthwise block, each convolution with its batch norm."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = (nn.Conv2d(i, 6, 3, padding=1, bias=False) for i in (3, 6, 6))
        self.depthwise = nn.Conv2d(6, 6, 3, 2, padding=1, groups=6, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(6) for _ in range(4))
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = self.norms[0](self.stem(x)).relu()
        x = (self.norms[2](self.b(self.norms[1](self.a(x)).relu())) + x).relu()
        x = self.norms[3](self.depthwise(x)).relu()
        return self.head(x.mean((2, 3)))


def quantized(images, placement):
    torch.manual_seed(0)
    qmodel = brfx.prepare_qat(Blocks(), brfx.QATConfig(bits=2, placement=placement))
    brfx.calibrate(qmodel, [images])
    return qmodel.train()


def test_every_chain_starts_with_the_layer_in_front_of_it(images):
    qmodel = quantized(images, "deploy")
    graph = pruned(qmodel, True)
    keep_codes(qmodel, graph)
    layers = [node for node in graph.nodes if node.target is apply_with_codes]
    assert len(layers) == sum(isinstance(module, QuantizedLayer) for module in qmodel.modules()) == 5
    tile_norms(qmodel, graph)
    compile_weights(qmodel, graph)
    compile_chains(qmodel, graph)
    left = [str(node.args[0].target) for node in graph.nodes if node.target is apply_with_codes]
    assert left == ["head"]  # no quantizer is behind it
    assert not [node for node in graph.nodes if node.op == "call_module" and "norm" in str(node.target)]


@pytest.mark.parametrize("placement", ["deploy", "paper"])
def test_adds_read_floats_that_are_made_from_codes(images, placement):
    """So that compiled code has no reason to keep the floats."""
    qmodel = quantized(images, placement)
    graph = pruned(qmodel, True)
    keep_codes(qmodel, graph)
    adds = [node for node in graph.nodes if node.op.startswith("call") and "add" in str(node.target)]
    (add,) = [node for node in adds if node.target is not dequantized]
    shortcuts = [node for node in add.all_input_nodes if node.target is dequantized]
    assert len(shortcuts) == 1 and shortcuts[0].args[0].target is with_codes


def test_backward_keeps_codes_and_what_batch_norms_read(images):
    """Of each convolution one map of floats, its output, and of each quantizer one of bytes."""
    images = images.to(memory_format=torch.channels_last)  # as fit has them
    qmodel = quantized(images, "paper")
    step = build_step(qmodel, None, "kernels")
    labels = torch.arange(len(images)) % 4
    step(images, labels)  # the compiler's own calls
    floats, codes = set(), set()

    def pack(tensor):
        if tensor.dim() == 4 and tensor.shape[0] == len(images) and tensor.shape[2] > 1:
            kept = floats if tensor.dtype.is_floating_point else codes
            if tensor.untyped_storage().data_ptr() != images.untyped_storage().data_ptr():
                kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss, _ = step(images, labels)
    convolutions = sum(isinstance(module, QuantizedConv2d) for module in qmodel.modules())
    assert len(floats) == convolutions == 4
    assert len(codes) == sum(isinstance(module, QuantizedClippedReLU) for module in qmodel.modules()) - 1 == 3  # head
    loss.backward()


@pytest.mark.skipif(
    not torch.__version__.startswith("2.14."),
    reason="a canary: reads the C++ of torch 2.14, which each version words anew",
)
@pytest.mark.parametrize("how", ["kernels", "whole"])
def test_bins_are_counted_in_the_loop_that_writes(images, how):
    torch._dynamo.reset()
    images = images.to(memory_format=torch.channels_last)
    qmodel = quantized(images, "paper")
    step = build_step(qmodel, brfx.BinPenalty(qmodel), how)
    with torch._inductor.config.patch(force_disable_caches=True):
        _, sources = run_and_get_code(step, images, torch.arange(len(images)) % 4)
    loops = [loop for source in sources for loop in source.split("for(") if re.search(r"tmp\d+ >> tmp\d+", loop)]
    writing = [loop for loop in loops if re.search(r"\.store\(out_ptr\d+ \+ static_cast<int64_t>\(x1", loop)]
    assert len(loops) == 4
    assert len(writing) == (4 if how == "kernels" else 3)  # the whole step does not write what only a mean reads
