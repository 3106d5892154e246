"""Sweeps equal running the whole model once for each edit, hold little memory, and leave no trace."""

import gc
import inspect
import weakref
from functools import partial

import pytest
import torch
from conftest import ARCHITECTURES, UNUSUAL
from oracles import ablation_loop, cached, measured, patch_loop, peak_bytes, stream_loop
from transformer_lens import patching
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge

from helpers import interventions, sweep
from helpers.interventions import (
    ablate_heads,
    ablate_together,
    patch_edges,
    patch_heads,
    patch_resid,
    patch_together,
)
from helpers.metrics import Metric, answer_loss, evaluate, mean_loss
from helpers.prompts import Prompts, repeated_tokens

LENGTH = 14
TOLERANCE = 2e-5  # losses of these models are up to 10 nats


def batch(seed=0, n=3):
    tokens = torch.randint(1, 50, (n, LENGTH), generator=torch.Generator().manual_seed(seed))
    return Prompts(tokens)


def close(a, b, tolerance=TOLERANCE):
    assert a.shape == b.shape
    assert float((a - b).abs().max()) < tolerance
    assert float(b.abs().max()) > 1e-2  # nothing is compared where nothing happens


@pytest.mark.parametrize("how", interventions.ABLATIONS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_ablating_every_head_equals_the_loop(tiny, architecture, how):
    model = tiny(architecture)
    for seed in range(3):
        prompts = batch(seed)
        metric = answer_loss(prompts)
        expected = ablation_loop(model, prompts.tokens, metric, how, seed=seed)
        close(ablate_heads(model, prompts.tokens, metric, how, seed=seed), expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_position_and_metrics_that_read_many(tiny, architecture):
    model, tokens = tiny(architecture), batch().tokens
    metric = mean_loss(tokens, first=9)
    for position in (3, 10, 12):
        expected = ablation_loop(model, tokens, metric, "mean", position)
        close(ablate_heads(model, tokens, metric, "mean", position), expected)
    last, same = (ablate_heads(model, tokens, metric, "mean", position) for position in ("last", 12))
    assert torch.equal(last, same)
    some = Metric((8, 4), lambda logits, rows: logits[:, 0, 1] - logits[:, 1, 2])
    close(ablate_heads(model, tokens, some), ablation_loop(model, tokens, some, "zero"), 1e-4)


@pytest.mark.parametrize("rotary", ["standard", "rotary"])
def test_models_that_keep_no_keys_and_values(rotary):
    torch.manual_seed(0)
    config = TransformerBridgeConfig(
        d_model=32, n_layers=2, n_heads=4, d_head=8, n_ctx=32, d_vocab=50, d_mlp=64, act_fn="gelu", attn_only=True,
        normalization_type="LN", positional_embedding_type=rotary, architecture="TransformerLensNative",
    )  # fmt: skip
    model = TransformerBridge.boot_native(config).eval().requires_grad_(False)
    for weight in model.original_model.parameters():
        weight.normal_(std=0.3) if weight.ndim == 2 else weight
    prompts = batch()
    metric = answer_loss(prompts)
    for position in (slice(None), 12):
        expected = ablation_loop(model, prompts.tokens, metric, "zero", position)
        close(ablate_heads(model, prompts.tokens, metric, position=12 if position == 12 else None), expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sets_of_heads(tiny, architecture):
    model, prompts = tiny(architecture), batch()
    metric = answer_loss(prompts)
    sets = [[(1, 2)], [(0, 1), (1, 3)], []]
    for how in ("zero", "resample"):
        effects = ablate_together(model, prompts.tokens, metric, sets, how)
        close(effects[:, 0], ablate_heads(model, prompts.tokens, metric, how)[:, 1, 2])
        assert effects[:, 2].abs().max() < TOLERANCE

    def edit(z, hook):
        z[:, :, {0: 1, 1: 3}[hook.layer()]] = 0
        return z

    loss = measured(model, prompts.tokens, metric, [(f"blocks.{layer}.attn.hook_z", edit) for layer in (0, 1)])
    effects = ablate_together(model, prompts.tokens, metric, sets)
    close(effects[:, 1], loss - evaluate(model, prompts.tokens, metric))


@pytest.mark.parametrize("what", ["z", "q", "k", "v", "pattern"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_patching_parts_of_heads_equals_the_loop(tiny, architecture, what):
    model, corrupted, clean = tiny(architecture), batch(0), batch(1)
    metric = answer_loss(corrupted)
    expected = patch_loop(model, corrupted.tokens, clean.tokens, metric, what)
    close(patch_heads(model, corrupted.tokens, clean.tokens, metric, what), expected)
    last = patch_heads(model, corrupted.tokens, clean.tokens, metric, what, "last")
    close(last, patch_loop(model, corrupted.tokens, clean.tokens, metric, what, 12))
    each = patch_heads(model, corrupted.tokens, clean.tokens, metric, what, "each")
    assert each.shape == (*expected.shape, LENGTH)
    close(each[..., 12], last)
    close(each[..., 5], patch_loop(model, corrupted.tokens, clean.tokens, metric, what, 5))
    assert (each[..., 13] == 0).all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_patching_positions_equals_the_loop(tiny, architecture):
    model, corrupted, clean = tiny(architecture), batch(0), batch(1)
    metric = mean_loss(corrupted.tokens, first=8)
    names = {"resid": "blocks.{}.hook_resid_pre", "attn": "blocks.{}.hook_attn_out", "mlp": "blocks.{}.hook_mlp_out"}
    if model.cfg.attn_only:
        with pytest.raises(ValueError, match="cannot patch 'mlp'"):
            patch_resid(model, corrupted.tokens, clean.tokens, metric, names.popitem()[0])
    for what, name in names.items():
        expected = stream_loop(model, corrupted.tokens, clean.tokens, metric, name)
        close(patch_resid(model, corrupted.tokens, clean.tokens, metric, what), expected)


@pytest.mark.parametrize("architecture", UNUSUAL)
def test_models_that_do_more_than_blocks(tiny, architecture):
    model, corrupted, clean = tiny(architecture), batch(0), batch(1)
    metric = answer_loss(corrupted)
    for how, position in (("zero", None), ("mean", "last")):
        at = 12 if position else slice(None)
        expected = ablation_loop(model, corrupted.tokens, metric, how, at)
        close(ablate_heads(model, corrupted.tokens, metric, how, position), expected)
    for what in ("q", "v"):
        expected = patch_loop(model, corrupted.tokens, clean.tokens, metric, what)
        close(patch_heads(model, corrupted.tokens, clean.tokens, metric, what), expected)
    # The last layer's residual stream is the last thing that an edit may go past.
    expected = stream_loop(model, corrupted.tokens, clean.tokens, metric, "blocks.{}.hook_resid_pre")
    close(patch_resid(model, corrupted.tokens, clean.tokens, metric), expected)


def test_what_cannot_be_edited_is_refused(tiny):
    tokens, metric = batch().tokens, answer_loss(batch())
    with pytest.raises(ValueError, match="attention patterns of OPTForCausalLM can be read but not edited"):
        ablate_heads(tiny("opt"), tokens, metric, "pattern-preserving")
    with pytest.raises(ValueError, match="the MLP of BloomForCausalLM adds the residual stream"):
        patch_resid(tiny("bloom"), tokens, batch(1).tokens, metric, "mlp")


@pytest.mark.parametrize("architecture", ["gpt2", "gpt-neox", "llama"])
def test_edges_equal_the_librarys_direct_paths(tiny, architecture):
    model, corrupted, clean = tiny(architecture), batch(0, 1), batch(1, 1)
    metric = answer_loss(corrupted)
    caches = [model.run_with_cache(prompts.tokens)[1] for prompts in (clean, corrupted)]
    baseline = evaluate(model, corrupted.tokens, metric)
    ours, theirs = [], []
    for through in "q" if architecture == "llama" else "qkv":
        edges = patch_edges(model, corrupted.tokens, clean.tokens, metric, (2, 1), through)
        for sender in ((0, 3), (1, 2)):
            patched = patching.get_act_patch_direct_path(
                model, corrupted.tokens, *caches, lambda logits: metric.of(logits[:, [-2]], torch.zeros(1).long())[0],
                *sender, component=through, verbose=False,
            )  # fmt: skip
            ours.append(edges[0, sender[0], sender[1]])
            theirs.append(patched[2, 1] - baseline[0])
    close(torch.stack(ours), torch.stack(theirs), 1e-4)


@pytest.mark.parametrize("architecture", ["shortformer", "gemma3", "granite"])
def test_edges_where_the_library_has_none(tiny, architecture):
    """All edges into all heads of the next layer are, together, the change of that layer's input."""
    model, corrupted, clean = tiny(architecture), batch(0), batch(1)
    metric, last = answer_loss(corrupted), model.cfg.n_layers - 1
    edge = patch_edges(model, corrupted.tokens, clean.tokens, metric, (last, 1), "q")[:, last - 1, 2]
    z = cached(model, clean.tokens, f"blocks.{last - 1}.attn.hook_z")[0]

    def clean_sender(activation, hook):
        activation[:, :, 2] = z[:, :, 2]
        return activation

    block = model.blocks[last - 1]
    stop = {"names_filter": lambda name: True, "stop_at_layer": last}
    caches = []
    for hooks in ([], [(f"blocks.{last - 1}.attn.hook_z", clean_sender)]):
        with torch.no_grad(), model.hooks(fwd_hooks=hooks):
            caches.append(model.run_with_cache(corrupted.tokens, **stop)[1])
    name = f"blocks.{last - 1}.hook_attn_out"
    written = caches[1][name] - caches[0][name]
    resid = model(corrupted.tokens, stop_at_layer=last) + written
    found = []
    hook = model.blocks[last].attn.q.register_forward_hook(lambda _, __, out: found.append(out))
    with torch.no_grad():
        model(resid, start_at_layer=last)
    hook.remove()
    q = found[0].unflatten(2, (4, -1))

    def receive(activation, hook):
        activation[:, :, 1] = q[:, :, 1]
        return activation

    assert ("ln1_post" in block.submodules) == (architecture == "gemma3")
    loss = measured(model, corrupted.tokens, metric, [(f"blocks.{last}.attn.hook_q", receive)])
    close(edge, loss - evaluate(model, corrupted.tokens, metric))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_identities(tiny, architecture):
    model, corrupted = tiny(architecture), batch(0)
    # Clean prompts end like the corrupted ones, so that at the end nothing but heads and MLPs can differ.
    tokens = torch.cat([batch(1).tokens[:, :6], corrupted.tokens[:, 6:]], 1)
    metric = answer_loss(corrupted)
    for what in ("z", "q", "k", "v", "pattern"):
        assert patch_heads(model, tokens, tokens, metric, what).abs().max() < 5e-6
    gap = evaluate(model, tokens, metric) - evaluate(model, corrupted.tokens, metric)
    every = [(layer, head) for layer in range(model.cfg.n_layers) for head in range(model.cfg.n_heads)]
    effects = patch_together(model, corrupted.tokens, tokens, metric, [every, []], mlps=True)
    close(effects[:, 0], gap)
    if model.cfg.attn_only:
        assert effects[:, 1].abs().max() < TOLERANCE
    resid = patch_resid(model, corrupted.tokens, tokens, metric)
    # The last block reads everything it uses of the last position and of six more from the stream.
    assert resid.shape == (3, model.cfg.n_layers, LENGTH)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_model_is_left_as_it_was(tiny, architecture):
    model, prompts = tiny(architecture), batch()
    before = model(prompts.tokens)
    for how in interventions.ABLATIONS:
        ablate_heads(model, prompts.tokens, answer_loss(prompts), how, "last")
    patch_heads(model, prompts.tokens, batch(1).tokens, answer_loss(prompts), "q")
    calls = []

    def interrupt(logits, rows):
        calls.append(rows)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return logits[:, 0, 0]

    with pytest.raises(KeyboardInterrupt):
        ablate_heads(model, prompts.tokens, Metric((-1,), interrupt), "pattern-preserving")
    assert torch.equal(model(prompts.tokens), before)
    assert not any(vars(module).get("forward") for module in model.modules())
    assert torch.is_grad_enabled()


def test_a_sweep_is_gone_after_its_use(tiny, monkeypatch):
    """At once, and not when the garbage collector comes: the next one needs its memory."""
    made, enter = [], sweep.Sweep.__init__
    monkeypatch.setattr(
        sweep.Sweep, "__init__", lambda self, *a, **b: made.append(weakref.ref(self)) or enter(self, *a, **b)
    )
    model, prompts = tiny("gpt2"), batch()
    gc.disable()
    try:
        for position in (None, "last"):
            patch_heads(model, prompts.tokens, batch(1).tokens, answer_loss(prompts), "q", position)
        patch_edges(model, prompts.tokens, batch(1).tokens, answer_loss(prompts), (2, 1))
        assert len(made) == 3 and not any(ref() for ref in made)
    finally:
        gc.enable()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_any_batch_size_gives_the_same(tiny, architecture, monkeypatch):
    model, prompts = tiny(architecture), batch()
    for metric, position in zip((answer_loss(prompts), mean_loss(prompts.tokens, first=9)), (None, "last")):
        effects = []
        for enough in (1, 200_000, 2**26):  # from items one by one to all of them together
            monkeypatch.setattr(sweep, "ENOUGH", enough)
            effects.append(ablate_heads(model, prompts.tokens, metric, position=position))
        close(effects[0], effects[2])
        close(effects[1], effects[2])


@pytest.mark.parametrize("first", [34, 1])
@pytest.mark.parametrize("name", ["zero", "pattern-preserving", "last position", "k", "pattern", "resid", "edges"])
def test_memory_is_that_of_the_record_and_one_batch(two_layers, name, first, monkeypatch):
    """With a batch limit far below the model's own size, so that the record and one forward pass are what is seen."""
    monkeypatch.setattr(sweep, "ENOUGH", 2**20)
    tokens, other = (repeated_tokens(two_layers, 17, 16, seed) for seed in (0, 1))
    metric = mean_loss(tokens, first)
    edits = {
        "last position": partial(patch_heads, position="last"),
        "resid": patch_resid,
        "edges": partial(patch_edges, receiver=(1, 3)),
    }

    def run():
        if name in interventions.ABLATIONS:
            return ablate_heads(two_layers, tokens, metric, name)
        return edits.get(name, partial(patch_heads, what=name))(two_layers, tokens, other, metric)

    def forward():
        with torch.no_grad():
            two_layers(tokens)

    cfg, n = two_layers.cfg, tokens.numel() * (1 if name in interventions.ABLATIONS else 2)
    # Of every block: what enters, z, attention's output, what leaves, keys and values, a part, and patterns.
    record = 4 * n * cfg.n_layers * (7 * cfg.d_model + 2 * cfg.n_heads * tokens.shape[1])
    assert peak_bytes(run) <= record + 2**20 + 2 * peak_bytes(forward)


@pytest.mark.parametrize("through", "qkv")
@pytest.mark.parametrize("architecture", ["shortformer", "gpt2", "llama"])
def test_edges_are_those_of_a_run_with_hooks(tiny, architecture, through):
    """One sender's output from other prompts, in one input of one receiver alone."""
    model, grouped = tiny(architecture), architecture == "llama" and through != "q"
    tokens, others = torch.randint(1, 50, (2, 3, 12), generator=torch.Generator().manual_seed(0))
    layer, metric = model.cfg.n_layers - 1, mean_loss(tokens, first=6)
    name, read = f"blocks.{layer - 1}.attn.hook_z", f"blocks.{layer}.attn.hook_{through}"
    kept = f"blocks.{layer}.attn.hook_{'z' if through == 'v' else 'pattern'}"

    def put(new, axis, reader):
        def edit(value, hook):
            value = value.clone()
            value.select(axis, reader).copy_(new.select(axis, reader))
            return value

        return edit

    with torch.no_grad():
        (_, here), (_, there) = (model.run_with_cache(t) for t in (tokens, others))
        written = (there[name] - here[name])[:, :, 2] @ model.W_O[layer - 1, 2]
        resid = here[f"blocks.{layer}.hook_resid_pre"] + written
        block, position = model.blocks[layer], model.W_pos[:12] if architecture == "shortformer" else 0
        new = getattr(block.attn, through)(block.ln1(resid) + (0 if through == "v" else position))
        whole = [(read, put(new.unflatten(2, (2 if grouped else 4, -1)), 2, 1 if grouped else 3))]
        with model.hooks(fwd_hooks=whole):  # every head that shares the input hears the sender
            group, cache = model.run_with_cache(tokens)
        # Of the group, the receiver alone: what it made of the input, in a run without the edit.
        axis = 2 if through == "v" else 1
        alone = model.run_with_hooks(tokens, fwd_hooks=[(kept, put(cache[kept], axis, 3))])
    rows, baseline = torch.arange(3), evaluate(model, tokens, metric)
    logits = alone if grouped else group
    edges = patch_edges(model, tokens, others, metric, (layer, 3), through)
    close(edges[:, layer - 1, 2], metric.of(logits[:, metric.positions], rows) - baseline)
    if grouped:
        assert (group - alone).abs().max() > 1e-3


def test_a_hook_on_keys_of_the_last_block_is_not_passed_by(tiny):
    model, prompts = tiny("shortformer"), batch()
    metric = answer_loss(prompts)
    name = f"blocks.{model.cfg.n_layers - 1}.attn.hook_k"
    plain = ablate_heads(model, prompts.tokens, metric)
    with model.hooks(fwd_hooks=[(name, lambda k, hook: 0.5 * k)]):
        close(ablate_heads(model, prompts.tokens, metric), ablation_loop(model, prompts.tokens, metric, "zero"))
        assert (ablate_heads(model, prompts.tokens, metric) - plain).abs().max() > 1e-2


def test_bad_input_names_the_value(tiny):
    model, prompts = tiny("gpt2"), batch()
    tokens, metric = prompts.tokens, answer_loss(prompts)

    def refuses(match, call, *args, **kwargs):
        with pytest.raises(ValueError, match=match):
            call(model, *args, **kwargs)

    refuses("head L3H0", ablate_together, tokens, metric, [[(3, 0)]])
    refuses("head L0H4", patch_edges, tokens, tokens, metric, (0, 4))
    refuses(r"empty batch of shape \(0, 14\)", ablate_heads, tokens[:0], metric)
    refuses("position 14 of prompts that have 14", ablate_heads, tokens, Metric((14,), metric.of))
    refuses("position -15", ablate_heads, tokens, metric, position=-15)
    refuses("unknown position 'first'", ablate_heads, tokens, metric, position="first")
    refuses("65 tokens do not fit the context of 64", ablate_heads, tokens.repeat(1, 5)[:, :65], metric)
    refuses("unknown ablation 'nought'", ablate_heads, tokens, metric, "nought")
    refuses("only 1", ablate_heads, tokens[:1], metric, "resample")
    refuses("cannot patch 'w'", patch_heads, tokens, tokens, metric, "w")
    refuses("mean ablation takes other prompts", ablate_heads, tokens[:1], metric, "mean")
    # Unwrapped, because the shape checks of the tests would come first.
    refuses("do not pair up", inspect.unwrap(patch_heads), tokens, tokens[:2], metric)


def test_nan_is_refused(tiny):
    model, prompts = tiny("shortformer"), batch()
    weight = model.original_model.head.weight
    kept = weight[7, 3].clone()
    weight.data[7, 3] = torch.nan
    try:
        with pytest.raises(ValueError, match="nan, first in row 0, read position 0, token 7"):
            ablate_heads(model, prompts.tokens, answer_loss(prompts))
    finally:
        weight.data[7, 3] = kept


def test_resampling_takes_another_prompt():
    for n in (2, 3, 16):
        for seed in range(5):
            partner = interventions.derangement(n, seed)
            assert sorted(partner.tolist()) == list(range(n))
            assert (partner != torch.arange(n)).all()
