"""Pretrain `nano`, the embedded small language model, on synthetic clinical text.

    python -m simulations.nano.pretrain --out client/site/model/nano --seed 0

`nano` exists so that everything runs offline and in seconds with the same code path as a real
language model. It is a plain `LlamaForCausalLM` of about 1.4 million parameters; input embedding
and output head are untied, because a study cuts the head down to its designated rows and the two
must not share storage then.

The text is generated while training, so no token is seen twice. One thread and one seed: the same
machine and library versions give the same weights again.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from common.errors import ModelError
from simulations.nano.corpus import documents

VOCABULARY = 2048
CONTEXT = 128
BATCH = 16
STEPS = 900
TOKENIZER_DOCUMENTS = 20_000
HELD_OUT_BLOCKS = 256
LEARNING_RATE = 3e-3
HEAD_SCALE = 0.08
WARMUP = 0.05
BOS, EOS, PAD = "<s>", "</s>", "<pad>"


def train_tokenizer(seed: int, vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """Byte-level BPE: no unknown token, every digit a token of its own, `<s>` put in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\d"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        islice(documents(f"{seed}/tokenizer"), TOKENIZER_DOCUMENTS), trainer
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A $B",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        model_max_length=512,
    )


def blocks(
    tokenizer: PreTrainedTokenizerFast, seed: str, batch: int = BATCH
) -> Iterator[torch.Tensor]:
    """Endless int64 `[batch, CONTEXT]`: documents `<s> … </s>` laid end to end and cut."""
    texts, eos = documents(seed), tokenizer.eos_token_id
    kept: list[int] = []
    size = batch * CONTEXT
    while True:
        while len(kept) < size:
            for ids in tokenizer(list(islice(texts, 256)))["input_ids"]:
                kept += [*ids, eos]
        yield torch.tensor(kept[:size]).view(batch, CONTEXT)
        kept = kept[size:]


def occurring(tokenizer: PreTrainedTokenizerFast, seed: int) -> torch.Tensor:
    """Bool `[vocabulary]`: entries met in the tokenizer's own sample (about two in five).

    The rest are bytes that the grammar never writes and merges that longer merges swallow.
    """
    met = torch.zeros(len(tokenizer), dtype=torch.bool)
    met[tokenizer.eos_token_id] = True
    for ids in tokenizer(
        list(islice(documents(f"{seed}/tokenizer"), TOKENIZER_DOCUMENTS))
    ).input_ids:
        met[ids] = True
    return met


class Perplexity(NamedTuple):
    """Per token, over the predicted positions of a held-out sample.

    Attributes:
        model: exp of the mean negative log-likelihood under the model.
        unigram: exp of the entropy of the sample's own token frequencies: the best that any
            model without context could reach, fitted to the very sample it is scored on.
        tokens: How many tokens were predicted.
    """

    model: float
    unigram: float
    tokens: int


@torch.no_grad()
def held_out(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    seed: str,
    count: int,
) -> Perplexity:
    """Perplexity on `count` blocks of CONTEXT tokens from a seed that training never used."""
    ids_ = torch.cat(list(islice(blocks(tokenizer, seed, 16), math.ceil(count / 16))))
    total = 0.0
    model.eval()
    for ids in ids_.split(16):
        logits = model(input_ids=ids).logits.float()
        total += torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
        ).item()
    predicted = ids_[:, 1:].flatten().tolist()
    n = len(predicted)
    entropy = -sum(c / n * math.log(c / n) for c in Counter(predicted).values())
    return Perplexity(math.exp(total / n), math.exp(entropy), n)


def architecture(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _schedule(step: int, steps: int) -> float:
    """Linear warm-up, then cosine down to a hundredth."""
    warm = max(1, round(WARMUP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def train(
    tokenizer: PreTrainedTokenizerFast,
    met_V: torch.Tensor,
    seed: int,
    steps: int,
    minutes: float,
    show: bool = True,
) -> LlamaForCausalLM:
    """AdamW in fp32 on one CPU thread.

    Head rows of entries outside `met_V` stay as initialised. Trained, they would only be pushed
    away from the text, all along one direction (measured: cosine .999 between any two), and tasks
    that a study designates to such entries could not be told apart.

    Raises:
        ModelError: The loss stopped being finite, or training took longer than `minutes`.
    """
    torch.manual_seed(seed)
    model = LlamaForCausalLM(architecture(tokenizer)).train()
    torch.nn.init.normal_(model.lm_head.weight, std=HEAD_SCALE)
    model.lm_head.weight.register_hook(lambda gradient_VH: gradient_VH * met_V[:, None])
    # No decay on rows that may get no gradient: it would only shrink them to nothing.
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "layers" not in n]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=LEARNING_RATE,
        betas=(0.9, 0.95),
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: _schedule(s, steps))
    columns = (
        TextColumn("pretraining"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
    )
    started = time.monotonic()
    with Progress(*columns, disable=not show) as progress:
        task = progress.add_task("pretraining", total=steps, loss=math.nan)
        for step, ids in enumerate(islice(blocks(tokenizer, f"{seed}/train"), steps)):
            loss = model(input_ids=ids, labels=ids).loss
            if not torch.isfinite(loss):
                raise ModelError(
                    f"the loss is not finite at step {step}", cure="try another --seed"
                )
            if time.monotonic() - started > 60 * minutes:
                raise ModelError(
                    f"{step} of {steps} steps took more than {minutes:g} minutes",
                    cure="lower --steps or raise --minutes; a cut schedule is not saved",
                )
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
            progress.update(task, advance=1, loss=loss.item())
    return model


CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# nano

A language model of {parameters:,} parameters that ships inside Fedward, so that every study can run
offline, in tests and demonstrations, through the same code as a full-size language model.

## What it is

- `LlamaForCausalLM`: hidden {hidden}, {layers} layers, {heads} heads, feed-forward {inner},
  {vocabulary:,} vocabulary entries (byte-level BPE, digits one by one), at most {positions}
  positions, input embedding and output head **untied**, weights in bf16 ({mebibytes:.1f} MiB).
- Pretrained from nothing on **synthetic text only**: notes about invented patients, written by the
  seeded grammar in `simulations/nano/corpus.py`. No real record, data set or other model
  entered it.

## What it is not

- **Not for clinical use.** It knows no medicine: the grammar holds coarse textbook directions
  ("kidney injury raises creatinine") and made-up outcomes, and the model imitates that grammar.
- Not a reader of real notes: other text falls apart into pieces that it never saw together.
- Not a generator worth reading, not instruction-tuned, English only. It was trained on contexts of
  {context} tokens; longer inputs run, but were never practised.
- Its benefit over random weights of the same shape on real tasks is **not claimed here**; measure
  it on your study. For results that matter name a real language model in the study.

## Measured

| | |
|---|---|
| perplexity per token on a fresh seed ({tokens_scored:,} tokens), as saved | **{model:.2f}** |
| the same in fp32, before rounding to bf16 | {before:.2f} |
| best model without context (unigram fitted to the scored sample itself) | {unigram:.1f} |
| RMS of the input embeddings of held-out text | **{text_rms:.4f}** |
| RMS of input embedding rows: entries that occur, the others | {met_rms:.4f}, {unmet_rms:.4f} |
| RMS of head rows: entries that occur, the others | {head_rms:.4f}, {unmet_head_rms:.4f} |
| tokens seen in training (none twice) | {tokens_seen:,} |
| wall-clock seconds of training, one thread of a busy or idle machine | {seconds:.0f} |

The held-out text comes from the same grammar, so this perplexity says that the grammar was learned,
nothing about real text. A vector given as `inputs_embeds` is at the scale of the model's own tokens
when its RMS is near that of held-out text.

Of the {vocabulary:,} entries {met:,} occur in the synthetic text. The rest (bytes never written,
merges swallowed by longer ones) keep their random initial rows, so that any set of entries that a
study designates has distinct directions in the head.

## Make it again

```
python -m simulations.nano.pretrain --out client/site/model/nano --seed {seed} --steps {steps}
```

AdamW ({rate:g}, cosine, batch {batch} x {context} tokens), fp32, torch {torch}. The same machine
and versions give the same bytes; SHA-256 of `model.safetensors`: `{digest}`.

License: Apache-2.0, as all of Fedward.
"""


def _rms(rows: torch.Tensor) -> float:
    return rows.pow(2).mean().sqrt().item()


def pretrain(
    out: Path, seed: int = 0, steps: int = STEPS, minutes: float = 30, show: bool = True
) -> Perplexity:
    """Train tokenizer and model, save both with their card to `out`, and score what was saved.

    Raises:
        ModelError: Fewer than one step, or see `train`.
    """
    if steps < 1:
        raise ModelError(f"--steps {steps}: nothing to train", cure="give at least 1")
    torch.set_num_threads(1)
    tokenizer = train_tokenizer(seed)
    started = time.monotonic()
    met_V = occurring(tokenizer, seed)
    model = train(tokenizer, met_V, seed, steps, minutes, show)
    seconds = time.monotonic() - started
    before = held_out(model, tokenizer, f"{seed}/held-out", HELD_OUT_BLOCKS)
    out.mkdir(parents=True, exist_ok=True)
    model.bfloat16().save_pretrained(out, safe_serialization=True)
    tokenizer.save_pretrained(out)
    # The name that every supported transformers release can load (5.x writes its own newer one).
    settings = out / "tokenizer_config.json"
    loadable = json.loads(settings.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings.write_text(json.dumps(loadable, indent=2) + "\n")
    saved = LlamaForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    after = held_out(saved, tokenizer, f"{seed}/held-out", HELD_OUT_BLOCKS)
    ids = torch.cat(list(islice(blocks(tokenizer, f"{seed}/held-out"), 8))).flatten()
    embedding_VH = saved.model.embed_tokens.weight.detach().float()
    head_VH = saved.lm_head.weight.detach().float()
    weights = (out / "model.safetensors").read_bytes()
    config = saved.config
    (out / "README.md").write_text(
        CARD.format(
            parameters=saved.num_parameters(),
            hidden=config.hidden_size,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            inner=config.intermediate_size,
            vocabulary=config.vocab_size,
            positions=config.max_position_embeddings,
            mebibytes=len(weights) / 2**20,
            context=CONTEXT,
            tokens_scored=after.tokens,
            model=after.model,
            before=before.model,
            unigram=after.unigram,
            text_rms=_rms(embedding_VH[ids]),
            met_rms=_rms(embedding_VH[met_V]),
            unmet_rms=_rms(embedding_VH[~met_V]),
            head_rms=_rms(head_VH[met_V]),
            unmet_head_rms=_rms(head_VH[~met_V]),
            met=int(met_V.sum()),
            tokens_seen=steps * BATCH * CONTEXT,
            seconds=seconds,
            seed=seed,
            steps=steps,
            rate=LEARNING_RATE,
            batch=BATCH,
            torch=torch.__version__,
            digest=hashlib.sha256(weights).hexdigest(),
        ),
        encoding="utf-8",
    )
    return after


def main(
    out: Annotated[Path, typer.Option(help="folder for weights, tokenizer and card")],
    seed: Annotated[int, typer.Option(help="decides text, initial weights and order")] = 0,
    steps: Annotated[
        int, typer.Option(help=f"optimizer steps of {BATCH} x {CONTEXT} tokens")
    ] = STEPS,
    minutes: Annotated[float, typer.Option(help="give up when training takes longer")] = 30,
) -> None:
    """Pretrain the embedded language model `nano` on synthetic clinical text."""
    try:
        scored = pretrain(out, seed, steps, minutes)
    except ModelError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    typer.echo(
        f"{out}: held-out perplexity {scored.model:.2f} (without context {scored.unigram:.1f}) "
        f"over {scored.tokens:,} tokens"
    )


if __name__ == "__main__":
    typer.run(main)
