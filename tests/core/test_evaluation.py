"""Scores against independent ones: Hugging Face's loss, and real greedy decoding."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fedpeft.adapters import save_adapter
from fedpeft.config import AdapterSettings, ModelSettings, TrainingSettings
from fedpeft.data import EncodedExample, encode, read_records
from fedpeft.errors import AdapterError, ConfigError
from fedpeft.evaluation import Score, score
from fedpeft.evaluation.report import evaluate_files
from fedpeft.models import AdaptedModel, initial_state, load_base
from fedpeft.training import Place, train

WORDS = ["tablet", "morning", "fever", "drug", "knee", "patient", "evening", "week", "rest", "walk"]


def write_records(path: Path, count: int) -> Path:
    """Questions whose answers repeat a word of them: some are learnt soon, some are not."""
    lines = [
        json.dumps(
            {
                "question": f"{WORDS[n % 10]} {WORDS[(3 * n + 1) % 10]}?",
                "answer": f"take {WORDS[n % 10]}" if n % 3 else f"{WORDS[(7 * n) % 10]} {n}",
            }
        )
        for n in range(count)
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def trained(embedded_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The embedded model, trained until it knows some answers, and rows of the same kind."""
    base = load_base(
        embedded_model, quantization="none", dtype=torch.float32, device=torch.device("cpu")
    )
    records = read_records(write_records(tmp_path_factory.mktemp("data") / "qa.jsonl", 24))
    examples = encode(records, base.tokenizer, max_length=128).examples
    model = AdaptedModel(base, AdapterSettings(rank=8, alpha=16.0))
    model.load(initial_state(model.schema, 0))
    settings = TrainingSettings(learning_rate=1e-2, local_steps=80, batch_size=8)
    train(model, examples, settings, Place("north", 1, 1))
    return model, list(examples)


def greedy_matches(model: AdaptedModel, row: EncodedExample) -> bool:
    """Say whether real greedy decoding from the prompt writes exactly the answer."""
    first = int(row.targets.argmax())
    prompt = torch.tensor(row.input_ids[:first]).long()[None]
    answer = row.input_ids[first:].tolist()
    with torch.no_grad():
        network: Any = model.base.network
        written = network.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=len(answer),
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
        )[0, first:].tolist()
    return written == answer


def hf_loss(model: AdaptedModel, rows: list[EncodedExample]) -> float:
    total, tokens = 0.0, 0
    for row in rows:
        ids = torch.tensor(row.input_ids).long()[None]
        labels = torch.where(torch.tensor(row.targets)[None], ids, -100)
        with torch.no_grad():
            loss = model.base.network(input_ids=ids, labels=labels).loss
        total += float(loss) * int(row.targets.sum())
        tokens += int(row.targets.sum())
    return total / tokens


def cut(row: EncodedExample) -> EncodedExample:
    return EncodedExample(row.input_ids, row.targets, row.row, True, None)


def test_a_truncated_row_never_matches(trained):
    model, rows = trained
    assert score(model, rows).exact > 0
    assert score(model, [cut(row) for row in rows]).exact == 0


@pytest.mark.parametrize("place", [-1, -2, 0], ids=["end token", "last", "first"])
def test_one_other_token_of_the_answer_is_a_miss(trained, place: int):
    model, rows = trained
    hits = [row for row in rows if score(model, [row]).exact]
    for row in hits:
        ids = row.input_ids.copy()
        at = row.targets.nonzero()[0][place]
        ids[at] = 7 if ids[at] != 7 else 8
        assert score(model, [EncodedExample(ids, row.targets, row.row, False, None)]).exact == 0


def test_exact_match_is_what_greedy_decoding_writes(trained):
    model, rows = trained
    model.eval_mode()
    expected = [greedy_matches(model, row) for row in rows]
    found = [score(model, [row]).exact == 1 for row in rows]
    assert found == expected
    assert 3 <= sum(expected) <= len(rows) - 3


def test_the_loss_is_hugging_faces(trained):
    model, rows = trained
    found = score(model, rows)
    assert found.loss == pytest.approx(hf_loss(model, rows), abs=1e-5)
    assert found.tokens == sum(int(row.targets.sum()) for row in rows)
    assert found.rows == len(rows)


@pytest.mark.parametrize("tokens", [1, 60, 200, 10**6])
def test_what_else_is_in_the_batch_does_not_matter(trained, tokens: int, monkeypatch):
    model, rows = trained
    alone = sum((score(model, [row]) for row in rows), Score())
    monkeypatch.setattr("fedpeft.evaluation.scoring._BATCH_TOKENS", tokens)
    together = score(model, rows[::-1])
    assert together.loss == pytest.approx(alone.loss, abs=1e-5)
    assert (together.exact, together.rows, together.tokens) == (
        alone.exact,
        alone.rows,
        alone.tokens,
    )


def test_scoring_uses_no_dropout_and_changes_nothing(make_model, make_rows):
    model = make_model(AdapterSettings(rank=2, dropout=0.9), noise=0.1)
    model.train_mode(gradient_checkpointing=True)
    rows, before = make_rows([9, 20, 5]), model.read().values
    assert score(model, rows) == score(model, rows)
    assert torch.equal(model.read().values, before)
    assert model.weights.requires_grad


def test_training_goes_on_after_scoring(make_model, make_rows):
    model, rows = make_model(), make_rows([9, 20, 5])
    score(model, rows)
    train(model, rows, TrainingSettings(local_steps=1), Place("north", 1, 1))


def test_scores_of_clinics_add_up_to_the_score_of_all(trained):
    model, rows = trained
    north, south, all_of_them = score(model, rows[:7]), score(model, rows[7:]), score(model, rows)
    both = north + south
    assert both.loss == pytest.approx(all_of_them.loss, abs=1e-5)
    assert (both.exact, both.rows) == (all_of_them.exact, all_of_them.rows)
    assert both.exact_match == both.exact / both.rows


def test_a_score_of_nothing_is_unknown():
    empty = Score()
    assert (empty.loss, empty.perplexity, empty.exact_match) == (None, None, None)


def test_perplexity_is_the_exponential_of_the_loss():
    assert Score(nll=6.0, tokens=3).perplexity == pytest.approx(math.exp(2))
    assert Score(nll=9e9, tokens=3).perplexity == math.inf


# Whole files


def evaluate(model: Path, data: Path, **changes: Any) -> dict[str, Any]:
    options: dict[str, Any] = {
        "adapter": None,
        "layout": None,
        "max_length": None,
        "skip_bad_rows": False,
        "say": lambda _: None,
    }
    return evaluate_files(ModelSettings(base=str(model)), data, **{**options, **changes})


def test_more_tokens_than_the_model_can_read_are_refused(tiny_model: Path, tmp_path: Path):
    data = write_records(tmp_path / "qa.jsonl", 3)
    with pytest.raises(ConfigError, match="max-length 129 is more than the 128 tokens"):
        evaluate(tiny_model, data, max_length=129)


def test_a_missing_adapter_is_refused(tiny_model: Path, tmp_path: Path):
    with pytest.raises(AdapterError):
        evaluate(tiny_model, tmp_path / "qa.jsonl", adapter=tmp_path / "none")


def test_the_report_is_the_score_of_the_file(
    tiny_model: Path, make_model, tmp_path: Path, monkeypatch
):
    monkeypatch.setattr("fedpeft.models.workbench.choose_dtype", lambda *_: torch.float32)
    data = write_records(tmp_path / "qa.jsonl", 12)
    lora = AdapterSettings(rank=4, alpha=8.0)
    model = make_model(lora, noise=0.3)
    save_adapter(model.read(), lora, tmp_path / "adapter", base_name="x")
    rows = encode(read_records(data), model.base.tokenizer, max_length=128).examples
    found = score(model, rows)
    assert evaluate(tiny_model, data, adapter=tmp_path / "adapter") == {
        "schema": 1,
        "rows": 12,
        "tokens": found.tokens,
        "loss": pytest.approx(found.loss, abs=1e-6),
        "perplexity": pytest.approx(found.perplexity, rel=1e-5),
        "exact_match": found.exact_match,
        "truncated": 0,
    }
    base = make_model()
    without = evaluate(tiny_model, data)
    assert without["loss"] == pytest.approx(score(base, rows).loss, abs=1e-6)
    assert without["loss"] != pytest.approx(found.loss, abs=1e-3)
