# ruff: noqa: E501 - Markdown tables and paragraphs are single lines
"""The model card of a trained adapter, with the privacy statement of each site.

The template is text in this module, because a Flower bundle carries Python files only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, StrictUndefined

from common.study import Study
from server.report import Report


def card(study: Study, spec: Mapping[str, Any], report: Report) -> str:
    """The model card, in Markdown; arguments as in `server.publish.write`."""
    environment = Environment(
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    slm = {"revision": None, "family": None, "parameters": None, "embedded": False, **spec["slm"]}
    totals = [_largest(site.epsilon_reserved) for site in report.sites]
    return environment.from_string(_CARD).render(
        study=study,
        report=report,
        slm=slm,
        local_slm=str(slm["name"]).startswith((".", "/", "~")),
        lora=spec.get("lora"),
        private=report.privacy.mode != "none",
        balanced=study.model.loss == "avg",
        figure=_figure,
        number=_number,
        epsilon=_epsilon,
        largest=_largest,
        summed=sum(t for t in totals if t is not None) if None not in totals else None,
    )


LEDGERS = "Ledgers of the virtual hospitals"


def ledgers_text(report: Report) -> str:
    """What each ledger of a simulation adds up to, over all its studies: a table, in Markdown."""
    head = (
        "ε of all that each ledger holds, of this study and of those before it on the same "
        f"patients, at δ {report.privacy.delta:g}:\n\n"
        "| site | ε training | ε validation |\n|---|---|---|\n"
    )
    spent = report.simulation_ledgers or {}
    return head + "".join(
        f"| {site} | {_epsilon(e['train'])} | {_epsilon(e['validation'])} |\n"
        for site, e in spent.items()
    )


def _figure(metrics: Any, name: str) -> str:
    """`.812 (.790-.834)`, or that there is nothing to say."""
    value, interval = getattr(metrics, name), metrics.interval.get(name)
    if value is None:
        return "*insufficient*"
    return f"{value:.3f}" + (f" ({interval[0]:.3f}–{interval[1]:.3f})" if interval else "")


def _number(value: float | None) -> str:
    return "∞" if value is None else f"{value:.3f}".rstrip("0").rstrip(".")


def _epsilon(value: float | None) -> str:
    """Rounded up: a privacy statement may not flatter."""
    return "∞" if value is None else f"{math.ceil(value * 1000) / 1000:.3f}"


def _largest(epsilons: Mapping[str, float | None]) -> float | None:
    values = list(epsilons.values())
    return None if None in values else max((v for v in values if v is not None), default=0.0)


_CARD = """\
---
library_name: fedward
tags: [federated-learning, {% if private %}differential-privacy, {% endif %}clinical, multimodal]
{% if slm.name and not slm.embedded and not local_slm %}base_model: {{ slm.name }}
{% endif %}---

# {{ study.name }}: a federated risk model

{% if study.description %}{{ study.description }}

{% endif %}
**Not for clinical use.** Trained by Fedward {{ report.fedward }} on {{ report.sites | length }} sites in {{ report.rounds }} rounds; study `{{ report.study.hash }}`.
{% if report.privacy.simulated %}

> **Simulated.** The sites were virtual hospitals on one machine, or their randomness was seeded. The figures below show what the mechanism would promise; they protected no patient in this run.
{% endif %}

## What it predicts

{% for name, task in study.tasks.items() %}
- `{{ name }}`{% if task.description %}: {{ task.description.rstrip('.') }}{% endif %} (public prevalence {{ task.prevalence }})
{% endfor %}

A risk is positive at logit >= 0{% if balanced %}, which balances the classes{% endif %}; sigmoid(logit) is not a calibrated probability.

## Metrics of the federation

{% if private %}
From noised score histograms of validation patients, who never trained; 95 % intervals include the noise and the sampling of patients.
{% else %}
From exact score histograms of validation patients, who never trained; 95 % intervals are for the sampling of patients.
{% endif %}

| task | AUROC | AUPRC | precision | recall | F1 | patients | of these positive |
|---|---|---|---|---|---|---|---|
{% for name, m in report.tasks.items() %}
| {{ name }} | {{ figure(m, "auroc") }} | {{ figure(m, "auprc") }} | {{ figure(m, "precision") }} | {{ figure(m, "recall") }} | {{ figure(m, "f1") }} | {{ "%.0f" | format(m.support) }} | {{ "%.0f" | format(m.positives) }} |
{% endfor %}
| **mean** of the known | {{ figure(report.macro, "auroc") }} | {{ figure(report.macro, "auprc") }} | | | | | |

{% if private %}*insufficient*: the noise, or too few patients, leave nothing to say. Counts are noised.{% else %}*insufficient*: too few patients.{% endif %}


## Privacy statement

{% if private %}
The unit is the **patient** at a site, with all their records: adding or removing one patient. Mode `local`: nobody outside a site is trusted; full noise is added there, before anything leaves. Patients are sampled by Poisson sampling at rate q, {{ study.privacy.records_per_patient }} record{{ "s" if study.privacy.records_per_patient > 1 }} of each at most, gradients clipped to norm {{ study.privacy.max_grad_norm }}. Training and validation patients are disjoint, so a patient's ε is that of their own population.

| site | δ | ε training | ε validation | ε at most, spare rounds included | σ | q | steps | evaluations |
|---|---|---|---|---|---|---|---|---|
{% for s in report.sites %}
| {{ s.name }} | {{ "%g" | format(s.delta) }} | {{ epsilon(s.epsilon_by_population.train) }} | {{ epsilon(s.epsilon_by_population.validation) }} | {{ epsilon(largest(s.epsilon_reserved)) }} | {{ number(s.noise_multiplier) }} | {{ s.sample_rate }} | {{ s.steps }} | {{ s.evaluations }} |
{% endfor %}

σ is the noise over the sensitivity of a step; evaluations use {{ number(report.privacy.evaluation_noise_multiplier) }}. ε is computed by privacy loss distributions for add/remove adjacency, from the events in each site's ledger.

**Covered:** everything that left a site for this study: this adapter, every adapter of its rounds, the metrics above, and whatever is computed from them, by anyone, with any other knowledge.

**Not covered:**
- a patient treated at several of these sites: their ε and δ add up over the sites (ε at most {{ epsilon(summed) }} here);
- other studies on the same patients: they add up too, each site's ledger keeps the sum;
- which sites took part, the declared numbers of patients, times of answers, and drop-outs;
- what is learnt of people in general: that the model associates a sign with a risk is its purpose;
- choices made by looking at earlier results on the same patients, unless those were released under the ledger too.
{% else %}
**None.** Mode `none`: the adapter left each site without noise, and every patient's ε is infinite. It may reveal individual records; treat it as patient data.
{% endif %}
{% if report.start %}

**On top of its start.** Training began with the adapter of study `{{ report.start.study }}` (SHA-256 `{{ report.start.adapter }}`; {{ report.start.taken | length }} arrays of it), which was itself made from patients. What stands above is this study's share alone: a patient of both studies pays both. A site that took part in both composes them in its one ledger, which has the exact sum.

{% if report.start.mode == "none" %}
The earlier study ran in mode `none`: its adapter left the sites without noise, this one descends from it, and **for its patients ε is infinite**, whatever noise came later.
{% elif report.start.epsilon_reserved is none %}
The earlier study started from a third one, which comes on top as well; no sum can be stated here.
{% else %}
Both protocols together, spare rounds included, composed at δ {{ "%g" | format(report.privacy.delta) }}:

{% for site, e in report.start.epsilon_reserved.items() %}
- {{ site }}: ε at most {{ epsilon(e.train) }} for training patients, {{ epsilon(e.validation) }} for validation patients
{% endfor %}

This holds if σ, q, rounds and evaluations of this study were not chosen in the light of what the earlier one released; otherwise add the ε and the δ of both. A patient keeps one of the two roles at a site for its ledger's life. A site that took part in one of the two only has that one's ε.
{% endif %}
{% endif %}

## Ledger receipts

The head of each site's ledger at its last answer. A ledger that does not hold its receipt's line was cut or replaced; `fedward audit reconcile` compares this card with the ledgers.

| site | public key | lines | head |
|---|---|---|---|
{% for s in report.sites if s.receipt %}
| {{ s.name }} | `{{ s.receipt.public_key }}` | {{ s.receipt.lines }} | `{{ s.receipt.head }}` |
{% endfor %}

## How it is made

- System: `{{ study.model.system }}`; {{ '{:,}'.format(report.trainable_parameters) }} trained parameters.
{% if slm.name != "none" %}
- Language model: {{ slm.name }}{% if slm.revision %} at `{{ slm.revision }}`{% endif %}{% if slm.family %} ({{ slm.family }}{% if slm.parameters %}, {{ '{:,}'.format(slm.parameters) }} parameters{% endif %}){% endif %}, frozen{% if lora %}, with LoRA of rank {{ lora.r }}{% endif %}; not part of this folder. SHA-256 `{{ slm.sha256 }}`.
{% endif %}
- Encoders, frozen:
{% for source, description in report.encoders.items() %}
  - `{{ source }}`: {{ description }}
{% endfor %}

## Files

- `projectors.safetensors`: every trained array but LoRA's, float32
{% if lora %}
- `adapter_model.safetensors`, `adapter_config.json`: LoRA, for `PeftModel.from_pretrained(base, folder)`; the projectors are needed beside it
{% endif %}
- `fedward.json`: how the arrays belong together; `study.toml`: the protocol

## Intended use and limits

Research on methods. It has not been validated for any population, device or workflow, is no medical device, and must not inform the care of a patient. Performance differs between hospitals and groups, and an average over sites hides it.
"""
