"""Encoding a whole hospital: what a record may see, what the vault saves, who validates."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor

import client.site.encoders.run as run
from client.site.encoders.dataset import Dataset
from client.site.encoders.registry import release_encoders
from client.site.encoders.run import EncodeProgress, Populations, encode_site
from client.site.encoders.series import demographics, statistics
from client.site.encoders.text import HashedText
from client.site.encoders.vault import Vault
from client.site.shard import Shard
from common.errors import EncoderError, ShardError, StudyError
from common.study import Study

KEY = b"population key of a test"
SOURCES: dict[str, Any] = {
    "chart": {"modality": "series", "encoder": "series-statistics", "series": ["heart_rate"]},
    "lab": {"modality": "series", "encoder": "series-statistics", "series": ["lactate"]},
    "demographics": {"modality": "table", "encoder": "demographics"},
    "note": {"modality": "text", "encoder": "hashed-text"},
    "xray": {"modality": "image", "encoder": "image-descriptor"},
    "slide": {"modality": "embedding", "encoder": "precomputed", "dim": 3},
}


def study(
    sources: dict[str, Any] = SOURCES, tasks: Sequence[str] = ("death",), **rest: Any
) -> Study:
    return Study.model_validate(
        {"name": "test", "sources": sources, "tasks": {t: {} for t in tasks}, **rest}
    )


def encode(folder: Path, vault: Path, protocol: Study | None = None, **rest: Any) -> Populations:
    with Vault.open(vault) as opened:
        return encode_site(
            protocol or study(), Shard.open(folder), opened, population_key=KEY, **rest
        )


def rows(populations: Populations, name: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Embedding and mask of every record of both populations."""
    return {
        record: (part.inputs[name][row], part.present[name][row])
        for part in (populations.train, populations.validation)
        for row, record in enumerate(part.record_ids)
    }


def same(left: Dataset, right: Dataset) -> bool:
    return (
        left.record_ids == right.record_ids
        and torch.equal(left.labels, right.labels)
        and all(torch.equal(left.inputs[s], right.inputs[s]) for s in left.inputs)
        and all(torch.equal(left.present[s], right.present[s]) for s in left.present)
        and all(
            np.array_equal(a, b)
            for a, b in zip(left.rows_of_patient, right.rows_of_patient, strict=True)
        )
    )


def identical(left: Populations, right: Populations) -> bool:
    return same(left.train, right.train) and same(left.validation, right.validation)


def test_every_modality_arrives_with_its_mask(ward, tmp_path):
    folder = ward()
    populations = encode(folder, tmp_path / "v")
    shard = Shard.open(folder)
    assert shard.events is not None
    assert shard.notes is not None
    x, there = statistics(shard.events, shard.records, "chart", ["heart_rate"])
    age, _ = demographics(shard.records)
    (note,) = HashedText().encode([shard.notes["text"][0]])
    for row, record in enumerate(shard.records["record_id"]):
        vector, mask = rows(populations, "chart")[record]
        assert np.array_equal(vector[0].numpy(), x[row])
        assert mask.tolist() == [bool(there[row])]
        assert np.array_equal(rows(populations, "demographics")[record][0][0].numpy(), age[row])
    assert np.allclose(rows(populations, "note")["r0"][0].numpy(), note, atol=1e-6)
    slides = rows(populations, "slide")
    assert slides["r0"][0][0].numpy() * 14**0.5 == pytest.approx([1.0, 2.0, 3.0])  # norm 1
    assert {r: bool(m) for r, (_, m) in slides.items()} == {
        "r0": True,
        "r1": True,
        "r2": True,
        "r3": False,
        "r4": False,
    }
    assert slides["r4"][0].abs().sum() == 0
    for part in (populations.train, populations.validation):
        for name, x_NTd in part.inputs.items():
            assert x_NTd.dtype == torch.float32
            assert part.present[name].dtype == torch.bool
            assert not x_NTd[~part.present[name]].any()


def test_labels_are_true_false_or_unknown(ward, tmp_path):
    populations = encode(ward(), tmp_path / "v", study(tasks=["stay", "death", "relapse"]))
    labels = {
        record: part.labels[row].tolist()
        for part in (populations.train, populations.validation)
        for row, record in enumerate(part.record_ids)
    }
    assert labels == {
        "r0": [1, 0, -1],
        "r1": [1, 1, -1],
        "r2": [0, -1, -1],
        "r3": [-1, 0, -1],
        "r4": [0, 0, -1],
    }
    assert populations.train.labels.dtype == torch.int8
    assert populations.remarks == ("task 'relapse' has no column here: unknown in every record",)


@pytest.mark.parametrize("table", ["notes", "images", "events", "embeddings"])
def test_an_input_after_the_cutoff_changes_nothing(ward, tmp_path, parts, make_picture, table):
    """Every record of stay s0 ends by hour 24; an input at 24 h exactly is seen."""
    late = {
        "notes": {"category": "Discharge", "text": "Died of sepsis."},
        "images": {"path": "images/late.png", "view": "AP"},
        "events": {"source": "lab", "series": "lactate", "value": 15.0},
        "embeddings": {"source": "slide", "vector": [9.0, 9.0, 9.0]},
    }[table]
    files = {**parts["files"], "images/late.png": make_picture(77)}

    def at(hour: float) -> Path:
        row = pl.DataFrame(
            {"stay_id": ["s0"], "hours": [hour], **{k: [v] for k, v in late.items()}}
        )
        return ward(f"w{hour}", files=files, **{table: pl.concat([parts[table], row])})

    before = encode(ward(), tmp_path / "v0")
    assert identical(before, encode(at(24.0001), tmp_path / "v1"))
    seen = encode(at(24.0), tmp_path / "v2")
    name = {"notes": "note", "images": "xray", "events": "lab", "embeddings": "slide"}[table]
    old, new = rows(before, name), rows(seen, name)
    assert not torch.equal(old["r1"][0], new["r1"][0])
    assert torch.equal(old["r0"][0], new["r0"][0])  # its cutoff is hour 12


def test_the_order_of_input_rows_means_nothing(ward, tmp_path, parts):
    turned = {t: parts[t].reverse() for t in ("events", "images", "notes", "embeddings")}
    sources = {
        **SOURCES,
        "history": {**SOURCES["xray"], "pooling": "time-weighted"},
        "notes": {**SOURCES["note"], "pooling": "mean"},
    }
    first = encode(ward("a"), tmp_path / "v0", study(sources))
    assert identical(first, encode(ward("b", **turned), tmp_path / "v1", study(sources)))


def test_poolings_over_the_images_so_far(ward, tmp_path):
    sources = {p: {**SOURCES["xray"], "pooling": p} for p in ("latest", "mean", "time-weighted")}
    populations = encode(ward(), tmp_path / "v", study(sources))
    latest, mean, weighted = (rows(populations, p) for p in sources)
    # r0 sees image a only; r1 sees a (hour 2) and b (hour 18).
    a, b = latest["r0"][0], latest["r1"][0]
    middle = (a + b) / (a + b).norm()
    assert torch.allclose(weighted["r0"][0], a, atol=1e-6)
    assert torch.allclose(weighted["r1"][0], b, atol=1e-6)  # the first of two has weight 0
    assert torch.allclose(mean["r1"][0], middle, atol=1e-6)


def test_note_categories_are_chosen_by_the_study(ward, tmp_path):
    sources = {
        "note": {**SOURCES["note"], "categories": ["Progress"]},
        "demographics": SOURCES["demographics"],  # without it, the others have no source
    }
    populations = encode(ward(), tmp_path / "v", study(sources))
    present = {r: bool(m) for r, (_, m) in rows(populations, "note").items()}
    assert present == {"r0": False, "r1": True, "r2": False, "r3": False, "r4": False}


def test_a_note_without_words_does_not_hide_an_earlier_one(ward, tmp_path, parts):
    notes = parts["notes"].with_columns(
        text=pl.Series(["No edema. HR 72.", "--", "Cough and fever."])
    )
    found = rows(encode(ward(notes=notes), tmp_path / "v"), "note")
    assert torch.equal(found["r1"][0], found["r0"][0])


def test_absent_tables_are_absent_sources_and_no_task_at_all_is_an_error(ward, tmp_path):
    folder = ward(events=None, images=None, notes=None, embeddings=None)
    populations = encode(folder, tmp_path / "v")
    assert populations.remarks == tuple(
        f"source '{name}' is absent in every record"
        for name in ("chart", "lab", "note", "xray", "slide")
    )
    assert not populations.train.present["xray"].any()
    assert populations.train.inputs["xray"].shape[1:] == (1, 511)
    with pytest.raises(StudyError, match="no label of study 'test'") as caught:
        encode(folder, tmp_path / "v", study(tasks=["dead"]))
    assert "it has y_death, y_stay" in str(caught.value)
    assert "name tasks after" in caught.value.cure


def test_a_corrupt_image_is_named_and_the_rest_is_kept(ward, tmp_path, parts):
    whole = parts["files"]["images/c.png"]
    files = {**parts["files"], "images/c.png": whole[: len(whole) // 2]}
    folder = ward(files=files)
    protocol = study({"xray": SOURCES["xray"]})
    with pytest.raises(ShardError, match=r"row 2, file 'images/c\.png': unreadable") as caught:
        encode(folder, tmp_path / "v", protocol)
    assert caught.value.cure
    with Vault.open(tmp_path / "v") as vault:
        assert len(vault) == 2
    (folder / "images" / "c.png").write_bytes(whole)
    assert identical(
        encode(folder, tmp_path / "v", protocol), encode(ward("ok"), tmp_path / "w", protocol)
    )


def test_vectors_of_another_width_than_the_study_are_named(ward, tmp_path):
    with pytest.raises(ShardError, match=r"row 0: the vector has 3 numbers, the study .* dim = 4"):
        encode(ward(), tmp_path / "v", study({"slide": {**SOURCES["slide"], "dim": 4}}))


# -- populations --------------------------------------------------------------------------------


def many(patients: int) -> pl.DataFrame:
    """Two records each of so many patients."""
    ids = [f"p{n}" for n in range(patients) for _ in range(2)]
    return pl.DataFrame(
        {
            "record_id": [f"r{n}" for n in range(len(ids))],
            "patient_id": ids,
            "stay_id": [f"s{n}" for n in range(len(ids))],
            "cutoff_hours": 24.0,
            "age": 50.0,
            "sex": "F",
            "y_death": [n % 3 == 0 for n in range(len(ids))],
        }
    )


def only_records(ward, records: pl.DataFrame, name: str = "ward") -> Path:
    return ward(name, records=records, events=None, images=None, notes=None, embeddings=None)


def patients_of(dataset: Dataset, records: pl.DataFrame) -> set[str]:
    owner = dict(records.select("record_id", "patient_id").iter_rows())
    return {owner[record] for record in dataset.record_ids}


def test_patients_are_split_whole_by_a_keyed_hash(ward, tmp_path):
    records = many(400)
    protocol = study({"demographics": SOURCES["demographics"]})
    both = encode(only_records(ward, records), tmp_path / "v", protocol)
    train, validation = patients_of(both.train, records), patients_of(both.validation, records)
    assert train | validation == {f"p{n}" for n in range(400)}
    assert not train & validation
    assert 70 < len(validation) < 130  # a quarter, give or take three deviations
    for part in (both.train, both.validation):
        covered = np.concatenate(part.rows_of_patient)
        assert sorted(covered.tolist()) == list(range(part.n_records))
        assert all(len(r) == 2 for r in part.rows_of_patient)

    # The same patients among others, in another order: nobody changes sides.
    fewer = records.filter(pl.col("patient_id").str.ends_with("7")).reverse()
    again = encode(only_records(ward, fewer, "fewer"), tmp_path / "w", protocol)
    assert patients_of(again.validation, records) == {p for p in validation if p.endswith("7")}
    with Vault.open(tmp_path / "v") as vault:
        shard = Shard.open(only_records(ward, records, "other"))
        other = encode_site(protocol, shard, vault, population_key=b"another key")
    assert patients_of(other.validation, records) != validation


def test_a_shard_may_fix_the_populations_itself(ward, tmp_path):
    records = many(10).with_columns(
        population=pl.Series(["validation" if n in (6, 7) else "train" for n in range(20)])
    )
    both = encode(
        only_records(ward, records), tmp_path / "v", study({"d": SOURCES["demographics"]})
    )
    assert patients_of(both.validation, records) == {"p3"}
    assert both.train.n_patients == 9


# -- records without any source ------------------------------------------------------------------


def test_records_without_a_source_are_skipped_and_counted_at_home(ward, tmp_path):
    """r3 has no image; r4 is its patient's only record, and that patient is none of these."""
    protocol = study({name: SOURCES[name] for name in ("xray", "slide")})
    both = encode(ward(), tmp_path / "v", protocol)
    assert sorted(rows(both, "xray")) == ["r0", "r1", "r2"]
    assert both.remarks == ("2 of 5 records have no source and are skipped",)
    assert both.train.n_patients + both.validation.n_patients == 2  # as patients_declared sees it
    for part in (both.train, both.validation):
        covered = np.concatenate([np.zeros(0, dtype=np.int64), *part.rows_of_patient])
        assert sorted(covered.tolist()) == list(range(part.n_records))
        assert len(part.labels) == part.n_records
        assert all(
            len(x) == part.n_records for x in (*part.inputs.values(), *part.present.values())
        )
        assert bool(torch.cat(list(part.present.values()), dim=1).any(dim=1).all())


def test_skipping_moves_no_patient_and_changes_no_record_that_stays(ward, tmp_path):
    """What one patient's records have says nothing about who else trains, and on what."""
    records = many(40)
    stays = [f"s{n}" for n in range(80) if n % 4 != 1 and n // 2 != 7]
    notes = pl.DataFrame(
        {
            "stay_id": stays,
            "hours": [1.0] * len(stays),
            "category": ["Admission"] * len(stays),
            "text": [f"stay {stay}" for stay in stays],
        }
    )

    def split(name: str, **sources: Any) -> Populations:
        folder = ward(name, records=records, notes=notes, events=None, images=None, embeddings=None)
        return encode(folder, tmp_path / name, study({"note": SOURCES["note"], **sources}))

    few, every = split("few"), split("every", age=SOURCES["demographics"])
    assert not any("skipped" in remark for remark in every.remarks)
    assert few.remarks == ("22 of 80 records have no source and are skipped",)
    for part, whole in ((few.train, every.train), (few.validation, every.validation)):
        assert patients_of(part, records) == patients_of(whole, records) - {"p7"}
        kept = [whole.record_ids.index(record) for record in part.record_ids]
        assert torch.equal(part.inputs["note"], whole.inputs["note"][kept])
        assert torch.equal(part.labels, whole.labels[kept])
    assert few.train.n_patients + few.validation.n_patients == 39


def test_a_hospital_may_have_no_source_at_all(ward, tmp_path):
    folder = ward(events=None, images=None, notes=None, embeddings=None)
    none = encode(folder, tmp_path / "v", study({"xray": SOURCES["xray"]}))
    assert none.train.n_patients == none.validation.n_patients == 0
    assert none.remarks == (
        "source 'xray' is absent in every record",
        "5 of 5 records have no source and are skipped",
    )


# -- vault --------------------------------------------------------------------------------------


class Counting(HashedText):
    """Counts what it encodes."""

    def __init__(self, mark: str = "") -> None:
        super().__init__()
        self.fingerprint += mark
        self.seen: list[str] = []

    def encode(self, inputs):
        self.seen += inputs
        return super().encode(inputs)


@pytest.fixture
def use(monkeypatch):
    def put(encoder: object) -> None:
        monkeypatch.setattr(run, "build_encoder", lambda _: encoder)

    return put


NOTES_ONLY = study({"note": SOURCES["note"]})


def noted(ward, texts: Sequence[str], name: str = "noted") -> Path:
    """One patient, stay and record per text."""
    n = len(texts)
    records = many(n).gather_every(2).with_columns(stay_id=pl.Series([f"s{i}" for i in range(n)]))
    notes = pl.DataFrame(
        {
            "stay_id": [f"s{i}" for i in range(n)],
            "hours": [1.0] * n,
            "category": ["Admission"] * n,
            "text": texts,
        }
    )
    return ward(name, records=records, notes=notes, events=None, images=None, embeddings=None)


def test_each_input_is_encoded_once_whatever_sees_it(ward, tmp_path, use):
    encoder = Counting()
    use(encoder)
    folder = ward()
    sources = {"note": SOURCES["note"], "all": {**SOURCES["note"], "pooling": "mean"}}
    first = encode(folder, tmp_path / "v", study(sources))
    # Three notes; r0 and r1 both see the first one, and so do two sources.
    assert sorted(encoder.seen) == sorted(Shard.open(folder).notes["text"])  # type: ignore[index]
    assert identical(first, encode(folder, tmp_path / "v", study(sources)))
    assert len(encoder.seen) == 3


def test_a_text_of_several_patients_is_encoded_once_and_kept_for_each(ward, tmp_path, use):
    encoder = Counting()
    use(encoder)
    folder = noted(ward, ["all well"] * 3)
    encode(folder, tmp_path / "v", NOTES_ONLY)
    assert encoder.seen == ["all well"]
    with Vault.open(tmp_path / "v") as vault:
        assert len(vault) == 3
        vault.forget("p1")
        assert len(vault) == 2


def test_a_changed_encoder_encodes_all_anew(ward, tmp_path, use):
    folder = noted(ward, ["one", "two"])
    for encoder in (Counting(), Counting("changed")):
        use(encoder)
        encode(folder, tmp_path / "v", NOTES_ONLY)
        assert len(encoder.seen) == 2


def test_a_new_export_of_the_tables_is_encoded_anew(ward, tmp_path, parts):
    protocol = study({"lab": SOURCES["lab"]})
    encode(ward("old"), tmp_path / "v", protocol)
    more = parts["events"].with_columns(value=pl.col("value") * 3)
    new = encode(ward("new", events=more), tmp_path / "v", protocol)
    assert identical(new, encode(ward("same", events=more), tmp_path / "w", protocol))


def test_a_number_that_is_not_finite_stops_at_its_input(ward, tmp_path, use):
    class Broken(HashedText):
        def encode(self, inputs):
            return [np.full((1, self.dim), np.nan, dtype=np.float32) for _ in inputs]

    use(Broken())
    with pytest.raises(EncoderError, match=r"notes\.parquet, row 0: .* not finite"):
        encode(noted(ward, ["one"]), tmp_path / "v", NOTES_ONLY)


def test_progress_is_told_per_source_up_to_the_end(ward, tmp_path):
    told: list[EncodeProgress] = []
    encode(ward(), tmp_path / "v", on_progress=told.append)
    for name, total in {"chart": 5, "demographics": 5, "note": 3, "xray": 3, "slide": 2}.items():
        mine = [p for p in told if p.source == name]
        assert mine[0] == EncodeProgress(name, 0, total)
        assert mine[-1] == EncodeProgress(name, total, total)
        assert [p.done for p in mine] == sorted(p.done for p in mine)


KILLED = """
import sys, time
import client.site.encoders.inputs as inputs
from client.site.encoders.text import HashedText
from client.site.encoders.vault import Vault
from client.site.shard import Shard
from common.study import Source

shard, vault, log = sys.argv[1:]
inputs._COMMIT_SECONDS = 0.05

class Slow(HashedText):
    def encode(self, texts):
        time.sleep(0.01)
        with open(log, "a") as stream:
            stream.write(f"{texts[0]}\\n")
        return super().encode(texts)

source = Source(modality="text", encoder="hashed-text")
with Vault.open(vault) as opened:
    inputs.encode_inputs("note", source, Slow(), Shard.open(shard), opened, lambda *_: None)
"""


def test_a_killed_encode_resumes_without_redoing_or_losing(ward, tmp_path, use):
    texts = [f"word{n}" for n in range(300)]
    folder, log = noted(ward, texts), tmp_path / "log"
    arguments = [str(folder), str(tmp_path / "v"), str(log)]
    child = subprocess.Popen([sys.executable, "-c", KILLED, *arguments])
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") >= 90):
        assert child.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    before = log.read_text().splitlines()
    with Vault.open(tmp_path / "v") as vault:
        stored = len(vault)
    # At most the work of the commit interval (5 inputs) and what one slow commit holds up is lost.
    assert len(before) - 40 <= stored <= len(before) < 300

    encoder = Counting()
    encoder.fingerprint = HashedText().fingerprint
    use(encoder)
    resumed = encode(folder, tmp_path / "v", NOTES_ONLY)
    assert len(encoder.seen) == 300 - stored
    assert sorted({*before, *encoder.seen}) == sorted(texts)
    assert identical(resumed, encode(folder, tmp_path / "fresh", NOTES_ONLY))


# -- real data ----------------------------------------------------------------------------------


def real(folder: Path, tasks: Sequence[str], **sources: dict[str, Any]) -> Study:
    """The shard's own series as sources, with demographics and what else is given."""
    events = pl.read_parquet(folder / "events.parquet", columns=["source", "series"]).unique()
    series = {
        kind: {
            "modality": "series",
            "encoder": "series-statistics",
            "series": sorted(events.filter(source=kind)["series"]),
        }
        for kind in sorted(events["source"].unique())
    }
    return study({**series, "demographics": SOURCES["demographics"], **sources}, tasks)


def checked(folder: Path, vault: Path, protocol: Study) -> Populations:
    release_encoders()
    populations = encode(folder, vault, protocol)
    assert identical(populations, encode(folder, vault, protocol))
    for part in (populations.train, populations.validation):
        assert all(torch.isfinite(x).all() for x in part.inputs.values())
    return populations


def test_real_series_of_577_patients(open_data: Path, tmp_path):
    folder = open_data / "physionet-2012" / "set-a-ccu"
    both = checked(folder, tmp_path, real(folder, ["hospital_mortality"]))
    assert both.train.n_patients + both.validation.n_patients == 577
    assert int((both.train.labels == 1).sum() + (both.validation.labels == 1).sum()) == 81
    assert both.train.present["chart"].float().mean() > 0.9


def test_real_notes_of_patients_with_several_stays(open_data: Path, tmp_path):
    folder = open_data / "eicu-demo" / "hospital-175"
    tasks = ["hospital_mortality", "icu_los_over_3d"]
    both = checked(folder, tmp_path, real(folder, tasks, note=SOURCES["note"]))
    assert both.train.n_patients + both.validation.n_patients == 10
    assert both.train.n_records + both.validation.n_records == 12
    # The embedding of one note, known from the first run: the path from text to number is fixed.
    present = torch.cat([both.train.present["note"], both.validation.present["note"]])
    assert int(present.sum()) == 11


@pytest.mark.parametrize(
    ("pooling", "factor"), [("time-weighted-by-max", 16 / 18), ("time-weighted-by-range", 1.0)]
)
def test_the_published_poolings_keep_their_size(ward, tmp_path, pooling, factor):
    """r1 sees images of hours 2 and 18; r0 sees that of hour 2 alone, which weighs nothing."""
    sources = {"xray": SOURCES["xray"], "history": {**SOURCES["xray"], "pooling": pooling}}
    populations = encode(ward(), tmp_path / "v", study(sources))
    latest, history = rows(populations, "xray"), rows(populations, "history")
    assert torch.allclose(history["r1"][0], factor * latest["r1"][0], atol=1e-6)
    assert bool(history["r0"][1].all())
    assert not history["r0"][0].any()
    assert "r3" not in history  # no image, and here no other source


def test_records_that_lack_a_source_can_be_left_out(ward, tmp_path):
    folder = ward()
    sources = {name: SOURCES[name] for name in ("chart", "note", "xray")}
    every = encode(folder, tmp_path / "v", study(sources))
    there = {name: rows(every, name) for name in sources}
    complete = {r for r in there["note"] if all(bool(m[r][1].any()) for m in there.values())}
    assert complete == {"r0", "r1"}
    few = encode(folder, tmp_path / "v", study(sources, complete_records_only=True))
    for name in sources:
        found = rows(few, name)
        assert set(found) == complete
        assert all(torch.equal(found[r][0], there[name][r][0]) for r in complete)
    assert few.remarks == ("3 of 5 records lack a source and are left out (complete_records_only)",)
    assert every.remarks == ("1 of 5 records have no source and are skipped",)
    # Both are of one patient, who stays where they were, with their labels.
    (part,) = [p for p in (few.train, few.validation) if p.n_records]
    (whole,) = [p for p in (every.train, every.validation) if "r0" in p.record_ids]
    assert [r.tolist() for r in part.rows_of_patient] == [[0, 1]]
    assert part.labels.tolist() == [
        whole.labels[whole.record_ids.index(r)].tolist() for r in part.record_ids
    ]


def test_no_record_may_be_complete(ward, tmp_path):
    folder = ward()
    few = encode(folder, tmp_path / "v", study(complete_records_only=True))
    kept = few.train.n_records + few.validation.n_records
    assert kept == 1  # r1 alone has chart, lab, note, image and slide
    absent = {
        **SOURCES,
        "gone": {"modality": "series", "encoder": "series-statistics", "series": ["sodium"]},
    }
    none = encode(folder, tmp_path / "v", study(absent, complete_records_only=True))
    assert none.train.n_patients == none.validation.n_patients == 0
    assert none.train.labels.shape == none.validation.labels.shape == (0, 1)


def test_real_images_up_to_each_records_time(open_data: Path, tmp_path):
    folder = open_data / "hannover-cxr"
    sources = {"xray": SOURCES["xray"], "history": {**SOURCES["xray"], "pooling": "time-weighted"}}
    both = checked(folder, tmp_path, study(sources, ["icu_admission"]))
    assert both.train.n_patients + both.validation.n_patients == 71
    latest, history = rows(both, "xray"), rows(both, "history")
    assert all(bool(mask.all()) for _, mask in latest.values())
    differ = sum(not torch.equal(latest[r][0], history[r][0]) for r in latest)
    assert 50 < differ < 243 - 60  # a patient's first image is its own history
