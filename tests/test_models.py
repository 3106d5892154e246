"""The loader: exact arithmetic on every architecture, and clear refusals."""

import json
import shutil

import pytest
import torch
from conftest import ARCHITECTURES, SHORTFORMER, shortformer_state
from safetensors.torch import save_file
from transformer_lens.model_bridge import TransformerBridge

from helpers import catalog, models, shortformer
from helpers.catalog import ModelUnavailable

HOOKS = ("hook_z", "hook_pattern", "hook_q", "hook_k", "hook_v")


def reference_shortformer(state, config, tokens):
    """A shortformer's logits written from the definition, head by head."""

    def norm(x, w, b):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * w + b

    n = tokens.shape[1]
    resid, future = state["embed.W_E"][tokens], torch.ones(n, n).triu(1).bool()
    for layer in range(config["n_layers"]):
        weights = {k.split(".attn.")[1]: v for k, v in state.items() if k.startswith(f"blocks.{layer}.attn.")}
        x = norm(resid, state[f"blocks.{layer}.ln1.w"], state[f"blocks.{layer}.ln1.b"])
        positioned = x + state["pos_embed.W_pos"][:n]
        for h in range(config["n_heads"]):
            q = positioned @ weights["W_Q"][h] + weights["b_Q"][h]
            k = positioned @ weights["W_K"][h] + weights["b_K"][h]
            v = x @ weights["W_V"][h] + weights["b_V"][h]
            scores = (q @ k.mT / config["d_head"] ** 0.5).masked_fill(future, -torch.inf)
            resid = resid + scores.softmax(-1) @ v @ weights["W_O"][h]
        resid = resid + weights["b_O"]
    return norm(resid, state["ln_final.w"], state["ln_final.b"]) @ state["unembed.W_U"]


@pytest.fixture
def tokens():
    return torch.randint(0, 50, (3, 20), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_shortformer_equals_the_definition(seed, tokens):
    state = shortformer_state(SHORTFORMER, seed)
    bridge = models.build_shortformer(SHORTFORMER, state, "tiny").eval()
    expected = reference_shortformer(state, SHORTFORMER, tokens)
    torch.testing.assert_close(bridge(tokens), expected, atol=1e-4, rtol=1e-4)


def test_training_attention_equals_hooked_attention(tokens):
    bridge = models.build_shortformer(SHORTFORMER, shortformer_state(SHORTFORMER), "tiny").eval()
    module = shortformer.ShortformerModel(shortformer.shortformer_config(SHORTFORMER))
    evaluated = module.eval()(tokens)
    torch.testing.assert_close(module.train()(tokens), evaluated, atol=1e-5, rtol=1e-5)
    assert bridge(tokens).shape == evaluated.shape


def test_shortformer_without_norm_as_in_arenas_model(tokens):
    config = SHORTFORMER | {"normalization_type": None}
    state = {k: v for k, v in shortformer_state(config).items() if "ln" not in k}
    bridge = models.build_shortformer(config, state, "no norm").eval()
    resid = state["embed.W_E"][tokens]
    _, cache = bridge.run_with_cache(tokens)
    torch.testing.assert_close(cache["blocks.0.attn.v.hook_in"], resid)
    assert torch.isfinite(bridge(tokens)).all()


def test_value_bias_is_folded(tiny):
    bridge = tiny("shortformer")
    assert bridge.blocks[0].attn.v.bias.abs().max() == 0
    assert bridge.blocks[0].attn.o.bias.abs().max() > 0


def test_legacy_layout_from_a_folder(tmp_path, tokens):
    state = shortformer_state(SHORTFORMER)
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(SHORTFORMER))
    bridge = models.load(str(tmp_path), device="cpu")
    torch.testing.assert_close(bridge(tokens), reference_shortformer(state, SHORTFORMER, tokens), atol=1e-4, rtol=1e-4)


def test_a_missing_weight_is_named():
    state = shortformer_state(SHORTFORMER)
    del state["blocks.1.attn.W_K"]
    with pytest.raises(ValueError, match="blocks.1.attn.k.weight"):
        models.build_shortformer(SHORTFORMER, state, "tiny")


@pytest.mark.parametrize("architecture", ARCHITECTURES[1:])
def test_log_probabilities_equal_hugging_faces(architecture, model_folder, tiny, tokens):
    from transformers import AutoModelForCausalLM

    expected = AutoModelForCausalLM.from_pretrained(model_folder[architecture], attn_implementation="eager")
    with torch.no_grad():
        expected = expected.eval()(tokens).logits.log_softmax(-1)
    found = tiny(architecture)(tokens).log_softmax(-1)
    assert (found - expected).abs().max() < 1e-4
    assert tiny(architecture).compatibility_mode


@pytest.mark.parametrize("architecture", ARCHITECTURES[1:])
def test_folding_equals_the_librarys_own(architecture, model_folder, tiny):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder[architecture], attn_implementation="eager")
    theirs = TransformerBridge.boot_transformers(architecture, hf_model=model, tokenizer=models.load().tokenizer)
    theirs.enable_compatibility_mode()
    ours, found, expected = tiny(architecture), *(bridge.state_dict() for bridge in (tiny(architecture), theirs))
    torch.testing.assert_close(ours.W_U.mean(1), torch.zeros(ours.cfg.d_model), atol=1e-5, rtol=0)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_everything_the_notebooks_read_is_there(architecture, tiny, tokens):
    bridge = tiny(architecture)
    cfg = bridge.cfg
    _, cache = bridge.run_with_cache(tokens)
    for layer in range(cfg.n_layers):
        for name in HOOKS:
            assert f"blocks.{layer}.attn.{name}" in cache
        assert cache["z", layer].shape == (3, 20, cfg.n_heads, cfg.d_head)
        assert cache["pattern", layer].shape == (3, cfg.n_heads, 20, 20)
        for name in ("resid_pre", "resid_post"):
            assert cache[name, layer].shape == (3, 20, cfg.d_model)
    assert bridge.W_Q.shape[:3] == (cfg.n_layers, cfg.n_heads, cfg.d_model)
    assert bridge.W_O.shape[0] == cfg.n_layers and bridge.W_O.shape[-1] == cfg.d_model
    assert bridge.W_E.shape == (50, cfg.d_model) and bridge.W_U.shape == (cfg.d_model, 50)
    assert not bridge.training and not any(p.requires_grad for p in bridge.parameters())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_editing_z_changes_the_logits(architecture, tiny, tokens):
    bridge = tiny(architecture)

    def zero(z, hook):
        return torch.zeros_like(z)

    edited = bridge.run_with_hooks(tokens, fwd_hooks=[("blocks.1.attn.hook_z", zero)])
    assert (edited - bridge(tokens)).abs().max() > 1e-3


def test_loading_twice_gives_the_same_object():
    assert models.load() is models.load("induction-2l", models.pick_device())
    assert models.read("induction-1l") is not models.read("induction-1l")


def test_a_damaged_weight_file_is_refused(tmp_path, monkeypatch):
    shutil.copytree(catalog.WEIGHTS_FOLDER / "induction-1l", tmp_path / "induction-1l")
    damaged = tmp_path / "induction-1l/model.safetensors"
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    monkeypatch.setattr(catalog, "WEIGHTS_FOLDER", tmp_path)
    with pytest.raises(ModelUnavailable, match="damaged.*reinstall the package"):
        models.read("induction-1l")
    damaged.unlink()
    with pytest.raises(ModelUnavailable, match="missing"):
        models.read("induction-1l")


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="config.json"):
        models.load(str(tmp_path))


@pytest.mark.parametrize("name", ["gpt-2", "induction-3l", "", "a/b/c", "gpt2@step1"])
def test_an_unknown_name_lists_the_known(name):
    with pytest.raises(ValueError, match="induction-2l"):
        models.load(name)


def test_shipped_checkpoints_load_and_differ():
    labels = list(catalog.checkpoints("induction-2l"))
    assert labels[0] == "step0" and len(labels) >= 6
    first, last = (models.load(f"induction-2l@{label}", device="cpu") for label in (labels[0], labels[-1]))
    assert (first.W_Q - last.W_Q).abs().max() > 0.1
    with pytest.raises(ValueError, match="step0"):
        models.load("induction-2l@step1")


def test_layout_tells_groups_and_windows(tiny):
    layouts = {name: models.layout(tiny(name)) for name in ARCHITECTURES}
    assert [layouts[name]["n_key_value_heads"] for name in ARCHITECTURES] == [4, 4, 4, 2, 1]
    assert layouts["gemma3"]["global_layers"] == [2] and layouts["llama"]["global_layers"] == [0, 1, 2]


def test_weights_that_are_left_over_missing_or_of_another_shape_are_refused():
    state = shortformer_state(SHORTFORMER)
    wrong = {
        "blocks.1": (SHORTFORMER | {"n_layers": 1}, state),
        "embed": (SHORTFORMER, state | {"embed.W_E": state["embed.W_E"][:, :16]}),
        "unembed": (SHORTFORMER, {key: weight for key, weight in state.items() if key != "unembed.W_U"}),
    }
    for part, (config, weights) in wrong.items():
        with pytest.raises(ValueError, match=f"missing, left over or of the wrong shape: .*{part}"):
            models.build_shortformer(config, weights, "tiny")
