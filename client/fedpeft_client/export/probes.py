"""Token sequences on which an export must answer as the adapted model does.

Random tokens of several lengths, a batch, and plain text. None of it is a clinic's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedpeft.errors import ExportDiffers
from fedpeft_client.export.record import Check

BOUND = 1e-4
"""The largest difference of two logits, as a part of the largest logit (or of 1, if that is more).

In float32 the order of summation alone moves logits by some 1e-6 of their size.
"""
_SHAPES = ((1, 1), (1, 2), (1, 7), (3, 17), (2, 64), (1, 200))
"""Rows and tokens of the random probes; cut to the model's context."""
_SENTENCES = (
    "The train to the coast leaves at nine, and the last one back is at half past six.",
    "Question: Which months have thirty days?\nAnswer: April, June, September and November.",
    "She put 3 apples, 2 pears and a lemon into the bowl; then it began to rain.",
)
Answer = Callable[[torch.Tensor], torch.Tensor]
"""Gives logits (rows, tokens, vocabulary) for token ids (rows, tokens)."""


@dataclass(frozen=True, eq=False)
class Expectation:
    """Token ids of shape (rows, tokens), and the adapted model's logits for them."""

    tokens: torch.Tensor
    logits: torch.Tensor


def expect(network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[Expectation]:
    """Ask the adapted model all probes."""
    answer = answers_of(network)
    return [Expectation(tokens, answer(tokens)) for tokens in _probes(network, tokenizer)]


def answers_of(network: PreTrainedModel) -> Answer:
    """Return a network's logits as a function of token ids; dropout is switched off."""
    network.eval()

    @torch.no_grad()
    def answer(tokens: torch.Tensor) -> torch.Tensor:
        logits = network(input_ids=tokens, use_cache=False).logits
        return cast("torch.Tensor", logits).float()

    return answer


def _probes(network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[torch.Tensor]:
    config = cast("Any", network.config).get_text_config()
    longest = int(getattr(config, "max_position_embeddings", None) or 200)
    generator = torch.Generator().manual_seed(0)
    size = int(config.vocab_size)
    random = [
        torch.randint(0, size, (rows, min(length, longest)), generator=generator)
        for rows, length in _SHAPES
    ]
    text = [
        torch.tensor([cast("list[int]", tokenizer(sentence)["input_ids"])[:longest]])
        for sentence in _SENTENCES
    ]
    return random + text


def compare(what: str, answer: Answer, expected: list[Expectation]) -> Check:
    """Ask an export all probes again.

    Raises:
        ExportDiffers: a logit differs by more than ``BOUND`` allows, or is not finite.
    """
    difference = largest = 0.0
    for one in expected:
        found = answer(one.tokens)
        gap = float((found - one.logits).abs().max())
        size = float(one.logits.abs().max())
        if not gap <= BOUND * max(1.0, size):  # not true of NaN either
            raise ExportDiffers(
                f"{what} gives logits that differ by {gap:.2g} from the adapted model's, of which "
                f"the largest is {size:.3g}: nothing was exported; please report it, and export "
                "in another format"
            )
        difference, largest = max(difference, gap), max(largest, size)
    return Check(
        what=what,
        tokens=sum(one.tokens.numel() for one in expected),
        largest_difference=float(f"{difference:.2g}"),
        largest_logit=float(f"{largest:.3g}"),
    )
