"""A folder that would load as another model than it is, or not at all, is refused in one sentence."""

import json
import shutil

import pytest
import torch
from conftest import hugging_face_config, write_tokenizer
from safetensors.torch import load_file, save_file

from helpers import folding, models

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was opened",))


def rewrite(folder, change, name="model.safetensors"):
    """Change the weights of a folder by a function of names and tensors."""
    save_file(change(load_file(folder / "model.safetensors")), folder / name, {"format": "pt"})


def configure(folder, **entries):
    config = json.loads((folder / "config.json").read_text()) | entries
    (folder / "config.json").write_text(json.dumps(config))


def without(*names):
    return lambda state: {key: value for key, value in state.items() if not any(name in key for name in names)}


def pickled(content):
    def spoil(folder):
        (folder / "model.safetensors").unlink()
        torch.save(content, folder / "pytorch_model.bin")

    return spoil


def shards(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def cut(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


SPOILT = {
    "a missing layer": (lambda f: rewrite(f, without("layers.1.")), "weights missing: model.layers.1.input_layernorm"),
    "a missing head": (lambda f: rewrite(f, without("lm_head")), "weights missing: lm_head.weight"),
    "a headless save": (
        lambda f: rewrite(f, lambda s: {k.removeprefix("model."): v for k, v in s.items() if "lm_head" not in k}),
        "weights missing: lm_head.weight",
    ),
    "other names": (lambda f: rewrite(f, lambda s: {f"net.{k}": v for k, v in s.items()}), "weights missing"),
    "one weight too many": (
        lambda f: rewrite(f, lambda s: s | {"model.layers.0.extra.weight": torch.zeros(2)}),
        "weights unexpected: model.layers.0.extra.weight",
    ),
    "another shape": (lambda f: configure(f, intermediate_size=40), "another shape.*mlp.down_proj"),
    "fewer layers": (lambda f: configure(f, num_hidden_layers=2), "weights unexpected: model.layers.2"),
    "a pointer for weights": (
        lambda f: (f / "model.safetensors").write_text(POINTER), "model.safetensors.*git lfs pull"
    ),
    "a pointer for a configuration": (lambda f: (f / "config.json").write_text(POINTER), "config.json.*git lfs pull"),
    "a pointer for a tokenizer": (lambda f: (f / "tokenizer.json").write_text(POINTER), "tokenizer.json.*git lfs pull"),
    "half a file": (cut, "model.safetensors is damaged or not whole"),
    "an empty file": (lambda f: (f / "model.safetensors").write_bytes(b""), "is damaged or not whole"),
    "a missing shard": (shards, "transformers cannot load it.*model-00002-of-00002"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "transformers cannot load it.*no file named"),
    "a broken configuration": (lambda f: (f / "config.json").write_text('{"a": '), "config.json is not valid JSON"),
    "a list for a configuration": (lambda f: (f / "config.json").write_text("[]"), "config.json holds no JSON object"),
    "an unknown kind": (lambda f: configure(f, model_type="mystery"), "cannot read its configuration.*'mystery'"),
    "no kind": (lambda f: (f / "config.json").write_text("{}"), "cannot read its configuration.*None"),
    "code of its own": (
        lambda f: configure(f, auto_map={"AutoModelForCausalLM": "code.Model"}), "config.json asks for code of its own"
    ),
    "a tokenizer's own code": (
        lambda f: (f / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": "code.Tokenizer"}}'),
        "tokenizer_config.json asks for code of its own",
    ),
    "a pickle with code": (pickled({"model.norm.weight": Bomb()}), "can run code, so it is not opened"),
    "a pickle that is none": (
        lambda f: (pickled({})(f), (f / "pytorch_model.bin").write_bytes(b"x" * 99)), "or is damaged"
    ),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path, model_folder):
    """A copy of the Llama folder, with a tokenizer and a file of code that must not run."""
    shutil.copytree(model_folder["llama"], tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    (tmp_path / "model/code.py").write_text("raise SystemExit('the code of a folder was run')")
    return tmp_path / "model"


@pytest.mark.parametrize("spoil, words", SPOILT.values(), ids=SPOILT)
def test_a_spoilt_folder_is_refused(spoil, words, folder, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("something was asked on the terminal"))
    spoil(folder)
    with pytest.raises(ValueError, match=words) as error:
        models.read(str(folder))
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model.", "module._orig_mod."])
def test_known_prefixes_are_stripped(prefix, folder, tiny):
    rewrite(folder, lambda state: {prefix + key: value for key, value in state.items()})
    assert torch.equal(models.read(str(folder)).W_Q, tiny("llama").W_Q)


def test_a_headless_save_of_a_tied_model_is_whole(tmp_path, model_folder, tiny):
    from transformers import GPT2Model

    GPT2Model.from_pretrained(model_folder["gpt2"]).save_pretrained(tmp_path)
    shutil.copy(model_folder["gpt2"] / "config.json", tmp_path)
    assert torch.equal(models.read(str(tmp_path)).W_U, tiny("gpt2").W_U)


def test_a_pickle_of_tensors_alone_loads(folder, tiny):
    pickled(load_file(folder / "model.safetensors"))(folder)
    assert torch.equal(models.read(str(folder)).W_Q, tiny("llama").W_Q)


def tiny_folder(tmp_path, kind, **sizes):
    """A random model of another kind."""
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.for_model(kind, vocab_size=50, hidden_size=32, num_hidden_layers=2, **sizes)
    AutoModel.from_config(config).save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.mark.parametrize("kind, sizes, words", [
    ("bert", dict(num_attention_heads=4, intermediate_size=48), "bert model, an encoder;"),
    ("t5", dict(num_heads=4, d_model=32, d_ff=48, d_kv=8, num_layers=2), "t5 model, an encoder-decoder;"),
    ("mamba", dict(state_size=4, intermediate_size=64), "mamba model, which has no attention heads"),
    ("vit", dict(num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=8), "not a causal language"),
])  # fmt: skip
def test_other_kinds_of_models_are_refused_in_a_sentence(kind, sizes, words, tmp_path):
    with pytest.raises(ValueError, match=words) as error:
        models.read(tiny_folder(tmp_path, kind, **sizes))
    assert "the series is about decoders" in str(error.value) and "\n" not in str(error.value)


def test_a_bridge_that_computes_something_else_is_refused(folder, monkeypatch):
    build = folding.build_bridge_from_module

    def wrong(model, *args, **kwargs):
        model.model.layers[1].mlp.up_proj.weight.data.mul_(1.01)
        return build(model, *args, **kwargs)

    monkeypatch.setattr(folding, "build_bridge_from_module", wrong)
    with pytest.raises(ValueError, match=r"another function than in transformers: .* differs by [\d.e-]+ nats"):
        models.read(str(folder))


def test_only_what_is_exact_is_folded(folder, monkeypatch):
    apply, asked = folding._apply, []

    def damage(bridge, steps):
        asked.append(steps)
        apply(bridge, steps)
        if "layer norms" in steps:
            bridge.blocks[0].attn.q.weight.data.mul_(1.01)

    plain = models.read(str(folder))
    assert plain.folded == ("layer norms", "unembedding") and plain.compatibility_mode
    monkeypatch.setattr(folding, "_apply", damage)
    partly = models.read(str(folder))
    tokens = folding.probe(50)
    assert len(asked) == 2 and partly.folded == ("unembedding",)
    torch.testing.assert_close(folding.log_probs(partly, tokens), folding.log_probs(plain, tokens), atol=1e-4, rtol=0)


@pytest.mark.parametrize("roles", [{}, {"bos_token": "<far>"}, {"eos_token": "A"}])
def test_first_tokens_are_tokens_of_the_model(roles, folder):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {chr(65 + i): i for i in range(50)} | {"<far>": 50}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="A")), **roles)
    tokenizer.save_pretrained(folder)
    bridge = models.read(str(folder))
    ids = (bridge.tokenizer.bos_token_id, bridge.tokenizer.eos_token_id, bridge.tokenizer.pad_token_id)
    assert ids == (0, 0, 0) and bridge(torch.tensor([[ids[0], 5]])).shape == (1, 2, 50)


def test_windows_without_layer_types(tmp_path):
    from transformers import AutoModelForCausalLM, MistralConfig

    for window, expected in ((8, []), (None, [0, 1, 2]), (64, [0, 1, 2])):
        sizes = hugging_face_config("llama").to_dict()
        keep = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
                "num_key_value_heads", "max_position_embeddings")  # fmt: skip
        config = MistralConfig(**{key: sizes[key] for key in keep}, sliding_window=window, head_dim=8)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / str(window))
        assert models.layout(models.read(str(tmp_path / str(window))))["global_layers"] == expected


def test_devices_that_are_not_here(monkeypatch):
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    assert models.pick_device() in ("cpu", "cuda")
    for device in ("gpu", *(() if torch.cuda.is_available() else ("cuda",))):
        with pytest.raises(ValueError, match=f"no device '{device}' here"):
            models.load("induction-2l", device)
