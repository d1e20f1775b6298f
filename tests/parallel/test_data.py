"""The corpus, its split, and batches that no layout changes."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest

from parallel.data import Corpus, DataError, load, unigram_loss
from parallel.formulas import share


def corpus(size: int = 1000) -> Corpus:
    text = np.arange(size, dtype=np.int64).astype(np.uint8)
    return Corpus(text, text[: size // 2], 1)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
def test_a_batch_is_the_same_whatever_the_number_of_ranks(ranks: int) -> None:
    whole = corpus().batch(1, 5, range(10), 16)
    shares = [corpus().batch(1, 5, share(10, ranks, rank), 16) for rank in range(ranks)]
    np.testing.assert_array_equal(np.concatenate(shares), whole)


def test_batches_are_runs_of_the_text_and_change_with_step_and_seed() -> None:
    batch = corpus().batch(0, 0, range(50), 16)
    assert batch.shape == (50, 17)
    assert (np.diff(batch.astype(np.uint8), axis=1) == 1).all()
    assert not np.array_equal(batch, corpus().batch(0, 1, range(50), 16))
    assert not np.array_equal(batch, corpus().batch(1, 0, range(50), 16))


def test_validation_windows_are_spread_from_the_first_byte_to_the_last() -> None:
    windows = corpus().validation_batch(5, range(5), 9)
    assert windows[0, 0] == 0
    assert windows[-1, -1] == 499 % 256
    np.testing.assert_array_equal(corpus().validation_batch(5, range(2, 4), 9), windows[2:4])


def test_a_folder_is_split_by_file(tmp_path: Path) -> None:
    for number in range(60):
        path = tmp_path / f"{number % 3}" / f"{number}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes([number]) * 10)
    found = load(str(tmp_path))
    assert found.files == 60
    training, validation = set(found.training.tolist()), set(found.validation.tolist())
    assert training | validation == set(range(60))
    assert not training & validation
    assert 0 < len(validation) < 12
    np.testing.assert_array_equal(load(str(tmp_path)).training, found.training)


def test_file_names_need_not_be_text(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff")).write_bytes(b"abc" * 20)
    assert load(str(tmp_path)).files == 1


def test_a_single_file_is_split_at_its_end(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(bytes(range(200)))
    found = load(str(tmp_path / "one"))
    assert found.training.tobytes() + found.validation.tobytes() == bytes(range(200))
    assert len(found.validation) == 10


@pytest.mark.slow
def test_the_standard_library_is_there() -> None:
    found = load("stdlib")
    assert found.files > 200
    assert len(found.training) > 5_000_000
    assert len(found.validation) > 100_000


def test_the_standard_librarys_tests_and_packages_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    for name in ("a.py", "b.txt", "json/c.py", "json/tests/d.py", "test/e.py", "site-packages/f.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(name)
    found = load("stdlib")
    assert found.training.tobytes() + found.validation.tobytes() == b"a.pyjson/c.py"


def test_data_that_cannot_serve_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        load(str(tmp_path / "none"))
    with pytest.raises(DataError, match=r"the corpus is empty \(0 files, 0 bytes\)"):
        load(str(tmp_path))
    with pytest.raises(DataError, match="--data : no such file or folder"):
        load("")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="neither a file nor a folder"):
        load(str(tmp_path / "pipe"))
    (tmp_path / "empty").touch()
    with pytest.raises(DataError, match=r"the corpus is empty \(1 files, 0 bytes\)"):
        load(str(tmp_path))
    with pytest.raises(DataError, match="validation part of the corpus has 500 bytes, too few for sequences of 500"):
        corpus().check(500)
    corpus().check(499)


def test_unigram_loss_is_the_cross_entropy_under_smoothed_byte_frequencies() -> None:
    text = np.array([0, 0, 0, 1] * 1000, np.uint8)
    expected = -(0.75 * math.log(3001 / 4256) + 0.25 * math.log(1001 / 4256))  # every count plus one
    assert unigram_loss(Corpus(text, text, 1)) == pytest.approx(expected, rel=1e-12)
