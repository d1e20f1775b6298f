"""The model against a plain loop, and the rules of names and storage."""

from __future__ import annotations

import math

import numpy as np
import pytest

from parallel.autograd import Tensor, no_gradient
from parallel.formulas import gpt_parameters
from parallel.nn import GPT, Draws, GPTConfiguration, Parameter

SMALL = GPTConfiguration(layers=2, hidden=8, heads=2, sequence=5, vocabulary=11)


def build(dtype: str = "float64", seed: int = 3, shape: GPTConfiguration = SMALL) -> tuple[GPT, dict[str, Parameter]]:
    model = GPT(shape)
    named = dict(model.named_parameters())
    for name, parameter in named.items():
        parameter.name = name
        values = parameter.initial_values(seed, 0, parameter.size)
        parameter.data = values.astype(dtype).reshape(parameter.shape)
    return model, named


def loop_forward(weights: dict[str, np.ndarray], tokens: list[int]) -> np.ndarray:
    """The same model, one position at a time, written from the papers and not from the code."""

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return (x - x.mean()) / math.sqrt(x.var() + 1e-5) * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return weights[f"{name}.weight"] @ x + weights[f"{name}.bias"]

    def gelu(x: np.ndarray) -> np.ndarray:
        return np.array([0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))) for v in x])

    embedding = weights["token_embedding.weight"]
    stream = [embedding[t] + weights["position_embedding.weight"][i] for i, t in enumerate(tokens)]
    size = SMALL.hidden // SMALL.heads
    for layer in range(SMALL.layers):
        name = f"blocks.{layer}"
        packed = [
            linear(norm(x, f"{name}.attention_norm"), f"{name}.attention.packed").reshape(SMALL.heads, 3, size)
            for x in stream
        ]
        for i in range(len(tokens)):
            mixed = []
            for head in range(SMALL.heads):
                scores = [packed[i][head, 0] @ packed[j][head, 1] / math.sqrt(size) for j in range(i + 1)]
                shares = np.exp(scores) / np.exp(scores).sum()
                mixed.append(sum(shares[j] * packed[j][head, 2] for j in range(i + 1)))
            stream[i] = stream[i] + linear(np.concatenate(mixed), f"{name}.attention.output")
        for i, x in enumerate(stream):
            up = linear(norm(x, f"{name}.feed_forward_norm"), f"{name}.feed_forward.up")
            stream[i] = x + linear(gelu(up), f"{name}.feed_forward.down")
    return np.array([embedding @ norm(x, "final_norm") for x in stream])


def test_logits_and_loss_are_those_of_a_plain_loop() -> None:
    model, named = build()
    for parameter in named.values():
        parameter.data += np.random.default_rng(parameter.data.size).standard_normal(parameter.shape) * 0.3
    windows = np.random.default_rng(1).integers(0, SMALL.vocabulary, (3, SMALL.sequence + 1))
    weights = {name: parameter.data for name, parameter in named.items()}
    expected = np.array([loop_forward(weights, list(row[:-1])) for row in windows])
    np.testing.assert_allclose(model(windows[:, :-1]).data, expected, rtol=1e-11, atol=1e-12)
    log_softmax = expected - np.log(np.exp(expected).sum(-1, keepdims=True))
    loss = -np.take_along_axis(log_softmax, windows[:, 1:, None], -1).mean()
    assert float(model.loss(windows, 1 / windows[:, 1:].size).data) == pytest.approx(loss, rel=1e-12)


def test_a_position_does_not_see_later_ones() -> None:
    model, _ = build()
    tokens = np.array([[1, 2, 3, 4, 5]])
    changed = np.array([[1, 2, 3, 9, 9]])
    before, after = model(tokens).data, model(changed).data
    np.testing.assert_array_equal(before[:, :3], after[:, :3])
    assert not np.allclose(before[:, 3:], after[:, 3:])


def test_names_are_stable_and_say_what_decays() -> None:
    model, _ = build()
    block = {
        "attention_norm.weight": False, "attention_norm.bias": False,
        "attention.packed.weight": True, "attention.packed.bias": False,
        "attention.output.weight": True, "attention.output.bias": False,
        "feed_forward_norm.weight": False, "feed_forward_norm.bias": False,
        "feed_forward.up.weight": True, "feed_forward.up.bias": False,
        "feed_forward.down.weight": True, "feed_forward.down.bias": False,
    }  # fmt: skip
    expected = {
        "token_embedding.weight": False,
        "position_embedding.weight": False,
        **{f"blocks.{n}.{name}": decay for n in range(SMALL.layers) for name, decay in block.items()},
        "final_norm.weight": False,
        "final_norm.bias": False,
    }
    assert {name: p.decay for name, p in model.named_parameters()} == expected


def test_a_slice_of_first_values_is_that_of_all() -> None:
    _, named = build()
    parameter = named["blocks.1.feed_forward.up.weight"]
    np.testing.assert_array_equal(parameter.initial_values(3, 5, 17), parameter.data.reshape(-1)[5:17])


def test_dropout_depends_on_the_sample_and_the_step_alone() -> None:
    model, _ = build(shape=GPTConfiguration(2, 8, 2, 5, 11, dropout=0.4))
    windows = np.random.default_rng(1).integers(0, 11, (4, 6))
    with no_gradient():
        whole = model(windows[:, :-1], Draws(1, 7, 0)).data
        for sample in range(4):
            part = model(windows[sample : sample + 1, :-1], Draws(1, 7, sample)).data
            np.testing.assert_allclose(part, whole[sample : sample + 1], rtol=1e-12)
        for other in (Draws(1, 8, 0), Draws(2, 7, 0), Draws(1, 7, 1), None):
            assert not np.allclose(model(windows[:, :-1], other).data, whole)


def test_a_wrapper_is_called_in_place_of_forward() -> None:
    model, _ = build()
    seen = []

    def wrapper(forward, x: Tensor, *others: object) -> Tensor:
        seen.append(x.shape)
        return forward(x, *others)

    model.blocks[1].wrapper = wrapper
    model(np.zeros((2, 3), np.int64))
    assert seen == [(2, 3, 8)]


@pytest.mark.parametrize("shape", [(1, 4, 1, 1, 1), (2, 8, 2, 5, 11), (3, 16, 4, 7, 256)])
def test_the_number_of_parameters_is_what_the_formula_says(shape: tuple[int, int, int, int, int]) -> None:
    layers, hidden, heads, sequence, vocabulary = shape
    model = GPT(GPTConfiguration(layers, hidden, heads, sequence, vocabulary))
    assert model.parameter_count() == gpt_parameters(layers, hidden, sequence, vocabulary)


def test_first_values_follow_the_rule_of_each_parameter() -> None:
    _, named = build(seed=0, shape=GPTConfiguration(layers=2, hidden=64, heads=2, sequence=16))
    assert (named["blocks.0.attention_norm.weight"].data == 1).all()
    assert (named["blocks.0.feed_forward.up.bias"].data == 0).all()
    deviation = math.sqrt(2 / (5 * 64))
    assert named["token_embedding.weight"].data.std() == pytest.approx(deviation, rel=0.05)
    assert named["blocks.0.feed_forward.up.weight"].data.std() == pytest.approx(deviation, rel=0.05)
    assert named["blocks.1.feed_forward.down.weight"].data.std() == pytest.approx(deviation / 2, rel=0.05)
    assert not np.array_equal(
        named["blocks.0.feed_forward.up.weight"].data, named["blocks.1.feed_forward.up.weight"].data
    )


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(ValueError, match="heads must divide hidden, but 8 is no multiple of 3"):
        GPTConfiguration(1, 8, 3, 4)
    with pytest.raises(ValueError, match="layers must be at least 1, got 0"):
        GPTConfiguration(0, 8, 2, 4)
    with pytest.raises(RuntimeError, match="has no values here; give the model to DataParallel"):
        GPT(SMALL)(np.zeros((1, 2), np.int64))
    with pytest.raises(ValueError, match="6 positions, but the model has 5"):
        build()[0](np.zeros((1, 6), np.int64))
