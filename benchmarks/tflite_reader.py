"""Reads a TensorFlow Lite file of a float CNN as an ordinary `nn.Module` with `nn.Conv2d` layers, NCHW.

Weights may be float32, float16 (DEQUANTIZE) and sparse (DENSIFY): `densify` decodes TFLite's sparsity
format, a tree of dense and CSR levels. A PAD whose only reader is a convolution becomes that convolution's
padding. An operator that is not listed in `_LAYERS` is an error, never a guess.

Needs the packages `tflite` and `flatbuffers`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import tflite
import torch
from torch import nn

from benchmarks.tflite_layers import Add, DepthToSpace, Pad, Reshape, Resize, Step, TFLiteNet

Array = npt.NDArray[Any]
_DTYPES: dict[int, np.dtype[Any]] = {
    tflite.TensorType.FLOAT32: np.dtype("<f4"),
    tflite.TensorType.FLOAT16: np.dtype("<f2"),
    tflite.TensorType.INT32: np.dtype("<i4"),
    tflite.TensorType.INT64: np.dtype("<i8"),
}
_INDEX_VECTORS = {1: tflite.Int32Vector, 2: tflite.Uint16Vector, 3: tflite.Uint8Vector}
_OPERATORS = {number: name for name, number in vars(tflite.BuiltinOperator).items() if isinstance(number, int)}
_CONVOLUTIONS = {"CONV_2D": tflite.Conv2DOptions, "DEPTHWISE_CONV_2D": tflite.DepthwiseConv2DOptions}


def read(path: Path) -> TFLiteNet:
    """Read a file.

    Args:
        path: a `.tflite` file with one input and one sub-graph.

    Raises:
        ValueError: an operator, a data type or an option is none that this reader knows.
    """
    return _Reader(path.read_bytes()).read()


class _Reader:
    def __init__(self, content: bytes) -> None:
        self.model = tflite.Model.GetRootAs(content)
        self.graph = self.model.Subgraphs(0)
        self.constants: dict[int, Array] = {}
        self.paddings: dict[int, tuple[int, tuple[int, int, int, int]]] = {}
        self.layers: dict[str, nn.Module] = {}
        self.steps: list[Step] = []
        operators = [self.graph.Operators(i) for i in range(self.graph.OperatorsLength())]
        self.operators = [(self._name(op), op) for op in operators]
        self.readers = Counter(int(i) for op in operators for i in op.InputsAsNumpy())
        self.unpadded = {
            int(op.Inputs(0))
            for name, op in self.operators
            if name in _CONVOLUTIONS and _options(op, _CONVOLUTIONS[name]).Padding() == tflite.Padding.VALID
        }

    def read(self) -> TFLiteNet:
        for name, op in self.operators:
            if name not in _LAYERS:
                raise ValueError(f"The operator {name} is not supported (supported: {', '.join(_LAYERS)}).")
            _LAYERS[name](self, op)
        outputs = [int(i) for i in self.graph.OutputsAsNumpy()]
        return TFLiteNet(self.layers, self.steps, int(self.graph.Inputs(0)), outputs).eval()

    def _name(self, op: tflite.Operator) -> str:
        code = self.model.OperatorCodes(op.OpcodeIndex())
        return str(_OPERATORS[max(code.BuiltinCode(), code.DeprecatedBuiltinCode())])

    def shape(self, index: int) -> tuple[int, ...]:
        tensor = self.graph.Tensors(index)
        return tuple(int(tensor.Shape(i)) for i in range(tensor.ShapeLength()))

    def constant(self, index: int) -> Array:
        """Return the value of a tensor that the file holds, or that DEQUANTIZE and DENSIFY made of one."""
        if index not in self.constants:
            tensor = self.graph.Tensors(index)
            raw = self.model.Buffers(tensor.Buffer()).DataAsNumpy()
            if not isinstance(raw, np.ndarray):
                raise ValueError(f"Tensor {index} is no constant.")
            if tensor.Type() not in _DTYPES:
                raise ValueError(f"Tensor {index} has the data type {tensor.Type()}, which is not supported.")
            values: Array = raw.view(_DTYPES[tensor.Type()])
            sparsity = tensor.Sparsity()
            dense = values if sparsity is None else _densify(values, sparsity, self.shape(index))
            self.constants[index] = dense.reshape(self.shape(index))
        return self.constants[index]

    def add(self, kind: str, layer: nn.Module, inputs: tuple[int, ...], output: int) -> None:
        name = f"{kind}{len(self.layers)}"
        self.layers[name] = layer
        self.steps.append(Step(name, inputs, output))

    def activate(self, function: int, output: int) -> None:
        """Add the activation that is fused into the operator before."""
        made = {
            tflite.ActivationFunctionType.RELU: nn.ReLU,
            tflite.ActivationFunctionType.RELU6: nn.ReLU6,
        }
        if function in made:
            self.add("activation", made[function](), (output,), output)
        elif function != tflite.ActivationFunctionType.NONE:
            raise ValueError(f"The fused activation {function} is not supported (supported: RELU, RELU6).")


class Level(NamedTuple):
    """One level of a sparse tensor's tree: dense with a size, or (size None) CSR over the level above."""

    size: int | None
    segments: Array
    indices: Array


def densify(
    values: Array, levels: Sequence[Level], order: list[int], block_map: list[int], shape: tuple[int, ...]
) -> Array:
    """Decode TFLite's sparse format.

    Args:
        values: the stored elements, in the tree's order.
        levels: of the tree, outermost first.
        order: which dimension each level is of; those from `len(shape)` on are the inner ones of blocks.
        block_map: which dimension each inner one splits.
        shape: of the result.
    """
    coordinates: list[Array] = []  # of every element so far, one array a level
    element = np.zeros(1, np.int64)
    for level in levels:
        if level.size is not None:
            parent = np.repeat(np.arange(len(element)), level.size)
            coordinate = np.tile(np.arange(level.size), len(element))
            element = element[parent] * level.size + coordinate
        else:
            counts = level.segments[element + 1] - level.segments[element]
            parent = np.repeat(np.arange(len(element)), counts)
            start = np.cumsum(counts) - counts
            element = level.segments[element][parent] + np.arange(len(parent)) - start[parent]
            coordinate = level.indices[element]
        coordinates = [known[parent] for known in coordinates] + [coordinate]
    place = [np.zeros(len(element), np.int64) for _ in shape]
    for dimension, coordinate in sorted(zip(order, coordinates, strict=True), key=lambda pair: pair[0]):
        if dimension < len(shape):
            place[dimension] = coordinate
        else:
            split = block_map[dimension - len(shape)]
            place[split] = place[split] * (levels[order.index(dimension)].size or 1) + coordinate
    dense = np.zeros(shape, values.dtype)
    dense[tuple(place)] = values[element]
    return dense


def _densify(values: Array, sparsity: tflite.SparsityParameters, shape: tuple[int, ...]) -> Array:
    levels = []
    for i in range(sparsity.DimMetadataLength()):
        data = sparsity.DimMetadata(i)
        if data.Format() == tflite.DimensionType.DENSE:
            levels.append(Level(data.DenseSize(), np.empty(0), np.empty(0)))
        else:
            segments = _index_vector(data.ArraySegmentsType(), data.ArraySegments())
            levels.append(Level(None, segments, _index_vector(data.ArrayIndicesType(), data.ArrayIndices())))
    order = [int(sparsity.TraversalOrder(i)) for i in range(sparsity.TraversalOrderLength())]
    block_map = [int(sparsity.BlockMap(i)) for i in range(sparsity.BlockMapLength())]
    return densify(values, levels, order, block_map, shape)


def _index_vector(kind: int, table: Any) -> Array:
    vector = _INDEX_VECTORS[kind]()
    vector.Init(table.Bytes, table.Pos)
    indices: Array = vector.ValuesAsNumpy().astype(np.int64)
    return indices


def _options(op: tflite.Operator, kind: Any) -> Any:
    options = kind()
    table = op.BuiltinOptions()
    options.Init(table.Bytes, table.Pos)
    return options


def _same_padding(size: int, kernel: int, stride: int, dilation: int) -> tuple[int, int]:
    total = max((math.ceil(size / stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
    return total // 2, total - total // 2


def _conv(reader: _Reader, op: tflite.Operator, name: str) -> None:
    options = _options(op, _CONVOLUTIONS[name])
    depthwise = name == "DEPTHWISE_CONV_2D"
    source, weight = int(op.Inputs(0)), reader.constant(int(op.Inputs(1))).astype(np.float32)
    # TFLite: [O, kh, kw, C], and depthwise [1, kh, kw, O].
    kernel = torch.from_numpy(weight.transpose((3, 0, 1, 2) if depthwise else (0, 3, 1, 2)).copy())
    channels = reader.shape(source)[3]
    stride = (options.StrideH(), options.StrideW())
    dilation = (options.DilationHFactor(), options.DilationWFactor())
    padding = (0, 0, 0, 0)
    if source in reader.paddings:
        source, padding = reader.paddings[source]
    elif options.Padding() == tflite.Padding.SAME:
        size = reader.shape(source)[1:3]
        top_left = [_same_padding(size[i], kernel.shape[2 + i], stride[i], dilation[i]) for i in range(2)]
        padding = (*top_left[0], *top_left[1])
    top, bottom, left, right = padding
    if (top, left) != (bottom, right):
        padded = -1 - len(reader.layers)
        reader.add("pad", Pad((left, right, top, bottom)), (source,), padded)
        source, top, left = padded, 0, 0
    conv = nn.Conv2d(
        channels,
        kernel.shape[0],
        (kernel.shape[2], kernel.shape[3]),
        stride,
        (top, left),
        dilation,
        groups=channels if depthwise else channels // kernel.shape[1],
        bias=op.InputsLength() > 2 and op.Inputs(2) >= 0,
    )
    with torch.no_grad():
        conv.weight.copy_(kernel)
        if conv.bias is not None:
            conv.bias.copy_(torch.from_numpy(reader.constant(int(op.Inputs(2))).astype(np.float32)))
    output = int(op.Outputs(0))
    reader.add("depthwise" if depthwise else "conv", conv, (source,), output)
    reader.activate(options.FusedActivationFunction(), output)


def _pad(reader: _Reader, op: tflite.Operator) -> None:
    batch, height, width, channels = ((int(a), int(b)) for a, b in reader.constant(int(op.Inputs(1))))
    source, output = int(op.Inputs(0)), int(op.Outputs(0))
    if batch != (0, 0):
        raise ValueError(f"PAD of the batch by {batch} is not supported.")
    if channels == (0, 0) and reader.readers[output] == 1 and output in reader.unpadded:
        reader.paddings[output] = (source, (*height, *width))
    else:
        reader.add("pad", Pad((*width, *height, *channels)), (source,), output)


def _max_pool(reader: _Reader, op: tflite.Operator) -> None:
    options = _options(op, tflite.Pool2DOptions)
    source, output = int(op.Inputs(0)), int(op.Outputs(0))
    kernel, stride = (options.FilterHeight(), options.FilterWidth()), (options.StrideH(), options.StrideW())
    if options.Padding() == tflite.Padding.SAME:
        height, width = (
            _same_padding(size, k, s, 1) for size, k, s in zip(reader.shape(source)[1:3], kernel, stride, strict=True)
        )
        if (height, width) != ((0, 0), (0, 0)):
            padded = -1 - len(reader.layers)
            reader.add("pad", Pad((*width, *height), -math.inf), (source,), padded)
            source = padded
    reader.add("pool", nn.MaxPool2d(kernel, stride), (source,), output)
    reader.activate(options.FusedActivationFunction(), output)


def _resize(reader: _Reader, op: tflite.Operator) -> None:
    options = _options(op, tflite.ResizeBilinearOptions)
    if options.AlignCorners() == options.HalfPixelCenters():
        raise ValueError("RESIZE_BILINEAR is supported with either half-pixel centres or aligned corners.")
    height, width = (int(v) for v in reader.constant(int(op.Inputs(1))))
    layer = Resize((height, width), align_corners=options.AlignCorners())
    reader.add("resize", layer, (int(op.Inputs(0)),), int(op.Outputs(0)))


def _add(reader: _Reader, op: tflite.Operator) -> None:
    reader.add("add", Add(), (int(op.Inputs(0)), int(op.Inputs(1))), int(op.Outputs(0)))
    reader.activate(_options(op, tflite.AddOptions).FusedActivationFunction(), int(op.Outputs(0)))


def _simple(kind: str, make: Callable[[_Reader, tflite.Operator], nn.Module]) -> Callable[..., None]:
    def layer(reader: _Reader, op: tflite.Operator) -> None:
        reader.add(kind, make(reader, op), (int(op.Inputs(0)),), int(op.Outputs(0)))

    return layer


def _constant(reader: _Reader, op: tflite.Operator) -> None:
    """DEQUANTIZE of float16 and DENSIFY: `constant` has decoded the sparsity, `_conv` widens the dtype."""
    reader.constants[int(op.Outputs(0))] = reader.constant(int(op.Inputs(0)))


_LAYERS: dict[str, Callable[[_Reader, tflite.Operator], None]] = {
    "ADD": _add,
    "CONV_2D": partial(_conv, name="CONV_2D"),
    "DENSIFY": _constant,
    "DEPTHWISE_CONV_2D": partial(_conv, name="DEPTHWISE_CONV_2D"),
    "DEPTH_TO_SPACE": _simple(
        "shuffle", lambda _, op: DepthToSpace(_options(op, tflite.DepthToSpaceOptions).BlockSize())
    ),
    "DEQUANTIZE": _constant,
    "MAX_POOL_2D": _max_pool,
    "PAD": _pad,
    "RELU": _simple("activation", lambda *_: nn.ReLU()),
    "RESHAPE": _simple("reshape", lambda reader, op: Reshape((-1, *reader.shape(int(op.Outputs(0)))[1:]))),
    "RESIZE_BILINEAR": _resize,
}
