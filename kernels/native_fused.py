"""The fused kernels in C++, for one instruction set. All arguments have been checked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kernels.dtypes import code

if TYPE_CHECKING:
    from kernels.fused import AdamWStep, DropoutStream

Array = np.ndarray[Any, np.dtype[Any]]


class NativeFused:
    """The functions of `numpy_fused`, by the native table of one instruction set."""

    def __init__(self, module: Any, table: Any) -> None:
        self._table = table
        self._adamw_step = module.AdamW

    def gelu(self, x: Array, bias: Array | None, out: Array) -> None:
        """Set `out` to gelu(x + bias)."""
        self._table.gelu(code(x.dtype), x, bias, out, *x.shape)

    def gelu_backward(self, g: Array, x: Array, bias: Array | None, out: Array) -> None:
        """Set `out` to g·gelu′(x + bias)."""
        self._table.gelu_backward(code(x.dtype), g, x, bias, out, *x.shape)

    def layer_norm(
        self, x: Array, weight: Array, bias: Array, epsilon: float, out: Array, mean: Array, inverse: Array
    ) -> None:
        """Set `out` to the normalised rows times weight plus bias, and the rows' means and 1/deviations."""
        self._table.layer_norm(code(x.dtype), x, weight, bias, epsilon, out, mean, inverse, *x.shape)

    def layer_norm_backward(self, g: Array, x: Array, *others: Array) -> None:
        """Set `out` to the gradient of x, and add to those of weight and bias."""
        self._table.layer_norm_backward(code(x.dtype), g, x, *others, *x.shape)

    def causal_softmax(self, scores: Array, scale: float, offset: int) -> None:
        """Replace scores by softmax(scale·scores) over the visible keys."""
        batch, queries, keys = scores.shape
        self._table.causal_softmax(code(scores.dtype), scores, scale, offset, batch * queries, queries, keys)

    def causal_softmax_backward(self, g: Array, weights: Array, scale: float, offset: int, out: Array) -> None:
        """Set `out` to scale·w·(g − Σ g·w)."""
        batch, queries, keys = g.shape
        self._table.causal_softmax_backward(
            code(g.dtype), g, weights, scale, offset, out, batch * queries, queries, keys
        )

    def cross_entropy(self, logits: Array, targets: Array, scale: float, losses: Array, gradient: Array | None) -> None:
        """Set losses to −log softmax(logits)[target], and the gradient to scale·(softmax − one-hot)."""
        self._table.cross_entropy(code(logits.dtype), logits, targets, scale, losses, gradient, *logits.shape)

    def adamw(
        self, values: Array, gradients: Array, first: Array, second: Array, step: AdamWStep, copy: Array | None
    ) -> None:
        """Update values and moments in place; set `copy` to the new values, rounded."""
        copy_code = 0 if copy is None else code(copy.dtype)
        self._table.adamw(
            *(code(values.dtype), values, code(gradients.dtype), gradients, first, second, copy_code, copy),
            *(self._adamw_step(*step), values.size),
        )

    def convert(self, source: Array, target: Array) -> None:
        """Set `target` to the source, rounded to nearest even."""
        self._table.convert(code(source.dtype), source, code(target.dtype), target, source.size)

    def sum_of_squares(self, x: Array) -> float:
        """Return Σ x² in float64."""
        return float(self._table.sum_of_squares(code(x.dtype), x, x.size))

    def dropout(self, x: Array, stream: DropoutStream, out: Array) -> None:
        """Set `out` to x·scale where the element's word reaches the threshold, and to 0 elsewhere."""
        self._table.dropout(
            *(code(x.dtype), x, stream.threshold, stream.scale, *stream.key, stream.first, stream.row_stride),
            *(out, *x.shape),
        )

    def column_sums(self, matrix: Array, out: Array) -> None:
        """Add the rows to `out`, from first to last."""
        self._table.column_sums(code(matrix.dtype), matrix, out, *matrix.shape)
