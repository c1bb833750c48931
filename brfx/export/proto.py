"""Rewrite the ONNX graph of torch's exporter: share codes, pack weights, drop debugging entries."""

from __future__ import annotations

from typing import Any

import numpy as np

from brfx.export.integer import IntegerModel
from brfx.export.packing import CONTAINERS, pack


def share_codes(proto: Any) -> None:
    """Let a quantizer of values that were just decoded from the same grid have the codes themselves.

    c -> DequantizeLinear(s, z) -> QuantizeLinear(s, z) -> d    =>    c = d
    """
    constants = _scalars(proto)
    made = {output: node for node in proto.graph.node for output in node.output}
    renamed: dict[str, str] = {}
    for node in list(proto.graph.node):
        source = made.get(node.input[0]) if node.op_type == "QuantizeLinear" else None
        if source is not None and source.op_type == "DequantizeLinear":
            same = [constants.get(a) == constants.get(b) for a, b in zip(node.input[1:], source.input[1:], strict=True)]
            if all(same) and all(name in constants for name in node.input[1:]):
                renamed[node.output[0]] = source.input[0]
                proto.graph.node.remove(node)
    for node in proto.graph.node:
        for index, name in enumerate(node.input):
            while name in renamed:
                name = renamed[name]
            node.input[index] = name
    _drop_dead(proto)


def _constants(proto: Any) -> dict[str, Any]:
    """Constant tensors by name."""
    found = {initializer.name: initializer for initializer in proto.graph.initializer}
    return found | {
        node.output[0]: node.attribute[0].t
        for node in proto.graph.node
        if node.op_type == "Constant" and node.attribute[0].name == "value"
    }


def _scalars(proto: Any) -> dict[str, tuple[str, bytes]]:
    """Constants of one value by name, comparable."""
    import onnx

    found = {name: value for name, value in _constants(proto).items() if value.dims in ([], [1])}
    arrays = {name: onnx.numpy_helper.to_array(value) for name, value in found.items()}
    return {name: (str(array.dtype), array.tobytes()) for name, array in arrays.items()}


def _pack(proto: Any, initializer: Any, codes: np.ndarray[Any, Any], bits: int) -> str:
    """Put packed codes in the place of an initializer; their name."""
    import onnx

    name = f"{initializer.name}.int{bits}"
    tensor = onnx.TensorProto(name=name, data_type=CONTAINERS[bits], dims=codes.shape, raw_data=pack(codes, bits))
    proto.graph.initializer.remove(initializer)
    proto.graph.initializer.append(tensor)
    return name


def _drop_dead(proto: Any) -> None:
    while True:
        used = {name for node in proto.graph.node for name in node.input} | {out.name for out in proto.graph.output}
        dead = [node for node in proto.graph.node if not used.intersection(node.output)]
        if not dead:
            break
        for node in dead:
            proto.graph.node.remove(node)
    for initializer in [value for value in proto.graph.initializer if value.name not in used]:
        proto.graph.initializer.remove(initializer)


def store_weights(proto: Any, integer: IntegerModel, narrowest: int) -> None:
    """Replace int8 weights by packed codes that are cast back, and multiplied by their headroom, when it is loaded.

    w (int8)    =>    packed (INT2 or INT4) -> Cast(int8) -> Mul(headroom) -> w
    w (odd)     =>    packed (INT2 or INT4) -> Cast(int8) -> Mul(2) -> Add(1) -> Mul(headroom) -> w
    """
    import onnx

    layers = {
        f"{name}.{part}": module
        for name, module in integer.model.named_modules()
        for part in ("weight", "transposed")
        if hasattr(module, "headroom") and part in module._buffers
    }
    place = 0
    for initializer in list(proto.graph.initializer):
        layer = layers.get(initializer.name)
        if layer is None or initializer.data_type != onnx.TensorProto.INT8:
            continue
        storage, headroom = layer.storage, int(layer.headroom)  # type: ignore[arg-type]
        bits = next(bits for bits in CONTAINERS if bits >= max(narrowest, storage.bits))  # type: ignore[union-attr]
        if bits == 8:
            continue
        integers = onnx.numpy_helper.to_array(initializer) // np.int8(headroom)
        name = initializer.name
        packed = _pack(proto, initializer, storage.stored(integers), bits)  # type: ignore[union-attr, operator]
        arithmetic = [("Mul", 2), ("Add", 1)] if storage.odd else []  # type: ignore[union-attr]
        arithmetic += [("Mul", headroom)] if headroom != 1 else []
        values = [packed, *(f"{name}.codes{place or ''}" for place in range(len(arithmetic))), name]
        nodes = [onnx.helper.make_node("Cast", values[:1], values[1:2], to=onnx.TensorProto.INT8)]
        for (operator, number), source, result in zip(arithmetic, values[1:], values[2:], strict=False):
            nodes.append(onnx.helper.make_node(operator, [source, _int8(proto, number)], [result]))
        for node in nodes:
            proto.graph.node.insert(place, node)
            place += 1


def _int8(proto: Any, number: int) -> str:
    """The name of an int8 constant."""
    import onnx

    name = f"int8_{number}"
    if name not in {value.name for value in proto.graph.initializer}:
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(number, dtype=np.int8), name))
    return name


def store_quantized(proto: Any, narrowest: int) -> None:
    """Store a constant that nothing but one quantizer reads as packed codes, decoded when the file is loaded.

    w (FP32) -> QuantizeLinear(s, z)    =>    packed -> Cast(FLOAT) -> Mul(s) -> QuantizeLinear(s, z)
    """
    import onnx

    to_array = onnx.numpy_helper.to_array
    values = _constants(proto)
    readers: dict[str, list[Any]] = {}
    for node in proto.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    for weight in [value for value in proto.graph.initializer if value.data_type == onnx.TensorProto.FLOAT]:
        quantizer, *others = readers.get(weight.name, [None])
        if others or quantizer is None or quantizer.op_type != "QuantizeLinear" or quantizer.input[0] != weight.name:
            continue
        step, zero = (to_array(values[name]) for name in quantizer.input[1:])
        clips = [node for node in readers[quantizer.output[0]] if node.op_type == "Clip"]
        low, high = (int(to_array(values[name])) for name in clips[0].input[1:]) if clips else (0, 255)
        low, high = low - int(zero), high - int(zero)
        bits = next((b for b in CONTAINERS if b >= narrowest and -(1 << b - 1) <= low and high < 1 << b - 1), None)
        if bits is None:  # unsigned codes of 8 bits fit no signed container
            continue
        name, cast = weight.name, f"{weight.name}.codes"
        packed = _pack(proto, weight, np.clip(np.rint(to_array(weight) / step), low, high).astype(np.int8), bits)
        place = list(proto.graph.node).index(quantizer)
        proto.graph.node.insert(place, onnx.helper.make_node("Mul", [cast, quantizer.input[1]], [name]))
        proto.graph.node.insert(place, onnx.helper.make_node("Cast", [packed], [cast], to=onnx.TensorProto.FLOAT))


def strip(proto: Any) -> None:
    """Take out what the exporter wrote for its own debugging, shorten the names of values, store constants once, and
    leave out attributes with their default."""
    graph = proto.graph
    del graph.value_info[:], proto.functions[:], graph.metadata_props[:]
    graph.doc_string = ""
    kept = {value.name for value in (*graph.input, *graph.output)}
    constants: dict[bytes, str] = {}
    short: dict[str, str] = {}
    opset = {entry.domain: entry.version for entry in proto.opset_import}
    for node in list(graph.node):
        del node.metadata_props[:]
        node.doc_string = node.name = ""
        _drop_defaults(node, opset)
        if node.op_type == "Constant" and node.attribute[0].name == "value" and node.output[0] not in kept:
            tensor = node.attribute[0].t
            tensor.name = ""
            name = constants.setdefault(tensor.SerializeToString(), f"c{len(constants)}")
            short[node.output[0]] = name
            if name not in {value.name for value in graph.initializer}:
                tensor.name = name
                graph.initializer.append(tensor)
            graph.node.remove(node)
    for index, node in enumerate(graph.node):
        for place, name in enumerate(node.output):
            if name and name not in kept:
                short[name] = node.output[place] = f"v{index}" if not place else f"v{index}_{place}"
        for place, name in enumerate(node.input):
            node.input[place] = short.get(name, name)
    for index, initializer in enumerate(graph.initializer):
        del initializer.metadata_props[:]
        initializer.doc_string = ""
        layer, _, part = initializer.name.rpartition(".")
        if layer and part not in ("int2", "int4"):  # weights keep their layers' names for the reader
            short[initializer.name] = initializer.name = f"p{index}"
    for node in graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = short.get(name, name)


def _drop_defaults(node: Any, opset: dict[str, int]) -> None:
    """Take out attributes that say what the operator does without them."""
    import onnx

    if node.domain:
        return
    known = onnx.defs.get_schema(node.op_type, opset[""]).attributes
    for attribute in list(node.attribute):
        value = onnx.helper.get_attribute_value(attribute)
        default = known[attribute.name].default_value
        said = default.type != onnx.AttributeProto.UNDEFINED and onnx.helper.get_attribute_value(default) == value
        if said or (attribute.name in ("strides", "dilations") and set(value) == {1}):
            node.attribute.remove(attribute)


def own_zero_points(proto: Any) -> None:
    """Give each convolution a zero point of its weight of its own: ONNX Runtime's ``session.x64quantprecision``
    rewrites each, and refuses a file in which two are one."""
    constants = {value.name: value for value in proto.graph.initializer}
    seen: set[str] = set()
    for node in proto.graph.node:
        if node.op_type == "QLinearConv":
            name = node.input[5]
            if name in seen:
                copy = proto.graph.initializer.add()
                copy.CopyFrom(constants[name])
                copy.name = node.input[5] = f"z{len(seen)}"
            seen.add(node.input[5])
