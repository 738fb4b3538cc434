#!/usr/bin/python

# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: fastgpt_check
short_description: Prove that FastGPT answers through the whole chain
version_added: 1.0.0
description:
  - Logs in as root, compares the listed models, stores passages in a dataset of its own, searches them, and asks apps of its own, as a whole, as a stream
    and with the passages. A search must show a score of the type C(reRank), since FastGPT hides a failing reranker.
  - With O(wait) it waits for a FastGPT that is just starting. Nothing less than a log-in with an insertion and a search proves that it is ready,
    since its pages and C(getInitData) answer without MongoDB and PostgreSQL.
  - All that it makes has a name that begins with C(ansible-verify-) and is deleted again, as is what an interrupted run left.
extends_documentation_fragment:
  - selfhosted.fastgpt._attributes
  - selfhosted.fastgpt._attributes.action_group
  - selfhosted.fastgpt._checks
  - selfhosted.fastgpt._checks.service
attributes:
  check_mode:
    support: full
    details:
      - In check mode nothing is made in FastGPT, so only the log-in and the models are checked.
options:
  version:
    description: Version of FastGPT, V(v4.6.8) to V(v4.8.19). Apps have another form since v4.8.0, log-in and models after v4.8.19.
    type: str
    required: true
  username:
    description: User to log in as.
    type: str
    default: root
  password:
    description: Password of O(username).
    type: str
    required: true
  chat_model:
    description: Chat model that must be listed and answer.
    type: str
    required: true
  vector_model:
    description: Embedding model that must be listed and that the dataset gets.
    type: str
    required: true
  rerank_model:
    description: Rerank model that must be listed and score a search. If left out, no rerank is asked for.
    type: str
  checks:
    description:
      - What to check. Everything needs the log-in.
      - V(dataset_chat) asks an app that searches the dataset, and needs V(dataset) and V(chat) too. It is left out by default, since the
        search checks prove the same and its graph differs more between versions of FastGPT.
    type: list
    elements: str
    choices: [login, models, dataset, chat, dataset_chat]
    default: [login, models, dataset, chat]
  wait:
    description:
      - Seconds in which FastGPT may still become ready, whose first answer can take 40. Refused connections and errors of a first
        start are waited out, a wrong password is not.
      - One log-in serves them all. FastGPT takes 10 in 2 minutes from one address since v4.8.18, so this tries less often there.
      - Once the log-in works, the other checks get up to 90 of these seconds.
    type: int
    default: 0
  label:
    default: fastgpt
author:
  - selfhosted.fastgpt contributors (@selfhosted)
"""

EXAMPLES = r"""
- name: Wait until FastGPT is ready
  selfhosted.fastgpt.fastgpt_check:
    url: http://127.0.0.1:18080
    version: v4.8.9
    password: "{{ fastgpt_root_password }}"
    chat_model: Qwen2.5-1.5B-Instruct
    vector_model: M3E-large
    checks: [login, dataset]
    wait: 300
  register: ready
  failed_when: not ready.ok

- name: Ask FastGPT for everything
  selfhosted.fastgpt.fastgpt_check:
    url: http://10.0.0.4:8080
    version: v4.8.9
    password: "{{ fastgpt_root_password }}"
    chat_model: Qwen2.5-1.5B-Instruct
    vector_model: M3E-large
    rerank_model: bge-reranker-base
  register: asked
  failed_when: not asked.ok
"""

RETURN = r"""
checks:
  description: What was asked, in order.
  returned: always
  type: list
  elements: dict
  contains:
    name:
      description: What was asked.
      type: str
    ok:
      description: Whether it is as it should be.
      type: bool
    seconds:
      description: Time that it took.
      type: float
    detail:
      description: What was found, with the remedy where it is red.
      type: str
  sample: [{"name": "fastgpt logs in", "ok": true, "seconds": 1.2, "detail": "As root, first try."}]
ok:
  description: Whether all checks are green.
  returned: always
  type: bool
"""

import functools
import hashlib
import platform
import re
import secrets
import time
import typing as t
from urllib.parse import urlencode

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.selfhosted.fastgpt.plugins.module_utils import _checks, _fastgpt_graphs, _http
from ansible_collections.selfhosted.fastgpt.plugins.module_utils import _fastgpt_config as fc

_PREFIX = "ansible-verify-"
_WRONG_PASSWORD = "密码错误"
# A refusal this often in a row, and not just while the first start writes the root user.
_WRONG_PASSWORD_TRIES = 4
_PAUSE = 2.0
# From this version on a wrong password and a missing user have one name and no words, and each address has 10 log-ins in 120 s.
_LIMITED_SINCE = (4, 8, 18)
_WRONG_ACCOUNT = "account_psw_error"
_TOO_MANY = "tooManyRequest"
_NO_JSON = "no JSON"
_QUICK_TRIES = 4
_LIMITED_PAUSE = 20.0
_AFTER_LOGIN = 90.0
# MongoDB makes collections and indexes on the first use, and FastGPT does not repeat the transaction that this breaks.
_CONFLICT = re.compile(
    r"write ?conflict|catalog change|retry your operation|please retry|snapshot|unable to acquire|transaction \d+ has been aborted"
    r"|any in-progress transaction",
    re.IGNORECASE,
)
_CONFLICT_TRIES = 6
_LOG = "docker logs fastgpt"
_PASSAGES = (
    ("What does the door of a host do?", "The door checks the key of every request and passes on what is allowed."),
    ("副本集有什么用？", "副本集在多台主机上保存同样的数据，一台主机停机时其他主机继续服务。"),
    ("What orders the passages of a search?", "A reranker orders passages by how well they answer the question."),
)
_QUESTION = "What does the door of a host do?"


class _Refused(_checks.CheckError):
    """FastGPT answered with another code than 200; `found` is its message, `name` that of an error with a code of its own."""

    def __init__(self, found: str, remedy: str = "", name: str = "") -> None:
        super().__init__(found, remedy)
        self.name = name


class _NeverReady(_checks.CheckError):
    """Waiting would not help."""


class _Walk:
    def __init__(
        self, params: dict[str, t.Any], checks: _checks.Checks, version: tuple[int, int, int], options: _checks.HttpOptions, before: _Walk | None = None
    ) -> None:
        """`before`: a round of the same wait. Its session serves this one too, since log-ins may be limited."""
        self.params = params
        self.checks = checks
        self.label: str = params["label"]
        self.url: str = params["url"]
        self.version = version
        self.options = options
        # Two FastGPT hosts share a database and are checked at the same time, so each deletes its own litter only.
        self.prefix = _PREFIX + hashlib.sha256(platform.node().encode()).hexdigest()[:8] + "-"
        self.name = self.prefix + secrets.token_hex(4)
        self.token: str = before.token if before else ""
        self.said: str = before.said if before else ""
        self.checks.hide(self.token)
        self.dataset = self.key = ""
        self.stored: set[str] = set()
        self.hopeless = False

    # ---- talking to FastGPT

    def within(self, timeout: float | None) -> _checks.HttpOptions:
        return self.options if timeout is None else {**self.options, "timeout": timeout}

    def call(self, method: str, path: str, body: t.Any = None, query: dict[str, str] | None = None, timeout: float | None = None) -> t.Any:
        """The data of an answer. FastGPT puts the code of an error into the body, under HTTP 200 too."""
        url = _checks.join_url(self.url, "/api/" + path) + (f"?{urlencode(query)}" if query else "")
        headers = {"token": self.token} if self.token else {}
        response = _http.request(method, url, headers=headers, json=body, **self.within(timeout))
        if "json" not in response.headers.get("content-type", ""):
            raise _Refused(f"{method} /api/{path} gave HTTP {response.status} and no JSON", f"See whether FastGPT stands at this URL, and {_LOG}", _NO_JSON)
        answer = _checks.json_object(response, f"See {_LOG}")
        if answer.get("code") != 200:
            raise _Refused(_checks.message_of(answer) or f"code {answer.get('code')}", f"See {_LOG}", str(answer.get("statusText") or ""))
        return answer.get("data")

    def make(self, path: str, body: dict[str, t.Any]) -> t.Any:
        """call() for what MongoDB may refuse the first time."""
        for attempt in range(_CONFLICT_TRIES):
            try:
                return self.call("POST", path, body)
            except _Refused as exc:
                if not _CONFLICT.search(exc.found) or attempt == _CONFLICT_TRIES - 1:
                    raise
            time.sleep(0.5 * (attempt + 1))
        return None

    def made_id(self, what: str, path: str, body: dict[str, t.Any]) -> str:
        made = self.make(path, body)
        if not isinstance(made, str) or not made:
            raise _checks.CheckError(f"FastGPT made no {what}: {made!r}", f"See {_LOG}")
        return made

    # ---- log-in

    def log_in(self, deadline: float) -> str:
        if self.token:
            return self.said
        password = hashlib.sha256(self.params["password"].encode()).hexdigest()
        self.checks.hide(password)
        body = {"username": self.params["username"], "password": password}
        tries = refusals = answers = 0
        while True:
            tries += 1
            left = deadline - time.monotonic()
            try:
                data = self.call("POST", "support/user/account/loginByPassword", body, timeout=max(5.0, min(left, 60.0)) if left > 0 else None)
                token = data.get("token") if isinstance(data, dict) else None
                if not token:
                    raise _checks.CheckError("the log-in gave no token", f"See {_LOG}")
                self.token = str(token)
                self.checks.hide(self.token)
                self.said = f"As {self.params['username']}, " + ("first try." if tries == 1 else f"after {tries} tries.")
                return self.said
            except (_checks.CheckError, _http.TransportError) as exc:
                wrong = isinstance(exc, _Refused) and (_WRONG_PASSWORD in exc.found or exc.name == _WRONG_ACCOUNT)
                refusals = refusals + 1 if wrong else 0
                # What a proxy says for a FastGPT that is not up yet does not count.
                answers += isinstance(exc, _Refused) and exc.name != _NO_JSON
                too_many = isinstance(exc, _Refused) and exc.name == _TOO_MANY
                slowly = too_many or (self.version >= _LIMITED_SINCE and answers >= _QUICK_TRIES)
                pause = _LIMITED_PAUSE if slowly else _PAUSE
                left = deadline - time.monotonic()
                waited_enough = left <= _PAUSE
                if wrong and (waited_enough or refusals >= _WRONG_PASSWORD_TRIES):
                    raise _NeverReady(
                        "the root password is refused",
                        "FastGPT writes it at each start: compare fastgpt_root_password with the container's environment, then restart the container",
                    ) from exc
                if waited_enough:
                    raise self.login_fault(exc) from exc
                time.sleep(min(pause, max(_PAUSE, left - _PAUSE)))

    def login_fault(self, exc: Exception) -> _checks.CheckError:
        found = exc.found if isinstance(exc, _checks.CheckError) else str(exc)
        if isinstance(exc, _http.TransportError):
            remedy = f"See that the container fastgpt runs, and {_LOG}: it stops on a bad config.json and on a MongoDB that is no replica set"
        elif isinstance(exc, _Refused) and exc.name == _TOO_MANY:
            remedy = "FastGPT takes 10 log-ins in 2 minutes from one address: run this again after that time"
        elif "buffering timed out" in found or "Authentication failed" in found:
            remedy = "FastGPT does not reach MongoDB: see the checks of mongodb, its member hosts and mongodb_fastgpt_password"
        elif "用户未注册" in found:
            remedy = f"The first start did not get as far as the root user: see {_LOG}, and try again with a longer wait"
        else:
            remedy = f"See {_LOG}"
        return _checks.CheckError(found, remedy)

    # ---- models

    def models(self) -> str:
        data = self.call("GET", "common/system/getInitData")
        wanted = [("llmModels", self.params["chat_model"]), ("vectorModels", self.params["vector_model"]), ("reRankModels", self.params["rerank_model"])]
        for key, model in wanted:
            entries = data.get(key) if isinstance(data, dict) else None
            names = [str(entry.get("model")) for entry in entries or [] if isinstance(entry, dict)]
            if model and model not in names:
                raise _checks.CheckError(
                    f"{key} of config.json has {', '.join(names) or 'nothing'}, not {model}",
                    "Run site.yml with --tags fastgpt: config.json follows from model_servers, and the container restarts when it changes",
                )
        return f"{', '.join(model for _kind, model in wanted if model)}; FastGPT calls itself {data.get('systemVersion') or 'nothing'}."

    # ---- dataset

    def store(self) -> str:
        gateway = f"See the checks of the gateway and of pgvector, and {_LOG}"
        body = {"name": self.name, "type": "dataset", "vectorModel": self.params["vector_model"], "agentModel": self.params["chat_model"]}
        dataset = self.made_id("dataset", "core/dataset/create", body)
        collection = self.made_id("collection", "core/dataset/collection/create", {"datasetId": dataset, "name": self.name, "type": "virtual"})
        for question, answer in _PASSAGES:
            try:
                stored = self.make("core/dataset/data/insertData", {"collectionId": collection, "q": question, "a": answer})
            except _Refused as exc:
                raise _checks.CheckError(f"storing a passage: {exc.found}", gateway) from exc
            self.stored.add(str(stored))
        self.dataset = dataset
        return f"{len(_PASSAGES)} passages embedded and stored."

    def search(self, mode: str) -> str:
        rerank = bool(self.params["rerank_model"])
        data = self.call(
            "POST",
            "core/dataset/searchTest",
            {
                "datasetId": self.dataset,
                "text": _QUESTION,
                "limit": 5000,
                "similarity": 0,
                "searchMode": mode,
                "usingReRank": rerank,
                # From v4.8 on the default is true, which would ask the chat model first.
                "datasetSearchUsingExtensionQuery": False,
            },
        )
        found = data.get("list") if isinstance(data, dict) else data
        items = [item for item in found if isinstance(item, dict)] if isinstance(found, list) else []
        questions = {question for question, _answer in _PASSAGES}
        if not any(item.get("q") in questions or str(item.get("id")) in self.stored for item in items):
            raise _checks.CheckError(f"none of the stored passages was found among {len(items)}", f"See the checks of pgvector, and {_LOG}")
        scores = [score for item in items for score in item.get("score") or [] if isinstance(score, dict)]
        reranked = [float(score["value"]) for score in scores if score.get("type") == "reRank" and isinstance(score.get("value"), (int, float))]
        if rerank and not reranked:
            raise _checks.CheckError(
                "no passage has a score of the type reRank: FastGPT could not use its reranker, and says so only in its log",
                f"See the check of the rerank server, whether its door is reachable from this host, reRankModels in config.json, and {_LOG}",
            )
        detail = f"{len(items)} passages found"
        if reranked:
            detail += f", rerank scores {max(reranked):.3f} to {min(reranked):.3f}"
        return detail + "."

    # ---- chat

    def app_key(self, name: str, dataset: str = "") -> str:
        body = _fastgpt_graphs.app_body(
            name, self.version, self.params["chat_model"], dataset, self.params["vector_model"], bool(dataset and self.params["rerank_model"])
        )
        app = self.made_id("app", "core/app/create", body)
        key = self.made_id("key of the app", "support/openapi/create", {"name": name, "appId": app})
        self.checks.hide(key)
        return key

    def ask(self, key: str, stream: bool, detail: bool = False) -> dict[str, t.Any]:
        url = _checks.join_url(self.url, "/api/v1/chat/completions")
        body = {"stream": stream, "detail": detail, "messages": [{"role": "user", "content": _QUESTION}]}
        return {"url": url, "json": body, "headers": _checks.bearer(key), **self.options}

    def answer(self, key: str, detail: bool = False) -> dict[str, t.Any]:
        remedy = f"See whether the gateway chats with {self.params['chat_model']}, and {_LOG}"
        response = _http.request("POST", **self.ask(key, False, detail))
        body = _checks.json_object(response, remedy)
        if response.status != 200 or body.get("code", 200) != 200:
            raise _checks.CheckError(_checks.answer_of(response), remedy)
        _checks.check_completion(body, remedy)
        return body

    def chat(self) -> str:
        self.key = self.app_key(self.name)
        body = self.answer(self.key)
        return f"{len(_checks.check_completion(body))} characters."

    def streamed(self) -> str:
        remedy = f"See whether the gateway streams from {self.params['chat_model']}, and {_LOG}"
        text, chunks = _checks.read_stream(_http.stream("POST", **self.ask(self.key, True)), remedy)
        return f"{len(text)} characters in {chunks} chunks."

    def answered_from_dataset(self) -> str:
        body = self.answer(self.app_key(f"{self.name}-dataset", self.dataset), detail=True)
        steps = body.get("responseData")
        quotes = [step["quoteList"] for step in steps if isinstance(step, dict) and step.get("quoteList")] if isinstance(steps, list) else []
        if not quotes:
            raise _checks.CheckError("the app answered without a passage of its dataset", f"See the search checks above, and {_LOG}")
        return f"{len(_checks.check_completion(body))} characters from {len(quotes[0])} passages."

    # ---- order

    def litter(self) -> list[tuple[str, str, str, dict[str, str]]]:
        """What stands under our names: kind, name, path to delete it, query."""
        found: list[tuple[str, str, str, dict[str, str]]] = []
        for kind, path, delete, parameter in (
            ("app", "core/app/list", "core/app/del", "appId"),
            ("dataset", "core/dataset/list", "core/dataset/delete", "id"),
        ):
            # Versions before v4.8 take this as a GET and do not mind.
            entries = self.call("POST", path, {"parentId": None})
            for entry in entries if isinstance(entries, list) else []:
                name = str(entry.get("name")) if isinstance(entry, dict) else ""
                if not name.startswith(self.prefix):
                    continue
                if kind == "app":
                    # Deleting an app would leave its keys behind, out of reach.
                    keys = self.call("GET", "support/openapi/list", query={"appId": str(entry["_id"])})
                    found += [("key", name, "support/openapi/delete", {"id": str(key["_id"])}) for key in keys or [] if isinstance(key, dict)]
                found.append((kind, name, delete, {parameter: str(entry["_id"])}))
        return found

    def tidy(self) -> str:
        found = self.litter()
        for kind, name, path, query in found:
            for attempt in range(3):
                try:
                    self.call("DELETE", path, query=query)
                    break
                except _Refused as exc:
                    if attempt == 2:
                        raise _checks.CheckError(f"the {kind} {name} could not be deleted: {exc.found}", "Delete it on FastGPT's pages") from exc
                    time.sleep(1)
        left = self.litter()
        if left:
            names = ", ".join(sorted({item[1] for item in left}))
            raise _checks.CheckError(f"{names} is still there", "Delete it on FastGPT's pages")
        return f"{len(found)} things deleted." if found else "Nothing to delete."

    def run(self, deadline: float, dry: bool) -> None:
        wanted = self.params["checks"]

        def log_in() -> str:
            try:
                return self.log_in(deadline)
            except _NeverReady:
                self.hopeless = True
                raise

        if not self.checks.run(f"{self.label} logs in", log_in):
            for name in self.names(dry)[1:]:
                self.checks.skip(name, "the log-in did not work")
            return
        if "models" in wanted:
            self.checks.run(f"{self.label} lists the models", self.models)
        if dry or not {"dataset", "chat"} & set(wanted):
            return
        try:
            self.tidy()
        except (_checks.CheckError, _http.TransportError):
            pass  # the check at the end says so
        try:
            if "dataset" in wanted:
                self.run_dataset()
            if "chat" in wanted:
                self.run_chat()
        finally:
            self.checks.run(f"{self.label} leaves nothing behind", self.tidy)

    def run_dataset(self) -> None:
        _store_name, search_names = self.dataset_names()
        if not self.checks.run(f"{self.label} stores passages", self.store):
            for _mode, name in search_names:
                self.checks.skip(name, "no passages could be stored")
            return
        for mode, name in search_names:
            self.checks.run(name, functools.partial(self.search, mode))

    def run_chat(self) -> None:
        if self.checks.run(f"{self.label} answers", self.chat) or self.key:
            self.checks.run(f"{self.label} streams", self.streamed)
        else:
            self.checks.skip(f"{self.label} streams", "no app could be made")
        if {"dataset", "dataset_chat"} <= set(self.params["checks"]):
            name = f"{self.label} answers from a dataset"
            if self.dataset:
                self.checks.run(name, self.answered_from_dataset)
            else:
                self.checks.skip(name, "no passages could be stored")

    def dataset_names(self) -> tuple[str, list[tuple[str, str]]]:
        suffix = " and reranks" if self.params["rerank_model"] else ""
        modes = [("embedding", f"{self.label} searches by embedding{suffix}"), ("mixedRecall", f"{self.label} searches mixed{suffix}")]
        return f"{self.label} stores passages", modes

    def names(self, dry: bool) -> list[str]:
        """Every check of this call, also of one that cannot get as far."""
        wanted, label = self.params["checks"], self.label
        names = [f"{label} logs in"]
        if "models" in wanted:
            names.append(f"{label} lists the models")
        if not dry and "dataset" in wanted:
            stores, searches = self.dataset_names()
            names += [stores, *(name for _mode, name in searches)]
        if not dry and "chat" in wanted:
            names += [f"{label} answers", f"{label} streams"] + ([f"{label} answers from a dataset"] if {"dataset", "dataset_chat"} <= set(wanted) else [])
        return names


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "url": {"type": "str", "required": True},
            "version": {"type": "str", "required": True},
            "username": {"type": "str", "default": "root"},
            "password": {"type": "str", "required": True, "no_log": True},
            "chat_model": {"type": "str", "required": True},
            "vector_model": {"type": "str", "required": True},
            "rerank_model": {"type": "str"},
            "checks": {
                "type": "list",
                "elements": "str",
                "choices": ["login", "models", "dataset", "chat", "dataset_chat"],
                "default": ["login", "models", "dataset", "chat"],
            },
            "wait": {"type": "int", "default": 0},
            "label": {"type": "str", "default": "fastgpt"},
            **_checks.HTTP_ARGUMENTS,
        },
        required_by={"client_key": "client_cert"},
        supports_check_mode=True,
    )
    options = _checks.http_options(module)
    try:
        version = fc.parse_version(module.params["version"])
    except fc.VersionError as exc:
        module.fail_json(msg=str(exc))
    if fc.era_of(version) not in ("A", "B"):
        module.fail_json(
            msg=f"version: {module.params['version']}: this check knows v4.6.8 to v4.8.19; log-in, models and searches differ in others."
            " Use one of those versions, or a later release of this collection."
        )
    deadline = time.monotonic() + module.params["wait"]
    checks, logged_in_at = _checks.Checks([module.params["password"]]), 0.0
    walk = None
    while True:
        walk = _Walk(module.params, checks, version, options, walk)
        walk.run(deadline, module.check_mode)
        if walk.token and not logged_in_at:
            logged_in_at = time.monotonic()
        until = min(deadline, logged_in_at + _AFTER_LOGIN) if logged_in_at else deadline
        if checks.ok or walk.hopeless or time.monotonic() + _PAUSE >= until:
            break
        time.sleep(_PAUSE)
        checks = _checks.Checks([module.params["password"]])
    module.exit_json(changed=False, ok=checks.ok, checks=checks.results)


if __name__ == "__main__":
    main()
