"""The configuration of a run: every key, its default and its meaning, and how config files and the command line set it.

Keys carry nanoGPT's names and meanings; those of the model follow from its options (model/config.py). A config file is
a file of plain assignments that is read, not executed: only literals, arithmetic, earlier names and a handful of
harmless calls are understood. The command line overrides a file, a file overrides the default. All problems are
collected and told at once (`Refused`).
"""

from __future__ import annotations

import ast
import operator
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, create_model

from orchestrate.model.config import DEFAULTS, OPTIONS, ModelConfig
from orchestrate.training.settings import depth
from orchestrate.training.settings.errors import Refused
from orchestrate.training.settings.faults import parse_faults
from orchestrate.training.settings.metrics import VAL_LOSS, MetricName
from orchestrate.training.settings.values import (
    MOST_PROBLEMS,
    MOST_SOURCES,
    OPTIMIZER_NUMBERS,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    OptimizerName,
    PositiveFloat,
    PositiveInt,
    SourceName,
    WeightsDtype,
    is_large,
    nearest,
    not_empty,
    problems_of,
    read_at_most,
    shares_of,
    shown,
    weighty,
)


def _listed(value: Any) -> Any:
    """One text is a list of one, and an empty one a list of none."""
    if isinstance(value, str):
        return (value,) if value else ()
    return tuple(value) if isinstance(value, list) else value


def _words(value: Any) -> Any:
    """Names: "a,b", or a list of them; one that is there twice counts once."""
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",")] if value else []
    hashable = isinstance(value, list | tuple) and all(isinstance(one, str) for one in value)
    return tuple(dict.fromkeys(value)) if hashable else value


def _counted(value: Any) -> Any:
    """Whole numbers: "1,2,3", a list of them, or one."""
    if isinstance(value, str):
        return tuple(int(part) if part.strip().isdecimal() else part for part in value.split(",")) if value else ()
    return tuple(value) if isinstance(value, list) else (value,) if isinstance(value, int) else value


def _assigned(value: Any) -> Any:
    """ "n_layer=12, n_embd=768" as a mapping."""
    if not isinstance(value, str):
        return value
    pairs = [part.partition("=") for part in value.split(",") if part.strip()]
    return {name.strip(): parse_text(text.strip()) for name, _, text in pairs}


Architecture = Annotated[dict[str, bool | int | float | str], BeforeValidator(_assigned)]
Seeds = Annotated[tuple[NonNegativeInt, ...], BeforeValidator(_counted)]
TrackerNames = Annotated[tuple[Literal["wandb", "tensorboard", "trackio"], ...], BeforeValidator(_words)]
Texts = Annotated[tuple[str, ...], BeforeValidator(_listed)]
Weights = Annotated[dict[SourceName, NonNegativeFloat], Field(max_length=MOST_SOURCES), AfterValidator(weighty)]
DataSets = str | Annotated[Weights, AfterValidator(not_empty)]


def _key(default: Any, meaning: str) -> Any:
    return Field(default=default, description=meaning)


class _RunKeys(BaseModel):
    """The keys that come before the model's."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", protected_namespaces=())

    # where things go, and how often
    out_dir: str = _key("out", "the run folder")
    eval_interval: PositiveInt = _key(2000, "iterations between evaluations")
    eval_interval_tokens: NonNegativeInt = _key(
        0, "tokens between evaluations, to the iteration, whatever a schedule makes of the batch; 0: eval_interval"
    )
    eval_iters: PositiveInt = _key(200, "batches of one evaluation, the same fixed windows each time")
    eval_batch_size: NonNegativeInt = _key(0, "sequences in a batch of an evaluation; 0: batch_size at the start")
    eval_only: bool = _key(False, "evaluate once, write nothing, exit")
    sample_prompts: Texts = _key((), "prompts that are continued at every evaluation, a list of texts; (): none")
    sample_tokens: PositiveInt = _key(64, "tokens of each continuation of sample_prompts")
    eval_tasks: Texts = _key(
        (), "tasks that evaluations score, a list of NAME or NAME:FOLDER (adder, multiplier, lm-eval's); (): none"
    )
    eval_tasks_interval: NonNegativeInt = _key(
        0, "iterations between scores of eval_tasks, each at the first evaluation from there on; 0: at every evaluation"
    )
    eval_tasks_limit: NonNegativeInt = _key(0, "documents of each task of lm-eval that are asked at most; 0: all")
    analyze_interval: NonNegativeInt = _key(
        0, "iterations between analyses of the model, each at the first evaluation from there on; 0: never"
    )
    log_interval: PositiveInt = _key(1, "iterations between lines of metrics")
    always_save_checkpoint: bool = _key(True, "save at every evaluation, not only when the loss is the best so far")
    save_interval: NonNegativeInt = _key(0, "iterations between checkpoints beside those of evaluations; 0: none")
    save_interval_tokens: NonNegativeInt = _key(0, "tokens between such checkpoints, to the iteration; 0: none")
    keep_last: PositiveInt = _key(2, "how many of the latest checkpoints are kept")
    keep_best: NonNegativeInt = _key(1, "how many of the best checkpoints are kept")
    keep_every: NonNegativeInt = _key(
        0, "keep the first checkpoint at or after each multiple of so many iterations for good; 0: none"
    )
    checkpoint: str = _key(
        "latest", "of a run folder as init_from, or to eval_only: latest | best | a checkpoint's name"
    )
    async_save: bool = _key(
        False, "write the checkpoints of evaluations in the background; a save blocks for a copy only"
    )
    init_from: str = _key(
        "scratch",
        "scratch | resume | gpt2[-medium|-large|-xl] | a run, Hugging Face or PEFT folder | a nanoGPT ckpt.pt",
    )
    base_model: str = _key("", "of a PEFT folder as init_from: its base; empty: base_model_name_or_path of the folder")
    schedule: str = _key("", "the schedule file, YAML or JSON (also spelled scaling_schedule_file)")
    file_logging: bool = _key(False, "also write the console's lines to a file in log_dir")
    target_architecture: Architecture = _key(
        {}, "what the schedule must make of the model in the end, e.g. n_layer=12,n_embd=768; {}: not checked"
    )
    log_dir: str = _key("", "folder of that file; empty: the run folder")
    report: bool = _key(True, "write RUN/report.html at every end of the run; needs the extra `report` (plotly)")
    # trackers
    tracker: TrackerNames = _key((), "log to wandb, tensorboard, trackio too: any of them, with commas; (): none")
    wandb_log: bool = _key(False, "tracker=wandb (WANDB_MODE=offline needs no network)")
    wandb_project: str = _key("", "project of wandb and trackio; empty: the name of the folder that out_dir lies in")
    wandb_run_name: str = _key("", "name of the run there; empty: the name of out_dir")
    # data
    dataset: DataSets = _key(
        "openwebtext", "a folder under data/, or a path to one; or several with a weight each: {'a': 0.7, 'b': 0.3}"
    )
    eval_mixture: Weights = _key(
        {}, "what val_loss means with several data sets: a weight each; {}: the weights that dataset gives"
    )
    allow_changed_data: bool = _key(False, "on resume: go on although train.bin or val.bin is not what it was")
    allow_other_tokenizer: bool = _key(
        False, "go on although the data is in tokens of another tokenizer than the model's"
    )
    gradient_accumulation_steps: PositiveInt = _key(40, "micro-steps in one iteration, over all ranks together")
    batch_size: PositiveInt = _key(12, "sequences in one micro-step on one rank")
    curriculum_alpha: Annotated[NonNegativeFloat, Field(le=1)] = _key(
        0.0, "sample rare tokens more often: 0 the data as it is, to 1 (data/curriculum.py)"
    )
    document_mask: bool = _key(
        False, "attention stays within a document, which the tokenizer's end-of-text ends, in training and validation"
    )
    shrunken_vocab_size: NonNegativeInt = _key(0, "vocabulary after remapping; 0: no remapping")
    vocab_remapping_file: str = _key("", ".npy or .json array that maps each old token id to a new one")

    depth: NonNegativeInt = _key(
        0, "e.g. 12: width, heads, batch, learning rate and weight decay by rule, where not given; 0: as given"
    )


MODEL_KEYS: dict[str, str] = {option.key or name: name for name, option in OPTIONS.items() if option.meaning}
"""Configuration key -> field of ModelConfig, for every option of the model that a key sets (model/config.py)."""


def _model_keys() -> dict[str, Any]:
    """The type, default and line of help of each of MODEL_KEYS, from the option's declaration."""
    keys: dict[str, Any] = {}
    for key, name in MODEL_KEYS.items():
        option, default = OPTIONS[name], DEFAULTS[name]
        if option.on:
            kind, default = bool, default == option.on
        elif option.choices:
            kind = Literal[option.choices]
        elif isinstance(default, bool):
            kind = bool
        elif isinstance(default, float):
            kind = NonNegativeFloat if option.zero else PositiveFloat
        else:
            kind, default = NonNegativeInt if option.zero else PositiveInt, default or 0
        keys[key] = (kind, _key(default, option.meaning))
    return keys


def model_values(config: TrainConfig | SimpleNamespace) -> dict[str, Any]:
    """Field of ModelConfig -> its value, as the configuration's keys say."""
    values: dict[str, Any] = {}
    for key, name in MODEL_KEYS.items():
        value = getattr(config, key)
        if OPTIONS[name].on:
            value = OPTIONS[name].on if value else DEFAULTS[name]
        values[name] = None if value == 0 and DEFAULTS[name] is None else value
    return values


def keys_of(model: ModelConfig) -> dict[str, Any]:
    """The inverse of model_values: what each key says of a model. Of MLPs of several widths it says the first."""
    keys = {}
    in_effect = {"attn_bias": model.attention_biases, "mlp_bias": model.mlp_biases}
    for key, name in MODEL_KEYS.items():
        value = in_effect.get(name, getattr(model, name))
        keys[key] = value == OPTIONS[name].on if OPTIONS[name].on else value[0] if name == "n_hidden" else value
    return keys


def stands_for_more(key: str) -> bool:
    """Whether 0 stands for a number that follows from other keys of the model."""
    return key in MODEL_KEYS and DEFAULTS[MODEL_KEYS[key]] is None


_ModelKeys = create_model("_ModelKeys", __base__=_RunKeys, **_model_keys())


class TrainConfig(_ModelKeys):  # type: ignore[misc, valid-type]
    """One value for every key. Frozen; `schedule` may later change most of what it starts with."""

    # adapters and dropout
    dropout: Fraction = _key(0.0, "dropout probability")
    attn_lora_rank: NonNegativeInt = _key(0, "LoRA rank of every attention layer; 0: none")
    mlp_lora_rank: NonNegativeInt = _key(0, "LoRA rank of every MLP; 0: none")
    embedding_rank: NonNegativeInt = _key(0, "LoRA rank of the token embedding; 0: none")
    lora_targets: str = _key(
        "",
        "adapters on these, e.g. q_proj,v_proj or all-linear or attn.*.q,mlp.3; all layers without start frozen",
    )
    lora_rank: NonNegativeInt = _key(0, "LoRA rank of lora_targets")
    lora_alpha: PositiveFloat = _key(8.0, "LoRA alpha; an adapter's output is scaled by alpha / rank")
    use_rslora: bool = _key(False, "scale the output of adapters that are added by alpha / sqrt(rank)")
    init_lora_weights: Literal["default", "pissa"] = _key(
        "default", "adapters that are added start: default, from zero | pissa, from the weight's principal part"
    )
    lora_dropout: Fraction = _key(0.0, "dropout probability of what the adapters of Linear layers read")
    # optimizer and learning rate
    learning_rate: NonNegativeFloat = _key(6e-4, "peak learning rate")
    max_iters: NonNegativeInt = _key(600000, "iterations of the whole run")
    optimizer: OptimizerName = _key("adamw", "adamw | sgd (with momentum)")
    weight_decay: NonNegativeFloat = _key(
        1e-1, "weight decay, on tensors of two and more dimensions (adamw: decoupled; sgd: added to the gradient)"
    )
    beta1: Fraction = _key(0.9, "adamw: beta1")
    beta2: Fraction = _key(0.95, "adamw: beta2")
    momentum: Fraction = _key(0.9, "sgd: momentum")
    grad_clip: NonNegativeFloat = _key(1.0, "largest global gradient norm; 0: no clipping")
    decay_lr: bool = _key(True, "follow lr_schedule; False: learning_rate throughout")
    lr_schedule: Literal["cosine", "linear", "constant", "wsd"] = _key(
        "cosine", "cosine | linear | constant | wsd (warmup, stable, decay)"
    )
    warmup_iters: NonNegativeInt = _key(2000, "iterations of linear warmup")
    lr_decay_iters: NonNegativeInt = _key(600000, "iteration at which min_lr is reached")
    min_lr: NonNegativeFloat = _key(6e-5, "where the decay ends; never lifts the rate above learning_rate")
    wsd_decay_fraction: PositiveFloat = _key(0.2, "wsd: the share of lr_decay_iters that decays, linearly")
    early_stopping_patience: NonNegativeInt = _key(0, "evaluations without a gain before the run ends; 0: never")
    early_stopping_min_delta: NonNegativeFloat = _key(0.0, "how much lower the loss must be to count as a gain")
    early_stopping_metric: MetricName = _key(
        VAL_LOSS, "the metric that must go down; of another than val_loss, patience counts logged values"
    )
    # memory
    activation_checkpointing: bool = _key(
        False, "keep only the input of each block for the backward pass and compute its inside again there"
    )
    weights_dtype: WeightsDtype = _key(
        "float32", "float32 | bfloat16: matrices that do not train (frozen, or under an adapter) are kept in it"
    )
    frozen_layers: str = _key("", "layers that do not train from the start: names and globs with commas, e.g. wte,ln_*")
    # when something goes wrong
    on_sick_step: Literal["skip", "rollback", "stop"] = _key(
        "skip", "a non-finite or spiking step never updates weights; then: skip it | rollback to a checkpoint | stop"
    )
    sick_step_limit: PositiveInt = _key(10, "sick steps in a row (or rollbacks) after which the run stops in any case")
    spike_sigma: NonNegativeFloat = _key(
        0.0, "a loss this many standard deviations above its running mean is sick; 0: off (on CUDA it waits each step)"
    )
    rollback_skip_batches: NonNegativeInt = _key(0, "global batches to leave out beyond the sick one after a rollback")
    rollback_rewarm_iters: NonNegativeInt = _key(0, "iterations over which the rate climbs back after a rollback")
    memory_checkpoint_percent: NonNegativeFloat = _key(
        0.0, "save and warn when host or device memory crosses this percentage, looked at every log_interval; 0: never"
    )
    inject: str = _key("", "faults to try out, e.g. nan@120,oom@200:rank1,kill@250 (each once per run folder)")
    # system
    backend: str = _key("auto", "torch.distributed backend; auto: nccl on CUDA, else gloo")
    parallel: Literal["ddp", "fsdp"] = _key(
        "ddp", "ddp: a copy of the model on every rank | fsdp: weights, gradients and moments sharded over the ranks"
    )
    device: str = _key("auto", "auto | cpu | cuda | cuda:N | mps")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _key("auto", "auto | float32 | bfloat16 | float16")
    compile: bool = _key(True, "torch.compile, block by block")
    seed: NonNegativeInt = _key(1337, "of the initial weights, the order of the data and dropout")
    seeds: Seeds = _key(
        (), "e.g. 1,2,3: a run for each, one after the other, in OUT_DIR/seed-N; then mean and spread in summary.json"
    )

    @property
    def trackers(self) -> tuple[str, ...]:
        """The trackers that get the run's records; none where nothing is written."""
        wanted = (*(["wandb"] if self.wandb_log else []), *self.tracker)
        return () if self.eval_only else tuple(dict.fromkeys(wanted))

    @property
    def datasets(self) -> dict[str, float]:
        """The data sets of `dataset` and their shares, which add up to 1."""
        return {self.dataset: 1.0} if isinstance(self.dataset, str) else shares_of(self.dataset)

    @property
    def evaluated(self) -> dict[str, float]:
        """The data sets that `val_loss` is made of and their shares, which add up to 1."""
        return shares_of(self.eval_mixture) if self.eval_mixture else self.datasets


ALIASES = {"scaling_schedule_file": "schedule", "target_architecture_config": "target_architecture"}
KEYS = tuple(TrainConfig.model_fields)
# Keys of other programs (nanoGPT's fork with an orchestrator, CleanGPT, the NanoGPT 124M trainer) -> what is ours.
# docs/migrating.md has the whole table.
OTHER_KEYS = {
    **dict.fromkeys(("train_shard_filenames", "num_train_shards"), "dataset names a folder and all its files"),
    "rotary_max_position_embeddings": "they have no largest number; block_size is the longest sequence",
    "embedding_mode": "write embedding_rank, the rank of the embedding's adapter; 0: none",
    "scaling_schedule": "write the entries into a file and give it as schedule",
    "ignored_outlayers_sum": "leave it out: no loss here is computed without some targets",
    "RARE_TOKEN_ID": "vocab_remapping_file says which id is the rare one: leave it out",
    "vocab_size": "it is the data set's (meta.json), or shrunken_vocab_size",
    "train_iters": "write max_iters, in optimizer steps",
    "num_epochs": "write max_iters; a pass over the data is seen in the metric passes",
    **dict.fromkeys(("exp_name", "exp_profile"), "write out_dir, and wandb_run_name"),
    "wandb": "write wandb_log",
    "init_from_ckpt": "write init_from",
    "model": "write norm, activation and so on; config/llama_small.py has those of a Llama",
    "num_workers": "a thread reads the next batch while one is computed on: leave it out",
    "n_embed": "write n_embd",
    "n_position": "write block_size",
    "n_inner": "write n_hidden",
    "n_q_head": "write n_head",
    "activation_fn": "write activation",
    **dict.fromkeys(("rms_norm_eps", "layer_norm_epsilon"), "write norm_eps"),
    "add_bias": "write bias",
    "weight_tying": "write tie_weights",
    **dict.fromkeys(("use_amp", "fp16"), "write dtype"),
    "dropout_attn": "write dropout",
    **dict.fromkeys(("mask_out_token", "pad_token_id"),
                    "a mask beside the token files says which targets the loss counts: leave it out"),
    "batch_size_per_gpu": "write batch_size",
    "batch_grad_accum_step": "write gradient_accumulation_steps, over all processes together",
    "eval_batch_size_per_gpu": "write eval_batch_size",
    "adam_eps": "it is 1e-8: leave it out",
    "use_kvcache": "sampling always has a cache: leave it out",
    "clip_grad": "write grad_clip",
    **{f"adam_beta{n}": f"write beta{n}" for n in (1, 2)},
    "eval_batch_num": "write eval_iters",
    "eval_score_interval": "write eval_tasks and eval_tasks_interval",
    "skip_first_eval": "the first evaluation is what the others are compared with: leave it out",
    **dict.fromkeys(("save_ckpt", "save_snapshot", "save_strategy"), "write save_interval, keep_best and keep_every"),
    **dict.fromkeys(("snapshot_save_interval", "checkpoint_interval"), "write save_interval"),
    "save_ckpt_num": "write keep_best",
    "use_early_stopping": "write early_stopping_patience",
    "early_stopping_delta": "write early_stopping_min_delta",
    "lr_begin": "write warmup_iters, after which learning_rate is reached",
    "lr_max": "write learning_rate",
    "lr_decay_factor": "write min_lr",
    "lr_decay_style": "write lr_schedule",
    "lr_warmup_ratio": "write warmup_iters, in iterations",
    "lr_decay_ratio": "write lr_decay_iters, in iterations",
    **dict.fromkeys(("wd_begin", "wd_end", "wd_decr_style"),
                    "write weight_decay, and set_weight_decay with `over` and `style` in a schedule"),
    **dict.fromkeys(("ga_begin", "ga_end", "grad_accum_step_incr_style"),
                    "write gradient_accumulation_steps, and set_grad_accum with `over` and `style` in a schedule"),
    "override_opt_param_scheduler": "a key that is given on a resume overrides what was recorded: leave it out",
    "mode": "write schedule: schedules/pretrain_midtrain_chat.yaml has its stages",
    **dict.fromkeys(("no_evals", "run_core_evals", "run_chatcore_evals"), "write eval_tasks"),
    "core_eval_interval": "write eval_tasks_interval",
    "no_muon": "write optimizer",
    "aspect_ratio": "write depth, and n_embd where its 64 for each block is not meant",
    "head_dim": "write head_size",
    "target_flops": "write max_iters; --plan prints the FLOPs of a token",
    "param_data_ratio": "write max_iters; depth prints how many iterations are 10 tokens a weight",
}  # fmt: skip


# No configuration is near these. They bound what a hostile file can make of a short line.
LONGEST_FILE = 64 * 1024
"""Bytes."""
MOST_STATEMENTS = 1000
_LONGEST_TEXT = 4096
"""Characters, as many as a path may have."""


def parse_text(text: str) -> Any:
    """A command-line value: a Python literal where it reads as one, else the text itself."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
    return text if is_large(value) else value


_BINARY = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_UNARY = {ast.UAdd: operator.pos, ast.USub: operator.neg, ast.Not: operator.not_}


def _round(number: float, digits: int = 0) -> float:
    if abs(digits) > 400:
        raise ValueError(f"round to {digits} digits is not a setting")
    return round(number, digits) if digits else round(number)


_CALLS = {
    "str": str,
    "int": int,
    "float": float,
    "bool": bool,
    "round": _round,
    "min": min,
    "max": max,
    "abs": abs,
    "time.time": time.time,
    "time.strftime": time.strftime,
}


def _evaluate(node: ast.expr, names: Mapping[str, Any]) -> Any:
    """The value of an expression of a config file; raises ValueError for what is not plain or too large.

    Every part of an expression is bounded, so that no operation ever meets a large operand.
    """
    value = _value(node, names)
    if is_large(value):
        raise ValueError(f"a whole number of {value.bit_length()} bits is not a setting")
    if isinstance(value, str) and len(value) > _LONGEST_TEXT:
        raise ValueError(f"a text of {len(value)} characters is not a setting (at most {_LONGEST_TEXT})")
    if isinstance(value, list) and (len(value) > 100 or any(isinstance(item, list) for item in value)):
        raise ValueError("a list has at most 100 values, and no lists among them")
    return value


def _value(node: ast.expr, names: Mapping[str, Any]) -> Any:
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name(id=name) if name in names:
            return names[name]
        case ast.Name(id=name):
            raise ValueError(f"the name {name} is not assigned above{nearest(name, names)}")
        case ast.Dict(keys=keys, values=values) if len(keys) <= MOST_SOURCES and None not in keys:
            return {_evaluate(key, names): _evaluate(value, names) for key, value in zip(keys, values, strict=True)}
        case ast.List(elts=elements) | ast.Tuple(elts=elements):
            return [_evaluate(element, names) for element in elements]
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
            return _UNARY[type(op)](_evaluate(operand, names))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            a, b = _evaluate(left, names), _evaluate(right, names)
            if isinstance(op, ast.Pow) and (abs(a) > 1e6 or abs(b) > 64):
                raise ValueError("a power this large is not a setting")
            if isinstance(op, ast.Mult | ast.Mod) and not (isinstance(a, int | float) and isinstance(b, int | float)):
                raise ValueError("only numbers are multiplied or divided")
            return _BINARY[type(op)](a, b)
        case ast.IfExp(test=test, body=body, orelse=orelse):
            return _evaluate(body if _evaluate(test, names) else orelse, names)
        case ast.Call(func=func, args=args, keywords=[]) if ast.unparse(func) in _CALLS:
            return _CALLS[ast.unparse(func)](*(_evaluate(arg, names) for arg in args))
        case ast.JoinedStr(values=values):
            if len(values) > 100:
                raise ValueError("an f-string of more than 100 parts is not a setting")
            return "".join(str(_evaluate(value, names)) for value in values)
        case ast.FormattedValue(value=value, conversion=-1, format_spec=None):
            return _evaluate(value, names)
    raise ValueError(f"`{ast.unparse(node)}` is not a plain value (literals, arithmetic and earlier names are)")


def read_config_file(path: str | Path) -> tuple[dict[str, tuple[Any, str]], list[str]]:
    """Read a file of plain assignments without executing it.

    Returns ({key: (value, "file:line")}, problems). Names that begin with an underscore are helpers of the file.
    """
    if str(path).endswith((".yaml", ".yml", ".json")):
        return {}, [f"{path}: a schedule is given as --schedule={path}; only CONFIG.py files are given by their name"]
    try:
        tree = ast.parse(read_at_most(path, LONGEST_FILE).decode("utf-8"), filename=str(path))
    except OSError as error:
        return {}, [f"{path}: cannot be read ({error.strerror})"]
    except SyntaxError as error:
        return {}, [f"{path}:{error.lineno}: not Python ({error.msg})"]
    except (ValueError, RecursionError, MemoryError) as error:
        return {}, [f"{path}: not a config file ({error})"]

    if len(tree.body) > MOST_STATEMENTS:
        return {}, [f"{path}: a config file has at most {MOST_STATEMENTS} statements, got {len(tree.body)}"]
    names = {name: info.default for name, info in TrainConfig.model_fields.items()}
    found: dict[str, tuple[Any, str]] = {}
    problems = []
    for statement in tree.body:
        place = f"{path}:{statement.lineno}"
        if len(problems) > MOST_PROBLEMS:
            problems.append(f"{place}: this line and those after it were not looked at")
            break
        match statement:
            case ast.Expr(value=ast.Constant(value=str())):
                continue  # a docstring
            case ast.Import(names=[ast.alias(name="time", asname=None)]):
                continue  # for names such as 'ft-' + str(time.time())
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                pass
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                pass
            case _:
                problems.append(f"{place}: only assignments KEY = VALUE are allowed here")
                continue
        try:
            names[name] = _evaluate(value, names)
        except (ValueError, TypeError, ArithmeticError, RecursionError) as error:
            problems.append(f"{place}: {name}: {error}")
            continue
        if not name.startswith("_"):
            found[name] = (names[name], place)
    return found, problems


def unread(optimizer: str, given: Mapping[str, str]) -> list[str]:
    """Numbers of other optimizers that the command line gives. A file may hold those of several."""
    own, numbers = OPTIMIZER_NUMBERS[optimizer], {key for keys in OPTIMIZER_NUMBERS.values() for key in keys}
    return [
        f"{place}: {optimizer} has no {key}; it has {' and '.join(own)}"
        for key, place in given.items()
        if key in numbers - {*own} and place.startswith("--")
    ]


def resolve(files: Sequence[str | Path], command_line: Sequence[tuple[str, str]]) -> tuple[TrainConfig, dict[str, str]]:
    """Config files in order, then `--KEY=VALUE` pairs as text; later wins.

    Returns the configuration and {key: place where it was given}. Raises Refused with every problem found.
    """
    given: dict[str, tuple[Any, str]] = {}
    problems: list[str] = []
    for path in files:
        found, errors = read_config_file(path)
        given.update({ALIASES.get(key, key): pair for key, pair in found.items()})
        problems += errors
    for key, text in command_line:
        key = ALIASES.get(key, key)
        kind = TrainConfig.model_fields[key].annotation if key in KEYS else None
        is_text = kind is str or (kind == tuple[str, ...] and text[:1] not in "[(")
        is_text |= kind == DataSets and text[:1] != "{"
        given[key] = (text if is_text else parse_text(text), f"--{key}")

    for i, key in enumerate([key for key in given if key not in KEYS]):
        _, place = given.pop(key)
        if i < MOST_PROBLEMS:
            problems.append(f"{place}: unknown key {shown(key)[1:-1]}{_hint(key)}")
    try:
        config = TrainConfig(**{key: value for key, (value, _) in given.items()})
    except ValidationError as error:
        for location, message in problems_of(error):
            key = str(location[0])
            problems.append(f"{given[key][1]}: {key} {message}")
    places = {key: place for key, (_, place) in given.items()}
    if not problems and config.init_from != "resume":  # else the checkpoint knows the optimizer
        problems = unread(config.optimizer, places)
    if problems:
        raise Refused(problems)
    return check_config(_with_depth(config)), places


def _hint(key: str) -> str:
    """What to write instead of an unknown key, as the end of a sentence; nothing where nothing is near."""
    known = key.replace("-", "_")
    return f"; {OTHER_KEYS[known]}" if known in OTHER_KEYS else nearest(key, [*KEYS, *ALIASES])


def _model_of(values: Mapping[str, Any]) -> ModelConfig:
    return ModelConfig(vocab_size=1, **model_values(SimpleNamespace(**values)))


def _with_depth(config: TrainConfig) -> TrainConfig:
    """With the keys that follow from `depth`. A resume has them in its checkpoint. Raises Refused."""
    if not config.depth or config.init_from == "resume":
        return config
    if config.init_from != "scratch":
        raise Refused(
            f"depth {config.depth} describes a model from scratch, and init_from {config.init_from} has its own"
        )
    try:
        update = depth.derived(config.model_dump(), config.model_fields_set, _model_of)
    except (ValueError, ArithmeticError) as error:
        raise Refused([f"depth {config.depth}: {problem}" for problem in str(error).split("; ")]) from None
    return config.model_copy(update=update)


def depth_told(config: TrainConfig, given: Mapping[str, str]) -> list[str]:
    """What followed from `depth`, and from where, in lines for a person; none without it."""
    return depth.told(config.model_dump(), given, _model_of) if config.depth else []


def check_config(config: TrainConfig) -> TrainConfig:
    """The rules that join several keys. Raises Refused with all that are broken."""
    problems = []
    if bool(config.shrunken_vocab_size) != bool(config.vocab_remapping_file):
        problems.append(
            "shrunken_vocab_size and vocab_remapping_file go together: got "
            f"{config.shrunken_vocab_size} and {shown(config.vocab_remapping_file)}"
        )
    if config.wsd_decay_fraction > 1:
        problems.append(f"wsd_decay_fraction must be in (0, 1], got {config.wsd_decay_fraction}")
    try:
        parse_faults(config.inject)
    except ValueError as error:
        problems.append(str(error))
    if config.checkpoint != "latest" and not config.eval_only and config.init_from == "resume":
        problems.append(
            f"checkpoint {shown(config.checkpoint)} is for eval_only with init_from=resume: "
            "a run goes on from its latest checkpoint"
        )
    known = [*MODEL_KEYS, "vocab_size"]
    problems += [
        f"target_architecture: {shown(key)} is nothing that a model has{nearest(key, known)}"
        for key in config.target_architecture
        if key not in known
    ]
    if len(set(config.seeds)) < len(config.seeds):
        problems.append(f"seeds {','.join(map(str, config.seeds))}: each seed is one run, give it once")
    if config.seeds and config.eval_only:
        problems.append("seeds and eval_only: evaluate one run, with --out_dir=OUT_DIR/seed-N")
    if not config.out_dir:
        problems.append("out_dir is empty")
    if problems:
        raise Refused(problems)
    return config


def help_text() -> str:
    """Every key with its default and one line of meaning."""
    width = max(len(key) for key in KEYS) + 3
    lines = ["Keys, as --KEY=VALUE or --KEY VALUE, or as assignments in a CONFIG.py:"]
    for key, info in TrainConfig.model_fields.items():
        lines.append(f"  --{key:<{width}}{info.default!r:<16} {info.description}")
    return "\n".join(lines)
