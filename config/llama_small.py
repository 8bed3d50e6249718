"""A small Llama-style model on OpenWebText: rotary positions, RMSNorm, SwiGLU, grouped queries, untied head.

Data: python data/openwebtext/prepare.py. About 150M parameters; one GPU with 24 GB takes batch_size 12.
"""

out_dir = "out-llama-small"
dataset = "openwebtext"

n_layer = 12
n_head = 12
n_kv_head = 4
n_embd = 768
n_hidden = 2048
norm = "rmsnorm"
activation = "swiglu"
use_rotary_embeddings = True
tie_weights = False

batch_size = 12
block_size = 1024
gradient_accumulation_steps = 40

max_iters = 100000
lr_decay_iters = 100000
warmup_iters = 1000
learning_rate = 6e-4
min_lr = 6e-5
lr_schedule = "wsd"

eval_interval = 1000
eval_iters = 200
log_interval = 10
