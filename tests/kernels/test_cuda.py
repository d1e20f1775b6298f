"""The CUDA sources compile, for every type, by NVRTC, which needs no device; and their back end names what is there."""

from __future__ import annotations

import ctypes
import importlib.util
import re
from pathlib import Path

import pytest

from kernels import cupy_backend

ARCHITECTURES = ("sm_75", "sm_90")


def load_nvrtc() -> ctypes.CDLL:
    specification = importlib.util.find_spec("nvidia.cuda_nvrtc") if importlib.util.find_spec("nvidia") else None
    if specification is None or not specification.submodule_search_locations:
        pytest.skip("the wheel nvidia-cuda-nvrtc-cu12 is not installed")
    (library,) = Path(specification.submodule_search_locations[0], "lib").glob("libnvrtc.so.*")
    return ctypes.CDLL(str(library))


def compile_log(nvrtc: ctypes.CDLL, source: str, instances: tuple[str, ...], architecture: str) -> str:
    """Compile down to machine code; an empty log is success."""
    program = ctypes.c_void_p()
    code = (cupy_backend.SOURCES / source).read_bytes()
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), code, source.encode(), 0, None, None) == 0
    for instance in instances:
        assert nvrtc.nvrtcAddNameExpression(program, instance.encode()) == 0
    options = [option.encode() for option in (*cupy_backend.OPTIONS, f"--gpu-architecture={architecture}")]
    result = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    for instance in instances if result == 0 else ():
        lowered = ctypes.c_char_p()
        assert nvrtc.nvrtcGetLoweredName(program, instance.encode(), ctypes.byref(lowered)) == 0
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return log.value.decode() or ("" if result == 0 else f"error {result}")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", cupy_backend.INSTANCES)
def test_every_kernel_compiles(source: str, architecture: str) -> None:
    assert compile_log(load_nvrtc(), source, cupy_backend.INSTANCES[source], architecture) == ""


def test_what_does_not_compile_is_noticed() -> None:
    assert "nowhere" in compile_log(load_nvrtc(), "rows.cu", ("nowhere<float>",), ARCHITECTURES[0])


def test_the_back_end_names_every_kernel() -> None:
    for source, instances in cupy_backend.INSTANCES.items():
        kernels = re.findall(r"__global__ void (\w+)\(", (cupy_backend.SOURCES / source).read_text())
        assert {instance.partition("<")[0] for instance in instances} == set(kernels)
