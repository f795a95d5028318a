"""Several tokens per source: what they are, whose they are, and what refuses them."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from client.site.encoders.encoder import Embedding, unit_norm
from client.site.encoders.grid import grid_shape, pool_grid
from client.site.encoders.image import ImageDescriptor
from client.site.encoders.registry import build_encoder, describe, dimensions, release_encoders
from client.site.encoders.registry import tokens as token_counts
from client.site.encoders.run import encode_site
from client.site.encoders.text import HashedText
from client.site.encoders.vault import Item, Vault
from client.site.shard import Shard
from common.study import Source, Study
from simulations.plan import make_plan

NOTE = {"modality": "text", "encoder": "hashed-text", "tokens": 3}
XRAY = {"modality": "image", "encoder": "image-descriptor", "tokens": 4}
SLIDE = {"modality": "embedding", "encoder": "precomputed", "dim": 3, "tokens": 2}


@pytest.fixture(autouse=True)
def _fresh() -> None:
    release_encoders()
    torch.set_num_threads(1)


# -- grids --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("height", "width", "tokens", "expected"),
    [
        (14, 14, 196, (14, 14)),
        (14, 14, 195, (13, 13)),
        (14, 14, 49, (7, 7)),
        (14, 14, 63, (7, 7)),
        (7, 7, 256, (7, 7)),
        (4, 6, 6, (2, 3)),
        (1, 100, 10, (1, 10)),
        (100, 1, 10, (10, 1)),
        (3, 200, 2, (1, 2)),
    ],
)
def test_a_grid_keeps_its_proportions(height, width, tokens, expected):
    assert grid_shape(height, width, tokens) == expected


def test_no_grid_is_larger_than_its_tokens():
    for height, width, tokens in np.ndindex(20, 20, 40):
        rows, columns = grid_shape(height + 1, width + 1, tokens + 1)
        assert 1 <= rows <= height + 1
        assert 1 <= columns <= width + 1
        assert rows * columns <= tokens + 1


def test_a_grid_is_averaged_by_area_and_read_row_by_row():
    x_HWd = np.random.default_rng(0).normal(size=(4, 6, 2)).astype(np.float32)
    assert np.array_equal(pool_grid(x_HWd, 24), x_HWd.reshape(24, 2))
    blocks = x_HWd.reshape(2, 2, 3, 2, 2).mean((1, 3)).reshape(6, 2)
    assert np.allclose(pool_grid(x_HWd, 6), blocks, atol=1e-6)
    uneven = pool_grid(x_HWd[:3, :3], 4)  # each of 2 x 2 covers 1.5 x 1.5
    share = np.array([0.0, 0.5, 1.0]) / 1.5
    last = np.einsum("h,w,hwd->d", share, share, x_HWd[:3, :3])
    assert np.allclose(uneven[3], last, atol=1e-6)


# -- hashed text --------------------------------------------------------------------------------


def test_a_sentence_is_a_token():
    whole = HashedText(tokens=8)
    (x,) = whole.encode(["No edema.  HR 72.5 today!\n\n--\nFindings:\nCough"])
    alone = ["No edema.", "HR 72.5 today!", "Findings:", "Cough"]
    assert x.shape == (4, 512)
    assert np.array_equal(x, np.concatenate(HashedText().encode(alone)))
    assert whole.encode(["-- ..."])[0].shape == (0, 512)


def test_more_sentences_than_tokens_share_them_and_none_is_lost():
    sentences = [f"word{'x' * n}." for n in range(7)]
    (x,) = HashedText(tokens=3).encode([" ".join(sentences)])
    shared = [" ".join(sentences[a:b]) for a, b in ((0, 2), (2, 4), (4, 7))]
    assert np.array_equal(x, np.concatenate(HashedText().encode(shared)))


# -- image descriptor ---------------------------------------------------------------------------


def tiled(*tiles: NDArray[np.uint8]) -> Image.Image:
    """Four tiles of 32 x 32 as an image that needs no scaling."""
    return Image.fromarray(np.block([[tiles[0], tiles[1]], [tiles[2], tiles[3]]]))


@pytest.fixture
def noise() -> list[NDArray[np.uint8]]:
    return list(np.random.default_rng(0).integers(0, 256, (4, 32, 32), dtype=np.uint8))


def tiles(image: Image.Image, tokens: int = 4) -> Embedding:
    (x,) = ImageDescriptor(tokens).encode([image])
    return x


def test_a_tile_is_described_by_itself_and_its_place(noise):
    before = tiles(tiled(*noise))
    assert before.shape == (4, ImageDescriptor(4).dim) == (4, 150)
    assert np.allclose(np.linalg.norm(before, axis=1), 1, rtol=1e-6)
    after = tiles(tiled(noise[0], noise[1].T, *noise[2:]))  # the same levels elsewhere
    assert np.array_equal(np.delete(after, 1, axis=0), np.delete(before, 1, axis=0))
    assert np.abs(after[1] - before[1]).max() > 0.05
    swapped = tiles(tiled(noise[1], noise[0], *noise[2:]))
    content = unit_norm(before[:, :-2])
    assert np.allclose(unit_norm(swapped[:, :-2])[[1, 0, 2, 3]], content, atol=1e-6)
    signs = [[-1, -1], [-1, 1], [1, -1], [1, 1]]
    assert np.array_equal(np.sign(before[:, -2:]), signs)


def test_an_empty_tile_shows_nothing_but_its_level(noise):
    """Neither where the image ends nor where the stretching clips."""
    for level in (0, 128, 255):
        flat = np.full((32, 32), level, dtype=np.uint8)
        x = tiles(tiled(flat, *noise[1:]))
        assert np.abs(x[0, :120]).max() < 1e-9
        assert np.abs(x[1, :120]).max() > 0.01
    assert np.isfinite(tiles(Image.new("L", (30, 20), 9), 256)).all()


@pytest.mark.parametrize(("tokens", "side"), [(2, 1), (4, 2), (8, 2), (9, 3), (200, 14), (256, 16)])
def test_tiles_are_the_largest_square_grid(tokens, side):
    encoder = ImageDescriptor(tokens)
    (x,) = encoder.encode([Image.new("L", (50, 90), 7)])
    assert x.shape == (encoder.tokens, encoder.dim) == (side**2, 150)


# -- identity and refusals ----------------------------------------------------------------------


def test_the_number_of_tokens_is_part_of_an_encoder():
    def of(**source: Any) -> str:
        return build_encoder(Source.model_validate(source)).fingerprint

    for source in (NOTE, XRAY):
        marks = [of(**{**source, "tokens": t}) for t in (1, 4, 9)]
        assert len(set(marks)) == 3
    assert Source(**NOTE) != Source(**{**NOTE, "tokens": 4})


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({"modality": "table", "encoder": "demographics"}, "'demographics' gives one token; set"),
        (
            {"modality": "series", "encoder": "series-statistics", "series": ["lactate"]},
            "'series-statistics' gives one token; set tokens = 1",
        ),
        ({**XRAY, "pooling": "mean"}, "set pooling = 'latest' or tokens = 1"),
        ({**NOTE, "pooling": "time-weighted"}, "cannot be averaged one by one"),
        ({**NOTE, "tokens": 257}, "less than or equal to 256"),
        ({**NOTE, "tokens": 0}, "greater than or equal to 1"),
    ],
)
def test_what_cannot_be_is_refused_with_the_study(source, said):
    with pytest.raises(ValidationError, match=said):
        Source.model_validate({"tokens": 2, **source})


# -- a hospital ---------------------------------------------------------------------------------


def study(**sources: dict[str, Any]) -> Study:
    return Study.model_validate({"name": "t", "sources": sources, "tasks": {"death": {}}})


def encode(folder: Path, vault: Path, **sources: dict[str, Any]) -> dict[str, Any]:
    """Source -> record -> embedding and mask."""
    with Vault.open(vault) as opened:
        both = encode_site(study(**sources), Shard.open(folder), opened, population_key=b"key")
    found: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
    for name in sources:
        found[name] = {
            record: (part.inputs[name][row], part.present[name][row])
            for part in (both.train, both.validation)
            for row, record in enumerate(part.record_ids)
        }
    return found


def test_a_record_has_the_tokens_of_its_latest_input(ward, tmp_path):
    folder = ward()
    age = {"modality": "table", "encoder": "demographics"}
    found = encode(folder, tmp_path / "v", note=NOTE, xray=XRAY, age=age)
    shard = Shard.open(folder)
    assert shard.notes is not None
    first, second, _ = HashedText(tokens=3).encode(shard.notes["text"].to_list())
    assert (len(first), len(second)) == (2, 1)
    for record, expected in (("r0", first), ("r1", second)):
        x, mask = found["note"][record]
        assert mask.tolist() == [n < len(expected) for n in range(3)]
        assert np.allclose(x[: len(expected)].numpy(), expected, atol=1e-6)
        assert not x[len(expected) :].any()
    assert {r: int(mask.sum()) for r, (_, mask) in found["xray"].items()} == {
        "r0": 4,
        "r1": 4,
        "r2": 4,
        "r3": 0,
        "r4": 0,
    }
    (second_image,) = ImageDescriptor(4).encode([Image.open(folder / "images" / "b.png")])
    assert np.allclose(found["xray"]["r1"][0].numpy(), second_image, atol=1e-6)


def test_every_token_has_norm_1(ward, tmp_path):
    found = encode(ward(), tmp_path / "v", note=NOTE, xray=XRAY, slide=SLIDE)
    for records in found.values():
        for x, mask in records.values():
            assert torch.allclose(x.norm(dim=-1), mask.float(), atol=1e-6)


def test_precomputed_rows_are_tokens_and_the_latest_stay(ward, tmp_path):
    vectors = {1.0: [1.0, 0.0, 0.0], 11.0: [0.0, 1.0, 0.0], 20.0: [0.0, 0.0, 1.0]}
    rows = pl.DataFrame(
        {
            "stay_id": ["s0"] * 3,
            "hours": list(vectors),
            "source": ["slide"] * 3,
            "vector": list(vectors.values()),
        }
    )
    found = encode(ward(embeddings=rows), tmp_path / "v", slide=SLIDE)["slide"]
    assert found["r0"][0].tolist() == [vectors[1.0], vectors[11.0]]
    assert found["r1"][0].tolist() == [vectors[11.0], vectors[20.0]]
    three = encode(ward("w", embeddings=rows), tmp_path / "v", slide={**SLIDE, "tokens": 8})
    x, mask = three["slide"]["r0"]
    assert x.shape == (8, 3)
    assert mask.tolist() == [True, True, *[False] * 6]


def test_inputs_of_one_hour_do_not_depend_on_the_order_of_the_table(ward, tmp_path, parts):
    same = {
        "notes": parts["notes"].with_columns(stay_id=pl.lit("s0"), hours=pl.lit(3.0)),
        "embeddings": parts["embeddings"].with_columns(stay_id=pl.lit("s0")),
    }
    turned = {table: frame.reverse() for table, frame in same.items()}
    one = encode(ward("a", **same), tmp_path / "v", note=NOTE, slide=SLIDE)
    other = encode(ward("b", **turned), tmp_path / "w", note=NOTE, slide=SLIDE)
    assert int(one["slide"]["r0"][1].sum()) == 2
    for name in one:
        assert torch.equal(one[name]["r0"][0], other[name]["r0"][0])
    # One note's tokens, not a mean of three notes'.
    texts = parts["notes"]["text"].to_list()
    each = [unit_norm(x) for x in HashedText(tokens=3).encode(texts)]
    x, mask = one["note"]["r0"]
    assert any(np.allclose(x[mask].numpy(), e, atol=1e-6) for e in each if len(e) == mask.sum())


def test_the_vault_keeps_all_tokens_and_gives_them_back(ward, tmp_path, monkeypatch):
    folder = ward()
    sources = {"note": NOTE, "xray": XRAY}
    first = encode(folder, tmp_path / "v", **sources)
    with Vault.open(tmp_path / "v") as vault:
        entries = len(vault)
        image = (folder / "images" / "a.png").read_bytes()
        item = Item(ImageDescriptor(4).fingerprint, "p0", f"image {sha256(image).hexdigest()}")
        (kept,) = vault.read([item])
    assert entries == 6
    assert kept is not None
    assert kept.shape == (4, 150)

    def never(*_: object) -> None:
        raise AssertionError("encoded again")

    monkeypatch.setattr(ImageDescriptor, "encode", never)
    monkeypatch.setattr(HashedText, "encode", never)
    again = encode(folder, tmp_path / "v", **sources)
    for name in sources:
        assert all(torch.equal(first[name][r][0], again[name][r][0]) for r in first[name])


def test_a_plan_counts_every_token():
    def settled(**changes: int) -> Study:
        sources = {
            "note": {**NOTE, "tokens": changes.get("note", 1)},
            "xray": {**XRAY, "tokens": changes.get("xray", 1)},
        }
        raw = study(**sources).model_dump(mode="json")
        raw["federation"]["sites"] = {"a": {"patients_declared": 100}}
        return Study.model_validate(raw)

    one, many = settled(), settled(note=3, xray=10)
    assert make_plan(one).bytes_per_record == 4 * (512 + 511)
    assert make_plan(many).bytes_per_record == 4 * (3 * 512 + 9 * 150)
    assert dimensions(many) == {"note": 512, "xray": 150}
    assert token_counts(many) == {"note": 3, "xray": 9}
    assert "3 x 3 tiles" in describe(many)["xray"]
    slow, fast = make_plan(many).seconds_per_round, make_plan(one).seconds_per_round
    assert slow is not None
    assert fast is not None
    assert slow > fast
