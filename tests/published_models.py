"""Small models as others publish them: a Llama 3 or Qwen3 folder with a tokenizer that was trained on a text.

    python tests/published_models.py llama3 | qwen3 FOLDER TEXT_FILE

What a user would download: config.json, safetensors, tokenizer.json with an end-of-text token and a chat template. The
weights are random, so nothing but the way in and out can be learnt from them.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedTokenizerFast, Qwen3Config

END = "<|endoftext|>"
CHAT = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"


def config_of(family: str, vocab_size: int) -> PretrainedConfig:
    """Grouped queries, Llama 3.1's rotary scaling; Qwen3: heads of a size of their own, and a tied head."""
    shape = dict(
        vocab_size=vocab_size, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    if family == "qwen3":
        return Qwen3Config(**shape, head_dim=24, tie_word_embeddings=True)
    scaling = {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }  # fmt: skip
    return LlamaConfig(**shape, rope_parameters=scaling)


def make(family: str, folder: Path, text: str) -> None:
    """Write the folder; the same for the same text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=[END], initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator([text], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, chat_template=CHAT).save_pretrained(folder)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config_of(family, tokenizer.get_vocab_size())).save_pretrained(folder)


if __name__ == "__main__":
    make(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]).read_text("utf-8"))
