"""Bad input: what is typed or lies on the disk -> exit code, and words that the one sentence must contain.

Whatever happens, earlier outputs stay byte-identical, and nothing that came as a pickle or as code is run.
Runs that are killed are in tests/tools/test_kills.py.
"""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from tiny_series import contents, good, write_notebook

from helpers import catalog, models
from tools import run
from tools.__main__ import main

SHIPPED = Path(catalog.__file__).parent / "weights/induction-2l"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + 64 * "a" + "\nsize 2375352\n"


class Bomb:
    """Unpickling this makes a file."""

    def __reduce__(self):
        return (os.system, ("touch exploded",))


# ---- models on disk, each broken in its own way ----


def shipped_copy(folder: Path) -> Path:
    """The shipped two-layer model, to be broken."""
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        shutil.copy(SHIPPED / name, folder)
    return folder


def gpt2(folder: Path) -> Path:
    """A random GPT-2 in Hugging Face's format."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = dict(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(folder)
    return folder


def rekeyed(folder: Path, change) -> Path:
    """A GPT-2 whose weights have gone through `change`."""
    weights = gpt2(folder) / "model.safetensors"
    save_file(change(load_file(weights)), weights, metadata={"format": "pt"})
    return folder


def reconfigured(folder: Path, **fields) -> Path:
    config = gpt2(folder) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))
    return folder


def checkpoint(folder: Path, **fields) -> Path:
    """A nanoGPT `ckpt.pt` with sizes and no weights, unless they are given."""
    folder.mkdir()
    sizes = dict(n_layer=1, n_head=2, n_embd=8, block_size=16, vocab_size=10, bias=False)
    torch.save({"model": {}, "model_args": sizes, "config": {}} | fields, folder / "ckpt.pt")
    return folder / "ckpt.pt"


def written(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def truncated(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-100])
    return path


def with_code(folder: Path) -> Path:
    """A model that brings a program of its own, which makes a file."""
    reconfigured(folder, auto_map={"AutoModelForCausalLM": "modeling_own.Own"}, model_type="own")
    return written(folder / "modeling_own.py", "import os\nos.system('touch exploded')\n").parent


def pickled_weights(folder: Path) -> Path:
    (gpt2(folder) / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    return folder


def encoder(folder: Path) -> Path:
    from transformers import BertConfig, BertModel

    sizes = dict(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    BertModel(BertConfig(**sizes, max_position_embeddings=64)).save_pretrained(folder)
    return folder


def encoder_decoder(folder: Path) -> Path:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = dict(vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    T5ForConditionalGeneration(T5Config(**sizes)).save_pretrained(folder)
    return folder


def in_two_files(folder: Path) -> Path:
    """Weights whose index names a second file that is not there."""
    (gpt2(folder) / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"metadata": {}, "weight_map": {"transformer.ln_f.bias": "model-00002-of-00002.safetensors"}}
    return written(folder / "model.safetensors.index.json", json.dumps(index)).parent


def state_space(folder: Path) -> Path:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, state_size=4)
    MambaForCausalLM(config).save_pretrained(folder)
    return folder


def image_model(folder: Path) -> Path:
    from transformers import ViTConfig, ViTModel

    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    ViTModel(ViTConfig(**sizes, image_size=16, patch_size=8)).save_pretrained(folder)
    return folder


# What is on disk -> words of the sentence with which loading refuses it.
BROKEN = {
    "an empty folder": (lambda p: (p.mkdir(), p)[1], ["config.json"]),
    "a broken config": (lambda p: written(shipped_copy(p) / "config.json", "{ not json").parent, ["config.json"]),
    "a config that is a list": (lambda p: written(shipped_copy(p) / "config.json", "[1]").parent, ["config.json"]),
    "a pointer of git-lfs": (
        lambda p: written(gpt2(p) / "model.safetensors", POINTER).parent, ["model.safetensors", "git lfs pull"],
    ),
    "truncated weights": (lambda p: truncated(gpt2(p) / "model.safetensors").parent, ["model.safetensors"]),
    "shipped weights that were changed": (
        lambda p: truncated(shipped_copy(p) / "model.safetensors").parent, ["model.safetensors", "damaged"],
    ),
    "no weights": (lambda p: ((gpt2(p) / "model.safetensors").unlink(), p)[1], [""]),
    "one layer missing": (
        lambda p: rekeyed(p, lambda w: {k: v for k, v in w.items() if ".h.1." not in k}), ["h.1"],
    ),
    "no head": (lambda p: reconfigured(p, tie_word_embeddings=False), ["missing: lm_head.weight"]),
    "one weight too many": (
        lambda p: rekeyed(p, lambda w: w | {"transformer.h.0.extra.weight": torch.zeros(2)}), ["h.0.extra.weight"],
    ),
    "fewer layers than weights": (lambda p: reconfigured(p, n_layer=1), ["unexpected: transformer.h.1"]),
    "a file that is not there": (in_two_files, ["model-00002-of-00002"]),
    "keys of something else": (lambda p: rekeyed(p, lambda w: {f"other.{k}": v for k, v in w.items()}), ["other."]),
    "weights of another shape": (
        lambda p: rekeyed(p, lambda w: w | {"transformer.wte.weight": torch.zeros(49, 32)}),
        ["another shape: transformer.wte.weight"],
    ),
    "weights as a pickle": (pickled_weights, ["pytorch_model.bin", "safetensors"]),
    "a pointer for a configuration": (
        lambda p: written(gpt2(p) / "config.json", POINTER).parent, ["config.json", "git lfs pull"],
    ),
    "a pointer for a tokenizer": (
        lambda p: written(written(gpt2(p) / "tokenizer_config.json", "{}").parent / "tokenizer.json", POINTER).parent,
        ["tokenizer.json", "git lfs pull"],
    ),
    "code of its own": (with_code, ["config.json", "code"]),
    "a tokenizer's own code": (
        lambda p: written(gpt2(p) / "tokenizer_config.json", '{"auto_map": {"AutoTokenizer": "own.Own"}}').parent,
        ["tokenizer_config.json", "code"],
    ),
    "an encoder": (encoder, ["bert", "an encoder", "about decoders"]),
    "an encoder and a decoder": (encoder_decoder, ["t5", "an encoder-decoder", "about decoders"]),
    "a state-space model": (state_space, ["mamba", "no attention heads", "about decoders"]),
    "a model of images": (image_model, ["vit", "not a causal language model"]),
    "an unknown architecture": (lambda p: reconfigured(p, model_type="nobody", architectures=["Nobody"]), ["nobody"]),
    "a checkpoint that is a pickle": (
        lambda p: written(p / "ckpt.pt", pickle.dumps(Bomb())), ["ckpt.pt"],
    ),
    "a checkpoint that holds an object": (lambda p: checkpoint(p, config=Bomb()), ["ckpt.pt"]),
    "a truncated checkpoint": (lambda p: truncated(checkpoint(p)), ["ckpt.pt", "damaged"]),
    "a pointer for a checkpoint": (lambda p: written(p / "ckpt.pt", POINTER), ["ckpt.pt", "git lfs pull"]),
    "a checkpoint that is text": (lambda p: written(p / "ckpt.pt", "hello"), ["ckpt.pt"]),
    "a checkpoint of something else": (lambda p: checkpoint(p, model_args={}), ["ckpt.pt"]),
    "a checkpoint without its vocabulary's size": (
        lambda p: checkpoint(p, model_args=dict(n_layer=1, n_head=2, n_embd=8, block_size=16)), ["vocab_size"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_model_is_refused_in_one_sentence(what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("something was asked on the terminal"))
    make, words = BROKEN[what]
    path = make(tmp_path / "model")
    with pytest.raises((ValueError, catalog.ModelUnavailable)) as refused:
        models.load(str(path), device="cpu")
    sentence = str(refused.value)
    assert "\n" not in sentence and len(sentence) < 500, sentence
    assert all(word.lower() in sentence.lower() for word in words), sentence
    assert not list(tmp_path.rglob("exploded"))


# ---- the command line ----


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder with notebooks, outputs of one of them, and things that are not what they should be."""
    write_notebook(tmp_path / "notebooks", "01_good", good("01_good"))
    write_notebook(tmp_path / "notebooks", "02_fails", "1 / 0")
    write_notebook(tmp_path / "notebooks", "03_dies", "import os\nos._exit(1)")
    write_notebook(tmp_path / "bare", "01_bare", "print('no parameters')", parameters=None)
    written(tmp_path / "damaged/01_damaged.ipynb", "{ not json")
    monkeypatch.setattr(run, "NOTEBOOKS", tmp_path / "notebooks")
    monkeypatch.chdir(tmp_path)
    earlier = tmp_path / "outputs/induction-2l/02_attention_visualization"
    shutil.copytree(run.ROOT / "outputs/induction-2l/02_attention_visualization", earlier)
    shutil.copytree(earlier, tmp_path / "outputs/induction-2l/01_good")
    shutil.copy(tmp_path / "notebooks/01_good.ipynb", tmp_path / "outputs/induction-2l")
    (tmp_path / "broken/x/02_attention_visualization").mkdir(parents=True)
    written(tmp_path / "broken/x/02_attention_visualization/summary.json", '{"notebook": "02_at')
    (tmp_path / "nothing").mkdir()
    written(tmp_path / "file", "a file")
    (tmp_path / "taken").mkdir()
    written(tmp_path / "taken/induction-2l", "a file where a folder should be")
    (tmp_path / "mine").mkdir()
    written(tmp_path / "mine/thesis.txt", "not a site")
    return tmp_path


# What is typed -> (exit code, words of the message).
COMMANDS = {
    "": (2, ["COMMAND"]),
    "frobnicate": (2, ["frobnicate", "run"]),
    "run --frobnicate": (2, ["--frobnicate"]),
    "run --model gpt-2": (2, ["unknown model 'gpt-2'", "induction-2l"]),
    "run --model induction-2l gpt-2": (2, ["unknown model 'gpt-2'"]),
    "run --model ./nowhere": (2, ["unknown model './nowhere'"]),
    "run --model smollm2-135m@step5": (2, ["no training checkpoints"]),
    "run --model": (2, ["--model"]),
    "run --notebooks 77": (2, ["no notebook '77'", "01_good"]),
    "run --notebooks good": (2, ["no notebook 'good'"]),
    "run -p nothing 1": (2, ["no parameter 'nothing'", "size, rate, flag"]),
    "run -p model_name x": (2, ["no parameter 'model_name'"]),
    "run -p size": (2, ["-p"]),
    "run -p size x": (2, ["size", "int"]),
    "run -p size 1.5": (2, ["size", "int"]),
    "run -p size True": (2, ["size", "int"]),
    "run -p size 0": (2, ["size", "at least 1", "0"]),
    "run -p size -5": (2, ["size", "at least 1", "-5"]),
    "run -p size 51": (2, ["size", "at most 50"]),
    "run -p rate 0": (2, ["rate", "above 0"]),
    "run -p rate nan": (2, ["rate", "float"]),
    "run -p rate 1e999": (2, ["rate", "float"]),
    "run -p flag maybe": (2, ["flag", "bool"]),
    "run -p flag 1": (2, ["flag", "bool"]),
    "run --jobs 0": (2, ["--jobs", "at least 1"]),
    "run --jobs two": (2, ["--jobs", "two"]),
    "run --out file": (2, ["exists", "file"]),
    "run --out file/below": (2, ["Not a directory", "file"]),
    "run --out taken": (2, ["Not a directory", "taken/induction-2l"]),
    "run --out /proc/outputs": (2, ["/proc/outputs"]),
    "run --model nothing": (2, ["config.json"]),
    "run --notebooks 1 01 01_good 02": (1, ["02_fails on induction-2l failed at cell 3: ZeroDivisionError", "1 of 2"]),
    "run --notebooks 03": (1, ["03_dies on induction-2l failed at DeadKernelError", "0 of 1"]),
    "report --outputs nothing": (2, ["run --model"]),
    "report --model other": (2, ["no outputs of other"]),
    "report --outputs broken": (2, ["summary.json", "damaged"]),
    "editions --out file": (2, ["file", "folder"]),
    "site --out mine": (2, ["mine", "is not a site"]),
    "site --outputs nothing": (2, ["make run"]),
    "site --outputs file": (2, ["make run"]),
    "train induction-9l": (2, ["unknown recipe 'induction-9l'", "induction-2l"]),
    "train": (2, ["name"]),
    "convert gpt-9": (2, ["unknown model 'gpt-9'"]),
    "check gpt-9": (2, ["unknown model 'gpt-9'"]),
    "check nothing": (2, ["config.json"]),
}  # fmt: skip


def outcome(arguments: list[str]) -> int:
    try:
        return main(arguments)
    except SystemExit as ended:  # argparse's own refusals
        return ended.code


@pytest.mark.parametrize("typed", COMMANDS)
def test_a_mistake_has_its_exit_code_and_its_sentence_and_loses_nothing(typed, place, capsys):
    before = contents(place)
    code, words = COMMANDS[typed]
    assert outcome(typed.split()) == code
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err
    assert all(word in shown.out + shown.err for word in words), shown
    if code == 2 and not shown.err.startswith("usage"):
        assert shown.err.count("\n") == 1 and shown.err.startswith("error: ")
    now = contents(place)
    # What a run has replaced, because it succeeded.
    new = [place / "outputs/induction-2l" / name for name in ("01_good", "01_good.ipynb", "report.md")]
    changed = [path for path in before if now.get(path) != before[path]]
    assert not [path for path in changed if code != 1 or not {path, *path.parents} & set(new)]
    assert not list(place.glob("*/.staging-*"))


@pytest.mark.parametrize(
    "folder, words", [("bare", "no cell tagged 'parameters'"), ("damaged", "is damaged or no notebook")]
)
def test_a_notebook_that_is_none_is_named_before_work(folder, words, place, monkeypatch, capsys):
    monkeypatch.setattr(run, "NOTEBOOKS", place / folder)
    assert main(["run"]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_a_second_run_into_one_folder_is_refused(place, capsys):
    with FileLock(place / "outputs/.lock"):
        assert main(["run", "--notebooks", "01"]) == 2
    assert "another run is writing into" in capsys.readouterr().err
    assert main(["run", "--notebooks", "01"]) == 0


def test_a_full_disk_fails_that_notebook_and_the_others_go_on(place, monkeypatch, capsys):
    before = contents(place)

    def full(path, text):
        if "01_good" in path.name:
            raise OSError(28, "No space left on device")
        return write_text(path, text)

    write_text = run.write_text
    monkeypatch.setattr(run, "write_text", full)
    write_notebook(place / "notebooks", "02_fails", good("02_fails"))
    assert main(["run", "--notebooks", "01", "02"]) == 1
    shown = capsys.readouterr()
    assert "01_good on induction-2l failed at OSError: [Errno 28] No space left on device" in shown.err
    assert "1 of 2 notebooks done" in shown.out
    assert contents(place / "outputs/induction-2l/01_good").items() <= before.items()


def test_an_executed_notebook_that_is_damaged_is_named(place, capsys):
    written(place / "outputs/induction-2l/01_good.ipynb", "{ not json")
    assert main(["site", "--out", "pages"]) == 2
    assert "01_good.ipynb is damaged or no notebook" in capsys.readouterr().err
    assert not (place / "pages").exists()


def test_the_table_is_long_enough():
    assert len(COMMANDS) + len(BROKEN) >= 40
