"""PEFT's LoRA folders (adapter_config.json, adapter_model.safetensors), read onto their base model and written.

What a folder says and we cannot hold is refused by its name, and so is what a model has and no folder can say. Nothing
is unpickled. Paths and factors of ours are those of model/gpt.py; peft's are those of transformers' classes.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from orchestrate.model import hugging_face
from orchestrate.model.adapters import ADAPTER, factor_names
from orchestrate.model.config import PROJECTIONS, LoraSpec, ModelConfig
from orchestrate.model.families import FAMILIES, Family
from orchestrate.model.gpt import GPT, adapted_modules
from orchestrate.model.lora import reshape_lora
from orchestrate.model.shards import Shards

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# Keys of adapter_config.json that say nothing of the function of the adapted model.
_SILENT = {
    "auto_mapping", "base_model_name_or_path", "fan_in_fan_out", "inference_mode", "megatron_core", "peft_type",
    "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type", "ensure_weight_tying",
}  # fmt: skip
_READ = {
    "alpha_pattern", "exclude_modules", "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha",
    "lora_dropout", "r", "rank_pattern", "target_modules", "use_rslora",
}  # fmt: skip
_REASONS = {
    "use_dora": "DoRA scales the columns of the sum",
    "modules_to_save": "trained copies of the base's modules",
    "bias": "trained biases of the base; bias='none' is held",
    "lora_bias": "a bias of an adapter's own",
    "trainable_token_indices": "trained rows of the embedding",
    "layer_replication": "a base of another depth",
    "target_parameters": "adapters on parameters that no module owns",
}
# Initialisations that leave the base's weights alone; whatever they made is in the file.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class Described:
    """What a PEFT folder is.

    Attributes:
        base: its base model, as hugging_face.load takes it.
        model: the base's configuration with the folder's adapters.
        lora_alpha, use_rslora, init_lora_weights, dropout: what an adapter that is added would have.
        tensors: name of each tensor of the file -> of our parameter, or of the base's that it repeats.
    """

    base: str
    model: ModelConfig
    lora_alpha: float
    use_rslora: bool
    init_lora_weights: str
    dropout: float
    tensors: Mapping[str, str]


def is_peft(folder: str | Path) -> bool:
    """Whether it is a folder with a PEFT adapter."""
    return (Path(folder) / CONFIG).is_file()


def modules_of(config: ModelConfig, family: Family) -> dict[str, str]:
    """Every module that peft can adapt in a model of this family, by its name there -> our adapter."""
    found = {str(family.modules["transformer.wte"]): "wte"}
    for n in range(config.n_layer):
        for kind, parts in PROJECTIONS.items():
            for part, matrix in parts.items():
                theirs = family.modules.get(f"{kind}.{matrix}", "")
                # Where they have q, k and v apart there is no module for all of them, and the other way round.
                apart = {} if isinstance(theirs, str) else dict(zip(config.qkv_rows, theirs, strict=True))
                if name := apart.get(part) if apart or part in config.qkv_rows else theirs:
                    found[f"{family.blocks.format(n)}{name}"] = f"{kind}.{n}.{part}"
    return found if config.tie_weights else {**found, "lm_head": "lm_head"}


# ---------------------------------------------------------------------------------------------- in


def describe(folder: str, base_model: str = "") -> Described:
    """Read what a PEFT folder says, without its weights. Raises ValueError with all that cannot be held.

    Args:
        base_model: its base, where base_model_name_or_path is not to be followed.
    """
    try:
        return _described(folder, base_model)
    except ValueError as error:
        raise ValueError(f"init_from {folder}: {error}") from None


def _described(folder: str, base_model: str) -> Described:
    given = _config(Path(folder) / CONFIG)
    base = base_model or given.get("base_model_name_or_path") or ""
    if not isinstance(base, str) or not base:
        raise ValueError(f"{CONFIG} does not name a base model: give its folder as base_model")
    short = base.removeprefix("openai-community/")
    base = short if short in hugging_face.GPT2_MODELS else base
    if base in hugging_face.GPT2_MODELS:
        config, family = hugging_face.gpt2_config(base), FAMILIES["gpt2"]
    elif not Path(base).is_dir() and hugging_face.is_path(base):
        raise ValueError(f"its base model {base}: there is no such folder; base_model says where it is")
    elif not Path(base).is_dir():
        raise ValueError(f"its base model {base} is no folder here: download it, and give its folder as base_model")
    else:
        config, family = hugging_face.config_from_folder(base), _family(base)
    modules = modules_of(config, family)
    shapes = {name.removeprefix(_PREFIX): shape for name, shape in _file(Path(folder)).shapes.items()}
    specs = _specs(given, [*modules, *(["lm_head"] if config.tie_weights else [])])
    tensors: dict[str, str] = {}
    lora: dict[str, LoraSpec] = {}
    wte = next(name for name, ours in modules.items() if ours == "wte")
    if config.tie_weights and (wte in specs or "lm_head" in specs):
        # Of a tied pair peft writes both, and names the embedding alone or both.
        if not (wte in specs and "lm_head.lora_A.weight" in shapes and given.get("ensure_weight_tying")):
            raise ValueError(
                f"{wte} and lm_head are one matrix, and an adapter on one of them alone has no form here; "
                "ensure_weight_tying is how peft says that it is on both"
            )
        specs.pop("lm_head", None)
        tensors |= {f"lm_head.lora_{factor}.weight": "" for factor in "AB"}  # the embedding's once more: load compares
    for module, spec in specs.items():
        lora[modules[module]] = spec
        for path, parts in adapted_modules(replace(config, lora={modules[module]: spec})).items():
            (part,) = parts
            left, right = factor_names(path, path == "transformer.wte", part)
            if path == "transformer.wte":
                tensors |= {f"{module}.lora_embedding_A": left, f"{module}.lora_embedding_B": right}
            else:
                tensors |= {f"{module}.lora_A.weight": right, f"{module}.lora_B.weight": left}
    model = replace(config, lora=lora)
    missing = [name for name in tensors if name not in shapes]
    repeated = {f"{name}{infix}.weight" for name in (wte, "lm_head") for infix in ("", ".base_layer")}
    unknown = [name for name in shapes if name not in tensors and name not in repeated]
    if missing or unknown:
        raise ValueError(
            f"{WEIGHTS} and {CONFIG} do not agree: "
            + "; ".join([*(f"missing {n}" for n in missing[:3]), *(f"no module here takes {n}" for n in unknown[:3])])
        )
    for name in repeated & set(shapes):
        of = "lm_head.weight" if name.startswith("lm_head") and not config.tie_weights else "transformer.wte.weight"
        tensors[name] = of
    with torch.device("meta"):
        wanted = {name: p.shape for name, p in GPT(model).named_parameters()}
    for name, ours in tensors.items():
        ours = ours if ours in wanted else ours.replace(".weight", ".base_layer.weight")
        if ours in wanted and wanted[ours] != shapes[name]:
            raise ValueError(f"{name} has shape {tuple(shapes[name])}, expected {tuple(wanted[ours])}")
    start = "pissa" if given.get("init_lora_weights") == "pissa" else "default"
    return Described(
        base, model, float(given["lora_alpha"]), given["use_rslora"], start, float(given["lora_dropout"]), tensors
    )


def load(folder: str, base_model: str = "", keep: hugging_face.Keep = hugging_face.as_is) -> GPT:
    """A PEFT folder's model: its base, in float32 or as `keep` says, with the adapters on it. Raises ValueError.

    A folder that PiSSA started is on the rest of the base's weights, as peft makes it when it loads one.
    """
    described = describe(folder, base_model)
    base = hugging_face.load(described.base, keep)
    weights = {name: parameter.detach() for name, parameter in base.named_parameters()}
    model, _ = reshape_lora(base, described.model, torch.Generator().manual_seed(0))
    file = _file(Path(folder))
    with torch.no_grad():
        for key, ours in described.tensors.items():
            value = file.read(_PREFIX + key)
            if ours in weights:
                if not torch.equal(value.to(weights[ours].dtype), weights[ours]):
                    raise ValueError(f"init_from {folder}: {key} is not as in the base {described.base}: it trained")
            elif ours:
                model.get_parameter(ours).copy_(value)
            else:
                twin = "B" if key.endswith("lora_A.weight") else "A"
                (name,) = (n for n in described.tensors if n.endswith(f"lora_embedding_{twin}"))
                if not torch.equal(value, file.read(_PREFIX + name).T):
                    raise ValueError(f"init_from {folder}: {key} is not that of the embedding, which it is tied to")
    return model


_PREFIX = "base_model.model."


def _family(folder: str) -> Family:
    """Of a folder that hugging_face has read."""
    return FAMILIES[json.loads((Path(folder) / "config.json").read_text("utf-8"))["model_type"]]


def _config(path: Path) -> dict[str, Any]:
    """adapter_config.json with the defaults of peft's LoraConfig. Raises ValueError with all that cannot be held."""
    from peft import LoraConfig

    try:
        given = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} cannot be read ({error})") from None
    if not isinstance(given, dict) or given.get("peft_type") != "LORA":
        kind = given.get("peft_type") if isinstance(given, dict) else None
        raise ValueError(f"{path.name}: peft_type {kind!r}; only LORA can be held")
    plain = {f.name: getattr(LoraConfig(), f.name) for f in fields(LoraConfig)}
    problems = [
        f"{key} {value!r}" + (f" ({_REASONS[key]})" if key in _REASONS else "")
        for key, value in given.items()
        if key not in _SILENT | _READ and value and value != plain.get(key)
    ]
    values = {**{key: plain[key] for key in _READ}, **given}
    start = values["init_lora_weights"]
    if start not in (*_PLAIN_STARTS, "pissa"):
        problems.append(f"init_lora_weights {start!r} (it changes the base's weights in a way of its own)")
    if problems:
        raise ValueError(f"{path.name}: cannot be held: {', '.join(problems)}")

    def number(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

    def rank(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value > 0

    def texts(value: Any) -> bool:
        return isinstance(value, str) or (isinstance(value, list) and all(isinstance(one, str) for one in value))

    def by_name(value: Any, check: Any) -> bool:
        return isinstance(value, dict) and all(check(one) for one in value.values())

    layers = values["layers_to_transform"]
    right = {
        "r": rank(values["r"]),
        "lora_alpha": number(values["lora_alpha"]) and values["lora_alpha"] > 0,
        "lora_dropout": number(values["lora_dropout"]) and 0 <= values["lora_dropout"] < 1,
        "use_rslora": isinstance(values["use_rslora"], bool),
        "rank_pattern": by_name(values["rank_pattern"] or {}, rank),
        "alpha_pattern": by_name(values["alpha_pattern"] or {}, number),
        "target_modules": bool(values["target_modules"]) and texts(values["target_modules"]),
        "exclude_modules": texts(values["exclude_modules"] or ""),
        "layers_pattern": texts(values["layers_pattern"] or ""),
        "layers_to_transform": layers is None
        or all(isinstance(n, int) for n in (layers if isinstance(layers, list) else [layers])),
    }
    if wrong := [f"{key} {values[key]!r}" for key, well in right.items() if not well]:
        raise ValueError(f"{path.name}: not what peft writes: {', '.join(wrong)}")
    return values


def _specs(given: dict[str, Any], modules: list[str]) -> dict[str, LoraSpec]:
    """The adapter of each module that the configuration names, in peft's own way of matching. Raises ValueError."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils.other import get_pattern_key

    targets = given["target_modules"]
    if isinstance(targets, str) and targets.lower() == "all-linear":
        targets = [name for name in modules if not name.endswith(("lm_head", "wte", "embed_tokens"))]
    try:
        config = LoraConfig(
            target_modules=targets,
            **{key: given[key] for key in ("exclude_modules", "layers_to_transform", "layers_pattern")},
        )
        # An excluded module is told by an object that is true.
        matched = [name for name in modules if (m := check_target_module_exists(config, name)) and not _excluded(m)]
        specs = {}
        for name in matched:
            rank, alpha = (
                (given[pattern] or {}).get(get_pattern_key((given[pattern] or {}).keys(), name), given[default])
                for pattern, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
            )
            start = "pissa" if given["init_lora_weights"] == "pissa" else "default"
            specs[name] = LoraSpec(rank, float(alpha), given["use_rslora"], start)
    except (re.error, ValueError) as error:
        raise ValueError(f"{CONFIG}: {error}") from None
    if not specs:
        raise ValueError(f"target_modules {given['target_modules']!r} names no module of the base")
    return specs


def _excluded(match: Any) -> bool:
    return type(match).__name__ == "_ExcludedModule"


def _file(folder: Path) -> Shards:
    """The tensors of a folder, whose names all have peft's prefix. Raises ValueError."""
    if not (folder / WEIGHTS).is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        hint = "; adapter_model.bin is pickled and not read: load it with peft and save it anew" if pickled else ""
        raise ValueError(f"there is no {WEIGHTS}{hint}")
    file = Shards(folder / WEIGHTS)
    if other := [name for name in file.shapes if not name.startswith(_PREFIX)]:
        raise ValueError(f"{WEIGHTS}: no module here takes {other[0]}, because peft's names begin with {_PREFIX}")
    return file


# ---------------------------------------------------------------------------------------------- out


@dataclass(frozen=True)
class _Pair:
    """Factors of one module in peft's sense: scaling * b @ a is added to its weight, (rows, columns)."""

    a: Tensor
    b: Tensor
    alpha: float
    use_rslora: bool

    @property
    def spec(self) -> LoraSpec:
        return LoraSpec(len(self.a), self.alpha, self.use_rslora)


def write(model: GPT, folder: str | Path, base: str, *, lora_dropout: float = 0.0) -> list[str]:
    """Write a model's adapters as a PEFT folder: PeftModel.from_pretrained(base, folder) computes what the model does.

    An adapter on queries, keys and values together is GPT-2's c_attn; where transformers has them apart they share A.
    Adapters on them one by one are, on GPT-2's c_attn, one whose B is block diagonal. Where the base is a folder here,
    every weight is compared with it: a matrix may differ by a product of low rank (PiSSA, ReLoRA, a rank that shrank,
    an adapter that was merged), which becomes part of its adapter.

    Args:
        base: the base model, for base_model_name_or_path: a Hugging Face folder, or a name.
        lora_dropout: what adapter_config.json says of dropout.

    Returns what to tell the user, one sentence each. Raises ValueError with all that has no form as adapters.
    """
    from peft import LoraConfig, TaskType

    if model.fading:
        raise ValueError(f"{', '.join(model.fading)} is fading in, and a PEFT folder cannot say so")
    plain = replace(model.config, lora={})
    there = hugging_face.load(base) if Path(base).is_dir() else None
    if there is not None:
        _check_shape(plain, there.config, base)
    family = hugging_face.family_of(plain) if there is None else _family(base)
    modules = modules_of(plain, family)
    pairs, told = _pairs(model, modules), []
    if there is not None:
        pairs = _on_base(model, modules, pairs, there, base)
    else:
        if started := [name for name, spec in model.config.lora.items() if spec.init_lora_weights == "pissa"]:
            raise ValueError(
                f"{', '.join(started)} started by PiSSA, which changed the base's weights: only with the base's "
                f"folder can it be written, and {base} is not here"
            )
        told.append(f"the weights under the adapters were not compared with {base}, which is no folder here")
    if not pairs:
        raise ValueError("there is no adapter in this model; export it with --to hf")

    tied = plain.tie_weights and any(modules[name] == "wte" for name in pairs)
    tensors: dict[str, Tensor] = {}
    for name, pair in pairs.items():
        if modules[name] == "wte":
            tensors |= {f"{name}.lora_embedding_A": pair.b.T, f"{name}.lora_embedding_B": pair.a.T}
            if tied:
                tensors |= {"lm_head.lora_A.weight": pair.a, "lm_head.lora_B.weight": pair.b}
        else:
            tensors |= {f"{name}.lora_A.weight": pair.a, f"{name}.lora_B.weight": pair.b}
    named = {**{name: pair.spec for name, pair in pairs.items()}}
    if tied:
        named["lm_head"] = named[next(name for name in pairs if modules[name] == "wte")]
    rslora = all(spec.use_rslora for spec in named.values())
    alphas = {name: _alpha(spec, rslora) for name, spec in named.items()}
    rank, alpha = (
        Counter(values).most_common(1)[0][0] for values in ([s.rank for s in named.values()], alphas.values())
    )
    options = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=str(base),
        r=rank,
        lora_alpha=_whole(alpha),
        lora_dropout=lora_dropout,
        use_rslora=rslora,
        target_modules=_targets(list(named), [*modules, *(["lm_head"] if plain.tie_weights else [])]),
        rank_pattern={name: spec.rank for name, spec in named.items() if spec.rank != rank},
        alpha_pattern={name: _whole(value) for name, value in alphas.items() if value != alpha},
        fan_in_fan_out=bool(family.turned),
        ensure_weight_tying=tied,
        inference_mode=True,
    )
    Path(folder).mkdir(parents=True, exist_ok=True)
    whole = {_PREFIX + name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
    save_file(whole, Path(folder) / WEIGHTS, metadata={"format": "pt"})
    options.save_pretrained(str(folder))
    said = json.loads((Path(folder) / CONFIG).read_text("utf-8"))
    said["target_modules"] = sorted(said["target_modules"])  # peft writes a set, in any order
    (Path(folder) / CONFIG).write_text(json.dumps(said, indent=2, sort_keys=True) + "\n", "utf-8")
    return told


def _whole(number: float) -> float | int:
    return int(number) if number == int(number) else number


def _alpha(spec: LoraSpec, rslora: bool) -> float:
    """The alpha that gives the spec's scaling under the one use_rslora of a PEFT folder, true where it is of all."""
    return spec.alpha if spec.use_rslora == rslora else spec.scaling * spec.rank


def _targets(named: list[str], modules: list[str]) -> list[str]:
    """target_modules: the last part of a name where all modules with it are meant, else whole names."""
    last = {name: name.rpartition(".")[2] for name in modules}
    whole = {part for part in last.values() if all(name in named for name in modules if last[name] == part)}
    return sorted({last[name] if last[name] in whole else name for name in named})


def _pairs(model: GPT, modules: Mapping[str, str]) -> dict[str, _Pair]:
    """The factors of a model's adapters by the name of transformers' module."""
    config = model.config
    there = {ours: name for name, ours in modules.items()}
    found: dict[str, _Pair] = {}
    for path, specs in adapted_modules(config).items():
        embedding = path == "transformer.wte"
        given = {}
        for part, spec in specs.items():
            left, right = (model.get_parameter(n).detach() for n in factor_names(path, embedding, part))
            a, b = (right.T, left.T) if embedding else (right, left)
            given[part] = _Pair(a, b, spec.alpha, spec.use_rslora)
        names = _names_of(path, config, there)
        if ADAPTER in given and ADAPTER in names:
            found[names[ADAPTER]] = given[ADAPTER]
        elif ADAPTER in given:
            pair = given[ADAPTER]
            found |= {names[part]: replace(pair, b=pair.b[rows]) for part, rows in config.qkv_rows.items()}
        elif ADAPTER in names:
            a = torch.cat([pair.a for pair in given.values()])
            b, start = a.new_zeros(config.qkv_rows["v"].stop, len(a)), 0
            for part, pair in given.items():
                b[config.qkv_rows[part], start : start + len(pair.a)] = pair.b * pair.spec.scaling
                start += len(pair.a)
            found[names[ADAPTER]] = _Pair(a, b, float(len(a)), False)
        else:
            found |= {names[part]: pair for part, pair in given.items()}
    return found


def _names_of(path: str, config: ModelConfig, there: Mapping[str, str]) -> dict[str, str]:
    """Part of one of our matrices (ADAPTER: all of it) -> the module of transformers that holds it."""
    names = {}
    for ours, theirs in there.items():
        if parts := adapted_modules(replace(config, lora={ours: LoraSpec(1, 1.0)})).get(path):
            names[next(iter(parts))] = theirs
    return names


def _check_shape(config: ModelConfig, theirs: ModelConfig, name: str) -> None:
    """Raises ValueError where a model is of another shape than its base; shorter sequences are no matter."""
    differing = [
        f"{f.name} {getattr(config, f.name)!r} (there {getattr(theirs, f.name)!r})"
        for f in fields(ModelConfig)
        if f.name not in ("lora", "block_size") and getattr(config, f.name) != getattr(theirs, f.name)
    ]
    if config.block_size > theirs.block_size:
        differing.append(f"block_size {config.block_size} (there {theirs.block_size})")
    if differing:
        raise ValueError(
            f"the model is not of the base's shape ({name}): {', '.join(differing)}; export it with --to hf"
        )


def _on_base(model: GPT, modules: Mapping[str, str], pairs: dict[str, _Pair], base: GPT, name: str) -> dict[str, _Pair]:
    """The pairs with what our matrices differ by from the base's. Raises ValueError for what has trained."""
    config = model.config
    ours = {n.replace(".base_layer.", "."): p.detach() for n, p in model.named_parameters() if "lora_" not in n}
    there = {adapter: module for module, adapter in modules.items()}
    trained, result = [], dict(pairs)
    for parameter, was in base.named_parameters():
        now, was = ours[parameter], was.detach()
        was = was[: len(now)] if parameter == "transformer.wpe.weight" else was
        was = was.to(now)
        if torch.equal(now, was):
            continue
        more = {}
        for part, module in _names_of(parameter.removesuffix(".weight"), config, there).items():
            rows = config.qkv_rows.get(part, slice(None))
            more[module] = _difference(now[rows], was[rows])
        if not more or None in more.values():
            trained.append(parameter + " (rounded to bfloat16)" * (now.dtype == torch.bfloat16))
            continue
        for module, extra in more.items():
            if extra is not None and len(extra.a):
                result[module] = _joined(result[module], extra) if module in result else extra
    if trained:
        shown = ", ".join(trained[:5]) + (f" and {len(trained) - 5} more" if len(trained) > 5 else "")
        raise ValueError(f"weights outside the adapters are not those of {name}: {shown}; export it with --to hf")
    return result


def _difference(now: Tensor, was: Tensor) -> _Pair | None:
    """now - was as a product of low rank; None if it is none. What is less than float32's rounding is left out."""
    u, s, vh = torch.linalg.svd(now.double() - was.double(), full_matrices=False)
    rows, columns = now.shape
    rounding = torch.finfo(torch.float32).eps * float(now.abs().max()) * (math.sqrt(rows) + math.sqrt(columns))
    rank = int((s > rounding).sum())
    if rank > min(rows, columns) // 2:
        return None
    root = s[:rank].sqrt()
    return _Pair((root[:, None] * vh[:rank]).float(), (u[:, :rank] * root).float(), float(rank), False)


def _joined(one: _Pair, other: _Pair) -> _Pair:
    """The sum of two products as one, with scaling 1."""
    a = torch.cat([one.a, other.a.to(one.a.dtype)])
    b = torch.cat([one.b * one.spec.scaling, (other.b * other.spec.scaling).to(one.b.dtype)], dim=1)
    return _Pair(a, b, float(len(a)), False)
