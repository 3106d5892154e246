"""What loads is the model that the files hold, folded as far as that is exact; what is refused: test_bad_input.py."""

import shutil

import pytest
import torch
from conftest import hugging_face_config, write_tokenizer
from safetensors.torch import load_file, save_file

from helpers import catalog, folding, hugging_face, models


def rewrite(folder, change):
    """Change the weights of a folder by a function of names and tensors."""
    weights = folder / "model.safetensors"
    save_file(change(load_file(weights)), weights, {"format": "pt"})


@pytest.fixture
def folder(tmp_path, model_folder):
    """A copy of the Llama folder, with a tokenizer."""
    shutil.copytree(model_folder["llama"], tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    return tmp_path / "model"


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
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert torch.equal(models.read(str(folder)).W_Q, tiny("llama").W_Q)


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


def test_weights_that_were_downloaded_alone_get_their_tokenizer(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(catalog, "hub_folder", lambda name, repo, files, revision: asked.append(files) or tmp_path)
    source = catalog.resolve("owner/name")
    catalog.model_folder("owner/name", source)
    (tmp_path / "tokenizer.json").touch()
    catalog.model_folder("owner/name", source)
    assert [files[0] for files in asked] == ["*.safetensors", "tokenizer*", "*.safetensors"]


def test_a_tokenizer_without_its_configuration_is_read(folder):
    (folder / "tokenizer_config.json").unlink(missing_ok=True)
    (folder / "tokenizer.json").unlink(missing_ok=True)
    assert hugging_face.read_tokenizer(folder) is None
    models.load("induction-2l", device="cpu").tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    assert hugging_face.read_tokenizer(folder)("x = 1", add_special_tokens=False)["input_ids"]
