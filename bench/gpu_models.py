# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Models with random weights for `make bench-gpu`, of the shapes that models of the catalogue have, made on the device itself. Runs inside an engine's
environment: python bench/gpu_models.py DIRECTORY DEVICE real|tiny NAME..."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tiny_models import HANZI, LETTERS, TEMPLATE, embedding, rerank
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|unknown|>"]
CONTEXT = 4096
# Baichuan2-7B's vocabulary
VOCABULARY = 125696


def chat_tokenizer() -> tuple[PreTrainedTokenizerFast, list[int]]:
    """One token per character, and the ids of Chinese ones; the rest of the vocabulary are characters that nobody asks for."""
    words = [*SPECIAL, "\n", " ", *LETTERS, *HANZI]
    words += [chr(one) for one in range(0xF0000, 0xF0000 + 65000)] + [chr(one) for one in range(0x100000, 0x100000 + 65000)]
    known = {one: at for at, one in enumerate(words[:VOCABULARY])}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="<|unknown|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token="<|unknown|>", chat_template=TEMPLATE,
        model_input_names=["input_ids", "attention_mask"], clean_up_tokenization_spaces=False,
    )  # fmt: skip
    fast.add_special_tokens({"additional_special_tokens": SPECIAL})
    return fast, [known[one] for one in HANZI]


def chat(directory: Path, hidden: int, layers: int, heads: int, intermediate: int) -> None:
    """As Baichuan2-7B, in transformers' own class for that architecture. It never ends by itself, and each token that it says is a Chinese character."""
    tokenizer, spoken = chat_tokenizer()
    tokenizer.save_pretrained(directory)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads, max_position_embeddings=CONTEXT, rms_norm_eps=1e-6, tie_word_embeddings=False, bos_token_id=None, eos_token_id=2,
        pad_token_id=0,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    model: Any = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        silent = torch.ones(VOCABULARY, dtype=torch.bool)
        silent[torch.tensor(spoken)] = False
        model.lm_head.weight.normal_(0, 0.2)
        model.lm_head.weight[silent] = 0
    model.generation_config.do_sample = False
    model.save_pretrained(directory, max_shard_size="2GB")


REAL: dict[str, Callable[[Path], None]] = {
    "Baichuan2-7B-Chat": lambda directory: chat(directory, 4096, 32, 32, 11008),
    "M3E-large": lambda directory: embedding(directory, 24, 1024, 16, 21128),
    "bge-reranker-base": lambda directory: rerank(directory, 12, 768, 12, 250002),
    "bge-reranker-large": lambda directory: rerank(directory, 24, 1024, 16, 250002),
}
TINY: dict[str, Callable[[Path], None]] = {
    "Baichuan2-7B-Chat": lambda directory: chat(directory, 128, 2, 2, 256),
    "M3E-large": lambda directory: embedding(directory, 2, 64, 2, 21128),
    "bge-reranker-base": lambda directory: rerank(directory, 2, 64, 2),
    "bge-reranker-large": lambda directory: rerank(directory, 2, 64, 2),
}


def main() -> None:
    root, device, size = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    for name in sys.argv[4:]:
        temporary = root / f"{name}.new"
        shutil.rmtree(temporary, ignore_errors=True)
        root.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(1)
        with torch.device(device):
            (REAL if size == "real" else TINY)[name](temporary)
        temporary.rename(root / name)


if __name__ == "__main__":
    main()
