# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The way in which the seed's three servers work, written anew and without their faults: the baseline of `make bench-models`.

Each blocks its event loop for as long as a request takes, so requests are served one after another. Runs inside an engine's
environment: python bench/seed_servers.py KIND MODEL PORT [DEVICE].
"""

import json
import sys
import threading
from collections.abc import AsyncIterator
from typing import Any

import uvicorn

DIMENSIONS = 1536


def embedding(path: str, device: str) -> Any:
    """Texts one by one, each vector widened to 1536 numbers by its products."""
    import numpy
    from fastapi import FastAPI
    from pydantic import BaseModel
    from sentence_transformers import SentenceTransformer
    from sklearn.preprocessing import PolynomialFeatures

    class Wanted(BaseModel):
        input: list[str]
        model: str = ""

    class Answer(BaseModel):
        object: str
        model: str
        data: list[Any]
        usage: dict[str, int]

    model = SentenceTransformer(path, device=device)
    app = FastAPI()

    def widened(vector: Any) -> Any:
        if len(vector) < DIMENSIONS:
            vector = PolynomialFeatures(degree=2).fit_transform(vector.reshape(1, -1))[0]
            vector = numpy.pad(vector, (0, max(0, DIMENSIONS - len(vector))))[:DIMENSIONS]
        return vector / numpy.linalg.norm(vector)

    @app.post("/v1/embeddings", response_model=Answer)
    async def embeddings(wanted: Wanted) -> Any:
        vectors = [widened(model.encode(text, show_progress_bar=False)) for text in wanted.input]
        words = sum(len(text.split()) for text in wanted.input)
        rows = [{"object": "embedding", "index": at, "embedding": vector.tolist()} for at, vector in enumerate(vectors)]
        return {"object": "list", "model": wanted.model, "data": rows, "usage": {"prompt_tokens": words, "total_tokens": words}}

    return app


def rerank(path: str, device: str) -> Any:
    """All pairs of a request in one call."""
    from fastapi import FastAPI
    from pydantic import BaseModel
    from sentence_transformers import CrossEncoder

    class Input(BaseModel):
        id: str
        text: str

    class Wanted(BaseModel):
        query: str
        inputs: list[Input]

    model = CrossEncoder(path, max_length=512, device=device)
    app = FastAPI()

    @app.post("/v1/rerank")
    async def score(wanted: Wanted) -> Any:
        scores = model.predict([(wanted.query, one.text) for one in wanted.inputs], show_progress_bar=False)
        rows = [{"id": one.id, "score": float(score)} for one, score in zip(wanted.inputs, scores, strict=True)]
        return {"data": sorted(rows, key=lambda row: -row["score"])}

    return app


def chat(path: str, device: str) -> Any:
    """A generator that waits for the model, inside a coroutine. The new tokens come from a thread, as in Baichuan2's `chat`."""
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import StreamingResponse
    from starlette.routing import Route
    from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer

    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    # in 16 bit on a GPU, as the seed loads it there
    model: Any = AutoModelForCausalLM.from_pretrained(path, **({} if device == "cpu" else {"dtype": "auto", "device_map": {"": device}}))
    model.eval()

    def chunk(delta: dict[str, str], reason: str | None) -> str:
        body = {"object": "chat.completion.chunk", "model": "chat", "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}
        return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"

    async def stream(messages: list[dict[str, str]], most: int) -> AsyncIterator[str]:
        yield chunk({"role": "assistant"}, None)
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True).to(device)
        streamer: Any = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
        worker = threading.Thread(target=model.generate, kwargs={**ids, "streamer": streamer, "max_new_tokens": most, "do_sample": False})
        worker.start()
        for text in streamer:
            if text:
                yield chunk({"content": text}, None)
        worker.join()
        yield chunk({}, "stop")
        yield "data: [DONE]\n\n"

    async def completions(request: Request) -> StreamingResponse:
        wanted = await request.json()
        return StreamingResponse(stream(wanted["messages"], wanted["max_tokens"]), media_type="text/event-stream")

    return Starlette(routes=[Route("/v1/chat/completions", completions, methods=["POST"])])


if __name__ == "__main__":
    kind, path, port, device = (*sys.argv[1:], "cpu")[:4]
    uvicorn.run({"embedding": embedding, "rerank": rerank, "chat": chat}[kind](path, device), host="127.0.0.1", port=int(port), log_level="warning")
