#!/usr/bin/python

# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: fastgpt_config
short_description: Write FastGPT's config.json, checked for the version that reads it
version_added: 1.0.0
author:
  - selfhosted.fastgpt contributors (@selfhosted)
description:
  - Builds C(config.json) from data for FastGPT v4.6.8 to v4.8.19, checks it, and writes it as plain JSON in one move.
  - The file holds every field that these versions read, so that an upgrade among them does not change it. Fields that are left
    out get FastGPT's customary values.
  - A file with the same content is left alone, however its keys are ordered or indented. One with comments, which v4.6.8 to
    v4.8.3 die of, is replaced.
  - Later versions keep models elsewhere and are refused.
extends_documentation_fragment:
  - selfhosted.fastgpt._attributes
  - selfhosted.fastgpt._attributes.action_group
  - ansible.builtin.files
attributes:
  check_mode:
    support: full
  diff_mode:
    support: full
    details:
      - The keys of rerankers are hidden; that one differs is told.
  idempotent:
    support: full
options:
  path:
    description:
      - The file on the target. A symbolic link is followed.
    type: path
    required: true
  version:
    description:
      - Image tag of FastGPT, such as V(v4.8.9) or V(v4.8.12-fix).
    type: str
    required: true
  system_env:
    description:
      - Fields of C(systemEnv), by default C(openapiPrefix=fastgpt), C(vectorMaxProcess=15), C(qaMaxProcess=15) and
        C(pgHNSWEfSearch=100).
      - C(oneapiUrl) and C(chatApiKey) are refused, since they silently override the container's environment.
    type: dict
    default: {}
  llm_models:
    description:
      - Chat models, as FastGPT names the fields. The first is the default. C(model), C(maxContext), C(maxResponse) and
        C(quoteMaxToken) (in tokens) are needed.
      - C(model) must be the name that the gateway knows. C(name) is shown to users and is the same if left out. FastGPT finds
        a model by either, so that no two entries may share one.
      - C(context) (the model's own context, in tokens) and C(tools) (whether its server speaks tools) may be given to be
        checked against C(maxContext) and C(toolChoice); they are not written.
      - C(maxResponse) and C(quoteMaxToken) together must fit into C(maxContext). C(toolChoice) and C(functionCall) are V(false)
        and C(datasetProcess) and C(usedIn...) are V(true) if left out.
      - The other fields are C(provider), C(avatar), C(maxTemperature) (1.2), C(inputPrice), C(outputPrice) and C(charsPointsPrice)
        (0), C(censor) and C(vision) (V(false)), C(customCQPrompt), C(customExtractPrompt), C(defaultSystemChatPrompt),
        C(defaultConfig) and C(fieldMap). A field that FastGPT does not know is written with a warning.
      - An entry with C(isDefault) V(true) is put first. The field itself is not written.
    type: list
    elements: dict
    required: true
  vector_models:
    description:
      - Embedding models, with C(model), and C(defaultToken) (500), C(maxToken) (1800) and C(weight) (100). The first is the
        default, or the one with C(isDefault) V(true).
      - The other fields are C(name), C(provider), C(avatar), the three prices, C(hidden), C(defaultConfig), C(dbConfig) and
        C(queryConfig).
      - C(dimensions) (FastGPT stores 1536 numbers at most) and C(context) may be given to be checked; they are not written.
    type: list
    elements: dict
    required: true
  rerank_models:
    description:
      - Rerankers, which FastGPT calls directly, not through the gateway. It uses the first only.
    type: list
    elements: dict
    default: []
    suboptions:
      model:
        description:
          - Name of the model.
        type: raw
      name:
        description:
          - Name shown to users.
        type: raw
      provider:
        description:
          - Maker of the model, shown from v4.8.16 on.
        type: raw
      avatar:
        description:
          - Picture shown to users.
        type: raw
      requestUrl:
        description:
          - The whole URL of the endpoint, as the FastGPT container reaches it.
        type: raw
      requestAuth:
        description:
          - Its key, without C(Bearer).
        type: str
      charsPointsPrice:
        description:
          - Price from v4.7 on.
        type: raw
      inputPrice:
        description:
          - Price in v4.6.8.
        type: raw
      outputPrice:
        description:
          - Price in v4.6.8.
        type: raw
      isDefault:
        description:
          - Put this entry first.
        type: raw
  audio_speech_models:
    description:
      - Entries of C(audioSpeechModels).
    type: list
    elements: dict
    default: []
  whisper_model:
    description:
      - Fields of C(whisperModel). If empty, FastGPT's customary entry is written, which nothing uses.
    type: dict
    default: {}
  fe_configs:
    description:
      - Fields of C(feConfigs). Most are overridden by FastGPT's own; read from v4.7.1 on.
    type: dict
    default: {}
  owner:
    description:
      - User who owns the file, by name or number. FastGPT's image runs as user V(1001), whom a host usually has no name for.
  group:
    description:
      - Group of the file, by name or number.
  mode:
    description:
      - Mode of the file. It holds keys, and FastGPT reads it as user 1001.
      - A new file gets V(0640) if left out.
      - The module warns where user 1001 cannot read the file, since FastGPT stops then.
  backup:
    description:
      - Keep a copy of the file that is replaced, beside it, with the time in its name.
    type: bool
    default: false
  validate:
    description:
      - A command that must succeed on the new file before it takes its place; C(%s) stands for the file.
    type: str
notes:
  - FastGPT reads the file when it starts. A container to which the single file is mounted goes on seeing the old one after a
    change; restart it.
seealso:
  - plugin: selfhosted.fastgpt.fastgpt_models
    plugin_type: filter
"""

EXAMPLES = r"""
- name: Write config.json
  selfhosted.fastgpt.fastgpt_config:
    path: /etc/selfhosted-fastgpt/fastgpt/config.json
    version: v4.8.9
    llm_models:
      - model: Baichuan2-7B-Chat
        maxContext: 4096
        maxResponse: 1024
        quoteMaxToken: 2000
    vector_models:
      - model: M3E-large
        dimensions: 1024
    rerank_models:
      - model: bge-reranker-base
        requestUrl: http://192.0.2.21:8003/v1/rerank
        requestAuth: "{{ reranker_key }}"
    owner: "1001"
    group: "1001"
    mode: "0640"
  notify: Restart FastGPT

- name: Write the models of the inventory's model servers, with one field changed and another default
  selfhosted.fastgpt.fastgpt_config:
    path: /opt/fastgpt/config.json
    version: v4.6.8
    llm_models: "{{ models.llm_models }}"
    vector_models: "{{ models.vector_models }}"
    rerank_models: "{{ models.rerank_models }}"
    owner: "1001"
    backup: true
    validate: python3 -m json.tool %s
  vars:
    models: "{{ endpoints | selfhosted.fastgpt.fastgpt_models('v4.6.8', overrides) }}"
    overrides:
      Qwen3-4B-Instruct-2507: {isDefault: true, maxResponse: 2048}
"""

RETURN = r"""
path:
  description: The file.
  returned: success
  type: str
era:
  description: How this version is configured - V(A) (v4.6.8 to v4.8.3) or V(B) (v4.8.4 to v4.8.19).
  returned: success
  type: str
  sample: B
models:
  description: Names of the models in the file, by kind.
  returned: success
  type: dict
  sample: {"llm": ["Baichuan2-7B-Chat"], "vector": ["M3E-large"], "rerank": ["bge-reranker-base"]}
backup_file:
  description: The copy of the old file.
  returned: when a copy was made
  type: str
"""

import grp
import os
import pwd
import re
import shlex
import stat
import tempfile
import typing as t

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.selfhosted.fastgpt.plugins.module_utils import _fastgpt_config as fc

# Large enough for any real file; what is larger was not written by us and is not worth reading.
READ_LIMIT = 8 * 1024 * 1024
FASTGPT_ID = 1001
NEW_MODE = "0640"
MODE = re.compile(r"[0-7]{1,5}\Z|0o[0-7]{1,4}\Z|(?:[ugoa]*[-+=][rwxXstugo]*(?:[-+=][rwxXstugo]*)*(?:,|\Z))+\Z")


def read(module: AnsibleModule, path: str) -> bytes | None:
    """The file's content, None if there is none; ends the module where it is not a file."""
    if os.path.isdir(path):
        module.fail_json(
            msg=(
                f"path: {path} is a directory. Docker makes one where a file to be mounted is missing: remove the"
                f" container that mounts it and the directory (rmdir {path}), then run again."
            )
        )
    parent = os.path.dirname(path)
    if not os.path.isdir(parent):
        if module.check_mode and not os.path.lexists(parent):
            return None
        module.fail_json(msg=f"path: the directory {parent} does not exist: make it first.")
    if not os.path.lexists(path):
        return None
    if not os.path.isfile(path):
        module.fail_json(msg=f"path: {path} is not a regular file: remove it, then run again.")
    try:
        with open(path, "rb") as source:
            return source.read(READ_LIMIT)
    except OSError as exc:
        module.fail_json(msg=f"path: {path} cannot be read: {exc.strerror}: run as root (become).")
        raise AssertionError from exc


def check_ahead(module: AnsibleModule, path: str, changed: bool) -> None:
    """What would stop the module halfway is found before anything is written, in check mode too."""
    params = module.params
    parent = os.path.dirname(path)
    if changed and os.path.isdir(parent) and not os.access(parent, os.W_OK | os.X_OK) and not params["unsafe_writes"]:
        module.fail_json(msg=f"path: the directory {parent} is not writable for user {os.geteuid()}: run as root (become), or mount it writable.")
    if not module.check_mode:
        # In check mode the account may be one that this run would have made.
        for option, find in (("owner", pwd.getpwnam), ("group", grp.getgrnam)):
            name = params[option]
            try:
                if name and not name.lstrip("-").isdigit():
                    find(name)
            except KeyError:
                module.fail_json(msg=f"{option}: {name}: this host has no such {option}: make it first, or give its number. FastGPT's is 1001.")
    # Unquoted octal comes as a number, which is right.
    if isinstance(params["mode"], str) and not MODE.match(params["mode"]):
        module.fail_json(msg=f"mode: {params['mode']}: must be octal and quoted, such as '0640', or symbolic, such as u=rw,g=r.")


def validate(module: AnsibleModule, temporary: str) -> None:
    check = module.params["validate"]
    if not check:
        return
    try:
        rc, out, err = module.run_command(check.replace("%s", shlex.quote(temporary)), handle_exceptions=False)
    except (OSError, ValueError) as exc:
        module.fail_json(msg=f"validate: '{check}' cannot be run: {exc}")
        raise AssertionError from exc
    if rc != 0:
        module.fail_json(msg=f"validate: '{check}' refuses the new file (rc {rc}): {(err or out).strip()}")


def write(module: AnsibleModule, path: str, text: str) -> None:
    """Through a file that nobody else can read, which atomic_move puts in the target's place."""
    fresh = not os.path.exists(path)
    # A new file must not be readable by all until its mode is set, nor stay unreadable where a run dies just then.
    before = os.umask(0o027 if module.params["mode"] is None else 0o077)
    handle, temporary = tempfile.mkstemp(dir=module.tmpdir, suffix=".json")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as sink:
            sink.write(text)
        validate(module, temporary)
        if fresh and module.params["mode"] is None:
            os.chmod(temporary, int(NEW_MODE, 8))
        try:
            module.atomic_move(temporary, path, unsafe_writes=module.params["unsafe_writes"])
        except Exception as exc:  # core 2.19 raises no narrower class
            module.fail_json(msg=f"path: {path} could not be replaced: {exc.__cause__ or exc}: the old file, if any, still stands.")
    finally:
        os.umask(before)
        if os.path.exists(temporary):
            os.unlink(temporary)


def warn_if_unreadable(module: AnsibleModule, path: str) -> None:
    try:
        found = os.stat(path)
    except OSError:
        return
    bit = stat.S_IRUSR if found.st_uid == FASTGPT_ID else stat.S_IRGRP if found.st_gid == FASTGPT_ID else stat.S_IROTH
    if not found.st_mode & bit:
        module.warn(
            f"{path}: user {FASTGPT_ID}, as which FastGPT's image runs, cannot read it, and FastGPT stops then: set owner: '{FASTGPT_ID}'"
            " and mode: '0640'. Ignore this where the container runs as another user."
        )


def make_diff(path: str, old: bytes | None, existing: fc.Existing | None, config: dict[str, t.Any]) -> dict[str, str]:
    before = ""
    before_value: t.Any = None
    header = path
    if existing is not None and old is not None:
        if existing.error:
            before = f"(not readable: {existing.error})\n"
        else:
            before_value = existing.value
            ordered = fc.in_order(fc.masked(before_value), config)
            try:
                before = fc.canonical(ordered)
            except ValueError:
                before = "(not readable: it holds numbers that JSON does not know)\n"
            if not existing.strict:
                header += " (with comments or other additions to JSON)"
    return {
        "before_header": header,
        "after_header": path,
        "before": before,
        "after": fc.canonical(fc.masked(config, before_value)),
    }


def main() -> None:
    module = AnsibleModule(
        argument_spec=dict(
            path=dict(type="path", required=True),
            version=dict(type="str", required=True),
            system_env=dict(type="dict", default={}),
            llm_models=dict(type="list", elements="dict", required=True),
            vector_models=dict(type="list", elements="dict", required=True),
            rerank_models=dict(
                type="list",
                elements="dict",
                default=[],
                options=dict(
                    model=dict(type="raw"),
                    name=dict(type="raw"),
                    provider=dict(type="raw"),
                    avatar=dict(type="raw"),
                    requestUrl=dict(type="raw"),
                    # As text, so that Ansible hides it everywhere.
                    requestAuth=dict(type="str", no_log=True),
                    charsPointsPrice=dict(type="raw"),
                    inputPrice=dict(type="raw"),
                    outputPrice=dict(type="raw"),
                    isDefault=dict(type="raw"),
                ),
            ),
            audio_speech_models=dict(type="list", elements="dict", default=[]),
            whisper_model=dict(type="dict", default={}),
            fe_configs=dict(type="dict", default={}),
            backup=dict(type="bool", default=False),
            validate=dict(type="str"),
        ),
        add_file_common_args=True,
        supports_check_mode=True,
    )
    params = module.params
    given = [params[key] for key in ("system_env", "llm_models", "vector_models", "audio_speech_models", "whisper_model", "fe_configs")]
    # Shorter values would blank out half of the result.
    module.no_log_values.update(value for value in fc.secrets_in(given) if len(value) >= 8)
    if params["validate"] and "%s" not in params["validate"]:
        module.fail_json(msg="validate: the command must contain %s for the file.")
    path = os.path.realpath(params["path"])
    try:
        era = fc.era_of(fc.parse_version(params["version"]))
        built = fc.build(
            params["version"],
            system_env=params["system_env"],
            llm_models=params["llm_models"],
            vector_models=params["vector_models"],
            rerank_models=params["rerank_models"],
            audio_speech_models=params["audio_speech_models"],
            whisper_model=params["whisper_model"],
            fe_configs=params["fe_configs"],
        )
    except fc.VersionError as exc:
        module.fail_json(msg=str(exc))
    if built.faults:
        module.fail_json(msg="\n".join(built.faults), faults=built.faults)
    for warning in built.warnings:
        module.warn(warning)

    old = read(module, path)
    existing = fc.read_existing(old) if old is not None else None
    changed = existing is None or bool(existing.error) or not existing.strict or not fc.same(existing.value, built.config)
    check_ahead(module, path, changed)
    result: dict[str, t.Any] = {
        "path": params["path"],
        "era": era,
        "models": {
            kind: [m.get("model") for m in built.config[key]] for kind, key in (("llm", "llmModels"), ("vector", "vectorModels"), ("rerank", "reRankModels"))
        },
    }
    if module._diff:
        result["diff"] = make_diff(params["path"], old, existing, built.config)
        if not changed:
            result["diff"]["before"] = result["diff"]["after"]
    if changed and not module.check_mode:
        if old is not None and params["backup"]:
            result["backup_file"] = module.backup_local(path)
        write(module, path, fc.canonical(built.config))
    if old is None and params["mode"] is None:
        params["mode"] = NEW_MODE
    if os.path.exists(path):
        file_args = module.load_file_common_arguments(params, path=path)
        changed = module.set_fs_attributes_if_different(file_args, changed)
        if not (module.check_mode and changed):
            warn_if_unreadable(module, path)
    module.exit_json(changed=changed, **result)


if __name__ == "__main__":
    main()
