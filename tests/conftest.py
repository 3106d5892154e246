"""Shapes in signatures are checked while the tests run; tiny models of every architecture."""

import json
import os
import re
import shutil
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "agg")
# One thread a worker, kernels included; torch reads this when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from jaxtyping import install_import_hook

install_import_hook(["helpers", "tools"], "beartype.beartype")

import pandas as pd
import pytest
import torch
from browsing import Visit

from helpers import catalog, models

SHORTFORMER = dict(d_model=32, n_layers=2, n_heads=4, d_head=8, n_ctx=64, d_vocab=50, shortformer_pos=True)
SIZES = dict(vocab_size=50, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48)
OUTPUTS = Path(__file__).resolve().parents[1] / "outputs"
ARCHITECTURES = ("shortformer", "gpt2", "gpt-neox", "llama", "gemma3")
# What else a model may do: positions by head (ALiBi), a residual stream inside attention and MLP, an MLP on flattened
# positions, capped, multiplied and divided logits.
UNUSUAL = ("bloom", "opt", "gemma2", "cohere", "granite")


def pytest_addoption(parser):
    parser.addoption("--screenshots", metavar="DIR", help="keep the browser's pictures of the interactive views here")


def pytest_collection_modifyitems(items):
    """Leave to CI, which sets REQUIRE_ALL, what takes minutes and seldom breaks alone."""
    if not os.environ.get("REQUIRE_ALL"):
        for item in items:
            if item.get_closest_marker("ci"):
                item.add_marker(pytest.mark.skip(reason="left to CI; REQUIRE_ALL=1 runs it"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """What shares an expensive fixture goes to one worker: the tests of a notebook, and those of the site."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            shared = re.search(r"(?<=\[)\d\d_[a-z_]+|test_site\.py", nodeid)
            return shared[0] if shared else nodeid

    return Scheduling(config, log)


def shortformer_state(config: dict, seed: int = 0, biases: bool = True) -> dict[str, torch.Tensor]:
    """Random weights in the legacy layout, large enough that no head is idle."""
    generator = torch.Generator().manual_seed(seed)
    d_model, n_heads, d_head = config["d_model"], config["n_heads"], config["d_head"]

    def normal(*shape, scale=0.3):
        return torch.randn(*shape, generator=generator) * scale

    state = {
        "embed.W_E": normal(config["d_vocab"], d_model),
        "pos_embed.W_pos": normal(config["n_ctx"], d_model),
        "unembed.W_U": normal(d_model, config["d_vocab"]),
        "ln_final.w": 1 + normal(d_model),
        "ln_final.b": normal(d_model),
    }
    for layer in range(config["n_layers"]):
        prefix = f"blocks.{layer}."
        state |= {prefix + "ln1.w": 1 + normal(d_model), prefix + "ln1.b": normal(d_model)}
        state |= {prefix + f"attn.W_{name}": normal(n_heads, d_model, d_head) for name in "QKV"}
        state[prefix + "attn.W_O"] = normal(n_heads, d_head, d_model)
        if biases:
            state |= {prefix + f"attn.b_{name}": normal(n_heads, d_head) for name in "QKV"}
            state[prefix + "attn.b_O"] = normal(d_model)
    return state


def hugging_face_config(architecture: str):
    """A three-layer configuration of one architecture, with every feature the series must bear."""
    import transformers as hf

    ends, heads = dict(bos_token_id=0, eos_token_id=0, pad_token_id=0), dict(num_key_value_heads=2)
    sizes = SIZES | dict(max_position_embeddings=64)
    if architecture == "gpt2":
        return hf.GPT2Config(vocab_size=50, n_embd=32, n_layer=3, n_head=4, n_positions=64, **ends)
    if architecture == "bloom":
        return hf.BloomConfig(vocab_size=50, hidden_size=32, n_layer=3, n_head=4, **ends)
    if architecture == "opt":
        return hf.OPTConfig(**sizes, ffn_dim=48, word_embed_proj_dim=32, **ends)
    if architecture == "gpt-neox":
        return hf.GPTNeoXConfig(**sizes, rotary_pct=0.25, **ends)
    if architecture == "gemma2":
        return hf.Gemma2Config(**sizes, **heads, head_dim=8, sliding_window=8, final_logit_softcapping=5.0)
    if architecture == "cohere":
        return hf.CohereConfig(**sizes, **heads, logit_scale=0.2, **ends)
    if architecture == "granite":
        return hf.GraniteConfig(**sizes, **heads, logits_scaling=4.0, residual_multiplier=0.7, **ends)
    if architecture == "llama":
        return hf.LlamaConfig(**sizes, **heads, **ends)
    return hf.Gemma3TextConfig(
        **sizes, num_key_value_heads=1, head_dim=8, sliding_window=8,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"], query_pre_attn_scalar=8,
    )  # fmt: skip


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """architecture -> folder of a random Hugging Face model."""
    from transformers import AutoModelForCausalLM

    folders = {}
    for architecture in (*ARCHITECTURES[1:], *UNUSUAL):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(hugging_face_config(architecture))
        for weight in model.parameters():
            # The default 0.02 leaves attention almost even, so that a wrong head would go unnoticed.
            if weight.ndim == 2:
                torch.nn.init.normal_(weight, std=0.3)
            else:  # norms and biases, which a fold or a sum must not lose
                weight.data.add_(0.2 * torch.randn_like(weight))
        folders[architecture] = tmp_path_factory.mktemp(architecture)
        model.save_pretrained(folders[architecture])
    return folders


@pytest.fixture(scope="session")
def tiny(model_folder):
    """tiny(architecture) -> a loaded bridge with random weights and no tokenizer."""

    def make(architecture: str):
        if architecture == "shortformer":
            if "shortformer" not in made:
                made["shortformer"] = models.build_shortformer(SHORTFORMER, shortformer_state(SHORTFORMER), "tiny")
                made["shortformer"].eval().requires_grad_(False)
            return made["shortformer"]
        return models.load(str(model_folder[architecture]), device="cpu")

    made = {}
    return make


@pytest.fixture(scope="session")
def executed(tmp_path_factory):
    """executed(path) -> folder of the outputs, and errors, of a notebook executed with its exercises examined."""
    from examination import execute

    done = {}

    def once(path):
        if path not in done:
            done[path] = execute(path, tmp_path_factory.mktemp(path.stem), catalog.DEFAULT_MODEL)
        return done[path]

    return once


@pytest.fixture(scope="session")
def summary():
    """summary(notebook, model) -> what a notebook kept, from the committed outputs."""

    def read(notebook: str, model: str = catalog.DEFAULT_MODEL) -> dict:
        path = OUTPUTS / model / notebook / "summary.json"
        if model != catalog.DEFAULT_MODEL and not path.exists():
            pytest.skip(f"{notebook} has no committed outputs of {model}")
        return json.loads(path.read_text())["results"]

    return read


@pytest.fixture(scope="session")
def table():
    """table(notebook, name) -> one of a notebook's tables, from the committed outputs."""
    return lambda notebook, name: pd.read_csv(OUTPUTS / catalog.DEFAULT_MODEL / notebook / f"{name}.csv")


@pytest.fixture(scope="session")
def two_layers():
    """The shipped two-layer model."""
    return models.load("induction-2l", device="cpu")


# ---- a machine on which nothing was downloaded, and what a download leaves behind ----


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """The folder of a hub cache: no converted model, nothing downloaded, no network."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "hub").mkdir()
    return tmp_path / "hub"


def put_in_cache(hub: Path, repo: str, revision: str, files: Path) -> None:
    """What huggingface_hub leaves behind after a download."""
    folder, commit = hub / f"models--{repo.replace('/', '--')}", revision.encode().hex().ljust(40, "0")[:40]
    shutil.copytree(files, folder / "snapshots" / commit)
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / revision).write_text(commit)


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<|endoftext|>": 0} | {chr(64 + i): i for i in range(1, 50)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(BPE(vocabulary, [])), bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )
    tokenizer.save_pretrained(folder)


# ---- a real browser, without which the tests of views are skipped, or fail where nothing may be skipped ----

# Besides drawing without a screen: nothing of the browser's own that asks the network.
FLAGS = ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="module")  # an event loop runs as long as it is open, and the runner's tests need their own
def browser():
    from tools import editions  # not at the top: it brings what makes its pages

    program = editions.browser()
    if program is None and os.environ.get("REQUIRE_ALL"):
        pytest.fail("no browser, and REQUIRE_ALL is set")
    if program is None:
        pytest.skip("no Chromium or Chrome on this machine")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", *FLAGS])
        yield opened
        opened.close()


@pytest.fixture
def visit(browser):
    visits = []

    def open_page(address, offline=True):
        visits.append(Visit(browser, address, offline))
        return visits[-1]

    yield open_page
    for one in visits:
        one.context.close()


@pytest.fixture
def keep_screenshot(request, tmp_path):
    """Where a screenshot goes: to the folder named by `--screenshots`, else to be forgotten."""
    folder = request.config.getoption("--screenshots")
    return lambda name: str((Path(folder) if folder else tmp_path) / f"{name}.png")
