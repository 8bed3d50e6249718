"""docs/migrating.md: what is ours in it exists and is accepted, and theirs is taken or told as the page says."""

from __future__ import annotations

import os
import re
import subprocess

import pytest
import yaml
from conftest import ROOT

from orchestrate.tools.main import COMMANDS
from orchestrate.training.operations import OPERATIONS
from orchestrate.training.operations.base import OTHER_NAMES, make
from orchestrate.training.schedule.file import entry_fields, parse_schedule
from orchestrate.training.settings.config import ALIASES, KEYS, OTHER_KEYS, resolve
from orchestrate.training.settings.errors import Refused

MAKEFILE = (ROOT / "Makefile").read_text("utf-8")
PAGE = (ROOT / "docs" / "migrating.md").read_text("utf-8")
ROWS = [
    tuple(cell.strip() for cell in row)
    for row in re.findall(r"^\| (\w+) \| (.*?) \| (.*) \|([^|]*)\|$", PAGE, re.M)
    if row[0] != "of"
]
IN_CODE = re.compile(r"`([^`]+)`")


def operation_of(text: str) -> str:
    """The name of "NAME: VALUE" or NAME where that is an operation of ours or a name of others; nothing otherwise."""
    name = text.partition(":")[0]
    return name if name in OPERATIONS or name in OTHER_NAMES else ""


def problems_of(text: str) -> list[str]:
    """Why an entry, a key or a field, as somebody has written it, is refused; none where it is accepted."""
    try:
        if text.startswith("--"):
            key, _, value = text.removeprefix("--").partition("=")
            resolve([], [(key, value)])
        elif operation_of(text):
            name, _, value = text.partition(": ")
            parse_schedule(f"- {{name: {name}, value: {value or 'null'}}}", "s.yaml")
        else:
            values = {"trigger_loss": "1.0", "max_wait_iters": "3", "reevaluate": "true", "desc": "why"}
            parse_schedule(f"- {{name: stop, {text}: {values.get(text, 'true')}}}", "s.yaml")
    except Refused as error:
        return error.problems
    return []


def test_the_page_has_a_row_for_all_four():
    assert {row[0] for row in ROWS} == {"nanoGPT", "fork", "CleanGPT", "124M"} and len(ROWS) > 80
    assert len(ROWS) == PAGE.count("\n| ") - 1, "a row that is none"
    assert {row[3] for row in ROWS} == {"", "same", "told"}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[1][:40])
def test_what_is_ours_exists_and_is_accepted(row):
    for text in IN_CODE.findall(row[2]):
        first, _, rest = text.partition(" ")
        if first == "make":
            assert re.search(rf"^{rest}:", MAKEFILE, re.M), text
        elif first == "orchestrate":
            assert rest in COMMANDS, text
        elif first == "python" or re.fullmatch(r"[\w/]+\.(py|yaml)", text):
            assert all((ROOT / name).is_file() for name in text.removeprefix("python ").split()), text
        elif text in KEYS or text in entry_fields():
            continue
        elif operation_of(text):
            name, _, value = text.partition(": ")
            make(name, {"value": yaml.safe_load(value)}) if value else OPERATIONS[name]
        else:
            key, _, value = text.partition("=")
            # What only a whole command line can say is checked as such elsewhere.
            assert key in KEYS and (key == "checkpoint" or not problems_of(f"--{text}")), text
    assert IN_CODE.search(row[2]) or row[1] == "`completed`" or row[2].startswith("nothing: ")


@pytest.mark.parametrize("row", [row for row in ROWS if row[3]], ids=lambda row: row[1][:60])
def test_theirs_is_taken_or_told(row):
    for text in IN_CODE.findall(row[1]):
        found = problems_of(text)
        if row[3] == "same":
            assert not found
            continue
        assert len(found) == 1
        if row[2].startswith("nothing: "):
            assert "leave it out" in found[0] and "leave it out" in row[2], found
            continue
        names = [re.split(r"[:=]", name)[0] for name in IN_CODE.findall(row[2])]
        assert any(name in found[0] for name in names) or "run folder" in found[0], found


KEYS_OF = {
    "nanoGPT": """out_dir eval_interval log_interval eval_iters eval_only always_save_checkpoint init_from wandb_log
        wandb_project wandb_run_name dataset gradient_accumulation_steps batch_size block_size n_layer n_head n_embd
        dropout bias learning_rate max_iters weight_decay beta1 beta2 grad_clip decay_lr warmup_iters lr_decay_iters
        min_lr backend device dtype compile""",
    "fork": """out_dir eval_interval log_interval eval_iters eval_only always_save_checkpoint init_from log_dir
        file_logging wandb_log wandb_project wandb_run_name dataset train_shard_filenames num_train_shards
        gradient_accumulation_steps batch_size block_size n_layer n_head n_embd dropout bias n_hidden
        use_rotary_embeddings rotary_base rotary_max_position_embeddings learning_rate max_iters weight_decay beta1
        beta2 grad_clip decay_lr warmup_iters lr_decay_iters min_lr backend device dtype compile embedding_mode
        attn_lora_rank embedding_rank lora_alpha scaling_schedule_file scaling_schedule target_architecture_config
        ignored_outlayers_sum shrunken_vocab_size vocab_remapping_file RARE_TOKEN_ID vocab_size""",
    "CleanGPT": """seeds init_from_ckpt out_dir dataset num_workers exp_name exp_profile wandb_project wandb save_ckpt
        save_ckpt_num save_snapshot save_strategy save_interval use_kvcache compile model init_from vocab_size n_embed
        n_position n_layer n_head n_inner n_q_head n_kv_head activation_fn layer_norm_epsilon rms_norm_eps dropout
        dropout_attn weight_tying add_bias mask_out_token pad_token_id use_amp fp16 use_early_stopping
        early_stopping_patience early_stopping_delta train_iters batch_size_per_gpu batch_grad_accum_step batch_size
        eval_batch_num eval_batch_size_per_gpu eval_batch_size snapshot_save_interval eval_interval eval_score_interval
        log_interval skip_first_eval clip_grad adam_beta1 adam_beta2 adam_eps optimizer override_opt_param_scheduler
        lr_decay_style lr_decay_factor lr_warmup_ratio lr_decay_ratio lr_begin lr_max wd_decr_style wd_begin wd_end
        grad_accum_step_incr_style ga_begin ga_end""",
    "124M": """mode checkpoint depth aspect_ratio head_dim target_flops param_data_ratio no_evals run_core_evals
        run_chatcore_evals eval_interval core_eval_interval no_muon num_epochs checkpoint_interval""",
}
"""As lists of their options have them, with underscores; of the 124M trainer those of both its states."""
OPERATIONS_OF_THE_FORK = """stack_layers widen_mlp set_attn_lora_rank set_embedding_lora_rank set_layer_lora_rank
    merge_lora_weights resize_vocabulary freeze_layer unfreeze_layer set_embedding_freeze_mode
    set_embedding_finetune_mode set_lr set_batch_size set_batch_size_relative adjust_batch_size reset_lr_schedule
    set_grad_accum set_warmup_iters set_eval_iters set_eval_interval set_curriculum_alpha disable_vocab_remapping
    change_lr change_batch_size change_grad_accum change_warmup_iters change_eval_iters change_eval_interval
    change_lora_alpha decrease_attn_lora_scaling decrease_vocab_lora_scaling"""


def test_every_key_and_operation_of_theirs_is_ours_or_told():
    for system, keys in KEYS_OF.items():
        unknown = [key for key in keys.split() if key not in KEYS and key not in ALIASES and key not in OTHER_KEYS]
        assert not unknown, system
    on_the_page = {re.split(r"[=:]", text.lstrip("-"))[0].replace("-", "_") for row in ROWS for text in
                   IN_CODE.findall(row[1])}  # fmt: skip
    theirs = {key for keys in KEYS_OF.values() for key in keys.split() if key not in KEYS}
    assert not theirs - on_the_page, "what is told is on the page"
    assert set(OTHER_KEYS) <= theirs, "a hint that nobody of the four needs"
    assert set(OPERATIONS_OF_THE_FORK.split()) <= on_the_page


def test_every_replacement_that_a_message_names_is_ours():
    shipped = {path.stem for folder in ("config", "schedules") for path in (ROOT / folder).iterdir()}
    known = {*KEYS, *OPERATIONS, *entry_fields(), *shipped}
    for key, hint in OTHER_KEYS.items():
        assert key not in KEYS and key not in ALIASES
        words = set(re.findall(r"\b[a-z]+(?:_[a-z0-9]+)+\b", hint)) | set(re.findall(r"^write (?!the)(\w+)", hint))
        assert words <= known, (key, words - known)
    for name, hint in OTHER_NAMES.items():
        assert name not in OPERATIONS
        assert set(re.findall(r"\b[a-z]+(?:_[a-z]+)+\b", hint)) - {"ln_f"} <= known, name


# ---------------------------------------------------------------------------------------------- make


def made(*arguments: str) -> subprocess.CompletedProcess:
    """`make -n`: what would be done."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    command = ["make", "-n", "--no-print-directory", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)


@pytest.mark.parametrize(
    "arguments, command",
    [
        (
            ["train", "CONFIG=config/train_gpt2.py", "SCHEDULE=schedules/scale.yaml", "ARGS=--max_iters=3"],
            "train_orchestrated.py config/train_gpt2.py --schedule schedules/scale.yaml --max_iters=3",
        ),
        (["train", "CONFIG=config/train_gpt2.py"], "train_orchestrated.py config/train_gpt2.py"),
        (
            ["ddp-train", "NGPUS=4", "CONFIG=config/train_gpt2.py"],
            "-m torch.distributed.run --standalone --nproc_per_node=4 train_orchestrated.py config/train_gpt2.py",
        ),
        (["sample", "OUT=out-x", "START=To be"], 'sample.py --out_dir=out-x --start="To be"'),
        (["bench"], "bench/step.py config/shakespeare_char_cpu.py"),
        (["gpu-status"], "-m orchestrate.tools.gpu_status"),
    ],
)
def test_make_calls_what_it_says(arguments, command):
    done = made(*arguments)
    assert done.returncode == 0 and done.stdout.splitlines()[-1].split() == [".venv/bin/python", *command.split()]


def test_make_train_asks_for_a_configuration():
    done = made("train")
    assert done.returncode == 2 and "give CONFIG=config/NAME.py" in done.stderr


def test_make_help_has_every_target_and_nothing_ends_a_process():
    targets = re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.M)[1].split()
    done = subprocess.run(["make", "-s", "-C", str(ROOT), "help"], capture_output=True, text=True, timeout=60)
    assert [line.split()[1] for line in done.stdout.splitlines()] == re.findall(r"^([a-z-]+):.*## ", MAKEFILE, re.M)
    assert {line.split()[1] for line in done.stdout.splitlines()} == set(targets)
    assert not re.search(r"\b(p?kill|killall|fuser)\b", re.sub(r"#.*", "", MAKEFILE))
