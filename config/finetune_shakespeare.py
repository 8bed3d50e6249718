"""Finetune a released GPT-2 on Tiny Shakespeare: 20 iterations at a constant rate, about a minute on one GPU.

Data: python data/shakespeare/prepare.py. The weights are downloaded once through transformers; without network give
a local Hugging Face folder as --init_from.
"""

out_dir = "out-shakespeare"
dataset = "shakespeare"
init_from = "gpt2-xl"  # needs about 40 GB; gpt2 needs 4

batch_size = 1
gradient_accumulation_steps = 32  # 32,768 tokens an iteration; an epoch is 9.2 of them
max_iters = 20

learning_rate = 3e-5
decay_lr = False

eval_interval = 5
eval_iters = 40
always_save_checkpoint = False
