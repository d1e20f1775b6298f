"""What decides the result of a training, except the data, and what ranks can train so."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from parallel.axis import TILES
from parallel.formulas import share
from parallel.mesh import layout_name
from parallel.nn import Extent
from parallel.schedules import build, find
from parallel.sharding import Sharding

if TYPE_CHECKING:
    from parallel.schedules import Schedule

DTYPES = ("float32", "float64", "bfloat16", "float16")


class ConfigurationError(ValueError):
    """A training that cannot be as asked; the message names the flag, what was given, and what would do."""


@dataclass(frozen=True)
class TrainingConfiguration:
    """Everything that decides the result of a training, except the data.

    `tp`, `pp` and `cp` are the sizes of these axes of the mesh; the ranks that are left share the batch (dp). `chunks`: stages
    a rank has, 0 for as many as is usual with the schedule. `stage_layers`: layers of each stage, such as 3,5; by default they
    are balanced by measured cost.
    """

    layers: int = 4
    hidden: int = 128
    heads: int = 4
    kv_heads: int | None = None
    seq: int = 64
    batch: int = 16
    micro_batches: int = 1
    steps: int = 800
    lr: float = 3e-3
    warmup: int = 50
    weight_decay: float = 0.1
    clip: float = 1.0
    dropout: float = 0.0
    dtype: str = "float32"
    zero: int = 0
    replicas: int = 1
    keep_parameters: bool = False
    recompute: bool = False
    tp: int = 1
    sequence_parallel: bool = False
    pp: int = 1
    schedule: str = "1f1b"
    chunks: int = 0
    stage_layers: str = ""
    cp: int = 1
    exact: bool = False
    seed: int = 0
    validation_batches: int = 16

    @property
    def sharding(self) -> Sharding:
        """How data parallelism holds the model."""
        return Sharding(self.zero, self.dtype, self.replicas, not self.keep_parameters, self.recompute, self.exact)

    @property
    def groups(self) -> int:
        """How many heads of keys and values there are."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def key_width(self) -> int:
        """The width of all keys of a position, and of all values."""
        return self.groups * (self.hidden // self.heads)

    def dp(self, ranks: int) -> int:
        """Return how many of `ranks` ranks share each batch; raises ConfigurationError if the other axes do not divide them."""
        others = self.tp * self.pp * self.cp
        if others < 1 or ranks % others:
            raise ConfigurationError(
                f"tp {self.tp}, pp {self.pp} and cp {self.cp} take {others} ranks, which do not divide {ranks}"
            )
        return ranks // others

    def layout(self, ranks: int) -> str:
        """Return the layout's name, such as dp2,tp2."""
        return layout_name({"dp": self.dp(ranks), "pp": self.pp, "cp": self.cp, "tp": self.tp})

    def alone(self) -> TrainingConfiguration:
        """Return the same training for one rank."""
        return replace(
            self,
            zero=0,
            replicas=1,
            tp=1,
            pp=1,
            cp=1,
            sequence_parallel=False,
            schedule="1f1b",
            chunks=0,
            stage_layers="",
        )

    def inexact(self, ranks: int) -> TrainingConfiguration | None:
        """Return the same training without exact sums, in a pipeline with as many micro-batches; None where that cannot be."""
        most = self.batch // self.dp(ranks)
        if self.schedule == "interleaved":
            most -= most % self.pp
        other = replace(self, exact=False, micro_batches=most if self.pp > 1 else self.micro_batches)
        try:
            other.check(ranks)
        except ConfigurationError:
            return None
        return other

    def passes(self, dp: int) -> int:
        """Return how many micro-batches go through in a step: with exact sums one for each sample of a rank."""
        if not self.exact:
            return self.micro_batches
        most = len(share(self.batch, dp, 0))
        # Interleaving takes a multiple of pp: the last ones are empty then.
        return -(-most // self.pp) * self.pp if self.schedule == "interleaved" else most

    def pipeline(self, dp: int) -> Schedule:
        """Return the schedule of a step, of one rank without pp; raises ConfigurationError if there is none such."""
        try:
            if self.pp == 1:
                find(self.schedule)
                return build("1f1b", 1, self.passes(dp))
            return build(self.schedule, self.pp, self.passes(dp), self.chunks or None)
        except ValueError as error:
            raise ConfigurationError(f"--schedule {self.schedule}: {error}") from error

    def extents(self, stages: int, head_cost: float = 0.0) -> list[Extent]:
        """Return the part of the model that each of the stages has; the output head costs as much as `head_cost` layers."""
        if self.stage_layers:
            layers = [int(number) for number in self.stage_layers.split(",")]
        else:
            layers = balance(self.layers, stages, head_cost)
        starts = [sum(layers[:stage]) for stage in range(stages + 1)]
        untied = stages > 1 or self.exact
        return [
            Extent(range(starts[stage], starts[stage + 1]), stage == 0, stage == stages - 1, untied)
            for stage in range(stages)
        ]

    def check(self, ranks: int) -> None:
        """Raise ConfigurationError unless `ranks` ranks can train so."""
        self._check_numbers()
        dp = self.dp(ranks)
        if self.replicas < 1 or (dp * self.cp) % self.replicas:
            raise ConfigurationError(
                f"--replicas must divide the number of ranks that hold the same part of the model, {dp * self.cp}, but is "
                f"{self.replicas}"
            )
        if self.replicas > 1 and self.zero == 0:
            raise ConfigurationError("--replicas is for sharded models: give --zero 1, 2 or 3 as well")
        if self.hidden % self.heads:
            raise ConfigurationError(f"--heads must divide --hidden, but {self.hidden} is no multiple of {self.heads}")
        if self.kv_heads is not None and (self.kv_heads < 1 or self.heads % self.kv_heads):
            raise ConfigurationError(
                f"--kv-heads must divide --heads, but {self.heads} is no multiple of {self.kv_heads}"
            )
        if self.batch < dp:
            raise ConfigurationError(
                f"more ranks than data: a global --batch of {self.batch} sequences leaves some of {dp} ranks without one"
            )
        if self.micro_batches > self.batch // dp:
            raise ConfigurationError(
                f"--micro-batches is {self.micro_batches}, but a rank has only {self.batch // dp} "
                f"sequences of the global --batch of {self.batch} over {dp} ranks"
            )
        self._check_cuts()
        self._check_stages(self.pipeline(dp))

    def _check_numbers(self) -> None:
        whole = (
            "layers",
            "hidden",
            "heads",
            "seq",
            "batch",
            "micro_batches",
            "steps",
            "tp",
            "pp",
            "cp",
            "validation_batches",
        )
        for name in whole:
            if getattr(self, name) < 1:
                raise ConfigurationError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "warmup", "weight_decay", "clip", "seed", "chunks"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigurationError(
                    f"--{name.replace('_', '-')} must be a finite number of at least 0, got {getattr(self, name)}"
                )
        if not 0 <= self.dropout < 1:
            raise ConfigurationError(f"--dropout must be at least 0 and below 1, got {self.dropout}")
        if self.dtype not in DTYPES:
            raise ConfigurationError(f"--dtype must be {', '.join(DTYPES[:-1])} or {DTYPES[-1]}, got {self.dtype}")
        if not 0 <= self.zero <= 3:
            raise ConfigurationError(f"--zero must be 0, 1, 2 or 3, got {self.zero}")

    def _check_cuts(self) -> None:
        """Check the axes that cut layers and sequences."""
        if self.tp > self.groups:
            what = "heads" if self.kv_heads is None else "kv-heads"
            raise ConfigurationError(
                f"tp{self.tp} cuts attention by heads, of which there are {self.groups}: give at most tp{self.groups}, or more --{what}"
            )
        if self.exact and self.tp > TILES:
            raise ConfigurationError(
                f"--exact cuts layers into {TILES} pieces: tp{self.tp} is more, give at most tp{TILES}"
            )
        if self.sequence_parallel and self.tp == 1:
            raise ConfigurationError(
                "--sequence-parallel is for layers that are cut: give a layout with tp2 or more as well"
            )
        parts = self.tp * (2 * self.cp if self.cp > 1 else 1)
        if self.sequence_parallel and self.seq % parts:
            raise ConfigurationError(
                f"--sequence-parallel cuts --seq {self.seq} into {parts} equal parts, which is not possible: give "
                f"{max(1, self.seq // parts) * parts}"
            )
        if self.chunks and self.pp == 1:
            raise ConfigurationError("--chunks is for pipelines: give a layout with pp2 or more as well")
        if self.cp > 1 and self.exact:
            raise ConfigurationError("--exact is not for context parallelism: give a layout without cp")
        if 2 * self.cp > self.seq:
            raise ConfigurationError(
                f"cp{self.cp} cuts each sequence into {2 * self.cp} blocks, but --seq is {self.seq}"
            )

    def _check_stages(self, schedule: Schedule) -> None:
        stages = len(schedule.places)
        if stages > self.layers:
            raise ConfigurationError(
                f"pp{self.pp} with {schedule.chunks} stages a rank takes {stages} layers, but there are {self.layers}: give "
                f"--layers {stages}, or fewer ranks or chunks"
            )
        if self.stage_layers:
            given = self.stage_layers.split(",")
            numbers = [int(number) if number.isdecimal() else 0 for number in given]
            if len(given) != stages or sum(numbers) != self.layers or min(numbers) < 1:
                raise ConfigurationError(
                    f"--stage-layers must be {stages} numbers from 1 that add up to --layers {self.layers}, got {self.stage_layers}"
                )


def balance(layers: int, stages: int, head_cost: float) -> list[int]:
    """Return how many layers each stage has, at least one, so that the dearest stage costs least; the last has the head too.

    Costs are in layers; where several ways are as good, earlier stages have more.
    """
    counts = [1] * stages
    for _ in range(layers - stages):
        counts[min(range(stages), key=lambda stage: counts[stage] + (head_cost if stage == stages - 1 else 0.0))] += 1
    return counts
