"""The data report: its numbers against shards made by hand, and a page that gives nobody away."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score
from typer.testing import CliRunner

from client.site.shard import Shard, discover, write_shard
from client.site.shard.cli import app
from client.site.shard.clinical import SERIES
from client.site.shard.report import Facts, collect, findings, plots, render, write_report
from client.site.shard.report.facts import Histogram
from client.site.shard.report.leakage import aurocs
from client.site.shard.report.pictures import looks_inverted
from client.site.shard.report.units import unit_hint
from client.site.shard.report.words import cell, percent, value

META = {"name": "North", "hospital": "north"}
N = 60


def labels(n: int = N) -> list[bool]:
    return [i % 3 == 0 for i in range(n)]


def records(n: int = N, **changed: Any) -> pl.DataFrame:
    """One record per patient, cutoff at 24 h; `y_death` is true for every third."""
    columns = {
        "record_id": [f"rec-{i}" for i in range(n)],
        "patient_id": [f"pat-{i}" for i in range(n)],
        "stay_id": [f"stay-{i}" for i in range(n)],
        "cutoff_hours": [24.0] * n,
        "age": [40.0 + i % 40 for i in range(n)],
        "sex": ["F" if i % 2 else "M" for i in range(n)],
        "y_death": labels(n),
    }
    return pl.DataFrame({**columns, **changed})


def events(values: list[float], series: str = "heart_rate", **changed: Any) -> pl.DataFrame:
    """One event per stay, at hour 5."""
    n = len(values)
    columns = {
        "stay_id": [f"stay-{i}" for i in range(n)],
        "hours": [5.0] * n,
        "source": [next(source for source, name in SERIES if name == series)] * n,
        "series": [series] * n,
        "value": values,
    }
    return pl.DataFrame({**columns, **changed})


def notes(texts: list[str], hours: float = 3.0) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "stay_id": [f"stay-{i}" for i in range(len(texts))],
            "hours": [hours] * len(texts),
            "category": ["Progress"] * len(texts),
            "text": texts,
        }
    )


def noise(n: int = N, seed: int = 0) -> list[float]:
    return np.random.default_rng(seed).normal(80, 8, n).round(1).tolist()


@pytest.fixture
def look(tmp_path: Path) -> Callable[..., Facts]:
    """Facts of a shard of these tables."""

    def facts(**tables: Any) -> Facts:
        folder = tmp_path / f"shard-{len(list(tmp_path.iterdir()))}"
        return collect(write_shard(folder, **{"meta": META, "records": records(), **tables}))

    return facts


def titles(facts: Facts, level: str | None = None) -> str:
    return "\n".join(f.title for f in findings(facts) if level in (None, f.level))


# --- labels, missing inputs ---------------------------------------------------------------------


def test_prevalence_counts_records_and_patients(ward):
    death, stay = collect(Shard.open(ward())).tasks
    assert (death.true, death.false, death.unknown) == (1, 3, 1)
    assert (death.patients_true, death.patients_false) == (1, 3)
    assert death.prevalence == 0.25
    assert (stay.true, stay.false, stay.unknown, stay.patients_true) == (2, 2, 1, 1)


@pytest.mark.parametrize(
    ("label", "says"),
    [
        ([None] * N, "no record has a known label"),
        ([False] * N, "every known label is false"),
        ([i < 9 for i in range(N)], "only 9 patients with a true label"),
        ([i >= 1 for i in range(N)], "only 1 patient with a false label"),
    ],
)
def test_a_label_that_cannot_be_learnt_is_named(look, label, says):
    facts = look(records=records(y_death=pl.Series(label, dtype=pl.Boolean)))
    assert f"Label death: {says}" in titles(facts)
    assert facts.leakage.compared == ()


def test_a_label_with_ten_patients_on_either_side_is_not_named(look):
    assert "Label" not in titles(look(records=records(y_death=[i < 10 for i in range(N)])))


def test_missingness_is_what_lies_before_the_cutoff(ward):
    facts = collect(Shard.open(ward())).missingness
    seen = {s.name: (s.inputs, s.never, s.seeing) for s in facts.sources}
    assert seen == {
        "chart": (3, 1, 2),
        "lab": (2, 0, 2),
        "image": (3, 0, 3),
        "note": (3, 0, 3),
        "embedding": (2, 0, 3),
    }
    assert facts.without_input == 1
    assert (facts.n_seen.low, facts.n_seen.median, facts.n_seen.high) == (0, 3, 8)
    share = {item.name: item.share for item in facts.items}
    assert share["heart_rate"] == 0.4
    assert share["no view"] == 0.2


def test_shares_by_label_tell_informative_missingness(look):
    sick = [i for i, label in enumerate(labels()) if label]
    ph = events([7.2] * len(sick), "ph", stay_id=[f"stay-{i}" for i in sick])
    item = next(i for i in look(events=ph).missingness.items if i.name == "ph")
    assert item.by_label == {("death", True): 1.0, ("death", False): 0.0}


def test_events_without_a_value_and_unknown_series_are_told(look):
    table = events([*noise(N - 2), float("nan"), None])
    table = pl.concat([table, events([1.0] * 3).with_columns(series=pl.lit("mood"))])
    facts = look(events=table)
    (chart,) = facts.missingness.sources
    assert (chart.inputs, chart.skipped) == (N + 1, 2)
    assert "2 chart events without a finite value" in titles(facts)
    assert "1 series without a canonical name" in titles(facts)
    assert [row.spec.name for row in facts.ranges] == ["heart_rate"]


def test_inputs_at_exactly_the_cutoff_are_seen_and_told(look):
    facts = look(events=events(noise(), hours=[24.0] * 40 + [5.0] * 20))
    (chart,) = facts.missingness.sources
    assert (chart.at_cutoff, chart.never, chart.seeing) == (40, 0, N)
    before = sum(n for e, n in zip(chart.hours.edges, chart.hours.counts, strict=False) if e < 0)
    assert before == N
    assert "Inputs at exactly the cutoff: chart in 66.7" in titles(facts, "check")


# --- ranges and units ---------------------------------------------------------------------------


def test_ranges_are_quantiles_and_the_share_outside_the_limits(look):
    (row,) = look(events=events([float(v) for v in range(50, 109)] + [900.0])).ranges
    assert (row.values.n, row.values.median) == (60, 79.5)
    assert row.outside == pytest.approx(1 / 60)
    assert not row.constant


def test_values_far_outside_are_a_finding(look):
    assert "50.0\xa0% of heart_rate lie outside" in titles(
        look(events=events([80.0] * 30 + [900.0] * 30)), "act"
    )


def test_a_series_that_never_changes_is_told(look):
    assert "heart_rate is always 80" in titles(look(events=events([80.0] * N)))


@pytest.mark.parametrize(
    ("key", "usual", "unit"),
    [
        (("chart", "temperature"), lambda z: 98.2 + z, "deg F"),
        (("chart", "fio2"), lambda z: 0.45 + 0.1 * z, "fraction"),
        (("chart", "spo2"), lambda z: 0.97 + 0.01 * z, "fraction"),
        (("chart", "weight"), lambda z: 176 + 30 * z, "lb"),
        (("lab", "glucose"), lambda z: 7.5 + z, "mmol/L"),
        (("lab", "creatinine"), lambda z: 95 + 20 * z, "umol/L"),
        (("lab", "hemoglobin"), lambda z: 105 + 12 * z, "g/L"),
        (("lab", "calcium_total"), lambda z: 2.1 + 0.1 * z, "mmol/L"),
        (("lab", "pco2"), lambda z: 5.3 + 0.5 * z, "kPa"),
        (("lab", "troponin_t"), lambda z: 90 + 20 * z, "ng/L"),
    ],
)
def test_another_unit_is_suspected_by_the_median(key, usual, unit):
    z = np.random.default_rng(1).uniform(-1, 1, 80)
    hint = unit_hint(SERIES[key], pl.Series(usual(z)))
    assert hint is not None
    assert (hint.unit, hint.share) == (unit, 1.0)


def test_two_units_in_one_series_are_suspected_by_what_lies_outside():
    mixed = pl.Series([36.5 + i / 100 for i in range(90)] + [97.0 + i / 10 for i in range(10)])
    hint = unit_hint(SERIES["chart", "temperature"], mixed)
    assert hint is not None
    assert (hint.unit, hint.share) == ("deg F", 0.1)


@pytest.mark.parametrize("key", [k for k in SERIES if k[0] != "procedure"], ids=lambda k: k[1])
def test_typical_values_raise_no_suspicion(key):
    spec = SERIES[key]
    z = np.random.default_rng(2).normal(0, 1, 300)
    values = spec.centre * np.exp(spec.scale * z) if spec.log else spec.centre + spec.scale * z
    assert unit_hint(spec, pl.Series(values)) is None


def test_fahrenheit_reaches_the_top_of_the_page(look):
    facts = look(events=events([98.0 + i % 7 / 3 for i in range(N)], "temperature"))
    assert findings(facts)[0].title == "temperature may be in deg F"
    assert "in deg F?" in render(facts)


# --- images and notes ---------------------------------------------------------------------------


def chest(seed: int, *, inverted: bool = False) -> bytes:
    """A crude X-ray: dark air, two dark lungs, a bright spine."""
    y, x = np.mgrid[-1:1:64j, -1:1:64j]
    body = (np.abs(x) < 0.8) & (y > -0.6)
    lungs = body & (((np.abs(x) - 0.42) / 0.25) ** 2 + (y / 0.5) ** 2 < 1)
    grey = 0.05 + 0.6 * body - 0.3 * lungs + 0.2 * (np.abs(x) < 0.1)
    grey += np.random.default_rng(seed).normal(0, 0.01, grey.shape)
    pixels = np.clip(1 - grey if inverted else grey, 0, 1)
    stream = io.BytesIO()
    Image.fromarray((255 * pixels).astype(np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def with_images(files: dict[str, bytes]) -> dict[str, Any]:
    table = pl.DataFrame(
        {
            "stay_id": [f"stay-{i}" for i in range(len(files))],
            "hours": [1.0] * len(files),
            "path": list(files),
            "view": ["AP"] * len(files),
        }
    )
    return {"images": table, "files": files}


def test_inverted_unreadable_and_repeated_images_are_counted(look):
    files = {f"images/{i}.png": chest(i, inverted=i < 2) for i in range(8)}
    files["images/8.png"] = files["images/7.png"]
    files["images/9.png"] = b"no picture"
    facts = look(**with_images(files))
    found = facts.pictures
    assert found is not None
    assert (found.looked_at, found.inverted, found.unreadable) == (10, 2, 1)
    assert (found.repeated, found.across_patients) == (1, 1)
    assert found.sizes == {(64, 64): 9}
    assert sum(found.grey) == pytest.approx(1)
    assert "2 images may be inverted" in titles(facts)
    assert "1 image file cannot be read" in titles(facts)


def test_real_chest_x_rays_do_not_look_inverted_and_their_negatives_do(open_data):
    from client.site.shard import decode_image, to_grey

    shard = Shard.open(open_data / "hannover-cxr")
    greys = [to_grey(decode_image(shard.image_bytes(row), "")) for row in range(0, 243, 6)]
    assert sum(looks_inverted(grey) for grey in greys) == 0
    assert np.mean([looks_inverted(1 - grey) for grey in greys]) > 0.6


def test_notes_are_counted_by_category_and_length(look):
    same = "Patient comfortable overnight, plan of care unchanged."
    facts = look(notes=notes([same, same, "  ", "Short.", "Short."]))
    found = facts.texts
    assert found is not None
    assert (found.n, found.empty, found.repeated, found.across_patients) == (5, 1, 1, 1)
    (category,) = found.categories
    assert (category.name, category.n, category.words.high) == ("Progress", 5, 7)


# --- leakage ------------------------------------------------------------------------------------

CLEAN = "Lungs clear. No edema. Continue antibiotics, review tomorrow."


def leaky(said: str, label: bool = True) -> list[str]:
    return [CLEAN + (said if mine is label else "") for mine in labels()]


def test_a_word_that_tells_the_label_is_hinted(look):
    facts = look(notes=notes(leaky(" Patient expired.")))
    assert "Notes may tell the label death" in titles(facts, "act")
    hint = facts.leakage.words[0]
    assert (hint.word, hint.form, hint.with_true, hint.with_false) == ("expired", "said", 20, 0)
    assert hint.auroc == 1.0


def test_clean_notes_raise_no_hint(look):
    facts = look(notes=notes([CLEAN] * N), events=events(noise()))
    assert not any(hint.flagged for hint in facts.leakage.words)
    assert titles(facts, "act") == ""


def test_words_after_the_cutoff_are_no_leak(look):
    facts = look(notes=notes(leaky(" Patient expired."), hours=24.1))
    assert facts.leakage.words == ()


def test_a_negated_word_is_not_said(look):
    label = pl.Series(labels()).alias("y_pneumonia")
    texts = ["Has pneumonia." if mine else "No evidence of pneumonia." for mine in labels()]
    facts = look(records=records().drop("y_death").with_columns(label), notes=notes(texts))
    found = {(h.word, h.form): (h.with_true, h.with_false) for h in facts.leakage.words}
    assert found["pneumonia", "said"] == (20, 0)
    assert found["pneumonia", "negated"] == (0, 40)


def test_a_word_as_frequent_on_both_sides_is_shown_and_not_flagged(look):
    texts = [CLEAN + (" Family fears death." if i % 2 else "") for i in range(N)]
    hint = next(h for h in look(notes=notes(texts)).leakage.words if h.word == "died")
    assert (hint.with_true, hint.with_false, hint.flagged) == (10, 20, False)


def test_small_cells_are_not_shown(look):
    facts = look(notes=notes(leaky(" Patient expired.")))
    page = render(facts)
    assert '<td class="n">≥16 of 20</td><td class="n">&lt;5 of 40</td>' in page
    assert [cell(0, 9), cell(4, 9), cell(5, 9), cell(5, 10), cell(9, 9)] == [
        "<5 of 9",
        "<5 of 9",
        "≥5 of 9",
        "5 of 10",
        "≥5 of 9",
    ]


def test_one_series_that_separates_the_label_is_hinted(look):
    values = [v + 60 * label for v, label in zip(noise(), labels(), strict=True)]
    facts = look(events=events(values))
    hint = facts.leakage.series[0]
    assert (hint.name, hint.kind, hint.flagged, hint.higher) == (
        "heart_rate",
        "last value",
        True,
        True,
    )
    assert "The last value of heart_rate alone separates death" in titles(facts, "act")


def test_the_last_value_before_the_cutoff_counts(look):
    told = [60.0 + 60 * label for label in labels()]
    early = events(noise())
    late = events(told, hours=[30.0] * N)
    assert not any(h.flagged for h in look(events=pl.concat([early, late])).leakage.series)
    assert any(
        h.flagged
        for h in look(events=pl.concat([early, late.with_columns(hours=20.0)])).leakage.series
    )


def test_mere_presence_and_the_cutoff_itself_are_compared(look):
    sick = [i for i, label in enumerate(labels()) if label]
    facts = look(
        records=records(cutoff_hours=[12.0 if label else 24.0 for label in labels()]),
        events=events([7.2] * len(sick), "ph", stay_id=[f"stay-{i}" for i in sick]),
    )
    flagged = {(h.name, h.kind, h.higher) for h in facts.leakage.series if h.flagged}
    assert ("ph", "presence", True) in flagged
    assert ("cutoff hours", "record", False) in flagged
    assert "Whether a record has ph alone separates death" in titles(facts)


def test_random_series_are_not_hinted(look):
    assert not any(h.flagged for h in look(events=events(noise())).leakage.series)


def test_auroc_is_that_of_scikit_learn():
    rng = np.random.default_rng(3)
    label = rng.random(300) < 0.3
    score = np.round(rng.normal(label, 1.0), 1)  # with ties
    frame = pl.DataFrame(
        {"item": [0] * 300, "score": score, "label": label, "patient": np.arange(300)}
    )
    assert aurocs(frame, "item")["auroc"][0] == pytest.approx(roc_auc_score(label, score))


def test_records_of_few_patients_are_not_compared():
    frame = pl.DataFrame(
        {
            "item": [0] * 200,
            "score": [float(i >= 100) for i in range(200)],
            "label": [i >= 100 for i in range(200)],
            "patient": [i // 20 for i in range(200)],
        }
    )
    assert aurocs(frame, "item").is_empty()


def test_a_label_nearly_constant_in_a_category_is_hinted(look):
    table = notes([f"{CLEAN} Bed {i}." for i in range(N)]).with_columns(
        category=pl.Series(["Ward" if not label else f"ICU {0}" for label in labels()])
    )
    groups = look(notes=table).leakage.groups
    assert {(g.name, g.share, g.share_elsewhere) for g in groups} == {
        ("ICU 0", 1.0, 0.0),
        ("Ward", 0.0, 1.0),
    }


def test_twins_are_counted(look):
    table = pl.concat([events(noise(seed=h), hours=[float(h)] * N) for h in range(6)])
    copy = table.filter(pl.col("stay_id") == "stay-0").with_columns(stay_id=pl.lit("stay-1"))
    table = pl.concat([table.filter(pl.col("stay_id") != "stay-1"), copy])
    again = (
        records()
        .head(1)
        .with_columns(record_id=pl.lit("rec-again"), cutoff_hours=30.0, y_death=False)
    )
    facts = look(records=pl.concat([records(), again]), events=table)
    assert facts.leakage.twin_stays == 2
    assert (facts.leakage.twin_records, facts.leakage.contradicting) == (1, 1)
    assert "2 stays of different patients with identical inputs" in titles(facts, "act")


# --- the page -----------------------------------------------------------------------------------


class Page(HTMLParser):
    """Tags and attributes that could reach out of the page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.words += data


def full_shard(folder: Path, **changed: Any) -> Shard:
    files = {f"images/face-{i}.png": chest(i) for i in range(12)}
    tables = {
        "meta": META,
        "records": records(),
        "events": pl.concat([events(noise()), events([7.3] * N, "ph")]),
        "notes": notes([f"Mr Featherstonehaugh {i} was seen. {CLEAN}" for i in range(N)]),
        "embeddings": pl.DataFrame(
            {"stay_id": ["stay-0"], "hours": [1.0], "source": ["ecg"], "vector": [[1.0, 2.0]]}
        ),
        **with_images(files),
    }
    return write_shard(folder, **{**tables, **changed})


def test_the_page_names_no_patient_no_text_and_no_file(tmp_path):
    page = render(collect(full_shard(tmp_path / "north")))
    for private in ("rec-", "pat-", "stay-", "Featherstonehaugh", "face-", str(tmp_path)):
        assert private not in page
    assert "This page stays in the hospital." in page


def reaches_out(page: Page) -> list[str]:
    found = [f"<{t}>" for t in page.tags & {"script", "link", "img", "iframe", "object", "form"}]
    for name, text in page.attributes:
        if name == "src" or name.startswith("on"):
            found.append(f"{name}={text}")
        if name.endswith("href") and not text.startswith("#"):
            found.append(f"{name}={text}")
        if name == "style" and "url(" in text.replace("url(#", ""):
            found.append(text)
    return found


def test_bars_on_bars_are_shown_to_their_top(monkeypatch):
    drawn: list[Any] = []
    monkeypatch.setattr(plots, "_svg", lambda figure, title: drawn.append(figure))
    edges = (0.0, 5.0, 10.0)
    plots.ages({"female": Histogram(edges, (4, 1)), "male": Histogram(edges, (9, 30))})
    assert drawn[0].axes[0].get_ylim()[1] > 31


def test_the_page_is_self_contained(tmp_path):
    text = render(collect(full_shard(tmp_path / "north")))
    assert reaches_out(Page(text)) == []
    assert "@import" not in text
    assert "url(http" not in text
    assert text.count("<svg") >= 8
    assert "mathdefault" not in text


def test_every_anchor_has_its_section(tmp_path):
    page = Page(render(collect(full_shard(tmp_path / "north"))))
    ids = {text for name, text in page.attributes if name == "id"}
    targets = {text[1:] for name, text in page.attributes if name == "href"}
    assert targets <= ids


HOSTILE = '<script src="http://evil.example/x.js">alert(1)</script>"\'{{ 7*7 }} $\\frac{'


def test_hostile_strings_are_text(tmp_path):
    table = records().rename({"y_death": f"y_{HOSTILE}"})
    wild = events(noise()).with_columns(series=pl.lit(HOSTILE))
    told = notes([HOSTILE] * N).with_columns(category=pl.lit(HOSTILE))
    meta = {**META, "name": HOSTILE, "notes": [HOSTILE], "licence": HOSTILE, "dataset": HOSTILE}
    shard = full_shard(
        tmp_path / "north",
        meta=meta,
        records=table,
        events=pl.concat([events(noise()), wild]),
        notes=told,
    )
    history = {"source": HOSTILE, "options": {HOSTILE: HOSTILE}, "remarks": [HOSTILE]}
    (shard.path / "import.json").write_text(json.dumps(history))
    text = render(collect(shard))
    page = Page(text)
    assert reaches_out(page) == []
    assert "<script" not in text
    assert HOSTILE in page.words


@pytest.mark.parametrize(
    "tables",
    [
        {},
        {"events": events([80.0])},
        {"records": records(1)},
        {"meta": {**META, "dataset": 3, "notes": 7, "licence": {"of": "x"}}},
        {"records": records(1), "events": events([80.0]), "notes": notes([""])},
        {"records": records(y_death=pl.Series([None] * N, dtype=pl.Boolean))},
        {"records": records(age=pl.Series([None] * N, dtype=pl.Float64), sex=[None] * N)},
        {"events": events(noise()).clear(), "notes": notes(["x"]).clear()},
        {"events": events([None] * N)},
        {"events": events([0.0] * N, "creatinine")},
        {"events": events([-1e30, 1e300] * 30, "lactate")},
        {"events": events(noise(), hours=[1e9] * N)},
        {"notes": notes(["", " "])},
        with_images({"images/a.png": b"not an image"}),
    ],
    ids=lambda tables: ",".join(tables) or "nothing",
)
def test_a_poor_shard_has_a_page(look, tables):
    page = render(look(**tables))
    assert "What to look at first" in page
    assert reaches_out(Page(page)) == []


def test_how_the_shard_was_made_is_told(tmp_path):
    shard = full_shard(tmp_path / "north")
    assert "How it was made" not in render(collect(shard))
    table = {"table": "chartevents", "file": "icu/chartevents.csv.gz", "rows": 1000, "kept": 900}
    history = {
        "source": "MIMIC-IV",
        "created": "2026-01-02",
        "software": "fedward 0.1",
        "options": {"cutoff_hours": 24},
        "tables": [{**table, "skipped": {"no unit": 100}, "noted": {"from kPa": 7}}],
        "remarks": ["charttime stands in for storetime"],
    }
    (shard.path / "import.json").write_text(json.dumps(history))
    words = Page(render(collect(shard))).words
    for told in (
        "MIMIC-IV",
        "cutoff_hours: 24",
        "1,000",
        "no unit: 100",
        "from kPa: 7",
        "90.0",
        "storetime",
    ):
        assert told in words


@pytest.mark.parametrize("text", ["{", "[]", '{"tables": 3, "options": [], "remarks": {}}', "\xff"])
def test_a_broken_history_is_told_and_not_raised(tmp_path, text):
    shard = full_shard(tmp_path / "north")
    (shard.path / "import.json").write_text(text, encoding="latin-1")
    facts = collect(shard)
    assert "How it was made" in render(facts)
    assert ("import.json" in titles(facts)) == (not text.startswith('{"'))


def test_numbers_are_written_for_people():
    assert [value(v) for v in (0.0, 12.34, -0.5, 1234.5, 1e300, float("nan"))] == [
        "0",
        "12.3",
        "−0.5",
        "1,234",
        "1.0e+300",
        "–",
    ]
    assert [percent(p) for p in (0, 0.0001, 0.5, 0.9999, 1, None)] == [
        "0\xa0%",
        "<0.1\xa0%",
        "50.0\xa0%",
        ">99.9\xa0%",
        "100\xa0%",
        "–",
    ]


# --- the command --------------------------------------------------------------------------------


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["report", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_one_shard_is_written_beside_its_tables(tmp_path):
    full_shard(tmp_path / "north")
    code, output = run(str(tmp_path / "north"))
    place = tmp_path / "north" / "report.html"
    assert (code, output.strip()) == (0, str(place))
    assert place.read_text().startswith("<!doctype html>")
    assert place.stat().st_mode & 0o077 == 0
    Shard.open(tmp_path / "north")


def test_several_shards_each_get_theirs_and_a_broken_one_stops_no_other(tmp_path):
    for name in ("a", "b", "c"):
        full_shard(tmp_path / "all" / name, meta={"name": name, "hospital": name})
    (tmp_path / "all" / "b" / "records.parquet").unlink()
    code, output = run(str(tmp_path / "all"), "-o", str(tmp_path / "pages"))
    assert code == 1
    assert "records.parquet is missing" in output
    assert sorted(p.name for p in (tmp_path / "pages").iterdir()) == ["a.html", "c.html"]


def test_a_place_that_cannot_be_written_is_told(tmp_path):
    full_shard(tmp_path / "north")
    (tmp_path / "file").write_text("")
    code, output = run(str(tmp_path / "north"), "-o", str(tmp_path / "file" / "page.html"))
    assert code == 1
    assert "cannot write the report" in output
    assert "cure" in output


def test_the_report_loads_no_torch():
    script = (
        "import sys, client.site.shard.report; "
        "assert not {'torch', 'transformers', 'matplotlib.pyplot'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


# --- real shards --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["eicu-demo", "eicu-demo-regions", "hannover-cxr", "physionet-2012"]
)
def test_every_real_shard_has_a_page(open_data, name):
    for folder in discover(open_data / name):
        shard = Shard.open(folder)
        page = Page(render(collect(shard)))
        assert reaches_out(page) == [], folder
        assert f"{shard.records.height:,}" in page.words
        for column in ("patient_id", "record_id"):
            long = {key for key in shard.records[column] if len(key) >= 8}
            assert not [key for key in long if key in page.words], folder


@pytest.mark.skipif(
    shutil.which("chromium") is None, reason="no browser `chromium` on this machine to draw with"
)
def test_a_browser_draws_the_page(tmp_path):
    write_report(full_shard(tmp_path / "north"), tmp_path / "page.html")
    subprocess.run(
        [
            "chromium",
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--screenshot={tmp_path / 'page.png'}",
            "--window-size=1240,4000",
            (tmp_path / "page.html").as_uri(),
        ],
        check=True,
        capture_output=True,
        timeout=120,
    )
    pixels = np.asarray(Image.open(tmp_path / "page.png").convert("RGB")).astype(int)
    assert pixels.shape == (4000, 1240, 3)
    # Text and plots on every screenful, and the plots' blue somewhere.
    ink = (pixels.sum(axis=2) < 600).mean(axis=1)
    assert all(screen.mean() > 0.005 for screen in ink[:3000].reshape(4, 750))
    assert ((np.abs(pixels - [0x00, 0x72, 0xB2]).sum(axis=2)) < 30).sum() > 2000
