"""Options of AdaCoMed (Chen, Zhao et al. 2025); "S" below is its supplement."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from common.systems.part import Part

Modalities = Annotated[
    dict[
        Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]{0,63}$")],
        Annotated[tuple[str, ...], Field(min_length=1)],
    ],
    Field(max_length=6),
]
"""Name of a modality -> its sources. Six have 63 experts."""

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "mortality": {
        "weighting": "inverse",
        "contrast_weight": 0.59,
        "shared_width": 2048,
        "inverse_temperature": 0.59,
        "inverse_alpha": 0.71,
        "gaussian_sigma": 0.84,
        "threshold": 0.57,
        "threshold_slope": 9.80,
    },
    "long-stay": {
        "weighting": "gaussian",
        "contrast_weight": 0.50,
        "shared_width": 256,
        "inverse_temperature": 0.50,
        "inverse_alpha": 1.00,
        "gaussian_sigma": 1.00,
        "threshold": 0.60,
        "threshold_slope": 10.00,
    },
    "readmission": {
        "weighting": "gaussian",
        "contrast_weight": 0.67,
        "shared_width": 2048,
        "inverse_temperature": 0.78,
        "inverse_alpha": 0.41,
        "gaussian_sigma": 0.66,
        "threshold": 0.94,
        "threshold_slope": 19.76,
    },
    "vital-12": {
        "weighting": "threshold",
        "contrast_weight": 0.50,
        "shared_width": 128,
        "inverse_temperature": 0.07,
        "inverse_alpha": 1.00,
        "gaussian_sigma": 0.10,
        "threshold": 0.15,
        "threshold_slope": 10.00,
    },
}
"""What the paper settled on per task (S, Table 2), each with the weighting that its tables 2 and 4
report as AdaCoMed."""


def written_out(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """The options with the preset's values in its place; as they are where it has none to give."""
    name = raw.get("preset")
    values = PRESETS.get(name, {}) if isinstance(name, str) else {}
    if values.keys() <= raw.keys():
        return raw
    return {**values, **{key: value for key, value in raw.items() if key != "preset"}}


class AdaCoMed(Part):
    """See `client.site.model.fusion.adacomed`.

    Attributes:
        preset: Takes the values of `PRESETS` for every key that is not given. It is written out as
            these values when it is read: a study, its hash and its card hold no preset.
        form: `adaptive` is the system, the others are its baselines: one pathway alone, the mean of
            both pathways' logits, or the modalities' features side by side before the head
            (Large-Ensemble).
        modalities: What the large pathway takes for a modality; empty groups the sources into
            image, text and structured (all else).
        small_modalities: The same for the small model.
        width: d_small, width of both pathways; a modality's token has width // 3 (S 1.2). The
            paper keeps its value to itself; its published code has 1024, and 1128 stays within the
            21.3 M parameters of its Table 6.
        heads: Of the self-attention, eq. (1); 8 in the published code.
        projection_layers: Of Proj in eq. (1) and p in eq. (3): 2 with a ReLU between, or 1 as in
            the published code.
        shared_width: d of eq. (3); the paper's best is 2048, 256, 2048, 128 by task.
        temperature: tau of eq. (4).
        negatives: What the public negatives of eq. (4) are: the small model's view of synthetic
            `records`, or fixed random unit `vectors`, against which nearly every s is 1 after a few
            steps. `batch` trains as the paper does, on the other records of the pass (mode `none`
            alone), and predicts against `records`.
        prototypes: Their number; 63 are as many as a batch of 64 has.
        contrast_weight: lambda of eq. (8); behind a linear start there is no contrast.
        weighting: A row of Table 1.
        inverse_form: Second weight of `inverse`: as in Listing 2 or as in Table 1.
        inverse_temperature, inverse_alpha: T and alpha of `inverse`.
        gaussian_sigma: sigma of `gaussian`.
        threshold, threshold_slope: t and k of `threshold`.
        mixture: What eq. (7) weighs: `logits` (Listing 1) or `probabilities` (as printed).
        freeze_small: Whether the small model stays as it starts; p and f train all the same.
    """

    preset: Literal["mortality", "long-stay", "readmission", "vital-12"] | None = None
    form: Literal["adaptive", "large-only", "small-only", "logit-ensemble", "concatenation"] = (
        "adaptive"
    )
    modalities: Modalities = {}
    small_modalities: Modalities = {}
    width: int = Field(default=192, ge=3, le=65_536)
    heads: int = Field(default=8, ge=1, le=256)
    projection_layers: Literal[1, 2] = 2
    shared_width: int = Field(default=128, ge=2, le=65_536)
    temperature: float = Field(default=0.07, ge=1e-3, le=100)
    negatives: Literal["records", "vectors", "batch"] = "records"
    prototypes: int = Field(default=63, ge=1, le=65_536)
    contrast_weight: float = Field(default=0.5, ge=0, le=100)
    weighting: Literal["learnable", "inverse", "gaussian", "threshold"] = "gaussian"
    inverse_form: Literal["listing", "table"] = "listing"
    inverse_temperature: float = Field(default=1.0, ge=1e-3, le=100)
    inverse_alpha: float = Field(default=1.0, ge=1e-3, le=100)
    gaussian_sigma: float = Field(default=1.0, ge=1e-2, le=100)
    threshold: float = Field(default=0.5, ge=0, le=10)
    threshold_slope: float = Field(default=10.0, ge=1e-2, le=1000)
    mixture: Literal["logits", "probabilities"] = "logits"
    freeze_small: bool = False

    @model_validator(mode="before")
    @classmethod
    def _with_preset(cls, raw: Any) -> Any:
        return written_out(raw) if isinstance(raw, Mapping) else raw

    @model_validator(mode="after")
    def _consistent(self) -> AdaCoMed:
        if self.preset is not None:
            raise ValueError(
                f"'preset' changes nothing: every key that '{self.preset}' would set is written "
                "beside it; leave the preset out, or those keys"
            )
        token = self.width // 3
        if token % self.heads:
            raise ValueError(
                f"width // 3 = {token} does not divide into {self.heads} heads; "
                f"with 'width' = {3 * self.heads * max(1, token // self.heads)} it would"
            )
        for key in ("modalities", "small_modalities"):
            named = Counter(s for sources in getattr(self, key).values() for s in sources)
            if twice := [source for source, times in named.items() if times > 1]:
                raise ValueError(f"'{key}' names source '{twice[0]}' twice")
        return self

    def needs_no_privacy(self) -> str | None:
        if self.negatives != "batch":
            return None
        return (
            "negatives = 'batch' puts every patient into the gradients of all others, which no "
            "noise for one clipped gradient hides; set negatives = 'records'"
        )
