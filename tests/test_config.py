"""Configuration: nanoGPT's files and keys, precedence, and every error at once with the nearest key."""

from __future__ import annotations

import re

import pytest
from conftest import ROOT

import train_orchestrated
from orchestrate.training.settings.config import ALIASES, KEYS, TrainConfig, help_text, read_config_file, resolve
from orchestrate.training.settings.errors import Refused

# Written as nanoGPT's own files are: an import for a run name, arithmetic, comments.
NANOGPT = """import time

out_dir = 'out-shakespeare'
eval_interval = 5
wandb_log = False # feel free to turn on
wandb_run_name = 'ft-' + str(time.time())
dataset = 'shakespeare'
init_from = 'gpt2-xl' # this is the largest GPT-2 model
always_save_checkpoint = False
# 12 batch size * 1024 block size * 5 gradaccum * 8 GPUs = 491,520
gradient_accumulation_steps = 5 * 8
weight_decay = 1e-1
decay_lr = False
"""
NANOGPT_KEYS = (
    "out_dir eval_interval eval_iters log_interval init_from dataset gradient_accumulation_steps batch_size block_size "
    "n_layer n_head n_embd dropout bias learning_rate max_iters weight_decay beta1 beta2 grad_clip decay_lr "
    "warmup_iters lr_decay_iters min_lr backend device dtype compile wandb_log wandb_project wandb_run_name "
    "always_save_checkpoint eval_only"
).split()
FORK_KEYS = (
    "attn_lora_rank embedding_rank lora_alpha n_hidden use_rotary_embeddings rotary_base file_logging log_dir "
    "shrunken_vocab_size vocab_remapping_file"
).split()


def write(tmp_path, text: str, name: str = "c.py"):
    path = tmp_path / name
    path.write_text(text, "utf-8")
    return path


def refused(files, command_line=()) -> list[str]:
    with pytest.raises(Refused) as caught:
        resolve(files, command_line)
    return caught.value.problems


def test_nanogpt_files_and_keys(tmp_path):
    config, _ = resolve([write(tmp_path, NANOGPT)], [])
    assert config.gradient_accumulation_steps == 40 and config.wandb_run_name.startswith("ft-1")
    assert not config.decay_lr and config.init_from == "gpt2-xl"
    assert set(NANOGPT_KEYS + FORK_KEYS) <= set(KEYS)
    # nanoGPT's defaults, where a device or the schedule of another machine is not part of them
    assert (config.batch_size, config.block_size, config.n_layer, config.max_iters) == (12, 1024, 12, 600000)


def test_command_line_over_file_over_default(tmp_path):
    one, two = write(tmp_path, "batch_size = 3\nblock_size = 8"), write(tmp_path, "batch_size = 4", "d.py")
    config, given = resolve([one, two], [("n_layer", "5"), ("block_size", "16")])
    assert (config.batch_size, config.block_size, config.n_layer, config.n_head) == (4, 16, 5, 12)
    assert given == {"batch_size": f"{two}:1", "block_size": "--block_size", "n_layer": "--n_layer"}


@pytest.mark.parametrize("style", [["--max_iters=7", "--bias"], ["--max_iters", "7", "--bias", "True"]])
def test_both_spellings_of_the_command_line(style):
    config, _, options = train_orchestrated.parse([*style, "--scaling_schedule_file=s.yaml", "--plan"])
    assert (config.max_iters, config.bias, config.schedule, options.plan) == (7, True, "s.yaml", "table")


def test_later_wins_whatever_the_spelling():
    assert train_orchestrated.parse(["--batch_size=1", "--batch_size", "2"])[0].batch_size == 2


def test_all_errors_at_once_with_the_nearest_key(tmp_path):
    path = write(tmp_path, "batchsize = 3\nn_layer = 'six'\nimport os\ndropout = 1.5\nx = y + 1\n")
    found = refused([path], [("learning_rat", "1e-3"), ("compile", "maybe")])
    expected = [
        f"{path}:3: only assignments",
        f"{path}:5: x: the name y is not assigned",
        f"{path}:1: unknown key batchsize; did you mean batch_size?",
        "--learning_rat: unknown key learning_rat; did you mean learning_rate?",
        f"{path}:2: n_layer must be a valid integer, got 'six'",
        f"{path}:4: dropout must be less than 1, got 1.5",
        "--compile: compile must be a valid boolean, got 'maybe'",
    ]
    for text in expected:
        assert any(problem.startswith(text) for problem in found), (text, found)
    assert len(found) == len(expected)


@pytest.mark.parametrize(
    "text",
    [
        "out_dir = __import__('os').system('touch /tmp/owned')",
        "out_dir = open('x').read()",
        "exec('1')",
        "batch_size = 10 ** 10 ** 10",
        "out_dir = 'x' * 10**12",
        "batch_size = [1][0]",
        "while True: pass",
        "batch_size = (lambda: 3)()",
        "batch_size =",
        "batch_size = 1 / 0",
        "min_lr = float('nan')",
        "learning_rate = 1e999",
    ],
)
def test_a_config_file_is_read_not_executed(tmp_path, text):
    assert refused([write(tmp_path, text)])


def test_helper_names_and_expressions(tmp_path):
    text = '"""Why."""\n_rate = 1e-3\nlearning_rate = _rate * 2\nmin_lr = learning_rate / 10\nmax_iters = int(1e3)\n'
    found, errors = read_config_file(write(tmp_path, text + "lr_decay_iters = max_iters if not bias else 5\n"))
    assert not errors and found["min_lr"][0] == 2e-4 and found["lr_decay_iters"][0] == 1000 and "_rate" not in found


@pytest.mark.parametrize("name", ["s.yaml", "s.yml", "s.json"])
def test_a_schedule_among_the_configurations_is_known(name):
    assert refused([name]) == [
        f"{name}: a schedule is given as --schedule={name}; only CONFIG.py files are given by their name"
    ]


def test_missing_file_and_joint_rules():
    assert "cannot be read" in refused(["nowhere.py"])[0]
    assert "go together" in refused([], [("shrunken_vocab_size", "10")])[0]


def test_help_lists_every_key_with_default_and_meaning(capsys):
    with pytest.raises(SystemExit) as ended:
        train_orchestrated.parse(["--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and help_text() in shown
    for key, info in TrainConfig.model_fields.items():
        assert f"--{key} " in shown and info.description and info.description in shown
    assert set(ALIASES.values()) <= set(KEYS)


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.py")), ids=lambda path: path.name)
def test_shipped_configs_resolve_and_say_why_they_exist(path):
    resolve([path], [])
    assert path.read_text("utf-8").startswith('"""')


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("--operation=ops.py", "--operation: unknown option; did you mean --operations?"),
        ("--plans", "--plans: unknown option; did you mean --plan?"),
        ("--aganst=out", "--aganst: unknown option; did you mean --against?"),
        ("--learnin_rate=1", "unknown key learnin_rate; did you mean learning_rate?"),
        ("--scaling_schedule=[]", "write the entries into a file"),
    ],
)
def test_a_misspelt_option_is_told_apart_from_a_misspelt_key(given, said):
    with pytest.raises(Refused, match=re.escape(said)):
        train_orchestrated.parse([given])
