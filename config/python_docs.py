"""The demo: a small character-level GPT on the Python language reference, two minutes or three on 2 CPU cores.

Data: python data/python_docs/prepare.py (no download). Expect a validation loss of about 1.30 with schedules/demo.yaml.
"""

out_dir = "out-python-docs"
dataset = "python_docs"

n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
dropout = 0.0

batch_size = 12
gradient_accumulation_steps = 2  # over all processes, so 1 or 2 of them see the same batches

learning_rate = 1e-3  # a small network can afford it
min_lr = 1e-4
warmup_iters = 50
max_iters = 800
lr_decay_iters = 800
beta2 = 0.99  # few tokens an iteration: a longer memory

eval_interval = 100
eval_iters = 40
log_interval = 50

device = "auto"
compile = False  # compiling takes longer than it saves here
