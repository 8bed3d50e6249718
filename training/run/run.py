"""The live objects of a run: model, optimizer, data, and the two things that change them.

`Run.step` makes one optimizer step. `Run.adopt` is the only code that changes live objects to follow new settings: it
builds everything aside, asks all ranks whether they managed, and only then commits, so that an operation that fails
leaves the run whole.
"""

from __future__ import annotations

import hashlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from orchestrate.data.stream import DataSet, Stream
from orchestrate.model.config import ModelConfig
from orchestrate.model.gpt import GPT, compile_blocks, set_dropout
from orchestrate.model.lineage import Lineage, carry
from orchestrate.model.lora import trainable_parameters
from orchestrate.training.run.distributed import Ranks
from orchestrate.training.run.evaluation import validation_loss
from orchestrate.training.run.injection import Injector
from orchestrate.training.run.learning_rate import learning_rate
from orchestrate.training.run.optimizers import NamedAdamW, State
from orchestrate.training.run.out_of_memory import is_out_of_memory
from orchestrate.training.run.sharding import gradient_norm, is_sharded, local
from orchestrate.training.settings.config import TrainConfig
from orchestrate.training.settings.errors import OperationFailed, RanksDisagree
from orchestrate.training.settings.records import Progress, Settings
from torch import nn

# A loss can be called a spike after this many, and the running mean remembers about that many.
SPIKE_WARMUP, SPIKE_MEMORY = 20, 100
Reshape = Callable[[GPT, ModelConfig, torch.Generator], tuple[GPT, Lineage]]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Stopwatch:
    """Seconds by part of the loop, since they were last taken."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - start

    def take(self) -> dict[str, float]:
        taken, self._seconds = dict(self._seconds), defaultdict(float)
        return taken


@dataclass(frozen=True)
class StepResult:
    """What a step leaves behind. Tensors stay on the device: reading them waits for it, so only logging does."""

    loss: torch.Tensor
    """This rank's mean over its micro-steps, ()."""
    grad_norm: torch.Tensor
    """Before clipping, ()."""
    lr: float
    samples: int
    sick: str = ""
    """Why the weights were not updated ("out of memory", "not finite", "spike"); on CUDA of the step before."""
    at: tuple[int, int, int] = (0, 0, 0)
    """(iter, samples, tokens) before the sick step."""


class Run:
    """A model in training.

    Args:
        config: for what no schedule changes (device, dtype, compile, seed, ...).
        settings: in force from the start; `model` must have the shape that they say.
        optimizer_state: moments by name, e.g. from a checkpoint.
    """

    def __init__(
        self,
        config: TrainConfig,
        settings: Settings,
        progress: Progress,
        model: GPT,
        data: DataSet,
        ranks: Ranks,
        device: torch.device,
        optimizer_state: State | None = None,
        scaler_state: dict[str, Any] | None = None,
    ) -> None:
        self.config = config
        self.settings = settings
        self.progress = progress
        self.source = data
        """The data set as it was opened; `data` is what is read, through the settings' vocabulary map."""
        self.data = data
        self.ranks = ranks
        self.device = device
        self.stream = Stream(data.train, config.seed)
        self._prefetched: tuple[tuple[int, ...], Any] | None = None
        self._undiagnosed: Any = None
        self.injector = Injector(config.inject, ranks.rank, config.out_dir)
        self.eval_batch_size = config.eval_batch_size or config.batch_size
        self.stopwatch = Stopwatch()
        self.consistent = True
        """False only while parameters are being written: nothing saved then would be a state of the run."""

        dtype = DTYPES[pick_dtype(config.dtype, device)]
        self.dtype = dtype
        self.autocast: Callable[[], AbstractContextManager] = (
            nullcontext if dtype == torch.float32 else lambda: torch.autocast(device_type=device.type, dtype=dtype)
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        if scaler_state:
            self.scaler.load_state_dict(scaler_state)

        if settings.vocabulary_map:
            self._map_vocabulary(settings.vocabulary_map)
        self._install(*self._placed(model, optimizer_state or {}, settings.frozen))
        self._set_numbers(settings)

    # ------------------------------------------------------------------------------------------ one step

    def step(self) -> StepResult:
        """One optimizer step on the next samples of the stream.

        A step whose gradients are not finite, whose loss is a spike, or that ran out of memory on any rank leaves
        weights and moments as they were on every rank, and says so in the result.
        """
        s, p, ranks = self.settings, self.progress, self.ranks
        at, lr = (p.iter, p.samples, p.tokens), self.current_lr()
        micro_steps = range(ranks.rank, s.grad_accum, ranks.world_size)
        total = torch.zeros((), device=self.device)
        out_of_memory = exchanging = False
        try:
            for micro in micro_steps:
                with self.stopwatch.part("data"):
                    x, y = self._batch(p.samples + micro * s.batch_size, s.batch_size)
                with self.stopwatch.part("forward_backward"):
                    last = micro + ranks.world_size >= s.grad_accum
                    if ranks.distributed and not ranks.sharded:
                        # Only the last backward exchanges gradients; the earlier ones add up locally. Sharded ones
                        # are exchanged every time: adding up whole ones would take the memory that sharding saves.
                        self.wrapped.require_backward_grad_sync = last
                    self._seed_dropout(micro)
                    with self.autocast():
                        _, loss = self.wrapped(x, y)
                        loss = loss / len(micro_steps)
                    if self.injector.faults and micro == micro_steps[0]:
                        loss = self.injector.strike(p.iter, loss)
                    exchanging = ranks.distributed and last
                    self.scaler.scale(loss).backward()
                    exchanging = False
                    total += loss.detach()
                if self.device.type == "cuda":
                    with self.stopwatch.part("data"):
                        following = p.samples + s.samples_per_iter + ranks.rank * s.batch_size
                        self._prefetch(
                            following if last else p.samples + (micro + ranks.world_size) * s.batch_size,
                            s.batch_size,
                        )
        except Exception as error:
            # Once gradients (or, sharded, weights) are being exchanged the other ranks cannot be joined any more.
            if exchanging or ranks.sharded or not is_out_of_memory(error):
                raise
            out_of_memory = True
            self._poison(p.samples)
        with self.stopwatch.part("optimizer"):
            self.scaler.unscale_(self.optimizer.inner)
            # The norm of the reduced gradients is the same number on every rank, and not finite if one of them is not.
            grad_norm = gradient_norm(self._trainable, s.grad_clip)
            spike = self._is_spike(total, out_of_memory)
            self.optimizer.set(lr, s.beta1, s.beta2, s.weight_decay)
            self.consistent = False
            if not self.scaler.is_enabled():
                # The fused kernels look at this on the device: no weight is touched, and no host waits to know.
                bad = ~torch.isfinite(grad_norm) if not spike else torch.ones_like(grad_norm, dtype=torch.bool)
                self.optimizer.inner.found_inf = bad.to(torch.float32)
            self.scaler.step(self.optimizer.inner)
            self.scaler.update()
            self.optimizer.zero_grad()
            p.iter += 1
            p.samples += s.samples_per_iter
            p.tokens += s.tokens_per_iter
            self.consistent = True
        sick, sick_at = self._diagnose(grad_norm, out_of_memory, spike, at)
        return StepResult(total, grad_norm, lr, s.samples_per_iter, sick, sick_at)

    def _poison(self, first: int) -> None:
        """After running out of memory: join the other ranks' exchange of gradients with ones that are not numbers.

        So no rank updates its weights, and all of them know that something is wrong.
        """
        self.optimizer.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if self.ranks.distributed:
            self.wrapped.require_backward_grad_sync = True
            x, y = self._load(first, 1, self.settings.model.block_size, self.settings.sequence_length)
            with self.autocast():
                loss = self.wrapped(x, y)[1]
            (loss * float("nan")).backward()
        else:
            for parameter in self._trainable:
                parameter.grad = torch.full_like(parameter, float("nan"))

    def _is_spike(self, total: torch.Tensor, out_of_memory: bool) -> bool:
        """Whether the loss, over all ranks, is far above its running mean; equal on every rank."""
        sigma, p = self.config.spike_sigma, self.progress
        if not sigma:
            return False
        local = float("nan") if out_of_memory else float(total)
        loss = float(self.ranks.sum(np.array([local]))[0]) / self.ranks.world_size
        if not np.isfinite(loss):
            return False
        limit = p.loss_mean + sigma * max(p.loss_variance, 1e-12) ** 0.5
        if p.losses_seen >= SPIKE_WARMUP and loss > limit:
            return True
        p.losses_seen += 1
        weight = max(1.0 / p.losses_seen, 1.0 / SPIKE_MEMORY)
        distance = loss - p.loss_mean
        p.loss_mean += weight * distance
        p.loss_variance = (1 - weight) * (p.loss_variance + weight * distance * distance)
        return False

    def _diagnose(
        self, grad_norm: torch.Tensor, out_of_memory: bool, spike: bool, at: tuple[int, int, int]
    ) -> tuple[str, tuple[int, int, int]]:
        """What was wrong and where, on every rank alike. Reading it never waits for the step just enqueued on CUDA."""
        if self.scaler.is_enabled() and not out_of_memory:
            return "", at  # a GradScaler tries scales that overflow; skipping those steps is its business
        finite: torch.Tensor | None = torch.isfinite(grad_norm)
        cause = "out of memory" if out_of_memory else "spike" if spike else "not finite"
        if self.device.type == "cuda":
            copied = torch.empty((), dtype=torch.bool, pin_memory=True)
            copied.copy_(finite, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            before, self._undiagnosed = self._undiagnosed, (copied, event, cause, spike, at)
            if before is None:
                return "", at
            copied, event, cause, spike, at = before
            event.synchronize()
            finite = copied
        if bool(finite) and not spike:
            return "", at
        # Every rank comes here: the norm and the spike are the same numbers everywhere.
        causes = self.ranks.gather(cause)
        return ("out of memory" if "out of memory" in causes else cause), at

    def _seed_dropout(self, micro: int) -> None:
        """Dropout is a function of (seed, iteration, micro-step): equal after a resume and for any number of ranks."""
        if self.settings.dropout > 0:
            words = np.random.SeedSequence([self.config.seed, self.progress.iter, micro]).generate_state(1, np.uint64)
            torch.manual_seed(int(words[0]) >> 1)

    def _batch(self, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        key = (first, count, self.settings.model.block_size, self.settings.sequence_length)
        if self._prefetched is not None and self._prefetched[0] == key:
            batch, self._prefetched = self._prefetched[1], None
            return batch
        return self._load(*key)

    def _prefetch(self, first: int, count: int) -> None:
        """Copy a batch to the GPU while it computes; a change of settings simply makes it unused."""
        key = (first, count, self.settings.model.block_size, self.settings.sequence_length)
        self._prefetched = (key, self._load(*key))

    def _load(self, first: int, count: int, block_size: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = (torch.from_numpy(a) for a in self.stream.batch(first, count, block_size, length))
        if self.device.type == "cuda":
            return (
                x.pin_memory().to(self.device, non_blocking=True),
                y.pin_memory().to(self.device, non_blocking=True),
            )
        return x.to(self.device), y.to(self.device)

    # ------------------------------------------------------------------------------------------ looking

    def evaluate(self, poll: Callable[[], int]) -> float | None:
        """The validation loss (None where `poll` asked to stop on the way); changes nothing."""
        with self.stopwatch.part("eval"):
            return validation_loss(
                self.model,
                self.data.val,
                batches=self.settings.eval_iters,
                batch_size=self.eval_batch_size,
                block_size=self.settings.model.block_size,
                ranks=self.ranks,
                device=self.device,
                autocast=self.autocast,
                poll=poll,
            )

    def current_lr(self) -> float:
        """The rate that the next step will use."""
        s, p = self.settings, self.progress
        rewarm = p.iter - p.rewarm_start_iter if s.rewarms else None
        return learning_rate(s, p.iter - p.lr_start_iter, rewarm)

    def parameter_counts(self) -> tuple[int, int]:
        """(total, trainable)."""
        return (
            sum(p.numel() for p in self.model.parameters()),
            sum(p.numel() for p in self._trainable),
        )

    def fingerprint(self) -> str:
        """Settings, names, shapes, trainability and the bits of every value and moment, in one short text."""
        parts = [repr(self.settings), repr(self.progress.iter), repr(self.progress.samples)]
        tensors = dict(self.model.named_parameters())
        for name, moments in self.optimizer.state_by_name().items():
            tensors.update({f"{name}:{key}": value for key, value in moments.items()})
        sums = []
        for name, tensor in sorted(tensors.items()):  # moments that came from a file are in another order
            parts.append(f"{name} {tuple(tensor.shape)} {tensor.requires_grad}")
            sums.append(_bit_sums(*local(tensor.detach())))
        totals = torch.stack(sums).numpy()
        if self.ranks.sharded:
            totals = sum(self.ranks.gather(totals))
        parts += [str(value) for value in totals.tolist()]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def check_ranks_agree(self, what: str) -> None:
        """Compare fingerprints. Raises RanksDisagree on every rank when they differ."""
        prints = self.ranks.gather(self.fingerprint())
        if len(set(prints)) > 1:
            listed = ", ".join(f"rank {rank}: {text[:12]}" for rank, text in enumerate(prints))
            raise RanksDisagree(f"the ranks differ after {what} at iteration {self.progress.iter} ({listed})")

    # ------------------------------------------------------------------------------------------ changing

    def adopt(self, target: Settings, reshape: Reshape | None = None) -> None:
        """Make the run follow `target`. All or nothing, on all ranks alike.

        Args:
            reshape: makes the new model where the target's shape differs from the present one.

        Raises OperationFailed on every rank, with the run as it was, when any rank could not prepare the change.
        """
        error: Exception | None = None
        prepared = None
        try:
            prepared = self._prepare(target, reshape)
        except Exception as caught:  # whatever it is, the other ranks must hear of it
            error = caught
        if needs_agreement(self.settings, target):
            failures = self.ranks.gather(None if error is None else f"{type(error).__name__}: {error}")
        else:
            failures = [None if error is None else f"{type(error).__name__}: {error}"]
        if any(failures):
            told = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(failures) if text)
            raise OperationFailed(told) from error

        before, p = self.settings, self.progress
        if target.lr_restarts != before.lr_restarts:
            p.lr_start_iter = p.iter
        if target.rewarms != before.rewarms:
            p.rewarm_start_iter = p.iter
        lengths = [(s.model.block_size, s.sequence_length) for s in (before, target)]
        if lengths[0] != lengths[1]:
            p.samples = self.stream.moved(p.samples, *lengths)
        if target.vocabulary_map != before.vocabulary_map:
            self._map_vocabulary(target.vocabulary_map)
        if prepared is not None:
            self._install(*prepared)
        self._set_numbers(target)
        self.settings = target

    def _set_numbers(self, settings: Settings) -> None:
        """Give the model the numbers of the settings that it holds."""
        if settings.dropout != self.model.dropout:
            set_dropout(self.model, settings.dropout)
        if settings.fading != self.model.fading:
            self.model.set_fading(settings.fading)

    def _map_vocabulary(self, new_ids: tuple[int, ...]) -> None:
        """Read every token of the data files as its new id, from here on."""
        self.data = self.source.remapped(np.array(new_ids, dtype=np.int64) if new_ids else None)
        self.stream = Stream(self.data.train, self.config.seed)
        self._prefetched = None

    def restore(
        self,
        settings: Settings,
        progress: Progress,
        model: GPT,
        optimizer_state: State,
        scaler_state: dict[str, Any],
    ) -> None:
        """Become an earlier state of this run, but for its place in the stream of samples and its clock."""
        lengths = [(s.model.block_size, s.sequence_length) for s in (self.settings, settings)]
        samples = self.progress.samples
        if lengths[0] != lengths[1]:
            samples = self.stream.moved(samples, *lengths)
        seconds = self.progress.seconds
        self.progress.__dict__.update(progress.__dict__, samples=samples, seconds=seconds)
        if settings.vocabulary_map != self.settings.vocabulary_map:
            self._map_vocabulary(settings.vocabulary_map)
        self.settings = settings
        self._install(*self._placed(model, optimizer_state, settings.frozen))
        self._set_numbers(settings)
        if scaler_state:
            self.scaler.load_state_dict(scaler_state)

    def _prepare(self, target: Settings, reshape: Reshape | None) -> tuple[GPT, NamedAdamW, set[str]] | None:
        """Everything new that the target needs, beside the present run; None where nothing live changes."""
        if not needs_agreement(self.settings, target):
            return None
        model, state = self.model, self.optimizer.state_by_name()
        if reshapes(self.settings, target):
            if reshape is None:
                raise ValueError("the target has another shape and nothing says how to get there")
            seed = np.random.SeedSequence([self.config.seed, self.progress.iter, 1]).generate_state(1, np.uint64)
            generator = torch.Generator().manual_seed(int(seed[0]) >> 1)
            whole, state = self.ranks.whole(model, state)
            model, lineage = reshape(whole, target.model, generator)
            shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
            assert list(lineage) == list(shapes), "a lineage must cover every parameter, in model order"
            assert model.config == target.model, "the reshaped model is not the target's"
            state = carry(state, lineage, shapes)
            return self._placed(model, state, target.frozen)
        trainable = trainable_parameters(model, target.frozen)
        return model, NamedAdamW(model, trainable, state), trainable

    def _placed(self, model: GPT, state: State, frozen: Iterable[str]) -> tuple[GPT, NamedAdamW, set[str]]:
        """A model and its optimizer on this rank's device."""
        if not any(is_sharded(parameter) for parameter in model.parameters()):
            model = self.ranks.place(model, self.device)
        trainable = trainable_parameters(model, frozen)
        state = self.ranks.place_state(state, model, self.device)
        return model, NamedAdamW(model, trainable, state), trainable

    def _install(self, model: GPT, optimizer: NamedAdamW, trainable: set[str]) -> None:
        """Commit: from here on the run is this model and this optimizer."""
        self.wrapped: nn.Module | None = None  # the old DDP goes first: its hooks sit on shared parameters
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trainable)
            # A stale gradient would still be applied by AdamW after a freeze.
            parameter.grad = None
        model.train()
        if self.config.compile:
            compile_blocks(model)
        self.model, self.optimizer = model, optimizer
        self._trainable = optimizer.parameters
        self.wrapped = self.ranks.wrap(model, self.device)


def reshapes(before: Settings, after: Settings) -> bool:
    """Whether parameters or their moments differ between the two."""
    return before.model != after.model or before.reshapes_asked != after.reshapes_asked


def needs_agreement(before: Settings, after: Settings) -> bool:
    """Whether parameters, their moments, or which of them train, differ between the two."""
    return reshapes(before, after) or before.frozen != after.frozen


def _bit_sums(tensor: torch.Tensor, before: int) -> torch.Tensor:
    """Two integers made of the tensor's bits, whatever the order of summation; (2,) int64 on the CPU.

    `before`: elements of the full tensor that lie before this part of it; the integers of all parts add up.
    """
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    values = tensor.contiguous().reshape(-1).view(bits)
    # The second sum skips every other value, so that neighbours which changed places are seen.
    return torch.stack([values.sum(dtype=torch.int64), values[before % 2 :: 2].sum(dtype=torch.int64)]).cpu()


def pick_device(name: str, local_rank: int) -> torch.device:
    """`auto` picks cuda, then mps, then cpu; on CUDA each local rank takes its own device. Raises ValueError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device: got {name!r}, allowed: auto, cpu, cuda, cuda:N, mps") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device: got {name!r}, but torch {torch.__version__} sees no CUDA device here")
        index = local_rank if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise ValueError(
                f"device: cuda:{index} is asked for and there are {torch.cuda.device_count()} CUDA devices"
            )
        return torch.device("cuda", index)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"device: got {name!r}, but torch sees no mps device here")
    if device.type not in ("cpu", "mps"):
        raise ValueError(f"device: got {name!r}, allowed: auto, cpu, cuda, cuda:N, mps")
    return device


def pick_dtype(name: str, device: torch.device) -> str:
    """`auto` is bfloat16 on a GPU that has it, else float16 on CUDA, else float32."""
    if name != "auto":
        return name
    if device.type != "cuda":
        return "float32"
    return "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
