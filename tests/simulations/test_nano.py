"""The embedded language model loads offline, has learned its grammar, and can be made again."""

from __future__ import annotations

import math
from copy import deepcopy
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.errors import ModelError
from simulations.nano.corpus import documents, judge
from simulations.nano.pretrain import held_out, pretrain
from simulations.nano.vocabulary import CONDITIONS, FINDINGS, QUANTITIES

NANO = Path(__file__).resolve().parents[2] / "client" / "site" / "model" / "nano"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(NANO, local_files_only=True)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(
        NANO, dtype=torch.bfloat16, local_files_only=True, use_safetensors=True
    ).eval()


def test_folder_is_small_and_complete():
    files = {p.name: p.stat().st_size for p in NANO.iterdir()}
    assert {
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    } <= set(files)
    assert sum(files.values()) <= 8 * 2**20


def test_model_is_an_untied_bf16_llama(model, tokenizer):
    assert type(model).__name__ == "LlamaForCausalLM"
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config.vocab_size == len(tokenizer) == 2048
    assert model.config.max_position_embeddings == 512
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert embedding.data_ptr() != head.data_ptr()
    assert not torch.equal(embedding, head)


def test_tokenizer_round_trips_any_text(tokenizer):
    text = "Creatinine 12.8 mg/dL, naïve β-blocker\n\t5 µg → discharged"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    # Digits stay apart, so that magnitudes are spelled the same way everywhere.
    assert tokenizer.tokenize(" 12.8") == ["Ġ1", "2", ".", "8"]


def test_learned_the_grammar(model, tokenizer):
    scored = held_out(model, tokenizer, "a seed of the tests", 64)
    assert scored.tokens == 64 * 127
    assert scored.unigram > 100
    assert scored.model < 2.2  # measured: 1.9


def test_any_designated_entries_differ(model):
    """Entries that no text uses must not share one direction (they do when trained naively)."""
    rows_VH = torch.nn.functional.normalize(model.lm_head.weight.detach().float(), dim=1)
    cosines_VV = rows_VH @ rows_VH.T - 2 * torch.eye(len(rows_VH))
    assert cosines_VV.max() < 0.95
    assert model.lm_head.weight.float().pow(2).mean(1).sqrt().min() > 0.04


def test_calls_values_by_their_reference_range(model, tokenizer):
    """Beside a value far outside its range the right word is likelier than its opposite."""
    high, low = tokenizer.encode(" high low", add_special_tokens=False)
    for prompt, right, wrong in (
        ("Laboratory results: sodium 128 mmol/L", low, high),
        ("Laboratory results: glucose 231 mg/dL", high, low),
        ("Vital signs at hour 3: heart rate 131 bpm", high, low),
        ("Vital signs at hour 3: oxygen saturation 91%", low, high),
    ):
        with torch.no_grad():
            logits = model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1].float()
        assert logits[right] > logits[wrong] + 1, prompt


def test_runs_from_embeddings_and_ignores_masked_positions(model):
    model = deepcopy(model).float()
    generator = torch.Generator().manual_seed(0)
    scale = model.get_input_embeddings().weight.float().pow(2).mean().sqrt()
    tokens_BSH = torch.randn(2, 6, model.config.hidden_size, generator=generator) * scale
    mask_BS = torch.tensor([[1, 1, 1, 1, 0, 1], [1, 0, 1, 1, 1, 1]])
    changed_BSH = tokens_BSH.clone()
    changed_BSH[mask_BS == 0] = 100.0
    with torch.no_grad():
        first, second = (
            model(inputs_embeds=x, attention_mask=mask_BS).logits for x in (tokens_BSH, changed_BSH)
        )
    assert torch.isfinite(first).all()
    assert torch.allclose(first[mask_BS == 1], second[mask_BS == 1], atol=1e-5)
    assert first.std(dim=-1).min() > 0.1


def test_corpus_is_a_function_of_the_seed():
    first = list(islice(documents(3), 200))
    assert first == list(islice(documents(3), 200))
    other = list(islice(documents(4), 200))
    assert len(set(first) & set(other)) < 20
    assert len(set(first)) > 180


def test_corpus_vocabulary_is_consistent():
    for condition in CONDITIONS:
        assert set(condition.effects) <= set(QUANTITIES), condition.name
        assert set(condition.findings) <= set(FINDINGS), condition.name
    sodium = QUANTITIES["sodium"]
    words = [judge(sodium, v) for v in (110, 134, 140, 146, 170)]
    assert words == ["critically low", "low", "normal", "high", "critically high"]


def test_pretraining_runs_and_repeats(tmp_path, monkeypatch):
    monkeypatch.setattr("simulations.nano.pretrain.TOKENIZER_DOCUMENTS", 2000)
    monkeypatch.setattr("simulations.nano.pretrain.HELD_OUT_BLOCKS", 16)
    first = pretrain(tmp_path / "a", seed=1, steps=3, show=False)
    assert pretrain(tmp_path / "b", seed=1, steps=3, show=False) == first
    weights = [(tmp_path / x / "model.safetensors").read_bytes() for x in "ab"]
    assert weights[0] == weights[1]
    assert 10 < first.model < 2048
    assert math.isfinite(first.unigram)
    card = (tmp_path / "a" / "README.md").read_text(encoding="utf-8")
    for words in ("Not for clinical use", "synthetic text only", "Apache-2.0", "--steps 3"):
        assert words in card
    AutoModelForCausalLM.from_pretrained(tmp_path / "a", local_files_only=True)


def test_nothing_to_train_is_refused(tmp_path):
    with pytest.raises(ModelError, match="cure"):
        pretrain(tmp_path, steps=0)
