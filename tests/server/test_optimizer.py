"""Server optimizers against slow references."""

from __future__ import annotations

import math

import numpy as np

from server.optimizer import FedAdam, FedAvg, TailAverage, weighted_mean


def test_weighted_mean_renormalises_and_accumulates_in_double() -> None:
    rng = np.random.default_rng(0)
    arrays = [{"w": rng.normal(size=50).astype(np.float32)} for _ in range(3)]
    weights = [0.1, 0.2, 0.4]
    got = weighted_mean(list(zip(weights, arrays, strict=True)))["w"]
    exact = [
        math.fsum(w / 0.7 * float(a["w"][i]) for w, a in zip(weights, arrays, strict=True))
        for i in range(50)
    ]
    np.testing.assert_allclose(got, exact, rtol=1e-14, atol=1e-16)
    assert got.dtype == np.float64


def test_fedavg_with_unit_rate_is_the_mean() -> None:
    current = {"w": np.ones(3, np.float32)}
    mean = {"w": np.array([1 / 3, 2.0, 1e-9])}
    np.testing.assert_array_equal(FedAvg().step(current, mean)["w"], mean["w"].astype(np.float32))


def test_fedadam_is_algorithm_two() -> None:
    rng = np.random.default_rng(1)
    optimizer = FedAdam(0.1)
    x = {"w": rng.normal(size=7).astype(np.float32)}
    m = [0.0] * 7
    v = [0.0] * 7
    for _ in range(4):
        mean = {"w": rng.normal(size=7)}
        expected = []
        for i in range(7):
            change = mean["w"][i] - float(x["w"][i])
            m[i] = 0.9 * m[i] + 0.1 * change
            v[i] = 0.99 * v[i] + 0.01 * change * change
            expected.append(float(x["w"][i]) + 0.1 * m[i] / (math.sqrt(v[i]) + 1e-3))
        x = optimizer.step(x, mean)
        np.testing.assert_allclose(x["w"], np.array(expected, np.float32), rtol=1e-6)
        assert x["w"].dtype == np.float32


def test_fedadam_state_round_trip() -> None:
    rng = np.random.default_rng(2)
    first, second = FedAdam(0.1), FedAdam(0.1)
    x = {"a:b": rng.normal(size=4).astype(np.float32)}
    x = first.step(x, {"a:b": rng.normal(size=4)})
    second.restore(first.state())
    mean = {"a:b": rng.normal(size=4)}
    assert first.step(x, mean)["a:b"].tobytes() == second.step(x, mean)["a:b"].tobytes()


def test_tail_average_is_the_mean_of_the_last_rounds_and_survives_a_checkpoint() -> None:
    adapters = [{"w": np.full(3, n, dtype=np.float32)} for n in range(1, 11)]
    whole, first = TailAverage(10, 0.5), TailAverage(10, 0.5)
    for n, adapter in enumerate(adapters, start=1):
        whole.add(n, adapter)
    for n, adapter in enumerate(adapters[:7], start=1):
        first.add(n, adapter)
    second = TailAverage(10, 0.5)
    second.restore(first.state())
    for n, adapter in enumerate(adapters[7:], start=8):
        second.add(n, adapter)
    assert whole.mean(adapters[-1])["w"].tolist() == [8.0, 8.0, 8.0]
    assert second.mean(adapters[-1])["w"].tobytes() == whole.mean(adapters[-1])["w"].tobytes()
    assert whole.mean(adapters[-1])["w"].dtype == np.float32


def test_tail_average_of_nothing_is_the_last_round() -> None:
    average = TailAverage(4, 0.0)
    for n in range(1, 5):
        average.add(n, {"w": np.array([n], dtype=np.float32)})
    assert average.mean({"w": np.array([0], dtype=np.float32)})["w"].tolist() == [4.0]
    untouched = {"w": np.array([7], dtype=np.float32)}
    assert TailAverage(4, 0.5).mean(untouched) is untouched
