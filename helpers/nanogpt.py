"""Models trained with nanoGPT: `ckpt.pt` becomes a GPT-2 of the transformers library, in memory.

The layout is that of https://github.com/karpathy/nanoGPT, `train.py` and `model.py`. Only tensors
and plain values are read: neither the checkpoint nor `meta.pkl` is ever unpickled as code.
"""

from pathlib import Path

import torch
from torch import Tensor

from helpers.catalog import ModelUnavailable, hub_folder
from helpers.hugging_face import read_json, refuse_damaged, whole

GPT2_VOCABULARY = 50257  # a checkpoint may have more rows: nanoGPT pads them to a multiple of 64
SIZES = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd")
LINEAR = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
NORMS = ("ln_1.weight", "ln_2.weight", "ln_f.weight")


def read_nanogpt(path: Path) -> tuple:
    """(`GPT2LMHeadModel`, tokenizer) of a nanoGPT checkpoint.

    Raises:
        ValueError: no such file, not a nanoGPT checkpoint, or names or shapes of its weights do not match.
        ModelUnavailable: its tokenizer cannot be had here.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    refuse_damaged(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle fails in as many ways as there are bytes
        raise ValueError(f"{path} holds more than tensors and plain values, or is damaged; it was not read") from error
    if not isinstance(checkpoint, dict) or not {"model", "model_args"} <= checkpoint.keys():
        raise ValueError(f"{path} is not a nanoGPT checkpoint: it has no 'model' and 'model_args'")
    sizes = checkpoint["model_args"]
    if lacking := [name for name in SIZES if not isinstance(sizes.get(name), int)]:
        raise ValueError(f"{path}: its model_args lack {', '.join(lacking)}; add what the model was trained with")
    state = {key.removeprefix("_orig_mod."): value.float() for key, value in checkpoint["model"].items()}
    model = _build(path, sizes, state)
    if sizes["vocab_size"] < GPT2_VOCABULARY:
        dataset = str(checkpoint.get("config", {}).get("dataset", ""))
        return model, character_tokenizer(find_characters(path, dataset, sizes["vocab_size"]))
    from transformers import AutoTokenizer

    folder = hub_folder(f"{path}: its tokens are GPT-2's", "openai-community/gpt2", ("tokenizer.json",))
    return model, AutoTokenizer.from_pretrained(folder)


def _build(path: Path, sizes: dict, state: dict[str, Tensor]):
    """A `GPT2LMHeadModel` with nanoGPT's weights; absent biases are zero."""
    from transformers import GPT2Config, GPT2LMHeadModel

    head, embedding = (state.get(key, torch.empty(0)) for key in ("lm_head.weight", "transformer.wte.weight"))
    config = GPT2Config(
        **{name: sizes[name] for name in ("vocab_size", "n_layer", "n_head", "n_embd")},
        n_positions=sizes["block_size"], activation_function="gelu", bos_token_id=None, eos_token_id=None,
        tie_word_embeddings=torch.equal(head, embedding),
    )  # fmt: skip
    # Linear layers of transformers' GPT-2 are stored the other way round.
    state = {key: value.T if key.endswith(LINEAR) else value for key, value in state.items()}
    for key in [key for key in state if key.endswith((*LINEAR, *NORMS))]:
        state.setdefault(key.removesuffix("weight") + "bias", torch.zeros(state[key].shape[-1]))
    return whole(GPT2LMHeadModel, path, None, config=config, state_dict=state)


def find_characters(path: Path, dataset: str, n: int) -> list[str]:
    """The n characters in the order of their ids.

    Looked for beside the checkpoint, then in `data/<dataset>` as nanoGPT has it: `meta.json`, nanoGPT's
    `stoi` as an object; or `input.txt`, the text trained on.

    Raises:
        ValueError: the file found is damaged or has another number of characters.
        ModelUnavailable: there is no such file; says what to do when there is only `meta.pkl`.
    """
    folders = [path.parent, *(up / "data" / dataset for up in path.resolve().parents[:3] if dataset)]
    for file in (folder / name for folder in folders for name in ("meta.json", "input.txt")):
        if file.is_file():
            ids = read_json(file) if file.suffix == ".json" else {c: ord(c) for c in file.read_text(encoding="utf-8")}
            characters = sorted(ids, key=ids.get)
            if len(characters) != n:
                raise ValueError(f"{file} has {len(characters)} different characters, the checkpoint {n}")
            return characters
    wanted = f"put the text it was trained on, as input.txt, beside {path.name}"
    for pickled in (folder / "meta.pkl" for folder in folders if (folder / "meta.pkl").is_file()):
        raise ModelUnavailable(
            f"{path}: its characters are only in {pickled}, and a pickle can run code, so it is not opened; {wanted}, "
            f"""or, if you made the pickle yourself, type `python -c "import json, pickle; json.dump(pickle.load("""
            f"""open('{pickled}', 'rb'))['stoi'], open('{path.parent / "meta.json"}', 'w'))"`"""
        )
    raise ModelUnavailable(f"{path}: which character has which id is not known; {wanted}")


def character_tokenizer(characters: list[str]):
    """One token a character; a character outside the list is left out. BOS is the newline, else the first.

    Raises:
        ValueError: an entry is not one character.
    """
    from tokenizers import Tokenizer, decoders, models

    if wrong := [c for c in characters if len(c) != 1]:
        raise ValueError(f"not a list of single characters: {wrong[:5]}")
    tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate(characters)}, []))
    tokenizer.decoder = decoders.Fuse()
    return shipped_tokenizer("\n" if "\n" in characters else characters[0], tokenizer_object=tokenizer)


def shipped_tokenizer(bos: str = "<|bos|>", **source):
    """A fast tokenizer whose only special token is `bos`, which it puts first."""
    from transformers import PreTrainedTokenizerFast

    special = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), bos)
    # Without these two, TransformerLens would look for the tokenizer again, on the hub.
    return PreTrainedTokenizerFast(**source, **special, add_bos_token=True, name_or_path="shipped")
