"""Tiny Shakespeare by characters on a CPU: 2000 iterations in about three minutes on 2 cores.

Data: python data/shakespeare_char/prepare.py. Expect a validation loss of about 1.76.
"""

out_dir = "out-shakespeare-char-cpu"
dataset = "shakespeare_char"

n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
dropout = 0.0

batch_size = 12
gradient_accumulation_steps = 1

learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 100
max_iters = 2000
lr_decay_iters = 2000
beta2 = 0.99

eval_interval = 250
eval_iters = 20
log_interval = 50

device = "cpu"
compile = False
