"""Read the weights of an ONNX file without the packages onnx and onnxruntime.

The file is a protobuf message; field numbers are those of onnx.proto (ModelProto, GraphProto, NodeProto, TensorProto).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

MODEL_GRAPH, GRAPH_NODE, GRAPH_INITIALIZER = 7, 1, 5
NODE_INPUT, NODE_OUTPUT, NODE_TYPE = 1, 2, 4
TENSOR_DIMS, TENSOR_TYPE, TENSOR_NAME, TENSOR_RAW = 1, 2, 8, 9
FLOAT = 1


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Return the fp32 tensors of the graph by name.

    The exporter renames the transposed weight ``[in, out]`` of a linear layer, but not the bias that is added to the
    product; such a weight is returned as ``[out, in]`` under the name of its bias with ``weight`` for ``bias``.

    Raises ValueError for a file that is cut off or not of this format.
    """
    (graph,) = (value for number, value in fields(memoryview(path.read_bytes())) if number == MODEL_GRAPH)
    tensors, weight_of, renamed = {}, {}, {}
    for number, value in fields(graph):
        if number == GRAPH_INITIALIZER:
            tensors.update(_tensor(value))
        elif number == GRAPH_NODE:
            kind, inputs, outputs = _node(value)
            if kind == "MatMul":
                weight_of[outputs[0]] = inputs[1]
            elif kind == "Add" and (bias := next((name for name in inputs if name.endswith(".bias")), None)):
                products = [weight_of[name] for name in inputs if name in weight_of]
                renamed |= dict.fromkeys(products, bias.removesuffix("bias") + "weight")
    return {renamed.get(name, name): value.T if name in renamed else value for name, value in tensors.items()}


def fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yield number and value of each field of a protobuf message: an integer, or the bytes of any other type."""
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        size = {1: 8, 5: 4}.get(key & 7, 0)
        if key & 7 == 0:
            value, position = _varint(message, position)
            yield key >> 3, value
            continue
        if key & 7 == 2:
            size, position = _varint(message, position)
        if (not size and key & 7 != 2) or position + size > len(message):
            raise ValueError("not a protobuf message, or cut off")
        yield key >> 3, message[position : position + size]
        position += size


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while position < len(message):
        byte = message[position]
        value |= (byte & 127) << shift
        position, shift = position + 1, shift + 7
        if byte < 128:
            return value, position
    raise ValueError("not a protobuf message, or cut off")


def _node(message: memoryview) -> tuple[str, list[str], list[str]]:
    found: dict[int, list[str]] = {NODE_INPUT: [], NODE_OUTPUT: [], NODE_TYPE: []}
    for number, value in fields(message):
        if number in found and isinstance(value, memoryview):
            found[number].append(str(value, "utf-8"))
    return found[NODE_TYPE][0], found[NODE_INPUT], found[NODE_OUTPUT]


def _tensor(message: memoryview) -> dict[str, torch.Tensor]:
    """Return a tensor by its name; nothing if it is not fp32 in raw bytes."""
    shape, values = [], dict(fields(message))
    for number, value in fields(message):
        if number == TENSOR_DIMS:  # packed or not
            shape += [value] if isinstance(value, int) else list(_packed(value))
    if values.get(TENSOR_TYPE) != FLOAT or TENSOR_RAW not in values:
        return {}
    data = torch.frombuffer(bytearray(values[TENSOR_RAW]), dtype=torch.float32)
    return {str(values[TENSOR_NAME], "utf-8"): data.reshape(shape)}


def _packed(message: memoryview) -> Iterator[int]:
    position = 0
    while position < len(message):
        value, position = _varint(message, position)
        yield value
