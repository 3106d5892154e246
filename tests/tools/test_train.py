"""The trainer: what it promises of data, order, optimiser and reproducibility."""

import argparse
import dataclasses
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from helpers import catalog, models
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


def test_muon_is_the_newton_schulz_iteration_one_matrix_at_a_time():
    generator = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.randn(16, 16, generator=generator)) for _ in range(3)]
    before = [w.detach().clone() for w in weights]
    for w in weights:
        w.grad = torch.randn(16, 16, generator=generator)
    train.Muon(weights, lr=0.1).step()
    for w, old in zip(weights, before):
        singular = torch.linalg.svdvals((old - w.detach()) / 0.1)
        assert singular.max() < 1.3 and singular.median() > 0.6


def test_muon_agrees_with_torch_up_to_its_precision():
    generator = torch.Generator().manual_seed(1)
    start, gradients = torch.randn(32, 32, generator=generator), torch.randn(3, 32, 32, generator=generator)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    mine = train.Muon([ours], lr=0.1)
    reference = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.0, momentum=0.95, nesterov=True)
    for gradient in gradients:
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        mine.step()
        reference.step()
    # Theirs iterates in bfloat16, whose steps are 2^-8.
    assert ((ours - start) - (theirs - start)).norm() / (ours - start).norm() < 0.05


def test_the_learning_rate_warms_up_holds_and_decays():
    factors = [train.learning_rate_factor(step, SMALL) for step in range(200)]
    assert factors[0] == pytest.approx(0.2) and factors[60] == 1 and factors[-1] == pytest.approx(0.05)
    assert all(a >= b for a, b in zip(factors[100:], factors[101:]))


def run_small(steps=200):
    model = train.new_model(SMALL)
    optimisers = train.optimisers(model, SMALL)
    batches = (train.batch_at(step, STREAM, VOCAB, SMALL) for step in range(steps))
    factors = (train.learning_rate_factor(step, SMALL) for step in range(steps))
    return [train.train_step(model, optimisers, *both) for both in zip(batches, factors)], model


def test_the_same_seed_gives_the_same_200_steps_bit_for_bit():
    first, model = run_small()
    second, again = run_small()
    assert len(first) == 200 and first == second
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    assert first[-1] < first[0]


def test_the_legacy_layout_is_the_trained_model():
    _, model = run_small(20)
    bridge = models.build_shortformer(train.model_config(SMALL), train.legacy_state(model), "small").eval()
    tokens = STREAM[:60].long().view(2, 30)
    with torch.no_grad():
        torch.testing.assert_close(bridge(tokens), model.eval()(tokens), atol=1e-5, rtol=1e-5)


def test_readings_are_logged_at_60_or_more_log_spaced_steps():
    steps = train.reading_steps(Recipe(n_layers=2).steps)
    assert steps[0] == 0 and steps[-1] == Recipe(n_layers=2).steps and len(steps) >= 60


def test_a_checkpoint_is_kept_only_of_a_reading():
    for recipe in train.RECIPES.values():
        assert set(recipe.checkpoints) <= set(train.reading_steps(recipe.steps))


def test_a_corpus_that_is_too_small_is_refused():
    tokenizer = models.load("induction-1l", device="cpu").tokenizer
    with pytest.raises(ValueError, match="too short"):
        train.token_stream(["x = 1\n"], tokenizer, 1_000)


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """A recipe that is trained in seconds, in an empty folder; what is shipped goes there too."""
    recipe = Recipe(n_layers=2, steps=14, tokens_per_batch=512, d_model=32, n_heads=4, d_vocab=300)
    recipe = dataclasses.replace(recipe, packages=("networkx",), checkpoints=(0, 12))
    monkeypatch.setitem(train.RECIPES, "induction-2l", recipe)
    (tmp_path / "weights/induction-2l").mkdir(parents=True)
    shutil.copy(catalog.WEIGHTS_FOLDER / "induction-2l/tokenizer.json", tmp_path / "weights/induction-2l")
    for module in (train, catalog):
        monkeypatch.setattr(module, "WEIGHTS_FOLDER", tmp_path / "weights")
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
def test_a_trained_model_loads_reads_as_logged_and_can_be_shipped(tiny):
    assert train.main(argparse.Namespace(name="induction-2l")) == 0
    folder = Path("training-runs/induction-2l")
    log = json.loads((folder / "log.json").read_text())
    assert [reading["step"] for reading in log] == train.reading_steps(14)
    model = models.read(str(folder))
    found = train.readings(model)
    for key, value in found.items():  # the model is stored in half precision
        np.testing.assert_allclose(log[-1][key], value, atol=2e-3)
    shutil.copytree(folder, catalog.WEIGHTS_FOLDER / "induction-2l", dirs_exist_ok=True)
    assert list(catalog.checkpoints("induction-2l")) == ["step0", "step12"]
    shipped, first = models.read("induction-2l"), models.read("induction-2l@step0")
    assert torch.equal(shipped.W_Q, model.W_Q) and not torch.equal(shipped.W_Q, first.W_Q)


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tiny, monkeypatch):
    def dies(*arguments):
        if len(steps) == 12:
            raise KeyboardInterrupt
        steps.append(arguments)
        return step(*arguments)

    step, steps = train.train_step, []
    monkeypatch.setattr(train, "readings", lambda bridge: {})
    train.train("induction-2l", Path("whole"))
    monkeypatch.setattr(train, "train_step", dies)
    with pytest.raises(KeyboardInterrupt):
        train.train("induction-2l", Path("killed"))
    with pytest.raises(ValueError, match="not a model folder"):
        models.read("killed")
    monkeypatch.setattr(train, "train_step", step)
    train.train("induction-2l", Path("killed"))
    for file in ("model.safetensors", "config.json", "checkpoints/step12.safetensors"):
        assert Path("killed", file).read_bytes() == Path("whole", file).read_bytes()
