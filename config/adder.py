"""Sums of numbers of up to 3 digits, with exact-match accuracy at every evaluation: minutes on 2 CPU cores.

Data: python data/adder/prepare.py. A window has 8 lines of 13 characters, so a batch has 256 problems.
"""

out_dir = "out-adder"
dataset = "adder"

n_layer = 2
n_head = 4
n_embd = 128
block_size = 26

dropout = 0.0

batch_size = 128
gradient_accumulation_steps = 1

learning_rate = 2e-3
min_lr = 2e-4
warmup_iters = 100
max_iters = 3000
lr_decay_iters = 3000
beta2 = 0.99

eval_interval = 100
eval_iters = 4
log_interval = 50

device = "cpu"
compile = False
