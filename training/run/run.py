"""The live objects of a run: model, optimizer, batches, ranks; and the two things that change them.

`Run.step` makes one optimizer step (step.py). `Run.adopt` is the only door to other settings (changes.py): it builds
everything aside, asks all ranks whether they managed, and only then commits, so an operation that fails leaves the run
whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn

from orchestrate.data.mixture import Mixture, Sources
from orchestrate.data.stream import DataSet, Stream
from orchestrate.model.gpt import GPT
from orchestrate.model.lineage import State
from orchestrate.training.run import changes, step
from orchestrate.training.run.analysis import NearStep, NoiseScale
from orchestrate.training.run.batch_memory import largest_batch_that_fits
from orchestrate.training.run.batches import Batches
from orchestrate.training.run.casting import Cast
from orchestrate.training.run.changes import Reshape
from orchestrate.training.run.device import DTYPES, pick_dtype
from orchestrate.training.run.distributed import Ranks
from orchestrate.training.run.evaluation import validation_loss
from orchestrate.training.run.fingerprint import fingerprint
from orchestrate.training.run.injection import Injector
from orchestrate.training.run.learning_rate import learning_rate
from orchestrate.training.run.optimizers import Optimizer
from orchestrate.training.run.sickness import Diagnosis
from orchestrate.training.run.step import StepResult
from orchestrate.training.run.stopwatch import Stopwatch
from orchestrate.training.run.text_bytes import TextBytes
from orchestrate.training.settings.config import TrainConfig
from orchestrate.training.settings.errors import RanksDisagree
from orchestrate.training.settings.records import Progress, Settings


class Run:
    """A model in training.

    Args:
        config: for what no schedule changes (device, dtype, compile, seed, ...).
        settings: in force from the start; `model` must have the shape that they say.
        optimizer_state: moments by name, e.g. from a checkpoint.

    Attributes:
        cast: what was rounded at the start.
        wrapped: the model as a step calls it: in DDP on several ranks.
        noise: the gradient noise scale, kept up where analyze_interval asks for analyses.
        near: what an analysis at this boundary says of the last step, if it was asked for.
        consistent: False only while parameters are being written: nothing saved then would be a state of the run.
    """

    model: GPT
    optimizer: Optimizer
    wrapped: nn.Module | None

    def __init__(
        self,
        config: TrainConfig,
        settings: Settings,
        progress: Progress,
        model: GPT,
        data: DataSet | Sources,
        ranks: Ranks,
        device: torch.device,
        optimizer_state: State | None = None,
        scaler_state: dict[str, Any] | None = None,
    ) -> None:
        self.config = config
        self.settings = settings
        self.progress = progress
        self.ranks = ranks
        self.device = device
        sources = data if isinstance(data, Sources) else Sources({data.name: data})
        self.batches = Batches(sources, config.seed, device, settings)
        self.diagnosis = Diagnosis(ranks, progress, late=device.type == "cuda")
        self.injector = Injector(config.inject, ranks.rank, config.out_dir)
        self.eval_batch_size = config.eval_batch_size or config.batch_size
        self.text_bytes = TextBytes()
        self.stopwatch = Stopwatch()
        self.noise = NoiseScale(device, progress.noise)
        self.near: NearStep | None = None
        self.consistent = True

        dtype = DTYPES[pick_dtype(config.dtype, device)]
        self.dtype = dtype
        self.autocast: Callable[[], AbstractContextManager] = (
            nullcontext if dtype == torch.float32 else lambda: torch.autocast(device_type=device.type, dtype=dtype)
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        if scaler_state:
            self.scaler.load_state_dict(scaler_state)
        self.cast = changes.install(self, model, optimizer_state or {})

    @property
    def data(self) -> DataSet:
        """What is read now of the first data set: its files through the vocabulary map in force."""
        return self.batches.data.first

    @property
    def stream(self) -> Stream | Mixture:
        """The order of the training samples."""
        return self.batches.stream

    def step(self, near: bool = False) -> StepResult:
        """One optimizer step on the next samples of the stream; see `step.step`."""
        return step.step(self, near)

    def adopt(self, target: Settings, reshape: Reshape | None = None) -> Cast:
        """Make the run follow `target`; see `changes.adopt`."""
        return changes.adopt(self, target, reshape)

    def restore(
        self,
        settings: Settings,
        progress: Progress,
        model: GPT,
        optimizer_state: State,
        scaler_state: dict[str, Any],
    ) -> None:
        """Become an earlier state of this run; see `changes.restore`."""
        changes.restore(self, settings, progress, model, optimizer_state, scaler_state)

    def evaluate(self, poll: Callable[[], int]) -> float | None:
        """The validation loss (None where `poll` asked to stop on the way); changes nothing."""
        losses = self.evaluate_each(poll)
        return None if losses is None else self.together(losses)

    def evaluate_each(self, poll: Callable[[], int]) -> dict[str, float] | None:
        """The validation loss of each data set whose tokens the model has; as `evaluate`."""
        losses: dict[str, float] = {}
        with self.stopwatch.part("eval"):
            for name, data in self.batches.data.items():
                if not self.has_words_of(data):
                    continue
                loss = validation_loss(
                    self.model,
                    data.val,
                    batches=self.settings.eval_iters,
                    batch_size=self.eval_batch_size,
                    block_size=self.settings.model.block_size,
                    ranks=self.ranks,
                    device=self.device,
                    autocast=self.autocast,
                    poll=poll,
                )
                if loss is None:
                    return None
                losses[name] = loss
        return losses

    def bits_per_byte(self, losses: Mapping[str, float]) -> dict[str, float]:
        """Of validation losses by data set; without those whose tokenizer is not at hand."""
        s = self.settings
        windows = s.eval_iters * self.eval_batch_size
        found = {
            name: self.text_bytes.bits_per_byte(self.batches.opened[name], loss, windows, s.model.block_size)
            for name, loss in losses.items()
            if name in self.batches.opened
        }
        return {name: bits for name, bits in found.items() if bits is not None}

    def has_words_of(self, data: DataSet) -> bool:
        """Whether the model has all tokens of a data set: one of several may wait for the vocabulary to grow."""
        words = data.meta.vocab_size if len(self.batches.data) > 1 and not self.settings.vocabulary_map else None
        return (words or 0) <= self.settings.model.vocab_size

    def together(self, losses: dict[str, float]) -> float:
        """One validation loss from those of the data sets, in the shares of eval_mixture: the same ones all along."""
        if len(self.batches.data) == 1:
            return next(iter(losses.values()))
        return sum(losses[name] * share for name, share in self.config.evaluated.items() if share)

    def current_lr(self) -> float:
        """The rate that the next step will use."""
        s, p = self.settings, self.progress
        rewarm = p.iter - p.rewarm_start_iter if s.rewarms else None
        return learning_rate(s, p.iter - p.lr_start_iter, rewarm)

    def seed(self, n: int) -> int:
        """A seed made of the run's own, the iteration and a number: the same on every rank and after a resume."""
        words = np.random.SeedSequence([self.config.seed, self.progress.iter, n]).generate_state(1, np.uint64)
        return int(words[0]) >> 1

    def largest_batch(self, target: float, candidates: Sequence[int]) -> int:
        """The largest micro-batch that trains within a share of memory; see `batch_memory.largest_batch_that_fits`."""
        return largest_batch_that_fits(self, target, candidates)

    def parameter_counts(self) -> tuple[int, int]:
        """(total, trainable)."""
        return sum(p.numel() for p in self.model.parameters()), sum(p.numel() for p in self.optimizer.parameters)

    def fingerprint(self) -> str:
        """Settings, place in the stream, and the bits of every value and moment, in one short text."""
        facts = [repr(self.settings), repr(self.progress.iter), repr(self.progress.cursor)]
        tensors = dict(self.model.named_parameters())
        for name, moments in self.optimizer.state_by_name().items():
            tensors.update({f"{name}:{key}": value for key, value in moments.items()})
        return fingerprint(facts, tensors, self.ranks)

    def check_ranks_agree(self, what: str) -> None:
        """Compare fingerprints. Raises RanksDisagree on every rank when they differ. One alone reads no weights."""
        if self.ranks.world_size == 1:
            return
        prints = self.ranks.gather(self.fingerprint())
        if len(set(prints)) > 1:
            listed = ", ".join(f"rank {rank}: {text[:12]}" for rank, text in enumerate(prints))
            raise RanksDisagree(f"the ranks differ after {what} at iteration {self.progress.iter} ({listed})")
