"""Hugging Face encoders: true architectures, small and with random weights, saved to disk here.

BioBERT and Bio_ClinicalBERT are `BertModel`s. What is compared with is written out by hand: the
model in memory, its inputs without the library's preprocessing, chunks and means in plain code.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from client.site.encoders.registry import build_encoder, release_encoders
from client.site.shard import decode_image
from common.errors import EncoderError
from common.study import Source

# Larger weights than at the start of training: with those, all inputs give nearly one output.
SMALL: dict[str, Any] = {
    "initializer_range": 0.5,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
CLS, SEP, FIRST_WORD = 2, 3, 4
VOCABULARY = [*SPECIAL, *(f"w{n}" for n in range(50))]


@pytest.fixture(autouse=True)
def _fresh():
    release_encoders()
    torch.set_num_threads(1)


def text(folder: Path, tokens: int = 1) -> Source:
    return Source(modality="text", encoder=f"huggingface:{folder}", tokens=tokens)


def image(folder: Path, tokens: int = 1) -> Source:
    return Source(modality="image", encoder=f"huggingface:{folder}", tokens=tokens)


def save_tokenizer(folder: Path) -> None:
    tokens = Tokenizer(models.WordLevel({w: i for i, w in enumerate(VOCABULARY)}, "[UNK]"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokens, unk_token="[UNK]", pad_token="[PAD]", model_max_length=512
    ).save_pretrained(folder)


def random_bert(form: str = "BertModel", seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = transformers.BertConfig(vocab_size=len(VOCABULARY), **SMALL)
    return getattr(transformers, form)(config).eval()


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    random_bert().save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def words(count: int) -> tuple[str, list[int]]:
    """A note of so many words, and their token numbers."""
    numbers = random.Random(count).choices(range(50), k=count)
    return " ".join(f"w{n}" for n in numbers), [FIRST_WORD + n for n in numbers]


# -- notes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "pooled"),
    [
        ("BertModel", True),
        ("BertForPreTraining", True),  # as BERT is published: a prefix, heads, and the pooler
        ("BertForMaskedLM", False),  # a checkpoint without a pooler
    ],
)
def test_a_note_is_the_mean_over_its_chunks(tmp_path, form, pooled):
    model = random_bert(form)
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    note, tokens = words(1300)
    vectors = []
    with torch.inference_mode():
        for part in (tokens[:434], tokens[434:868], tokens[868:]):
            output = getattr(model, "bert", model)(torch.tensor([[CLS, *part, SEP]]))
            hidden = output.last_hidden_state
            vectors.append(output.pooler_output if pooled else hidden.mean(1))
    encoder = build_encoder(text(tmp_path))
    (vector,) = encoder.encode([note])
    assert (encoder.dim, encoder.tokens) == (16, 1)
    assert np.allclose(vector, torch.stack(vectors).mean(0).numpy(), atol=1e-5)
    # A lost chunk would show.
    assert not np.allclose(vector, torch.stack(vectors[:2]).mean(0).numpy(), atol=1e-3)


def test_no_token_is_lost_whatever_the_length(bert):
    """Around every border of one, two and three chunks, and at random."""
    encoder = build_encoder(text(bert))
    borders = [n for k in (510, 512, 1020, 1024, 1530) for n in range(k - 2, k + 3)]
    lengths = [1, 2, 3, *borders, *random.Random(0).sample(range(4, 9000), 40)]
    for count in lengths:
        note, tokens = words(count)
        chunks = encoder.chunks(note)
        assert [token for chunk in chunks for token in chunk[1:-1]] == tokens
        assert all((chunk[0], chunk[-1]) == (CLS, SEP) for chunk in chunks)
        sizes = [len(chunk) for chunk in chunks]
        assert max(sizes) <= 512
        assert len(chunks) == -(-count // 510)  # as few as possible
        assert max(sizes) - min(sizes) < len(chunks)  # and nearly equal


def test_a_note_of_ten_thousand_lines(bert):
    note, tokens = words(30_000)
    lines = note.split()
    note = "\n".join(" ".join(lines[start : start + 3]) for start in range(0, 30_000, 3))
    assert note.count("\n") == 9_999
    encoder = build_encoder(text(bert))
    chunks = encoder.chunks(note)
    assert [token for chunk in chunks for token in chunk[1:-1]] == tokens
    (vector,) = encoder.encode([note])
    parts = encoder.encode(
        [" ".join(VOCABULARY[token] for token in chunk[1:-1]) for chunk in chunks]
    )
    assert len(parts) == 59
    assert np.allclose(vector, np.mean(parts, axis=0), atol=1e-5)


def test_a_model_with_fewer_positions_gets_shorter_chunks(tmp_path):
    config = transformers.BertConfig(
        vocab_size=len(VOCABULARY), max_position_embeddings=64, **SMALL
    )
    transformers.BertModel(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    encoder = build_encoder(text(tmp_path))
    note, tokens = words(200)
    chunks = encoder.chunks(note)
    assert max(map(len, chunks)) <= 64
    assert [token for chunk in chunks for token in chunk[1:-1]] == tokens
    assert np.isfinite(encoder.encode([note])[0]).all()


def test_an_empty_note_is_absent_and_neighbours_change_no_bit(bert):
    encoder = build_encoder(text(bert))
    notes = ["", words(700)[0], words(20)[0]]
    together = encoder.encode(notes)
    assert together[0].shape == (0, 16)
    assert all(
        np.array_equal(encoder.encode([note])[0], vector)
        for note, vector in zip(notes, together, strict=True)
    )


def test_a_folder_with_vocab_txt_alone_is_read_as_transformers_reads_it(tmp_path):
    """So is Bio_ClinicalBERT published; without tokenizer_config.json, BERT's lower-cases."""
    vocabulary = [*SPECIAL, "[MASK]", "edema", "Edema", "lung", "##s"]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=len(vocabulary), **SMALL)
    transformers.BertModel(config).save_pretrained(tmp_path)

    def tokens() -> tuple[list[str], str]:
        release_encoders()
        encoder = build_encoder(text(tmp_path))
        (chunk,) = encoder.chunks("Edema lungs")
        return [vocabulary[token] for token in chunk], encoder.fingerprint

    lower, first = tokens()
    assert lower == ["[CLS]", "edema", "lung", "##s", "[SEP]"]
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", "do_lower_case": False})
    )
    cased, second = tokens()
    assert cased == ["[CLS]", "Edema", "lung", "##s", "[SEP]"]
    assert first != second


def test_an_untrained_pooler_is_not_used(bert, tmp_path):
    """A checkpoint without pooler would get a random one, another each time."""
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


def test_weights_in_half_precision_and_in_many_files_are_computed_in_float32(tmp_path):
    model = random_bert().half()
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    save_tokenizer(tmp_path)
    with torch.inference_mode():
        expected = model.float()(torch.tensor([[CLS, 5, 6, SEP]])).pooler_output.numpy()
    assert np.allclose(build_encoder(text(tmp_path)).encode(["w1 w2"])[0], expected, atol=1e-5)


@pytest.mark.parametrize(("length", "tokens", "kept"), [(3, 8, 3), (9, 8, 8), (9, 9, 9)])
def test_word_pieces_are_those_of_the_notes_start(bert, length, tokens, kept):
    """As if the note ended there, without [CLS] and [SEP]."""
    note, numbers = words(length)
    with torch.inference_mode():
        output = random_bert()(torch.tensor([[CLS, *numbers[:kept], SEP]]))
    (x,) = build_encoder(text(bert, tokens)).encode([note])
    assert x.shape == (kept, 16)
    assert x.dtype == np.float32
    assert np.allclose(x, output.last_hidden_state[0, 1:-1].numpy(), atol=1e-5)


def test_word_pieces_are_at_most_what_the_model_takes(tmp_path):
    config = transformers.BertConfig(
        vocab_size=len(VOCABULARY), max_position_embeddings=12, **SMALL
    )
    transformers.BertModel(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    note, _ = words(40)
    long, empty = build_encoder(text(tmp_path, 100)).encode([note, ""])
    assert (long.shape, empty.shape) == ((10, 16), (0, 16))


# -- images -------------------------------------------------------------------------------------

VISION = {**SMALL, "image_size": 32, "patch_size": 8}
SIDES = {"height": 32, "width": 32}


def vit(**options: bool) -> tuple[Any, Any]:
    return (
        transformers.ViTModel(transformers.ViTConfig(**VISION), **options),
        transformers.ViTImageProcessor(size=SIDES),
    )


def dinov2(form: str) -> tuple[Any, Any]:
    config = getattr(transformers, f"{form}Config")(**VISION)
    return (
        getattr(transformers, f"{form}Model")(config),
        transformers.BitImageProcessor(size={"shortest_edge": 32}, crop_size=SIDES),
    )


def siglip() -> tuple[Any, Any]:
    config = transformers.SiglipVisionConfig(**VISION)
    return transformers.SiglipVisionModel(config), transformers.SiglipImageProcessor(size=SIDES)


def clip() -> tuple[Any, Any]:
    config = transformers.CLIPVisionConfig(**VISION)
    return (
        transformers.CLIPVisionModel(config),
        transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=SIDES),
    )


@pytest.mark.parametrize(
    ("made", "kind", "pooled"),
    [
        (vit, "vit", True),
        (lambda: vit(add_pooling_layer=False), "vit", False),
        (lambda: dinov2("Dinov2"), "dinov2", True),  # its pooled output is the class token
        (lambda: dinov2("Dinov2WithRegisters"), "dinov2_with_registers", True),
        (siglip, "siglip_vision_model", True),
        (clip, "clip_vision_model", True),
    ],
    ids=["vit", "vit-unpooled", "dinov2", "dinov2-registers", "siglip", "clip"],
)
def test_a_vision_model_gives_its_own_output(
    tmp_path, make_picture, made: Callable[[], tuple[Any, Any]], kind: str, pooled: bool
):
    torch.manual_seed(0)
    model, processor = made()
    model.eval().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    encoder = build_encoder(image(tmp_path))
    assert f"huggingface: {kind}, " in encoder.description

    colour = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8), "RGB"
    )
    grey = decode_image(make_picture(1, size=(32, 32)), "x")
    for picture in (colour, grey):
        pixels = np.asarray(picture.convert("RGB"), dtype=np.float32) / 255
        pixels = (pixels - processor.image_mean) / processor.image_std
        with torch.inference_mode():
            output = model(torch.tensor(pixels, dtype=torch.float32).permute(2, 0, 1)[None])
        expected = output.pooler_output if pooled else output.last_hidden_state.mean(1)
        (vector,) = encoder.encode([picture])
        assert vector.shape == (1, encoder.dim) == (1, 16)
        assert np.allclose(vector, expected.numpy(), atol=1e-5)


def noise(height: int, width: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels, "RGB")


def hidden_map(model: Any, processor: Any, picture: Image.Image) -> Any:
    """Last hidden state `[n, d]` or `[d, H, W]` of hand-made pixels."""
    pixels = (np.asarray(picture, dtype=np.float32) / 255 - processor.image_mean) / (
        processor.image_std
    )
    with torch.inference_mode():
        x = torch.tensor(pixels, dtype=torch.float32).permute(2, 0, 1)[None]
        return model(x).last_hidden_state[0].numpy()


@pytest.mark.parametrize(
    ("made", "special"),
    [
        (vit, 1),
        (lambda: dinov2("Dinov2"), 1),
        (lambda: dinov2("Dinov2WithRegisters"), 5),
        (siglip, 0),
        (clip, 1),
    ],
    ids=["vit", "dinov2", "dinov2-registers", "siglip", "clip"],
)
def test_patches_come_without_class_token_and_registers(
    tmp_path, made: Callable[[], tuple[Any, Any]], special: int
):
    torch.manual_seed(0)
    model, processor = made()
    model.eval().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    hidden = hidden_map(model, processor, noise(32, 32))
    assert len(hidden) == special + 16
    patches = hidden[special:]
    blocks = patches.reshape(2, 2, 2, 2, 16).mean((1, 3)).reshape(4, 16)
    for tokens, expected in ((16, patches), (200, patches), (4, blocks), (8, blocks)):
        (x,) = build_encoder(image(tmp_path, tokens)).encode([noise(32, 32)])
        assert x.shape == expected.shape
        assert np.allclose(x, expected, atol=1e-5)


def test_patches_keep_the_layout_of_an_oblong_image(tmp_path):
    torch.manual_seed(0)
    model, _ = dinov2("Dinov2")
    processor = transformers.BitImageProcessor(
        do_resize=False, crop_size={"height": 32, "width": 48}
    )
    model.eval().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    patches = hidden_map(model, processor, noise(32, 48))[1:]
    (x,) = build_encoder(image(tmp_path, 6)).encode([noise(32, 48)])
    expected = patches.reshape(2, 2, 3, 2, 16).mean((1, 3)).reshape(6, 16)
    assert np.allclose(x, expected, atol=1e-5)


def test_a_convolutional_model_gives_its_feature_map(tmp_path):
    torch.manual_seed(0)
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
    model, (_, processor) = transformers.ResNetModel(config).eval(), vit()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    hidden = hidden_map(model, processor, noise(32, 32))
    (x,) = build_encoder(image(tmp_path, 16)).encode([noise(32, 32)])
    assert np.allclose(x, hidden.reshape(16, -1).T, atol=1e-5)


def test_tokens_of_a_model_that_merges_its_patches_are_refused(tmp_path):
    config = transformers.SwinConfig(image_size=32, embed_dim=8, depths=[1, 1], num_heads=[1, 1])
    transformers.SwinModel(config).save_pretrained(tmp_path)
    build_encoder(image(tmp_path))
    with pytest.raises(EncoderError, match="swin gives one token") as caught:
        build_encoder(image(tmp_path, 4))
    assert "set tokens = 1" in caught.value.cure


def test_grey_deep_and_colour_images_are_one(tmp_path, make_picture):
    torch.manual_seed(0)
    for part in vit():
        part.save_pretrained(tmp_path)
    encoder = build_encoder(image(tmp_path))
    pictures = [decode_image(make_picture(1, mode=m), "x") for m in ("L", "I;16", "RGB")]
    grey, deep, colour = encoder.encode(pictures)
    assert np.array_equal(grey, colour)
    assert np.allclose(grey, deep, atol=0.02)
    assert np.array_equal(encoder.encode(pictures[2:])[0], colour)


@pytest.mark.parametrize("kind", ["Siglip", "CLIP"])
def test_a_model_of_two_towers_is_refused(tmp_path, kind):
    getattr(transformers, f"{kind}Config")().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(EncoderError, match="is not one encoder") as caught:
        build_encoder(image(tmp_path))
    assert "one text or one vision tower" in caught.value.cure


def test_preprocessing_or_vocabulary_of_another_model_is_named(tmp_path, bert):
    model, _ = vit()
    model.save_pretrained(tmp_path / "vit")
    with pytest.raises(EncoderError, match="cannot load AutoImageProcessor"):
        build_encoder(image(tmp_path / "vit")).encode([Image.new("L", (9, 9))])
    release_encoders()
    transformers.ViTImageProcessor(size={"height": 40, "width": 40}).save_pretrained(
        tmp_path / "vit"
    )
    with pytest.raises(EncoderError, match="preprocessing does not fit the model") as caught:
        build_encoder(image(tmp_path / "vit")).encode([Image.new("L", (9, 9))])
    assert "one checkpoint" in caught.value.cure

    config = transformers.BertConfig(vocab_size=20, **SMALL)
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    save_tokenizer(tmp_path / "bert")
    with pytest.raises(EncoderError, match="tokenizer or preprocessing does not fit"):
        build_encoder(text(tmp_path / "bert")).encode(["w40"])


# -- files and the hub --------------------------------------------------------------------------


class Evil:
    """A pickle that would leave a file behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


def test_pickled_weights_are_refused_unread(bert, tmp_path):
    shutil.copytree(bert, tmp_path / "copy")
    (tmp_path / "copy" / "model.safetensors").unlink()
    (tmp_path / "copy" / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(tmp_path / "owned")))
    with pytest.raises(EncoderError, match="holds no safetensors") as caught:
        build_encoder(text(tmp_path / "copy"))
    assert "save_pretrained" in caught.value.cure
    assert not (tmp_path / "owned").exists()


def test_code_in_a_folder_is_never_run(bert, tmp_path):
    shutil.copytree(bert, tmp_path / "copy")
    (tmp_path / "copy" / "evil.py").write_text(
        f"from pathlib import Path\nPath({str(tmp_path / 'owned')!r}).touch()\n"
        "from transformers import BertConfig as Config, BertModel as Model\n"
    )
    for name, entries in (
        ("config.json", {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["evil.Words", "evil.Words"]}),
    ):
        file = tmp_path / "copy" / name
        file.write_text(json.dumps({**json.loads(file.read_text()), "auto_map": entries}))
    # A known architecture is the library's own, and gives what it gave without the code.
    expected = build_encoder(text(bert)).encode(["w1 w2"])[0]
    assert np.array_equal(build_encoder(text(tmp_path / "copy")).encode(["w1 w2"])[0], expected)
    config = tmp_path / "copy" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "evil"}))
    release_encoders()
    with pytest.raises(EncoderError, match="cannot load AutoConfig") as caught:
        build_encoder(text(tmp_path / "copy"))
    assert "needs no code of its own" in caught.value.cure
    assert not (tmp_path / "owned").exists()


def test_other_weights_or_another_tokenizer_are_another_encoder(bert, tmp_path):
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


def test_a_folder_that_is_not_there_and_a_revision_that_can_move_are_named(tmp_path):
    with pytest.raises(EncoderError, match="no encoder folder at"):
        build_encoder(text(tmp_path / "nowhere"))
    for moving in ("main", "v1.1", "refs/pr/6", "0" * 39):
        source = Source(modality="text", encoder="huggingface:org/name", revision=moving)
        with pytest.raises(EncoderError, match=f"revision '{moving}' .* is no commit") as caught:
            build_encoder(source)
        assert "pin the commit" in caught.value.cure


OFFLINE = """
import json, sys

calls = []

def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        calls.append(f"{event} {arguments[1:]}")
        raise OSError("no network here")

sys.addaudithook(watch)

from client.site.encoders.registry import build_encoder
from common.errors import EncoderError
from common.study import Source

answers = []
for name, revision, note in json.loads(sys.argv[1]):
    try:
        source = Source(modality="text", encoder=f"huggingface:{name}", revision=revision)
        encoder = build_encoder(source)
        vector = encoder.encode([note])[0].tolist()
        answers.append({"vector": vector, "description": encoder.description})
    except EncoderError as error:
        answers.append({"error": str(error)})
print(json.dumps({"answers": answers, "calls": calls}))
"""


def test_a_pinned_commit_comes_from_the_cache_without_a_network(tmp_path):
    """Two commits of one model; `main` has moved to the second. Nothing is said but the answers."""
    repository = tmp_path / "hub" / "models--org--clinical"
    commits = {"a" * 40: random_bert(seed=1), "b" * 40: random_bert(seed=2)}
    for commit, model in commits.items():
        model.save_pretrained(repository / "snapshots" / commit)
        save_tokenizer(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("b" * 40)
    pickled = tmp_path / "hub" / "models--org--pickled" / "snapshots" / ("c" * 40)
    pickled.mkdir(parents=True)
    (pickled / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(tmp_path / "owned")))

    note = words(600)[0]
    asked = [("org/clinical", commit, note) for commit in (*commits, "d" * 40)]
    asked += [("org/absent", "a" * 40, note), ("org/pickled", "c" * 40, note)]
    child = subprocess.run(
        [sys.executable, "-c", OFFLINE, json.dumps(asked)],
        env={**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    answers, calls = json.loads(child.stdout).values()
    assert calls == []
    assert child.stderr == ""
    for answer, commit in zip(answers, commits, strict=False):
        (expected,) = build_encoder(text(repository / "snapshots" / commit)).encode([note])
        assert np.allclose(answer["vector"], expected, atol=1e-5)
        assert f"org/clinical@{commit}" in answer["description"]
    assert not np.allclose(answers[0]["vector"], answers[1]["vector"], atol=1e-3)
    for answer, missing in ((answers[2], f"clinical@{'d' * 40}"), (answers[3], "absent@")):
        assert f"cannot get encoder org/{missing}" in answer["error"]
        assert "hf download org/" in answer["error"]
    assert "holds no safetensors" in answers[4]["error"]
    assert not (tmp_path / "owned").exists()
