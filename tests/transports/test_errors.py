import json

import pytest

from transports.errors import Failure


@pytest.mark.parametrize("letter", ["a", "é", "𝄞", "\n", "\udc80"])
@pytest.mark.parametrize("count", [0, 10, 900, 2000, 100_000])
@pytest.mark.parametrize("largest", [4096, 1 << 14])
def test_a_record_fits_and_parses(letter, count, largest):
    failure = Failure("Aborted", 3, letter * count)
    record = failure.encode(largest)
    assert len(record) <= largest
    decoded = Failure.decode(record)
    if len(json.dumps({"kind": "Aborted", "origin": 3, "message": letter * count})) <= largest:
        assert decoded == failure
    else:
        assert decoded.message.endswith(" …")
        assert decoded.message.startswith(letter * 300)
        assert len(record) > largest - 12  # no more is lost than need be
        assert (decoded.kind, decoded.origin) == ("Aborted", 3)


@pytest.mark.parametrize(
    "record",
    [
        b"",
        b"[]",
        b"null",
        b"\xff",
        b'{"kind": "Aborted", "origin": 1e999, "message": ""}',
        b'{"kind": "Aborted", "origin": NaN, "message": ""}',
        b"[" * 100_000,
    ],
    ids=["empty", "list", "null", "bytes", "infinite", "nan", "deep"],
)
def test_what_is_no_record_becomes_a_plain_failure(record):
    assert Failure.decode(record).kind == "Aborted"
    assert "could not be read" in Failure.decode(record).message
