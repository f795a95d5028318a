"""LLaMA-II fusion: the paper's equations in loops, missing sides, LoRA, privacy."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from pydantic import ValidationError
from sklearn.metrics import roc_auc_score
from torch import Tensor

from client.site.model.files import FAMILIES
from client.site.model.fusion.llama_fusion import LlamaFusion, build
from client.site.model.losses import row_loss
from client.site.model.slm import load_slm
from client.site.model.system import adapter_state
from client.site.training.clipping import PatientClipper
from client.site.training.layers import covered_modules
from common.errors import StudyError
from common.study import Lora, Model, Source, Study, Task
from common.systems.llama_fusion import LlamaFusion as Options

torch.set_num_threads(1)

SOURCES = {  # name -> (modality, encoder, width, tokens)
    "lab": ("series", "series-statistics", 6, 1),
    "note": ("text", "hashed-text", 10, 2),
    "film": ("image", "image-descriptor", 5, 1),
    "xray": ("image", "image-descriptor", 8, 3),
}
FUSIONS = ["early", "late", "mixed", "transchex"]
SMALL = {"cross_width": 8, "heads": 2, "feed_forward_width": 12, "head_width": 16}
LORA = Lora(rank=2, alpha=6, targets=("q_proj", "k_proj", "v_proj", "o_proj"))


def study(
    slm: str, *, sources=tuple(SOURCES), lora=None, seed=0, prevalence=(0.1, 0.4), **options
) -> Study:
    of = {
        name: Source(
            modality=SOURCES[name][0],
            encoder=SOURCES[name][1],
            series=("sodium",) if name == "lab" else (),
        )
        for name in sources
    }
    model = {
        "system": "llama-fusion",
        "slm": slm,
        "lora": lora,
        "llama_fusion": {**SMALL, **options},
    }
    death, stay = (Task(prevalence=value) for value in prevalence)
    tasks = {"death": death, "stay": stay}
    return Study(name="t", seed=seed, sources=of, tasks=tasks, model=Model(**model))


def made(s: Study) -> LlamaFusion:
    dims = {name: SOURCES[name][2] for name in s.sources}
    return build(s, dims, load_slm(s.model, device=torch.device("cpu")))


def batch(rows: int = 6, seed: int = 0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    inputs, present = {}, {}
    for name, (_, _, width, tokens) in SOURCES.items():
        inputs[name] = torch.randn(rows, tokens, width, generator=g).to(dtype)
        present[name] = torch.rand(rows, tokens, generator=g) < 0.6
    labels = torch.randint(-1, 2, (rows, 2), generator=g).to(torch.int8)
    for name in ("film", "xray"):
        present[name][0] = False  # row 0: text side only
    for name in ("lab", "note"):
        present[name][1] = False  # row 1: vision side only
    for name in SOURCES:
        present[name][2] = False  # row 2: nothing
        present[name][3] = True  # row 3: everything
    present["note"][0, 1] = present["xray"][1, 0] = True
    return inputs, present, labels


def randomised(model: torch.nn.Module, seed: int = 3) -> torch.nn.Module:
    """Away from the initial point, where LoRA is silent."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=g) * 0.3)
    return model


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a LLaMA small enough for loops; two heads share keys and values."""
    config = transformers.LlamaConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=24,
        vocab_size=50,
        initializer_range=0.3,
    )
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("tiny")
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


# -- the equations, token by token ------------------------------------------------------------


def affine(layer, x: Tensor) -> Tensor:
    """Wx + b, or equation (2), W x + (alpha / r) B (A x), for a layer with LoRA."""
    if hasattr(layer, "lora_A"):
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        return affine(layer.base_layer, x) + LORA.alpha / LORA.rank * (b @ (a @ x))
    values = x.tolist()
    y = [sum(w * v for w, v in zip(row, values, strict=True)) for row in layer.weight.tolist()]
    return torch.tensor(y, dtype=x.dtype) + (0 if layer.bias is None else layer.bias)


def rms(weight: Tensor, x: Tensor, eps: float) -> Tensor:
    return weight * x / math.sqrt(sum(v * v for v in x.tolist()) / len(x) + eps)


def equation_1(q: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """softmax(q K^T / sqrt(d_k)) V of one query and one head."""
    query = q.tolist()
    products = [sum(a * b for a, b in zip(query, k.tolist(), strict=True)) for k in keys]
    exponentials = [math.exp(product / math.sqrt(len(query))) for product in products]
    total = sum(exponentials)
    return sum(e / total * v for e, v in zip(exponentials, values, strict=True))


def rotated(x: Tensor, position: int) -> Tensor:
    half = len(x) // 2
    y = x.clone()
    for i in range(half):
        angle = position * 10000.0 ** (-i / half)
        c, s = math.cos(angle), math.sin(angle)
        y[i], y[i + half] = c * x[i] - s * x[i + half], c * x[i + half] + s * x[i]
    return y


def block(layer, xs: list[Tensor], places: list[int], causal: bool, config) -> list[Tensor]:
    """A LLaMA block on the tokens of one record."""
    at, mlp, size = layer.self_attn, layer.mlp, config.hidden_size // config.num_attention_heads
    grouped = config.num_attention_heads // config.num_key_value_heads
    normed = [rms(layer.input_layernorm.weight, x, config.rms_norm_eps) for x in xs]
    heads = lambda of, n: [affine(of, x).split(size)[n] for x in normed]  # noqa: E731
    out = []
    for t, x in enumerate(xs):
        seen = [s for s in range(len(xs)) if s <= t or not causal]
        parts = []
        for n in range(config.num_attention_heads):
            q = rotated(heads(at.q_proj, n)[t], places[t])
            keys, values = heads(at.k_proj, n // grouped), heads(at.v_proj, n // grouped)
            turned = [rotated(keys[s], places[s]) for s in seen]
            parts.append(equation_1(q, turned, [values[s] for s in seen]))
        h = x + affine(at.o_proj, torch.cat(parts))
        inner = rms(layer.post_attention_layernorm.weight, h, config.rms_norm_eps)
        gate = affine(mlp.gate_proj, inner)
        y = affine(mlp.down_proj, gate * torch.sigmoid(gate) * affine(mlp.up_proj, inner))
        out.append(h + y)
    return out


def half(part, norm, xs: list[Tensor], ys: list[Tensor], heads: int) -> list[Tensor]:
    """One direction of a cross layer."""
    plain, at = isinstance(norm, torch.nn.Identity), part.attention
    asking = xs if plain else [rms(norm.weight, x, 1e-6) for x in xs]
    answering = ys if plain else [rms(norm.weight, y, 1e-6) for y in ys]
    size = at.q.out_features // heads
    out = []
    for x, asks in zip(xs, asking, strict=True):
        parts = [
            equation_1(
                affine(at.q, asks).split(size)[n],
                [affine(at.k, y).split(size)[n] for y in answering],
                [affine(at.v, y).split(size)[n] for y in answering],
            )
            for n in range(heads)
        ]
        a = torch.cat(parts)
        if plain:
            z = affine(part.dense, a) + x
            mean = sum(z.tolist()) / len(z)
            deviation = math.sqrt(sum((v - mean) ** 2 for v in z.tolist()) / len(z) + 1e-12)
            out.append(part.norm.weight * (z - mean) / deviation + part.norm.bias)
        else:
            a = affine(part.o, a)
            gate = affine(part.gate, a)
            z = affine(part.down, gate * torch.sigmoid(gate) * affine(part.up, a)) + x
            out.append(rms(part.norm.weight, z, 1e-6))
    return out


def naive(model: LlamaFusion, inputs, present, row: int) -> Tensor:
    """Logits of one record, absent tokens cut out."""
    o, config = model.options, model._stack.config
    tokens: dict[str, list[Tensor]] = {"text": [], "vision": []}
    places: dict[str, list[int]] = {"text": [], "vision": []}
    count = {"text": 0, "vision": 0}
    if o.fusion == "transchex":
        tokens["text"].append(model.scale * model.start.weight[0])
        places["text"].append(0)
        count["text"] = 1
    for name, (modality, _, _, length) in SOURCES.items():
        side = "vision" if modality == "image" else "text"
        for t in range(length):
            if present[name][row, t]:
                token = model.scale * affine(model.projectors[name], inputs[name][row, t])
                tokens[side].append(token)
                places[side].append(count[side])
            count[side] += 1
    encoded = {}
    for side, xs in tokens.items():
        for layer in model._blocks(side):
            xs = block(layer, xs, places[side], o.fusion != "transchex", config) if xs else xs
        encoded[side] = xs

    def crossed(stack, of):
        for layer in stack.layers:
            of = {
                side: half(layer.halves[side], layer.norm, of[side], of[other], o.heads)
                if side in layer.halves
                else of[side]
                for side, other in (("text", "vision"), ("vision", "text"))
            }
        return of

    both = bool(tokens["text"] and tokens["vision"])
    if both and o.fusion in ("early", "mixed"):
        more = crossed(model.early, tokens)
        encoded = {
            side: [a + b for a, b in zip(encoded[side], more[side], strict=True)] for side in more
        }
    if both and o.fusion != "early":
        encoded = crossed(model.late, encoded)
    if o.fusion == "transchex":
        s = encoded["text"][0]
    else:
        s = torch.zeros(config.hidden_size, dtype=torch.float64)
        for xs in encoded.values():
            normed = [rms(model._stack.norm.weight, x, config.rms_norm_eps) for x in xs]
            if normed:
                s = s + (normed[-1] if o.pooling == "last" else sum(normed) / len(normed))
    return affine(model.classify, torch.tanh(affine(model.dense, s)))


@pytest.mark.parametrize(
    ("fusion", "pooling", "lora"),
    [
        ("early", "last", None),
        ("early", "mean", LORA),
        ("late", "last", None),
        ("mixed", "last", LORA),
        ("transchex", "last", LORA),
    ],
)
def test_equations_record_by_record(llama, fusion, pooling, lora) -> None:
    s = study(llama, fusion=fusion, pooling=pooling, lora=lora, text_layers=2, vision_layers=1)
    model = randomised(copy.deepcopy(made(s)).double())
    inputs, present, _ = batch(dtype=torch.float64)
    ours = model(inputs, present).logits_BK
    assert ours.dtype == torch.float64
    with torch.no_grad():
        for row in range(4):
            expected = naive(model, inputs, present, row)
            torch.testing.assert_close(ours[row], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_are_the_language_models_own(slm_folder, family: str) -> None:
    """All blocks and the last norm on a whole sequence: what transformers itself computes."""
    s = study(str(slm_folder(family)))
    model = made(s)
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    every = torch.ones(2, 5, dtype=torch.bool)
    with torch.no_grad():
        ours = model._stack.norm(model._encoded("text", x, every))
        own = load_slm(s.model).causal.get_decoder()(inputs_embeds=x).last_hidden_state
    assert model.depth == {"text": 2, "vision": 2}  # as many as it has, of 3
    torch.testing.assert_close(ours, own, atol=1e-5, rtol=1e-5)


# -- records and their sources ------------------------------------------------------------------


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_record_does_not_see_its_neighbours(llama, fusion: str) -> None:
    s = study(llama, fusion=fusion, lora=LORA)
    model, loss = randomised(made(s)), row_loss(s)
    inputs, present, labels = batch()
    labels[:] = 1
    before = loss(model, inputs, present, labels)
    for name in SOURCES:
        inputs[name][4:] *= -7
        present[name][5] = ~present[name][5]
    after = loss(model, inputs, present, labels)
    assert torch.equal(before[:4], after[:4])
    assert (before[4:] != after[4:]).all()


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("side", ["text", "vision"])
def test_absent_side_gives_no_gradient_and_no_value(llama, fusion: str, side: str) -> None:
    s = study(llama, fusion=fusion, lora=LORA)
    model, loss = randomised(made(s)), row_loss(s)
    inputs, present, labels = batch()
    labels[:] = 1
    for name in model.sides[side]:
        present[name][:] = False
    before = loss(model, inputs, present, labels)
    for name in model.sides[side]:
        inputs[name][:] = float("nan")
    after = loss(model, inputs, present, labels)
    assert torch.equal(before, after)
    after.sum().backward()
    for name in model.sides[side]:
        assert model.projectors[name].weight.grad.abs().max() == 0
        assert model.projectors[name].bias.grad.abs().max() == 0
    if not (fusion == "transchex" and side == "text"):  # whose token 0 is still there to ask
        silent = [p for part in (model.early, model.late) if part for p in part.parameters()]
        assert silent
        assert all(p.grad is None or p.grad.abs().max() == 0 for p in silent)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_one_source_speaks_and_none_is_finite(llama, fusion: str) -> None:
    model = randomised(made(study(llama, fusion=fusion)))
    inputs, present, _ = batch(5)
    for row, name in enumerate(SOURCES):
        for other in SOURCES:
            present[other][row] = other == name
    for name in SOURCES:
        present[name][4] = False
    first = model(inputs, present).logits_BK
    second = model({n: -3 * x for n, x in inputs.items()}, present).logits_BK
    assert torch.isfinite(first).all()
    assert (first[:4] != second[:4]).all()
    assert torch.equal(first[4], second[4])


def test_absent_tokens_change_nothing_in_the_midst_of_a_source(llama) -> None:
    model = randomised(made(study(llama, fusion="mixed", pooling="mean")))
    inputs, present, _ = batch()
    logits = model(inputs, present).logits_BK
    assert not present["xray"].all()
    moved = {n: torch.where(present[n][:, :, None], x, 1e4) for n, x in inputs.items()}
    assert torch.equal(logits, model(moved, present).logits_BK)


@pytest.mark.parametrize("sources", [("lab", "note"), ("film", "xray")])
@pytest.mark.parametrize("fusion", ["mixed", "transchex"])
def test_study_with_one_side(llama, sources, fusion) -> None:
    s = study(llama, sources=sources, fusion=fusion, lora=LORA)
    model = made(s)
    inputs, present, labels = batch()
    crossed = fusion == "transchex" and sources == ("film", "xray")  # token 0 asks the images
    assert (model.late is not None) == crossed
    losses = row_loss(s)(model, inputs, present, labels)
    assert torch.isfinite(losses).all()
    covered_modules(model)


def test_named_sources_stand_on_the_vision_side(llama) -> None:
    model = made(study(llama, vision=("xray", "lab")))
    assert model.sides == {"text": ("note", "film"), "vision": ("lab", "xray")}
    with pytest.raises(StudyError, match=r"no source 'mri'[\s\S]*lab, note, film, xray"):
        made(study(llama, vision=("mri",)))


# -- privacy ------------------------------------------------------------------------------------


@pytest.mark.parametrize("fusion", FUSIONS)
def test_clipped_sum_is_that_of_each_patient_alone(llama, fusion: str) -> None:
    s = study(llama, fusion=fusion, lora=LORA)
    model, loss = randomised(copy.deepcopy(made(s)).double()), row_loss(s)
    inputs, present, labels = batch(8, dtype=torch.float64)
    labels[:, 0] = 1
    trainable = [p for p in model.parameters() if p.requires_grad]
    gradients = []
    for patient in range(4):
        of = slice(2 * patient, 2 * patient + 2)
        rows = ({n: x[of] for n, x in d.items()} for d in (inputs, present))
        mean = loss(model, *rows, labels[of]).mean()
        parts = torch.autograd.grad(mean, trainable, materialize_grads=True)
        gradients.append(torch.cat([p.flatten() for p in parts]))
    norms = torch.stack([g.norm() for g in gradients])
    bound = float(norms.median()) * 1.01  # some are clipped, some not
    assert (norms > bound).any()
    assert (norms < bound).any()
    expected = sum(g * min(1.0, bound / float(n)) for g, n in zip(gradients, norms, strict=True))
    clipper = PatientClipper(model, bound, 2)
    clipper.begin()
    with clipper.capture():
        total = loss(model, inputs, present, labels).sum() / 2
    clipper.add(total, torch.ones(4, dtype=torch.bool))
    ours = torch.cat([clipper.sums[p].flatten() for p in trainable])
    clipper.close()
    torch.testing.assert_close(ours, expected, rtol=1e-7, atol=1e-9 * bound)


def test_lora_of_both_sides_moves_from_the_first_step(llama) -> None:
    """B, zero at the start, moves first; A has no gradient until B is not zero."""
    s = study(llama, fusion="early", lora=Lora(rank=4), text_layers=1)
    model, loss = made(s), row_loss(s)
    inputs, present, labels = batch()
    labels[:] = 1
    names = [n for n, p in model.named_parameters() if p.requires_grad and "lora_" in n]
    sides = {side: [n for n in names if n.startswith(side)] for side in ("slm.", "vision_blocks.")}
    assert [len(of) for of in sides.values()] == [4, 8]  # 1 and 2 blocks, q and v, A and B
    of = dict(model.named_parameters())
    clipper = PatientClipper(model, 1.0, 1)
    moved = []
    for _ in range(2):
        clipper.begin()
        with clipper.capture():
            total = loss(model, inputs, present, labels).sum()
        clipper.add(total, torch.ones(6, dtype=torch.bool))
        moved.append({n: clipper.sums[of[n]].abs().max().item() > 0 for n in names})
        with torch.no_grad():
            for p, gradient in clipper.sums.items():
                p -= 0.1 * gradient.to(p.dtype)
    clipper.close()
    assert all(yes == ("lora_B" in name) for name, yes in moved[0].items())
    assert all(moved[1].values())


def test_sides_share_frozen_weights_and_nothing_trainable(llama) -> None:
    model = made(study(llama, lora=LORA))
    text = dict(model._blocks("text").named_parameters())
    vision = dict(model._blocks("vision").named_parameters())
    assert text.keys() == vision.keys()
    for name, parameter in text.items():
        assert (parameter is vision[name]) == ("lora_" not in name)
        assert parameter.requires_grad == ("lora_" in name)
    plain = made(study(llama))
    assert not any("lora_" in name for name, _ in plain.named_parameters())
    assert not any(name.startswith("slm") for name in adapter_state(plain))


def test_frozen_weights_may_be_bfloat16(llama) -> None:
    """As on a GPU: what is trained, and the logits, stay float32."""
    s = study(llama, fusion="mixed", lora=LORA)
    slm = load_slm(s.model, device=torch.device("cpu"))
    exact = randomised(made(s))
    coarse = replace(slm, causal=copy.deepcopy(slm.causal).bfloat16())
    model = randomised(build(s, exact.dims, coarse))
    inputs, present, _ = batch()
    logits = model(inputs, present).logits_BK
    assert logits.dtype == torch.float32
    assert {p.dtype for _, m in covered_modules(model) for p in m.parameters(False)} == {
        torch.float32
    }
    torch.testing.assert_close(logits, exact(inputs, present).logits_BK, atol=0.3, rtol=0.3)


# -- options, seeds, learning -------------------------------------------------------------------


@pytest.mark.parametrize("fusion", FUSIONS)
def test_same_seed_same_adapter(llama, fusion: str) -> None:
    torch.manual_seed(11)
    first = adapter_state(made(study(llama, fusion=fusion, lora=LORA, seed=5)))
    state = torch.get_rng_state()
    second = adapter_state(made(study(llama, fusion=fusion, lora=LORA, seed=5)))
    assert torch.equal(state, torch.get_rng_state())
    other = adapter_state(made(study(llama, fusion=fusion, lora=LORA, seed=6)))
    assert first.keys() == second.keys() == other.keys()
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert not np.array_equal(first["dense.weight"], other["dense.weight"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cross_width": 10, "heads": 4}, "'cross_width' 10 does not divide into 4 'heads'"),
        ({"vision": ("a", "a")}, "'vision' names a source twice"),
        ({"fusion": "middle"}, "'early', 'late', 'mixed' or 'transchex'"),
        ({"text_layers": 0}, "greater than or equal to 1"),
        ({"cross_widht": 8}, "Extra inputs"),
    ],
)
def test_options_are_checked(options, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Options(**options)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_learns_a_rule_that_needs_both_sides(fusion: str) -> None:
    s = study("nano", fusion=fusion, cross_layers=1, pooling="mean", prevalence=(0.5, 0.64))
    model, loss = made(s), row_loss(s)

    def drawn(rows: int, seed: int):
        inputs, present, labels = batch(rows, seed)
        for name in SOURCES:
            present[name][:] = True
        score = inputs["lab"][:, 0, 0] + inputs["film"][:, 0, 0]
        return inputs, present, torch.stack([score > 0, score < 0.5], 1).to(labels)

    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(40):
        value = loss(model, *drawn(64, step)).mean()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    inputs, present, labels = drawn(400, 999)
    present_but_film = {**present, "film": torch.zeros_like(present["film"])}
    with torch.no_grad():
        full, blind = (model(inputs, m).logits_BK[:, 0] for m in (present, present_but_film))
    assert roc_auc_score(labels[:, 0], full) > 0.85
    assert roc_auc_score(labels[:, 0], blind) < roc_auc_score(labels[:, 0], full) - 0.05
