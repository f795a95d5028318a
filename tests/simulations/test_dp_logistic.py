"""The baseline keeps its bound, learns, and prices what it does."""

from __future__ import annotations

import numpy as np
import pytest

from common.errors import PrivacyError, StudyError
from simulations.baselines import dp_logistic
from simulations.baselines.dp_logistic import Recipe, SiteArrays, clipped_sum, fit_dp_logistic


def cohort(seed: int, sites: int = 2, patients: int = 1500) -> list[SiteArrays]:
    rng = np.random.default_rng(seed)
    truth = np.array([1.5, -1.0, 0.5, 0.0, 0.0])
    arrays = []
    for _ in range(sites):
        x = rng.normal(size=(patients, 5)) / 2
        y = (rng.random(patients) < 1 / (1 + np.exp(-(2 * x @ truth - 1.8)))).astype(float)
        arrays.append(SiteArrays(x, y, 1400))
    return arrays


def score(sites: list[SiteArrays], **options) -> float:
    held = cohort(99, sites=1, patients=4000)[0]
    weights = fit_dp_logistic(sites, delta=1e-5, recipe=Recipe(2.0), seed=0, **options)
    return dp_logistic.roc_auc_score(held.y, held.x @ weights)


def test_one_patient_moves_the_sum_by_at_most_the_clipping_norm() -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(200, 7)) * rng.lognormal(0, 3, size=(200, 1))
    y = (rng.random(200) < 0.3).astype(float)
    for weights in (np.zeros(7), rng.normal(size=7) * 5):
        whole = clipped_sum(x, y, weights, -1.8, 0.5)
        for patient in range(200):
            keep = np.arange(200) != patient
            moved = whole - clipped_sum(x[keep], y[keep], weights, -1.8, 0.5)
            assert np.linalg.norm(moved) <= 0.5 + 1e-9
    # And the bound is not kept by clipping everything away.
    alone = clipped_sum(x[:1] / np.linalg.norm(x[0]) * 10, y[:1], np.zeros(7), -1.8, 0.5)
    assert np.linalg.norm(alone) == pytest.approx(0.5)


def test_without_a_bound_it_is_the_gradient_of_the_logistic_loss() -> None:
    site = cohort(3)[0]
    weights = np.array([0.3, -0.2, 0.1, 0.0, 0.5])

    def loss(w: np.ndarray) -> float:
        z = site.x @ w - 1.8
        return float(np.sum(np.logaddexp(0, z) - site.y * z))

    step = 1e-6
    numeric = [
        (loss(weights + step * e) - loss(weights - step * e)) / (2 * step) for e in np.eye(5)
    ]
    np.testing.assert_allclose(
        clipped_sum(site.x, site.y, weights, -1.8, None), numeric, rtol=1e-5, atol=1e-3
    )


def test_a_patient_that_is_not_finite_contributes_nothing() -> None:
    x, y = np.array([[1.0, 2.0], [np.nan, 1.0], [np.inf, 1.0]]), np.array([1.0, 0.0, 0.0])
    np.testing.assert_array_equal(
        clipped_sum(x, y, np.zeros(2), 0.0, 1.0), clipped_sum(x[:1], y[:1], np.zeros(2), 0.0, 1.0)
    )


def test_it_learns_and_privacy_costs() -> None:
    sites = cohort(0)
    plain, loose, tight = (score(sites, epsilon=e) for e in (None, 8.0, 0.05))
    assert plain > 0.83
    assert loose > plain - 0.02
    assert tight < loose - 0.02


def test_entropy_of_the_system_differs_between_runs_and_seeds_repeat() -> None:
    sites = cohort(0, patients=100)
    options = {"epsilon": 1.0, "delta": 1e-5, "recipe": Recipe(1.0)}
    assert not np.array_equal(fit_dp_logistic(sites, **options), fit_dp_logistic(sites, **options))
    np.testing.assert_array_equal(
        fit_dp_logistic(sites, seed=4, **options), fit_dp_logistic(sites, seed=4, **options)
    )


def test_meaningless_privacy_is_refused() -> None:
    with pytest.raises(PrivacyError):
        fit_dp_logistic(cohort(0), epsilon=0.0, delta=1e-5, recipe=Recipe(1.0))


def test_a_number_of_declared_patients_per_shard(tmp_path) -> None:
    with pytest.raises(StudyError, match="declared"):
        dp_logistic.main([str(tmp_path), "--declared", "100"])
