"""The shard contract: every break of it is one error that names file, row and cure."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from PIL import Image
from typer.testing import CliRunner

from client.site.shard import Shard, decode_image, discover, inspect, to_grey, write_shard
from client.site.shard.cli import app
from common.errors import ShardError


def put(frame: pl.DataFrame, row: int, **cells: Any) -> pl.DataFrame:
    """The frame with some cells of one row replaced."""
    for name, value in cells.items():
        values = frame[name].to_list()
        values[row] = value
        dtype = frame.schema[name]
        frame = frame.with_columns(pl.Series(name, values, dtype=dtype))
    return frame


def test_a_valid_shard_opens_with_its_tables_tasks_and_images(ward):
    shard = Shard.open(ward())
    assert shard.hospital == "ward"
    assert shard.tasks == ("death", "stay")
    assert (shard.records.height, shard.n_patients) == (5, 3)
    assert shard.events is not None
    assert shard.events.columns == ["stay_id", "hours", "source", "series", "value"]
    assert shard.image_bytes(2)[:4] == b"\x89PNG"
    assert shard.check_images() == []


def test_all_tables_but_records_may_be_absent(ward):
    shard = Shard.open(ward(events=None, images=None, notes=None, embeddings=None))
    assert shard.events is shard.images is shard.notes is shard.embeddings is None


def test_other_columns_are_ignored_and_whole_numbers_are_numbers(ward, parts):
    records = parts["records"].with_columns(
        cutoff_hours=pl.col("cutoff_hours").cast(pl.Int32), secret=pl.lit("x")
    )
    shard = Shard.open(ward(records=records))
    assert "secret" not in shard.records.columns
    assert shard.records.schema["cutoff_hours"] == pl.Float64


def test_repr_shows_no_patient(ward):
    assert "p0" not in repr(Shard.open(ward()))


# Each case: table, change of that table, what the message must say, what the cure must say.
BROKEN = {
    "missing column": (
        "records",
        lambda t: t.drop("cutoff_hours"),
        "records.parquet: no column 'cutoff_hours'",
        "add it (a number)",
    ),
    "identifier is a number": (
        "records",
        lambda t: t.with_columns(patient_id=pl.Series([1, 1, 2, 2, 3])),
        "records.parquet: column 'patient_id' is Int64, not text",
        "write it as String",
    ),
    "label is a number": (
        "records",
        lambda t: t.with_columns(pl.col("y_death").cast(pl.Int8)),
        "records.parquet: column 'y_death' is Int8, not boolean",
        "write it as Boolean",
    ),
    "no label": (
        "records",
        lambda t: t.drop("y_death", "y_stay"),
        "records.parquet: no label column",
        "y_<task>",
    ),
    "no records": (
        "records",
        lambda t: t.clear(),
        "records.parquet: no records",
        "at least one record",
    ),
    "null patient": (
        "records",
        lambda t: put(t, 3, patient_id=None),
        "records.parquet, row 3: 'patient_id' is empty",
        "fill it in, or remove the row",
    ),
    "empty record id": (
        "records",
        lambda t: put(t, 1, record_id=""),
        "records.parquet, row 1: 'record_id' is empty",
        "fill it in",
    ),
    "negative cutoff": (
        "records",
        lambda t: put(t, 2, cutoff_hours=-1.0),
        "records.parquet, row 2: cutoff_hours is -1.0",
        "hours since the stay began",
    ),
    "cutoff is not a number": (
        "records",
        lambda t: put(t, 4, cutoff_hours=float("nan")),
        "records.parquet, row 4: cutoff_hours is nan",
        "hours since the stay began",
    ),
    "age of 300": (
        "records",
        lambda t: put(t, 0, age=300.0),
        "records.parquet, row 0: age is 300.0",
        "0 to 130",
    ),
    "duplicate record": (
        "records",
        lambda t: put(t, 4, record_id="r1"),
        "records.parquet, row 4: record_id 'r1' is given twice",
        "its own id",
    ),
    "stay of two patients": (
        "records",
        lambda t: put(t, 1, patient_id="p9"),
        "records.parquet, row 1: stay 's0' belongs to patient 'p9' here and to 'p0' above",
        "give the stay to one patient",
    ),
    "patient in two populations": (
        "records",
        lambda t: t.with_columns(
            population=pl.Series(["train", "train", "train", "validation", "train"])
        ),
        "records.parquet, row 3: patient 'p1' is in population 'validation' here and in 'train'",
        "into one population",
    ),
    "unknown population": (
        "records",
        lambda t: t.with_columns(population=pl.Series(["test"] * 5)),
        "records.parquet, row 0: population is 'test' (and 4 more rows)",
        "one of train, validation",
    ),
    "orphan event": (
        "events",
        lambda t: put(t, 3, stay_id="s9"),
        "events.parquet, row 3: stay 's9' is not in records.parquet",
        "remove the row, or add the stay's record",
    ),
    "orphan note": (
        "notes",
        lambda t: put(t, 2, stay_id="s9"),
        "notes.parquet, row 2: stay 's9' is not in records.parquet",
        "remove the row",
    ),
    "orphan image": (
        "images",
        lambda t: put(t, 0, stay_id="s9"),
        "images.parquet, row 0: stay 's9'",
        "remove the row",
    ),
    "orphan vector": (
        "embeddings",
        lambda t: put(t, 1, stay_id="s9"),
        "embeddings.parquet, row 1: stay 's9'",
        "remove the row",
    ),
    "unknown event source": (
        "events",
        lambda t: put(t, 1, source="vitals"),
        "events.parquet, row 1: source is 'vitals'",
        "chart, lab, procedure",
    ),
    "event without a time": (
        "events",
        lambda t: put(t, 2, hours=None),
        "events.parquet, row 2: 'hours' is empty",
        "fill it in",
    ),
    "time is not a number": (
        "notes",
        lambda t: put(t, 1, hours=float("nan")),
        "notes.parquet, row 1: hours is nan",
        "became available",
    ),
    "duplicate event": (
        "events",
        lambda t: pl.concat([t, t[1:2]]),
        "events.parquet, row 5: the same as an earlier row (stay 's0', hour 10.0)",
        "remove the copy",
    ),
    "duplicate note": (
        "notes",
        lambda t: pl.concat([t, t[:1]]),
        "notes.parquet, row 3: the same as an earlier row",
        "remove the copy",
    ),
    "note without text": (
        "notes",
        lambda t: put(t, 0, text=None),
        "notes.parquet, row 0: 'text' is empty",
        "fill it in",
    ),
    "image outside": (
        "images",
        lambda t: put(t, 1, path="images/../../b.png"),
        "images.parquet, row 1: path 'images/../../b.png' leads out of the shard",
        "relative to the shard's folder",
    ),
    "absolute image": (
        "images",
        lambda t: put(t, 1, path="/etc/passwd"),
        "images.parquet, row 1: path '/etc/passwd' leads out",
        "relative",
    ),
    "vectors of two widths": (
        "embeddings",
        lambda t: put(t, 1, vector=[1.0, 2.0]),
        "embeddings.parquet, row 1: the vector of source 'slide' has 2 numbers, the first one",
        "one model only",
    ),
    "vector not finite": (
        "embeddings",
        lambda t: put(t, 0, vector=[1.0, float("inf"), 3.0]),
        "embeddings.parquet, row 0: the vector holds a number that is not finite",
        "encode it again",
    ),
    "vector of text": (
        "embeddings",
        lambda t: t.with_columns(vector=pl.Series([["a"], ["b"]])),
        "embeddings.parquet: column 'vector' is List(String), not a list of numbers",
        "write it as List(Float32)",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_break_names_file_row_and_cure(ward, parts, case):
    table, change, message, cure = BROKEN[case]
    folder = ward(**{table: change(parts[table])})
    with pytest.raises(ShardError) as caught:
        Shard.open(folder)
    assert str(folder) in str(caught.value)
    assert message in str(caught.value)
    assert cure in caught.value.cure
    shard, problems = inspect(folder)
    assert len(problems) == 1, [str(p) for p in problems]
    # Only a table of the wrong form stops the shard from being shown at all.
    assert (shard is None) == (
        table == "records" and ", row" not in message and case != "no records"
    )


def test_missing_tables_and_files(ward, tmp_path):
    folder = ward(records=None)
    with pytest.raises(ShardError, match=r"records\.parquet is missing") as caught:
        Shard.open(folder)
    assert "at least this table" in caught.value.cure
    (folder / "shard.toml").unlink()
    with pytest.raises(ShardError, match=r"shard\.toml is missing"):
        Shard.open(folder)
    with pytest.raises(ShardError, match="no such folder"):
        discover(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ShardError, match="no shard in it"):
        discover(tmp_path / "empty")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name = ", "is not valid TOML"),
        ('name = "x"', "no 'hospital'"),
        ('name = "x"\nhospital = "St. Mary/West"', "hospital 'St. Mary/West' cannot name a site"),
    ],
)
def test_a_bad_shard_toml_is_named(ward, text, message):
    folder = ward()
    (folder / "shard.toml").write_text(text)
    with pytest.raises(ShardError, match=r"shard\.toml") as caught:
        Shard.open(folder)
    assert message in str(caught.value)
    assert caught.value.cure


def test_a_damaged_parquet_file_is_named(ward):
    folder = ward()
    file = folder / "events.parquet"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(ShardError, match=r"events\.parquet is not a readable parquet table") as e:
        Shard.open(folder)
    assert "export it again" in e.value.cure


def test_inspect_lists_every_problem(ward, parts):
    folder = ward(
        events=put(parts["events"], 3, stay_id="s9"),
        notes=put(parts["notes"], 0, text=None),
        records=put(parts["records"], 2, cutoff_hours=-1.0),
    )
    (folder / "images" / "b.png").unlink()
    _, problems = inspect(folder)
    files = [str(p).split(",")[0].rsplit("/", 1)[1] for p in problems]
    assert files == ["records.parquet", "events.parquet", "notes.parquet", "images.parquet"]


def jpeg() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)).save(
        stream, "JPEG"
    )
    return stream.getvalue()


@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: b"no image", lambda b: b""]
)
def test_a_corrupt_or_truncated_jpeg_is_found_with_its_row(ward, parts, damage):
    images = put(parts["images"], 1, path="images/b.jpg")
    files = {**parts["files"], "images/b.jpg": damage(jpeg())}
    shard = Shard.open(ward(images=images, files=files))
    (problem,) = shard.check_images()
    assert "images.parquet, row 1, file 'images/b.jpg'" in str(problem)
    assert "unreadable image" in str(problem) or "not an image of a known form" in str(problem)
    assert "JPEG, PNG, TIFF" in problem.cure


def test_a_missing_image_is_found_with_its_row(ward):
    folder = ward()
    (folder / "images" / "c.png").unlink()
    (problem,) = Shard.open(folder).check_images()
    assert "images.parquet, row 2, file 'images/c.png': cannot read the file" in str(problem)
    assert "restore the file" in problem.cure


def test_grey_values_do_not_depend_on_the_depth_of_the_file(make_picture):
    eight = to_grey(decode_image(make_picture(1), "x"))
    sixteen = to_grey(decode_image(make_picture(1, mode="I;16"), "x"))
    colour = to_grey(decode_image(make_picture(1, mode="RGB"), "x"))
    assert eight.dtype == np.float32
    assert np.abs(eight - sixteen).max() < 0.01
    assert np.array_equal(eight, colour)


# -- writing ------------------------------------------------------------------------------------


def test_a_written_shard_opens_and_holds_the_same(tmp_path, parts):
    shard = write_shard(tmp_path / "deep" / "ward", **parts)
    for table in ("events", "images", "notes", "records"):
        assert getattr(shard, table).equals(parts[table]), table
    assert shard.check_images() == []


def test_an_invalid_shard_leaves_nothing_behind(tmp_path, parts):
    parts["records"] = put(parts["records"], 2, cutoff_hours=-1.0)
    with pytest.raises(ShardError, match="row 2") as caught:
        write_shard(tmp_path / "ward", **parts)
    assert str(tmp_path / "ward" / "records.parquet") in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_shard_is_replaced_only_on_request(tmp_path, parts):
    write_shard(tmp_path / "ward", **parts)
    parts["records"] = parts["records"].drop("y_stay")
    with pytest.raises(ShardError, match="exists already"):
        write_shard(tmp_path / "ward", **parts)
    assert write_shard(tmp_path / "ward", **parts, overwrite=True).tasks == ("death",)
    assert [p.name for p in tmp_path.iterdir()] == ["ward"]


@pytest.mark.parametrize("failure", [OSError("no space left"), KeyboardInterrupt()])
def test_a_shard_whose_replacement_does_not_arrive_stays(tmp_path, parts, monkeypatch, failure):
    write_shard(tmp_path / "ward", **parts)
    rename = Path.rename

    def fail_once(self, target):
        if target == tmp_path / "ward":
            monkeypatch.setattr(Path, "rename", rename)
            assert not target.exists()
            raise failure
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_once)
    changed = {**parts, "records": parts["records"].drop("y_stay")}
    with pytest.raises(type(failure)):
        write_shard(tmp_path / "ward", **changed, overwrite=True)
    assert Shard.open(tmp_path / "ward").tasks == ("death", "stay")
    assert [p.name for p in tmp_path.iterdir()] == ["ward"]


def test_a_shard_that_was_cut_off_while_it_was_replaced_returns(tmp_path, parts):
    write_shard(tmp_path / "ward", **parts)
    (tmp_path / "ward").rename(tmp_path / ".ward.replaced")
    with pytest.raises(ShardError, match="exists already"):
        write_shard(tmp_path / "ward", **parts)
    assert [p.name for p in tmp_path.iterdir()] == ["ward"]


# -- command ------------------------------------------------------------------------------------


def test_check_shows_sizes_and_labels_and_exits_with_0(ward):
    folder = ward()
    result = CliRunner().invoke(app, ["check", str(folder)])
    assert result.exit_code == 0, result.output
    assert "kept" in result.output
    assert "1/4" in result.output  # death: one true of four known
    assert "2/4" in result.output


def test_check_of_a_folder_lists_all_errors_and_exits_with_1(ward, parts, tmp_path):
    ward("one")
    ward("two", records=put(parts["records"], 2, cutoff_hours=-1.0))
    result = CliRunner().invoke(app, ["check", str(tmp_path)])
    assert result.exit_code == 1
    said = " ".join(result.output.split())
    assert "row 2: cutoff_hours is -1.0" in said
    assert "hospital 'ward' is also" in said
    assert "cure:" in said
    result = CliRunner().invoke(app, ["check", str(tmp_path / "nowhere")])
    assert result.exit_code == 1
    assert "no such folder" in result.output


# -- real data ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["physionet-2012", "eicu-demo", "eicu-demo-regions"])
def test_real_shards_keep_the_contract(open_data: Path, name):
    shards = [Shard.open(path) for path in discover(open_data / name)]
    expected = {"physionet-2012": (4, 4000), "eicu-demo": (30, 767), "eicu-demo-regions": (5, 767)}
    assert (len(shards), sum(s.records.height for s in shards)) == expected[name]


def test_real_images_are_all_readable(open_data: Path):
    shard = Shard.open(open_data / "hannover-cxr")
    assert shard.images is not None
    assert shard.images.height == 243
    assert shard.check_images() == []
