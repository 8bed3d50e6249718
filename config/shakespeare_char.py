"""Tiny Shakespeare by characters on a GPU: a 6-layer baby GPT of 10.6M parameters, minutes on one GPU.

Data: python data/shakespeare_char/prepare.py. It overfits early, hence frequent evaluations and dropout.
"""

out_dir = "out-shakespeare-char"
dataset = "shakespeare_char"

n_layer = 6
n_head = 6
n_embd = 384
block_size = 256
dropout = 0.2

batch_size = 32
gradient_accumulation_steps = 2

learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 100
max_iters = 5000
lr_decay_iters = 5000
beta2 = 0.99

eval_interval = 250
eval_iters = 200
log_interval = 10
always_save_checkpoint = False  # it overfits: only the best are worth their bytes
