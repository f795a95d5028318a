"""M-LLM: its equations against loops, absence, independence of records, clipping, explanations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from client.site.model.fusion.m_llm import QUIET, MLlmModel, build, unfaithfulness
from client.site.model.losses import row_loss
from client.site.training.clipping import PatientClipper
from client.site.training.layers import covered_modules
from common.errors import StudyError
from common.study import Model, Source, Study, Task
from common.systems.m_llm import MLlm

torch.set_num_threads(1)

DIMS = {"lab": 7, "note": 10, "xray": 9, "chart": 5}  # structured sources do not stand together
TOKENS = {"lab": 1, "note": 3, "xray": 4, "chart": 2}
STREAM = {"lab": "structured", "note": "text", "xray": "image", "chart": "structured"}
SMALL = {"width": 8, "heads": 2, "dense_width": 6, "feedforward_width": 5, "prototypes": 4}
SOURCES = {
    "lab": Source(modality="series", encoder="series-statistics", series=("sodium",)),
    "note": Source(modality="text", encoder="hashed-text"),
    "xray": Source(modality="image", encoder="image-descriptor"),
    "chart": Source(modality="series", encoder="series-statistics", series=("heart_rate",)),
}


def study(*, sources: Mapping[str, Source] = SOURCES, seed: int = 0, **options: Any) -> Study:
    return Study(
        name="test",
        seed=seed,
        sources=dict(sources),
        tasks={"death": Task(prevalence=0.1), "stay": Task(prevalence=0.4)},
        model=Model(system="m-llm", m_llm=MLlm(**(SMALL | options))),
    )


def made(s: Study, *, trained: bool = True) -> MLlmModel:
    """In float64; away from the initial point, where the head is 0."""
    model = build(s, {name: DIMS[name] for name in s.sources}, None)
    if trained:
        g = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.5 * torch.randn(p.shape, generator=g))
    return model.double()


def batch(rows: int = 8) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Record 0 has everything, 1 nothing, 2 to 5 one source each, 6 one patch; others anything."""
    g = torch.Generator().manual_seed(0)
    inputs = {s: torch.randn(rows, TOKENS[s], d, generator=g).double() for s, d in DIMS.items()}
    present = {s: torch.rand(rows, TOKENS[s], generator=g) < 0.6 for s in DIMS}
    for index, mask in enumerate(present.values()):
        mask[0] = True
        mask[1:6] = False
        mask[2 + index] = True
        mask[6] = True
    present["xray"][6, 1:] = False
    labels = torch.randint(0, 2, (rows, 2), generator=g)
    return inputs, present, labels.to(torch.int8)


# -- the equations, by loops over what is there -----------------------------------------------


def softmax(scores: list[Tensor]) -> list[Tensor]:
    total = sum(s.exp() for s in scores)
    return [s.exp() / total for s in scores]


def norm(x: Tensor, layer: nn.LayerNorm) -> Tensor:
    spread = ((x - x.mean()) ** 2).mean()
    return layer.weight * (x - x.mean()) / torch.sqrt(spread + layer.eps) + layer.bias


def mlp(x: Tensor, first: nn.Linear, second: nn.Linear) -> Tensor:
    h = first.weight @ x + first.bias
    h = h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))
    return second.weight @ h + second.bias


def cosine(u: Tensor, v: Tensor) -> Tensor:
    return (u * v).sum() / (u * u).sum().sqrt() / (v * v).sum().sqrt()


class Told:
    """One record through equations (1) to (7), absent tokens cut out; for SMALL and STREAM."""

    def __init__(self, model: MLlmModel, e: dict[str, Tensor], there: dict[str, Tensor]) -> None:
        heads, E = 2, 4
        part = [slice(h * E, (h + 1) * E) for h in range(heads)]
        x: dict[str, list[Tensor]] = {"structured": [], "text": [], "image": []}  # (1)
        for name, encoder in model.encoders.items():
            for t in range(TOKENS[name]):
                if not there[name][t]:
                    continue
                if STREAM[name] == "structured":
                    y = norm(mlp(e[name][t], encoder[0], encoder[2]), encoder[3])
                else:
                    y = norm(encoder[0].weight @ e[name][t] + encoder[0].bias, encoder[1])
                x[STREAM[name]].append(y)
        c = model.catm
        assert c is not None
        others = [m for m in ("image", "structured") if x[m]]
        self.catm: dict[str, list[list[list[Tensor]]]] = {m: [] for m in others}  # [q][h][t]
        fused = []
        for q in x["text"]:
            moved = torch.zeros(8, dtype=torch.float64)
            for m in others:
                a = []
                for h in range(heads):
                    asks = (c.query.weight @ q)[part[h]]
                    scores = [asks @ (c.key.weight @ t)[part[h]] / math.sqrt(E) for t in x[m]]
                    a.append(softmax(scores))  # (2)
                    for weight, t in zip(a[h], x[m], strict=True):
                        moved[part[h]] += weight * (c.value.weight @ t)[part[h]] / len(others)
                self.catm[m].append(a)
            y = norm(q + c.out.weight @ moved, c.after_attention)  # (3)
            first, second = c.feedforward[0], c.feedforward[2]
            fused.append(norm(y + mlp(y, first, second), c.after_feedforward))
        r, final = model.readout, {**x, "text": fused}
        streams = [m for m in final if final[m]]
        self.readout: dict[str, list[list[Tensor]]] = {}  # [h][t]
        self.added: dict[str, list[Tensor]] = {}
        self.logits = model.intercept.weight[0].clone()
        for m in streams:
            self.readout[m] = []
            for h in range(heads):
                scores = [
                    r.query.weight[0, part[h]] @ (r.key.weight @ t)[part[h]] / math.sqrt(E)
                    for t in final[m]
                ]
                self.readout[m].append(softmax(scores))
            self.added[m] = []
            for i, t in enumerate(final[m]):
                v = r.value.weight @ t
                pieces = [self.readout[m][h][i] * v[part[h]] for h in range(heads)]  # (4)
                self.added[m].append(model.head.weight @ torch.cat(pieces) / len(streams))
                self.logits += self.added[m][-1]  # (5)

        tau, losses = model.options.temperature, []  # (6)
        z = {m: sum(x[m]) / len(x[m]) for m in x if x[m]}
        for m in z:
            for n in z:
                if m != n:
                    own = (cosine(z[m], z[n]) / tau).exp()
                    other = sum((cosine(z[m], p) / tau).exp() for p in model.negatives_PD)
                    losses.append(-torch.log(own / (own + other)))
        self.alignment = sum(losses) / max(1, len(losses))

        losses = []  # (7)
        for m in streams:
            if len(final[m]) > 1:
                w = [sum(self.readout[m][h][i] for h in range(2)) / 2 for i in range(len(x[m]))]
                did = [(a * a).sum().sqrt() for a in self.added[m]]
                did = [d + QUIET * wt for d, wt in zip(did, w, strict=True)]
                losses.append(1 - cosine(torch.stack(w), torch.stack(did)))
        for m in others:
            if len(x[m]) > 1 and fused:
                w, did = [], []
                for i, t in enumerate(x[m]):
                    mean = [sum(a[h][i] for a in self.catm[m]) / len(fused) for h in range(2)]
                    v = c.value.weight @ t
                    carried = c.out.weight @ torch.cat([mean[h] * v[part[h]] for h in range(2)])
                    w.append(sum(mean) / 2)
                    did.append((carried * carried).sum().sqrt() + QUIET * w[-1])
                losses.append(1 - cosine(torch.stack(w), torch.stack(did)))
        self.explainability = sum(losses) / max(1, len(losses))


def told(model: MLlmModel, inputs: dict[str, Tensor], present: dict[str, Tensor]) -> list[Told]:
    with torch.no_grad():
        return [
            Told(model, {s: x[b] for s, x in inputs.items()}, {s: m[b] for s, m in present.items()})
            for b in range(len(inputs["lab"]))
        ]


def test_logits_follow_equations_1_to_5() -> None:
    model = made(study())
    inputs, present, _ = batch()
    expected = torch.stack([one.logits for one in told(model, inputs, present)])
    torch.testing.assert_close(model(inputs, present).logits_BK, expected)
    assert expected[:, 0].unique().numel() == len(expected)  # the records do differ


@pytest.mark.parametrize(("alignment", "explainability"), [(1.0, 0.0), (0.0, 1.0), (0.3, 2.0)])
def test_losses_follow_equations_6_and_7(alignment: float, explainability: float) -> None:
    s = study(alignment_weight=alignment, explainability_weight=explainability, temperature=0.5)
    model = made(s)
    inputs, present, _ = batch()
    expected = torch.tensor(
        [
            alignment * one.alignment + explainability * one.explainability
            for one in told(model, inputs, present)
        ]
    ).double()
    got = model(inputs, present).auxiliary_B
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)
    assert got[1] == 0  # no source
    assert got[0] > 0


def test_attention_is_what_the_equations_weigh_with() -> None:
    model = made(study())
    inputs, present, _ = batch()
    maps = model.attention(inputs, present)
    assert {name: tuple(a.shape) for name, a in maps.items()} == {
        "catm.structured": (8, 2, 3, 3),
        "catm.image": (8, 2, 3, 4),
        "readout.structured": (8, 2, 1, 3),
        "readout.text": (8, 2, 1, 3),
        "readout.image": (8, 2, 1, 4),
    }
    there = {
        "text": present["note"],
        "image": present["xray"],
        "structured": torch.cat([present["lab"], present["chart"]], 1),
    }
    for b, one in enumerate(told(model, inputs, present)):
        for m in ("image", "structured"):
            kept = maps[f"catm.{m}"][b][:, there["text"][b]][:, :, there[m][b]]
            for q, by_head in enumerate(one.catm.get(m, [])):
                for h in range(2):
                    torch.testing.assert_close(kept[h, q], torch.stack(by_head[h]))
            outside = maps[f"catm.{m}"][b].sum() - kept.sum()
            assert outside.abs() < 1e-12
        for m, by_head in one.readout.items():
            for h in range(2):
                got = maps[f"readout.{m}"][b, h, 0, there[m][b]]
                torch.testing.assert_close(got, torch.stack(by_head[h]))


def test_contributions_sum_to_the_logits_and_name_their_source() -> None:
    model = made(study())
    inputs, present, _ = batch()
    parts = model.contributions(inputs, present)
    assert [(s, p.shape[1]) for s, p in parts.items()] == list(TOKENS.items())
    total = sum(p.sum(1) for p in parts.values()) + model.intercept.weight[0]
    torch.testing.assert_close(total, model(inputs, present).logits_BK)
    one = told(model, inputs, present)[0]  # everything is present: lab, then chart
    torch.testing.assert_close(parts["chart"][0, 1], one.added["structured"][2])
    torch.testing.assert_close(parts["xray"][0, 3], one.added["image"][3])


def test_a_stream_weighs_the_same_whatever_its_number_of_tokens() -> None:
    """Section 3.7: no data source dominates. Twice the patches are still one image."""
    model = made(study())
    inputs, present, _ = batch()
    logits = model(inputs, present).logits_BK
    inputs["xray"] = inputs["xray"].repeat(1, 2, 1)
    present["xray"] = present["xray"].repeat(1, 2)
    torch.testing.assert_close(model(inputs, present).logits_BK, logits)


# -- absence, independence, clipping ----------------------------------------------------------


@pytest.mark.parametrize("name", DIMS)
def test_absent_source_has_no_gradient_and_no_influence(name: str) -> None:
    s = study()
    model = made(s)
    inputs, present, labels = batch()
    present[name][:] = False
    loss = row_loss(s)(model, inputs, present, labels)
    loss.sum().backward()
    assert all(not p.grad.any() for p in model.encoders[name].parameters())
    for p in model.parameters():
        assert p.grad.isfinite().all()
    for other in set(DIMS) - {name}:
        assert model.encoders[other][0].weight.grad.abs().max() > 0
    inputs[name][:] = float("nan")
    assert torch.equal(loss, row_loss(s)(model, inputs, present, labels))


def test_record_without_any_source_says_the_intercept() -> None:
    model = made(study())
    inputs, present, _ = batch()
    prediction = model(inputs, present)
    assert torch.equal(prediction.logits_BK[1], model.intercept.weight[0])
    assert torch.isfinite(prediction.logits_BK).all()
    assert torch.isfinite(prediction.auxiliary_B).all()


def test_prediction_is_float32_whatever_autocast_computes_in() -> None:
    model = made(study()).float()
    inputs, present, _ = batch()
    inputs = {name: x.float() for name, x in inputs.items()}
    exact = model(inputs, present)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(inputs, present)
    assert rough.logits_BK.dtype == rough.auxiliary_B.dtype == torch.float32
    torch.testing.assert_close(rough.logits_BK, exact.logits_BK, atol=0.1, rtol=0.1)
    torch.testing.assert_close(rough.auxiliary_B, exact.auxiliary_B, atol=0.1, rtol=0.1)


def test_a_record_does_not_see_its_neighbours() -> None:
    s = study()
    model = made(s)
    inputs, present, labels = batch()
    before, loss = model(inputs, present), row_loss(s)(model, inputs, present, labels)
    for name in DIMS:
        inputs[name][3] *= -7
        present[name][3] = ~present[name][3]
    after, moved = model(inputs, present), row_loss(s)(model, inputs, present, labels)
    others = torch.arange(8) != 3
    assert torch.equal(before.logits_BK[others], after.logits_BK[others])
    assert torch.equal(before.auxiliary_B[others], after.auxiliary_B[others])
    assert torch.equal(loss[others], moved[others])
    assert not torch.equal(loss[3], moved[3])


@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_clipped_sum_is_that_of_plain_autograd(weight: float) -> None:
    """Two records per patient; the layers of losses that are off still run."""
    s = study(alignment_weight=weight, explainability_weight=weight)
    model = made(s)
    inputs, present, labels = batch(12)
    trainable = list(model.parameters())
    loss = row_loss(s)
    gradients = []
    for p in range(6):
        rows = slice(2 * p, 2 * p + 2)
        of = {n: x[rows] for n, x in inputs.items()}, {n: m[rows] for n, m in present.items()}
        parts = torch.autograd.grad(
            loss(model, *of, labels[rows]).mean(), trainable, materialize_grads=True
        )
        gradients.append(torch.cat([g.flatten() for g in parts]))
    norms = torch.stack([g.norm() for g in gradients])
    bound = norms.median().item()
    expected = sum(g * min(1.0, bound / n) for g, n in zip(gradients, norms.tolist(), strict=True))

    assert {id(p) for _, m in covered_modules(model) for p in m.parameters()} == {
        id(p) for p in trainable
    }
    clipper = PatientClipper(model, bound, 2)
    clipper.begin()
    with clipper.capture():
        total = loss(model, inputs, present, labels).sum() / 2
    clipper.add(total, torch.ones(6, dtype=torch.bool))
    got = torch.cat([clipper.sums[p].flatten() for p in trainable])
    torch.testing.assert_close(got, expected, atol=1e-8 * bound, rtol=1e-6)


@pytest.mark.parametrize("names", [["note"], ["lab", "xray"], ["lab", "note"]])
def test_studies_without_a_stream_build_no_layer_that_cannot_run(names: list[str]) -> None:
    s = study(sources={n: SOURCES[n] for n in names})
    model = made(s)
    inputs, present, labels = batch()
    clipper = PatientClipper(model, 1.0, 1)
    with clipper.capture():
        loss = row_loss(s)(
            model, {n: inputs[n] for n in names}, {n: present[n] for n in names}, labels
        )
    clipper.add(loss.sum(), torch.ones(8, dtype=torch.bool))
    assert torch.isfinite(loss).all()
    assert (model.catm is not None) == ({"note", "lab"} <= set(names))


@pytest.mark.parametrize("stream", ["text", "image", "structured"])
def test_ablation_is_absence(stream: str) -> None:
    """Table of section 4.4: as if no record had the stream, with the same parameters."""
    full, ablated = made(study()), made(study(without=(stream,)))
    inputs, present, _ = batch()
    masked = {n: m & (STREAM[n] != stream) for n, m in present.items()}
    expected, got = full(inputs, masked), ablated(inputs, present)
    assert torch.equal(got.logits_BK, expected.logits_BK)
    assert torch.equal(got.auxiliary_B, expected.auxiliary_B)
    assert not torch.equal(got.logits_BK, full(inputs, present).logits_BK)
    shares = ablated.attention(inputs, present)[f"readout.{stream}"]
    assert not shares.any()


# -- what the added losses do -----------------------------------------------------------------


def test_unfaithfulness_is_0_for_a_true_map_and_1_for_a_false_one() -> None:
    w = torch.tensor([[0.6, 0.3, 0.1, 0.0], [1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]]).double()
    did = torch.tensor([[-6.0, 3.0, 1.0, 0.0], [0.0, 5.0, 0.0, 0.0], [3.0, 0.0, 0.0, 0.0]])
    got = unfaithfulness(w, did.double()[..., None])
    expected = torch.tensor([0, 1, 1 - math.sqrt(0.5)]).double()
    torch.testing.assert_close(got, expected, atol=4e-3, rtol=0)


def test_untrained_model_says_0_and_has_nothing_to_explain_in_its_readout() -> None:
    s = study(alignment_weight=0.0, explainability_weight=1.0)
    model = made(s, trained=False)
    inputs, present, _ = batch()
    prediction = model(inputs, present)
    assert not prediction.logits_BK.any()
    (slope,) = torch.autograd.grad(prediction.auxiliary_B.sum(), model.head.weight)
    assert slope.abs().max() < 1e-6


def test_each_added_loss_can_be_lowered() -> None:
    inputs, present, _ = batch()
    for key in ("alignment_weight", "explainability_weight"):
        off = {"alignment_weight": 0.0, "explainability_weight": 0.0}
        model = made(study(**(off | {key: 1.0})))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        values = []
        for _ in range(40):
            loss = model(inputs, present).auxiliary_B.sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            values.append(loss.item())
        assert values[-1] < 0.5 * values[0], key
    assert made(study(**off)).forward(inputs, present).auxiliary_B is None


@pytest.mark.parametrize("blind", [False, True])
def test_learns_a_rule_that_no_stream_tells_alone(blind: bool) -> None:
    """True if word and patch agree: text has to look into the image, and cannot without it."""
    torch.manual_seed(0)
    n, s = (
        768,
        study(
            sources={k: SOURCES[k] for k in ("note", "xray")},
            width=32,
            feedforward_width=32,
            without=("image",) if blind else (),
        ),
    )
    model = build(s, {k: DIMS[k] for k in s.sources}, None)
    inputs = {k: 0.2 * torch.randn(n, TOKENS[k], DIMS[k]) for k in s.sources}
    word, patch = torch.randint(0, 2, (n,)), torch.randint(0, 2, (n,))
    inputs["note"][:, 0, 0] += 4.0 * word - 2.0
    inputs["xray"][torch.arange(n), torch.randint(0, 4, (n,)), 1] += 4.0 * patch - 2.0
    present = {k: torch.ones(n, TOKENS[k], dtype=torch.bool) for k in s.sources}
    truth = word == patch
    labels = truth[:, None].expand(-1, 2).to(torch.int8)
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=0.02), []
    for _ in range(60):
        loss = row_loss(s)(model, inputs, present, labels)[:512].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    logit = model(inputs, present).logits_BK[512:, 0].detach()
    pairs = logit[truth[512:]][:, None] > logit[~truth[512:]][None]
    auroc = pairs.float().mean().item()  # of records not trained on
    if blind:
        assert auroc < 0.6
    else:
        assert auroc > 0.95
        assert losses[-1] < 0.1 * losses[0]


# -- study ------------------------------------------------------------------------------------


def test_same_seed_same_model_and_no_trace_in_the_global_generator() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = made(study(), trained=False)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    second, other = made(study(), trained=False), made(study(seed=5), trained=False)
    for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(first.negatives_PD, second.negatives_PD)
    assert not torch.equal(first.negatives_PD, other.negatives_PD)
    assert not torch.equal(first.catm.key.weight, other.catm.key.weight)
    torch.testing.assert_close(first.negatives_PD.norm(dim=1), torch.ones(4).double())


def test_groups_move_a_source_to_another_stream() -> None:
    slide = Source(modality="embedding", encoder="precomputed", dim=9)
    sources = {"note": SOURCES["note"], "xray": slide}
    assert made(study(sources=sources)).groups == {"note": "text", "xray": "structured"}
    moved = made(study(sources=sources, groups={"xray": "image"}))
    assert moved.groups == {"note": "text", "xray": "image"}
    assert len(moved.encoders["xray"]) == 2  # a projection, no dense network


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 10, "heads": 4}, "width 10 is not a multiple of heads 4"),
        ({"without": ("text", "text")}, "'without' names a stream twice"),
        ({"without": ("text", "image", "structured")}, "leaves no stream"),
        ({"without": ("audio",)}, "'text', 'image' or 'structured'"),
        ({"temperature": 0.0}, "greater than or equal to 0.01"),
        ({"alignment_weight": -1.0}, "greater than or equal to 0"),
        ({"layers": 2}, "Extra inputs are not permitted"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MLlm(**options)


def test_study_that_does_not_fit_its_options_is_refused() -> None:
    with pytest.raises(StudyError, match=r"unknown source 'xrai'; did you mean 'xray'"):
        made(study(groups={"xrai": "image"}))
    only_text = {"note": SOURCES["note"]}
    with pytest.raises(StudyError, match=r"without = \['text'\] leaves none[\s\S]*cure"):
        made(study(sources=only_text, without=("text",)))


def test_options_survive_toml() -> None:
    s = study(without=("image",), groups={"lab": "text"})
    again = Study.from_toml(s.to_toml())
    assert again.hash == s.hash
    assert again.model.m_llm == s.model.m_llm
