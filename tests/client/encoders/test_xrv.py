"""torchxrayvision's DenseNet-121 in its true architecture, with random weights saved to disk."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from client.site.encoders.registry import build_encoder, release_encoders
from client.site.encoders.xrv import haim_pixels
from client.site.shard import decode_image
from common.errors import EncoderError, StudyError
from common.study import Source


@pytest.fixture(autouse=True)
def _fresh():
    release_encoders()
    torch.set_num_threads(1)


def photograph(height: int, width: int, mode: str = "L") -> Image.Image:
    """Noise: every pixel counts."""
    rng = np.random.default_rng(height * width)
    return Image.fromarray(rng.integers(0, 256, (height, width), dtype=np.uint8)).convert(mode)


@pytest.fixture(scope="module")
def densenet():
    """Random weights; batch statistics of such inputs, so that features are of a usual size."""
    from torchxrayvision.models import DenseNet

    torch.manual_seed(0)
    model = DenseNet(num_classes=18)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.features(
            torch.stack([torch.from_numpy(haim_pixels(photograph(n, n)))[None] for n in (224, 90)])
        )
    return model.eval()


@pytest.fixture(scope="module")
def weights(densenet, tmp_path_factory):
    from safetensors.torch import save_file

    file = tmp_path_factory.mktemp("densenet") / "weights.safetensors"
    save_file(densenet.state_dict(), file)
    return file


def xrv(path: Path, tokens: int = 1) -> Source:
    return Source(modality="image", encoder=f"torchxrayvision:{path}", tokens=tokens)


# -- preprocessing ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size", [(224, 224), (448, 672), (1000, 777), (300, 900), (2544, 3056), (225, 226), (100, 80)]
)
def test_pixels_are_those_of_opencvs_area_interpolation(size):
    """HAIM's steps with the libraries that it uses; up to rounding in float32."""
    cv2 = pytest.importorskip("cv2")
    import torchxrayvision

    picture = photograph(*size)
    scaled = torchxrayvision.datasets.normalize(np.asarray(picture), 255)
    expected = cv2.resize(scaled, (224, 224), interpolation=cv2.INTER_AREA)
    pixels = haim_pixels(picture)
    assert pixels.dtype == np.float32
    assert np.abs(pixels - expected).max() < 2e-3  # of 2,048


def test_pixels_are_means_of_blocks_without_a_crop():
    picture = photograph(2 * 224, 3 * 224)
    blocks = np.asarray(picture, dtype=np.float64).reshape(224, 2, 224, 3).mean((1, 3))
    assert np.abs(haim_pixels(picture) - (2 * blocks / 255 - 1) * 1024).max() < 2e-3


def test_pixels_are_of_the_first_channel_and_fill_the_range():
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8).repeat(196).reshape(224, 224))
    pixels = haim_pixels(ramp)
    assert (pixels.min(), pixels.max()) == (-1024, 1024)
    black = Image.new("L", ramp.size)
    assert np.array_equal(haim_pixels(Image.merge("RGB", (ramp, black, black))), pixels)
    deep = Image.fromarray(np.asarray(ramp).astype(np.uint16) * 257)
    assert np.allclose(haim_pixels(deep), pixels, atol=1e-3)


# -- features -----------------------------------------------------------------------------------


def test_features_are_those_of_a_bare_model(weights, densenet):
    encoder = build_encoder(xrv(weights))
    for picture in (photograph(512, 400), photograph(224, 224, "RGB")):
        with torch.inference_mode():
            x = torch.from_numpy(haim_pixels(picture))[None, None]
            expected = torch.relu(densenet.features(x)).mean((2, 3)).numpy()
        (vector,) = encoder.encode([picture])
        assert vector.shape == (1, encoder.dim) == (1, 1024)
        assert vector.dtype == np.float32
        assert 0.1 < expected.std() < 10  # the comparison below says something
        assert np.abs(vector - expected).max() < 1e-5


def test_tokens_are_the_map_before_the_average(weights, densenet):
    picture = photograph(300, 200)
    with torch.inference_mode():
        x = torch.from_numpy(haim_pixels(picture))[None, None]
        grid = torch.relu(densenet.features(x))[0].permute(1, 2, 0).numpy()
    encoder = build_encoder(xrv(weights, 49))
    (tokens,) = encoder.encode([picture])
    assert tokens.shape == (encoder.tokens, encoder.dim) == (49, 1024)
    assert np.allclose(tokens, grid.reshape(49, 1024), atol=1e-4)
    (pooled,) = build_encoder(xrv(weights)).encode([picture])
    assert np.abs(tokens.mean(0) - pooled[0]).max() < 1e-5
    # The corner of 2 x 2 covers 3.5 x 3.5 cells.
    coarse = build_encoder(xrv(weights, 5))
    assert coarse.tokens == 4
    share = np.array([1, 1, 1, 0.5, 0, 0, 0]) / 3.5
    corner = np.einsum("h,w,hwd->d", share, share, grid)
    assert np.allclose(coarse.encode([picture])[0][0], corner, atol=1e-4)


def test_an_image_has_the_same_bits_alone_and_among_others(weights):
    encoder = build_encoder(xrv(weights))
    pictures = [photograph(100 + n, 90) for n in range(3)]
    together = encoder.encode(pictures)
    release_encoders()
    again = build_encoder(xrv(weights))
    assert all(
        np.array_equal(again.encode([picture])[0], vector)
        for picture, vector in zip(reversed(pictures), reversed(together), strict=True)
    )


def test_every_form_of_weights_gives_the_same(tmp_path, weights, densenet):
    picture = photograph(50, 60)
    (expected,) = build_encoder(xrv(weights)).encode([picture])
    torch.save(densenet.state_dict(), tmp_path / "b.pt")
    torch.save(densenet, tmp_path / "c.pt")
    for name in ("b.pt", "c.pt"):
        encoder = build_encoder(xrv(tmp_path / name))
        assert np.array_equal(encoder.encode([picture])[0], expected)
        assert "DenseNet-121" in encoder.description
        assert str(tmp_path) not in encoder.description


def test_a_jpeg_goes_the_whole_way(weights):
    stream = io.BytesIO()
    photograph(300, 256).save(stream, "JPEG")
    (vector,) = build_encoder(xrv(weights)).encode([decode_image(stream.getvalue(), "x")])
    assert np.isfinite(vector).all()


# -- weights ------------------------------------------------------------------------------------


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
