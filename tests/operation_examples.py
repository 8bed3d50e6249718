"""One example row for every operation: a value that a tiny run accepts. A missing row fails the contract tests."""

EXAMPLES = {
    "set_lr": 5e-3,
    "change_lr": 0.5,
    "set_min_lr": 1e-4,
    "set_warmup_iters": 5,
    "set_lr_decay_iters": 20,
    "set_lr_schedule": "linear",
    "reset_lr_schedule": None,
    "set_weight_decay": 0.05,
    "change_weight_decay": 0.5,
    "set_betas": [0.8, 0.9],
    "set_momentum": 0.8,
    "set_grad_clip": 0.5,
    "set_dropout": 0.2,
    "set_lora_dropout": 0.2,
    "set_batch_size": 6,
    "change_batch_size": 2,
    "set_batch_size_relative": 0.6,
    "set_grad_accum": 4,
    "change_grad_accum": 2,
    "adjust_batch_size": {"target": 1.0, "keep_global_batch": True},
    "set_eval_interval": 3,
    "set_eval_interval_tokens": 200,
    "set_eval_iters": 2,
    "set_eval_tasks": ["adder"],
    "set_log_interval": 2,
    "set_data_mixture": {"first": 1, "second": 3},
    "set_dataset": "second",
    "set_curriculum_alpha": 0.5,
    "set_document_mask": True,
    "set_activation_checkpointing": True,
    "set_weights_dtype": "bfloat16",
    "freeze_layer": ["attn.0", "wte"],
    "unfreeze_layer": "mlp.1",
    "set_layer_lora_rank": [["attn.0", "mlp.*"], 3],
    "set_attn_lora_rank": 2,
    "set_embedding_lora_rank": 4,
    "set_lora_alpha": 4.0,
    "merge_lora_weights": "attn.*",
    "relora": {"warmup_iters": 3},
    "rewarm_lr": 4,
    "reset_moments": ["mlp.*", "ln_f"],
    "stack_layers": {"n_layer": 4, "how": "identity", "where": "interleave"},
    "drop_layers": [0],
    "widen_mlp": {"width": 96, "layers": ["mlp.1"]},
    "add_heads": 4,
    "widen_embd": 32,
    "resize_vocabulary": {"size": 40, "init": "mean", "noise": 0.1},
    "disable_vocab_remapping": {"noise": 0.1},
    "extend_context": 32,
    "set_sequence_length": 8,
    "untie_head": None,
    "save_checkpoint": None,
    "stop": None,
}
# Operations on a number that not every optimizer has, and those that have it.
ONLY_WITH = {"set_betas": ("adamw",), "set_momentum": ("sgd",)}
# What must be there before, for the operations that need something to act on.
BEFORE = {
    "set_weights_dtype": [("freeze_layer", ["block.1"]), ("set_layer_lora_rank", ["attn.0", 2])],
    "unfreeze_layer": [("freeze_layer", ["block.1"])],
    "disable_vocab_remapping": [("resize_vocabulary", {"size": 20, "map": [*range(20), *[19] * 10]})],
    "set_lora_alpha": [("set_attn_lora_rank", 2)],
    "merge_lora_weights": [("set_attn_lora_rank", 2)],
    "relora": [("set_attn_lora_rank", 2)],
}


def written(name, value):
    """An entry of a schedule; None is no value."""
    return {"name": name} if value is None else {"name": name, "value": value}
