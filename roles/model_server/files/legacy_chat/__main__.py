# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Command line: python -I DIRECTORY --model PATH --served-model-name NAME --port N ..."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path
from types import FrameType
from typing import Any

# The modules import each other as a package, whatever directory this one is started as.
sys.path[0] = str(Path(__file__).resolve().parent.parent)
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false",
                  PYTORCH_ALLOC_CONF="expandable_segments:True")  # caches grow by a token a step, which would leave holes

import torch  # noqa: E402
import uvicorn  # noqa: E402

from legacy_chat.api import Api  # noqa: E402
from legacy_chat.compat import LoadError, load_model, load_tokenizer, prompt_format, vocabulary  # noqa: E402
from legacy_chat.engine import Engine  # noqa: E402
from legacy_chat.metrics import Metrics  # noqa: E402
from legacy_chat.scheduler import Limits, Scheduler  # noqa: E402

log = logging.getLogger("legacy_chat")


class Server(uvicorn.Server):
    """Ends within the grace after SIGTERM, whatever is running."""

    def __init__(self, config: uvicorn.Config, scheduler: Scheduler, grace: float) -> None:
        super().__init__(config)
        self._scheduler, self._grace = scheduler, grace

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._scheduler.drain(self._grace)
        super().handle_exit(sig, frame)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="legacy_chat")
    add = parser.add_argument
    add("--model", required=True, help="directory of the weights")
    add("--served-model-name", required=True)
    add("--host", default="127.0.0.1")
    add("--port", type=int, required=True)
    add("--device", choices=["cpu", "cuda"], default="cpu", help="GPUs by CUDA_VISIBLE_DEVICES; the layers are split over several")
    add("--quantize-bit", type=int, choices=[16, 8, 4], default=16)
    add("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto")
    add("--prompt-format", choices=["auto", "template", "baichuan2", "chatglm2"], default="auto")
    add("--chat-template", type=Path, help="file of a Jinja chat template")
    add("--context", type=int, default=0, help="tokens of question and answer; 0: the model's own")
    add("--max-response", type=int, default=0, help="most tokens of an answer; 0: the context")
    add("--max-batch", type=int, default=16, help="answers that run at once")
    add("--max-queue", type=int, default=0, help="requests that may wait; 0: four times --max-batch, at least 32")
    add("--cache-gb", type=float, default=0, help="room for keys and values; 0: half of the GPU's free memory, 2 on a CPU")
    add("--trust-remote-code", action="store_true")
    add("--grace", type=float, default=5, help="seconds that answers may take to end after SIGTERM")
    add("--stall-seconds", type=float, default=120, help="without a step for this long, /health says 503")
    return parser.parse_args(argv)


def own_context(config: Any) -> int:
    for name in ("model_max_length", "seq_length", "max_position_embeddings", "n_positions"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return 2048


def cache_tokens(wanted_gb: float, engine: Engine, context: int, device: str) -> int:
    if wanted_gb <= 0:
        free = min(torch.cuda.mem_get_info(one)[0] for one in range(torch.cuda.device_count())) * torch.cuda.device_count() if device == "cuda" else 0
        wanted_gb = free / 2e9 if free else 2
    tokens = int(wanted_gb * 1e9 / engine.layout.token_bytes)
    if tokens < context:
        raise LoadError(f"cache-gb: {wanted_gb:.2f}: one request of {context} tokens needs {context * engine.layout.token_bytes / 1e9:.2f} GB;"
                        " raise --cache-gb or lower --context")
    return tokens


def build(given: argparse.Namespace) -> tuple[Api, Scheduler]:
    template = None
    if given.chat_template:
        try:
            template = given.chat_template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise LoadError(f"chat-template: {given.chat_template}: {error}") from error
    tokenizer = load_tokenizer(given.model, given.trust_remote_code)
    model, config, generation = load_model(given.model, given.device, given.quantize_bit, given.dtype, given.trust_remote_code)
    kind, form, roles = prompt_format(given.prompt_format, tokenizer, config, generation, template)
    exact = given.quantize_bit == 16 and model.dtype == torch.float32
    known = min(vocabulary(tokenizer), model.get_input_embeddings().weight.shape[0])
    engine = Engine(model, vocabulary=known, exact=exact)
    longest = own_context(config)
    context = given.context or longest
    if context > longest:
        raise LoadError(f"context: {context}: this model goes to {longest} tokens; lower --context")
    response = min(given.max_response or context, context)
    batch = max(given.max_batch, 1) if engine.batches else 1
    limits = Limits(context, response, batch, given.max_queue or max(4 * batch, 32),
                    cache_tokens(given.cache_gb, engine, context, given.device), given.stall_seconds)
    ends = {one for source in (generation.eos_token_id, getattr(config, "eos_token_id", None), tokenizer.eos_token_id)
            for one in (source if isinstance(source, list) else [source]) if one is not None} | roles
    defaults: dict[str, Any] = {"temperature": 0.8, "top_p": 0.8} if kind == "chatglm2" else {}
    if generation.do_sample:
        defaults |= {name: getattr(generation, name) for name in ("temperature", "top_p", "top_k") if getattr(generation, name, None) is not None}
    if getattr(generation, "repetition_penalty", None):
        defaults["repetition_penalty"] = float(generation.repetition_penalty)

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    metrics = Metrics()
    scheduler = Scheduler(engine, form, decode, ends, defaults, limits, metrics)
    log.info("%s: %s bits, %s on %s, format %s, context %d, at most %d at once, cache %d tokens of %d bytes", given.served_model_name,
             given.quantize_bit, model.dtype, engine.device, kind, context, batch, limits.cache_tokens, engine.layout.token_bytes)
    return Api(scheduler, metrics, given.served_model_name, os.environ.pop("LEGACY_CHAT_API_KEY", "")), scheduler


def main() -> int:
    given = arguments()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    for noisy in ("bitsandbytes", "transformers"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        api, scheduler = build(given)
    except LoadError as error:
        log.error("%s", error)
        return 2
    scheduler.start()
    config = uvicorn.Config(api.app, host=given.host, port=given.port, log_level="warning", access_log=False, lifespan="off", loop="asyncio",
                            http="h11", timeout_graceful_shutdown=int(given.grace) + 3)
    server = Server(config, scheduler, given.grace)
    server.run()
    scheduler.join(2)
    return 0 if server.started else 1


if __name__ == "__main__":
    code = main()
    # a forward pass that is still running must not hold the process
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
