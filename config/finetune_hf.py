"""Fine-tune a model from a Hugging Face folder: all its weights, or adapters alone. docs/finetuning.md is the how-to.

Give the folder and the data: --init_from=FOLDER --dataset=mine. What the model is, its config.json says; sequences have
1024 tokens, or as many as the model takes where that is less. About 16 bytes of memory a weight where all train, 2 to 4
with adapters.
"""

out_dir = "out-finetuned"

# 16 sequences an iteration; how many of them at once is a matter of memory alone.
batch_size = 4
gradient_accumulation_steps = 4
activation_checkpointing = True  # a third more computing for a fraction of the memory of activations

# A tenth or less of what pretraining ended with, so that the model stays what it is; adapters take ten times as much.
learning_rate = 2e-5
min_lr = 2e-6
warmup_iters = 50
max_iters = 1000
lr_decay_iters = 1000
beta2 = 0.999  # few and noisy iterations
weight_decay = 0.0  # it would pull towards zero, not towards where the model was

eval_interval = 100
eval_iters = 50
early_stopping_patience = 3  # small data sets are learnt by heart soon
always_save_checkpoint = False  # the best state is the one to export
