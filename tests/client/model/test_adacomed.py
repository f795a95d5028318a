"""AdaCoMed: the paper's equations record by record in plain loops, privacy of rows, options."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any, Literal

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional

from client.site.model.fusion.adacomed import (
    AdaCoMed,
    build,
    contrastive_weight,
    mixed_probability,
)
from client.site.model.losses import row_loss
from client.site.training.clipping import PatientClipper
from client.site.training.layers import covered_modules
from common.errors import StudyError
from common.study import Federation, Model, Privacy, Site, Source, Study, Task
from common.systems.adacomed import PRESETS
from common.systems.adacomed import AdaCoMed as Options

torch.set_num_threads(1)

DIMS = {"xray": 5, "note": 4, "lab": 3, "age": 2}
TOKENS = {"xray": 1, "note": 3, "lab": 1, "age": 1}
GROUPS = [["xray"], ["note"], ["lab", "age"]]  # by default: image, text, structured
SMALL = {"width": 12, "heads": 2, "shared_width": 5, "prototypes": 3}
FORMS = ["adaptive", "large-only", "small-only", "logit-ensemble", "concatenation"]
WEIGHTINGS = ["learnable", "inverse", "gaussian", "threshold"]


def study(*, seed: int = 0, mode: Literal["local", "none"] = "local", **options: Any) -> Study:
    return Study(
        name="test",
        seed=seed,
        sources={
            "lab": Source(modality="series", encoder="series-statistics", series=("sodium",)),
            "xray": Source(modality="image", encoder="image-descriptor"),
            "note": Source(modality="text", encoder="hashed-text"),
            "age": Source(modality="table", encoder="demographics"),
        },
        tasks={"death": Task(prevalence=0.1), "stay": Task(prevalence=0.4)},
        model=Model(system="adacomed", adacomed=Options(**{**SMALL, **options})),
        privacy=Privacy(mode=mode),
        federation=Federation(sites={"a": Site(patients_declared=10)}),
    )


def make(s: Study, seed: int = 3) -> AdaCoMed:
    """In float64, with every parameter away from the initial point."""
    model = build(s, DIMS, None)
    assert isinstance(model, AdaCoMed)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=g))
    return model.double()


def batch(rows: int = 8, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """The first record is complete, the others miss sources and tokens at random; none has none."""
    g = torch.Generator().manual_seed(seed)
    inputs = {
        s: torch.randn(rows, TOKENS[s], d, generator=g, dtype=torch.float64)
        for s, d in DIMS.items()
    }
    present = {s: torch.rand(rows, TOKENS[s], generator=g) < 0.6 for s in DIMS}
    for mask in present.values():
        mask[0] = True
    present["age"] |= ~torch.cat([present[s] for s in ("xray", "note", "lab")], 1).any(1)[:, None]
    return inputs, present, torch.randint(-1, 2, (rows, 2), generator=g).to(torch.int8)


# -- the paper in plain Python: lists of floats, one record at a time -----------------------------


def linear(layer: Any, x: Sequence[float]) -> list[float]:
    weight, bias = layer.weight.tolist(), layer.bias.tolist()
    return [
        sum(w * v for w, v in zip(row, x, strict=True)) + b
        for row, b in zip(weight, bias, strict=True)
    ]


def network(module: Any, x: Sequence[float]) -> list[float]:
    if isinstance(module, nn.Linear):
        return linear(module, x)
    return linear(module[2], [max(0.0, v) for v in linear(module[0], x)])


def dot(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(u * v for u, v in zip(a, b, strict=True))


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    return dot(a, b) / math.sqrt(dot(a, a) * dot(b, b))


def softmax(scores: Sequence[float]) -> list[float]:
    return [math.exp(v) / sum(math.exp(u) for u in scores) for v in scores]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def tokens_of(networks: Any, groups: Any, inputs: Any, present: Any) -> dict[int, list[float]]:
    """Modality -> Proj_m(e_m), for the modalities that the record has."""
    tokens = {}
    for m, group in enumerate(groups):
        e: list[float] = []
        for source in group:
            seen = [x for x, here in zip(inputs[source], present[source], strict=True) if here]
            e += [sum(x[j] for x in seen) / max(1, len(seen)) for j in range(DIMS[source])]
        if any(any(present[source]) for source in group):
            tokens[m] = network(networks.networks[m], e)
    return tokens


def large_of(path: Any, inputs: Any, present: Any, groups: Any = GROUPS) -> list[float]:
    """Eqs. (1) and (2)."""
    tokens = tokens_of(path.networks, groups, inputs, present)
    a = path.attention
    size = len(tokens[min(tokens)]) // a.heads
    h: dict[int, list[float]] = {}
    for m, x in tokens.items():
        mixed: list[float] = []
        for i in range(a.heads):
            part = slice(i * size, (i + 1) * size)
            q = linear(a.query, x)[part]
            share = softmax(
                [dot(q, linear(a.key, y)[part]) / math.sqrt(size) for y in tokens.values()]
            )
            values = [linear(a.value, y)[part] for y in tokens.values()]
            mixed += [dot(share, [v[j] for v in values]) for j in range(size)]
        y = [u + v for u, v in zip(x, linear(a.out, mixed), strict=True)]
        mean = sum(y) / len(y)
        deviation = math.sqrt(sum((v - mean) ** 2 for v in y) / len(y) + a.norm.eps)
        scale, shift = a.norm.weight.tolist(), a.norm.bias.tolist()
        h[m] = [(v - mean) / deviation * s + b for v, s, b in zip(y, scale, shift, strict=True)]
    every = [m for n in range(len(groups)) for m in combinations(range(len(groups)), n + 1)]
    zeros = [0.0] * len(h[min(h)])
    scores = linear(path.router, [v for m in range(len(groups)) for v in h.get(m, zeros)])
    usable = [i for i, chosen in enumerate(every) if all(m in h for m in chosen)]
    share = softmax([scores[i] for i in usable])
    said = [network(path.experts[i], [v for m in every[i] for v in h[m]]) for i in usable]
    return [dot(share, [x[j] for x in said]) for j in range(len(said[0]))]


def small_of(path: Any, inputs: Any, present: Any) -> list[float]:
    tokens = tokens_of(path.networks, GROUPS, inputs, present)
    zeros = [0.0] * len(tokens[min(tokens)])
    return network(path.fusion, [v for m in range(len(GROUPS)) for v in tokens.get(m, zeros)])


def similarity_of(large: list[float], small: list[float], others: Any, tau: float) -> float:
    """Eq. (4): the current sample is one of the k."""
    own = math.exp(cosine(large, small) / tau)
    return own / (own + sum(math.exp(cosine(large, other) / tau) for other in others))


def weights_of(o: Options, s: float, theta: Sequence[float] = ()) -> tuple[float, float]:
    """Table 1; for `inverse` with Listing 2 as printed."""
    if o.weighting == "learnable":
        large, small = softmax(theta)
    elif o.weighting == "gaussian":
        small = math.exp(-(s**2) / (2 * o.gaussian_sigma**2))
        large = 1 - small
    elif o.weighting == "threshold":
        large = 0.5 + 0.5 * math.tanh(o.threshold_slope * (s - o.threshold))
        small = 0.5 - 0.5 * math.tanh(o.threshold_slope * (s - o.threshold))
    else:
        large = 1 / (1 + math.exp(-s))
        inverse = 1 / (o.inverse_alpha * s / o.inverse_temperature + 1e-6)
        small = inverse if o.inverse_form == "table" else inverse / (inverse + 1)
        large, small = large / (large + small), small / (large + small)
    return large, small


def negatives_of(model: AdaCoMed) -> list[list[float]]:
    """Before they are of unit length; the small model reads image, text, then structured."""
    rows = model.public_ND.tolist()
    if model.options.negatives == "vectors":
        return rows
    found = []
    for row in rows:
        parts, at = {}, 0
        for source in (source for group in GROUPS for source in group):
            parts[source] = [row[at : at + DIMS[source]]]
            at += DIMS[source]
        e = small_of(model.pathways["small"], parts, {key: [True] for key in DIMS})
        found.append(network(model.projection, e))
    return found


def records(inputs: Any, present: Any, rows: int) -> Any:
    for row in range(rows):
        yield (
            row,
            {s: x[row].tolist() for s, x in inputs.items()},
            {s: m[row].tolist() for s, m in present.items()},
        )


# -- equations ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        *({"weighting": w, "mixture": x} for w in WEIGHTINGS for x in ("logits", "probabilities")),
        {"weighting": "inverse", "inverse_form": "table", "projection_layers": 1},
        {"weighting": "gaussian", "negatives": "vectors"},
    ],
    ids=lambda o: "-".join(str(v) for v in o.values()),
)
def test_every_equation_record_by_record(options: dict[str, Any]) -> None:
    """Eqs. (1) to (8) and the rows of Table 1, with absent modalities and experts left out."""
    tuned = {"temperature": 0.8, "inverse_alpha": 0.7, "inverse_temperature": 0.6, "threshold": 0.2}
    s = study(**options, **tuned, contrast_weight=0.3, gaussian_sigma=0.4)
    o = s.model.adacomed
    assert o is not None
    model = make(s)
    inputs, present, labels = batch()
    both, said = model.collaborate(inputs, present), model(inputs, present)
    total = row_loss(s)(model, inputs, present, labels)
    others = negatives_of(model)
    theta = model.theta.weight[0].tolist() if o.weighting == "learnable" else ()
    for row, x, here in records(inputs, present, 8):
        e_large = large_of(model.pathways["large"], x, here)
        e_small = small_of(model.pathways["small"], x, here)
        z = [network(model.projection, e) for e in (e_large, e_small)]  # (3)
        s_row = similarity_of(z[0], z[1], others, 0.8)  # (4)
        y = [linear(model.head, v) for v in z]  # (6)
        w = weights_of(o, s_row, theta)
        assert both.y_BPK[row].tolist() == [pytest.approx(v, abs=1e-10) for v in y]
        assert both.log_s_B[row].exp().item() == pytest.approx(s_row, rel=1e-9)
        assert both.w_BP[row].tolist() == pytest.approx(w, rel=1e-9, abs=1e-12)
        task_loss = 0.0
        for k, prevalence in enumerate((0.1, 0.4)):  # (7)
            if o.mixture == "logits":
                p = sigmoid(w[0] * y[0][k] + w[1] * y[1][k])
            else:
                p = w[0] * sigmoid(y[0][k]) + w[1] * sigmoid(y[1][k])
            assert torch.sigmoid(said.logits_BK[row, k]).item() == pytest.approx(p, rel=1e-9)
            label = int(labels[row, k])
            if label >= 0:
                chance, share = (p, prevalence) if label else (1 - p, 1 - prevalence)
                task_loss -= math.log(chance) / (2 * 2 * share)
        contrast = -math.log(s_row)  # (5)
        assert said.auxiliary_B[row].item() == pytest.approx(0.3 * contrast, rel=1e-9)
        assert total[row].item() == pytest.approx(task_loss + 0.3 * contrast, rel=1e-6)  # (8)


def test_three_modalities_have_seven_experts_of_their_own_tokens() -> None:
    large = make(study()).pathways["large"]
    assert large.sets == [[0], [1], [2], [0, 1], [0, 2], [1, 2], [0, 1, 2]]
    assert [e[0].in_features for e in large.experts] == [4, 4, 4, 8, 8, 8, 12]
    assert {e[2].out_features for e in large.experts} == {12}


@pytest.mark.parametrize("form", ["listing", "table"])
@pytest.mark.parametrize("weighting", ["inverse", "gaussian", "threshold"])
def test_weights_are_those_of_the_paper_and_have_gradients_everywhere(
    weighting: str, form: str
) -> None:
    for preset in PRESETS:
        o = Options(preset=preset, weighting=weighting, inverse_form=form)
        for value in (0.0, 1e-9, 0.05, 0.3, 0.57, 0.94, 1.0):
            s = torch.tensor([value], dtype=torch.float64, requires_grad=True)
            large = contrastive_weight(o, s)
            w_large, w_small = weights_of(o, value)
            assert large.item() == pytest.approx(w_large, rel=1e-9, abs=1e-12)
            assert 1 - large.item() == pytest.approx(w_small, rel=1e-9, abs=1e-9)
            (slope,) = torch.autograd.grad(large.sum(), s)
            assert abs(slope.item()) < 100


def test_mixed_probability_survives_saturation() -> None:
    y = torch.tensor([[[200.0], [-200.0]], [[3.0], [-1.0]]], requires_grad=True)
    w = torch.tensor([[0.25, 0.75], [1.0, 0.0]], requires_grad=True)
    logits = mixed_probability(y, w)
    torch.testing.assert_close(logits[:, 0], torch.tensor([math.log(0.25 / 0.75), 3.0]))
    gradients = torch.autograd.grad(logits.sum(), (y, w))
    assert all(torch.isfinite(g).all() for g in gradients)


def test_baselines() -> None:
    inputs, present, _ = batch()
    models = {form: make(study(form=form)) for form in FORMS}
    for row, x, here in records(inputs, present, 8):
        said = {form: m(inputs, present).logits_BK[row].tolist() for form, m in models.items()}
        for form, path, e_of in (
            ("large-only", "large", large_of),
            ("small-only", "small", small_of),
        ):
            m = models[form]
            y = linear(m.head, network(m.projection, e_of(m.pathways[path], x, here)))
            assert said[form] == pytest.approx(y)
        m = models["logit-ensemble"]
        both = [large_of(m.pathways["large"], x, here), small_of(m.pathways["small"], x, here)]
        y0, y1 = (linear(m.head, network(m.projection, e)) for e in both)
        assert said["logit-ensemble"] == pytest.approx(
            [(a + b) / 2 for a, b in zip(y0, y1, strict=True)]
        )
        m = models["concatenation"]
        tokens = tokens_of(m.pathways["large"].networks, GROUPS, x, here)
        joined = [v for i in range(3) for v in tokens.get(i, [0.0] * 4)]
        assert said["concatenation"] == pytest.approx(linear(m.head, network(m.projection, joined)))
    assert all(models[f](inputs, present).auxiliary_B is None for f in FORMS[1:])


# -- rows, absence --------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_a_record_does_not_see_its_neighbours(form: str) -> None:
    s = study(form=form)
    model = make(s)
    inputs, present, labels = batch()
    before, loss = model(inputs, present), row_loss(s)(model, inputs, present, labels)
    for name in DIMS:
        inputs[name][1:] *= -7
        present[name][1:] = ~present[name][1:]
    after, loss_after = model(inputs, present), row_loss(s)(model, inputs, present, labels)
    assert torch.equal(before.logits_BK[0], after.logits_BK[0])
    assert torch.equal(loss[0], loss_after[0])
    assert not torch.equal(loss[1:], loss_after[1:])
    if form == "adaptive":
        assert torch.equal(before.auxiliary_B[0], after.auxiliary_B[0])
        assert not torch.equal(before.auxiliary_B[1:], after.auxiliary_B[1:])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("absent", ["note", "age"])  # a modality of its own; part of one
def test_absent_source_gives_no_gradient_and_no_value(form: str, absent: str) -> None:
    s = study(form=form)
    model = make(s)
    inputs, present, labels = batch()
    present["lab"][:], present[absent][:] = True, False
    loss = row_loss(s)(model, inputs, present, labels)
    loss.sum().backward()
    modality = next(m for m, group in enumerate(GROUPS) if absent in group)
    for pathway in model.pathways.values():
        gradient = pathway.networks.networks[modality][0].weight.grad
        columns = slice(None) if absent == "note" else slice(3, 5)
        assert gradient[:, columns].abs().max() == 0
        assert pathway.networks.networks[2][0].weight.grad[:, :3].abs().max() > 0
    if absent == "note" and "large" in model.pathways and form != "concatenation":
        for chosen, expert in zip(
            model.pathways["large"].sets, model.pathways["large"].experts, strict=True
        ):
            assert (expert[0].weight.grad.abs().max() == 0) == (1 in chosen)
    inputs[absent][:] = float("nan")
    assert torch.equal(loss, row_loss(s)(model, inputs, present, labels))


@pytest.mark.parametrize("form", FORMS)
def test_one_source_or_none(form: str) -> None:
    """No NaN in either direction, in float32 too; nothing is left to align without any source."""
    s = study(form=form)
    inputs, present, labels = batch(5)
    labels[:] = 1
    for row, name in enumerate(DIMS):
        for source, mask in present.items():
            mask[row] = source == name
            mask[4] = False
    for model in (make(s), make(s).float()):
        kind = next(model.parameters()).dtype
        x = {k: v.to(kind) for k, v in inputs.items()}
        said = model(x, present)
        assert torch.isfinite(said.logits_BK).all()
        assert len({tuple(row) for row in said.logits_BK.tolist()}) == 5
        row_loss(s)(model, x, present, labels).sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())
        if said.auxiliary_B is not None:
            assert said.auxiliary_B[4] == 0
            assert (said.auxiliary_B[:4] > 0).all()


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_untrained_it_tells_records_apart_and_says_nothing_of_an_empty_one(weighting: str) -> None:
    s = study(weighting=weighting, width=48, shared_width=64, prototypes=63)
    model = build(s, DIMS, None)
    inputs, present, labels = batch(100)
    for mask in present.values():
        mask[99] = False
    x = {k: v.float() for k, v in inputs.items()}
    assert model(x, present).logits_BK[99].tolist() == [0.0, 0.0]
    row_loss(s)(model, x, present, labels).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    similarity = model.collaborate(x, present).log_s_B[:99].exp()
    assert similarity.median() < 0.5  # Figure 6 starts low
    assert similarity.log().std() > 0.3


@pytest.mark.parametrize("form", ["adaptive", "logit-ensemble"])
def test_a_pathway_that_saw_nothing_dilutes_nothing(form: str) -> None:
    """Large on the X-ray, small on the rest: who lacks the one is judged by the other alone."""
    modalities = {"image": ("xray",)}
    small = {"text": ("note",), "rest": ("age", "lab")}
    s = study(form=form, modalities=modalities, small_modalities=small)
    model = make(s)
    inputs, present, _ = batch(3)
    for source in DIMS:
        present[source][0] = source != "xray"
        present[source][1] = source == "xray"
        present[source][2] = True
    _, y_BPK, here_BP = model.represent(inputs, present)
    assert here_BP.tolist() == [[False, True], [True, False], [True, True]]
    said = model(inputs, present)
    assert torch.equal(said.logits_BK[0], y_BPK[0, 1])
    assert torch.equal(said.logits_BK[1], y_BPK[1, 0])
    assert not torch.equal(said.logits_BK[2], y_BPK[2, 0])
    if said.auxiliary_B is not None:
        assert (said.auxiliary_B > 0).tolist() == [False, False, True]
    x, here = ({k: v[1].tolist() for k, v in group.items()} for group in (inputs, present))
    e_large = large_of(model.pathways["large"], x, here, groups=[["xray"]])
    assert y_BPK[1, 0].tolist() == pytest.approx(
        linear(model.head, network(model.projection, e_large))
    )


# -- the batch's other records, without privacy ----------------------------------------------------


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_in_training_the_negatives_are_the_others_whom_both_pathways_read(weighting: str) -> None:
    """Eq. (4) as printed, in plain loops; the second record lacks the large pathway's source."""
    groups = {"modalities": {"image": ("xray",)}, "small_modalities": {"all": tuple(DIMS)}}
    s = study(negatives="batch", weighting=weighting, mode="none", **groups)
    model = make(s)
    inputs, present, _ = batch(6)
    present["xray"][:] = True
    present["xray"][1] = False
    z_BPd, y_BPK, here_BP = model.represent(inputs, present)
    assert here_BP.all(dim=1).tolist() == [True, False, True, True, True, True]
    goal, o = model.objective(inputs, present), s.model.adacomed
    theta = model.theta.weight[0].tolist() if weighting == "learnable" else ()
    for row in (0, 2, 3, 4, 5):
        others = [z_BPd[k, 1].tolist() for k in (0, 2, 3, 4, 5) if k != row]
        large, small = z_BPd[row].tolist()
        similarity = similarity_of(large, small, others, o.temperature)
        w_large, w_small = weights_of(o, similarity, theta)
        expected = [w_large * a + w_small * b for a, b in zip(*y_BPK[row].tolist(), strict=True)]
        assert goal.logits_BVK[row, 0].tolist() == pytest.approx(expected)
        contrast = -o.contrast_weight * math.log(similarity)
        assert goal.auxiliary_B[row].item() == pytest.approx(contrast)
    assert goal.auxiliary_B[1] == 0
    assert torch.equal(goal.logits_BVK[1, 0], y_BPK[1, 1])


def test_the_batch_is_mixed_in_training_and_not_in_prediction() -> None:
    model, alike = make(study(negatives="batch", mode="none")), make(study())
    inputs, present, _ = batch()
    for mask in present.values():
        mask[:] = True
    trained, said = model.objective(inputs, present), model(inputs, present)
    expected = alike(inputs, present)
    assert torch.equal(said.logits_BK, expected.logits_BK)  # against public records, as by default
    assert torch.equal(said.auxiliary_B, expected.auxiliary_B)
    for name in DIMS:
        inputs[name][1:] *= -7
    moved, said_again = model.objective(inputs, present), model(inputs, present)
    assert torch.equal(said.logits_BK[0], said_again.logits_BK[0])
    assert not torch.allclose(trained.logits_BVK[0], moved.logits_BVK[0])
    assert not torch.allclose(trained.auxiliary_B[0], moved.auxiliary_B[0])
    gradient = torch.autograd.grad(moved.auxiliary_B[0], model.head.weight, allow_unused=True)[0]
    assert gradient is None or gradient.abs().max() == 0  # the contrast is p's, not f's


def test_a_record_alone_in_its_pass_contrasts_with_nobody() -> None:
    model = make(study(negatives="batch", mode="none"))
    inputs, present, _ = batch(1)
    goal = model.objective(inputs, present)
    assert goal.auxiliary_B.tolist() == [0.0]
    goal.logits_BVK.sum().backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


def test_under_privacy_the_batch_is_refused_with_the_rule_and_the_cure() -> None:
    with pytest.raises(
        ValidationError,
        match=r"model.adacomed: negatives = 'batch' puts every patient into the gradients of all "
        r"others.*set negatives = 'records', or privacy.mode = 'none'",
    ):
        study(negatives="batch")
    free = study(negatives="batch", mode="none")
    assert Study.from_toml(free.to_toml()) == free
    raw = free.model_dump(mode="json")
    raw["privacy"]["mode"] = "local"  # what a coordinator might send to a site
    with pytest.raises(ValidationError, match="negatives = 'batch'"):
        Study.model_validate(raw)


# -- privacy --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        *({"form": form} for form in FORMS),
        {"weighting": "learnable", "mixture": "probabilities"},
        {"weighting": "inverse", "freeze_small": True},
        {"weighting": "threshold", "projection_layers": 1, "negatives": "vectors"},
    ],
    ids=lambda o: "-".join(str(v) for v in o.values()),
)
def test_clipped_sum_equals_brute_force_per_patient(options: dict[str, Any]) -> None:
    s = study(**options)
    model = make(s)
    assert len(covered_modules(model)) > 0
    trainable = [p for p in model.parameters() if p.requires_grad]
    inputs, present, labels = batch(12)  # 6 patients with two records each
    loss = row_loss(s)
    alone = []
    for patient in range(6):
        of = slice(2 * patient, 2 * patient + 2)
        value = loss(
            model,
            {n: x[of] for n, x in inputs.items()},
            {n: m[of] for n, m in present.items()},
            labels[of],
        ).mean()
        parts = torch.autograd.grad(value, trainable, materialize_grads=True)
        alone.append(torch.cat([g.flatten() for g in parts]))
    norms = torch.stack([g.norm() for g in alone])
    bound = norms.median().item()  # clips some and not others
    expected = sum(g * min(1.0, bound / g.norm().item()) for g in alone)
    clipper = PatientClipper(model, bound, rows_per_patient=2)
    clipper.begin()
    with clipper.capture():
        total = (loss(model, inputs, present, labels) * 0.5).sum()
    clipper.add(total, torch.ones(6, dtype=torch.bool))
    assert len(clipper.sums) == len(trainable)
    actual = torch.cat([clipper.sums[p].flatten() for p in trainable])
    torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-9)
    clipper.close()


def test_similarity_keeps_telling_records_apart_against_public_records() -> None:
    """Fixed vectors are all as far as they can be within a few steps: weights become a constant."""
    spread = {}
    for kind in ("records", "vectors"):
        s = study(negatives=kind, width=48, shared_width=64, prototypes=63)
        model = build(s, DIMS, None)
        inputs, present, labels = batch(300, seed=4)
        x = {name: value.float() for name, value in inputs.items()}
        labels[:, 0], labels[:, 1] = (x["lab"][:, 0, 0] > 0).to(torch.int8), -1
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(50):
            optimizer.zero_grad()
            row_loss(s)(model, x, present, labels).mean().backward()
            optimizer.step()
        with torch.no_grad():
            spread[kind] = model.collaborate(x, present).log_s_B.exp().std().item()
    assert spread["records"] > 0.1 > 0.01 > spread["vectors"], spread


@pytest.mark.parametrize("form", FORMS)
def test_autocast_leaves_logits_and_similarity_in_float32(form: str) -> None:
    model = make(study(form=form)).float()
    inputs, present, _ = batch()
    x = {name: value.float() for name, value in inputs.items()}
    exact = model(x, present)
    with torch.autocast("cpu", torch.bfloat16):
        said = model(x, present)
    assert said.logits_BK.dtype == torch.float32
    torch.testing.assert_close(said.logits_BK, exact.logits_BK, atol=0.2, rtol=0.05)
    if said.auxiliary_B is not None:
        assert said.auxiliary_B.dtype == torch.float32
        torch.testing.assert_close(said.auxiliary_B, exact.auxiliary_B, atol=0.2, rtol=0.05)


def test_frozen_small_model_trains_neither_its_networks_nor_less_of_the_rest() -> None:
    frozen, free = make(study(freeze_small=True)), make(study())
    trained = {n for n, p in frozen.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in free.named_parameters() if not n.startswith("pathways.small.")}
    assert {n.split(".")[0] for n in trained} == {"pathways", "projection", "head"}


# -- seed, options, learning ----------------------------------------------------------------------


def test_same_seed_same_model_other_seed_other_model() -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    first = build(study(weighting="learnable"), DIMS, None)
    assert torch.equal(torch.rand(3), expected)  # the caller's random state is left alone
    second = build(study(weighting="learnable"), DIMS, None)
    other = build(study(weighting="learnable", seed=5), DIMS, None)
    a, b, c = (dict(m.named_parameters()) for m in (first, second, other))
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert not torch.equal(a["head.weight"], c["head.weight"])
    assert torch.equal(first.negatives(), second.negatives())
    assert not torch.equal(first.public_ND, other.public_ND)
    torch.testing.assert_close(first.negatives().norm(dim=1), torch.ones(3))
    assert first.theta.weight.tolist() == [[0.0, 0.0]]  # both pathways weigh the same
    assert (first.slm, first.designated, first.dims) == (None, [], DIMS)


def test_a_small_model_of_its_own_study_fits_into_the_whole() -> None:
    """Its networks, p and f: the start that the paper gives the small pathway and the head."""
    alone = build(study(form="small-only", seed=9), DIMS, None)
    whole = build(study(weighting="gaussian"), DIMS, None)
    left = whole.load_state_dict(alone.state_dict(), strict=False)
    assert not left.unexpected_keys
    assert {name.split(".")[1] for name in left.missing_keys} == {"large"}
    inputs, present, _ = batch()
    x = {k: v.float() for k, v in inputs.items()}
    torch.testing.assert_close(
        whole.collaborate(x, present).y_BPK[:, 1], alone(x, present).logits_BK
    )


TABLE_2 = (
    "weighting",  # of tables 2 and 4
    "contrast_weight",
    "shared_width",
    "inverse_temperature",
    "inverse_alpha",
    "gaussian_sigma",
    "threshold",
    "threshold_slope",
)


@pytest.mark.parametrize(
    ("preset", "row"),
    [
        ("mortality", ("inverse", 0.59, 2048, 0.59, 0.71, 0.84, 0.57, 9.80)),
        ("long-stay", ("gaussian", 0.50, 256, 0.50, 1.00, 1.00, 0.60, 10.00)),
        ("readmission", ("gaussian", 0.67, 2048, 0.78, 0.41, 0.66, 0.94, 19.76)),
        ("vital-12", ("threshold", 0.50, 128, 0.07, 1.00, 0.10, 0.15, 10.00)),
    ],
)
def test_presets_are_the_supplements_table_2(preset: str, row: tuple[Any, ...]) -> None:
    o = Options(preset=preset)
    assert tuple(getattr(o, key) for key in TABLE_2) == row


def test_defaults_are_the_texts_and_listing_2s() -> None:
    o = Options()
    assert (o.contrast_weight, o.temperature, o.inverse_temperature) == (0.5, 0.07, 1.0)
    assert (o.inverse_alpha, o.gaussian_sigma, o.threshold, o.threshold_slope) == (1, 1, 0.5, 10)
    assert (o.weighting, o.shared_width, o.prototypes) == ("gaussian", 128, 63)


def test_a_preset_is_what_it_stands_for_and_yields_to_what_is_written() -> None:
    s = study(preset="mortality", shared_width=64)
    assert s.model.adacomed == Options(**{**SMALL, **PRESETS["mortality"], "shared_width": 64})
    assert "preset" not in s.to_toml()
    assert Study.from_toml(s.to_toml()).hash == s.hash
    spelt = study(**{**PRESETS["mortality"], "shared_width": 64})
    assert spelt.hash == s.hash
    late = s.to_toml().replace('form = "adaptive"', 'form = "adaptive"\npreset = "readmission"')
    with pytest.raises(StudyError, match="every key that 'readmission' would set is written"):
        Study.from_toml(late)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 20, "heads": 4}, r"width // 3 = 6 does not divide into 4 heads.*'width' = 12"),
        ({"modalities": {"a": ["x", "y"], "b": ["y"]}}, "'modalities' names source 'y' twice"),
        ({"small_modalities": {"a": ["x", "x"]}}, "'small_modalities' names source 'x' twice"),
        ({"modalities": {"a": []}}, "at least 1 item"),
        ({"modalities": {str(m): ["x"] for m in "abcdefg"}}, "at most 6 items"),
        ({"preset": "sepsis"}, "'mortality', 'long-stay', 'readmission' or 'vital-12'"),
        ({"temperature": 0}, "greater than or equal to 0.001"),
        ({"weights": "gaussian"}, "Extra inputs"),
    ],
)
def test_impossible_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Options(**options)


def test_modalities_name_the_studys_sources() -> None:
    with pytest.raises(StudyError, match=r"unknown source 'xrays'; did you mean 'xray'"):
        build(study(modalities={"image": ("xrays",)}), DIMS, None)
    with pytest.raises(StudyError, match=r"unknown source 'xrays'; did you mean 'xray'"):
        build(study(form="large-only", small_modalities={"image": ("xrays",)}), DIMS, None)


@pytest.mark.parametrize(
    ("form", "modalities", "small_modalities", "cure"),
    [
        ("adaptive", ["xray"], ["xray"], "'modalities' or 'small_modalities',"),
        ("logit-ensemble", ["xray"], ["xray"], "'modalities' or 'small_modalities',"),
        ("large-only", ["xray"], [*DIMS], "'modalities',"),
        ("concatenation", ["xray"], [*DIMS], "'modalities',"),
        ("small-only", [*DIMS], ["xray"], "'small_modalities',"),
    ],
)
def test_a_source_that_no_pathway_of_the_form_reads_is_told(
    form: str, modalities: list[str], small_modalities: list[str], cure: str
) -> None:
    named = {"modalities": {"a": modalities}, "small_modalities": {"a": small_modalities}}
    with pytest.raises(StudyError, match=rf"source 'lab' is in no modality[\s\S]*add it to {cure}"):
        build(study(form=form, **named), DIMS, None)
    if form in ("adaptive", "logit-ensemble"):  # one pathway is enough
        named["small_modalities"]["a"] = [*DIMS]
        assert len(build(study(form=form, **named), DIMS, None).pathways) == 2


@pytest.mark.parametrize("form", FORMS)
def test_learns_a_rule_across_modalities(form: str) -> None:
    """y = [X-ray and laboratory value sum to more than 0]: AUROC of one modality alone is .83."""
    # At this rate the five ReLUs of the other tests' p can all die.
    s = study(form=form, width=24, shared_width=32)
    model = build(s, DIMS, None)
    inputs, present, labels = batch(1000, seed=4)
    x = {name: value.float() for name, value in inputs.items()}
    for name in ("xray", "lab"):
        present[name][:] = True
    rule = x["xray"][:, 0, 0] + x["lab"][:, 0, 0] > 0
    labels[:, 0], labels[:, 1] = rule.to(torch.int8), -1
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    loss, history = row_loss(s), []
    train = slice(0, 600)
    part = ({k: v[train] for k, v in x.items()}, {k: v[train] for k, v in present.items()})
    for _ in range(60):
        optimizer.zero_grad()
        mean = loss(model, *part, labels[train]).mean()
        mean.backward()
        optimizer.step()
        history.append(mean.item())
    assert history[-1] < 0.6 * history[0]
    with torch.no_grad():
        scores = model(x, present).logits_BK[600:, 0]
    yes, no = scores[rule[600:]], scores[~rule[600:]]
    assert (yes[:, None] > no[None]).float().mean() > 0.9


def test_the_contrast_moves_no_key() -> None:
    """Public keys are constants and move with the small model: so is the record's own."""
    inputs, present, _ = batch()
    for kind, constant in (("records", True), ("vectors", False)):
        model = make(study(negatives=kind))
        model(inputs, present).auxiliary_B.sum().backward()
        small = [p.grad for p in model.pathways["small"].parameters()]
        large = model.pathways["large"].router.weight.grad
        assert all(g is None or g.abs().max() == 0 for g in small) == constant
        assert large.abs().max() > 0


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_learns_from_what_encoders_give(weighting: str) -> None:
    """Wide embeddings of length 1 that are much alike, the paper's optimiser, a hundred steps.

    With the own key in the gradient, or from torch's initial weights, the contrast stays at chance
    (.5 log 64 = 2.08) and the logits with it."""
    dims = {"xray": 512, "note": 512, "lab": 444, "age": 5}
    g = torch.Generator().manual_seed(1)
    rule = torch.rand(800, generator=g) < 0.5
    x = {}
    for name, d in dims.items():
        centre, direction = torch.randn(2, 1, 1, d, generator=g)
        moved = centre + 0.3 * torch.randn(800, 1, d, generator=g)
        moved += 0.05 * direction * (2.0 * rule[:, None, None] - 1) * (name in ("xray", "lab"))
        x[name] = functional.normalize(moved, dim=-1)
    present = {name: torch.ones(800, 1, dtype=torch.bool) for name in dims}
    labels = torch.stack([rule.to(torch.int8), torch.full((800,), -1, dtype=torch.int8)], dim=1)
    s = study(weighting=weighting, width=192, heads=8, shared_width=128, prototypes=63)
    model = build(s, dims, None)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for step in range(100):
        some = torch.arange(64) + 64 * (step % 6)
        optimizer.zero_grad()
        row_loss(s)(
            model,
            {k: v[some] for k, v in x.items()},
            {k: v[some] for k, v in present.items()},
            labels[some],
        ).mean().backward()
        optimizer.step()
    with torch.no_grad():
        said = model({k: v[400:] for k, v in x.items()}, {k: v[400:] for k, v in present.items()})
    yes, no = said.logits_BK[rule[400:], 0], said.logits_BK[~rule[400:], 0]
    auroc = (yes[:, None] > no[None]).float().mean()
    assert said.auxiliary_B.mean() < 1.0
    assert auroc > 0.9
