"""An embedded text encoder that needs no download: feature hashing."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from hashlib import blake2b
from itertools import chain, pairwise

import numpy as np

from client.site.encoders import encoder
from client.site.encoders.encoder import Embedding, fingerprint, unit_norm

_WORD = re.compile(r"[^\W_]+(?:['.][^\W_]+)*")
_END = re.compile(r"(?<=[.!?])\s+|\n+")  # of a sentence


class HashedText:
    """Signed feature hashing of words and pairs of words (Weinberger et al. 2009).

    **Not a language model.** It knows no meaning, no synonyms, no negation beyond two neighbouring
    words ("no edema"), no order beyond that. It is a bag of words folded into `dim` numbers: enough
    for a linear model on notes, and the same on every machine for ever, because nothing was or is
    learned: no vocabulary and no document frequencies, which would be statistics of patients.

    Lower-cased words (digits become 0, so that "72" and "75" are one word and "7" is another) and
    pairs of neighbours; counts enter as 1 + ln(count), each to the cell and with the sign that
    BLAKE2b gives its text; the vector is scaled to root mean square 1 (L2 norm sqrt(dim)).

    Above one token, a token is a sentence or a line; where there are more than `tokens`, neighbours
    share one, as evenly as can be. Nothing of the text is left out.
    """

    def __init__(self, dim: int = 512, tokens: int = 1) -> None:
        self.dim, self.tokens = dim, tokens
        self.fingerprint = fingerprint(HashedText, encoder, dim=dim, tokens=tokens)
        by = "" if tokens == 1 else f" by sentence, at most {tokens} of them"
        self.description = (
            f"hashed-text: signed feature hashing of words and word pairs{by}, {dim} numbers; "
            "nothing learned, not a language model"
        )

    def encode(self, inputs: Sequence[str]) -> list[Embedding]:
        """Vectors `[t, dim]` of each text, t <= tokens; `[0, dim]` for a text without words."""
        return [self._encode(text) for text in inputs]

    def _encode(self, text: str) -> Embedding:
        parts = (_WORD.findall(part) for part in _END.split(text.lower()))
        sentences = [[re.sub(r"\d", "0", word) for word in words] for words in parts if words]
        if not sentences:
            return np.zeros((0, self.dim), dtype=np.float32)
        count = min(len(sentences), self.tokens)
        bounds = [len(sentences) * index // count for index in range(count + 1)]
        pieces = (chain.from_iterable(sentences[start:end]) for start, end in pairwise(bounds))
        return np.stack([self._hashed(list(words)) for words in pieces])

    def _hashed(self, words: list[str]) -> Embedding:
        terms = Counter(words)
        terms.update(f"{left} {right}" for left, right in pairwise(words))
        vector = np.zeros(self.dim)
        for term, count in terms.items():
            hashed = int.from_bytes(blake2b(term.encode(), digest_size=8).digest(), "big")
            weight = 1.0 + np.log(count)
            vector[(hashed >> 1) % self.dim] += weight if hashed & 1 else -weight
        return unit_norm(vector)
