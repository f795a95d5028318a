"""The machine, as its tools report it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from common.study import Study
from deploy.site.doctor import machine
from deploy.site.layout import SiteFolder
from tests.deploy.site.doctor.looking import look, one


def test_another_bundle_than_the_pinned_one(site: SiteFolder) -> None:
    assert one(site, "bundle").verdict == "pass"
    site.relay.configure(site.relay.config().model_copy(update={"bundle": "0" * 64}))
    finding = one(site, "bundle")
    assert finding.verdict == "fail"
    assert "site upgrade" in finding.cure


def test_versions(site: SiteFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    finding = one(site, "versions")
    assert finding.verdict == "pass"
    for name in ("python", "fedward", "flwr 1.41.0", "torch"):
        assert name in finding.text
    there = machine.version
    monkeypatch.setattr(machine, "version", lambda n: "1.40.0" if n == "flwr" else there(n))
    assert one(site, "versions").verdict == "fail"
    monkeypatch.setattr(machine, "version", lambda n: "9.9" if n == "fedward" else there(n))
    assert one(site, "versions").verdict == "warn"


def test_disk(site: SiteFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = machine.shutil.disk_usage(site.root)
    for free, verdict in ((2**29, "fail"), (2**31, "warn"), (2**40, "pass")):
        shown = usage._replace(free=free)
        monkeypatch.setattr(machine.shutil, "disk_usage", lambda _, shown=shown: shown)
        assert one(site, "disk").verdict == verdict


def test_the_slm_must_fit(site: SiteFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    study = Study.load("demo")
    config = site.config_file
    config.write_text('device = "cpu"\n' + config.read_text())
    finding = look(site, "configuration", "GPU", study=study)["GPU"]
    assert finding.verdict == "pass"
    assert "the weights of 'nano' take" in finding.text

    files = machine.locate("nano", None)
    assert files is not None
    large = replace(files)
    monkeypatch.setitem(large.__dict__, "shapes", {"w": (10**6, 10**7)})
    monkeypatch.setattr(machine, "locate", lambda *_: large)
    finding = look(site, "configuration", "GPU", study=study)["GPU"]
    assert finding.verdict == "fail"
    assert "smaller model" in finding.cure
    monkeypatch.setattr(machine, "locate", lambda *_: None)
    finding = look(site, "configuration", "GPU", study=study)["GPU"]
    assert finding.verdict == "warn"
    assert "hf download" in finding.cure

    config.write_text(config.read_text().replace('"cpu"', '"cuda:7"'))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    finding = look(site, "configuration", "GPU")["GPU"]
    assert finding.verdict == "fail"
    assert "asks for cuda:7" in finding.text


def test_a_gpu_is_measured_against_the_slm(
    site: SiteFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch reports a GPU; the weights count 2 bytes each there."""
    import torch

    files = machine.locate("nano", None)
    assert files is not None
    monkeypatch.setitem(files.__dict__, "shapes", {"w": (2**30, 2)})  # 4 GiB in bf16
    monkeypatch.setattr(machine, "locate", lambda *_: files)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    for total, free, verdict in ((3, 3, "fail"), (8, 5, "warn"), (8, 7, "pass")):
        memory = (free * 2**30, total * 2**30)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, memory=memory: memory)
        assert one(site, "GPU", study=Study.load("demo")).verdict == verdict
