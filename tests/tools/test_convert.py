"""Weights of other formats become folders that `load` reads; what is missing or damaged is said in a sentence."""

import argparse
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import SHORTFORMER, put_in_cache, shortformer_state, write_tokenizer

from helpers import catalog, models
from helpers.catalog import MODELS, ModelUnavailable
from tools import convert
from tools import models as listing


@pytest.fixture
def gguf(tmp_path):
    """A tiny Llama with a byte-level tokenizer, as a GGUF file, and the weights that it holds."""
    from gguf import GGUFWriter

    rng, path = np.random.default_rng(0), tmp_path / "tiny.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(16)
    writer.add_block_count(2)
    writer.add_feed_forward_length(24)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(4)
    writer.add_rope_freq_base(10_000.0)
    tokens = ["<|endoftext|>", *"abc0123456789", "Ġ", "12"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (len(tokens) - 1))
    writer.add_token_merges(["1 2"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_vocab_size(len(tokens))
    shapes = {"token_embd": (len(tokens), 16), "output_norm": (16,)}
    for layer in range(2):
        for name, shape in dict(
            attn_q=(16, 16), attn_k=(8, 16), attn_v=(8, 16), attn_output=(16, 16), attn_norm=(16,),
            ffn_gate=(24, 16), ffn_up=(24, 16), ffn_down=(16, 24), ffn_norm=(16,),
        ).items():  # fmt: skip
            shapes[f"blk.{layer}.{name}"] = shape
    weights = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    for name, value in weights.items():
        writer.add_tensor(f"{name}.weight", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, weights


@pytest.fixture
def wheel(gguf, monkeypatch, empty_cache):
    """A name in the table whose installed wheel is the tiny GGUF file in two parts."""
    data = gguf[0].read_bytes()
    parts = [gguf[0].with_suffix(f".part{i}") for i in range(2)]
    parts[0].write_bytes(data[:1000])
    parts[1].write_bytes(data[1000:])
    gguf[0].unlink()
    source = catalog.Source("wheel", "", "tiny", sha256=convert.hashlib.sha256(data).hexdigest())
    monkeypatch.setitem(MODELS, "tiny", source)
    monkeypatch.setattr(convert, "wheel_files", lambda name: parts)
    return parts


def test_a_gguf_file_in_parts_becomes_a_folder_that_loads(wheel, gguf):
    with pytest.raises(ModelUnavailable, match="pip install tiny` and then `python -m tools convert tiny`"):
        models.read("tiny")
    folder = convert.ensure("tiny")
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    bridge = models.read("tiny")
    assert bridge.compatibility_mode and bridge.tokenizer("ab")["input_ids"] == [0, 1, 2]  # after <|endoftext|>
    assert torch.equal(bridge.blocks[1].mlp.out.weight, torch.from_numpy(gguf[1]["blk.1.ffn_down"]))
    assert bridge.cfg.n_key_value_heads == 2


def test_numbers_are_cut_into_digits_where_the_model_was_trained_so(gguf, tmp_path):
    from transformers import AutoTokenizer

    for split, expected in ((False, ["a", "12", "3"]), (True, ["a", "1", "2", "3"])):
        folder = tmp_path / str(split)
        convert.convert_gguf(gguf[0], folder, split_digits=split)
        assert AutoTokenizer.from_pretrained(folder).tokenize("a123") == expected


def test_a_damaged_file_is_refused_and_converted_again(wheel):
    folder = convert.ensure("tiny")
    weights = folder / "model.safetensors"
    whole, changed = weights.read_bytes(), weights.stat().st_mtime_ns
    assert convert.ensure("tiny") == folder and weights.stat().st_mtime_ns == changed
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ModelUnavailable, match="damaged.*type `python -m tools convert tiny`"):
        models.read("tiny")
    assert convert.main(argparse.Namespace(names=["tiny", "induction-2l"])) == 0
    assert weights.read_bytes() == whole
    shutil.rmtree(folder)
    wheel[1].write_bytes(wheel[1].read_bytes()[:-1])
    with pytest.raises(ModelUnavailable, match="pip install --force-reinstall tiny"):
        convert.ensure("tiny")
    assert not list(folder.parent.iterdir())


def test_an_interrupted_conversion_leaves_nothing(wheel, monkeypatch):
    def fail(gguf_file, folder, split_digits):
        (folder / "half").write_text("x")
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "convert_gguf", fail)
    with pytest.raises(KeyboardInterrupt):
        convert.ensure("tiny")
    assert not list(catalog.converted_folder("tiny", MODELS["tiny"]).parent.iterdir())


def test_names_that_need_nothing_are_left_alone(tmp_path):
    for name in ("induction-2l", "gpt2", "owner/name", str(tmp_path), "ckpt.pt"):
        assert convert.ensure(name) is None
    with pytest.raises(ValueError, match="known names"):
        convert.ensure("induction-3l")


@pytest.mark.parametrize("name", [name for name, source in MODELS.items() if source.kind == "wheel"])
def test_a_missing_wheel_says_what_to_type(name, monkeypatch, empty_cache):
    monkeypatch.setitem(convert.PACKAGES, name, ["gguf", "a package that nobody has"])
    for step in (models.read, convert.ensure):
        with pytest.raises(ModelUnavailable) as error:
            step(name)
        assert f"type `pip install {MODELS[name].repo}`" in str(error.value)
    assert ("--no-deps" in MODELS[name].repo) == (name == "smollm2-135m")


def test_every_model_is_listed_with_its_state(empty_cache, capsys):
    assert listing.main(argparse.Namespace()) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[:-1]]
    assert [row[0] for row in rows] == list(MODELS)
    assert {row[0] for row in rows if row[1] == "ready"} == {"induction-2l", "induction-1l"}


def test_old_formats_load_from_the_cache(tmp_path, empty_cache, monkeypatch):
    (tmp_path / "gpt2").mkdir()
    write_tokenizer(tmp_path / "gpt2")
    (tmp_path / "gpt2/config.json").write_text(json.dumps({"model_type": "gpt2"}))
    put_in_cache(empty_cache, "openai-community/gpt2", "main", tmp_path / "gpt2")
    config = SHORTFORMER | dict(d_mlp=None, act_fn=None, attn_only=True, normalization="LN", tokenizer_name=None)
    for name, positions in (("redwood_attn_2l", True), ("attn-only-2l", False)):
        files = tmp_path / name
        (files / "checkpoints").mkdir(parents=True)
        (files / "config.json").write_text(json.dumps(config | {"shortformer_pos": positions}))
        torch.save(shortformer_state(config, seed=1), files / "model_final.pth")
        torch.save(shortformer_state(config, seed=2), files / "checkpoints/model_1234.pth")
        put_in_cache(empty_cache, MODELS[name].repo, "main", files)
        with pytest.raises(ModelUnavailable, match=f"type `python -m tools convert {name}`"):
            models.read(name)
    tokens = torch.randint(0, 50, (2, 9))
    convert.ensure("redwood_attn_2l")
    redwood = models.read("redwood_attn_2l")
    expected = models.build_shortformer(config, shortformer_state(config, seed=1), "expected")
    torch.testing.assert_close(redwood(tokens), expected(tokens))
    assert len(redwood.tokenizer) == 50 and not redwood.compatibility_mode
    for name in ("attn-only-2l", "attn-only-2l@1234"):
        convert.ensure(name)
    assert listing.is_ready("attn-only-2l", MODELS["attn-only-2l"])
    final, early = (models.read(name) for name in ("attn-only-2l", "attn-only-2l@1234"))
    assert not torch.allclose(final(tokens), early(tokens)) and final.compatibility_mode
    standard = positions_in_the_stream(shortformer_state(config, seed=2), config, tokens)
    torch.testing.assert_close(early(tokens).log_softmax(-1), standard.log_softmax(-1), atol=1e-4, rtol=1e-4)
    listed = ["config.json", "checkpoints/model_1234.pth", "checkpoints/model_56.pth", "model_final.pth"]
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda repo: listed)
    with pytest.raises(ModelUnavailable, match="it has 56, 1234"):
        convert.ensure("attn-only-2l@99")


def positions_in_the_stream(state, config, tokens):
    """Logits of an attention-only model whose positions are added to the embeddings, from the definition."""

    def norm(x, w, b):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * w + b

    n = tokens.shape[1]
    resid = state["embed.W_E"][tokens] + state["pos_embed.W_pos"][:n]
    for layer in range(config["n_layers"]):
        w = {k.split(".attn.")[1]: v for k, v in state.items() if k.startswith(f"blocks.{layer}.attn.")}
        x = norm(resid, state[f"blocks.{layer}.ln1.w"], state[f"blocks.{layer}.ln1.b"])
        q, k, v = (torch.einsum("bsm,hmd->bhsd", x, w[f"W_{i}"]) + w[f"b_{i}"][:, None] for i in "QKV")
        scores = (q @ k.mT / config["d_head"] ** 0.5).masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf)
        resid = resid + torch.einsum("bhsd,hdm->bsm", scores.softmax(-1) @ v, w["W_O"]) + w["b_O"]
    return norm(resid, state["ln_final.w"], state["ln_final.b"]) @ state["unembed.W_U"]


def test_old_formats_without_network_say_so(empty_cache):
    for name in ("redwood_attn_2l", "attn_only_2L_half", "attn-only-2l", "attn-only-1l@12"):
        with pytest.raises(ModelUnavailable, match="cannot be reached; connect to"):
            convert.ensure(name)
