"""Sums of numbers of up to 3 digits: more than 99 % of held-back sums exactly right within minutes on 2 CPU cores.

Data: python data/adder/prepare.py. A window has 2 lines of 13 characters, so a batch has 256 sums. Positions are
learned, not rotary: every window begins with a line, so a position is a column of the sum.
"""

out_dir = "out-adder"
dataset = "adder"
eval_tasks = ["adder"]

n_layer = 2
n_head = 4
n_embd = 128
block_size = 26  # a whole number of lines
dropout = 0.0

batch_size = 128
gradient_accumulation_steps = 1

learning_rate = 2e-3
min_lr = 2e-4
warmup_iters = 100
max_iters = 1000
lr_decay_iters = 1000
beta2 = 0.99

eval_interval = 50
eval_iters = 4
log_interval = 50

device = "cpu"
compile = False
