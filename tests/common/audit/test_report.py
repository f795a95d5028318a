"""The printed ledger: whole, true, quiet, and drawn by a real browser."""

from __future__ import annotations

import html
import json
import math
import re
import shutil
import socketserver
import subprocess
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.stats import norm

from common.audit.reading import read
from common.audit.report import Facts, collect, render, write_page, write_record
from common.audit.report.history import MOST, curve, lives
from common.audit.report.risk import accuracy, advantage, risk_of
from common.errors import FedwardError
from common.privacy.events import GaussianHistogram
from common.privacy.policy import Policy
from common.study import Study

Makers = dict[str, Callable[..., Any]]


@pytest.fixture(scope="module")
def whole(ledgers: Makers, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Facts, str]:
    """Four months of a hospital: the scribe, its facts, its page."""
    scribe = ledgers["months"]()
    path = scribe.save(tmp_path_factory.mktemp("report") / "ledger.jsonl")
    facts = collect(
        read(path), public_key=scribe.identity.public, receipts=[scribe.receipt()], quick=True
    )
    return scribe, facts, render(facts)


def text_of(page: str) -> str:
    bare = re.sub(r"<style>.*?</style>|<[^>]+>", " ", page, flags=re.S)
    return re.sub(r"\s+", " ", html.unescape(bare))


def test_the_page_says_what_the_ledger_says(whole: tuple[Any, Facts, str]) -> None:
    scribe, facts, page = whole
    said = text_of(page)
    assert "Valid. Complete up to line 74 of 74 against 1 receipt." in said
    for part in (scribe.book.head, facts.file_sha256, *scribe.book.keys, scribe.book.policy.sha256):
        assert part in said
    for account in scribe.book.studies.values():
        assert account.name in said
        assert account.study_hash[:12] in said
    for row in facts.rows:
        assert f"{math.ceil(row.spent.pld * 1000) / 1000:.3f}" in said
    for decided in ("approved", "revoked", "dr-weber", "1 run, until 2026-06-30"):
        assert decided in said
    assert re.search(r"study-revoked 3 .*encoder-unknown 2 .*rounds-per-day 1 ", said)
    assert "3 patients were erased: 2026-03-31 09:33" in said
    assert said.count("To be filled in") == sum(bool(e.to_fill) for e in facts.record.entries) > 9


def test_the_page_is_one_file_without_scripts_or_links_outward(
    whole: tuple[Any, Facts, str],
) -> None:
    page = whole[2]
    assert "default-src 'none'" in page
    assert "<script" not in page
    outward = set(re.findall(r'(?:src|href|action|data)="([^"#][^"]*)"', page))
    assert not outward
    assert not re.search(r"url\((?!#)", page)


def test_names_of_others_cannot_write_into_the_page(path: Path, ledgers: Makers) -> None:
    evil = '<img src=x onerror=alert(1)>"'
    scribe = ledgers["bare"](evil, virtual=True)
    scribe.save(path)
    page = render(collect(read(path), quick=True))
    assert evil not in page
    assert html.escape(evil, quote=False)[:12] in page


def test_an_invalid_ledger_yields_a_page_that_says_so(path: Path, ledgers: Makers) -> None:
    scribe = ledgers["small"]()
    raws = scribe.raws
    raws[5] = raws[5].replace(b'"steps":5', b'"steps":1')
    scribe.save(path)
    facts = collect(read(path), quick=True)
    said = text_of(render(facts))
    assert "Not valid: do not rely on this ledger." in said
    assert "Only lines 1 to 5 of 8 hold" in said
    assert said.index("Line 6: the line was changed after it was signed") < said.index("Dark line")
    assert facts.verification.counts["released"] == 2
    assert not facts.record.ledger_valid


@pytest.mark.parametrize("options", [{}, {"virtual": True}, {"entropy": "seeded"}])
def test_a_ledger_in_which_nothing_happened_has_a_page(
    options: dict[str, Any], path: Path, ledgers: Makers
) -> None:
    ledgers["bare"](**options).save(path)
    said = text_of(render(collect(read(path), quick=True)))
    assert "No study was approved" in said
    assert ("Valid, of a simulation." in said) == ("virtual" in options)
    assert ("Not private: do not rely" in said) == ("entropy" in options)


def test_a_release_without_privacy_shows_as_infinite(
    path: Path, ledgers: Makers, studies: Callable[..., Study]
) -> None:
    scribe = ledgers["small"](virtual=True)
    scribe.approve(studies("open", private=False))
    scribe.wait(hours=1).release(studies("open", private=False))
    scribe.save(path)
    page = render(collect(read(path), quick=True))
    assert "∞" in text_of(page)
    assert "nan" not in text_of(page)
    assert "NaN" not in page


def test_the_curve_ends_where_the_ledger_does(whole: tuple[Any, Facts, str]) -> None:
    scribe, facts, _ = whole
    assert len(facts.curve["train"]) == MOST + 1 < facts.verification.lines
    assert facts.curve["train"][-1].at == scribe.clock
    for population, points in facts.curve.items():
        spent = [point.spent for point in points]
        assert spent == sorted(spent), "nothing is ever refunded"
        assert spent[-1] == scribe.book.epsilon(1e-6)[population]
        lifetime = scribe.book.lifetime(population)
        assert points[-1].committed == lifetime.epsilon
        assert points[-1].cap == lifetime.cap.epsilon


def test_revocation_lowers_what_is_set_aside(path: Path, ledgers: Makers, studies: Any) -> None:
    scribe = ledgers["small"]()
    scribe.wait(days=1).revoke(studies())
    scribe.save(path)
    train = curve(read(path))["train"]
    assert train[-1].committed < train[-2].committed
    (life,) = lives(read(path))
    assert (life.ending, life.end) == ("revoked", scribe.clock)
    assert len(life.releases) == 4


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 1.0, 4.0, 8.0, 900.0])
def test_bounds_on_a_guesser_are_those_of_the_literature(epsilon: float) -> None:
    delta = 1e-5
    if epsilon < 700:
        power = math.exp(epsilon)
        assert advantage(epsilon, delta) == pytest.approx((power - 1 + 2 * delta) / (power + 1))
        assert accuracy(epsilon, delta) == pytest.approx((power + delta) / (power + 1))
    assert 0.5 <= accuracy(epsilon, delta) <= 1


@pytest.mark.parametrize("noise", [0.7, 2.0, 5.0])
def test_the_sharper_bound_is_above_the_best_guesser_and_close(noise: float) -> None:
    """For one Gaussian release the best guesser is known: a threshold half way."""
    event = GaussianHistogram(noise_multiplier=noise, count=1)
    best = norm.cdf(0.5 / noise)
    risk = risk_of({event: 1}, 1e-5)
    assert risk.sharper is not None
    assert best <= risk.sharper <= min(risk.accuracy, best + 0.04)


def test_the_record_leaves_to_the_officer_what_no_ledger_knows(
    whole: tuple[Any, Facts, str], tmp_path: Path
) -> None:
    _, facts, _ = whole
    write_record(facts, tmp_path / "record.json")
    record = json.loads((tmp_path / "record.json").read_text())
    entries = {entry["article"]: entry for entry in record["entries"]}
    assert {"30 (1) a", "30 (1) g, 32", "35 (7) c"} <= set(entries)
    assert not entries["30 (1) e"]["known"], "countries are nowhere in a ledger"
    assert entries["30 (1) e"]["to_fill"]
    assert record["ledger_head"] == facts.verification.head
    assert len(entries["30 (1) b"]["known"]) == 4
    assert any("patients erased: 3" in text for text in entries["30 (1) f"]["known"])


def test_recipients_are_named_only_where_the_policy_is_given(
    path: Path, ledgers: Makers, policy: Policy
) -> None:
    ledgers["small"]().save(path)

    def recipients(**given: Any) -> tuple[str, ...]:
        record = collect(read(path), quick=True, **given).record
        return next(e.known for e in record.entries if e.title == "Recipients")

    key = policy.coordinators[0]
    assert any(key in text for text in recipients(policy=policy))
    assert not any(key in text for text in recipients())


def test_without_matplotlib_the_error_says_what_to_do(whole: tuple[Any, Facts, str]) -> None:
    program = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "import common.audit.cli, common.audit.report as report\n"
        "from common.errors import FedwardError\n"
        "try: report.render(None)\n"
        "except FedwardError as error: print(error)"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "need matplotlib" in found.stdout, found.stderr
    assert "cure: pip install" in found.stdout


def test_a_page_that_cannot_be_written_is_a_clear_error(
    whole: tuple[Any, Facts, str], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FedwardError, match="cannot write it"):
        write_record(whole[1], tmp_path / "file" / "record.json")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


# -- a real browser -------------------------------------------------------------------------------

browser = pytest.mark.skipif(
    shutil.which("chromium") is None, reason="no browser `chromium` on this machine to draw with"
)


def chromium(*options: str, profile: Path) -> None:
    subprocess.run(
        [
            "chromium",
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--disable-background-networking",
            "--disable-component-update",
            f"--user-data-dir={profile}",
            *options,
        ],
        check=True,
        timeout=60,
        capture_output=True,
    )


class Proxy(BaseHTTPRequestHandler):
    """Notes whatever a page asks for, and answers nothing."""

    asked: list[str] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_error(404)

    do_CONNECT = do_POST = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        pass


def asked_for(page: Path, shot: Path) -> list[str]:
    """Draws a page, and says what it wanted of the network beside the browser's own errands."""
    Proxy.asked.clear()
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Proxy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        chromium(
            f"--proxy-server=http://127.0.0.1:{server.server_address[1]}",
            "--window-size=1240,6400",
            f"--screenshot={shot}",
            page.as_uri(),
            profile=page.with_name("profile"),
        )
        server.shutdown()
    return [url for url in Proxy.asked if not re.search(r"google|gvt1\.com", url)]


@browser
def test_a_browser_draws_the_page_and_asks_the_network_for_nothing(
    whole: tuple[Any, Facts, str], tmp_path: Path
) -> None:
    page, shot = tmp_path / "report.html", tmp_path / "page.png"
    page.write_text('<img src="http://hospital.invalid/pixel.png">')
    assert asked_for(page, shot) == ["http://hospital.invalid/pixel.png"], "it would be seen"
    write_page(whole[1], page)
    assert asked_for(page, shot) == []

    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    assert pixels.shape == (6400, 1240, 3)
    inked = (pixels < 200).any(axis=2)
    assert 0.01 < inked.mean() < 0.3
    bands = inked[:6000].reshape(12, 500, 1240).any(axis=(1, 2))
    assert bands.all(), "the page is drawn to its end"
    for colour in ((0, 114, 178), (213, 94, 0), (31, 107, 58)):  # spending, cap, verdict
        assert (np.abs(pixels - colour).sum(axis=2) < 12).sum() > 50, colour


@browser
def test_it_prints_on_a4(whole: tuple[Any, Facts, str], tmp_path: Path) -> None:
    write_page(whole[1], tmp_path / "report.html")
    chromium(
        f"--print-to-pdf={tmp_path / 'page.pdf'}",
        "--no-pdf-header-footer",
        (tmp_path / "report.html").as_uri(),
        profile=tmp_path / "profile",
    )
    pdf = (tmp_path / "page.pdf").read_bytes()
    boxes = {tuple(map(float, b.split())) for b in re.findall(rb"/MediaBox \[([\d. ]+)\]", pdf)}
    for _, _, width, height in boxes:
        assert (width, height) == (pytest.approx(595, abs=1), pytest.approx(842, abs=1))
    assert 5 <= len(re.findall(rb"/Type /Page\b", pdf)) <= 10
