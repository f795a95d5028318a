"""UNI-MLM with the language models of its paper, in their published shapes and without weights.

Gemma-2B and Phi-3-mini-4k stand on the meta device from their configuration alone; the projectors
are built before a model of the same width with one block and a small vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from client.site.model.fusion.uni_mlm import UniMlm, _additive, _causal
from client.site.model.slm import load_slm
from common.study import Model, Study

DIMS = {"xr": 1024, "axr": 1024, "proc": 110, "lab": 242, "chart": 99, "txt": 768}
"""The paper's sources in token order."""
TASKS = 12
GEMMA = {
    "hidden_size": 2048,
    "num_hidden_layers": 18,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "intermediate_size": 16384,
    "vocab_size": 256000,
}
PHI3 = {
    "hidden_size": 3072,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "intermediate_size": 8192,
    "vocab_size": 32064,
}
# Parameters: input and output embedding are one in Gemma, two in Phi-3.
PUBLISHED = [
    pytest.param("Gemma", GEMMA, 2_506_172_416, id="gemma-2b"),
    pytest.param("Phi3", PHI3, 3_821_079_552, id="phi-3-mini-4k"),
]
SLIM = {"num_hidden_layers": 1, "intermediate_size": 64, "vocab_size": 300}


def causal(family: str, **shape: Any) -> transformers.PreTrainedModel:
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    config = getattr(transformers, f"{family}Config")(**shape, **special)
    return getattr(transformers, f"{family}ForCausalLM")(config)


@pytest.mark.parametrize(("family", "shape", "parameters"), PUBLISHED)
def test_the_whole_model_takes_a_records_tokens(
    family: str, shape: dict[str, int], parameters: int
) -> None:
    with torch.device("meta"):
        slm = causal(family, **shape)
        assert sum(p.numel() for p in slm.parameters()) == parameters
        assert slm.get_output_embeddings().weight.shape == (
            shape["vocab_size"],
            shape["hidden_size"],
        )
        present_BS = torch.ones(2, len(DIMS), dtype=torch.bool)
        hidden_BSH = slm.get_decoder()(
            inputs_embeds=torch.empty(2, len(DIMS), shape["hidden_size"]),
            attention_mask=_additive(_causal(present_BS), torch.float32),
            position_ids=torch.arange(len(DIMS))[None],
            use_cache=False,
        ).last_hidden_state
    assert hidden_BSH.shape == (2, len(DIMS), shape["hidden_size"])


@pytest.mark.parametrize("decoder", [False, True], ids=["projectors", "with decoders"])
@pytest.mark.parametrize(("family", "shape", "parameters"), PUBLISHED)
def test_what_is_trained_is_the_papers_projectors(
    tmp_path: Path, family: str, shape: dict[str, int], parameters: int, decoder: bool
) -> None:
    """One layer d -> H per source, whose bias the base token stands for, and H -> d with bias."""
    torch.manual_seed(0)
    causal(family, **{**shape, **SLIM}).save_pretrained(tmp_path)
    config = Model(slm=str(tmp_path), decoder=decoder)
    model = UniMlm(load_slm(config, device=torch.device("cpu")), config, DIMS, TASKS, seed=0)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    width = shape["hidden_size"]
    assert sum(p.numel() for n, p in trained.items() if "decoder" not in n) == 3267 * width
    expected = 3267 * width + (3267 * (width + 1) if decoder else 0)
    assert sum(p.numel() for p in trained.values()) == expected
    assert sum(DIMS.values()) == 3267
    out = model(
        {name: torch.ones(2, 1, dim) for name, dim in DIMS.items()},
        {name: torch.ones(2, 1, dtype=torch.bool) for name in DIMS},
    )
    assert out.logits_BK.shape == (2, TASKS)


@pytest.mark.parametrize("name", ["uni-mlm-gemma", "uni-mlm-phi3"])
def test_the_ready_studies_are_the_papers(name: str) -> None:
    study = Study.load(name)
    assert list(study.sources) == ["xray", "xray_history", "procedure", "lab", "chart", "note"]
    assert [len(s.series) for s in study.sources.values()] == [0, 0, 10, 22, 9, 0]
    assert len(study.tasks) == TASKS
    assert study.complete_records_only
    assert (study.model.decoder, study.model.beta) == (True, 10)
    training = study.training
    assert (training.optimizer, training.learning_rate, training.weight_decay) == (
        "adam",
        5e-4,
        3e-4,
    )
    assert study.federation.patients_declared
    batch = study.privacy.sample_rate * study.federation.patients_declared
    assert batch == pytest.approx(32)
    steps = study.federation.rounds * training.steps_per_round
    assert steps * study.privacy.sample_rate == pytest.approx(50, abs=2)
