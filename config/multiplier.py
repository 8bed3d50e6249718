"""Products of numbers of up to 2 digits: 96 % of held-back products exactly right in a quarter of an hour on a CPU.

Data: python data/multiplier/prepare.py. A window has 2 lines of 11 characters, so a batch has 256 products. Every digit
of a product depends on all digits before it, so a layer and many passes more than for sums are needed, and a strong
weight decay: the 9,000 products of training are few enough to be learnt by heart.
"""

out_dir = "out-multiplier"
dataset = "multiplier"
eval_tasks = ["multiplier"]

n_layer = 3
n_head = 4
n_embd = 128
block_size = 22  # a whole number of lines
dropout = 0.0

batch_size = 128
gradient_accumulation_steps = 1

learning_rate = 2e-3
min_lr = 2e-4
weight_decay = 0.3
warmup_iters = 100
max_iters = 3000
lr_decay_iters = 3000
beta2 = 0.99

eval_interval = 100
eval_iters = 4
log_interval = 100

device = "cpu"
compile = False
