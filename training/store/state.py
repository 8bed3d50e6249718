"""What a checkpoint holds beside the tensors: one record, one writer (`State.to_json`), one reader (`State.from_json`).

It is all that is needed to go on exactly. What one program version wrote, a later one reads: the reader brings older
formats up to date, so nothing else knows that there were any.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError

from orchestrate.data.stream import Meta, read_remap
from orchestrate.training.settings.config import TrainConfig
from orchestrate.training.settings.records import EXACTLY, Progress, Settings
from orchestrate.training.settings.values import problems_of
from orchestrate.training.store.run_folder import clean

_Count = Annotated[int, Field(ge=0, strict=True)]


@dataclass(frozen=True)
class ScheduleText:
    """The schedule as it was given."""

    __pydantic_config__ = EXACTLY

    source: str
    """The file's path; empty where there was none."""
    text: str


@dataclass(frozen=True)
class UserFile:
    """A file of the user's own operations that the run needs."""

    __pydantic_config__ = EXACTLY

    file: str
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


@dataclass(frozen=True)
class State:
    """A run at a step boundary, without weights and moments."""

    __pydantic_config__ = EXACTLY

    config: TrainConfig
    """The configuration of the latest start."""
    settings: Settings
    progress: Progress
    orchestrator: dict[str, Any]
    """Position in the schedule and ramps under way: `Orchestrator.state()`, which reads it too and checks the rest."""
    schedule: ScheduleText
    scaler: dict[str, Any]
    """state_dict of the GradScaler; empty where there is none in force."""
    wandb_id: str | None
    """The W&B run that a resume continues."""
    log_sizes: dict[str, _Count]
    """File name in the run folder: its bytes when this was written. What is logged later is void after a resume."""
    data: dict[str, str]
    """"train" and "val": fingerprints of the token files."""
    tokenizer: Meta
    """What the tokens mean."""
    world_size: Annotated[int, Field(ge=1, strict=True)]
    """Processes of the run."""
    operations: tuple[UserFile, ...] = ()
    """Files of the user's own operations. Formats 1 and 2 had none."""

    @property
    def present(self) -> Settings:
        """The settings as this version has them. Raises ValueError where the map of an older one cannot be read.

        Older versions had one data set, and applied the map of vocab_remapping_file beside the settings.
        """
        config, settings = self.config, self.settings
        if settings.mixture:
            return settings
        through = np.array(settings.vocabulary_map, dtype=np.int64)
        if config.shrunken_vocab_size:
            remap = read_remap(config.vocab_remapping_file, None, config.shrunken_vocab_size)
            through = through[remap] if len(through) else remap
        return replace(settings, mixture=config.datasets, vocabulary_map=tuple(through.tolist()))

    @property
    def fired(self) -> dict[str, int]:
        """How many steps of each track of the schedule are done with; earlier versions had one, without a name."""
        position = self.orchestrator["position"]
        if "fired" in position:
            return {"": position["fired"]}
        return {name: queue["fired"] for name, queue in position["queues"].items()}

    @property
    def val_loss(self) -> float | None:
        """The validation loss of these very weights; None where it was not measured, or is not finite."""
        p = self.progress
        return clean(p.last_val_loss) if p.last_eval_iter == p.iter and not p.changed_since_eval else None

    def text(self) -> str:
        """The content of state.json."""
        # A loss that is not finite stays what it is in the orchestrator's history of losses: triggers compare with it.
        return json.dumps(self.to_json())

    def to_json(self) -> dict[str, Any]:
        return {
            **{name: getattr(self, name) for name in ("orchestrator", "scaler", "wandb_id", "log_sizes", "data")},
            "config": self.config.model_dump(),
            "settings": self.settings.to_json(),
            "progress": clean(self.progress.to_json()),
            "schedule": asdict(self.schedule),
            "tokenizer": self.tokenizer.to_json(),
            "world_size": self.world_size,
            "operations": [asdict(file) for file in self.operations],
        }

    @classmethod
    def from_json(cls, values: Any) -> State:
        """What `to_json` of this or an earlier version made. Raises ValueError, a line for each problem."""
        readers = {
            "config": TrainConfig.model_validate,
            # Older versions knew eval_tasks as a key of the configuration alone.
            "settings": lambda values: Settings.from_json(
                {"eval_tasks": parts["config"].eval_tasks, **values} if isinstance(values, dict) else values
            ),
            "progress": lambda values: Progress.from_json(values, parts["settings"]),
            "tokenizer": Meta.from_json,
            "orchestrator": TypeAdapter(_Orchestrator).validate_python,
        }
        place = ""
        try:
            parts = dict(values)
            for place, reader in readers.items():
                read = reader(parts[place])
                parts[place] = parts[place] if place == "orchestrator" else read
            place = ""
            return TypeAdapter(cls).validate_python(parts)
        except ValidationError as error:
            problems = [(".".join(map(str, (place, *location))), message) for location, message in problems_of(error)]
            raise ValueError("\n".join(f"{name.removeprefix('.')} {message}" for name, message in problems)) from None
        except (KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"not a state of this version ({type(error).__name__}: {error})") from None


@dataclass(frozen=True)
class _Queue:
    __pydantic_config__ = {"extra": "ignore"}

    fired: _Count


@dataclass(frozen=True)
class _Position(_Queue):
    fired: _Count | None = None  # type: ignore[assignment]
    queues: dict[str, _Queue] | None = None

    def __post_init__(self) -> None:
        if (self.fired is None) == (self.queues is None):
            raise ValueError("must have `queues`, or of an earlier version `fired`")


@dataclass(frozen=True)
class _Orchestrator:
    """What is read before there is an orchestrator."""

    __pydantic_config__ = EXACTLY

    position: _Position
    ramps: list[dict[str, Any]]
