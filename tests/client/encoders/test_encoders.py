"""The encoders that ship: deterministic, bounded, identified by what decides their output."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from client.site.encoders.image import ImageDescriptor, area_resize
from client.site.encoders.pooling import pool, weighted_sum, weights
from client.site.encoders.registry import build_encoder, describe, dimensions, release_encoders
from client.site.encoders.text import HashedText
from client.site.shard import decode_image
from common.errors import StudyError
from common.study import Source, Study


@pytest.fixture(autouse=True)
def _fresh():
    release_encoders()
    torch.set_num_threads(1)


# -- hashed text --------------------------------------------------------------------------------


def test_hashed_text_is_fixed_for_ever():
    """Nothing random, no Python hash: the values of a note are known."""
    (vector,) = HashedText().encode(["No edema; HR 72."])
    cells = np.flatnonzero(vector[0])
    assert vector.shape == (1, 512)
    assert vector.dtype == np.float32
    # 4 words and 3 pairs, all once: seven cells of equal size.
    assert np.allclose(np.abs(vector[0, cells]), np.sqrt(1 / 7))
    signed = [int(cell) * int(np.sign(vector[0, cell])) for cell in cells]
    assert signed == [39, 124, -195, -286, 293, 352, 371]


def test_hashed_text_counts_sublinearly_and_sees_pairs():
    encoder = HashedText()
    one, many, other = encoder.encode(["edema " * 1, "edema " * 40, "no edema"])
    assert np.allclose([np.linalg.norm(v) for v in (one, many, other)], 1.0, rtol=1e-6)
    positive, negative = encoder.encode(["edema, no fever", "no edema, fever"])
    assert not np.allclose(positive, negative)


def test_hashed_text_takes_numbers_by_their_length_and_ignores_case():
    encoder = HashedText()
    a, b, c = encoder.encode(["HR 72", "hr 85", "HR 110"])
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)


@pytest.mark.parametrize("text", ["", "  \n", "--- ...", "_"])
def test_a_text_without_words_is_absent(text):
    assert HashedText().encode([text])[0].shape == (0, 512)


def test_neighbours_do_not_change_an_embedding():
    encoder = HashedText()
    together = encoder.encode(["a b", "c d e"])
    assert np.array_equal(together[1], encoder.encode(["c d e"])[0])


# -- image descriptor ---------------------------------------------------------------------------


def test_the_descriptor_is_deterministic_and_of_unit_size(make_picture):
    image = decode_image(make_picture(1), "x")
    first, second = ImageDescriptor().encode([image, image])
    assert first.shape == (1, ImageDescriptor().dim) == (1, 511)
    assert np.array_equal(first, second)
    assert np.linalg.norm(first) == pytest.approx(1.0, rel=1e-6)


def test_the_descriptors_histograms_carry_no_constant_part(make_picture):
    (vector,) = ImageDescriptor().encode([decode_image(make_picture(1), "x")])
    cells, levels = vector[0, 195:483].reshape(36, 8), vector[0, 483:]
    assert np.abs(cells.mean(axis=1)).max() < 1e-6
    assert abs(levels.mean()) < 1e-6
    assert np.linalg.norm(cells) > 0.1
    assert np.linalg.norm(levels) > 0.1


def test_the_descriptor_sees_the_same_in_8_and_16_bits_and_in_colour(make_picture):
    encoder = ImageDescriptor()
    pictures = [decode_image(make_picture(1, mode=m), "x") for m in ("L", "I;16", "RGB")]
    grey, deep, colour = encoder.encode(pictures)
    (other,) = encoder.encode([decode_image(make_picture(2), "x")])
    assert np.array_equal(grey, colour)
    norm = np.linalg.norm(grey)
    assert np.linalg.norm(grey - deep) < 0.2 * norm
    assert np.linalg.norm(grey - other) > 0.5 * norm


@pytest.mark.parametrize("level", [0, 128, 255])
def test_a_flat_image_has_a_finite_descriptor(level):
    (vector,) = ImageDescriptor().encode([Image.new("L", (30, 20), level)])
    assert np.isfinite(vector).all()
    assert np.linalg.norm(vector) == pytest.approx(1.0)


def test_area_resize_averages_by_area():
    grey = np.array([[1.0, 2.0, 6.0], [3.0, 4.0, 8.0], [5.0, 7.0, 9.0]], dtype=np.float32)
    # Each target pixel covers 1.5 x 1.5 pixels: one whole, two halves and a quarter.
    corner = (1 + 2 / 2 + 3 / 2 + 4 / 4) / 2.25
    assert area_resize(grey, 2)[0, 0] == pytest.approx(corner)
    assert area_resize(grey, 1)[0, 0] == pytest.approx(grey.mean())
    assert np.allclose(area_resize(np.full((7, 300), 0.4, np.float32), 24), 0.4)


# -- pooling ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hours", "pooling", "expected"),
    [
        ([3.0], "time-weighted", [1.0]),
        ([0.0, 1.0, 3.0], "time-weighted", [0.0, 0.25, 0.75]),
        ([2.0, 2.0], "time-weighted", [0.5, 0.5]),
        ([-1.0, 1.0, 1.0], "time-weighted", [0.0, 0.5, 0.5]),
        ([0.0, 1.0, 3.0], "latest", [0.0, 0.0, 1.0]),
        ([3.0, 1.0, 3.0], "latest", [0.5, 0.0, 0.5]),
        ([0.0, 1.0, 3.0], "mean", [1 / 3] * 3),
    ],
)
def test_weights_sum_to_one(hours, pooling, expected):
    assert weights(np.array(hours), pooling).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("hours", [[3.0], [2.0, 2.0], [0.0, 1.0, 3.0], [-6.0, 4.0, 1.0]])
def test_the_published_weights_are_as_printed(hours):
    """UNI-MLM: w_j = (t_j - min t) / max t. HAIM: (t_j - min t) / (max t - min t), 0 for nan."""
    by_max = [(t - min(hours)) / max(hours) for t in hours]
    span = max(hours) - min(hours)
    by_range = [(t - min(hours)) / span if span else 0.0 for t in hours]
    given = np.array(hours)
    assert weights(given, "time-weighted-by-max").tolist() == pytest.approx(by_max)
    assert weights(given, "time-weighted-by-range").tolist() == pytest.approx(by_range)


@pytest.mark.parametrize("hours", [[-3.0, 0.0], [-3.0, -1.0]])
def test_where_the_printed_weights_are_not_defined_they_are_zero(hours):
    assert not weights(np.array(hours), "time-weighted-by-max").any()


def test_a_weighted_sum_keeps_its_size_and_its_zeros():
    long = np.array([[3.0, 4.0], [0.0, 2.0]], dtype=np.float32)
    short = np.array([[5.0, 0.0]], dtype=np.float32)
    x, mask = weighted_sum([long, short], np.array([0.5, 2.0]), 3)
    assert mask.tolist() == [True, True, False]
    assert x == pytest.approx(np.array([[0.3 + 2.0, 0.4], [0.0, 0.5], [0.0, 0.0]]))
    x, mask = weighted_sum([short], np.array([0.0]), 1)
    assert mask.tolist() == [True]
    assert not x.any()


def test_pooling_averages_the_tokens_that_are_there():
    long = np.array([[1.0], [2.0], [3.0]], dtype=np.float32)
    short = np.array([[5.0]], dtype=np.float32)
    x, mask = pool([long, short], np.array([0.25, 0.75]), 4)
    assert mask.tolist() == [True, True, True, False]
    assert x[:, 0].tolist() == [4.0, 2.0, 3.0, 0.0]
    x, mask = pool([long, short], np.array([0.0, 1.0]), 4)
    assert mask.tolist() == [True, False, False, False]
    assert x[0, 0] == 5.0


# -- registry -----------------------------------------------------------------------------------


def test_fingerprints_tell_encoders_apart_and_pooling_does_not():
    def of(**source: object) -> str:
        return build_encoder(Source.model_validate(source)).fingerprint

    marks = [
        of(modality="text", encoder="hashed-text"),
        of(modality="image", encoder="image-descriptor"),
        of(modality="table", encoder="demographics"),
        of(modality="series", encoder="series-statistics", series=["lactate"]),
        of(modality="series", encoder="series-statistics", series=["sodium"]),
        of(modality="series", encoder="series-statistics", series=["sodium", "lactate"]),
        of(modality="series", encoder="series-statistics", series=["lactate", "sodium"]),
    ]
    assert len(set(marks)) == len(marks)
    assert HashedText(256).fingerprint != HashedText(512).fingerprint
    assert of(modality="text", encoder="hashed-text", pooling="mean") == marks[0]


def test_an_unknown_series_is_named_with_the_nearest():
    with pytest.raises(StudyError, match="unknown series 'lactat'; did you mean 'lactate'"):
        build_encoder(Source(modality="series", encoder="series-statistics", series=("lactat",)))


def test_a_study_is_described_by_source():
    study = Study.model_validate(
        {
            "name": "x",
            "tasks": {"death": {}},
            "sources": {
                "lab": {
                    "modality": "series",
                    "encoder": "series-statistics",
                    "series": ["lactate", "heart_rate"],
                },
                "note": {"modality": "text", "encoder": "hashed-text"},
                "slide": {"modality": "embedding", "encoder": "precomputed", "dim": 3},
            },
        }
    )
    assert dimensions(study) == {"lab": 24, "note": 512, "slide": 3}
    assert "not a language model" in describe(study)["note"]


def test_the_page_of_the_shard_lists_every_series():
    from client.site.shard.clinical import SERIES

    page = (Path(__file__).parents[3] / "docs" / "shard.md").read_text()
    assert [name for _, name in SERIES if f"`{name}`" not in page] == []
