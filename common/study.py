"""The study: the protocol that coordinator and sites agree on.

A study is a TOML file. Its canonical SHA-256 (`Study.hash`) is its identity: hospitals approve that
hash, every request names it, and any override makes a new study with a new hash. `resolve` fills in
what follows from the file (roster, noise multipliers), so that nothing about privacy is left open
when the hash is taken.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import tomllib
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import Field, ValidationError, field_validator, model_validator

from common.errors import StudyError, explain
from common.privacy.events import GaussianHistogram, PoissonGaussian, ReleaseEvent, Unprotected
from common.privacy.fields import Hash
from common.privacy.pricing import calibrate_gaussian, calibrate_noise_multiplier
from common.systems import SYSTEMS
from common.systems.adacomed import AdaCoMed
from common.systems.llama_fusion import LlamaFusion
from common.systems.m_llm import MLlm
from common.systems.part import Part

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
Key = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]{0,63}$")]
Modality = Literal["series", "table", "text", "image", "embedding"]
EMBEDDED_ENCODERS: Mapping[str, str] = {
    "series-statistics": "series",
    "demographics": "table",
    "hashed-text": "text",
    "image-descriptor": "image",
    "precomputed": "embedding",
}
"""Encoders that need no download, and the modality that each reads. Every other encoder is
`torchxrayvision:<weights name or path>` or `huggingface:<id or folder>` (with `revision`)."""
EMBEDDED_SLMS = ("nano",)
MOST_STEPS = 400_000
"""Rounds times steps: with spare rounds, what can be priced exactly."""
_SHOWN_NAMES = 30  # in an error


class Source(Part):
    """One input stream of a record.

    Attributes:
        modality: What kind it is; decides which table of the shard it is read from.
        encoder: Frozen map to an embedding `[tokens, dim]`; see `EMBEDDED_ENCODERS`.
        revision: Pinned commit of a Hugging Face encoder; required for one named by id.
        series: Ordered canonical names (modality `series`); one embedding holds them all.
        categories: Note categories to read (modality `text`); empty reads all.
        pooling: `latest` input up to the cutoff, `mean` over all, or `time-weighted` (UNI-MLM's
            aggregate of earlier images; weights normalised to sum 1). As published, not
            normalised: `time-weighted-by-max` (UNI-MLM) and `time-weighted-by-range` (HAIM).
        dim: Width of a precomputed embedding (modality `embedding`).
        tokens: Most tokens of a record: 1 pools an input to one; above, it gives patches, word
            pieces or sentences, and precomputed embeddings give rows.
    """

    modality: Modality
    encoder: str
    revision: str | None = None
    series: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    pooling: Literal[
        "latest", "mean", "time-weighted", "time-weighted-by-max", "time-weighted-by-range"
    ] = "latest"
    dim: int | None = Field(default=None, ge=1)
    tokens: int = Field(default=1, ge=1, le=256)

    @model_validator(mode="after")
    def _consistent(self) -> Source:
        family = self.encoder.partition(":")[0]
        if self.encoder in EMBEDDED_ENCODERS:
            reads = EMBEDDED_ENCODERS[self.encoder]
        elif family == "torchxrayvision" and ":" in self.encoder:
            reads = "image"
        elif family == "huggingface" and ":" in self.encoder:
            reads = self.modality if self.modality in ("text", "image") else "text"
            local = self.encoder.partition(":")[2].startswith((".", "/", "~"))
            if not local and not self.revision:
                raise ValueError(
                    f"encoder '{self.encoder}' needs 'revision': the commit that every site pins"
                )
        else:
            raise ValueError(
                f"unknown encoder '{self.encoder}'; use one of {', '.join(EMBEDDED_ENCODERS)}, "
                "'torchxrayvision:<weights>' or 'huggingface:<id or folder>'"
            )
        if reads != self.modality:
            raise ValueError(
                f"encoder '{self.encoder}' reads {reads}, but modality is {self.modality}"
            )
        if self.modality == "series" and not self.series:
            raise ValueError("a series source lists its 'series'")
        if self.modality == "embedding" and self.dim is None:
            raise ValueError("a precomputed source declares its 'dim'")
        if len(set(self.series)) != len(self.series):
            raise ValueError("'series' names a series twice")
        if self.tokens > 1 and self.modality in ("series", "table"):
            raise ValueError(f"encoder '{self.encoder}' gives one token; set tokens = 1")
        if self.tokens > 1 and self.pooling != "latest":
            raise ValueError(
                f"tokens of several inputs cannot be averaged one by one (pooling "
                f"'{self.pooling}'); set pooling = 'latest' or tokens = 1"
            )
        return self


class Task(Part):
    """A binary risk, read from the column `y_<name>` of `records`.

    Attributes:
        prevalence: Public share of positives among labelled records (literature, never the sites'
            own counts): sets class weights, or the prior that the loss adds to the logit. A wrong
            value costs utility, not privacy.
    """

    prevalence: float = Field(default=0.5, gt=0, lt=1)
    description: str = ""


class Lora(Part):
    """Low-rank adapters on the SLM's own blocks (Hu et al. 2021), through peft."""

    rank: int = Field(ge=1)
    alpha: int = Field(default=16, ge=1)
    targets: tuple[str, ...] = ("q_proj", "v_proj")


class LinearStart(Part):
    """How a system begins as a linear model of its embeddings; for training under privacy.

    Attributes:
        rank: Directions in which each source may move the system's input; at least the number of
            tasks lets each have a direction of its own.
        excursion: How far, of its length, a unit of the trained map moves that input; the smaller,
            the longer the system stays linear.
        body_halvings: How often the gradients of the system's own layers are halved in the clipped
            vector (and, with `sgd`, their steps; Adam's have one size whatever the gradient's).
        only_under_privacy: Without privacy the system starts as its paper has it.
    """

    rank: int = Field(default=16, ge=1, le=4096)
    excursion: float = Field(default=0.01, ge=1e-5, le=1)
    body_halvings: int = Field(default=5, ge=0, le=20)
    only_under_privacy: bool = False


class Model(Part):
    """What is trained on top of the frozen encoders.

    Attributes:
        system: A key of `common.systems.SYSTEMS`; `uni-mlm`: joint projectors before a frozen SLM
            (Björkdahl et al. 2024).
        slm: `nano` (embedded), a Hugging Face id (with `revision`), or a folder.
        loss: `avg` class-averaged weighted cross-entropy (eq. 2) or `asl` asymmetric (eq. 3).
        class_weights: Weigh classes by public prevalence among labelled records (eq. 2, whose n
            counts unlabelled ones too); without, the public prior is added to the logit in the
            loss, which is better under clipping.
        projectors: `joint`: trained through one sequence of all tokens; `isolated`: each by what
            its own source's tokens alone predict (section II-C). Both predict jointly.
        decoder: Also train one-layer decoders with the reconstruction loss (eq. 5). Under privacy
            it spends the clipped norm on the wrong goal; off by default.
        beta: Weight of the classification loss beside the reconstruction (eq. 5).
        asl_margin, asl_gamma: m and gamma_minus of eq. 3.
        token_scale: Norm of the Jacobian from `W_s e` to the logits at the start, per source.
        logit_gain: Factor on the averaged designated logits; larger keeps the SLM nearer to its
            linear response.
    """

    system: str = "uni-mlm"
    slm: str = "nano"
    revision: str | None = None
    loss: Literal["avg", "asl"] = "avg"
    class_weights: bool = True
    projectors: Literal["joint", "isolated"] = "joint"
    decoder: bool = False
    beta: float = Field(default=10.0, ge=0)
    asl_margin: float = Field(default=0.05, ge=0, lt=1)
    asl_gamma: float = Field(default=4.0, ge=0)
    token_scale: float = Field(default=1.0, ge=1e-3, le=1e3)
    logit_gain: float = Field(default=1.0, ge=1e-3, le=1e3)
    lora: Lora | None = None
    linear_start: LinearStart | None = None
    adacomed: AdaCoMed | None = None
    llama_fusion: LlamaFusion | None = None
    m_llm: MLlm | None = None

    @model_validator(mode="before")
    @classmethod
    def _own_section(cls, raw: Any) -> Any:
        """Writes out the section of the chosen system, and refuses those of others."""
        if not isinstance(raw, Mapping):
            return raw
        name = raw.get("system", "uni-mlm")
        if not isinstance(name, str):
            return raw  # the key's own type says what is wrong
        if name not in SYSTEMS:
            known = ", ".join(SYSTEMS)
            raise ValueError(f"unknown system '{name}'; use one of {known}")
        own = SYSTEMS[name].section
        for section in (s.section for s in SYSTEMS.values() if s.section != own):
            if section and raw.get(section) is not None:
                raise ValueError(f"'{section}' are options of another system than '{name}'")
        if own is not None and raw.get(own) is None:
            return {**raw, own: {}}
        return raw

    @model_validator(mode="after")
    def _own_keys(self) -> Model:
        for key in ("projectors", "decoder", "beta"):
            value = getattr(self, key)
            if self.system != "uni-mlm" and value != type(self).model_fields[key].default:
                raise ValueError(f"'{key}' is of uni-mlm alone: {self.system} has no use for it")
        return self

    @model_validator(mode="after")
    def _lora_has_blocks(self) -> Model:
        if self.lora is not None and not SYSTEMS[self.system].has_slm:
            raise ValueError(f"'lora' adapts a language model, and {self.system} has none")
        return self

    @model_validator(mode="after")
    def _starts_once(self) -> Model:
        if self.linear_start is not None and self.system == "uni-mlm":
            raise ValueError("uni-mlm starts as a linear model by itself; leave linear_start out")
        return self

    @model_validator(mode="after")
    def _pinned(self) -> Model:
        local = self.slm.startswith((".", "/", "~"))
        if self.slm in EMBEDDED_SLMS or local:
            return self
        if "/" not in self.slm:
            raise ValueError(
                f"unknown slm '{self.slm}'; use {', '.join(EMBEDDED_SLMS)}, a Hugging Face id "
                "such as 'google/gemma-2b' with 'revision', or a folder ('./…' or '/…')"
            )
        if not self.revision:
            raise ValueError(f"slm '{self.slm}' needs 'revision': the commit every site pins")
        return self


class Training(Part):
    """Local optimisation at a site; all of it public.

    Attributes:
        scale_by_noise: Divide the learning rate by the noise multiplier, so that one recipe serves
            every epsilon: half the noise, double the step.
        steps_per_round: DP-SGD steps between two exchanges.
    """

    optimizer: Literal["sgd", "adam"] = "adam"
    learning_rate: float = Field(default=5e-4, gt=0, le=1e3)
    scale_by_noise: bool = False
    momentum: float = Field(default=0.0, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    steps_per_round: int = Field(default=20, ge=1, le=100_000)


class Privacy(Part):
    """The privacy of training patients; unit is the patient at a site, add/remove.

    Attributes:
        mode: `local`: full noise at each site, nobody outside trusted. `none`: for baselines.
        epsilon, delta: Target for all declared and spare rounds together, per population.
        sample_rate: Probability q with which a step includes a patient.
        records_per_patient: Up to k records of an included patient, averaged.
        max_grad_norm: Clipping norm C of a patient's gradient.
        spare_rounds: Fraction of extra rounds that are priced too, so that a lost round does not
            end the study.
        batch_slack: Share of C that is charged for kernels in which a patient's result depends on
            the others in the pass (bfloat16 on a GPU). Sites measure it before they train, and
            decline where it is more. 0 on a CPU.
        noise_multiplier: sigma / C; None until the study is resolved.
    """

    mode: Literal["local", "none"] = "local"
    epsilon: float = Field(default=8.0, gt=0)
    delta: float = Field(default=1e-5, gt=0, lt=1)
    sample_rate: float = Field(default=0.1, gt=0, le=1)
    records_per_patient: int = Field(default=1, ge=1, le=1000)
    max_grad_norm: float = Field(default=1.0, ge=1e-6, le=1e6)
    spare_rounds: float = Field(default=0.1, ge=0, le=1)
    batch_slack: float = Field(default=0.0, ge=0, lt=1)
    noise_multiplier: float | None = Field(default=None, ge=1e-2, le=1e6)


class Evaluation(Part):
    """Releases on validation patients: one noised vector of score histograms each.

    Attributes:
        validation_fraction: Share of patients that never train, fixed by the site's keyed hash.
        releases: How many evaluations are priced; the last round is always evaluated.
        bins: Score bins per task and class, equal in the logit range `[-logit_range, logit_range]`.
        records_per_patient: Records among which a patient's weight 1 is split, at most.
        epsilon: Target for all releases together; None takes `privacy.epsilon`.
        noise_multiplier: Noise / sensitivity; None until the study is resolved.
    """

    validation_fraction: float = Field(default=0.25, gt=0, lt=1)
    releases: int = Field(default=1, ge=1, le=1000)
    bins: int = Field(default=16, ge=2, le=256)
    logit_range: float = Field(default=4.0, ge=0.01, le=1000)
    records_per_patient: int = Field(default=4, ge=1, le=1000)
    epsilon: float | None = Field(default=None, gt=0)
    noise_multiplier: float | None = Field(default=None, ge=1e-2, le=1e6)


class Site(Part):
    """A hospital of the roster.

    Attributes:
        patients_declared: Public lower bound on its *training* patients: denominator of the mean
            gradient and weight in the average. The site checks it locally before it takes part.
        public_key: Hex of the site's Ed25519 key; None in simulations.
    """

    patients_declared: int = Field(ge=1)
    public_key: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")


class Federation(Part):
    """The exchange with the coordinator.

    Attributes:
        quorum: Fraction of sites whose answers a round needs.
        deadline_seconds: Time for one round; start-up and encoding do not count.
        startup_seconds: Time for sites to appear, encode and load the SLM.
        retries: How often a lost round is asked again (spare rounds pay for it).
        server_optimizer: `fedavg`, or `fedadam` (Reddi et al. 2021) on the averaged change.
        average_last: Fraction of the last rounds whose mean adapter is evaluated and published; 0
            takes the last one. Post-processing: it costs no privacy and averages noise out.
        patients_declared: Default for sites that a simulation finds on disk.
    """

    rounds: int = Field(default=10, ge=1, le=100_000)
    quorum: float = Field(default=0.75, gt=0, le=1)
    deadline_seconds: float = Field(default=1800, gt=0)
    startup_seconds: float = Field(default=3600, gt=0)
    retries: int = Field(default=1, ge=0)
    server_optimizer: Literal["fedavg", "fedadam"] = "fedavg"
    server_learning_rate: float = Field(default=1.0, gt=0)
    average_last: float = Field(default=0.5, ge=0, le=1)
    patients_declared: int | None = Field(default=None, ge=1)
    sites: dict[Name, Site] = {}


class Start(Part):
    """The published adapter of another study, from which this one starts.

    What that study released of its patients is charged to it, in the same ledgers, and adds up with
    what this one releases.

    Attributes:
        adapter: SHA-256 of its arrays, as `cat adapter/*.safetensors | sha256sum` gives it.
        study: Hash of the study that made it.
    """

    adapter: Hash
    study: Hash


class Study(Part):
    """A whole protocol. See the module's text; `docs/study.md` lists every key.

    Attributes:
        complete_records_only: Leave out, at each site, records that lack a source (UNI-MLM's
            cohort).
    """

    schema_version: Literal[1] = 1
    name: Name
    description: str = ""
    seed: int = Field(default=0, ge=0, lt=2**63)
    complete_records_only: bool = False
    sources: dict[Key, Source] = Field(min_length=1, max_length=10)
    tasks: dict[Key, Task] = Field(min_length=1)
    model: Model = Model()
    training: Training = Training()
    training_without_privacy: Training | None = None
    privacy: Privacy = Privacy()
    evaluation: Evaluation = Evaluation()
    federation: Federation = Federation()
    start: Start | None = None

    @field_validator("tasks")
    @classmethod
    def _bare_names(cls, tasks: dict[str, Task]) -> dict[str, Task]:
        for name in tasks:
            if name.startswith("y_"):
                raise ValueError(f"task '{name}': leave out 'y_'; it names the column y_{name}")
        return tasks

    @model_validator(mode="after")
    def _sound(self) -> Study:
        if self.privacy.mode != "none":
            for key, options in self.model:
                if isinstance(options, Part) and (why := options.needs_no_privacy()):
                    raise ValueError(f"model.{key}: {why}, or privacy.mode = 'none'")
        steps = self.federation.rounds * self.training.steps_per_round
        if steps > MOST_STEPS:
            raise ValueError(f"{steps:,} steps are more than a study may have ({MOST_STEPS:,})")
        for name, site in self.federation.sites.items():
            if self.privacy.mode != "none" and self.privacy.delta >= 1 / site.patients_declared:
                raise ValueError(
                    f"privacy.delta {self.privacy.delta:g} is not below 1/patients_declared of "
                    f"site '{name}' ({1 / site.patients_declared:g}); choose a smaller delta"
                )
        return self

    # -- identity ---------------------------------------------------------------------------

    def canonical(self) -> bytes:
        """Canonical JSON: keys in the schema's order, every default written out, no white space.

        Sources, tasks and sites keep the order of the file, which has a meaning: of the tokens, of
        the designated entries, and of the sum over sites.
        """
        return json.dumps(
            self.model_dump(mode="json"), separators=(",", ":"), allow_nan=False
        ).encode()

    @property
    def hash(self) -> str:
        """SHA-256 of the canonical form, hex."""
        return hashlib.sha256(self.canonical()).hexdigest()

    # -- what follows from the file ---------------------------------------------------------

    @property
    def resolved(self) -> bool:
        """Whether nothing about privacy is left open; only such a study can run."""
        return bool(self.federation.sites) and (
            self.privacy.mode == "none"
            or None not in (self.privacy.noise_multiplier, self.evaluation.noise_multiplier)
        )

    @property
    def priced_rounds(self) -> int:
        """Declared rounds plus spare ones."""
        spare = math.ceil(self.privacy.spare_rounds * self.federation.rounds)
        return self.federation.rounds + spare

    def round_event(self, site: str) -> ReleaseEvent:
        """What one training round at `site` releases."""
        if self.privacy.mode == "none":
            return Unprotected(population="train")
        assert self.privacy.noise_multiplier is not None, "resolve the study first"
        return PoissonGaussian(
            sample_rate=self.privacy.sample_rate,
            noise_multiplier=self.privacy.noise_multiplier,
            steps=self.training.steps_per_round,
            max_grad_norm=self.privacy.max_grad_norm,
            denominator=self.expected_batch(site),
        )

    def evaluation_event(self) -> ReleaseEvent:
        """What one evaluation releases."""
        if self.privacy.mode == "none":
            return Unprotected(population="validation")
        assert self.evaluation.noise_multiplier is not None, "resolve the study first"
        return GaussianHistogram(noise_multiplier=self.evaluation.noise_multiplier, count=1)

    def reserved_events(self, site: str) -> tuple[ReleaseEvent, ...]:
        """Everything that the study may release at `site`: spare rounds included."""
        return (
            *(self.round_event(site) for _ in range(self.priced_rounds)),
            *(self.evaluation_event() for _ in range(self.evaluation.releases)),
        )

    def expected_batch(self, site: str) -> float:
        """Declared denominator of the mean gradient at `site`, in patients."""
        return self.privacy.sample_rate * self.federation.sites[site].patients_declared

    def weight(self, site: str) -> float:
        """Declared share of `site` in the average; the shares of the roster sum to 1."""
        total = sum(s.patients_declared for s in self.federation.sites.values())
        return self.federation.sites[site].patients_declared / total

    # -- TOML -------------------------------------------------------------------------------

    @classmethod
    def from_toml(cls, text: str, *, origin: str = "study") -> Study:
        """Parses and validates; every mistake becomes one `StudyError` naming the keys."""
        return cls._checked(_parsed(text, origin), origin)

    @classmethod
    def load(cls, path: str | Path) -> Study:
        """Reads a study file, or a ready study by its bare name (`demo`), with all that it is based
        on: a section `[base]` names another study, and this one is laid over it."""
        return cls._checked(_read(path, ()), str(path))

    @classmethod
    def _checked(cls, raw: Mapping[str, Any], origin: str) -> Study:
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            raise StudyError(f"{origin}: {explain(error)}", cure="see docs/study.md") from None

    def to_toml(self) -> str:
        """The study as TOML; reading it back gives the same hash."""
        return tomli_w.dumps(_without_none(self.model_dump(mode="json")))


class Base(Part):
    """The study that a file is laid over (`merged`).

    Attributes:
        study: A ready study's name, or a file beside this one.
        sources, tasks: Only these of the base's, in this order; None keeps all.
    """

    study: str
    sources: tuple[str, ...] | None = None
    tasks: tuple[str, ...] | None = None


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid over `base`, section by section."""
    result = dict(base)
    for key, value in over.items():
        below = result.get(key)
        nested = isinstance(value, Mapping) and isinstance(below, Mapping)
        result[key] = merged(below, value) if nested else value  # type: ignore[arg-type]
    return result


def _parsed(text: str, origin: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise StudyError(f"{origin} is not valid TOML: {error}") from None


def _read(path: str | Path, above: tuple[str, ...]) -> dict[str, Any]:
    """A study file's sections, laid over those of its base; `above`: the files based on it."""
    ready = {
        p.name[:-5]: p
        for p in resources.files("simulations.studies").iterdir()
        if p.name.endswith(".toml")
    }
    file = ready.get(str(path), Path(path))
    if not file.is_file():
        raise StudyError(
            f"no study at {path}",
            cure=f"give a TOML file or one of: {', '.join(sorted(ready))}",
        )
    own = str(Path(str(file)).resolve())
    if own in above:
        raise StudyError(f"{path} is based on itself", cure="end the chain of [base] sections")
    try:
        raw = _parsed(file.read_text(), str(path))
    except UnicodeDecodeError:
        raise StudyError(f"{path} is not a text file in UTF-8") from None
    if "base" not in raw:
        return raw
    try:
        base = Base.model_validate(raw.pop("base"))
    except ValidationError as error:
        raise StudyError(
            f"{path}: [base]: {explain(error)}", cure="its keys are study, sources, tasks"
        ) from None
    beside = base.study if base.study in ready else Path(str(file)).parent / base.study
    below = _read(beside, (*above, own))
    for kind in ("sources", "tasks"):
        kept, there = getattr(base, kind), below.get(kind)
        there = there if isinstance(there, Mapping) else {}
        for name in kept or ():
            if name not in there:
                raise unknown(kind[:-1], name, there, cure=f"{base.study} is the base of {path}")
        if kept is not None:
            below[kind] = {name: there[name] for name in kept}
    return merged(below, raw)


def resolve(
    study: Study,
    *,
    sites: Mapping[str, int | None] | None = None,
    rounds: int | None = None,
    epsilon: float | None = None,
    private: bool = True,
    seed: int | None = None,
) -> Study:
    """Settles everything that is still open and returns the study that will run.

    Args:
        sites: Sites to run with and, where the study does not declare it, their number of training
            patients; None keeps the study's own roster.
        rounds, epsilon, seed: Overrides of the file.
        private: False runs in mode `none` with `training_without_privacy` where given.

    Raises:
        StudyError: No site is known, or a site's declared number of patients is.
        PrivacyError: The target cannot be met.
    """
    if epsilon is not None and not (epsilon > 0 and math.isfinite(epsilon)):
        raise StudyError(
            f"epsilon must be a positive number, not {epsilon}",
            cure="use --no-privacy to run without differential privacy",
        )
    raw = study.model_dump(mode="json")
    if sites is not None:
        known = study.federation.sites
        roster: dict[str, Any] = {}
        for name, declared in sites.items():
            number = declared or study.federation.patients_declared
            if name in known:
                roster[name] = known[name].model_dump(mode="json")
            elif number:
                roster[name] = {"patients_declared": number}
            else:
                raise StudyError(
                    f"site '{name}' has no declared number of patients",
                    cure=f"write [federation.sites.{name}] patients_declared = … or "
                    "federation.patients_declared into the study",
                )
        raw["federation"]["sites"] = roster
    if not raw["federation"]["sites"]:
        raise StudyError("the study names no sites", cure="add [federation.sites.<name>]")
    raw["federation"]["rounds"] = rounds if rounds is not None else study.federation.rounds
    raw["seed"] = study.seed if seed is None else seed
    privacy, evaluation = raw["privacy"], raw["evaluation"]
    if epsilon is not None:
        privacy["epsilon"], evaluation["epsilon"] = epsilon, None
        privacy["noise_multiplier"] = evaluation["noise_multiplier"] = None
    if not private:
        privacy["mode"] = "none"
    if privacy["mode"] == "none":
        privacy["noise_multiplier"] = evaluation["noise_multiplier"] = None
        raw["training"] = raw["training_without_privacy"] or raw["training"]
        if study.model.linear_start and study.model.linear_start.only_under_privacy:
            raw["model"]["linear_start"] = None
    raw["training_without_privacy"] = None
    try:
        settled = Study.model_validate(raw)
        if settled.privacy.mode != "none":
            privacy["noise_multiplier"] = calibrate_noise_multiplier(
                settled.privacy.epsilon,
                settled.privacy.delta,
                settled.privacy.sample_rate,
                settled.priced_rounds * settled.training.steps_per_round,
            )
            evaluation["epsilon"] = settled.evaluation.epsilon or settled.privacy.epsilon
            evaluation["noise_multiplier"] = calibrate_gaussian(
                evaluation["epsilon"], settled.privacy.delta, settled.evaluation.releases
            )
        return Study.model_validate(raw)
    except ValidationError as error:
        raise StudyError(f"study '{study.name}': {explain(error)}") from None


def unknown(kind: str, name: str, known: Iterable[str], *, cure: str = "") -> StudyError:
    """The error for a name that nothing answers to, with the nearest known one."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    shown = ", ".join(names[:_SHOWN_NAMES]) + (", …" if len(names) > _SHOWN_NAMES else "")
    return StudyError(f"unknown {kind} '{name}'{hint} (known: {shown})", cure=cure)


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_without_none(v) for v in value]
    return value
