"""A study between real processes gives what the simulation gives, and what the ledger says."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from common.study import Study
from simulations.inline import run_inline
from tests.e2e.conftest import SITES, study
from tests.e2e.deployment import Deployment, adapter_in


def unpinned(study: Study) -> Study:
    """For virtual hospitals, which have keys of their own."""
    raw = study.model_dump(mode="json")
    for site in raw["federation"]["sites"].values():
        site["public_key"] = None
    return Study.model_validate(raw)


def test_without_privacy_it_is_the_simulation_bit_for_bit(
    deployment: Deployment, tmp_path: Path
) -> None:
    settled = deployment.settled(study("exact"), private=False)
    for name, hospital in deployment.hospitals.items():
        # Who trains is random and secret in a hospital, and follows from the seed in a simulation.
        key = hashlib.sha256(
            f"fedward simulated population\0{Study.load(settled).seed}\0{name}".encode()
        ).digest()
        (hospital.folder.state / "population.key").write_bytes(key)
    deployment.approve(settled)
    deployment.submit(settled, "exact")
    report = deployment.await_end("exact")
    assert report["rounds"] == 3
    simulated = tmp_path / "simulated"
    run_inline(unpinned(Study.load(settled)), deployment.shards, simulated, threads=1)
    there, here = deployment.adapter("exact"), adapter_in(simulated)
    assert there.keys() == here.keys()
    for name in there:
        np.testing.assert_array_equal(there[name], here[name], err_msg=name)


def test_with_privacy_every_release_is_charged_and_nothing_else(deployment: Deployment) -> None:
    settled = deployment.settled(study("private"))
    deployment.approve(settled)
    deployment.submit(settled, "private")
    report = deployment.await_end("private")
    hash_ = Study.load(settled).hash
    for name in SITES:
        lines = [c for c in deployment.hospitals[name].charges if c["study_hash"] == hash_]
        kinds = [line["event"]["population"] for line in lines]
        assert kinds.count("train") == 3
        assert kinds.count("validation") == Study.load(settled).evaluation.releases
    assert 0 < report["privacy"]["epsilon"] <= 8
