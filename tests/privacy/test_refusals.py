"""Rule 4: what cannot be proven is refused by name, with reason and cure."""

from __future__ import annotations

import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from client.site.encoders.dataset import Dataset
from client.site.training.clipping import PatientClipper
from client.site.training.entropy import Entropy
from client.site.training.layers import covered_layers
from client.site.training.plan import DPExecutionPlan, OptimizerConfig, PerformanceFlags
from client.site.training.trainer import Trainer
from common.errors import PrivacyError


class Lone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.missing = nn.Parameter(torch.zeros(4))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(4, 4), nn.Linear(4, 4)
        self.up.weight = self.down.weight


class Scaled(nn.Linear):
    """Any subclass may compute something else than its parent."""


def frozen(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False)


def dora() -> nn.Module:
    class Base(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Linear(4, 4)

        def forward(self, x):
            return self.q(x)

    return get_peft_model(Base(), LoraConfig(r=2, target_modules=["q"], use_dora=True))


REFUSED = {
    "conv": (nn.Sequential(nn.Conv2d(1, 2, 3)), r"0 \(Conv2d\).*", "unfolded patches"),
    "attention": (nn.Sequential(nn.MultiheadAttention(4, 2)), "MultiheadAttention", "four nn.Lin"),
    "rnn": (nn.Sequential(nn.GRU(4, 4)), "GRU", "freeze it"),
    "group norm": (nn.Sequential(nn.GroupNorm(2, 4)), "GroupNorm", "nn.LayerNorm"),
    "subclass": (nn.Sequential(Scaled(4, 4)), "Scaled", "hold each trainable tensor"),
    "bare parameter": (nn.Sequential(Lone()), r"0 \(Lone\): trainable missing", r"Embedding\(1, d"),
    "root parameter": (Lone(), "the model itself", r"Embedding\(1, d"),
    "tied": (Tied(), r"up.weight is the same tensor as down.weight", "untie"),
    "dora": (dora(), "DoRA normalises", "use_dora = false"),
    "frozen batch norm in train mode": (
        nn.Sequential(nn.Linear(4, 4), frozen(nn.BatchNorm1d(4))),
        "1 .BatchNorm1d. computes statistics over the batch",
        "LayerNorm",
    ),
    "batch norm without affine": (
        nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False)),
        "statistics over the batch",
        "LayerNorm",
    ),
    "batch norm without running statistics, in eval": (
        nn.Sequential(nn.Linear(4, 4), frozen(nn.BatchNorm1d(4, track_running_stats=False))).eval(),
        "statistics over the batch",
        "LayerNorm",
    ),
    "instance norm with running statistics": (
        nn.Sequential(nn.Linear(4, 4), nn.InstanceNorm1d(4, track_running_stats=True)),
        "statistics over the batch",
        "LayerNorm",
    ),
    "dropout": (nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1)), "dropout 0.1", "to 0"),
    "renormed embedding": (nn.Sequential(nn.Embedding(4, 4, max_norm=1.0)), "max_norm", "freeze"),
    "float16": (nn.Sequential(nn.Linear(4, 4)).half(), "0.weight is torch.float16", "float32"),
    "nothing to train": (frozen(nn.Sequential(nn.Linear(4, 4))), "no trainable", "unfreeze"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_uncovered_model_is_refused_by_name_with_reason_and_cure(case):
    model, reason, cure = REFUSED[case]
    with pytest.raises(PrivacyError, match=reason) as error:
        covered_layers(model)
    assert "cure: " in str(error.value)
    assert re.search(cure, error.value.cure)


def test_attention_dropout_of_a_language_model_is_refused(make_model):
    model = make_model()
    next(m for m in model.modules() if hasattr(m, "attention_dropout")).attention_dropout = 0.1
    with pytest.raises(PrivacyError, match="attention_dropout"):
        covered_layers(model)
    covered_layers(model.eval())


def test_covered_model_names_every_trainable_parameter(make_model):
    model = make_model(layer_norm=True)
    covered = {f"{layer.name}.{key}" for layer in covered_layers(model) for key in layer.sums}
    assert covered == {n for n, p in model.named_parameters() if p.requires_grad}


# --- what only shows when the model runs


def dataset(rows: int = 8) -> Dataset:
    return Dataset(
        rows_of_patient=[torch.tensor([i]).numpy() for i in range(rows)],
        inputs={"lab": torch.randn(rows, 2, 4)},
        present={"lab": torch.ones(rows, 2, dtype=torch.bool)},
        labels=torch.zeros(rows, 1, dtype=torch.int8),
        record_ids=[str(i) for i in range(rows)],
    )


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.shift: torch.Tensor | None = None


def unrecorded(m, x, p, y):
    with torch.no_grad():
        hidden = m.one(x["lab"])
    return m.two(hidden).sum((1, 2))


def never(m, x, p, y):
    return m.one(x["lab"]).sum((1, 2))


def flattened(m, x, p, y):
    return m.two(m.one(x["lab"].flatten(0, 1))).view(len(y), -1).sum(1)


def in_place_output(m, x, p, y):
    return m.two(m.one(x["lab"]).mul_(2.0)).sum((1, 2))


def in_place_input(m, x, p, y):
    hidden = x["lab"] * 1.0
    out = m.two(m.one(hidden).relu())
    hidden.zero_()
    return out.sum((1, 2))


def contrast(m, x, p, y):
    z = m.two(m.one(x["lab"])).sum(1)
    return -torch.diagonal(torch.log_softmax(z @ z.T, 1))


def batch_centred(m, x, p, y):
    z = m.two(m.one(x["lab"]))
    return (z - z.mean(0).detach()).square().sum((1, 2))


class Counting(Two):
    """Keeps a mean of what it sees, as running statistics do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(4))


def remembering(m, x, p, y):
    hidden = m.one(x["lab"])
    m.seen.add_(hidden.detach().mean((0, 1)))
    return m.two(hidden).sum((1, 2))


def by_keyword(m, x, p, y):
    return m.two(input=m.one(input=x["lab"])).sum((1, 2))


def one_number(m, x, p, y):
    return m.two(m.one(x["lab"])).mean()


AT_RUN_TIME = {
    "unrecorded": (unrecorded, "one ran without recording its gradient"),
    "never": (never, "two did not run"),
    "flattened": (flattened, "one saw 8 rows where the pass has 4"),
    "in-place output": (in_place_output, "one: its input or output was changed in place"),
    "in-place input": (in_place_input, "one: its input or output was changed in place"),
    "in-batch contrast": (contrast, "the loss of one patient reaches the rows of another"),
    "batch statistics by hand": (batch_centred, "depends on its neighbours"),
    "reduced loss": (one_number, r"row_loss gave shape \(\) for 4 rows"),
}


@pytest.mark.parametrize("case", AT_RUN_TIME)
def test_misbehaving_model_is_refused_before_any_data_is_read(case):
    loss, reason = AT_RUN_TIME[case]
    plan = DPExecutionPlan(0.5, 1, 1, 8, max_grad_norm=1.0, noise_multiplier=1.0)
    model = Two()
    with pytest.raises(PrivacyError, match=reason):
        Trainer(model, loss, dataset(), plan, OptimizerConfig(), Entropy(), PerformanceFlags(4))
    assert not any(module._forward_hooks for module in model.modules())


def test_rows_that_mix_are_found_though_the_adapter_starts_from_zero():
    """At W = 0 the contrast's gradient vanishes, and with it every trace of the other rows."""
    model = Two()
    for p in model.parameters():
        nn.init.zeros_(p)
    plan = DPExecutionPlan(0.5, 1, 1, 8, max_grad_norm=1.0, noise_multiplier=1.0)
    with pytest.raises(PrivacyError, match="reaches the rows of another"):
        Trainer(model, contrast, dataset(), plan, OptimizerConfig(), Entropy(), PerformanceFlags(4))
    assert not any(p.count_nonzero() for p in model.parameters())


def test_buffer_that_remembers_patients_is_refused():
    plan = DPExecutionPlan(0.5, 1, 1, 8, max_grad_norm=1.0, noise_multiplier=1.0)
    with pytest.raises(PrivacyError, match="seen: a forward pass changes this buffer"):
        Trainer(Counting(), remembering, dataset(), plan, OptimizerConfig(), Entropy())


def test_layers_called_by_keyword_are_covered():
    plan = DPExecutionPlan(0.5, 1, 1, 8, max_grad_norm=1.0, noise_multiplier=1.0)
    Trainer(Two(), by_keyword, dataset(), plan, OptimizerConfig(), Entropy()).run(1)


def test_layer_that_stops_running_never_uses_an_earlier_capture():
    clipper, data = PatientClipper(model := Two(), 1.0, 1), dataset(4)
    valid = torch.ones(4, dtype=torch.bool)
    with clipper.capture():
        loss = model.two(model.one(data.inputs["lab"])).sum()
    clipper.add(loss, valid)
    with pytest.raises(PrivacyError, match="two did not run"), clipper.capture():
        clipper.add(never(model, data.inputs, None, None).sum(), valid)


def test_layer_unfrozen_between_rounds_is_refused():
    model = Two()
    model.two.requires_grad_(False)
    plan = DPExecutionPlan(0.5, 1, 2, 8, max_grad_norm=1.0, noise_multiplier=1.0)

    def loss(m, x, p, y):
        return m.two(m.one(x["lab"])).sum((1, 2))

    trainer = Trainer(model, loss, dataset(), plan, OptimizerConfig(), Entropy())
    trainer.run(1)
    model.two.requires_grad_(True)
    with pytest.raises(PrivacyError, match="not those that were checked"):
        trainer.run(1)
