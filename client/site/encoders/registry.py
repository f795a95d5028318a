"""From a source of a study to its encoder."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

from client.site.encoders.encoder import Encoder
from common.errors import EncoderError
from common.study import Source, Study, unknown


class Precomputed:
    """Vectors that were encoded elsewhere, from the shard's table `embeddings`.

    The rows of a source named `x` are those whose column `source` says `x`. They lie in the shard
    as they are, so the vault keeps no second copy. A row is a token: above one, a record has the
    latest `tokens` rows up to its cutoff, in the order of time.
    """

    def __init__(self, dim: int, tokens: int) -> None:
        self.dim, self.tokens = dim, tokens
        self.fingerprint = ""
        rows = f"the latest {tokens} rows of " if tokens > 1 else ""
        self.description = (
            f"precomputed: {rows}{dim} numbers, encoded elsewhere and taken as they are"
        )


def build_encoder(source: Source) -> Encoder | Precomputed:
    """The encoder that a source names; sources that differ only in pooling share one.

    Raises:
        StudyError, EncoderError: A name that nothing answers to, or weights that are not there.
    """
    return _build(
        source.modality,
        source.encoder,
        source.revision,
        source.series,
        source.dim,
        source.tokens,
    )


def release_encoders() -> None:
    """Lets go of loaded models; the next `build_encoder` loads anew."""
    _build.cache_clear()


def dimensions(study: Study) -> dict[str, int]:
    """Width of each source's embedding, in the study's order."""
    return {name: build_encoder(source).dim for name, source in study.sources.items()}


def tokens(study: Study) -> dict[str, int]:
    """Most tokens of each source in a record, in the study's order."""
    return {name: build_encoder(source).tokens for name, source in study.sources.items()}


def describe(study: Study) -> Mapping[str, str]:
    """One public line per source: which encoder the run uses."""
    return {name: build_encoder(source).description for name, source in study.sources.items()}


def fingerprints(study: Study) -> dict[str, str]:
    """SHA-256 of each source's encoder: weights, settings and code; "" for precomputed vectors."""
    return {name: build_encoder(source).fingerprint for name, source in study.sources.items()}


@lru_cache(maxsize=32)
def _build(
    modality: str,
    encoder: str,
    revision: str | None,
    series: tuple[str, ...],
    dim: int | None,
    tokens: int,
) -> Encoder | Precomputed:
    # Imports stay inside: torch and transformers cost seconds that a study of series never needs.
    family, _, name = encoder.partition(":")
    if encoder == "series-statistics":
        from client.site.encoders.records import SeriesStatistics

        return SeriesStatistics(series)
    if encoder == "demographics":
        from client.site.encoders.records import Demographics

        return Demographics()
    if encoder == "hashed-text":
        from client.site.encoders.text import HashedText

        return HashedText(tokens=tokens)
    if encoder == "image-descriptor":
        from client.site.encoders.image import ImageDescriptor

        return ImageDescriptor(tokens)
    if encoder == "precomputed":
        assert dim is not None, "the study declares it"
        return Precomputed(dim, tokens)
    if family == "torchxrayvision" and modality == "image":
        _need(encoder, "torchxrayvision")
        from client.site.encoders.xrv import TorchXRayVision

        return TorchXRayVision(name, tokens)
    if family == "huggingface":
        _need(encoder, "transformers")
        from client.site.encoders.huggingface import HuggingFaceImage, HuggingFaceText

        build = HuggingFaceImage if modality == "image" else HuggingFaceText
        return build(name, revision, tokens)
    raise unknown("encoder", encoder, _EMBEDDED, cure="see docs/encoders.md")


_EMBEDDED = ("series-statistics", "demographics", "hashed-text", "image-descriptor", "precomputed")


def _need(encoder: str, package: str) -> None:
    from importlib.util import find_spec

    if find_spec(package) is None:
        raise EncoderError(
            f"encoder '{encoder}' needs the package {package}",
            cure="install the extra 'site': pip install 'fedward[site]'",
        )
