# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A tokenizer as ChatGLM2's repositories have them: the base is initialised first, _pad knows no padding_side, ids beyond the pieces."""

from sentencepiece import SentencePieceProcessor
from transformers import PreTrainedTokenizer


class Pieces:
    def __init__(self, path):
        self.sp_model = SentencePieceProcessor(model_file=path)
        size = self.sp_model.vocab_size()
        self.special_tokens = {name: size + at for at, name in enumerate(["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"])}
        self.n_words = size + len(self.special_tokens)


class TinyTokenizer(PreTrainedTokenizer):
    vocab_files_names = {"vocab_file": "tokenizer.model"}
    model_input_names = ["input_ids", "attention_mask", "position_ids"]

    def __init__(self, vocab_file, padding_side="left", clean_up_tokenization_spaces=False, **kwargs):
        super().__init__(padding_side=padding_side, clean_up_tokenization_spaces=clean_up_tokenization_spaces, unk_token="<unk>", **kwargs)
        self.tokenizer = Pieces(vocab_file)

    def get_command(self, token):
        return self.tokenizer.special_tokens[token]

    @property
    def eos_token_id(self):
        return self.tokenizer.sp_model.eos_id()

    @property
    def vocab_size(self):
        return self.tokenizer.n_words

    def get_vocab(self):
        return {self._convert_id_to_token(one): one for one in range(self.vocab_size)} | self.added_tokens_encoder

    def _tokenize(self, text, **kwargs):
        return self.tokenizer.sp_model.EncodeAsPieces(text)

    def _convert_token_to_id(self, token):
        return self.tokenizer.special_tokens.get(token, self.tokenizer.sp_model.PieceToId(token))

    def _convert_id_to_token(self, index):
        return "" if index >= self.tokenizer.sp_model.vocab_size() or index <= 2 else self.tokenizer.sp_model.IdToPiece(index)

    def convert_tokens_to_string(self, tokens):
        return self.tokenizer.sp_model.DecodePieces(tokens)

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
        return [self.get_command("[gMASK]"), self.get_command("sop"), *token_ids_0]

    def _pad(self, encoded_inputs, max_length=None, padding_strategy=None, pad_to_multiple_of=None, return_attention_mask=None):
        encoded_inputs.setdefault("attention_mask", [1] * len(encoded_inputs["input_ids"]))
        return encoded_inputs
