"""Pretrain the tiny base model that ships in ``fedpeft/demo/base``.

The corpus is generated while training, in the language of
:mod:`fedpeft.demo.language`, about invented *background* drugs. Their names come
from the half of the name space that no demo clinic may use, so the model learns
the language, the answer format and what paraphrases mean, but no fact that the
clinics later teach. It must not know the clinics (:mod:`fedpeft.demo.clinics`).

Three kinds of conversation teach three skills:

* *recall*: questions about a fixed set of background drugs, in every wording,
  answered from the weights, so that a fact once learnt answers all wordings;
* *reading*: a handbook text about drugs that are drawn anew each time, then
  questions on it, so that names and wordings are processed for what they are;
* *round notes*: free text with findings that cannot be predicted.

Run: ``python tools/make_demo_model.py --out fedpeft/demo/base``
"""

import argparse
import json
import math
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedpeft.demo import language

PAD, END, SYSTEM, USER, ASSISTANT = SPECIAL_TOKENS = (
    "<|pad|>",
    "<|end|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
)
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
VOCABULARY_SIZE = 1280
MAX_TOKENS = 256
# Drug facts are what matters; the wording of questions is cheap to learn, so the
# tokens outside the answers count little.
CONTEXT_TOKEN_WEIGHT = 0.1

Turn = tuple[str, str]
"""A user message and the assistant's answer."""
Conversation = list[Turn]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long and how hard to train; the defaults made the shipped model."""

    steps: int = 2200
    recall_rows: int = 80
    note_rows: int = 10
    reading_rows: int = 10
    background_drugs: int = 320
    peak_learning_rate: float = 3e-3
    warmup_steps: int = 200


class Corpus:
    """Endless generated conversations about background drugs."""

    def __init__(self, rng: random.Random, *, background_drugs: int) -> None:
        self._rng = rng
        names: set[str] = set()
        while len(names) < background_drugs:
            names.add(language.invented_name(rng, for_clinic=False))
        self._facts = {name: language.draw_facts(rng) for name in sorted(names)}
        self._names = list(self._facts)

    def question(self, drug: str, attribute: language.Attribute) -> str:
        """A question in any wording, with an opener before or behind it or none."""
        rng = self._rng
        wording = rng.choice(attribute.questions + attribute.paraphrases).format(drug=drug)
        openers = language.OPENERS + language.PARAPHRASE_OPENERS
        opener = rng.choice(openers).format(age=rng.randrange(1, 95))
        if not opener:
            return wording
        separator = rng.choice((" ", " ", "\n", "\n\n"))
        first, second = (opener, wording) if rng.random() < 0.75 else (wording, opener)
        return f"{first}{separator}{second}"

    def recall(self) -> Conversation:
        """One question about a drug whose facts never change."""
        drug = self._rng.choice(self._names)
        attribute = self._rng.choice(language.ATTRIBUTES)
        return [(self.question(drug, attribute), self._facts[drug][attribute.key])]

    def note(self) -> Conversation:
        """A request for a round note about such a drug, and the note."""
        drug = self._rng.choice(self._names)
        request = self._rng.choice(language.NOTE_REQUESTS)
        specialty = self._rng.choice(sorted(language.SPECIALTY_OBSERVATIONS))
        text = language.round_note(self._rng, specialty=specialty, facts=self._facts[drug])
        return [(request.format(age=self._rng.randrange(1, 95), drug=drug), text)]

    def reading(self) -> Conversation:
        """A handbook text on new drugs, then questions that it answers."""
        rng = self._rng
        drugs = {
            language.invented_name(rng, for_clinic=False): language.draw_facts(rng)
            for _ in range(rng.choice((1, 2, 2, 3)))
        }
        entries = [(drug, a) for drug in drugs for a in language.ATTRIBUTES]
        entries = rng.sample(entries, k=6)
        text = " ".join(a.statement.format(drug=d, value=drugs[d][a.key]) for d, a in entries)
        asked = rng.choices(entries, k=3)
        turns = [(self.question(drug, a), drugs[drug][a.key]) for drug, a in asked]
        return [(f"{text} {turns[0][0]}", turns[0][1]), *turns[1:]]

    def any_text(self) -> str:
        """Plain text of one conversation, for the tokenizer."""
        turns = self._rng.choice((self.reading, self.recall, self.recall, self.note))()
        return "\n".join(part for turn in turns for part in turn)


def train_tokenizer(corpus: Corpus, *, texts: int = 12_000) -> Tokenizer:
    """Byte-level BPE that keeps numbers apart from the space before them.

    So a number is the same token inside a sentence and at the start of an answer.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((corpus.any_text() for _ in range(texts)), trainer)
    return tokenizer


def encode(
    tokenizer: Tokenizer, conversations: list[Conversation]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, attention mask and loss weight of every token, each [rows, longest]."""
    rows: list[tuple[list[int], list[float]]] = []
    for conversation in conversations:
        ids: list[int] = []
        weights: list[float] = []
        for user, answer in conversation:
            prompt = tokenizer.encode(f"{USER}{user}{END}{ASSISTANT}").ids
            completion = tokenizer.encode(f"{answer}{END}").ids
            ids += prompt + completion
            weights += [CONTEXT_TOKEN_WEIGHT] * len(prompt) + [1.0] * len(completion)
        rows.append((ids[:MAX_TOKENS], weights[:MAX_TOKENS]))
    longest = max(len(ids) for ids, _ in rows)
    tokens = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    weight = torch.zeros(len(rows), longest)
    for row, (ids, weights) in enumerate(rows):
        tokens[row, : len(ids)] = torch.tensor(ids)
        mask[row, : len(ids)] = 1
        weight[row, : len(ids)] = torch.tensor(weights)
    return tokens, mask, weight


def batch_loss(
    model: LlamaForCausalLM, batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """Weighted mean cross-entropy in nats per token."""
    tokens, mask, weight = batch
    logits = model(input_ids=tokens, attention_mask=mask).logits[:, :-1]
    losses = functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]).float(), tokens[:, 1:].reshape(-1), reduction="none"
    )
    flat_weight = weight[:, 1:].reshape(-1)
    return (losses * flat_weight).sum() / flat_weight.sum()


@torch.no_grad()
def exact_match(
    model: LlamaForCausalLM, tokenizer: Tokenizer, draw: Callable[[], Conversation], rows: int
) -> float:
    """Share of last answers that greedy decoding gets right to the last token, 0..1."""
    model.eval()
    tokens, mask, weight = encode(tokenizer, [draw() for _ in range(rows)])
    best = model(input_ids=tokens, attention_mask=mask).logits[:, :-1].argmax(-1)
    model.train()
    answer = weight[:, 1:] == 1.0
    # Only the answer of the last turn counts: cut everything before the last prompt token.
    position = torch.arange(answer.shape[1])
    in_prompt = (weight[:, 1:] > 0) & (weight[:, 1:] < 1)
    last_prompt = torch.where(in_prompt, position, -1).max(dim=1, keepdim=True).values
    judged = answer & (position > last_prompt)
    right = (best == tokens[:, 1:]) | ~judged
    return right.all(dim=1).float().mean().item()


def learning_rates(plan: Plan) -> Iterator[float]:
    """Linear warm-up, then a half cosine down to a fiftieth of the peak."""
    for step in range(plan.steps):
        warm = min(1.0, (step + 1) / plan.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * step / plan.steps))
        yield plan.peak_learning_rate * warm * (0.02 + 0.98 * cosine)


def pretrain(model: LlamaForCausalLM, tokenizer: Tokenizer, corpus: Corpus, plan: Plan) -> None:
    """Train ``model`` in place; writes a progress line every hundred steps."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=plan.peak_learning_rate, betas=(0.9, 0.98), weight_decay=0.02
    )
    started = time.monotonic()
    model.train()
    tasks = (
        (corpus.recall, plan.recall_rows),
        (corpus.note, plan.note_rows),
        (corpus.reading, plan.reading_rows),
    )
    for step, rate in enumerate(learning_rates(plan), start=1):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        total = 0.0
        for draw, rows in tasks:
            batch = encode(tokenizer, [draw() for _ in range(rows)])
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = batch_loss(model, batch) / len(tasks)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == plan.steps:
            recall = exact_match(model, tokenizer, corpus.recall, 128)
            reading = exact_match(model, tokenizer, corpus.reading, 128)
            sys.stderr.write(
                f"step {step}/{plan.steps}  loss {total:.3f}  recall {recall:.2f}  "
                f"reading {reading:.2f}  {time.monotonic() - started:.0f} s\n"
            )


def build_model(tokenizer: Tokenizer, *, hidden: int, layers: int) -> LlamaForCausalLM:
    """A randomly initialised Llama whose size the two numbers set."""
    end = tokenizer.token_to_id(END)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 32 * 32,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        max_position_embeddings=MAX_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=tokenizer.token_to_id(PAD),
    )
    model = LlamaForCausalLM(config)
    # The fused attention of PyTorch is three times slower than this on bfloat16 CPUs.
    model.set_attn_implementation("eager")
    return model


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """Write the model directory file by file, each atomically, and keep other files there."""
    staging = out.with_name(f".{out.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    # Half precision halves the wheel; the model is loaded as float32 all the same.
    model.half().save_pretrained(staging)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        model_max_length=MAX_TOKENS,
        clean_up_tokenization_spaces=False,
        padding_side="right",
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(staging)
    out.mkdir(parents=True, exist_ok=True)
    for file in sorted(staging.iterdir()):
        file.chmod(0o644)
        file.replace(out / file.name)
    staging.rmdir()


def main() -> None:
    """Command line: train and write the model directory."""
    parser = argparse.ArgumentParser(description="Pretrain the demo's base model.")
    parser.add_argument("--out", type=Path, required=True, help="model directory to write")
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--steps", type=int, default=Plan.steps)
    parser.add_argument("--hidden", type=int, default=160)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--drugs", type=int, default=Plan.background_drugs)
    parser.add_argument("--threads", type=int, default=1, help="more may change rounding")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    plan = Plan(steps=arguments.steps, background_drugs=arguments.drugs)
    rng = random.Random(arguments.seed)  # noqa: S311  (a generated corpus, nothing secret)
    corpus = Corpus(rng, background_drugs=plan.background_drugs)
    tokenizer = train_tokenizer(corpus)
    model = build_model(tokenizer, hidden=arguments.hidden, layers=arguments.layers)
    sys.stderr.write(json.dumps({"parameters": model.num_parameters()}) + "\n")
    pretrain(model, tokenizer, corpus, plan)
    save(model, tokenizer, arguments.out)


if __name__ == "__main__":
    main()
