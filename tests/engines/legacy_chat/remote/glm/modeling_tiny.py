# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A model called as ChatGLM2 is: sequence first, caches [sequence, batch, groups, size], positions asked for, inverted masks of its own."""

import torch
from torch import nn
from torch.nn.utils import skip_init
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel

from .configuration_tiny import TinyConfig


def turn(x, angles):
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)


class GLMBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads, self.groups, self.size = config.heads, config.groups, config.hidden_size // config.heads
        width = config.hidden_size
        self.norm = nn.LayerNorm(width, dtype=config.torch_dtype)
        self.query_key_value = nn.Linear(width, width + 2 * self.groups * self.size, dtype=config.torch_dtype)
        self.dense = nn.Linear(width, width, bias=False, dtype=config.torch_dtype)
        self.mlp = nn.Linear(width, width, bias=False, dtype=config.torch_dtype)

    def forward(self, hidden_states, masked, angles, kv_cache=None):
        long, rows, width = hidden_states.shape
        q, k, v = self.query_key_value(self.norm(hidden_states)).split([width, self.groups * self.size, self.groups * self.size], -1)
        q = turn(q.view(long, rows, self.heads, self.size), angles)
        k = turn(k.view(long, rows, self.groups, self.size), angles)
        v = v.view(long, rows, self.groups, self.size)
        if kv_cache is not None:
            k, v = torch.cat([kv_cache[0], k], 0), torch.cat([kv_cache[1], v], 0)
        every = self.heads // self.groups
        wide = [one.repeat_interleave(every, 2).permute(1, 2, 0, 3) for one in (k, v)]
        q = q.permute(1, 2, 0, 3)
        if masked is None:
            out = nn.functional.scaled_dot_product_attention(q, *wide, is_causal=long > 1)
        else:
            out = nn.functional.scaled_dot_product_attention(q, *wide, attn_mask=~masked)
        hidden_states = hidden_states + self.dense(out.permute(2, 0, 1, 3).reshape(long, rows, width).to(hidden_states.dtype))
        return hidden_states + self.mlp(torch.tanh(hidden_states)), (k, v)


class Base(PreTrainedModel):
    config_class = TinyConfig
    base_model_prefix = "transformer"
    _no_split_modules = ["GLMBlock"]

    def _init_weights(self, module):
        return


class TinyModel(Base):
    def __init__(self, config, device=None, empty_init=True):
        super().__init__(config)
        make = skip_init if empty_init else lambda cls, *a, **k: cls(*a, **k)
        self.embedding = make(nn.Embedding, config.padded_vocab_size, config.hidden_size, dtype=config.torch_dtype)
        self.layers = nn.ModuleList([GLMBlock(config) for _unused in range(config.num_layers)])
        self.output_layer = make(nn.Linear, config.hidden_size, config.padded_vocab_size, bias=False, dtype=config.torch_dtype)

    def get_input_embeddings(self):
        return self.embedding

    def hide(self, rows, new, past, mask):
        own = torch.ones(rows, new, new, device=self.embedding.weight.device).tril()
        full = torch.cat([own.new_ones(rows, new, past), own], -1)
        if mask is not None:
            full = full * mask.unsqueeze(1)
            if not past:
                full = full - (mask.unsqueeze(-1) - 1)
        return (full < 0.5).unsqueeze(1)

    def forward(self, input_ids, position_ids=None, attention_mask=None, past_key_values=None):
        rows, new = input_ids.shape
        past = past_key_values[0][0].shape[0] if past_key_values else 0
        masked = None
        if (attention_mask is not None and not attention_mask.all()) or (past_key_values and new != 1):
            masked = self.hide(rows, new, past, attention_mask)
        table = torch.arange(self.config.seq_length, device=input_ids.device)
        places = table[position_ids] if position_ids is not None else table[None, :new]
        half = self.config.hidden_size // self.config.heads // 2
        speed = 10000.0 ** -(torch.arange(half, device=input_ids.device) / half)
        angles = (places[..., None] * speed).transpose(0, 1).unsqueeze(2).to(self.embedding.weight.dtype)
        hidden_states, presents = self.embedding(input_ids).transpose(0, 1).contiguous(), ()
        caches = past_key_values or [None] * self.config.num_layers
        for at, layer in enumerate(self.layers):
            hidden_states, cache = layer(hidden_states, masked, angles, kv_cache=caches[at])
            presents += (cache,)
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, past_key_values=presents)


class TinyForConditionalGeneration(Base):
    def __init__(self, config, empty_init=True, device=None):
        super().__init__(config)
        self.transformer = TinyModel(config, empty_init=empty_init, device=device)

    def forward(self, input_ids=None, position_ids=None, attention_mask=None, past_key_values=None, inputs_embeds=None, labels=None,
                use_cache=None, output_attentions=None, output_hidden_states=None, return_dict=None, return_last_logit=False):
        out = self.transformer(input_ids, position_ids, attention_mask, past_key_values)
        hidden_states = out[0][-1:] if return_last_logit else out[0]
        logits = self.transformer.output_layer(hidden_states).transpose(0, 1).contiguous()
        return CausalLMOutputWithPast(logits=logits, past_key_values=out.past_key_values)

    def chat(self, tokenizer, query, history=None, **kwargs):
        raise AssertionError("the engine has its own loop")
