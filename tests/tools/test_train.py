"""The trainer: what it promises of data, order, optimiser and reproducibility."""

import dataclasses
import json
import random

import numpy as np
import pytest
import torch
from conftest import SHORTFORMER, shortformer_state

from helpers import catalog, models, shortformer
from tools import train
from tools.train import Recipe

SMALL = Recipe(
    n_layers=2, steps=200, tokens_per_batch=128, n_ctx=64, short_ctx=32, d_model=32, n_heads=4, d_vocab=60, warmup=5
)  # fmt: skip
STREAM = torch.randint(1, 60, (5_000,), generator=torch.Generator().manual_seed(0)).to(torch.int16)
VOCAB = torch.arange(1, 60)


def test_renaming_is_consistent_within_a_file_and_spares_keywords():
    text = "def value(number):\n    return number + number * other(number)\n" * 2
    renamed = train.rename_identifiers(text, random.Random(0))
    new = train.rename_identifiers(text, random.Random(0))
    assert renamed == new and "number" not in renamed and "return" in renamed and "def value" in renamed
    word = renamed.split("(")[1].split(")")[0]
    assert renamed.count(word) == text.count("number")


def test_batches_are_a_function_of_the_step():
    for step in (0, 8, 9, 9):
        batch = train.batch_at(step, STREAM, VOCAB, SMALL)
        assert torch.equal(batch, train.batch_at(step, STREAM, VOCAB, SMALL))
        assert batch.numel() == SMALL.tokens_per_batch and (batch[:, 0] == 0).all()
    assert train.batch_at(8, STREAM, VOCAB, SMALL).shape[1] == SMALL.n_ctx
    assert train.batch_at(7, STREAM, VOCAB, SMALL).shape[1] == SMALL.short_ctx


def test_a_tenth_of_the_batches_repeats_segments_rarely_enough():
    vocab = torch.arange(1, 800)
    rows = train.repeated_segments(vocab, 16, 511, torch.Generator().manual_seed(0))
    repeats = sum(len(row) - len(set(row)) for row in rows.tolist()) / rows.numel()
    assert rows.shape == (16, 511) and 0.15 < repeats < 0.5
    follows = {}
    for a, b in zip(rows[0].tolist(), rows[0].tolist()[1:]):
        follows.setdefault(a, []).append(b)
    repeated = [nexts for nexts in follows.values() if len(nexts) > 1]
    same = sum(n == nexts[0] for nexts in repeated for n in nexts[1:]) / sum(len(nexts) - 1 for nexts in repeated)
    assert same > 0.8


def test_the_learning_rate_warms_up_holds_and_decays():
    factors = [train.learning_rate_factor(step, SMALL) for step in range(200)]
    assert factors[0] == pytest.approx(0.2) and factors[60] == 1 and factors[-1] == pytest.approx(0.05)
    assert all(a >= b for a, b in zip(factors[100:], factors[101:]))


def run_small(n_layers=2):
    recipe = dataclasses.replace(SMALL, n_layers=n_layers)
    model = train.new_model(recipe).train()
    optimisers = train.optimisers(model, recipe)
    return [loss for _, loss in train.losses_by_step(model, STREAM, VOCAB, recipe, optimisers)], model


def test_the_same_seed_gives_the_same_200_steps_bit_for_bit():
    first, model = run_small()
    second, again = run_small()
    assert len(first) == 200 and first == second
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    assert first[-1] < first[0]


def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path):
    recipe = dataclasses.replace(SMALL, steps=30)
    model = train.new_model(recipe)
    optimisers = train.optimisers(model, recipe)
    steps = train.losses_by_step(model, STREAM, VOCAB, recipe, optimisers)
    losses = [loss for _, (_, loss) in zip(range(15), steps)]
    train.save_reading(tmp_path, model, optimisers, [{"step": 15}])
    losses += [loss for _, loss in steps]

    restored = train.new_model(recipe)
    restored_optimisers = train.optimisers(restored, recipe)
    log = train.resume(restored, restored_optimisers, tmp_path)
    rest = [
        loss for _, loss in train.losses_by_step(restored, STREAM, VOCAB, recipe, restored_optimisers, log[-1]["step"])
    ]
    assert rest == losses[15:]


def test_the_legacy_layout_is_the_trained_model():
    _, model = run_small()
    bridge = models.build_shortformer(train.model_config(SMALL), train.legacy_state(model), "small").eval()
    tokens = STREAM[:60].long().view(2, 30)
    with torch.no_grad():
        torch.testing.assert_close(bridge(tokens), model.eval()(tokens), atol=1e-5, rtol=1e-5)


def test_readings_are_logged_at_60_or_more_log_spaced_steps():
    steps = train.reading_steps(Recipe(n_layers=2).steps)
    assert steps[0] == 0 and steps[-1] == Recipe(n_layers=2).steps and len(steps) >= 60


def test_checkpoints_to_ship_resolve_the_rise():
    log = [{"step": i, "induction_score": [[0.0], [max(0.0, (i - 50) / 50)]]} for i in range(101)]
    steps = train.steps_to_ship(log)
    assert steps[0] == 0 and 7 <= len(steps) <= 10 and sum(step > 50 for step in steps) >= 5


def test_a_corpus_that_is_too_small_is_refused():
    tokenizer = models.load("induction-1l", device="cpu").tokenizer
    with pytest.raises(ValueError, match="are needed"):
        train.token_stream(["x = 1\n"], tokenizer, 1_000)


@pytest.mark.slow
def test_a_trained_model_loads_goes_on_after_a_kill_and_is_shipped(tmp_path, monkeypatch):
    sizes = dict(n_layers=2, d_model=32, n_heads=4, d_vocab=300)
    recipe = Recipe(**sizes, steps=14, tokens_per_batch=512, packages=("networkx",))
    folder, package = tmp_path / "tiny", tmp_path / "package"
    monkeypatch.setitem(train.RECIPES, "induction-2l", recipe)
    monkeypatch.setattr(train, "WEIGHTS_FOLDER", package)
    monkeypatch.setattr(catalog, "WEIGHTS_FOLDER", package)
    save, kept = train.save_reading, []

    def killed_at_the_third(*arguments):
        save(*arguments)
        kept.append(arguments)
        if len(kept) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(train, "save_reading", killed_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        train.train("induction-2l", folder)
    with pytest.raises(ValueError, match="not a model folder"):
        models.read(str(folder))
    train.train("induction-2l", folder)
    log = json.loads((folder / "log.json").read_text())
    assert [reading["step"] for reading in log] == train.reading_steps(14)
    model = models.read(str(folder))
    found = train.readings(model)
    for key, value in log[-1].items():
        if key not in ("step", "tokens", "seconds"):  # the model is stored in half precision
            np.testing.assert_allclose(found[key], value, atol=2e-3)

    (package / "induction-2l/checkpoints").mkdir(parents=True)
    (package / "induction-2l/checkpoints/step7.safetensors").write_text("of another training")
    train.ship("induction-2l", folder)
    assert "step0" in catalog.checkpoints("induction-2l") and "step7" not in catalog.checkpoints("induction-2l")
    shipped, first = models.read("induction-2l"), models.read("induction-2l@step0")
    assert torch.equal(shipped.W_Q, model.W_Q) and not torch.equal(shipped.W_Q, first.W_Q)


def test_quantised_weights_are_within_half_a_step():
    state = shortformer_state(SHORTFORMER)
    restored = shortformer.dequantise(train.quantise(state))
    for key, value in state.items():
        # Half a step from rounding, and the half-precision scale's own error at the largest weight.
        assert (restored[key] - value).abs().max() <= value.abs().max() / 127 * (0.5 + 127 * 2**-11)
