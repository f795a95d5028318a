"""AdaCoMed: collaboration of large and small models (Chen, Zhao et al., CVPR 2025).

The large pathway fuses the modalities' frozen embeddings by a mixture of modality experts; the
small model is a light network of the same record; one projection and one head serve both, and the
similarity of both projections decides how far each is believed. "Published code" is the authors'
repository, Listings and S their supplement. `docs/fidelity/adacomed.md` says what differs and why.

Dimensions: B records, T tokens of a source, M modalities, C = 2^M - 1 experts, P pathways (large
before small), N prototypes, K tasks; t = d_small // 3 and w = d_small of the paper, d as there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from client.site.model.fusion.adacomed_pathways import (
    Group,
    JoinedModalities,
    MixtureOfModalityExperts,
    ModalityNetworks,
    mlp,
)
from client.site.model.fusion.base import NO_SLM, Objective, Prediction, RiskModel
from client.site.model.fusion.sources import pathways_of
from client.site.model.slm import Slm
from common.study import Study
from common.systems.adacomed import AdaCoMed as Options

_TINY = 1e-30  # a weight that saturated to 0 still has a logarithm


def build(study: Study, dims: Mapping[str, int], slm: Slm | None) -> RiskModel:
    """The model that the study's seed gives, on the CPU.

    Raises:
        StudyError: As `pathways_of`.
    """
    options = study.model.adacomed
    assert options is not None
    large, small = pathways_of(study, options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(study.seed)
        return AdaCoMed(options, dims, large, small, len(study.tasks))


def log_similarity(
    large_Bd: Tensor, small_Bd: Tensor, negatives_Nd: Tensor, temperature: float
) -> Tensor:
    """log s of eq. (4), `[B]`; eq. (5) is its negative.

    The negatives are public and of unit length; the paper's are the other records of the batch,
    which would put every patient into every other patient's gradient.
    """
    large_Bd, small_Bd = _unit(large_Bd), _unit(small_Bd)
    own_B1 = (large_Bd * small_Bd).sum(dim=-1, keepdim=True)
    cosines = torch.cat([own_B1, large_Bd @ negatives_Nd.T], dim=1)
    return (cosines / temperature).log_softmax(dim=-1)[:, 0]


def batch_log_similarity(
    large_Bd: Tensor, small_Bd: Tensor, both_B: Tensor, temperature: float
) -> Tensor:
    """log s of eq. (4) as printed, `[B]`: the negatives are z_small of the batch's other records.

    Without privacy only. A record whose small pathway, or large one, has nothing to read (`both_B`)
    is nobody's negative.
    """
    cosines_BB = _unit(large_Bd) @ _unit(small_Bd).T / temperature
    own_BB = torch.eye(len(both_B), dtype=torch.bool, device=both_B.device)
    return cosines_BB.masked_fill(~(both_B | own_BB), -torch.inf).log_softmax(dim=-1).diagonal()


def contrastive_weight(options: Options, s_B: Tensor) -> Tensor:
    """w_large of Table 1 from the similarity, `[B]`; w_small is 1 - w_large."""
    if options.weighting == "gaussian":
        return -torch.expm1(-s_B.square() / (2 * options.gaussian_sigma**2))
    if options.weighting == "threshold":
        steepness = options.threshold_slope * (s_B - options.threshold)
        return 0.5 + 0.5 * torch.tanh(steepness)
    # Inverse: both weights before they are normalised, times u (or 1 + u), the denominator of the
    # small one, so that nothing is divided by s near 0.
    u_B = options.inverse_alpha * s_B / options.inverse_temperature + 1e-6
    denominator_B = u_B if options.inverse_form == "table" else 1 + u_B
    large_B = torch.sigmoid(s_B) * denominator_B
    return large_B / (large_B + 1)


def mixed_probability(y_BPK: Tensor, w_BP: Tensor) -> Tensor:
    """Logit of sum_P w_P sigmoid(y_P), eq. (7) as printed, `[B, K]`; the weights sum to 1."""
    log_w_BP1 = w_BP.clamp(min=_TINY).log()[:, :, None]
    yes_BK = (log_w_BP1 + functional.logsigmoid(y_BPK)).logsumexp(dim=1)
    no_BK = (log_w_BP1 + functional.logsigmoid(-y_BPK)).logsumexp(dim=1)
    return yes_BK - no_BK


class Collaboration(NamedTuple):
    """What both pathways say of B records.

    Attributes:
        y_BPK: Their logits, eq. (6), large before small.
        log_s_B: Logarithm of the similarity, eq. (4).
        w_BP: Their weights (Table 1), which sum to 1.
        here_BP: Whether the record has any of the pathway's sources.
    """

    y_BPK: Tensor
    log_s_B: Tensor
    w_BP: Tensor
    here_BP: Tensor


class AdaCoMed(RiskModel):
    """The system, or one of its baselines; see `Options.form`.

    Args:
        dims: Width d_s of each source's embedding.
        large, small: Sources of each modality, by pathway; empty where the form has none.
        tasks: Number K of logits.
    """

    public_ND: Tensor  # sources of the small model side by side, or vectors of the shared space

    def __init__(
        self,
        options: Options,
        dims: Mapping[str, int],
        large: Sequence[Group],
        small: Sequence[Group],
        tasks: int,
    ) -> None:
        super().__init__()
        self.options = options
        self.slm, self.slm_description, self.designated = None, NO_SLM, []
        self.dims = dict(dims)
        token, width, layers = options.width // 3, options.width, options.projection_layers
        self.pathways = nn.ModuleDict()  # the same names in every form: one can start another
        if large:
            networks = ModalityNetworks(large, dims, token, layers)
            if options.form == "concatenation":
                self.pathways["large"] = JoinedModalities(networks)
                width = len(large) * token
            else:
                self.pathways["large"] = MixtureOfModalityExperts(
                    networks, token, width, options.heads
                )
        if small:
            networks = ModalityNetworks(small, dims, token, layers=2)
            fusion = mlp(len(small) * token, width, width)
            self.pathways["small"] = JoinedModalities(networks, fusion)
            self.pathways["small"].requires_grad_(not options.freeze_small)
        self.projection = mlp(width, options.shared_width, options.shared_width, layers=layers)
        self.head = nn.Linear(options.shared_width, tasks)
        for module in self.modules():
            # He et al. 2015: torch's own weights shrink what passes each of the small model's six
            # layers, until the first step's biases outweigh every record. Random biases outweigh
            # it from the start: every similarity would be near 1, where the weights tell no records
            # apart (Figure 6 starts low), and a record without any source would be given a risk.
            if isinstance(module, nn.Linear):
                nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)
        if options.form == "adaptive":
            read = [source for group in small for source in group]
            self._public_widths = {source: dims[source] for source in read}
            vectors = options.negatives == "vectors"
            features = options.shared_width if vectors else sum(self._public_widths.values())
            public_ND = torch.randn(options.prototypes, features)
            self.register_buffer("public_ND", public_ND, persistent=False)
            # Without parameters of their own, and without the hooks that book the records' passes.
            self._twins = (
                deepcopy(self.pathways["small"]).to("meta"),
                deepcopy(self.projection).to("meta"),
            )
            if options.weighting == "learnable":
                self.theta = nn.Embedding(1, 2)  # a lone vector in a layer that has a proof
                nn.init.zeros_(self.theta.weight)

    def predict(self, inputs: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Prediction:
        """Predicts the tasks of B records.

        Args:
            inputs: Source -> embeddings `[B, T_s, d_s]`, float32.
            present: Source -> mask `[B, T_s]`, bool.
        """
        if self.options.form != "adaptive":
            _, y_BPK, here_BP = self.represent(inputs, present)
            w_BP = _sole(here_BP, torch.full_like(y_BPK[:, :, 0], 1 / y_BPK.shape[1]))
            return Prediction((w_BP[:, :, None] * y_BPK).sum(dim=1))
        return self._mixed(self.collaborate(inputs, present))

    def views(self, inputs: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Objective:
        """As predicted, but for `negatives = "batch"`, where the pass's records meet."""
        if self.options.form != "adaptive" or self.options.negatives != "batch":
            return super().views(inputs, present)
        z_BPd, y_BPK, here_BP = self.represent(inputs, present)
        with torch.autocast(z_BPd.device.type, enabled=False):
            log_s_B = batch_log_similarity(
                z_BPd[:, 0], z_BPd[:, 1], here_BP.all(dim=1), self.options.temperature
            )
        said = self._mixed(self._weighed(y_BPK, log_s_B, here_BP))
        share_B1 = torch.ones_like(said.logits_BK[:, :1])
        return Objective(said.logits_BK[:, None], share_B1, said.auxiliary_B)

    def _mixed(self, both: Collaboration) -> Prediction:
        """Eqs. (7) and (8)."""
        if self.options.mixture == "logits":
            logits_BK = (both.w_BP[:, :, None] * both.y_BPK).sum(dim=1)
        else:
            logits_BK = mixed_probability(both.y_BPK, both.w_BP)
        if self.linear_start is not None:  # it would tell which sources a record has, no more
            return Prediction(logits_BK)
        # Eq. (5); a pathway that saw nothing is aligned with nothing.
        contrast_B = torch.where(both.here_BP.all(dim=1), -both.log_s_B, 0.0)
        return Prediction(logits_BK, self.options.contrast_weight * contrast_B)  # eq. (8)

    def collaborate(
        self, inputs: Mapping[str, Tensor], present: Mapping[str, Tensor]
    ) -> Collaboration:
        """Both pathways, their similarity and their weights (form `adaptive` alone), of each record
        by itself."""
        z_BPd, y_BPK, here_BP = self.represent(inputs, present)
        large_Bd, small_Bd = z_BPd.unbind(dim=1)
        negatives_Nd = self.negatives().to(z_BPd.dtype)
        if self.options.negatives == "records":
            # Own or public, the small model's vectors move together: a gradient through the
            # record's own alone would flee negatives that follow, for ever and at any cost to
            # eq. (7). So all of them are constants, as the keys of MoCo (He et al. 2020).
            small_Bd = small_Bd.detach()
        with torch.autocast(z_BPd.device.type, enabled=False):  # tau magnifies what it rounds
            log_s_B = log_similarity(large_Bd, small_Bd, negatives_Nd, self.options.temperature)
        return self._weighed(y_BPK, log_s_B, here_BP)

    def _weighed(self, y_BPK: Tensor, log_s_B: Tensor, here_BP: Tensor) -> Collaboration:
        """Table 1."""
        if self.options.weighting == "learnable":
            index_B1 = torch.zeros(len(log_s_B), 1, dtype=torch.long, device=log_s_B.device)
            w_BP = self.theta(index_B1)[:, 0].softmax(dim=-1)
        else:
            large_B = contrastive_weight(self.options, log_s_B.exp())
            w_BP = torch.stack([large_B, 1 - large_B], dim=1)
        return Collaboration(y_BPK, log_s_B, _sole(here_BP, w_BP), here_BP)

    @torch.no_grad()
    def negatives(self) -> Tensor:
        """z_small^k of eq. (4) beside the record's own, `[N, d]` of unit length.

        Of public records (all sources present, standard normal embeddings) under the present
        adapter, read as patients' are: like the batch of the paper they crowd where the model maps
        everything to one direction. They are constants of the pass: no gradient moves them.
        """
        if self.options.negatives == "vectors":
            return functional.normalize(self.public_ND, dim=-1)
        parts = self.public_ND[:, None].split(list(self._public_widths.values()), dim=-1)
        inputs = dict(zip(self._public_widths, parts, strict=True))
        if self.linear_start is not None:
            inputs = self.linear_start.constants(inputs)
        present = {
            source: torch.ones(e_N1d.shape[:2], dtype=torch.bool, device=e_N1d.device)
            for source, e_N1d in inputs.items()
        }
        small, projection = self._twins
        e_Nw, _ = functional_call(
            small, dict(self.pathways["small"].named_parameters()), (inputs, present)
        )
        z_Nd = functional_call(projection, dict(self.projection.named_parameters()), (e_Nw,))
        return _unit(z_Nd)

    def represent(
        self, inputs: Mapping[str, Tensor], present: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What every form makes of B records, pathway by pathway.

        Returns:
            z `[B, P, d]` of eq. (3), y `[B, P, K]` of eq. (6) by one p and one f for both pathways,
            and whether a pathway has anything to read `[B, P]`.
        """
        read = [pathway(inputs, present) for pathway in self.pathways.values()]
        z_BPd = self.projection(torch.stack([e_Bw for e_Bw, _ in read], dim=1))
        y_BPK, here_BP = self.head(z_BPd), torch.stack([here_B for _, here_B in read], dim=1)
        wide = torch.promote_types(z_BPd.dtype, torch.float32)  # also under autocast
        return z_BPd.to(wide), y_BPK.to(wide), here_BP


def _unit(z_Bd: Tensor) -> Tensor:
    """Of unit length, without a gradient above 1e6 at a vector of zeros."""
    return functional.normalize(z_Bd, dim=-1, eps=1e-6)


def _sole(here_BP: Tensor, w_BP: Tensor) -> Tensor:
    """The weights, but 1 for a pathway that alone has something to read."""
    alone_B1 = here_BP.sum(dim=1, keepdim=True) == 1
    return torch.where(alone_B1, here_BP.to(w_BP.dtype), w_BP)
