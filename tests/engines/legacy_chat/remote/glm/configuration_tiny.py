# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from transformers import PretrainedConfig


class TinyConfig(PretrainedConfig):
    model_type = "chatglm"

    def __init__(self, num_layers=2, padded_vocab_size=512, hidden_size=64, heads=4, groups=2, seq_length=512, **kwargs):
        self.num_layers = num_layers
        self.padded_vocab_size = self.vocab_size = padded_vocab_size
        self.hidden_size, self.heads, self.groups, self.seq_length = hidden_size, heads, groups, seq_length
        super().__init__(**kwargs)
