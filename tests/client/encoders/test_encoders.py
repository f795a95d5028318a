"""The encoders that ship: deterministic, bounded, identified by what decides their output."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from client.site.encoders.image import ImageDescriptor, area_resize
from client.site.encoders.pooling import pool, weights
from client.site.encoders.registry import build_encoder, describe, dimensions, release_encoders
from client.site.encoders.text import HashedText
from client.site.shard import decode_image
from common.errors import EncoderError, StudyError
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
    assert first.shape == (1, ImageDescriptor.dim)
    assert np.array_equal(first, second)
    assert np.linalg.norm(first) == pytest.approx(1.0, rel=1e-6)


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


def test_pooling_averages_the_tokens_that_are_there():
    long = np.array([[1.0], [2.0], [3.0]], dtype=np.float32)
    short = np.array([[5.0]], dtype=np.float32)
    x, mask = pool([long, short], np.array([0.25, 0.75]), 4)
    assert mask.tolist() == [True, True, True, False]
    assert x[:, 0].tolist() == [4.0, 2.0, 3.0, 0.0]
    x, mask = pool([long, short], np.array([0.0, 1.0]), 4)
    assert mask.tolist() == [True, False, False, False]
    assert x[0, 0] == 5.0


# -- torchxrayvision ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def densenet():
    """The true architecture, with random weights and batch statistics."""
    from torchxrayvision.models import DenseNet

    torch.manual_seed(0)
    model = DenseNet(num_classes=18).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    return model


def xrv(path: Path) -> Source:
    return Source(modality="image", encoder=f"torchxrayvision:{path}")


def test_densenet_gives_haims_features_from_every_form_of_weights(tmp_path, densenet, make_picture):
    from safetensors.torch import save_file

    picture = decode_image(make_picture(1, size=(50, 60)), "x")
    with torch.inference_mode():  # HAIM, written out with the library's own functions
        import torchxrayvision

        pixels = torchxrayvision.utils.normalize(np.asarray(picture, dtype=np.float32), 255)
        x = torch.from_numpy(area_resize(pixels, 224))[None, None]
        expected = densenet.features2(x).numpy()
    save_file(densenet.state_dict(), tmp_path / "a.safetensors")
    torch.save(densenet.state_dict(), tmp_path / "b.pt")
    torch.save(densenet, tmp_path / "c.pt")
    for name in ("a.safetensors", "b.pt", "c.pt"):
        encoder = build_encoder(xrv(tmp_path / name))
        (vector,) = encoder.encode([picture])
        assert vector.shape == (1, encoder.dim) == (1, 1024)
        assert np.allclose(vector, expected, rtol=1e-4, atol=1e-5)
        assert "DenseNet-121" in encoder.description
        assert str(tmp_path) not in encoder.description


def test_weights_that_run_code_are_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "owned",))

    torch.save({"classifier.weight": Evil()}, tmp_path / "evil.pt", pickle_module=pickle)
    with pytest.raises(EncoderError, match="cannot read weights") as caught:
        build_encoder(xrv(tmp_path / "evil.pt")).encode([Image.new("L", (9, 9))])
    assert "safetensors" in caught.value.cure
    assert not (tmp_path / "owned").exists()


def test_weights_that_are_not_there_are_never_downloaded(tmp_path, monkeypatch):
    import torchxrayvision

    monkeypatch.setattr(torchxrayvision.utils, "get_cache_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torchxrayvision.utils, "download", lambda *_: pytest.fail("downloads"))
    source = Source(modality="image", encoder="torchxrayvision:densenet121-res224-chex")
    with pytest.raises(EncoderError, match="no torchxrayvision weights at") as caught:
        build_encoder(source)
    assert "never downloaded" in caught.value.cure
    with pytest.raises(StudyError, match="did you mean 'densenet121-res224-chex'"):
        build_encoder(Source(modality="image", encoder="torchxrayvision:densenet121-res224-che"))


def test_weights_of_something_else_are_named(tmp_path):
    torch.save({"classifier.weight": torch.zeros(18, 1024)}, tmp_path / "w.pt")
    with pytest.raises(EncoderError, match="holds no weights of torchxrayvision's DenseNet-121"):
        build_encoder(xrv(tmp_path / "w.pt")).encode([Image.new("L", (9, 9))])


# -- Hugging Face -------------------------------------------------------------------------------

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{n}" for n in range(50))]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=512,
    )
    BertModel(config).save_pretrained(folder)
    tokens = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokens, unk_token="[UNK]", pad_token="[PAD]", model_max_length=512
    ).save_pretrained(folder)
    return folder


def text(folder: Path) -> Source:
    return Source(modality="text", encoder=f"huggingface:{folder}")


def test_a_text_model_averages_all_chunks_and_loses_none(bert):
    encoder = build_encoder(text(bert))
    assert (encoder.dim, encoder.tokens) == (16, 1)
    note = " ".join(f"w{n % 50}" for n in range(1300))
    chunks = encoder.chunks(note)
    assert [len(c) for c in chunks] == [436, 436, 434]  # 1300 words in three, each with two marks
    assert [t - 4 for c in chunks for t in c[1:-1]] == [n % 50 for n in range(1300)]
    (whole,) = encoder.encode([note])
    (first,), (second,), (third,) = (
        encoder.encode([" ".join(f"w{t - 4}" for t in c[1:-1])]) for c in chunks
    )
    assert np.allclose(whole, (first + second + third) / 3, atol=1e-6)
    assert encoder.encode([""])[0].shape == (0, 16)


def test_a_text_model_gives_the_pooled_output(bert):
    from transformers import BertModel

    (vector,) = build_encoder(text(bert)).encode(["w1 w2 w3"])
    with torch.inference_mode():
        model = BertModel.from_pretrained(bert).eval()
        expected = model(input_ids=torch.tensor([[2, 5, 6, 7, 3]])).pooler_output
    assert np.allclose(vector, expected.numpy(), atol=1e-6)


def test_an_untrained_pooler_is_not_used(bert, tmp_path):
    """A checkpoint without pooler would get a random one, another each time."""
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(bert, tmp_path / "copy")
    file = tmp_path / "copy" / "model.safetensors"
    weights = {k: v for k, v in load_file(file).items() if not k.startswith("pooler.")}
    save_file(weights, file, metadata={"format": "pt"})
    first, second = (
        (release_encoders(), build_encoder(text(tmp_path / "copy")).encode(["w1 w2"])[0])[1]
        for _ in range(2)
    )
    assert np.array_equal(first, second)
    save_file({k: v for k, v in weights.items() if "layer.1." not in k}, file, {"format": "pt"})
    release_encoders()
    with pytest.raises(EncoderError, match="lacks weights of bert"):
        build_encoder(text(tmp_path / "copy")).encode(["w1"])


def test_a_folder_without_safetensors_is_refused(bert, tmp_path):
    (tmp_path / "config.json").write_text((bert / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(EncoderError, match="holds no safetensors") as caught:
        build_encoder(text(tmp_path))
    assert "save_pretrained" in caught.value.cure


def test_a_folder_or_model_that_is_not_there_is_named(tmp_path, monkeypatch):
    with pytest.raises(EncoderError, match="no encoder folder at"):
        build_encoder(text(tmp_path / "nowhere"))
    import huggingface_hub

    def offline(*_: object, **__: object) -> None:
        raise huggingface_hub.errors.LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    source = Source(modality="text", encoder="huggingface:org/name", revision="abc")
    with pytest.raises(EncoderError, match="cannot get encoder org/name@abc") as caught:
        build_encoder(source)
    assert "without a network, give the folder" in caught.value.cure


def test_other_weights_or_another_tokenizer_are_another_encoder(bert, tmp_path):
    import shutil

    for name, file in (("weights", "model.safetensors"), ("words", "tokenizer.json")):
        shutil.copytree(bert, tmp_path / name)
        path = tmp_path / name / file
        path.write_bytes(path.read_bytes() + b" ")
    shutil.copytree(bert, tmp_path / "same")
    marks = {
        name: build_encoder(text(folder)).fingerprint
        for name, folder in [("", bert), *((n, tmp_path / n) for n in ("weights", "words", "same"))]
    }
    assert marks["same"] == marks[""]
    assert len({marks[""], marks["weights"], marks["words"]}) == 3


def test_a_vision_model_pools_grey_and_colour_images(tmp_path, make_picture):
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
        patch_size=8,
    )
    ViTModel(config).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    encoder = build_encoder(Source(modality="image", encoder=f"huggingface:{tmp_path}"))
    pictures = [decode_image(make_picture(1, mode=m), "x") for m in ("L", "I;16", "RGB")]
    grey, deep, colour = encoder.encode(pictures)
    assert grey.shape == (1, 16) == (1, encoder.dim)
    assert np.array_equal(grey, colour)
    assert np.allclose(grey, deep, atol=0.02)
    assert "vit" in encoder.description


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
    from client.site.encoders.clinical import SERIES

    page = (Path(__file__).parents[3] / "docs" / "shard.md").read_text()
    assert [name for _, name in SERIES if f"`{name}`" not in page] == []
