import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kernels
from kernels import ReduceOp, dtypes, native_backend, numpy_backend

SUPPORTED = [(op, dtype) for op in ReduceOp for dtype in dtypes.DTYPES if kernels.supported(op, dtype)]


def arrays(dtype, count, number, seed, offset=0):
    """Random bytes seen as `dtype` (so NaN, infinities and subnormals occur), at an address that need not be aligned."""
    generator = np.random.default_rng(seed)
    result = []
    for _ in range(number):
        memory = generator.integers(0, 2 if dtype.kind == "b" else 256, count * dtype.itemsize + offset, np.uint8)
        result.append(memory[offset:].view(dtype))
    return result


def same(a, b):
    """Equal values, NaN equal to NaN (payloads and the sign of zero may differ)."""
    if dtypes.kind_of(a.dtype) in "fc":
        wide = np.complex128 if a.dtype.kind == "c" else np.float64
        return np.array_equal(a.astype(wide), b.astype(wide), equal_nan=True)
    return a.tobytes() == b.tobytes()


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
@given(data=st.data())
def test_native_agrees_with_numpy(isa, data):
    module = pytest.importorskip("kernels._native")
    if not module.has_isa(["baseline", "avx2", "avx512"].index(isa)):
        pytest.skip(f"this processor has no {isa}")
    op, dtype = data.draw(st.sampled_from(SUPPORTED))
    count = data.draw(st.sampled_from([0, 1, 2, 3, 7, 31, 64, 127, 1009]))
    number = data.draw(st.integers(1, 5))
    inputs = arrays(dtype, count, number, data.draw(st.integers(0, 2**32)), data.draw(st.integers(0, 3)))
    ours, reference = np.empty(count, dtype), np.empty(count, dtype)
    if not native_backend.NativeBackend(module, isa).reduce_many(op, inputs, ours):
        assert dtype.kind == "c"
        return
    numpy_backend.reduce_many(op, inputs, reference)
    assert same(ours, reference)


@given(st.sampled_from(["float16", "bfloat16"]), st.integers(0, 2**32))
def test_short_floats_are_rounded_once(name, seed):
    dtype = np.dtype(name) if name == "float16" else dtypes.BFLOAT16
    inputs = [np.random.default_rng(seed + k).normal(size=50).astype(dtype) for k in range(4)]
    out = np.empty(50, dtype)
    kernels.reduce_many(ReduceOp.SUM, inputs, out)
    total = inputs[0].astype(np.float32)
    for array in inputs[1:]:
        total = total + array.astype(np.float32)
    assert out.tobytes() == total.astype(dtype).tobytes()


def test_bool_and_wrapping():
    flags = np.array([True, True, False]), np.array([True, False, False])
    out = np.empty(3, bool)
    kernels.reduce(ReduceOp.SUM, *flags, out)
    assert out.tolist() == [True, True, False]
    kernels.reduce(ReduceOp.PROD, *flags, out)
    assert out.tolist() == [True, False, False]
    big = np.array([np.iinfo(np.int64).max])
    kernels.reduce(ReduceOp.SUM, big, np.array([1]), big)
    assert big[0] == np.iinfo(np.int64).min


def test_nan_wins():
    a, b = np.array([np.nan, 1.0, 2.0], np.float32), np.array([1.0, np.nan, 1.0], np.float32)
    out = np.empty(3, np.float32)
    kernels.reduce(ReduceOp.MIN, a, b, out)
    assert np.isnan(out[:2]).all()
    assert out[2] == 1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "complex64"])
def test_scale(dtype):
    kind = dtypes.BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype)
    x = np.arange(9).astype(kind)
    kernels.scale(x, 0.5)
    assert np.array_equal(x.astype(np.complex128), np.arange(9) / 2)


def test_wrong_arguments():
    x = np.ones(4, np.float32)
    with pytest.raises(TypeError, match="AVG does not reduce int32.*use SUM and divide"):
        kernels.check(ReduceOp.AVG, np.dtype(np.int32))
    with pytest.raises(TypeError, match="MIN does not reduce complex64"):
        kernels.check(ReduceOp.MIN, np.dtype(np.complex64))
    with pytest.raises(TypeError, match="input 1 has dtype float64"):
        kernels.reduce(ReduceOp.SUM, x, np.ones(4), x)
    with pytest.raises(ValueError, match="input 1 has shape"):
        kernels.reduce(ReduceOp.SUM, x, np.ones(5, np.float32), x)
    with pytest.raises(ValueError, match="overlap"):
        kernels.reduce(ReduceOp.SUM, x[:3], x[:3], x[1:])
    frozen = x.copy()
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        kernels.reduce(ReduceOp.SUM, x, x, frozen)
    with pytest.raises(TypeError, match="argument has dtype object"):
        dtypes.check(np.dtype(object), "argument")
    with pytest.raises(TypeError, match="native byte order"):
        dtypes.check(np.dtype(">f4"), "argument")


def test_codes_are_stable():
    assert [dtypes.by_code(dtypes.code(dtype)) for dtype in dtypes.DTYPES] == list(dtypes.DTYPES)
    assert dtypes.code(np.dtype(np.float32)) == 10


@pytest.mark.slow
def test_backend_is_chosen_by_variable():
    program = "import kernels; print(kernels.backend())"

    def run(choice):
        return subprocess.run(
            [sys.executable, "-c", program], env={"COLLECTIVES_KERNELS": choice, "PATH": ""}, capture_output=True, text=True, timeout=60
        )

    assert run("numpy").stdout.strip() == "numpy"
    assert run("native-baseline").stdout.strip() == "native baseline"
    assert "expected one of auto" in run("nonsense").stderr
