# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Loads models and tokenizers whose own code was written for an older transformers, quantizes them and verifies that.

One pinned transformers serves all of them, because the decode loop is ours: what changed most between its versions
(generate(), its cache formats) is never called. What is left is mended here, at load, without touching the weights' files.
"""

from __future__ import annotations

import inspect
import json
import logging
import re
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig, PreTrainedTokenizer
from transformers.cache_utils import Cache
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface, PreTrainedModel

from .prompts import Baichuan2, ChatGLM2, PlainEncoder, PromptFormat, Template

log = logging.getLogger("legacy_chat")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Names that the layer before the vocabulary has in the models of that time; it stays unquantized.
HEADS = ("lm_head", "output_layer", "embed_out")


class LoadError(Exception):
    """Why this model cannot be served as asked; the message holds the remedy."""


def mend_transformers() -> None:
    """Names that remote code from 4.36 on calls and later versions dropped."""
    for name, body in {
        "get_usable_length": lambda self, new, layer_idx=0: self.get_seq_length(layer_idx),
        "get_max_length": lambda self: None,
        "seen_tokens": property(lambda self: self.get_seq_length()),
    }.items():
        if not hasattr(Cache, name):
            setattr(Cache, name, body)
    # Layers on several GPUs: a tuple of caches stays where its layer is instead of travelling with each call.
    if not getattr(PreTrainedModel, "_skip_keys_device_placement", None):
        PreTrainedModel._skip_keys_device_placement = ["past_key_values", "past_key_value", "kv_caches", "kv_cache", "layer_past"]


# ---------------------------------------------------------------- tokenizer


def mended(cls: type[Any]) -> type[Any]:
    """A tokenizer class whose base is initialised last, when what get_vocab() needs is there, and whose _pad takes today's arguments."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        late: dict[str, Any] = {}

        def postponed(_unused: Any, **given: Any) -> None:
            late.update(given)

        with patch.object(PreTrainedTokenizer, "__init__", postponed):
            cls.__init__(self, *args, **kwargs)
        PreTrainedTokenizer.__init__(self, **late)

    members: dict[str, Any] = {"__init__": __init__, "__module__": cls.__module__}
    if "padding_side" not in inspect.signature(cls._pad).parameters:

        def _pad(self: Any, *args: Any, padding_side: str | None = None, **kwargs: Any) -> Any:
            return cls._pad(self, *args, **kwargs)

        members["_pad"] = _pad
    return type(cls.__name__, (cls,), members)


def load_tokenizer(path: str, trust: bool) -> Any:
    settings = Path(path, "tokenizer_config.json")
    try:
        remote = json.loads(settings.read_text(encoding="utf-8")).get("auto_map", {}).get("AutoTokenizer")
    except (OSError, ValueError, AttributeError):
        remote = None
    slow = remote[0] if isinstance(remote, list) else remote
    try:
        if slow:
            if not trust:
                raise LoadError(f"{settings}: auto_map: {slow}: the tokenizer is code of the model's repository; start with --trust-remote-code")
            return mended(get_class_from_dynamic_module(slow, path)).from_pretrained(path)
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust)
    except LoadError:
        raise
    except Exception as error:
        raise LoadError(f"{path}: its tokenizer does not load with this engine: {type(error).__name__}: {error}") from error


def sentencepiece_of(tokenizer: Any) -> Any:
    """The sentencepiece model itself, which these classes keep under one of two names."""
    for holder in (tokenizer, getattr(tokenizer, "tokenizer", None)):
        found = getattr(holder, "sp_model", None)
        if found is not None:
            return found
    raise LoadError(f"{type(tokenizer).__name__}: holds no sentencepiece model; choose --prompt-format template with --chat-template")


def control_of(tokenizer: Any) -> tuple[set[str], set[int]]:
    """Spellings and ids of the control tokens that a tokenizer knows by itself."""
    added = {number: str(one) for number, one in tokenizer.added_tokens_decoder.items() if one.special}
    names = set(added.values()) | {str(one) for one in tokenizer.all_special_tokens}
    return names, set(added) | set(tokenizer.all_special_ids)


def prompt_format(kind: str, tokenizer: Any, config: Any, generation: Any, template: str | None) -> tuple[str, PromptFormat, set[int]]:
    """The format's name, the format, and ids that end an answer beside those of the configuration."""
    if kind == "auto":
        kind = "template" if template else {"chatglm": "chatglm2", "baichuan": "baichuan2"}.get(config.model_type, "template")
    names, ids = control_of(tokenizer)
    if kind == "template":
        if not (template or tokenizer.chat_template):
            raise LoadError("prompt-format: template: the tokenizer has no chat template; give one with --chat-template or choose another --prompt-format")
        # The unknown token stands for honest text, too.
        return kind, Template(tokenizer, template, names, ids - {tokenizer.unk_token_id}), set()
    pieces = sentencepiece_of(tokenizer)
    spelled = {pieces.id_to_piece(one): one for one in range(pieces.get_piece_size())}
    control = {one for piece, one in spelled.items() if pieces.is_control(one) or re.fullmatch(r"<reserved_\d+>", piece)}
    literals = names | {pieces.id_to_piece(one) for one in control}
    if kind == "baichuan2":
        user, assistant = (getattr(generation, name, None) or default for name, default in (("user_token_id", 195), ("assistant_token_id", 196)))
        if max(user, assistant) >= pieces.get_piece_size():
            raise LoadError(f"prompt-format: baichuan2: ids {user} and {assistant} of the roles are not in the vocabulary of {pieces.get_piece_size()} pieces")
        encoder = PlainEncoder(pieces.encode, literals | {pieces.id_to_piece(user), pieces.id_to_piece(assistant)}, control | {user, assistant})
        return kind, Baichuan2(encoder, user, assistant), {user, assistant}
    if "<|user|>" in getattr(getattr(tokenizer, "tokenizer", None), "special_tokens", {}):
        raise LoadError("prompt-format: chatglm2: this tokenizer is ChatGLM3's, whose format differs; give --prompt-format template with --chat-template")
    try:
        prefix = [tokenizer.get_command(one) for one in ("[gMASK]", "sop")]
    except Exception as error:
        raise LoadError(f"prompt-format: chatglm2: the tokenizer has no [gMASK] and sop: {error!r}") from error
    return kind, ChatGLM2(PlainEncoder(pieces.encode, literals, control), prefix), set()


def vocabulary(tokenizer: Any) -> int:
    """Ids from here on have no text; models pad their vocabulary beyond it."""
    return max(len(tokenizer), int(tokenizer.vocab_size))


# ---------------------------------------------------------------- model


class Quantization(BitsAndBytesConfig):
    """Old model code asks it ['load_in_4bit'] to learn whether its own ready-made quantization is meant. It is not."""

    def __getitem__(self, name: str) -> bool:
        return False


def pick_dtype(wanted: str, device: str, config: Any) -> torch.dtype:
    """auto: the width that the weights are stored in, in the 16-bit type that this device computes fast."""
    if wanted != "auto":
        return DTYPES[wanted]
    own = DTYPES.get(str(getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)).removeprefix("torch."))
    if device == "cpu":
        return torch.float32 if own in (None, torch.float32) else torch.bfloat16
    if own == torch.bfloat16 and all(torch.cuda.get_device_capability(one)[0] >= 8 for one in range(torch.cuda.device_count())):
        return own
    return torch.float16


def load_model(path: str, device: str, bits: int, dtype: str, trust: bool) -> tuple[Any, Any, Any]:
    """Model, config and generation config."""
    mend_transformers()
    if device == "cuda" and not torch.cuda.is_available():
        raise LoadError("device: cuda: torch sees no GPU; check nvidia-smi, CUDA_VISIBLE_DEVICES and that this engine has torch for CUDA, or use cpu")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust)
    except Exception as error:
        raise LoadError(f"{path}: config.json does not load: {error}") from error
    if getattr(config, "quantization_config", None) or getattr(config, "quantization_bit", 0):
        raise LoadError(f"{path}: the weights are quantized already; take the 16-bit weights and --quantize-bit {bits}")
    number = pick_dtype(dtype, device, config)
    config.torch_dtype = number
    settings: dict[str, Any] = {"config": config, "trust_remote_code": trust, "dtype": number}
    if device == "cpu":
        settings["device_map"] = {"": "cpu"}
    else:
        settings["device_map"] = "balanced" if torch.cuda.device_count() > 1 else {"": 0}
    if bits != 16:
        settings["quantization_config"] = Quantization(
            load_in_8bit=bits == 8, load_in_4bit=bits == 4, llm_int8_skip_modules=list(HEADS),
            bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=number)
    auto = AutoModelForCausalLM
    remote = getattr(config, "auto_map", None) or {}
    if remote and "AutoModelForCausalLM" not in remote and "AutoModel" in remote:
        auto = AutoModel
    if trust and auto.__name__ in remote:
        made = get_class_from_dynamic_module(remote[auto.__name__], path)
        if "empty_init" in inspect.signature(made.__init__).parameters:
            settings["empty_init"] = False  # else it takes the whole model's memory once more before the weights come
    try:
        model, report = auto.from_pretrained(path, output_loading_info=True, **settings)
    except Exception as error:
        raise LoadError(f"{path}: the model does not load: {type(error).__name__}: {error}") from error
    parameters = {name for name, _unused in model.named_parameters()}
    missing = sorted(parameters.intersection(report["missing_keys"]))
    if missing or report["mismatched_keys"]:
        raise LoadError(f"{path}: weights missing or of another shape: {(missing or list(report['mismatched_keys']))[:4]}: download the model again")
    model.eval().requires_grad_(False)
    verify_quantized(model, bits)
    try:
        generation = GenerationConfig.from_pretrained(path)
    except Exception:  # the file is optional, and an odd one is no reason not to serve
        generation = getattr(model, "generation_config", None) or GenerationConfig()
    return model, config, generation


def verify_quantized(model: Any, bits: int) -> None:
    """Refuses a model that takes the memory of another width than the one asked for."""
    if bits == 16:
        return
    plain, wrong, right = [], [], 0
    for name, module in model.named_modules():
        kind = type(module).__name__
        size = getattr(module, "in_features", 0) * getattr(module, "out_features", 0)
        if kind == {8: "Linear8bitLt", 4: "Linear4bit"}[bits]:
            held = module.weight.numel() * module.weight.element_size()
            # packing for a CPU kernel may round up
            if held * 8 > size * bits * 1.1 + 65536:
                wrong.append(name)
            right += 1
        elif isinstance(module, torch.nn.Linear) and name.rsplit(".", 1)[-1] not in HEADS:
            plain.append(name)
    if plain or wrong or not right:
        raise LoadError(
            f"quantize-bit: {bits}: not honoured by {len(plain) + len(wrong) or 'all'} of {right + len(plain)} layers"
            f" ({', '.join((plain + wrong)[:3]) or 'no linear layer found'}): this model cannot be served in that width, use 16")


# ---------------------------------------------------------------- ALiBi


def slopes(heads: int) -> list[float]:
    """ALiBi's slope of each head: powers of one ratio, and for a count that is no power of two every other one of the next."""
    whole = 1 << (heads.bit_length() - 1)
    found = [2 ** (-8 * (one + 1) / whole) for one in range(whole)]
    return found + [2 ** (-4 * (2 * one + 1) / whole) for one in range(heads - whole)]


def lean_alibi(model: Any) -> Any:
    """Baichuan2-13B builds heads x length x length per row and step. Only the rows of the new tokens are read, so only those are made.

    Returns what undoes it, or None where the model is not of that kind. Masks must then have three dimensions: row, new token, key.
    """
    inner: Any = getattr(model, "model", None)
    if not callable(getattr(inner, "get_alibi_mask", None)) or not hasattr(inner, "n_head"):
        return None
    rate = torch.tensor(slopes(inner.n_head)).view(-1, 1, 1)

    def get_alibi_mask(tensor: torch.Tensor, total: int) -> torch.Tensor:
        new = tensor.shape[1]
        keys = torch.arange(total, device=tensor.device)
        bias = rate.to(tensor.device) * (keys - total + 1).view(1, 1, -1)
        if new == 1:
            return bias.to(tensor.dtype)
        later = keys.view(1, -1) > torch.arange(total - new, total, device=tensor.device).view(-1, 1)
        return bias.expand(-1, new, -1).masked_fill(later, float("-inf")).to(tensor.dtype)

    inner.get_alibi_mask = get_alibi_mask

    def undo() -> None:
        del inner.get_alibi_mask

    return undo


_own_attention = ALL_ATTENTION_FUNCTIONS["sdpa"]


def _grouped_attention(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None,
                       **more: Any) -> tuple[torch.Tensor, Any]:
    rows, heads, new, size = query.shape
    groups = getattr(module, "num_key_value_groups", 1)
    if new != 1 or groups == 1 or (attention_mask is not None and attention_mask.shape[1:3] != (1, 1)):
        return _own_attention(module, query, key, value, attention_mask, **more)
    out = torch.nn.functional.scaled_dot_product_attention(query.view(rows, -1, groups, size), key, value, attn_mask=attention_mask,
                                                           scale=more.get("scaling"))
    return out.view(rows, 1, heads, size), None


def lean_attention(model: Any) -> Any:
    """Heads that share keys are computed as further queries of these, where transformers copies the whole cache for each head in every step.

    Returns what undoes it, or None where no heads share keys or the model has an attention of its own.
    """
    shared = any(getattr(module, "num_key_value_groups", 1) > 1 for module in model.modules())
    if not shared or getattr(model.config, "_attn_implementation", None) != "sdpa":
        return None
    AttentionInterface.register("sdpa", _grouped_attention)
    return lambda: AttentionInterface.register("sdpa", _own_attention)
