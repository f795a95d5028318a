"""torchxrayvision's DenseNet-121 as HAIM and UNI-MLM use it: 1,024 features of a chest X-ray."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from client.site.encoders import grid, image
from client.site.encoders.encoder import Embedding, file_digest, fingerprint
from client.site.encoders.grid import grid_shape, pool_grid
from client.site.encoders.image import area_resize
from client.site.shard import to_grey
from common.errors import EncoderError
from common.study import unknown

_SIDE = 224
_MAP_SIDE = 7  # of the feature map that the DenseNet makes of it
_HOUNSFIELD_LIKE = 1024.0  # torchxrayvision's models read pixels in [-1024, 1024]
_ADVICE = (
    "weights are never downloaded here: put the file there, or name a state dict of your own "
    "(.safetensors or .pt) as 'torchxrayvision:/path/to/file'"
)


class TorchXRayVision:
    """DenseNet-121 features of HAIM (Soenksen et al. 2022): ReLU, then the global average.

    See `haim_pixels` for the preprocessing.

    Args:
        weights: A name of torchxrayvision (`densenet121-res224-chex`), read from its cache, or the
            path of a file: state dict (safetensors, or torch.save) or a module saved whole, as
            torchxrayvision's own files are. Such a file is a pickle; only the classes that a
            DenseNet is made of are loaded from it.
        tokens: Above 1, the map of 7 x 7 features before the average, or as few tokens as this;
            see `pool_grid`.

    Raises:
        StudyError: torchxrayvision has no such weights.
        EncoderError: The file is not there.
    """

    dim = 1024

    def __init__(self, weights: str, tokens: int = 1) -> None:
        self.tokens = math.prod(grid_shape(_MAP_SIDE, _MAP_SIDE, tokens))
        self._file = _locate(weights)
        digest = file_digest([self._file])[self._file.name]
        name = weights if self._file.name != Path(weights).name else "own weights"
        self.fingerprint = fingerprint(
            TorchXRayVision,
            image,
            grid,
            weights=digest,
            tokens=self.tokens,
            versions=[torch.__version__, version("torchxrayvision")],
        )
        each = f"{self.tokens} tokens of {self.dim}" if self.tokens > 1 else str(self.dim)
        self.description = (
            f"torchxrayvision: DenseNet-121, {name}, file {digest[:12]}, {each} numbers"
        )

    def encode(self, inputs: Sequence[Image.Image]) -> list[Embedding]:
        """One vector `[1, 1024]` per image, or the map's tokens `[tokens, 1024]` row by row."""
        return [self._encode(picture) for picture in inputs]

    @torch.inference_mode()
    def _encode(self, picture: Image.Image) -> Embedding:
        # One image at a time: kernels may round differently with the size of the batch, and a
        # killed encode would resume in other batches.
        device = next(self._model.parameters()).device
        x_11HW = torch.from_numpy(haim_pixels(picture))[None, None].to(device)
        features_1CHW = self._model.features(x_11HW)
        active_1CHW = torch.relu(features_1CHW)
        if self.tokens > 1:
            return pool_grid(active_1CHW[0].permute(1, 2, 0).float().cpu().numpy(), self.tokens)
        return np.asarray(active_1CHW.mean(dim=(2, 3)).float().cpu().numpy())

    @cached_property
    def _model(self) -> Any:
        from torchxrayvision.models import DenseNet

        state = _state(self._file)
        state.pop("op_threshs", None)
        try:
            model = DenseNet(num_classes=state["classifier.weight"].shape[0])
            model.load_state_dict(state)
        except (KeyError, RuntimeError) as error:
            raise EncoderError(
                f"{self._file} holds no weights of torchxrayvision's DenseNet-121 "
                f"({str(error).splitlines()[0]})",
                cure="give the state dict of torchxrayvision.models.DenseNet",
            ) from None
        device = "cuda" if torch.cuda.is_available() else "cpu"
        # Channels last: a sixth faster on a CPU.
        return model.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)


def haim_pixels(picture: Image.Image) -> NDArray[np.float32]:
    """HAIM's preprocessing, `[224, 224]` float32 in [-1024, 1024].

    First channel, scaled, then straight to 224 x 224 by area: no crop, the aspect ratio is not
    kept. Images of more than 8 bits are scaled by their own range, see `to_grey`.
    """
    return (2 * area_resize(to_grey(picture), _SIDE) - 1) * _HOUNSFIELD_LIKE


def _locate(weights: str) -> Path:
    if weights.startswith((".", "/", "~")):
        file = Path(weights).expanduser()
    else:
        # Imported where it is needed: the package takes seconds, and a resumed run needs no model.
        import torchxrayvision
        from torchxrayvision.models import model_urls

        known = {name: urls for name, urls in model_urls.items() if name.startswith("densenet")}
        if weights not in known:
            raise unknown("torchxrayvision weights", weights, known)
        cache = Path(torchxrayvision.utils.get_cache_dir())
        file = cache / Path(known[weights]["weights_url"]).name
    if not file.is_file():
        raise EncoderError(f"no torchxrayvision weights at {file}", cure=_ADVICE)
    return file


def _state(file: Path) -> dict[str, Any]:
    """The state dict in a file, without running code that a file may carry."""
    from torchxrayvision import models

    parts = [models.DenseNet, models._DenseBlock, models._DenseLayer, models._Transition]
    layers = [nn.Sequential, nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d, nn.AvgPool2d]
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        with torch.serialization.safe_globals([*parts, *layers, nn.Linear, OrderedDict, set]):
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise EncoderError(
            f"cannot read weights from {file} ({type(error).__name__})",
            cure="in a place you trust, save the model's state dict with "
            "safetensors.torch.save_file and name that file",
        ) from error
    return dict(loaded.state_dict() if isinstance(loaded, nn.Module) else loaded)
