"""GPT-2 (124M) on OpenWebText: 491,520 tokens an iteration, 300 billion in all, days on 8 GPUs.

Data: python data/openwebtext/prepare.py. Launch: torchrun --standalone --nproc_per_node=8 train_orchestrated.py
config/train_gpt2.py. On other numbers of GPUs the batches are the same as long as they divide 40.
"""

out_dir = "out-gpt2"
dataset = "openwebtext"

batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8

max_iters = 600000
lr_decay_iters = 600000
warmup_iters = 2000
learning_rate = 6e-4
min_lr = 6e-5
weight_decay = 1e-1

eval_interval = 1000
eval_iters = 200
log_interval = 10

wandb_log = False
wandb_project = "owt"
wandb_run_name = "gpt2-124M"
