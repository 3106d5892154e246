"""Read a model in Hugging Face format, and refuse one that would load as something else than it is."""

import json
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError

# What torch.compile, DataParallel and PEFT put before the names of a model's weights.
PREFIXES = r"^((_orig_mod|module|base_model\.model)\.)+"
CODE = "asks for code of its own (auto_map), which is never run; where transformers knows the model, remove the entry"


def read_json(file: Path) -> dict:
    """The contents of a JSON file.

    Raises:
        ValueError: the file is damaged, only a git-lfs pointer, or wants code of its own to be run.
    """
    refuse_pointer(file)
    try:
        content = dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} holds no JSON object ({error}); fetch the file again") from error
    if "auto_map" in content:
        raise ValueError(f"{file} {CODE}")
    return content


def refuse_pointer(file: Path) -> None:
    """Raise a ValueError where git-lfs left a note instead of the file."""
    with file.open("rb") as start:
        if start.read(23) == b"version https://git-lfs":
            raise ValueError(f"{file} is a git-lfs pointer, not the file itself; type `git lfs pull` in its folder")


def read_hugging_face(folder: Path) -> torch.nn.Module:
    """The causal language model in a folder.

    Raises:
        ValueError: it is another kind of model, a file is damaged, or names or shapes of weights do not match.
    """
    from transformers import AutoModelForCausalLM

    read_json(folder / "config.json")
    for file in (*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")):
        refuse_pointer(file)
    return whole(AutoModelForCausalLM, folder, folder, local_files_only=True, trust_remote_code=False)


def whole(kind: type, source: Path, *args, **options) -> torch.nn.Module:
    """What `kind.from_pretrained` gives, in single precision and with eager attention, which makes patterns.

    Raises:
        ValueError: it gives nothing, or weights of `source` do not match in name or shape; names three of each.
    """
    try:
        model, found = kind.from_pretrained(
            *args, **options, dtype=torch.float32, attn_implementation="eager", key_mapping={PREFIXES: ""},
            ignore_mismatched_sizes=True, output_loading_info=True,
        )  # fmt: skip
    except UnpicklingError as error:
        raise ValueError(
            f"{source}: its pytorch_model.bin holds more than tensors, or is damaged, and a pickle can run code, "
            "so it is not opened; save the model as safetensors"
        ) from error
    except SafetensorError as error:
        raise ValueError(f"{source}: its weights are damaged or not whole ({error}); fetch the files again") from error
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{source}: transformers cannot load it: {str(error).splitlines()[0][:300]}") from error
    wrong = []
    for how, what in (("missing", "missing"), ("unexpected", "unexpected"), ("mismatched", "of another shape")):
        keys = sorted(key[0] if isinstance(key, tuple) else key for key in found[f"{how}_keys"])
        wrong += [f"{what}: {', '.join(keys[:3])}{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}"] * bool(keys)
    if wrong:
        raise ValueError(f"{source}: weights {'; '.join(wrong)}; it would load as another model than was saved")
    return model


def read_tokenizer(folder: Path):
    """The tokenizer of a folder in Hugging Face format, or None where there is none; refuses as `read_json` does."""
    from transformers import AutoTokenizer

    files = [*folder.glob("tokenizer*.json")]
    for file in files:
        read_json(file)
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False) if files else None
