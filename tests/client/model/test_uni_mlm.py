"""The UNI-MLM model: paper's equations, missing sources, families, adapters."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from client.site.model.files import FAMILIES
from client.site.model.fusion.uni_mlm import COLLINEAR, designate
from client.site.model.losses import asymmetric, row_loss
from client.site.model.slm import load_slm
from client.site.model.system import adapter_spec, adapter_state, build, load_adapter
from common.errors import ModelError
from common.study import Federation, Lora, Model, Site, Source, Study, Task
from tests.client.model.uni_mlm_equations import transcribed_asl, transcribed_avg

DIMS = {"lab": 12, "chart": 6, "note": 20}


def study(**model) -> Study:
    series = {"modality": "series", "encoder": "series-statistics"}
    return Study(
        name="test",
        sources={
            "lab": Source(**series, series=("sodium",)),
            "chart": Source(**series, series=("heart_rate",)),
            "note": Source(modality="text", encoder="hashed-text"),
        },
        tasks={"death": Task(prevalence=0.1), "stay": Task(prevalence=0.4)},
        model=Model(**model),
        federation=Federation(sites={"a": Site(patients_declared=10)}),
    )


def batch(rows: int = 8, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    g = torch.Generator().manual_seed(seed)
    inputs = {s: torch.randn(rows, 1, d, generator=g) for s, d in DIMS.items()}
    present = {s: torch.rand(rows, 1, generator=g) < 0.7 for s in DIMS}
    present["lab"][:] = True
    return inputs, present, torch.randint(-1, 2, (rows, 2), generator=g).to(torch.int8)


def randomised(model: torch.nn.Module, seed: int = 3) -> torch.nn.Module:
    """Away from the initial point, where everything is constant."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=g) * 0.3)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_average_of_full_head_logits_over_present_tokens(slm_folder, family) -> None:
    """Record by record, with absent tokens cut out of the sequence, through the whole head."""
    s = study(slm=str(slm_folder(family)), logit_gain=1.5)
    model = randomised(build(s, DIMS))
    inputs, present, _ = batch()
    ours = model(inputs, present).logits_BK
    slm = load_slm(s.model)
    for row in range(len(ours)):
        tokens, bases, positions = [], [], []
        for index, (name, projector) in enumerate(model.projectors.items()):
            if present[name][row, 0]:
                moved = model.scale_S[index] * projector(inputs[name][row, 0])
                tokens.append(model.base_SH[index] + moved)
                bases.append(model.base_SH[index])
                positions.append(index)
        with torch.no_grad():
            trained, untrained = slm.causal(
                inputs_embeds=torch.stack([torch.stack(tokens), torch.stack(bases)]),
                position_ids=torch.tensor([positions]),
            ).logits[:, :, model.designated]
        expected = 1.5 * (trained - untrained).mean(0)
        torch.testing.assert_close(ours[row], expected, atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_isolated_projectors_are_trained_by_their_own_token_alone(slm_folder, family) -> None:
    """Section II-C: t^s = enc(e^s) is the whole input of the SLM; the losses of all sources add."""
    s = study(slm=str(slm_folder(family)), projectors="isolated", logit_gain=1.5, loss="asl")
    model = randomised(build(s, DIMS))
    inputs, present, labels = batch()
    slm = load_slm(s.model)
    expected = torch.zeros(len(labels))
    for index, (name, projector) in enumerate(model.projectors.items()):
        base = model.base_SH[index].expand(len(labels), 1, -1)
        token = base + model.scale_S[index] * projector(inputs[name])
        with torch.no_grad():
            trained, untrained = (
                slm.causal(inputs_embeds=x).logits[:, 0, model.designated] for x in (token, base)
            )
        own = asymmetric(1.5 * (trained - untrained), labels) / 2  # tasks
        expected += torch.where(present[name][:, 0], own, 0.0) / len(DIMS)
    ours = row_loss(s)(model, inputs, present, labels)
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=2e-4)
    joint = build(study(slm=str(slm_folder(family)), logit_gain=1.5), DIMS)
    load_adapter(joint, adapter_state(model))
    said = model(inputs, present).logits_BK
    assert torch.equal(said, joint(inputs, present).logits_BK), "both predict jointly"


@pytest.mark.parametrize(("options", "beta"), [({}, 10.0), ({"beta": 2.5}, 2.5)])
@pytest.mark.parametrize("projectors", ["joint", "isolated"])
@pytest.mark.parametrize("loss", ["avg", "asl"])
def test_what_is_trained_is_equation_5(slm_folder, loss, projectors, options, beta) -> None:
    """L_rec + beta L, summed over the projectors that a record trains, up to a constant."""
    s = study(
        slm=str(slm_folder("llama")), loss=loss, projectors=projectors, decoder=True, **options
    )
    model = randomised(build(s, DIMS))
    inputs, present, labels = batch()
    assert not all(mask.all() for mask in present.values())
    with torch.no_grad():
        ours = row_loss(s)(model, inputs, present, labels)
        goal = model.objective(inputs, present)
    constant = (2 if loss == "asl" else 1) * (3 if projectors == "isolated" else 1)

    def classification(row: int, view: int) -> float:
        logits, known = goal.logits_BVK[row, view].tolist(), labels[row].tolist()
        if loss == "asl":
            return transcribed_asl(logits, known, margin=0.05, gamma=4.0)
        return transcribed_avg(logits, known, [0.1, 0.4])

    def reconstruction(row: int, source: str) -> float:
        e = inputs[source][row, 0]
        decoder = model.decoders[source]
        back = decoder.weight @ (model.projectors[source].weight @ e) + decoder.bias
        return math.sqrt(sum(gap**2 for gap in (e - back).tolist()))

    for row in range(len(labels)):
        trained = [(view, name) for view, name in enumerate(DIMS) if present[name][row, 0]]
        expected = sum(reconstruction(row, name) for _, name in trained)
        views = [0] if projectors == "joint" else [view for view, _ in trained]
        expected += beta * sum(classification(row, view) for view in views)
        assert constant * ours[row].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("projectors", ["joint", "isolated"])
def test_an_untrained_model_says_0_whatever_the_number_of_tokens(slm_folder, projectors) -> None:
    s = study(slm=str(slm_folder("llama")), projectors=projectors, lora={"rank": 2})
    model = build(s, DIMS)
    g = torch.Generator().manual_seed(0)
    lengths = dict(zip(DIMS, (1, 3, 5), strict=True))
    inputs = {n: torch.randn(8, t, DIMS[n], generator=g) for n, t in lengths.items()}
    present = {n: torch.rand(8, t, generator=g) < 0.7 for n, t in lengths.items()}

    def said() -> Tensor:
        goal = model.objective(inputs, present)
        views = torch.where(goal.share_BV[:, :, None] > 0, goal.logits_BVK, 0.0)
        return torch.cat([model(inputs, present).logits_BK, views.flatten(1)], dim=1)

    assert said().abs().max() < 1e-5
    randomised(model)
    assert said().abs().max() > 1e-2


@pytest.mark.parametrize("projectors", ["joint", "isolated"])
@pytest.mark.parametrize("decoder", [False, True])
def test_a_record_does_not_see_its_neighbours(slm_folder, decoder: bool, projectors: str) -> None:
    s = study(slm=str(slm_folder("llama")), decoder=decoder, projectors=projectors)
    model = randomised(build(s, DIMS))
    inputs, present, labels = batch()
    loss = row_loss(s)
    before = loss(model, inputs, present, labels)
    for name in DIMS:
        inputs[name][1:] *= -7
        present[name][1:] = ~present[name][1:]
    after = loss(model, inputs, present, labels)
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[1:], after[1:])


def test_absent_source_gives_no_gradient_and_no_value(slm_folder) -> None:
    s = study(slm=str(slm_folder("llama")), decoder=True)
    model = randomised(build(s, DIMS))
    inputs, present, labels = batch()
    present["note"][:] = False
    loss = row_loss(s)(model, inputs, present, labels)
    loss.sum().backward()
    assert model.projectors["note"].weight.grad.abs().max() == 0
    assert model.decoders["note"].weight.grad.abs().max() == 0
    assert model.projectors["lab"].weight.grad.abs().max() > 0
    inputs["note"][:] = float("nan")
    assert torch.equal(loss, row_loss(s)(model, inputs, present, labels))


def test_record_without_any_source_is_finite(slm_folder) -> None:
    model = randomised(build(study(slm=str(slm_folder("gemma"))), DIMS))
    inputs, present, _ = batch(2)
    for mask in present.values():
        mask[0] = False
    logits = model(inputs, present).logits_BK
    assert torch.isfinite(logits).all()
    assert logits[0].tolist() == [0.0, 0.0]


def test_untrained_model_says_nothing_whatever_is_missing(slm_folder) -> None:
    inputs, present, _ = batch(40)
    logits = build(study(slm=str(slm_folder("llama")), logit_gain=8.0), DIMS)(inputs, present)
    torch.testing.assert_close(
        logits.logits_BK, torch.zeros_like(logits.logits_BK), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_every_source_starts_with_the_same_slope(slm_folder, family: str) -> None:
    """The Jacobian of the logits to W_s e has norm token_scale (root mean square over tasks)."""
    model = build(study(slm=str(slm_folder(family)), token_scale=0.5, logit_gain=3.0), DIMS)
    inputs = {name: torch.eye(d)[:1, None] for name, d in DIMS.items()}
    present = {name: torch.ones(1, 1, dtype=torch.bool) for name in DIMS}
    logits = model(inputs, present).logits_BK[0]
    for name in DIMS:
        weight = model.projectors[name].weight
        slopes = [torch.autograd.grad(z, weight, retain_graph=True)[0][:, 0] for z in logits]
        norm = torch.stack(slopes).square().sum(1).mean().sqrt().item()
        assert norm == pytest.approx(0.5, rel=1e-3)


def test_same_seed_same_model_other_seed_other_entries(slm_folder) -> None:
    s = study(slm=str(slm_folder("llama")), lora=Lora(rank=2), decoder=True)
    first, second = build(s, DIMS), build(s, DIMS)
    other = build(s.model_copy(update={"seed": 5}), DIMS)
    a, b = adapter_state(first), adapter_state(second)
    assert all(np.array_equal(a[name], b[name]) for name in a)
    assert first.designated == second.designated != other.designated
    assert len(set(first.designated)) == 2


def test_only_adapter_is_trainable_and_slm_is_shared(slm_folder) -> None:
    s = study(slm=str(slm_folder("llama")))
    first, second = build(s, DIMS), build(s, DIMS)
    assert first.slm is second.slm
    assert all(name.startswith("projectors.") for name in adapter_state(first))
    assert adapter_spec(first)["trainable_parameters"] == 64 * sum(DIMS.values())
    lora = adapter_state(build(study(slm=str(slm_folder("llama")), lora=Lora(rank=2)), DIMS))
    assert sum("lora_" in name for name in lora) == 8
    assert not any("lora_" in name for name, _ in first.named_parameters())


def test_adapter_round_trip_is_exact_and_strict(slm_folder) -> None:
    s = study(slm=str(slm_folder("phi3")), lora=Lora(rank=2, targets=("qkv_proj",)))
    source, target = randomised(build(s, DIMS)), build(s, DIMS)
    arrays = adapter_state(source)
    load_adapter(target, arrays)
    inputs, present, _ = batch()
    assert torch.equal(source(inputs, present).logits_BK, target(inputs, present).logits_BK)
    before = adapter_state(target)
    name = "projectors.lab.weight"
    wrong = {
        "missing": {k: v for k, v in arrays.items() if k != name},
        "shape": arrays | {name: arrays[name][:, :3]},
        "float64": arrays | {name: arrays[name].astype(np.float64)},
        "finite": arrays | {name: np.full_like(arrays[name], np.nan)},
    }
    for reason, bad in wrong.items():
        with pytest.raises(ModelError) as caught:
            load_adapter(target, bad)
        assert reason in str(caught.value) or name in str(caught.value)
    assert all(np.array_equal(before[k], v) for k, v in adapter_state(target).items())


def test_lora_adds_alpha_over_rank_b_a(slm_folder) -> None:
    """What it adds, written into the frozen matrices instead, gives the same logits."""
    s = study(slm=str(slm_folder("llama")), lora=Lora(rank=2, alpha=6))
    model = randomised(build(s, DIMS))
    inputs, present, _ = batch()
    with torch.no_grad():
        ours = model(inputs, present).logits_BK
        for layer in model.modules():
            if hasattr(layer, "lora_A"):
                a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
                layer.base_layer.weight += 6 / 2 * (b @ a)
                b.zero_()
        torch.testing.assert_close(model(inputs, present).logits_BK, ours, atol=1e-5, rtol=1e-4)


def test_several_tokens_per_source(slm_folder) -> None:
    """Unpooled encoders give T tokens; padding tokens change nothing."""
    model = randomised(build(study(slm=str(slm_folder("llama"))), DIMS))
    inputs, present, _ = batch(4)
    inputs["note"] = torch.randn(4, 3, 20)
    present["note"] = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0], [1, 1, 1]]).bool()
    logits = model(inputs, present).logits_BK
    inputs["note"][0, 2] = 1e4
    assert torch.equal(logits, model(inputs, present).logits_BK)


def test_designated_entries_are_not_collinear() -> None:
    g = torch.Generator().manual_seed(0)
    collapsed = torch.randn(1, 32, generator=g) + 0.01 * torch.randn(990, 32, generator=g)
    head = torch.cat([collapsed, torch.randn(10, 32, generator=g)])
    drawn = designate(head, 6, g)
    rows = torch.nn.functional.normalize(head[drawn], dim=1)
    cosines = (rows @ rows.T - torch.eye(6)).abs()
    assert len(set(drawn)) == 6
    assert cosines.max() <= COLLINEAR
    assert len(set(designate(collapsed, 6, g))) == 6  # no such six exist: any distinct ones


class TestLoading:
    def test_folder_without_safetensors(self, slm_folder, tmp_path) -> None:
        (tmp_path / "config.json").write_bytes((slm_folder("llama") / "config.json").read_bytes())
        (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
        with pytest.raises(ModelError, match=r"no \.safetensors file[\s\S]*save_pretrained"):
            load_slm(Model(slm=str(tmp_path)))

    def test_empty_folder(self, tmp_path) -> None:
        with pytest.raises(ModelError, match=r"no config\.json"):
            load_slm(Model(slm=str(tmp_path)))

    def test_unreachable_id_says_what_to_do(self, monkeypatch) -> None:
        # The variable HF_HUB_OFFLINE is read on import; without it, the hub is asked for 30 s.
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(ModelError, match=r"cannot be loaded[\s\S]*HF_HUB_OFFLINE"):
            load_slm(Model(slm="nobody/nothing", revision="0" * 40))

    def test_other_family_is_named(self, tmp_path) -> None:
        import transformers

        config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50)
        transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
        with pytest.raises(ModelError, match=r"family 'gpt2'[\s\S]*llama"):
            load_slm(Model(slm=str(tmp_path)))
