"""Checkpoints: what any ranks save in any cutting, any others load in any other, and nothing goes wrong silently."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from collectives import Communicator
from collectives.testing import run_ranks
from parallel.checkpoint import CheckpointError, Piece, Saver, export, latest, load, read_metadata, save, steps
from parallel.checkpoint.loading import Checkpoint
from parallel.checkpoint.manifest import Manifest
from parallel.checkpoint.pieces import Box
from parallel.checkpoint.tensor_file import TensorFile
from parallel.formulas import share

ROOT = Path(__file__).parents[2]
FOLDER = "step-00000001"
DTYPES = ["float16", "bfloat16", "float32", "float64", "int8", "int64", "uint16", "bool"]


def tensor(shape: tuple[int, ...], dtype: str = "float32", seed: int = 0) -> np.ndarray:
    bits = np.random.default_rng(seed).integers(0, 256, (*shape, 8), np.uint8)
    wide = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    # Any bits at all, NaNs among them, but for bool.
    return bits[..., 0] > 127 if dtype == "bool" else bits.view(wide)[..., 0].copy()


def cut(name: str, whole: np.ndarray, start: tuple[int, ...], extent: tuple[int, ...], begin: int, end: int) -> Piece:
    """A piece of `whole` with the values that it has there."""
    selection = tuple(slice(a, a + n) for a, n in zip(start, extent, strict=True))
    return Piece(name, whole.shape, start, extent, begin, whole[(*selection, ...)].ravel()[begin:end].copy())


def empty(piece: Piece, dtype: Any = None) -> Piece:
    """A piece of the same elements, to be filled."""
    values = np.zeros(piece.values.size, dtype or piece.values.dtype)
    return Piece(piece.name, piece.shape, piece.start, piece.extent, piece.begin, values)


def save_whole(directory: Path, tensors: dict[str, np.ndarray], step: int = 1, ranks: int = 1, **more: Any) -> None:
    """Save each tensor as flat shards, one a rank."""

    def rank(world: Communicator) -> None:
        pieces = []
        for name, whole in tensors.items():
            part = share(whole.size, world.size, world.rank)
            pieces.append(cut(name, whole, (0,) * whole.ndim, whole.shape, part.start, part.stop))
        save(directory, world, pieces, {"step": step}, step, **more)

    run_ranks(ranks, rank)


def load_whole(directory: Path, like: dict[str, np.ndarray], **more: Any) -> dict[str, np.ndarray]:
    found = {name: np.zeros_like(whole) for name, whole in like.items()}
    run_ranks(1, lambda world: load(directory, world, [Piece.whole(n, w) for n, w in found.items()], **more))
    return found


def same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> bool:
    return {n: (w.dtype, w.shape, w.tobytes()) for n, w in found.items()} == {
        n: (w.dtype, w.shape, w.tobytes()) for n, w in expected.items()
    }


def errors_of(ranks: int, function: Callable[[Communicator], object]) -> str:
    """The message that every rank got, which must be the same on all."""

    def rank(world: Communicator) -> str:
        with pytest.raises(CheckpointError) as caught:
            function(world)
        return str(caught.value)

    messages = set(run_ranks(ranks, rank, timeout=20))
    assert len(messages) == 1
    return messages.pop()


@st.composite
def cuttings(draw: st.DrawFn, name: str, whole: np.ndarray, ranks: int) -> list[list[Piece]]:
    """All of a tensor as pieces of ranks: cut into boxes, the boxes into ranges, some of them with replicas."""
    boxes = [Box((0,) * whole.ndim, whole.shape)]
    for axis, size in enumerate(whole.shape):
        for at in draw(st.lists(st.integers(0, size), max_size=2)):
            boxes = [
                half
                for box in boxes
                for low, high in [(box.start[axis], box.stop[axis])]
                for a, b in [(low, min(max(at, low), high)), (min(max(at, low), high), high)]
                if a < b or (low == high and a == low)
                for half in [
                    Box(
                        (*box.start[:axis], a, *box.start[axis + 1 :]),
                        (*box.extent[:axis], b - a, *box.extent[axis + 1 :]),
                    )
                ]
            ]
    held: list[list[Piece]] = [[] for _ in range(ranks)]
    for box in dict.fromkeys(boxes):
        marks = [0, *sorted(draw(st.lists(st.integers(0, box.size), max_size=3))), box.size]
        for begin, end in itertools.pairwise(marks):
            for rank in draw(st.sets(st.integers(0, ranks - 1), min_size=1)):
                held[rank].append(cut(name, whole, box.start, box.extent, begin, end))
    return held


@pytest.mark.slow
@given(st.data())
def test_any_cutting_loads_from_any_other(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    directory = tmp_path_factory.mktemp("checkpoints")
    before, after = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    saved: list[list[Piece]] = [[] for _ in range(before)]
    wanted: list[list[Piece]] = [[] for _ in range(after)]
    for number in range(data.draw(st.integers(1, 3))):
        shape = data.draw(st.lists(st.integers(0, 6), max_size=4).map(tuple))
        whole = tensor(shape, data.draw(st.sampled_from(DTYPES)), number)
        for pieces, ranks in ((saved, before), (wanted, after)):
            for rank, some in enumerate(data.draw(cuttings(f"tensor.{number}", whole, ranks))):
                pieces[rank] += some
    run_ranks(before, lambda world: save(directory, world, saved[world.rank], {"a": [1, None]}, 7))

    def rank(world: Communicator) -> None:
        found = [empty(piece) for piece in wanted[world.rank]]
        assert load(directory, world, found) == {"a": [1, None]}
        for piece, expected in zip(found, wanted[world.rank], strict=True):
            assert piece.values.tobytes() == expected.values.tobytes()

    run_ranks(after, rank)
    shutil.rmtree(directory)


@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_tensor_parallel_slices_and_their_shards_load_as_one(tmp_path: Path, ranks: int) -> None:
    whole = tensor((6, 8))

    def rank(world: Communicator) -> None:
        tensor_rank, shard = divmod(world.rank, 2)  # columns over two ranks, each slice in two shards
        part = share(24, 2, shard)
        save(tmp_path, world, [cut("w", whole, (0, 4 * tensor_rank), (6, 4), part.start, part.stop)], None, 3)

    run_ranks(4, rank)
    assert sorted(path.name for path in (tmp_path / "step-00000003").iterdir()) == [
        "manifest.json",
        *(f"rank-000{n}-of-0004.safetensors" for n in range(4)),
    ]

    def rows(world: Communicator) -> None:
        mine = share(6, ranks, world.rank)
        expected = cut("w", whole, (mine.start, 0), (len(mine), 8), 0, len(mine) * 8)
        found = empty(expected)
        load(tmp_path, world, [found])
        assert found.values.tobytes() == expected.values.tobytes()

    run_ranks(ranks, rows)


def test_of_replicas_one_rank_writes_each(tmp_path: Path) -> None:
    tensors = {f"w{n}": tensor((100,), seed=n) for n in range(8)}
    run_ranks(4, lambda world: save(tmp_path, world, [Piece.whole(n, w) for n, w in tensors.items()], None, 1))
    manifest = json.loads((tmp_path / FOLDER / "manifest.json").read_text())
    assert sorted(piece["name"] for piece in manifest["pieces"]) == sorted(tensors)
    assert len({entry["size"] for entry in manifest["files"].values()}) == 1
    assert same(load_whole(tmp_path, tensors), tensors)


def test_values_are_converted_to_the_wanted_dtype(tmp_path: Path) -> None:
    whole = np.random.default_rng(0).normal(size=(4, 5))
    save_whole(tmp_path, {"w": whole}, ranks=3)
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        found = np.zeros((4, 5), dtype)
        load_whole(tmp_path, {})
        run_ranks(1, lambda world, found=found: load(tmp_path, world, [Piece.whole("w", found)]))
        expected = whole.astype(np.float32).astype(dtype) if dtype is ml_dtypes.bfloat16 else whole.astype(dtype)
        np.testing.assert_array_equal(found.astype(float), expected.astype(float))


def test_metadata_steps_and_the_latest(tmp_path: Path) -> None:
    assert steps(tmp_path / "nowhere") == []
    assert latest(tmp_path) is None
    for step in (5, 20, 100):
        save_whole(tmp_path, {"w": tensor((2,), seed=step)}, step, keep=2)
    assert steps(tmp_path) == [20, 100]
    assert latest(tmp_path) == 100
    assert read_metadata(tmp_path) == {"step": 100}
    assert read_metadata(tmp_path, 20) == {"step": 20}
    assert same(load_whole(tmp_path, {"w": tensor((2,))}, step=20), {"w": tensor((2,), seed=20)})
    with pytest.raises(CheckpointError, match="no checkpoint of step 5 in .*; the steps there are: 20, 100"):
        read_metadata(tmp_path, 5)
    with pytest.raises(CheckpointError, match="there is no checkpoint in"):
        read_metadata(tmp_path / "nowhere")
    (tmp_path / "latest").write_text("step-00000020\n")
    assert latest(tmp_path) == 20
    for text in ("step-00000021", "\x00", ""):
        (tmp_path / "latest").write_text(text)
        assert latest(tmp_path) == 100


def test_going_back_replaces_a_step_and_leaves_the_later_ones(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save_whole(tmp_path, {"w": tensor((2,), seed=step)}, step)
    save_whole(tmp_path, {"w": tensor((2,), seed=30)}, 3, keep=2)
    assert steps(tmp_path) == [2, 3, 4]
    assert latest(tmp_path) == 3
    assert same(load_whole(tmp_path, {"w": tensor((2,))}), {"w": tensor((2,), seed=30)})
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".partial")]


def test_the_background_saves_what_was_there_at_the_start(tmp_path: Path) -> None:
    whole = np.arange(1000, dtype=np.float32)
    expected = {"w": whole.copy()}

    def rank(world: Communicator) -> None:
        part = share(1000, world.size, world.rank)
        values = whole[part.start : part.stop]
        piece = Piece("w", (1000,), (0,), (1000,), part.start, values)
        with Saver(tmp_path, world, keep=3) as saver:
            assert saver.poll()
            for step in (1, 2):  # the second waits for the first
                saver.start([piece], {"step": step}, step)
                values += 1
            while not saver.poll():
                pass
            assert latest(tmp_path) == 2
            saver.start([piece], {"step": 3}, 3)
        assert latest(tmp_path) == 3

    run_ranks(3, rank)
    for step in (1, 2, 3):
        assert same(load_whole(tmp_path, expected, step=step), {"w": expected["w"] + step - 1})
    assert steps(tmp_path) == [1, 2, 3]


def test_files_are_those_of_safetensors(tmp_path: Path) -> None:
    tensors = {f"w.{dtype}": tensor((3, 2), dtype) for dtype in DTYPES} | {"scalar": tensor(()), "none": tensor((0, 4))}
    run_ranks(1, lambda world: save(tmp_path, world, [Piece.whole(n, w) for n, w in tensors.items()], None, 1))
    with safe_open(tmp_path / FOLDER / "rank-0000-of-0001.safetensors", "np") as file:
        assert same({name: file.get_tensor(name) for name in file.keys()}, tensors)  # noqa: SIM118
    assert same(load_whole(tmp_path, tensors), tensors)


def test_an_export_is_one_file_of_whole_tensors(tmp_path: Path) -> None:
    parameters = {"w": tensor((6, 7)), "b": tensor((5,), "bfloat16"), "scalar": tensor((), "float64")}
    everything = parameters | {"optimizer.first_moment/w": tensor((6, 7), seed=1)}
    save_whole(tmp_path, everything, step=12, ranks=3)
    for expected, chosen in ((parameters, False), (everything, True)):
        export(tmp_path, tmp_path / "model.safetensors", everything=chosen)
        with safe_open(tmp_path / "model.safetensors", "np") as file:
            assert same({name: file.get_tensor(name) for name in file.keys()}, expected)  # noqa: SIM118
            assert file.metadata() == {"step": "12", "metadata": '{"step": 12}'}
    with pytest.raises(CheckpointError, match=r"cannot write .*nowhere.*No such file or directory"):
        export(tmp_path, tmp_path / "nowhere" / "model.safetensors")
    assert len(list(tmp_path.iterdir())) == 4


def test_an_export_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    save_whole(tmp_path, {f"w{n}": np.ones(1 << 18, np.float32) for n in range(8)}, ranks=2)
    tracemalloc.start()
    try:
        export(tmp_path, tmp_path / "model.safetensors")
        assert tracemalloc.get_traced_memory()[1] < 2.5 * (1 << 20) + (1 << 20)
    finally:
        tracemalloc.stop()


@pytest.mark.slow
def test_only_what_is_wanted_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = np.arange(1 << 23, dtype=np.float32)  # 32 MiB
    save_whole(tmp_path, {"w": whole})
    opened: list[TensorFile] = []
    original = TensorFile.__init__
    monkeypatch.setattr(TensorFile, "__init__", lambda self, path: (original(self, path), opened.append(self))[0])
    piece = empty(cut("w", whole, (0,), whole.shape, 1 << 20, (1 << 20) + 1000))
    run_ranks(1, lambda world: load(tmp_path, world, [piece], verify=False))
    np.testing.assert_array_equal(piece.values, whole[1 << 20 : (1 << 20) + 1000])
    (mapped,) = opened
    maps = Path("/proc/self/smaps").read_text()
    (resident,) = re.findall(rf"{mapped.path}\n(?:.*\n)*?Rss: +(\d+) kB", maps)
    assert int(resident) <= 4096
    assert sum(box.size for copy in Checkpoint(tmp_path / FOLDER).plan(piece) for box in copy.boxes) == 1000


def test_pieces_that_overlap_are_read_once_and_must_agree(tmp_path: Path) -> None:
    whole = tensor((4, 6))

    def pieces(rank: int, change: float = 0) -> Piece:
        piece = cut("w", whole, *[((0, 0), (4, 6), 0, 15), ((1, 2), (3, 4), 0, 12), ((0, 0), (4, 6), 12, 24)][rank])
        piece.values[4] += change * rank
        return piece

    with np.errstate(all="ignore"):
        run_ranks(3, lambda world: save(tmp_path, world, [pieces(world.rank)], None, 1))
        assert same(load_whole(tmp_path, {"w": whole}), {"w": whole})
        copies = list(Checkpoint(tmp_path / FOLDER).plan(Piece.whole("w", np.zeros((4, 6), np.float32))))
        assert sum(box.size for copy in copies for box in copy.boxes) == 24
        whole = np.ones((4, 6), np.float32)
        run_ranks(3, lambda world: save(tmp_path, world, [pieces(world.rank, 1)], None, 2))
    message = errors_of(2, lambda world: load(tmp_path, world, [Piece.whole("w", np.zeros_like(whole))]))
    assert re.search(r"rank 0: .*rank-000\d-of-0003.safetensors has other values for elements .* of w than", message)


class DeviceArray:
    """What a checkpoint uses of an array on a device, as cupy has it."""

    def __init__(self, values: np.ndarray) -> None:
        self.values, self.dtype, self.ndim, self.size = values, values.dtype, values.ndim, values.size

    def get(self) -> np.ndarray:
        return self.values.copy()

    def __setitem__(self, key: object, other: DeviceArray) -> None:
        self.values[...] = other.values


def test_arrays_on_a_device_go_through_this_machines_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "devices", SimpleNamespace(asarray=DeviceArray))  # type: ignore[arg-type]
    monkeypatch.setattr(DeviceArray, "__module__", "devices")
    whole = tensor((3, 4))
    saved, found = DeviceArray(whole.ravel().copy()), DeviceArray(np.zeros(12, np.float32))

    def rank(world: Communicator) -> None:
        with Saver(tmp_path, world) as saver:
            saver.start([Piece("w", (3, 4), (0, 0), (3, 4), 0, saved)], None, 1)
            saved.values.fill(0)
        load(tmp_path, world, [Piece("w", (3, 4), (0, 0), (3, 4), 0, found)])

    run_ranks(1, rank)
    assert found.values.tobytes() == whole.tobytes()


# What is wrong on one rank is raised on all, in the same words.


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        (lambda r: [Piece("w", (4,), (0,), (4,), 2 * r, np.zeros(2 + r))], "rank 1: w: elements 2 to 5 are no range of the 4"),
        (lambda r: [Piece("w", (4 + r,), (0,), (4,), 0, np.zeros(4))], r"w is float64 \(5,\) on rank 1 and float64 \(4,\) on rank 0"),
        (lambda r: [Piece("w", (4,), (0,), (4,), 0, np.zeros(4, [np.float32, np.int32][r]))], r"w is int32 \(4,\) on rank 1 and float32"),
        (lambda r: [Piece.whole("w", np.full(4, float(r == 1)))], r"ranks 0 and 1 hold different values of elements 0 to 4 of w \(4,\)"),
        (lambda r: [Piece("w", (2, 4), (0, 0), (2, 4), 3 * r, np.zeros(3))], r"no rank holds elements \[1:2, 2:4\] of w \(2, 4\)"),
        (lambda r: [Piece("w", (4,), (0,), (4,), 0, np.zeros(4 * (1 - r), complex))], "w has dtype complex128; a checkpoint"),
        (lambda r: [None], r"rank 0: AttributeError: 'NoneType'.* \(rank 1 failed too\)"),
    ],
)  # fmt: skip
def test_pieces_that_contradict_each_other_are_refused(
    tmp_path: Path, pieces: Callable[[int], list[Piece]], message: str
) -> None:
    found = errors_of(2, lambda world: save(tmp_path, world, pieces(world.rank), None, 1))
    assert re.search(message, found), found
    assert steps(tmp_path) == []
    assert [path.name for path in tmp_path.iterdir()] in ([], [".lock"])


def test_all_ranks_must_give_the_same_metadata_step_and_directory(tmp_path: Path) -> None:
    w = [Piece.whole("w", np.zeros(2))]
    for function, message in [
        (lambda c: save(tmp_path, c, w, {"a": c.rank // 2}, 1), "rank 2 saves other metadata than rank 0"),
        (lambda c: save(tmp_path, c, w, None, c.rank // 2), "rank 2 saves step 1 and rank 0 step 0"),
        (lambda c: save(tmp_path, c, w, None, -c.rank), "rank 1: the step is -1; expected an integer from 0 on"),
        (lambda c: save(tmp_path, c, w, {"a": object()}, 1), "rank 0: the metadata cannot be written as JSON"),
        (lambda c: save(tmp_path, c, w, float("nan"), 1), "rank 0: the metadata cannot be written as JSON"),
        (lambda c: save(tmp_path / str(c.rank // 2), c, w, None, 1), "rank 2: does not see in .* the file that rank 0 wrote"),
    ]:  # fmt: skip
        assert re.search(message, errors_of(3, function))
    assert not list(tmp_path.rglob("step-*")) + list(tmp_path.rglob(".partial-*"))
    for name in ("0", "1"):
        save_whole(tmp_path / name, {"w": np.full(2, float(name))})
    message = errors_of(3, lambda c: load(tmp_path / str(c.rank // 2), c, w))
    assert re.search(r"rank 2 sees another manifest.json in .* than rank 0", message)
    with pytest.raises(ValueError, match="keep is 0; expected at least 1"):
        run_ranks(1, lambda c: Saver(tmp_path, c, keep=0))


@pytest.mark.parametrize(
    ("piece", "message"),
    [
        (Piece.whole("v", np.zeros(2)), r"rank 1: .*step-00000001 has no tensor v; it has 1, w"),
        (Piece.whole("w", np.zeros((6, 4))), r"rank 1: w has the shape \(4, 6\) in .*, but \(6, 4\) is wanted"),
        (Piece.whole("w", np.zeros((4, 6), int)), "rank 1: w is stored as float32 and wanted as int64"),
    ],
)
def test_what_a_checkpoint_does_not_have_is_refused(tmp_path: Path, piece: Piece, message: str) -> None:
    save_whole(tmp_path, {"w": tensor((4, 6))})
    found = errors_of(3, lambda world: load(tmp_path, world, [piece] if world.rank == 1 else []))
    assert re.search(message, found), found


def test_elements_that_no_file_has_are_named(tmp_path: Path) -> None:
    whole = tensor((4, 6))
    save_whole(tmp_path, {"w": whole}, ranks=2)
    path = tmp_path / FOLDER / "manifest.json"
    manifest = Manifest.parse(path.read_text(), path)
    path.write_text(Manifest(1, None, manifest.files, manifest.pieces[:1]).text())
    assert same({"w": load_part(tmp_path, whole, 0, 12)}, {"w": whole.ravel()[:12]})
    message = errors_of(2, lambda world: load(tmp_path, world, [Piece.whole("w", np.zeros_like(whole))]))
    assert re.search(r"does not have elements \[2:4, 0:6\] of w \(4, 6\)", message)


def load_part(directory: Path, whole: np.ndarray, begin: int, end: int) -> np.ndarray:
    piece = empty(cut("w", whole, (0,) * whole.ndim, whole.shape, begin, end))
    run_ranks(1, lambda world: load(directory, world, [piece]))
    return piece.values


def edit(path: Path, change: Callable[[bytearray], object]) -> None:
    text = bytearray(path.read_bytes())
    change(text)
    path.write_bytes(text)


def flip(at: int) -> Callable[[bytearray], None]:
    def change(text: bytearray) -> None:
        text[at] ^= 4

    return change


@pytest.mark.parametrize(
    ("file", "change", "verify", "message"),
    [
        ("rank-0001-of-0002.safetensors", flip(-5), True, "rank-0001-of-0002.safetensors is damaged: its SHA-256 is"),
        ("rank-0001-of-0002.safetensors", lambda t: t.pop(), False, r"is damaged: it has \d+ bytes, but \d+ were saved"),
        ("rank-0001-of-0002.safetensors", lambda t: t.append(0), True, r"is damaged: it has \d+ bytes, but \d+ were saved"),
        ("rank-0000-of-0002.safetensors", flip(3), False, "is damaged: it has .* bytes, fewer than its header says"),
        ("rank-0000-of-0002.safetensors", flip(8), False, "is damaged: its header is no JSON"),
        ("rank-0000-of-0002.safetensors", lambda t: flip(t.index(b"F32") + 1)(t), False, "the two are not of one checkpoint"),
        ("manifest.json", flip(40), True, "manifest.json is damaged"),
        ("manifest.json", lambda t: t.__delitem__(slice(100, None)), True, "manifest.json is damaged"),
        ("manifest.json", lambda t: t.clear(), True, "manifest.json is damaged"),
        ("manifest.json", lambda t: t.__setitem__(slice(None), b"[]"), True, "manifest.json is damaged"),
        ("manifest.json", lambda t: t.__setitem__(slice(t.index(b"1,"), t.index(b"1,") + 1), b"2"), True, "is of format 2, and this program reads format 1"),
    ],
)  # fmt: skip
def test_damage_is_found_and_named(
    tmp_path: Path, file: str, change: Callable[[bytearray], object], verify: bool, message: str
) -> None:
    whole = tensor((40,))
    save_whole(tmp_path, {"w": whole}, ranks=2)
    edit(tmp_path / FOLDER / file, change)
    found = errors_of(3, lambda world: load(tmp_path, world, [Piece.whole("w", np.zeros_like(whole))], verify=verify))
    assert re.search(message, found), found


@pytest.mark.slow
def test_any_flipped_byte_is_found(tmp_path: Path) -> None:
    whole = tensor((5,))
    save_whole(tmp_path, {"w": whole})
    for path in (tmp_path / FOLDER).iterdir():
        intact = path.read_bytes()
        for at in range(0, len(intact), 2):
            edit(path, flip(at))
            with pytest.raises(CheckpointError):
                Checkpoint(tmp_path / FOLDER).verify(["rank-0000-of-0001.safetensors"])
            path.write_bytes(intact)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    whole = tensor((40,))
    save_whole(tmp_path, {"w": whole}, ranks=2)
    (tmp_path / FOLDER / "rank-0001-of-0002.safetensors").unlink()
    assert load_part(tmp_path, whole, 0, 20).tobytes() == whole[:20].tobytes()
    with pytest.raises(CheckpointError, match=r"cannot read .*rank-0001-of-0002.safetensors: .*No such file"):
        load_part(tmp_path, whole, 0, 21)


@pytest.mark.slow
def test_processes_save_and_others_load(tmp_path: Path) -> None:
    program = str(Path(__file__).parent / "programs" / "save_and_load.py")
    for ranks, arguments in (("3", ["save"]), ("2", ["load"])):
        done = subprocess.run(
            [sys.executable, "-m", "collectives", "run", "-n", ranks, program, *arguments, str(tmp_path)],
            cwd=ROOT, capture_output=True, text=True, timeout=60, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert steps(tmp_path) == [2, 3]
