"""The fused kernels on a device: CUDA C++ sources, compiled by NVRTC at the first call. All arguments have been checked.

What goes element by element, the words of dropout and the order of column sums are those of the host, and contraction
is off; exponentials and sums over rows agree to rounding.
"""

from __future__ import annotations

import functools
import math
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from kernels.fused_checks import COMPUTED, STORED

if TYPE_CHECKING:
    from kernels.fused import AdamWStep, DropoutStream

Array = Any

SOURCES: Final = Path(__file__).parent / "cuda"
OPTIONS: Final = ("--std=c++17", "--fmad=false", f"-I{SOURCES}")
_THREADS: Final = 256
_MOST_BLOCKS: Final = 1024
_TYPES: Final = {"float32": "float", "float64": "double", "bfloat16": "BFloat16", "float16": "Float16"}
_STORED: Final = [_TYPES[str(dtype)] for dtype in STORED]
_COMPUTED: Final = [_TYPES[str(dtype)] for dtype in COMPUTED]
_ROWS: Final = (
    *("layer_norm", "layer_norm_backward", "layer_norm_parameters"),
    *("causal_softmax", "causal_softmax_backward", "cross_entropy"),
)
_ELEMENTS: Final = ("gelu", "gelu_backward", "dropout", "column_sums")

INSTANCES: Final[dict[str, tuple[str, ...]]] = {
    "rows.cu": tuple(f"{name}<{element}>" for name in _ROWS for element in _COMPUTED),
    "elements.cu": (
        *(f"{name}<{element}>" for name in _ELEMENTS for element in _COMPUTED),
        *(
            f"adamw<{element}, {gradient}, {copy}>"
            for element in _COMPUTED
            for gradient, copy in product((element, "BFloat16", "Float16"), ("BFloat16", "Float16"))
        ),
        *(f"convert<{source}, {target}>" for source, target in product(_STORED, _STORED)),
        *(f"sum_of_squares<{source}>" for source in _STORED),
    ),
}
"""Every kernel that a source is compiled for."""


def gelu(x: Array, bias: Array | None, out: Array) -> None:
    """Set `out` to gelu(x + bias)."""
    _by_element(f"gelu<{_type(x)}>", x.size, x, _or_null(bias), out, _int(x.shape[1]), _int(x.size))


def gelu_backward(g: Array, x: Array, bias: Array | None, out: Array) -> None:
    """Set `out` to g·gelu′(x + bias)."""
    _by_element(f"gelu_backward<{_type(x)}>", x.size, g, x, _or_null(bias), out, _int(x.shape[1]), _int(x.size))


def layer_norm(x: Array, weight: Array, bias: Array, epsilon: float, out: Array, mean: Array, inverse: Array) -> None:
    """Set `out` to the normalised rows times weight plus bias, and the rows' means and 1/deviations."""
    rows, columns = x.shape
    _by_row("layer_norm", rows, x, weight, bias, np.float64(epsilon), out, mean, inverse, _int(columns))


def layer_norm_backward(
    g: Array,
    x: Array,
    weight: Array,
    mean: Array,
    inverse: Array,
    out: Array,
    weight_gradient: Array,
    bias_gradient: Array,
) -> None:
    """Set `out` to the gradient of x, and add to those of weight and bias."""
    rows, columns = x.shape
    parameters = _kernel("rows.cu", f"layer_norm_parameters<{_type(x)}>")
    sums = (g, x, mean, inverse, weight_gradient, bias_gradient, _int(rows), _int(columns))
    parameters((_blocks(columns),), (_THREADS,), sums)
    _by_row("layer_norm_backward", rows, g, x, weight, mean, inverse, out, _int(columns))


def causal_softmax(scores: Array, scale: float, offset: int) -> None:
    """Replace scores by softmax(scale·scores) over the visible keys."""
    batch, queries, keys = scores.shape
    _by_row("causal_softmax", batch * queries, scores, np.float64(scale), *map(_int, (offset, queries, keys)))


def causal_softmax_backward(g: Array, weights: Array, scale: float, offset: int, out: Array) -> None:
    """Set `out` to scale·w·(g − Σ g·w)."""
    batch, queries, keys = g.shape
    factors = (np.float64(scale), _int(offset))
    _by_row("causal_softmax_backward", batch * queries, g, weights, *factors, out, _int(queries), _int(keys))


def cross_entropy(logits: Array, targets: Array, scale: float, losses: Array, gradient: Array | None) -> None:
    """Set losses to −log softmax(logits)[target], and the gradient to scale·(softmax − one-hot)."""
    rows, columns = logits.shape
    _by_row("cross_entropy", rows, logits, targets, np.float64(scale), losses, _or_null(gradient), _int(columns))


def adamw(values: Array, gradients: Array, first: Array, second: Array, step: AdamWStep, copy: Array | None) -> None:
    """Update values and moments in place; set `copy` to the new values, rounded."""
    copied = "BFloat16" if copy is None else _type(copy)
    name = f"adamw<{_type(values)}, {_type(gradients)}, {copied}>"
    arrays = (values, gradients, first, second, _or_null(copy))
    _by_element(name, values.size, *arrays, *map(np.float64, step), _int(values.size))


def convert(source: Array, target: Array) -> None:
    """Set `target` to the source, rounded to nearest even."""
    _by_element(f"convert<{_type(source)}, {_type(target)}>", source.size, source, target, _int(source.size))


def sum_of_squares(x: Array) -> float:
    """Return Σ x²: the sums of up to 1024 blocks, which their number alone decides, added on the host."""
    import cupy

    blocks = min(_MOST_BLOCKS, _blocks(x.size))
    sums = cupy.empty(blocks, np.float64)
    _kernel("elements.cu", f"sum_of_squares<{_type(x)}>")((blocks,), (_THREADS,), (x, sums, _int(x.size)))
    return math.fsum(sums.get())


def dropout(x: Array, stream: DropoutStream, out: Array) -> None:
    """Set `out` to x·scale where the element's word reaches the threshold, and to 0 elsewhere."""
    words = map(np.uint64, (*stream.key, stream.first, stream.row_stride))
    sizes = (_int(x.shape[1]), _int(x.size))
    keep = (np.uint32(stream.threshold), np.float64(stream.scale))
    _by_element(f"dropout<{_type(x)}>", x.size, x, *keep, *words, out, *sizes)


def column_sums(matrix: Array, out: Array) -> None:
    """Add the rows to `out`, from first to last."""
    rows, columns = matrix.shape
    _by_element(f"column_sums<{_type(matrix)}>", columns, matrix, out, _int(rows), _int(columns))


@functools.cache
def _module(source: str) -> Any:
    import cupy

    code = (SOURCES / source).read_text()
    return cupy.RawModule(code=code, options=OPTIONS, name_expressions=INSTANCES[source])


@functools.cache
def _kernel(source: str, instance: str) -> Any:
    return _module(source).get_function(instance)


def _by_element(instance: str, count: int, *arguments: Any) -> None:
    _kernel("elements.cu", instance)((_blocks(count),), (_THREADS,), arguments)


def _by_row(name: str, rows: int, first: Array, *arguments: Any) -> None:
    _kernel("rows.cu", f"{name}<{_type(first)}>")((rows,), (_THREADS,), (first, *arguments))


def _blocks(count: int) -> int:
    return -(-count // _THREADS)


def _type(array: Array) -> str:
    return _TYPES[str(array.dtype)]


def _int(value: int) -> np.int64:
    return np.int64(value)


def _or_null(array: Array | None) -> Any:
    return np.intp(0) if array is None else array
