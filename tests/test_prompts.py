"""Token batches: their shape, their promises, and what they refuse."""

from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge

from helpers import prompts


@pytest.fixture(scope="module")
def model(two_layers):
    return two_layers


def test_repeated_tokens_are_bos_and_two_equal_copies_without_repeats(model):
    tokens = prompts.repeated_tokens(model, length=30, batch=5, seed=1)
    assert tokens.shape == (5, 61) and (tokens[:, 0] == prompts.bos_id(model)).all()
    assert torch.equal(tokens[:, 1:31], tokens[:, 31:])
    assert all(len(set(row.tolist())) == 30 for row in tokens[:, 1:31])
    ordinary = set(prompts.ordinary_tokens(model).tolist())
    assert set(tokens[:, 1:].flatten().tolist()) <= ordinary


def test_the_seed_decides_and_the_global_state_does_not(model):
    torch.manual_seed(5)
    first = prompts.repeated_tokens(model, seed=1)
    before = torch.get_rng_state()
    assert torch.equal(first, prompts.repeated_tokens(model, seed=1))
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(first, prompts.repeated_tokens(model, seed=2))


def test_ordinary_tokens_are_printable_and_not_special(model):
    ids = prompts.ordinary_tokens(model)
    texts = prompts.token_strings(model, ids)
    assert prompts.bos_id(model) not in ids and all(t.strip() and "\ufffd" not in t for t in texts)
    assert len(ids) > 500


def test_letters_task_is_what_the_published_numbers_used(model):
    task = prompts.letters_task(model)
    assert task.tokens.shape == (64, 37)
    a, b, noise = task.tokens[:, 1], task.tokens[:, 2], task.tokens[:, 3:-2]
    assert torch.equal(task.tokens[:, -2], a) and torch.equal(task.answers, b) and noise.shape == (64, 32)
    assert not (noise == a[:, None]).any() and not (noise == b[:, None]).any()
    letters = {t.strip() for t in prompts.token_strings(model, task.tokens[:, 1:].flatten())}
    assert letters <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZ")


def test_pairs_differ_at_one_position_and_end_alike(model):
    pair = prompts.repeat_task(model, length=7, k=1, batch=7, seed=3)
    different = pair.clean.tokens != pair.corrupted.tokens
    assert different.sum(1).tolist() == [1] * 7 and different[:, 2].all()
    assert torch.equal(pair.clean.answers, pair.corrupted.answers)
    assert (pair.corrupted.tokens[:, :-1] != pair.corrupted.answers[:, None]).all()


@pytest.mark.parametrize("k", [1, 4, 8])
def test_repeat_task_repeats_and_is_corrupted_where_the_answer_stood_first(model, k):
    pair = prompts.repeat_task(model, length=9, k=k, batch=5, seed=2)
    r = pair.clean.tokens[:, 1:10]
    assert torch.equal(pair.clean.tokens[:, 10:], r[:, : k + 1]) and torch.equal(pair.clean.answers, r[:, k])
    different = pair.clean.tokens != pair.corrupted.tokens
    assert different.sum(1).tolist() == [1] * 5 and different[:, 1 + k].all()
    assert (pair.corrupted.tokens[:, :-1] != pair.clean.answers[:, None]).all()
    other = pair.corrupted.tokens[:, 1 + k]
    assert ((pair.corrupted.tokens == other[:, None]).sum(1) == 1).all()


def test_repeat_task_refuses_an_answer_outside_r(model):
    for k in (0, 9):
        with pytest.raises(ValueError, match=f"k = {k} is not within 1 to 8"):
            prompts.repeat_task(model, length=9, k=k)


def test_random_sizes_fit_tiny_models(tiny):
    small = tiny("gpt2")  # 50 tokens, context of 64
    assert prompts.fitting(small, 50) == 24 and prompts.fitting(small, 10) == 10
    assert prompts.fitting(small, 50, copies=3) == 16
    prompts.repeated_tokens(small, prompts.fitting(small, 50), batch=1)
    with pytest.raises(ValueError, match="do not fit 64 positions"):
        prompts.fitting(small, 5, copies=40)


class Tokenizer:
    """A tokenizer with settings of its own, which knows no words."""

    unk_token_id, bos_token_id, eos_token_id = 3, None, None

    def __init__(self, **ids):
        vars(self).update(ids)

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [self.unk_token_id]}


def test_bos_is_an_id_that_the_model_has():
    def bos(tokenizer):
        cfg = SimpleNamespace(d_vocab=10)
        return prompts.bos_id(Mock(spec=TransformerBridge, tokenizer=tokenizer, cfg=cfg))

    assert bos(None) == 0 and bos(Tokenizer()) == 0
    assert bos(Tokenizer(bos_token_id=7, eos_token_id=5)) == 7
    assert bos(Tokenizer(bos_token_id=50, eos_token_id=5)) == 5


def test_letters_that_the_tokenizer_does_not_know_are_refused():
    with pytest.raises(ValueError, match="not 26 single tokens for tiny"):
        cfg = SimpleNamespace(model_name="tiny")
        prompts.letters_task(Mock(spec=TransformerBridge, tokenizer=Tokenizer(), cfg=cfg))


def test_derangement_leaves_nobody_in_place():
    for n in (2, 5, 30):
        partner = prompts.derangement(n, seed=n)
        assert (partner != torch.arange(n)).all() and sorted(partner.tolist()) == list(range(n))
    assert torch.equal(prompts.derangement(9, 4), prompts.derangement(9, torch.Generator().manual_seed(4)))


def test_python_source_starts_with_bos_and_is_held_out(model):
    tokens = prompts.python_source(model, n_texts=3, length=100, seed=0)
    assert tokens.shape == (3, 100) and (tokens[:, 0] == prompts.bos_id(model)).all()
    assert torch.equal(tokens, prompts.python_source(model, n_texts=3, length=100, seed=0))
    assert not torch.equal(tokens, prompts.python_source(model, n_texts=3, length=100, seed=1))


def test_round_trip_of_text(model):
    text = "for i in range(10):\n    print(i)"
    ids = prompts.encode(model, text)
    assert "".join(prompts.token_strings(model, torch.tensor(ids))) == text and prompts.bos_id(model) not in ids


def test_what_cannot_be_built_is_refused(model, tiny):
    with pytest.raises(ValueError, match="empty batch"):
        prompts.with_bos(model, torch.zeros(0, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="context of 512"):
        prompts.repeated_tokens(model, length=300)
    with pytest.raises(ValueError, match="ordinary tokens"):
        prompts.random_tokens(model, 5000, 1, 0)
    with pytest.raises(ValueError, match="no tokenizer"):
        prompts.encode(tiny("shortformer"), "text")
    with pytest.raises(ValueError, match="0 of 2 files"):
        prompts.python_source(model, n_texts=2, length=500, packages=())
    with pytest.raises(ModuleNotFoundError, match="not_installed_here"):
        prompts.source_files(("not_installed_here",))


def test_a_model_without_tokenizer_still_gets_random_prompts(tiny):
    tokens = prompts.repeated_tokens(tiny("gpt2"), length=8, batch=2)
    assert tokens.shape == (2, 17) and (tokens[:, 1:] > 0).all()
    assert prompts.token_strings(tiny("gpt2"), tokens[0])[0] == "0"
