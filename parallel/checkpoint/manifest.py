"""The table of contents of a checkpoint: which file holds which piece of which tensor."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from parallel.checkpoint.agreement import CheckpointError
from parallel.checkpoint.pieces import Region
from parallel.checkpoint.tensor_file import Sum

if TYPE_CHECKING:
    from pathlib import Path

FORMAT = 1
NAME = "manifest.json"


@dataclass(frozen=True)
class Stored:
    """A piece that lies in a file, as the tensor `key`."""

    region: Region
    file: str
    key: str


@dataclass(frozen=True)
class Manifest:
    """Everything that a checkpoint says of itself."""

    step: int
    metadata: Any
    files: dict[str, Sum]
    pieces: list[Stored]

    def text(self) -> str:
        """Return the contents of manifest.json, with a line for each file and piece."""
        fields = ("name", "shape", "dtype", "start", "extent", "begin", "count")
        document: dict[str, Any] = {
            "format": FORMAT,
            "step": self.step,
            "metadata": self.metadata,
            "files": {name: vars(total) for name, total in self.files.items()},
            "pieces": [
                {**dict(zip(fields, piece.region.document(), strict=True)), "file": piece.file, "key": piece.key}
                for piece in self.pieces
            ],
        }
        files = ",\n".join(f"  {json.dumps(name)}: {json.dumps(total)}" for name, total in document["files"].items())
        pieces = ",\n".join(f"  {json.dumps(piece)}" for piece in document["pieces"])
        return (
            f'{{\n "format": {FORMAT},\n "step": {self.step},\n "metadata": {json.dumps(self.metadata)},\n'
            f' "files": {{\n{files}\n }},\n "pieces": [\n{pieces}\n ],\n "sha256": "{_digest(document)}"\n}}\n'
        )

    @classmethod
    def parse(cls, text: str, path: Path) -> Manifest:
        """Return what `text` gave; raises CheckpointError, naming the path, for anything else."""
        try:
            document = json.loads(text)
            found, format_ = document.pop("sha256"), document["format"]
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} is damaged: {error}; restore the file, or load another step") from error
        if format_ != FORMAT:
            raise CheckpointError(f"{path} is of format {format_}, and this program reads format {FORMAT}; use the program that wrote it")  # fmt: skip
        if found != _digest(document):
            raise CheckpointError(f"{path} is damaged: its SHA-256 is {_digest(document)}, but the one it names is {found}; restore the file, or load another step")  # fmt: skip
        pieces = []
        for piece in document["pieces"]:
            file, key = piece.pop("file"), piece.pop("key")
            pieces.append(Stored(Region.of([*piece.values()]), file, key))
        files = {name: Sum(**total) for name, total in document["files"].items()}
        return cls(document["step"], document["metadata"], files, pieces)


def _digest(document: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
