# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Engine `legacy_chat`: a small OpenAI-style chat server for causal models of transformers that no kept engine serves.

requests   a request's body, checked               prompts    messages to token ids, per prompt format
text       token ids to text, stop strings         compat     loads old model and tokenizer code, quantizes, verifies
cache      the key/value cache of a batch          engine     forward passes, the check that batching is right
sampling   logits to token ids                     scheduler  the one thread that uses model and tokenizer
api        routes                                  metrics    what Prometheus reads
"""
