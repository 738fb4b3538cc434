# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Two models called as Baichuan2's are: Rotary like 7B (position_ids, 2-D masks), Alibi like 13B (no positions, one big bias buffer)."""

import math

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_tiny import TinyConfig


class RotaryTable(nn.Module):
    """Plain tensors, not buffers: they must not be lost on the meta device."""

    def __init__(self, size, longest):
        super().__init__()
        speed = 10000.0 ** -(torch.arange(0, size, 2).float() / size)
        angles = torch.outer(torch.arange(longest).float(), speed)
        self.cos_cached, self.sin_cached = torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()

    def forward(self, x, position_ids):
        half = x.shape[-1] // 2
        turned = torch.cat([-x[..., half:], x[..., :half]], -1)
        cos, sin = (one.to(x)[position_ids].unsqueeze(1) for one in (self.cos_cached, self.sin_cached))
        return x * cos + turned * sin


class BaichuanLayer(nn.Module):
    def __init__(self, config, rotary):
        super().__init__()
        self.heads, self.size = config.num_attention_heads, config.hidden_size // config.num_attention_heads
        self.W_pack = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.norm = nn.LayerNorm(config.hidden_size)
        self.rotary = RotaryTable(self.size, config.model_max_length) if rotary else None

    def forward(self, hidden_states, attention_mask=None, position_ids=None, past_key_value=None):
        rows, new, width = hidden_states.shape
        q, k, v = (one.view(rows, new, self.heads, self.size).transpose(1, 2) for one in self.W_pack(self.norm(hidden_states)).chunk(3, -1))
        if self.rotary is not None:
            q, k = self.rotary(q, position_ids), self.rotary(k, position_ids)
        if past_key_value is not None:
            k, v = torch.cat([past_key_value[0], k], 2), torch.cat([past_key_value[1], v], 2)
        weights = q @ k.transpose(2, 3) / math.sqrt(self.size)
        if attention_mask is not None:
            if new == 1:
                attention_mask = attention_mask[..., -1:, :]
            weights = torch.maximum(weights + attention_mask, torch.tensor(torch.finfo(weights.dtype).min))
        out = (weights.softmax(-1) @ v).transpose(1, 2).reshape(rows, new, width)
        hidden_states = hidden_states + self.o_proj(out)
        return hidden_states + self.up_proj(torch.tanh(hidden_states)), (k, v)


class Base(PreTrainedModel):
    config_class = TinyConfig
    base_model_prefix = "model"
    _no_split_modules = ["BaichuanLayer"]

    def _init_weights(self, module):
        return


class Backbone(Base):
    rotary = True

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([BaichuanLayer(config, self.rotary) for _unused in range(config.num_hidden_layers)])
        self.post_init()

    def get_input_embeddings(self):
        return self.embed_tokens

    def mask(self, x, given, past):
        rows, new, _unused = x.shape
        low = torch.finfo(x.dtype).min
        hidden = torch.full((new, past + new), low, dtype=x.dtype).triu(past + 1)[None, None]
        if given is not None and not self.config.broken:
            hidden = hidden.masked_fill(given[:, None, None, :] == 0, low)
        return hidden.expand(rows, 1, new, past + new)

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None):
        x = self.embed_tokens(input_ids)
        past = past_key_values[0][0].shape[2] if past_key_values is not None else 0
        if position_ids is None:
            position_ids = torch.arange(past, past + x.shape[1])[None]
        mask, caches = self.mask(x, attention_mask, past), ()
        for at, layer in enumerate(self.layers):
            x, cache = layer(x, mask, position_ids, past_key_values[at] if past_key_values is not None else None)
            caches += (cache,)
        return BaseModelOutputWithPast(last_hidden_state=x, past_key_values=caches)


def bias_buffer(heads, longest):
    def slopes(count):
        if math.log2(count).is_integer():
            first = 2 ** (-(2 ** -(math.log2(count) - 3)))
            return [first ** (one + 1) for one in range(count)]
        whole = 2 ** math.floor(math.log2(count))
        return slopes(whole) + slopes(2 * whole)[0::2][: count - whole]

    bias = torch.tensor(slopes(heads)).view(-1, 1, 1) * torch.arange(longest)
    return torch.full((longest, longest), float("-inf")).triu(1)[None] + bias


class AlibiBackbone(Backbone):
    rotary = False

    def __init__(self, config):
        super().__init__(config)
        self.n_head = config.num_attention_heads
        self.max_cache_pos, self.first_run = config.model_max_length, True

    def get_alibi_mask(self, tensor, seq_length_with_past):
        if self.first_run:
            self.first_run = False
            self.register_buffer("future_mask", bias_buffer(self.n_head, self.max_cache_pos).to(tensor), persistent=False)
        return self.future_mask[:, :seq_length_with_past, :seq_length_with_past]

    def mask(self, x, given, past):
        bias = self.get_alibi_mask(x, past + x.shape[1])
        if given is None:
            return bias
        if given.dim() == 2:
            seen = given.to(bias.dtype)
            given = (seen[:, :, None] * seen[:, None, :]).tril()
        long, wide = bias.shape[-2:]
        hidden = 1.0 - given.unsqueeze(1).expand(x.shape[0], 1, long, wide).to(bias.dtype)
        return hidden.masked_fill(hidden.bool(), torch.finfo(bias.dtype).min) + bias.unsqueeze(0)

    def forward(self, input_ids=None, attention_mask=None, past_key_values=None):
        return super().forward(input_ids, attention_mask, None, past_key_values)


class NormHead(nn.Module):
    """No nn.Linear, normalises its weight in the first pass."""

    def __init__(self, hidden_size, vocab_size):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))
        self.first_flag = True

    def forward(self, hidden_states):
        if self.first_flag:
            self.first_flag = False
            self.weight = nn.Parameter(12 * nn.functional.normalize(self.weight))
        return nn.functional.linear(hidden_states, self.weight)


class RotaryForCausalLM(Base):
    backbone = Backbone

    def __init__(self, config, *model_args, **model_kwargs):
        super().__init__(config, *model_args, **model_kwargs)
        self.model = self.backbone(config)
        self.lm_head = NormHead(config.hidden_size, config.vocab_size)
        if hasattr(config, "quantization_config") and config.quantization_config["load_in_4bit"]:
            raise AssertionError("the engine does not use the repository's own quantizer")
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None, labels=None,
                use_cache=None, output_attentions=None, output_hidden_states=None, return_dict=None):
        out = self.model(input_ids, attention_mask, position_ids, past_key_values)
        return CausalLMOutputWithPast(logits=self.lm_head(out[0]), past_key_values=out.past_key_values)

    def chat(self, tokenizer, messages, stream=False, generation_config=None):
        raise AssertionError("the engine has its own loop")


class AlibiForCausalLM(RotaryForCausalLM):
    backbone = AlibiBackbone

    def forward(self, input_ids=None, attention_mask=None, past_key_values=None, inputs_embeds=None, labels=None, use_cache=None,
                output_attentions=False, output_hidden_states=False, return_dict=True, **kwargs):
        out = self.model(input_ids, attention_mask, past_key_values)
        return CausalLMOutputWithPast(logits=self.lm_head(out[0]), past_key_values=out.past_key_values)
