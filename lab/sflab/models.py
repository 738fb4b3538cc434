# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tiny models with weights set by hand, written without torch: the real file formats and the real architectures.

The chat model says one fixed sentence and stops; the cross-encoder scores what share of the query's words is in the
document. So answers are readable and a better passage gets a better score, which is what the tests look at.
"""

from __future__ import annotations

import base64
import json
import math
import random
import struct
from array import array
from typing import Any

Matrix = tuple[tuple[int, ...], "array[float]"]

CHAIN = (
    "I", " am", " the", " tiny", " model", " of", " this", " lab", ":", " my", " weights", " were", " set", " by", " hand", ",",
    " so", " every", " question", " gets", " one", " same", " answer", ".", " Put", " a", " real", " card", " into", " your",
    " inventory", " and", " it", " will", " speak", " here", " instead", "!",
)
STOP_WORDS = (
    "a", "an", "and", "are", "as", "at", "be", "been", "but", "by", "can", "could", "did", "do", "does", "for",
    "from", "had", "has", "have", "he", "her", "his", "how", "i", "if", "in", "into", "is", "it", "its", "me",
    "my", "no", "not", "of", "on", "or", "our", "she", "so", "such", "than", "that", "the", "their", "them",
    "then", "there", "these", "they", "this", "to", "was", "we", "were", "what", "when", "where", "which", "who",
    "why", "will", "with", "would", "you", "your",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% elif message['content'] %}{% for part in message['content'] %}{{ part['text'] | default('') }}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def read_ranks(data: bytes, count: int) -> dict[bytes, int]:
    """The first tokens of a tiktoken file: the bytes, then the most frequent merges."""
    ranks: dict[bytes, int] = {}
    for line in data.splitlines()[:count]:
        token, rank = line.split()
        ranks[base64.b64decode(token)] = int(rank)
    return ranks


def split_token(token: bytes, ranks: dict[bytes, int], below: int) -> list[bytes]:
    """Byte pair encoding with the merges below a rank."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 1:
        best = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], below))
        if ranks.get(parts[best] + parts[best + 1], below) >= below:
            break
        parts[best:best + 2] = [parts[best] + parts[best + 1]]
    return parts


def byte_letters() -> dict[int, str]:
    """The printable letter that byte-level tokenizers write for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in plain}
    for byte in range(256):
        if byte not in letters:
            letters[byte] = chr(256 + len(letters) - len(plain))
    return letters


def tokenizer(ranks: dict[bytes, int], specials: list[str], **parts: Any) -> tuple[dict[str, int], bytes]:
    """Vocabulary and tokenizer.json of a byte-level BPE."""
    letters = byte_letters()
    words = {token: "".join(letters[b] for b in token) for token in ranks}
    vocabulary = {words[token]: i for i, token in enumerate(sorted(ranks, key=lambda t: ranks[t]))}
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            pair = split_token(token, ranks, rank)
            if len(pair) == 2:
                merges.append([words[pair[0]], words[pair[1]]])
    added = [{"id": len(vocabulary) + i, "content": word, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False, "special": True} for i, word in enumerate(specials)]
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
             "fuse_unk": False, "byte_fallback": False, "vocab": dict(vocabulary), "merges": merges}
    whole = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
             "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
             "post_processor": None, "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
             "model": model, **parts}
    vocabulary.update({str(entry["content"]): int(str(entry["id"])) for entry in added})
    return vocabulary, json.dumps(whole, ensure_ascii=False).encode()


def as_json(value: Any) -> bytes:
    """A JSON file."""
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def safetensors(tensors: dict[str, Matrix]) -> bytes:
    """The safetensors format: length, header, little-endian floats."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    blobs, offset = [], 0
    for name in sorted(tensors):
        shape, values = tensors[name]
        blob = values.tobytes()
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, offset + len(blob)]}
        offset += len(blob)
        blobs.append(blob)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(blobs)


def zeros(*shape: int) -> Matrix:
    """A tensor of zeros."""
    return shape, array("f", bytes(4 * math.prod(shape)))


def filled(value: float, size: int) -> Matrix:
    """A vector of one value."""
    return (size,), array("f", [value]) * size


def noise(rng: random.Random, scale: float, *shape: int) -> Matrix:
    """Uniform noise of a standard deviation."""
    spread = scale * math.sqrt(12)
    return shape, array("f", [(rng.random() - 0.5) * spread for _number in range(math.prod(shape))])


def put(matrix: Matrix, row: int, column: int, value: float) -> None:
    """Set one element."""
    shape, values = matrix
    values[row * shape[1] + column] = value


def signs(rng: random.Random, count: int) -> list[float]:
    """Random +1 and -1: any two such vectors are nearly orthogonal."""
    bits = rng.getrandbits(count)
    return [1.0 if bits >> i & 1 else -1.0 for i in range(count)]


def chat_model(tiktoken: bytes) -> dict[str, bytes]:
    """Qwen2, 4 layers of 128: a token's successor is written into the output matrix, attention adds a whisper."""
    hidden, layers, heads, kv_heads, inner, context = 128, 4, 4, 2, 256, 4096
    rng = random.Random(20240501)
    ranks = read_ranks(tiktoken, 16000)
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary, tokenizer_json = tokenizer(ranks, specials)
    size = len(vocabulary)
    embedding, head = zeros(size, hidden), zeros(size, hidden)
    for row in range(size):
        embedding[1][row * hidden:(row + 1) * hidden] = array("f", [1.0, *signs(rng, hidden - 1)])
    chain = [ranks[part] for word in CHAIN for part in split_token(word.encode(), ranks, len(ranks))]
    if len(set(chain)) != len(chain):
        raise ValueError("a token is twice in the chat model's sentence: its successor would be ambiguous")
    strength = 0.3
    put(head, chain[0], 0, 60 * strength)  # what follows any token that is not in the sentence
    for token, successor in zip(chain, [*chain[1:], vocabulary["<|im_end|>"]], strict=True):
        for column in range(1, hidden):
            put(head, successor, column, strength * embedding[1][token * hidden + column])
    head_size = hidden // heads
    tensors: dict[str, Matrix] = {"model.embed_tokens.weight": embedding, "lm_head.weight": head, "model.norm.weight": filled(1.0, hidden)}
    for layer in range(layers):
        at = f"model.layers.{layer}."
        for name, out in (("q", hidden), ("k", kv_heads * head_size), ("v", kv_heads * head_size)):
            tensors[f"{at}self_attn.{name}_proj.weight"] = noise(rng, 0.05, out, hidden)
            tensors[f"{at}self_attn.{name}_proj.bias"] = zeros(out)
        tensors[f"{at}self_attn.o_proj.weight"] = noise(rng, 0.002, hidden, hidden)
        tensors[f"{at}mlp.gate_proj.weight"] = noise(rng, 0.05, inner, hidden)
        tensors[f"{at}mlp.up_proj.weight"] = noise(rng, 0.05, inner, hidden)
        tensors[f"{at}mlp.down_proj.weight"] = noise(rng, 0.002, hidden, inner)
        tensors[f"{at}input_layernorm.weight"] = filled(1.0, hidden)
        tensors[f"{at}post_attention_layernorm.weight"] = filled(1.0, hidden)
    end = vocabulary["<|im_end|>"]
    config = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "intermediate_size": inner, "vocab_size": size,
        "max_position_embeddings": context, "rope_theta": 10000.0, "rms_norm_eps": 1e-6, "hidden_act": "silu", "attention_dropout": 0.0,
        "tie_word_embeddings": False, "use_sliding_window": False, "torch_dtype": "float32", "bos_token_id": None, "eos_token_id": end,
        "pad_token_id": vocabulary["<|endoftext|>"], "use_cache": True,
    }
    tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": context, "eos_token": "<|im_end|>",
                        "pad_token": "<|endoftext|>", "clean_up_tokenization_spaces": False, "chat_template": CHAT_TEMPLATE}
    return {"config.json": as_json(config), "tokenizer.json": tokenizer_json, "tokenizer_config.json": as_json(tokenizer_config),
            "generation_config.json": as_json({"eos_token_id": end, "pad_token_id": vocabulary["<|endoftext|>"], "do_sample": False}),
            "model.safetensors": safetensors(tensors)}


def is_content(token: bytes) -> bool:
    """Whether a token says something: neither punctuation nor a stop word."""
    text = token.decode(errors="replace").strip().lower()
    return any(c.isalnum() or c == "\ufffd" for c in text) and text not in STOP_WORDS and not (len(text) == 1 and text.isascii() and text.isalpha())


def cross_encoder(tiktoken: bytes) -> dict[str, bytes]:
    """BERT with one label, 2 layers of 256.

    Every feature stands twice, once negated, and is +1 or -1: so layer normalisation changes nothing. Layer 1: each token
    looks for itself in the document, else at the closing [SEP], and notes whether it found itself. Layer 2: [CLS] takes
    the mean of these notes over the query's content words; the classifier makes a score of it.
    """
    width, hidden, inner, context = 122, 256, 64, 512
    half = hidden // 2
    kind, is_sep, content, constant, found, share = range(width, width + 6)
    rng = random.Random(20240502)
    ranks = read_ranks(tiktoken, 16000)
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    number = {word: len(ranks) + i for i, word in enumerate(specials)}
    pieces = {word: {"id": word, "ids": [number[word]], "tokens": [word]} for word in ("[CLS]", "[SEP]")}

    def piece(word: str, type_id: int) -> dict[str, Any]:
        key = "Sequence" if word in "AB" else "SpecialToken"
        return {key: {"id": word, "type_id": type_id}}

    vocabulary, tokenizer_json = tokenizer(
        ranks, specials, normalizer={"type": "Sequence", "normalizers": [{"type": "NFKC"}, {"type": "Lowercase"}]},
        pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        post_processor={"type": "TemplateProcessing", "special_tokens": pieces,
                        "single": [piece("[CLS]", 0), piece("A", 0), piece("[SEP]", 0)],
                        "pair": [piece("[CLS]", 0), piece("A", 0), piece("[SEP]", 0), piece("B", 1), piece("[SEP]", 1)]})
    size = len(vocabulary)
    words = zeros(size, hidden)
    by_rank = {rank: token for token, rank in ranks.items()}
    for row in range(size):
        values = [*signs(rng, width), 0.0, 1.0 if row == number["[SEP]"] else -1.0,
                  1.0 if row in by_rank and is_content(by_rank[row]) else -1.0, 1.0, 0.0, 0.0]
        words[1][row * hidden:(row + 1) * hidden] = array("f", values + [-v for v in values])
    types = zeros(2, hidden)
    for row, sign in ((0, 1.0), (1, -1.0)):
        put(types, row, kind, sign)
        put(types, row, half + kind, -sign)
    # Of the 256 features 252 are not zero: the norm's gain gives back what it takes.
    gain = math.sqrt((hidden - 4) / hidden)
    tensors: dict[str, Matrix] = {
        "bert.embeddings.word_embeddings.weight": words, "bert.embeddings.token_type_embeddings.weight": types,
        "bert.embeddings.position_embeddings.weight": zeros(context, hidden),
        "bert.embeddings.LayerNorm.weight": filled(gain, hidden), "bert.embeddings.LayerNorm.bias": zeros(hidden),
        "bert.pooler.dense.weight": zeros(hidden, hidden), "bert.pooler.dense.bias": zeros(hidden),
        "classifier.weight": zeros(1, hidden), "classifier.bias": ((1,), array("f", [-6.0])),
    }
    for layer in (0, 1):
        at = f"bert.encoder.layer.{layer}."
        for name in ("query", "key", "value"):
            tensors[f"{at}attention.self.{name}.weight"] = zeros(hidden, hidden)
            tensors[f"{at}attention.self.{name}.bias"] = zeros(hidden)
        for name, rows, columns in (("attention.output", hidden, hidden), ("intermediate", inner, hidden), ("output", hidden, inner)):
            tensors[f"{at}{name}.dense.weight"] = zeros(rows, columns)
            tensors[f"{at}{name}.dense.bias"] = zeros(rows)
            if name != "intermediate":
                tensors[f"{at}{name}.LayerNorm.weight"] = filled(gain, hidden)
                tensors[f"{at}{name}.LayerNorm.bias"] = zeros(hidden)
    scale = math.sqrt(hidden)  # attention divides by it
    one, two = "bert.encoder.layer.0.attention.", "bert.encoder.layer.1.attention."
    for feature in range(width):  # the same token: 20; another: about 0 +- 2
        put(tensors[f"{one}self.query.weight"], feature, feature, 20 / width * scale)
        put(tensors[f"{one}self.key.weight"], feature, feature, 1.0)
    for feature, weight, bias in ((kind, -20.0, -20.0), (is_sep, 6.5, 6.5)):  # only the document, and its [SEP]: 13
        tensors[f"{one}self.query.bias"][1][feature] = scale
        put(tensors[f"{one}self.key.weight"], feature, feature, weight)
        tensors[f"{one}self.key.bias"][1][feature] = bias
    put(tensors[f"{one}self.value.weight"], 0, is_sep, -0.5)
    tensors[f"{one}self.value.bias"][1][0] = 0.5
    for feature in (kind, content):  # only the query's content words
        tensors[f"{two}self.query.bias"][1][feature] = scale
        put(tensors[f"{two}self.key.weight"], feature, feature, 10.0)
    put(tensors[f"{two}self.value.weight"], 0, found, 1.0)
    for at, feature in ((one, found), (two, share)):
        put(tensors[f"{at}output.dense.weight"], feature, 0, 1.0)
        put(tensors[f"{at}output.dense.weight"], half + feature, 0, -1.0)
    put(tensors["bert.pooler.dense.weight"], 0, share, 1.0)
    put(tensors["classifier.weight"], 0, 0, 14.4)
    config = {
        "architectures": ["BertForSequenceClassification"], "model_type": "bert", "hidden_size": hidden, "num_hidden_layers": 2,
        "num_attention_heads": 1, "intermediate_size": inner, "hidden_act": "gelu", "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0, "max_position_embeddings": context, "type_vocab_size": 2, "layer_norm_eps": 1e-12,
        "vocab_size": size, "pad_token_id": vocabulary["[PAD]"], "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0},
        "torch_dtype": "float32", "position_embedding_type": "absolute", "classifier_dropout": None,
    }
    tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": context, "pad_token": "[PAD]", "unk_token": "[UNK]",
                        "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]", "clean_up_tokenization_spaces": False,
                        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}
    return {"config.json": as_json(config), "tokenizer.json": tokenizer_json, "tokenizer_config.json": as_json(tokenizer_config),
            "model.safetensors": safetensors(tensors)}
