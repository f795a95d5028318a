"""Hugging Face models as frozen encoders of notes and images.

A model is named by id and pinned commit, or by folder. Only safetensors are read and no code of the
repository is run. An encoder is identified by the hash of its files, not by its name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from client.site.encoders import grid
from client.site.encoders.encoder import Embedding, file_digest, fingerprint
from client.site.encoders.grid import pool_grid
from client.site.shard import to_grey
from common.errors import EncoderError

_FILES = ("*.safetensors", "*.json", "*.txt", "*.model")
_CHUNK_TOKENS = 512
_MOST_SPECIAL = 16  # class tokens and registers before the patches of an image


class _HuggingFace:
    """What text and image models share: where the files are, and who they are.

    Args:
        tokens: 1 gives one vector; above, the last hidden states of at most so many tokens.

    Raises:
        EncoderError: The files cannot be had, or hold no safetensors.
    """

    def __init__(self, name: str, revision: str | None, tokens: int = 1) -> None:
        import transformers

        self.tokens = tokens
        self._folder = _folder(name, revision)
        digests = file_digest(file for kind in _FILES for file in self._folder.glob(kind))
        if not any(file.endswith(".safetensors") for file in digests):
            raise EncoderError(
                f"{self._folder} holds no safetensors",
                cure="convert the weights once: model.save_pretrained(folder); pickled weights "
                "can run code and are not read",
            )
        self.dim = self._width()
        self.fingerprint = fingerprint(
            _HuggingFace,
            grid,
            files=digests,
            versions=[torch.__version__, transformers.__version__],
            tokens=tokens,
        )
        shown = f"{name}@{revision}" if revision else "own folder"
        self.description = (
            f"huggingface: {self._config.model_type}, {shown}, files {self.fingerprint[:12]}, "
            f"{'' if tokens == 1 else f'at most {tokens} tokens of '}{self.dim} numbers"
        )

    @cached_property
    def _config(self) -> Any:
        from transformers import AutoConfig

        return self._load(AutoConfig)

    def _width(self) -> int:
        widths = getattr(self._config, "hidden_sizes", None)
        width = getattr(self._config, "hidden_size", None) or (widths[-1] if widths else None)
        if not width:
            raise EncoderError(
                f"{self._folder}: a {self._config.model_type} model is not one encoder",
                cure="name a model with one text or one vision tower",
            )
        return int(width)

    def _load(self, auto: Any, **options: Any) -> Any:
        try:
            return auto.from_pretrained(
                self._folder, trust_remote_code=False, local_files_only=True, **options
            )
        except Exception as error:
            raise EncoderError(
                f"cannot load {auto.__name__} from {self._folder} "
                f"({str(error).strip().splitlines()[0]})",
                cure="give a folder as save_pretrained writes it, of a model that needs no code "
                "of its own",
            ) from error

    @cached_property
    def _model(self) -> tuple[Any, bool]:
        """The model, and whether its pooler was trained: a missing one would be random."""
        from transformers import AutoModel
        from transformers.utils import logging

        # What the checkpoint lacks is judged below; the library's own report says "train it".
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        model, report = self._load(AutoModel, use_safetensors=True, output_loading_info=True)
        missing = set(report["missing_keys"])
        pooler = {key for key in missing if key.startswith("pooler.")}
        if missing - pooler:
            raise EncoderError(
                f"{self._folder} lacks weights of {self._config.model_type} "
                f"({len(missing - pooler)} tensors, such as {min(missing - pooler)})",
                cure="give the complete checkpoint of an encoder",
            )
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return model.eval().requires_grad_(False).to(device, torch.float32), not pooler

    @torch.inference_mode()
    def _output(self, **features: Tensor) -> Any:
        """The model's output for one input, alone in its batch.

        Kernels may round differently with the batch's size, and a killed encode would resume in
        other batches.
        """
        model, _ = self._model
        device = next(model.parameters()).device
        try:
            return model(**{name: value.to(device) for name, value in features.items()})
        except (IndexError, ValueError) as error:
            raise EncoderError(
                f"{self._folder}: tokenizer or preprocessing does not fit the model ({error})",
                cure="give the files of one checkpoint, as save_pretrained writes them",
            ) from error

    def _vector(self, **features: Tensor) -> Embedding:
        """Pooled output `[1, d]` of one input."""
        output = self._output(**features)
        pooled = getattr(output, "pooler_output", None)
        if pooled is not None and self._model[1]:
            vector = pooled.flatten(1)
        else:
            hidden = output.last_hidden_state
            vector = hidden.mean(dim=(2, 3)) if hidden.dim() == 4 else hidden.mean(dim=1)
        return self._checked(vector)

    def _checked(self, x_td: Tensor) -> Embedding:
        if x_td.shape[-1] != self.dim or x_td.dim() != 2:
            raise EncoderError(
                f"{self._folder} gives {tuple(x_td.shape)}, not vectors of {self.dim} numbers",
                cure="name a model whose output is as wide as its hidden size",
            )
        return np.asarray(x_td.float().cpu().numpy())


class HuggingFaceText(_HuggingFace):
    """A text model; a note's embedding is the mean over all of its chunks.

    A note longer than 512 tokens (or than the model takes) is cut into as few chunks as needed, of
    nearly equal length; each is encoded by the trained pooler, or where the checkpoint has none by
    the mean of the last hidden states. HAIM cuts at line breaks and never encodes the last chunk.

    Above one token, the note's first word pieces, at most `tokens` and at most a chunk, are encoded
    as if the note ended there; special tokens are left out of the result.
    """

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        tokenizer = self._load(AutoTokenizer)
        if not tokenizer.is_fast:
            raise EncoderError(
                f"{self._folder} has no tokenizer.json", cure="save the fast tokenizer beside it"
            )
        return tokenizer

    def encode(self, inputs: Sequence[str]) -> list[Embedding]:
        """One vector `[1, dim]` per text, or its word pieces `[t, dim]`, t <= tokens; `[0, dim]`
        for a text without tokens."""
        encode = self._encode if self.tokens == 1 else self._word_pieces
        return [encode(text) for text in inputs]

    def chunks(self, text: str) -> list[list[int]]:
        """Token numbers of each chunk, special tokens included; together they hold every token."""
        tokenizer = self._tokenizer
        count = len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if not count:
            return []
        special = tokenizer.num_special_tokens_to_add()
        each = math.ceil(count / math.ceil(count / self._room))
        pieces = tokenizer(
            text, truncation=True, max_length=each + special, return_overflowing_tokens=True
        )
        return [list(piece) for piece in pieces["input_ids"]]

    @property
    def _room(self) -> int:
        """Most word pieces of a chunk, special tokens not counted."""
        tokenizer = self._tokenizer
        positions = getattr(self._config, "max_position_embeddings", _CHUNK_TOKENS)
        longest = min(_CHUNK_TOKENS, tokenizer.model_max_length, positions)
        return int(longest - tokenizer.num_special_tokens_to_add())

    def _word_pieces(self, text: str) -> Embedding:
        tokenizer = self._tokenizer
        longest = min(self.tokens, self._room) + tokenizer.num_special_tokens_to_add()
        start = tokenizer(
            text,
            truncation=True,
            max_length=longest,
            truncation_side="right",
            return_special_tokens_mask=True,
        )
        kept = ~torch.tensor(start["special_tokens_mask"], dtype=torch.bool)
        if not kept.any():
            return np.zeros((0, self.dim), dtype=np.float32)
        ids = torch.tensor([start["input_ids"]])
        output = self._output(input_ids=ids, attention_mask=torch.ones_like(ids))
        return self._checked(output.last_hidden_state[0].cpu()[kept])

    def _encode(self, text: str) -> Embedding:
        chunks = self.chunks(text)
        if not chunks:
            return np.zeros((0, self.dim), dtype=np.float32)
        vectors = [
            self._vector(input_ids=ids, attention_mask=torch.ones_like(ids))
            for ids in (torch.tensor([chunk]) for chunk in chunks)
        ]
        return np.asarray(np.mean(vectors, axis=0), dtype=np.float32)


class HuggingFaceImage(_HuggingFace):
    """A vision model with its own preprocessing; pooled output, or the mean over all its tokens.

    Grey images, of 8 to 16 bits, are repeated in three channels; colour images keep theirs.

    Above one token, the patches of the last hidden state row by row, without class token and
    registers; of a convolutional model, its feature map. More of them than `tokens` are averaged to
    a coarser grid, see `pool_grid`.

    Raises:
        EncoderError: As above; or tokens of a model whose configuration tells of no patches.
    """

    def __init__(self, name: str, revision: str | None, tokens: int = 1) -> None:
        super().__init__(name, revision, tokens)
        maps = hasattr(self._config, "hidden_sizes")  # convolutional
        # A tower that merges its patches has depths.
        patches = hasattr(self._config, "patch_size") and not hasattr(self._config, "depths")
        if tokens > 1 and not (maps or patches):
            self._refuse_tokens()

    def _refuse_tokens(self) -> NoReturn:
        raise EncoderError(
            f"encoder huggingface: {self._config.model_type} gives one token, no grid of patches",
            cure="set tokens = 1, or name a ViT",
        )

    @cached_property
    def _processor(self) -> Any:
        from transformers import AutoImageProcessor

        return self._load(AutoImageProcessor)

    def encode(self, inputs: Sequence[Image.Image]) -> list[Embedding]:
        """One vector `[1, dim]` per image, or its patches `[t, dim]`, t <= tokens."""
        return [self._encode(picture) for picture in inputs]

    def _encode(self, picture: Image.Image) -> Embedding:
        if len(picture.getbands()) < 3 and picture.mode != "P":
            picture = Image.fromarray(np.rint(255 * to_grey(picture)).astype(np.uint8))
        pixels = self._processor(images=picture.convert("RGB"), return_tensors="pt")
        if self.tokens == 1:
            return self._vector(pixel_values=pixels["pixel_values"])
        return self._patches(pixels["pixel_values"])

    def _patches(self, pixels_1CHW: Tensor) -> Embedding:
        hidden = self._output(pixel_values=pixels_1CHW).last_hidden_state[0]
        if hidden.dim() == 3:
            x_HWd = hidden.permute(1, 2, 0)
        else:
            size = getattr(self._config, "patch_size", None)
            if not isinstance(size, int):
                self._refuse_tokens()
            height, width = (side // size for side in pixels_1CHW.shape[2:])
            # Class token and registers stand before the patches.
            if not height * width <= len(hidden) <= height * width + _MOST_SPECIAL:
                self._refuse_tokens()
            x_HWd = hidden[-height * width :].unflatten(0, (height, width))
        x_td = self._checked(x_HWd.flatten(0, 1))
        return pool_grid(x_td.reshape(*x_HWd.shape), self.tokens)


def _folder(name: str, revision: str | None) -> Path:
    if name.startswith((".", "/", "~")):
        folder = Path(name).expanduser()
        if not folder.is_dir():
            raise EncoderError(f"no encoder folder at {folder}", cure="check the path")
        return folder
    if not revision or not re.fullmatch("[0-9a-f]{40}", revision):
        raise EncoderError(
            f"revision '{revision}' of encoder {name} is no commit: what it names can move, and "
            "hospitals would encode differently",
            cure="pin the commit (40 hexadecimal digits) that the hub shows under 'History'",
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(_FILES)))
    except Exception as error:
        raise EncoderError(
            f"cannot get encoder {name}@{revision} ({type(error).__name__})",
            cure="check id and revision; without a network, bring it with "
            f"`hf download {name} --revision {revision}`, or give the folder of a copy: "
            "'huggingface:/path/to/folder'",
        ) from error
