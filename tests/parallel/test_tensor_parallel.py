"""Layers that are cut among ranks: what they compute, what their values are placed as, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from collectives import Communicator
from collectives.testing import run_ranks
from parallel.autograd import (
    COPIED,
    FEATURES,
    OUTPUTS,
    PARTIAL,
    REPLICATED,
    SEQUENCE,
    TABLE,
    Operation,
    Placement,
    PlacementError,
    Tensor,
    across,
    deferring,
    recompute,
    vjps,
)
from parallel.axis import TILES, Axis, Cut
from parallel.exact import TreeSum, order_free_sum, tree_of_rows
from parallel.nn import ColumnParallelLinear, Embedding, FeedForward, LayerNorm, Linear, Parameter, RowParallelLinear

SAMPLES, POSITIONS, WIDTH = 2, 6, 8
SEED = 3


def fill(module: Any, dtype: str = "float64") -> None:
    for name, parameter in module.named_parameters():
        parameter.name = name
        values = parameter.initial_values(SEED, 0, parameter.size).astype(dtype)
        # Biases begin as constants: give them what a whole one would have there.
        if parameter.deviation == 0:
            whole = np.random.default_rng(1).normal(size=parameter.whole_shape)
            box = tuple(slice(a, a + n) for a, n in zip(parameter.start, parameter.shape, strict=True))
            values = whole[box].astype(dtype)
        parameter.data = values.reshape(parameter.shape)


def whole_of(parameter: Parameter, array: np.ndarray, comm: Communicator) -> np.ndarray:
    """What the ranks have of a parameter's gradient, put together, or added up where each has a part of the sum."""
    whole = np.zeros(parameter.whole_shape)
    box = tuple(slice(a, a + n) for a, n in zip(parameter.start, parameter.shape, strict=True))
    whole[box] = array
    if parameter.placement is REPLICATED:
        return whole
    return comm.all_reduce(whole)


def inputs(*shape: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    return generator.normal(size=shape), generator.normal(size=shape)


def positions_of(axis: Axis, array: np.ndarray) -> np.ndarray:
    own = axis.positions(array.shape[1])
    return array[:, own.start : own.stop]


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_cut_feed_forward_layer_is_the_whole_one(ranks: int, sequence: bool, exact: bool) -> None:
    samples = 1 if exact else SAMPLES
    x, g = inputs(samples, POSITIONS, WIDTH)
    plain = FeedForward(WIDTH, 0.1)
    fill(plain)
    leaf = Tensor(x, requires_gradient=True)
    result = plain(leaf)
    result.backward(g)
    expected = {name: parameter.gradient for name, parameter in plain.named_parameters()}

    def rank(comm: Communicator) -> None:
        axis = Axis(comm, sequence=sequence, exact=exact)
        layer = FeedForward(WIDTH, 0.1, axis)
        fill(layer)
        placement = SEQUENCE if sequence else REPLICATED
        mine = Tensor(np.ascontiguousarray(positions_of(axis, x)), requires_gradient=True, placement=placement)
        out = layer(mine)
        assert out.placement == placement
        np.testing.assert_allclose(out.data, positions_of(axis, result.data), rtol=0, atol=1e-12)
        out.backward(np.ascontiguousarray(positions_of(axis, g)))
        np.testing.assert_allclose(mine.gradient, positions_of(axis, leaf.gradient), rtol=0, atol=1e-12)
        for name, parameter in layer.named_parameters():
            found = whole_of(parameter, parameter.gradient, comm)
            np.testing.assert_allclose(found, expected[name], rtol=0, atol=1e-12, err_msg=name)

    run_ranks(ranks, rank)


@pytest.mark.parametrize("sequence", [False, True])
def test_parts_that_are_added_up_while_the_next_is_computed_are_the_sum(sequence: bool) -> None:
    """The overlapped row against what it is composed of, and the bytes that it sends."""
    x, g = inputs(SAMPLES, POSITIONS, WIDTH)

    def rank(comm: Communicator) -> None:
        axis = Axis(comm, sequence=sequence)
        layer = RowParallelLinear(WIDTH, WIDTH, axis)
        fill(layer)
        cut = axis.cut(WIDTH).elements
        data = np.ascontiguousarray(x[..., cut.start : cut.stop])
        found = []
        for overlapped in (True, False):
            leaf = Tensor(data, requires_gradient=True, placement=FEATURES)
            layer.weight.gradient = None
            before = comm.stats.bytes_sent
            if overlapped:
                out = across.project_and_sum(leaf, layer.weight, axis=axis)
            else:
                part = vjps.project(leaf, layer.weight)
                assert part.placement == PARTIAL
                leave = across.scatter_sequence if sequence else across.sum_over_ranks
                out = leave(part, axis=axis)
            sent = comm.stats.bytes_sent - before
            out.backward(np.ascontiguousarray(positions_of(axis, g)))
            found.append((out.data, leaf.gradient, layer.weight.gradient))
            whole = SAMPLES * POSITIONS * WIDTH * 8
            assert sent == (1 if sequence else 2) * whole * (comm.size - 1) // comm.size
        for one, other in zip(*found, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-13)

    run_ranks(2, rank)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("exact", [False, True])
def test_an_embedding_and_a_loss_of_a_vocabulary_that_is_cut(ranks: int, exact: bool) -> None:
    vocabulary = 11  # which no number of ranks here divides
    generator = np.random.default_rng(2)
    tokens, targets = generator.integers(0, vocabulary, (2, SAMPLES, POSITIONS))
    logits = generator.normal(size=(SAMPLES, POSITIONS, vocabulary)) * 3
    table = Embedding(vocabulary, WIDTH)
    fill(table)
    plain = table(tokens)
    plain.backward(np.ones_like(plain.data))
    leaf = Tensor(logits, requires_gradient=True)
    loss = vjps.cross_entropy(leaf, targets=targets, scale=0.3)
    loss.backward()

    def rank(comm: Communicator) -> None:
        axis = Axis(comm, exact=exact)
        mine = Embedding(vocabulary, WIDTH, axis)
        fill(mine)
        found = mine(tokens)
        np.testing.assert_array_equal(found.data, plain.data)
        found.backward(np.ones_like(found.data))
        np.testing.assert_allclose(whole_of(mine.weight, mine.weight.gradient, comm), table.weight.gradient, atol=1e-12)
        cut = axis.cut(vocabulary)
        own = cut.elements
        part = Tensor(logits[..., own.start : own.stop].copy(), requires_gradient=True, placement=FEATURES)
        here = across.vocabulary_cross_entropy(part, targets=targets, scale=0.3, axis=axis, cut=cut)
        assert here.placement == REPLICATED
        np.testing.assert_allclose(here.data, loss.data, rtol=1e-13)
        here.backward()
        np.testing.assert_allclose(part.gradient, leaf.gradient[..., own.start : own.stop], atol=1e-13)

    run_ranks(ranks, rank)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_products_of_what_crosses_ranks_are_its_transpose(ranks: int) -> None:
    """Every row is linear: what it does to all ranks' values together, and what its product does to gradients."""
    generator = np.random.default_rng(5)
    values, gradients = generator.normal(size=(2, ranks, SAMPLES, POSITIONS, WIDTH))

    def rank(comm: Communicator) -> None:
        axis, here = Axis(comm, sequence=True), comm.rank
        own = axis.positions(POSITIONS)

        def part(array: np.ndarray) -> np.ndarray:
            return np.ascontiguousarray(array[:, own.start : own.stop])

        def check(
            row: Operation, x: np.ndarray, placement: Placement, y: np.ndarray, g: np.ndarray, x_gradient: np.ndarray
        ) -> None:
            leaf = Tensor(x, requires_gradient=True, placement=placement)
            result = row(leaf, axis=axis)
            np.testing.assert_allclose(result.data, y, rtol=0, atol=1e-13)
            result.backward(g)
            np.testing.assert_allclose(leaf.gradient, x_gradient, rtol=0, atol=1e-13)

        same, total, g, g_total = values[0], values.sum(0), gradients[here], gradients.sum(0)
        check(across.copy_to_ranks, same, REPLICATED, same, g, g_total)
        check(across.sum_over_ranks, values[here], PARTIAL, total, gradients[0], gradients[0])
        check(across.gather_sequence, part(same), SEQUENCE, same, g, part(g_total))
        check(across.scatter_sequence, values[here], PARTIAL, part(total), part(gradients[0]), gradients[0])

    run_ranks(ranks, rank)


# Placements


def placed(placement: Placement, *shape: int) -> Tensor:
    return Tensor(np.ones(shape), requires_gradient=True, placement=placement)


X, W, B = (1, 2, 4), (4, 4), (4,)


@pytest.mark.parametrize(
    ("operation", "arguments", "message"),
    [
        (vjps.project, (placed(REPLICATED, *X), placed(OUTPUTS, *W)), "project of values that are replicated and sharded by outputs; .* or copied and sharded .* through copy_to_ranks"),
        (vjps.linear, (placed(FEATURES, *X), placed(FEATURES, *W), placed(REPLICATED, *B)), "linear of values that are sharded"),
        (vjps.add, (placed(PARTIAL, *X), placed(REPLICATED, *X)), "add of values that are partial and replicated; .* sum_over_ranks"),
        (vjps.layer_norm, (placed(SEQUENCE, *X), placed(REPLICATED, *B), placed(REPLICATED, *B)), "layer_norm of values that are"),
        (vjps.layer_norm, (placed(PARTIAL, *X), placed(REPLICATED, *B), placed(REPLICATED, *B)), "layer_norm of values that are partial"),
        (vjps.gelu, (placed(FEATURES, *X), placed(REPLICATED, *B)), "gelu of values that are sharded by width and replicated"),
        (vjps.causal_attention, (placed(SEQUENCE, 1, 2, 12),), "causal_attention of values that are sharded by positions"),
        (across.sum_over_ranks, (placed(REPLICATED, *X),), "sum_over_ranks of values that are replicated; it takes partial"),
        (across.copy_to_ranks, (placed(COPIED, *X),), "copy_to_ranks of values that are copied; it takes replicated"),
        (across.gather_sequence, (placed(FEATURES, *X),), "gather_sequence of values"),
        (across.scatter_sequence, (placed(SEQUENCE, *X),), "scatter_sequence of values"),
        (vjps.cross_entropy, (placed(FEATURES, *X),), "cross_entropy of values that are sharded by width; it takes replicated"),
    ],
)  # fmt: skip
def test_a_value_that_is_placed_wrongly_is_refused_at_once(
    operation: Operation, arguments: tuple[Tensor, ...], message: str
) -> None:
    options = {"heads": 1} if operation is vjps.causal_attention else {}
    with pytest.raises(PlacementError, match=message):
        operation(*arguments, **options)


def test_a_layer_of_the_stream_that_forgets_its_axis_is_refused() -> None:
    """Sequence parallelism's silent bug: a normalisation whose gradient nobody adds up."""

    def rank(comm: Communicator) -> None:
        layer = LayerNorm(4)
        fill(layer)
        with pytest.raises(PlacementError, match="layer_norm of values that are sharded by positions and replicated"):
            layer(placed(SEQUENCE, *X))
        right = LayerNorm(4, Axis(comm, sequence=True))
        fill(right)
        assert right(placed(SEQUENCE, *X)).placement == SEQUENCE

    run_ranks(2, rank)


def test_the_rows_that_cross_ranks_are_in_the_table() -> None:
    crossing = {"copy_to_ranks", "sum_over_ranks", "gather_sequence", "scatter_sequence", "project_and_sum"}
    assert crossing | {"vocabulary_cross_entropy"} <= set(TABLE)


# What is drawn, cut and summed


@given(
    rows=st.integers(1, 9), columns=st.integers(1, 9), dimension=st.integers(0, 1), ranks=st.integers(1, 4), data=st.data()
)  # fmt: skip
def test_parts_of_a_parameter_begin_as_the_whole_does(
    rows: int, columns: int, dimension: int, ranks: int, data: st.DataObject
) -> None:
    whole = Parameter((rows, columns), deviation=1.0)
    expected = whole.initial_values(SEED, 0, whole.size).reshape(rows, columns)
    length = (rows, columns)[dimension]
    for rank in range(ranks):
        cut = Cut(length, length, ranks, rank).elements
        part = Parameter((rows, columns), deviation=1.0, cut=cut, dimension=dimension)
        start = data.draw(st.integers(0, part.size))
        stop = data.draw(st.integers(start, part.size))
        own = expected[cut.start : cut.stop] if dimension == 0 else expected[:, cut.start : cut.stop]
        np.testing.assert_array_equal(part.initial_values(SEED, start, stop), own.reshape(-1)[start:stop])


@given(length=st.integers(1, 60), pieces=st.integers(1, 20), ranks=st.integers(1, 8))
def test_cuts_are_runs_of_pieces(length: int, pieces: int, ranks: int) -> None:
    pieces = min(pieces, length)
    cuts = [Cut(length, pieces, ranks, rank) for rank in range(ranks)]
    assert [n for cut in cuts for n in cut.elements] == list(range(length))
    for cut in cuts:
        tiles = cut.tiles()
        assert [n for tile in tiles for n in range(tile.start, tile.stop)] == list(range(len(cut.elements)))


@given(st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_the_tree_over_rows_is_the_tree_over_numbers(count: int, seed: int) -> None:
    values = np.random.default_rng(seed).normal(size=(count, 2)).astype(np.float32)
    tree = TreeSum()
    for number, row in enumerate(values):
        tree.add((0, number), row.copy())
    np.testing.assert_array_equal(tree_of_rows(values.copy(), 0).total(), tree.total())


@given(st.lists(st.floats(0, 1e300), min_size=1, max_size=40), st.randoms(use_true_random=False), st.integers(1, 5))
def test_an_order_free_sum_has_the_same_bits_in_any_order_and_on_any_ranks(
    values: list[float], random: Any, ranks: int
) -> None:
    def total(numbers: list[float], parts: int) -> float:
        arrays = [np.array(numbers[rank::parts]) for rank in range(parts)]
        largest = max(numbers)

        def rank(comm: Communicator) -> float:
            return order_free_sum([arrays[comm.rank]], len(numbers), lambda x: largest, comm.all_reduce)

        (found,) = set(run_ranks(parts, rank))
        return found

    shuffled = list(values)
    random.shuffle(shuffled)
    one = total(values, 1)
    assert total(shuffled, ranks) == one
    assert one == pytest.approx(float(np.sum(values)), rel=1e-12)


def test_the_halves_of_backward_are_the_whole() -> None:
    layer = FeedForward(WIDTH, 0.1)
    fill(layer)
    x, g = inputs(SAMPLES, POSITIONS, WIDTH)
    found: list[dict[str, np.ndarray]] = []

    class Sink:
        def place(self, leaf: Tensor) -> np.ndarray:
            return np.empty(leaf.shape)

        def complete(self, leaf: Tensor) -> None:
            completed.append(leaf)

    for split in (False, True):
        completed: list[Tensor] = []
        for _, parameter in layer.named_parameters():
            parameter.gradient, parameter.sink = None, Sink()
        leaf = Tensor(x, requires_gradient=True)
        result = layer(leaf)
        later: list[Any] = []
        if split:
            with deferring(later):
                result.backward(g)
            assert leaf.gradient is not None
            assert not completed
            for finish in later:
                finish()
        else:
            result.backward(g)
        assert len(completed) == 4
        found.append({"x": leaf.gradient, **{name: p.gradient for name, p in layer.named_parameters()}})
    for name, one in found[0].items():
        np.testing.assert_array_equal(one, found[1][name])


def test_there_are_tiles_for_exact_sums() -> None:
    def rank(comm: Communicator) -> None:
        assert Axis(comm, exact=True).cut(64).pieces == TILES
        assert Axis(comm, exact=True).cut(5).pieces == 5
        assert Axis(comm).cut(64).pieces == 64
        column = ColumnParallelLinear(4, 6, Axis(comm))
        assert column.weight.shape == (3, 4)
        assert column.weight.placement == OUTPUTS
        assert Linear(4, 6).weight.placement == REPLICATED

    run_ranks(2, rank)


@pytest.mark.parametrize("sequence", [False, True])
def test_a_row_parallel_weight_has_a_gradient_where_its_input_has_none(sequence: bool) -> None:
    def rank(comm: Communicator) -> np.ndarray:
        axis = Axis(comm, sequence=sequence)
        weight = Tensor(np.ones((3, 2)), requires_gradient=True, placement=FEATURES)
        gradient = np.zeros(weight.shape)
        weight.sink = Keeper(gradient)
        x = Tensor(np.ones((1, POSITIONS, 2)), placement=FEATURES)
        result = across.project_and_sum(x, weight, axis=axis)
        result.backward(np.ones(result.shape))
        return gradient

    for gradient in run_ranks(2, rank):
        np.testing.assert_array_equal(gradient, np.full((3, 2), POSITIONS))


class Keeper:
    """A sink with one array."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def place(self, leaf: Tensor) -> np.ndarray:
        return self.array

    def complete(self, leaf: Tensor) -> None:
        pass


def test_what_is_computed_again_must_be_placed_as_its_input() -> None:
    def rank(comm: Communicator) -> None:
        axis, weight = Axis(comm), Tensor(np.ones((4, 2)), True, OUTPUTS)
        x = Tensor(np.ones((1, POSITIONS, 2)), requires_gradient=True)
        with pytest.raises(PlacementError, match=r"recompute of what makes sharded by width of replicated"):
            recompute(lambda y: vjps.project(across.copy_to_ranks(y, axis=axis), weight), x)

    run_ranks(2, rank)
