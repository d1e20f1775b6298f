"""What the fused kernels ask of their arrays, in words; everything is checked before anything is written."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from kernels.dtypes import BFLOAT16

if TYPE_CHECKING:
    from collections.abc import Iterable

Array = np.ndarray[Any, np.dtype[Any]]

FLOAT16, FLOAT32, FLOAT64, INT64 = map(np.dtype, (np.float16, np.float32, np.float64, np.int64))
COMPUTED: Final = (FLOAT32, FLOAT64)
"""What is computed with."""
STORED: Final = (FLOAT32, FLOAT64, BFLOAT16, FLOAT16)
"""What gradients and copies of values may be."""


def is_device_array(array: object) -> bool:
    """Whether `array` is cupy's; cupy is not imported for it."""
    module = type(array).__module__.partition(".")[0]
    return module == "cupy" and isinstance(array, sys.modules[module].ndarray)


class Checks:
    """The checks of one call: each message begins with the operation and names the argument.

    Arguments: `operation`, its name; `arrays`, those of the call by name, of which None are passed over. Raises
    TypeError unless all of them are numpy arrays, or all are cupy arrays.
    """

    def __init__(self, operation: str, **arrays: Array | None) -> None:
        self.operation = operation
        self.arrays = {name: array for name, array in arrays.items() if array is not None}
        self._spans: dict[str, tuple[int, int]] = {}
        self.on_device = is_device_array(next(iter(self.arrays.values())))
        for name, array in self.arrays.items():
            if not (is_device_array(array) if self.on_device else isinstance(array, np.ndarray)):
                kind = "cupy.ndarray, as the first array is" if self.on_device else "numpy.ndarray"
                raise TypeError(f"{operation}: {name} is a {type(array).__qualname__}, expected a {kind}")

    def dtype(self, name: str, expected: Iterable[np.dtype[Any]]) -> None:
        """Raise TypeError unless the array has one of the dtypes expected."""
        array = self.arrays.get(name)
        if array is not None and array.dtype not in expected:
            wanted = " or ".join(map(str, expected))
            raise TypeError(f"{self.operation}: {name} has dtype {array.dtype}, expected {wanted}")

    def same(self, *names: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
        """Raise TypeError or ValueError unless the named arrays have this dtype and shape."""
        for name in names:
            self.dtype(name, (dtype,))
            array = self.arrays.get(name)
            if array is not None and array.shape != shape:
                raise ValueError(f"{self.operation}: {name} has shape {array.shape}, expected {shape}")

    def layout(self, *written: str) -> None:
        """Raise ValueError unless all arrays are contiguous and aligned, and the named ones writable."""
        for name, array in self.arrays.items():
            if not array.flags.c_contiguous:
                hint = "pass a C-contiguous one, as numpy.ascontiguousarray makes it"
                raise ValueError(f"{self.operation}: {name} has strides {array.strides}, not contiguous; {hint}")
            address = _address(array)
            if address % array.dtype.alignment:
                begins = f"begins at {address:#x}, no multiple of {array.dtype.alignment}"
                raise ValueError(f"{self.operation}: {name} {begins}; pass an aligned array")
            if array.size:
                self._spans[name] = (address, address + array.nbytes)
        for name in written:
            if name in self.arrays and not self.on_device and not self.arrays[name].flags.writeable:
                raise ValueError(f"{self.operation}: {name} is read-only; pass a writable array")

    def apart(self, written: str, *may_be: str) -> None:
        """Raise ValueError if the array written shares memory with another; one of `may_be` it may be itself.

        To be called after `layout`.
        """
        if written not in self._spans:
            return
        begin, end = self._spans[written]
        for name, (other_begin, other_end) in self._spans.items():
            if name == written or end <= other_begin or other_end <= begin:
                continue
            if name not in may_be:
                raise ValueError(f"{self.operation}: {written} and {name} share memory; pass arrays apart")
            if (begin, end) != (other_begin, other_end):
                hint = "pass the same array or arrays apart"
                raise ValueError(f"{self.operation}: {written} and {name} overlap in part; {hint}")


def _address(array: Any) -> int:
    return int(array.__array_interface__["data"][0] if isinstance(array, np.ndarray) else array.data.ptr)
