# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Models with random weights for `make bench-models`, of the architectures that the catalogue's models have. They measure speed; what they say means
nothing. Runs inside an engine's environment: python bench/tiny_models.py DIRECTORY."""

from __future__ import annotations

import json
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizerFast,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
)

HANZI = [chr(one) for one in range(0x4E00, 0x9FA6)]
LETTERS = [chr(one) for one in range(33, 127)]
CONTEXT = 512
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def embedding(directory: Path, layers: int, hidden: int, heads: int, vocabulary: int = 0) -> None:
    """As m3e: a BERT with one token per Chinese character, mean pooling, nothing behind it."""
    directory.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{one}" for one in LETTERS), *HANZI]
    (directory / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    BertTokenizerFast(str(directory / "vocab.txt"), model_max_length=CONTEXT).save_pretrained(directory)
    size = max(len(words), vocabulary)
    config = BertConfig(vocab_size=size, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * hidden)
    BertModel(config).save_pretrained(directory)
    part = "sentence_transformers.models"
    pooling = directory / "1_Pooling"
    pooling.mkdir()
    (pooling / "config.json").write_text(json.dumps({"word_embedding_dimension": hidden, "pooling_mode_mean_tokens": True}))
    (directory / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": CONTEXT, "do_lower_case": False}))
    (directory / "modules.json").write_text(
        json.dumps(
            [
                {"idx": 0, "name": "0", "path": "", "type": f"{part}.Transformer"},
                {"idx": 1, "name": "1", "path": "1_Pooling", "type": f"{part}.Pooling"},
            ]
        )
    )


def rerank(directory: Path, layers: int = 6, hidden: int = 384, heads: int = 12, vocabulary: int = 0) -> None:
    """As bge-reranker: XLM-RoBERTa with one label, and its pairs <s> query </s></s> document </s>."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    pieces = [(one, 0.0) for one in special] + [(one, -8.0 - at / 10000) for at, one in enumerate(["▁", *LETTERS, *HANZI])]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=3))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", cls_token="<s>", eos_token="</s>", sep_token="</s>", unk_token="<unk>", pad_token="<pad>",
        model_max_length=CONTEXT,
    ).save_pretrained(directory)  # fmt: skip
    config = XLMRobertaConfig(
        vocab_size=max(len(pieces), vocabulary), hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=4 * hidden, num_labels=1,
        max_position_embeddings=CONTEXT + 2, type_vocab_size=1, bos_token_id=0, pad_token_id=1, eos_token_id=2,
    )  # fmt: skip
    XLMRobertaForSequenceClassification(config).save_pretrained(directory)


def chat(directory: Path) -> None:
    """A Qwen2 of four layers. It never ends by itself, and each token that it says is one Chinese character, so that each makes a chunk with text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    words = {one: at for at, one in enumerate([*special, *letters])}
    spelling = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    merges = []
    for one in HANZI[:1500]:
        [(written, _unused)] = spelling.pre_tokenize_str(one)
        first, second, third = written
        for left, right in ((first, second), (first + second, third)):
            if left + right not in words:
                words[left + right] = len(words)
                merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(words, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=TEMPLATE, model_input_names=["input_ids", "attention_mask"]
    )
    fast.add_special_tokens({"additional_special_tokens": special})
    fast.save_pretrained(directory)
    size = -(-len(words) // 64) * 64
    config = Qwen2Config(
        vocab_size=size, hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=4096, tie_word_embeddings=False, bos_token_id=None, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model: Any = Qwen2ForCausalLM(config)
    silent = [one for one in range(size) if one >= len(words) or fast.decode([one]) not in HANZI]
    with torch.no_grad():
        model.lm_head.weight.normal_(0, 1)
        model.lm_head.weight[silent] = 0
    model.generation_config.do_sample = False
    model.save_pretrained(directory)


MADE = {
    "embedding": lambda directory: embedding(directory, 6, 384, 12),
    "embedding-large": lambda directory: embedding(directory, 24, 1024, 16),
    "rerank": rerank,
    "chat": chat,
}


def main() -> None:
    root = Path(sys.argv[1])
    root.mkdir(parents=True, exist_ok=True)
    for name, make in MADE.items():
        if not (root / name).exists():
            random.seed(1)
            torch.manual_seed(1)
            temporary = root / f"{name}.new"
            shutil.rmtree(temporary, ignore_errors=True)
            make(temporary)
            temporary.rename(root / name)
            print(f"made {name}", flush=True)


if __name__ == "__main__":
    main()
