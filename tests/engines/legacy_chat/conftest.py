# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tiny models of every kind that the engine serves, and the engine itself on a port of this machine."""

from __future__ import annotations

import asyncio
import io
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
FILES = HERE.parents[2] / "roles" / "model_server" / "files"
os.environ.update(HF_HOME=tempfile.mkdtemp(prefix="legacy-chat-hf-"), HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
sys.path[:0] = [str(FILES), str(HERE.parents[1] / "support")]
sys.dont_write_bytecode = True  # the role copies that directory as it is

import httpx  # noqa: E402
import sentencepiece  # noqa: E402
import torch  # noqa: E402
import uvicorn  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402
from legacy_chat.__main__ import arguments, build  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402
from transformers import AutoConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM  # noqa: E402

settings.register_profile("gate", derandomize=True, max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
settings.load_profile("gate")

TEXT = [
    "A model server answers questions about documents, and every answer ends somewhere.",
    "模型服务回答关于文档的问题，每个回答都有结尾。 你好，世界！ 请问今天天气怎么样？",
    "Requests run in one batch; a new one joins, a finished one leaves, nobody waits for the longest.",
    "知识库的检索需要向量和重排，量化可以节省显存。 😀🚀",
    "question answer round system user assistant tool result call name 0 1 2 3 4 5 6 7 8 9",
]
TEXTS_LONG = ["你好", TEXT[0] * 2, TEXT[1] * 3]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def sentencepieces(path: Path, symbols: list[str]) -> int:
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT * 4), model_writer=out, vocab_size=700 if symbols else 500, model_type="bpe", byte_fallback=True,
        character_coverage=0.98, user_defined_symbols=symbols, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, hard_vocab_limit=False,
        add_dummy_prefix=False, remove_extra_whitespaces=False, normalization_rule_name="identity", minloglevel=2)
    path.write_bytes(out.getvalue())
    return int(sentencepiece.SentencePieceProcessor(model_proto=out.getvalue()).get_piece_size())


def save(model: Any, directory: Path, silent: list[int]) -> None:
    """Random weights that give varied text, as the .bin that these repositories have; the silent tokens are never chosen."""
    torch.manual_seed(7)
    weights = {}
    for name, one in model.state_dict().items():
        plain = torch.randn(one.shape) * (0.35 if one.dim() > 1 else 0.05) + (1 if "norm" in name and name.endswith("weight") else 0)
        if one.dim() > 1 and "head" in name or "output_layer" in name:
            plain[silent] = 0
        weights[name] = plain
    torch.save(weights, directory / "pytorch_model.bin")


def remote(kind: str, directory: Path, **config: Any) -> Path:
    shutil.copytree(HERE / "remote" / ("glm" if kind == "glm" else "baichuan"), directory)
    symbols = [] if kind == "glm" else [f"<reserved_{one - 89 if one > 89 else one + 500}>" for one in range(3, 200)]
    size = sentencepieces(directory / "tokenizer.model", symbols)
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "TinyTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_tiny.TinyTokenizer", None]}}))
    if kind == "glm":
        made = {"AutoModel": "modeling_tiny.TinyForConditionalGeneration", "AutoModelForSeq2SeqLM": "modeling_tiny.TinyForConditionalGeneration"}
        words = {"padded_vocab_size": -(-(size + 8) // 64) * 64}
    else:
        made = {"AutoModelForCausalLM": f"modeling_tiny.{kind}ForCausalLM"}
        words = {"vocab_size": -(-size // 64) * 64}
        (directory / "generation_config.json").write_text(json.dumps({
            "do_sample": True, "temperature": 0.3, "top_k": 5, "top_p": 0.85, "repetition_penalty": 1.05, "eos_token_id": 2,
            "user_token_id": 195, "assistant_token_id": 196}))
    (directory / "config.json").write_text(json.dumps({
        "model_type": "chatglm" if kind == "glm" else "baichuan", "torch_dtype": "float32", "eos_token_id": 2, "pad_token_id": 0,
        "tie_word_embeddings": False, "auto_map": {"AutoConfig": "configuration_tiny.TinyConfig", **made}, **words, **config}))
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    cls = get_class_from_dynamic_module(next(iter(made.values())), str(directory))
    settings = AutoConfig.from_pretrained(directory, trust_remote_code=True)
    settings.torch_dtype = torch.float32
    save(cls(settings), directory, [0, 1, 2, 195, 196] if kind != "glm" else [0, 1, 2, *range(size, size + 5)])
    return directory


def qwen(directory: Path) -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.train_from_iterator(TEXT * 4, trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=TEMPLATE)
    fast.save_pretrained(directory)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=512, tie_word_embeddings=False, eos_token_id=2, bos_token_id=None))
    model.config.save_pretrained(directory)
    save(model, directory, [0, 1, 2])
    return directory


@pytest.fixture(scope="session")
def models_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def model_path(models_root: Path) -> Callable[..., str]:
    def get(kind: str, name: str = "", **config: Any) -> str:
        path = models_root / (name or kind)
        if not path.exists():
            qwen(path) if kind == "qwen" else remote(kind, path, **config)
        return str(path)

    return get


class Served:
    def __init__(self, given: list[str]) -> None:
        self.api, self.scheduler = build(arguments([*given, "--served-model-name", "tiny", "--port", "0"]))
        self.scheduler.start()
        self.server = uvicorn.Server(uvicorn.Config(self.api.app, port=0, log_level="error", lifespan="off", loop="asyncio", http="h11"))
        self._thread = threading.Thread(target=lambda: asyncio.run(self.server.serve()), daemon=True)
        self._thread.start()
        until = time.monotonic() + 10
        while not self.server.started and time.monotonic() < until:
            time.sleep(0.01)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60)

    def ask(self, text: str = "你好", **more: Any) -> httpx.Response:
        return self.client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 12, **more})

    def said(self, text: str = "你好", **more: Any) -> str:
        answer = self.ask(text, **more)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["message"]["content"])

    def stream(self, text: str = "你好", **more: Any) -> tuple[list[dict[str, Any]], float]:
        """The chunks, and seconds until the first text."""
        chunks, began, first = [], time.monotonic(), 0.0
        body = {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 12, "stream": True, **more}
        with httpx.stream("POST", f"http://127.0.0.1:{self.port}/v1/chat/completions", json=body, timeout=60) as answer:
            assert answer.status_code == 200, answer.read()
            lines = answer.iter_lines()
            ended = False
            for line in lines:
                if not line:
                    continue
                assert line.startswith("data: ") and not ended
                if line == "data: [DONE]":
                    ended = True
                    continue
                chunk = json.loads(line[6:])
                chunks.append(chunk)
                if not first and chunk.get("choices") and chunk["choices"][0]["delta"].get("content"):
                    first = time.monotonic() - began
            assert ended, "no [DONE]"
        return chunks, first

    def metric(self, name: str) -> float:
        lines = [line for line in self.client.get("/metrics").text.splitlines() if line.startswith(f"legacy_chat_{name} ") or
                 line.startswith(f"legacy_chat_{name}{{")]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    def quiet(self, seconds: float = 5) -> bool:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if not (self.scheduler.running or self.scheduler.waiting or self.scheduler.inbox):
                return True
            time.sleep(0.005)
        return False

    def close(self) -> None:
        self.client.close()
        self.scheduler.drain(0)
        self.server.should_exit = self.server.force_exit = True
        self._thread.join(5)
        self.scheduler.join(5)


def joined(chunks: list[dict[str, Any]]) -> str:
    return "".join(one["choices"][0]["delta"].get("content") or "" for one in chunks if one["choices"])


@pytest.fixture(scope="session")
def serve() -> Iterator[Callable[..., Served]]:
    """A server per set of arguments; the same arguments give the same server."""
    made: dict[tuple[str, ...], Served] = {}

    def get(*given: str) -> Served:
        if given not in made:
            made[given] = Served(list(given))
        return made[given]

    yield get
    for one in made.values():
        one.close()


@pytest.fixture(scope="session")
def tiny(serve: Callable[..., Served], model_path: Callable[..., str]) -> Served:
    return serve("--model", model_path("qwen"), "--max-batch", "8", "--max-response", "256")


@pytest.fixture
def own(model_path: Callable[..., str]) -> Iterator[Callable[..., Served]]:
    """A server of this test alone, which it may break."""
    made: list[Served] = []

    def get(*given: str) -> Served:
        made.append(Served(["--model", model_path("qwen"), *given]))
        return made[-1]

    yield get
    for one in made:
        one.close()
