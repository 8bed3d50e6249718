"""One start of a run, wired together: the run, its orchestrator, its reporter, its checkpoints.

Holds what the loop does at a boundary, a method each; the order in which they happen is the loop's.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from orchestrate.training.run import out_of_memory
from orchestrate.training.run.out_of_memory import is_out_of_memory
from orchestrate.training.run.run import Run, StepResult
from orchestrate.training.schedule.file import Schedule
from orchestrate.training.schedule.orchestrator import Orchestrator
from orchestrate.training.session.start import latest_good, open_model
from orchestrate.training.session.stopping import NoSignals, SignalWatch
from orchestrate.training.settings.config import TrainConfig
from orchestrate.training.settings.errors import Refused, Stopped
from orchestrate.training.settings.records import Progress, Settings, differences
from orchestrate.training.settings.values import brief
from orchestrate.training.store import checkpoint
from orchestrate.training.store.reporting import Silent, machine, memory_percent


class BackgroundSave:
    """A checkpoint that a thread is writing."""

    def __init__(self, write: Callable[..., Path], why: str) -> None:
        self.why, self.seconds = why, 0.0
        self._write = write
        self._path: Path | None = None
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._work)
        self._thread.start()

    def _work(self) -> None:
        started = time.perf_counter()
        try:
            self._path = self._write()
        except Exception as error:  # told when the save is waited for
            self._error = error
        self.seconds = time.perf_counter() - started

    def wait(self) -> tuple[Path | None, Exception | None]:
        """The checkpoint's folder, or why there is none."""
        self._thread.join()
        return self._path, self._error


class Session:
    """What the loop works with.

    Args:
        wandb_id: id of the W&B run, kept in every checkpoint so that a resume continues it.
    """

    def __init__(
        self,
        config: TrainConfig,
        run: Run,
        schedule: Schedule,
        reporter: Silent,
        signals: SignalWatch | NoSignals,
        wandb_id: str | None = None,
    ) -> None:
        self.config = config
        self.run = run
        self.reporter = reporter
        self.signals = signals
        self.wandb_id = wandb_id
        self.orchestrator = Orchestrator(schedule, run, self)
        self._saved: tuple[int, ...] = ()
        self._rollbacks = 0
        self._over_memory = False
        self._background: BackgroundSave | None = None
        self.stops_seen = run.settings.stops_asked
        self._clock = time.perf_counter()
        self._logged_tokens = run.progress.tokens

    # ------------------------------------------------------------------------------------------ telling

    def event(self, kind: str, **fields: Any) -> None:
        """One line of events.jsonl, and one for the person at the console."""
        self.reporter.event(kind, iter=self.run.progress.iter, **fields)
        if kind == "operation":
            moved = ", ".join(
                f"{name} {brief(old)} -> {brief(fields['settings_after'][name])}"
                for name, old in fields["settings_before"].items()
                if name != "reshapes_asked"  # a counter that tells a person nothing
            )
            over = f" over {fields['over']} iterations" if fields["over"] else ""
            losses = ""
            if fields["val_loss_after"] is not None:
                losses = f"; val loss {fields['val_loss_before']:.4f} -> {fields['val_loss_after']:.4f}"
            desc = f" ({fields['desc']})" if fields["desc"] else ""
            number = "-" if fields["entry"] is None else fields["entry"]
            self.reporter.say(
                f"[{number}] {fields['name']}{desc}: {moved or 'no change'}{over} [{fields['reason']}]{losses}"
            )
        elif kind == "rollback":
            told = f"back to iteration {self.run.progress.iter} from {fields['from_iter']}: {fields['reason']}"
            if "entry" in fields:
                told += f"; entry {fields['entry']} ({fields['name']}) will not fire again"
            self.reporter.say(told)

    def metrics(self, kind: str, **fields: Any) -> None:
        run, s, p = self.run, self.run.settings, self.run.progress
        self.reporter.metrics(
            kind,
            iter=p.iter,
            tokens=p.tokens,
            seconds=p.seconds,
            **fields,
            lr=run.current_lr(),
            batch_size=s.batch_size,
            grad_accum=s.grad_accum,
            passes=run.stream.passes(p.samples, s.model.block_size, s.sequence_length),
            coverage=run.stream.coverage(p.samples, s.model.block_size, s.sequence_length),
        )

    def tick(self) -> None:
        """Bring the run's clock up to now."""
        now = time.perf_counter()
        self.run.progress.seconds += now - self._clock
        self._clock = now

    def log_step(self, result: StepResult) -> None:
        """One line of metrics for the step just made. Reads the loss, so it waits for the device."""
        run, p = self.run, self.run.progress
        loss = float(run.ranks.sum(np.array([result.loss.item()]))[0]) / run.ranks.world_size
        parts = run.stopwatch.take()
        stepping = sum(parts.get(name, 0.0) for name in ("data", "forward_backward", "optimizer"))
        rate = (p.tokens - self._logged_tokens) / stepping if stepping else None
        self._logged_tokens = p.tokens
        self.metrics(
            "train",
            loss=loss,
            grad_norm=result.grad_norm.item(),
            step_lr=result.lr,
            tokens_per_second=rate,
            seconds_by_part={
                name: parts.get(name, 0.0)
                for name in ("data", "forward_backward", "optimizer", "eval", "operation", "checkpoint")
            },
            machine=machine(run.device) if run.ranks.is_first else {},
        )
        head = self.orchestrator.head
        shown = {"loss": f"{loss:.4f}", "lr": f"{result.lr:.3g}", "tok/s": f"{rate:,.0f}" if rate else "-"}
        if head is not None:
            shown["next"] = f"[{head.number}] {head}"
        self.reporter.progress(p.iter, **shown)

    # ------------------------------------------------------------------------------------------ measuring

    def evaluate(self) -> float | None:
        """The evaluation of this boundary: best loss, early stopping and metrics follow. None where a signal came."""
        loss = self.run.evaluate(self.signals.poll)
        if loss is None:
            return None
        self.tick()
        p = self.run.progress
        p.last_val_loss, p.last_eval_iter = loss, p.iter
        if p.best_val_loss is None or loss < p.best_val_loss:
            p.best_val_loss, p.best_iter = loss, p.iter
        if p.stopping_best is None or loss < p.stopping_best - self.config.early_stopping_min_delta:
            p.stopping_best, p.evals_without_gain = loss, 0
        else:
            p.evals_without_gain += 1
        self.metrics("eval", val_loss=loss, best_val_loss=p.best_val_loss)
        self.reporter.say(f"step {p.iter}: val loss {loss:.4f}" + (" (best)" if p.best_iter == p.iter else ""))
        return loss

    def measure(self, why: str) -> float | None:
        """An extra evaluation around an operation; it neither counts as best nor for early stopping."""
        loss = self.run.evaluate(self.signals.poll)
        if loss is not None:
            self.tick()
            self.metrics("eval", val_loss=loss, best_val_loss=self.run.progress.best_val_loss, why=why)
        return loss

    # ------------------------------------------------------------------------------------------ healing

    def heal(self, result: StepResult) -> StepResult | None:
        """After a step that did not update the weights: try again with less memory, skip, go back, or stop.

        Every rank has the same result. Returns the step to log, None where the run went back. Raises Stopped
        where the run cannot or shall not go on.
        """
        run, p, config = self.run, self.run.progress, self.config
        if not result.sick:
            p.sick_steps = 0
            return result
        iteration, first, _ = result.at
        samples = [first, first + run.settings.samples_per_iter]
        if result.sick == "out of memory":
            return self._retry_smaller(result)
        p.sick_steps += 1
        limit = config.sick_step_limit
        action = "stop" if max(p.sick_steps, self._rollbacks) >= limit else config.on_sick_step
        told = f"{result.sick} in the step after iteration {iteration}, samples {samples[0]} to {samples[1] - 1}"
        self.event("error", message=told, action=action, samples=samples)
        self.reporter.say(f"{told}: {action}")
        if action == "stop":
            raise Stopped(f"{told}; on_sick_step {config.on_sick_step}, sick_step_limit {limit}")
        if action == "rollback":
            self._roll_back(told)
            return None
        return result

    def _retry_smaller(self, failed: StepResult) -> StepResult | None:
        """Make the failed step again in smaller micro-batches: the same global batch, no sample lost or seen twice."""
        run, p = self.run, self.run.progress
        now = (p.iter, p.samples, p.tokens)
        while failed.sick == "out of memory":
            before = run.settings
            smaller = before.in_smaller_pieces()
            if smaller is None:
                raise Stopped("out of memory with a micro-batch of one sequence: nothing is left to make smaller")
            p.iter, p.samples, p.tokens = failed.at
            run.adopt(smaller)
            changed = differences(before, smaller)
            total, trainable = run.parameter_counts()
            self.event(
                "operation",
                entry=None,
                name="adjust_batch_size",
                value=[smaller.batch_size, smaller.grad_accum],
                reason="out of memory: the same global batch in smaller pieces",
                desc="",
                over=None,
                settings_before=changed[0],
                settings_after=changed[1],
                val_loss_before=None,
                val_loss_after=None,
                seconds=0.0,
                parameters_total=total,
                parameters_trainable=trainable,
            )
            failed = run.step()
        p.iter, p.samples, p.tokens = now
        return self.heal(failed)

    def _roll_back(self, why: str) -> None:
        """Back to the newest whole checkpoint, and on with the samples after the sick ones."""
        run, from_iter, name = self.run, self.run.progress.iter, None
        self.finish_save()
        if run.ranks.is_first:
            with contextlib.suppress(Refused):
                name = latest_good(self.config.out_dir)[0].path.name
        name = run.ranks.broadcast(name)
        if name is None:
            raise Stopped(f"{why}; there is no checkpoint to go back to")
        self._rollbacks += 1
        position = self.go_back(name)
        self.orchestrator.load_state(position)
        run.progress.samples += self.config.rollback_skip_batches * run.settings.samples_per_iter
        if self.config.rollback_rewarm_iters:
            rewarm = {"rewarm_iters": self.config.rollback_rewarm_iters, "rewarms": run.settings.rewarms + 1}
            run.adopt(replace(run.settings, **rewarm))
        run.check_ranks_agree("a rollback")
        self.event("rollback", reason=why, from_iter=from_iter, checkpoint=name, next_sample=run.progress.samples)
        self.keep("rolled back")

    def watch_memory(self) -> None:
        """Save and warn once when memory crosses memory_checkpoint_percent; looked at with every line of metrics."""
        limit = self.config.memory_checkpoint_percent
        if not limit:
            return
        facts = memory_percent(self.run.device) if self.run.ranks.is_first else {}
        facts = self.run.ranks.broadcast(facts)
        over = {name: value for name, value in facts.items() if value >= limit}
        if over and not self._over_memory:
            told = ", ".join(f"{name} memory at {value:.0f} %" for name, value in over.items())
            self.reporter.say(f"warning: {told}, memory_checkpoint_percent is {limit:g}: saving")
            self.save_unless_saved(f"{told} (memory_checkpoint_percent {limit:g})", required=False)
        self._over_memory = bool(over)

    # ------------------------------------------------------------------------------------------ saving

    def state(self) -> dict[str, Any]:
        """All but the tensors that is needed to go on exactly, as JSON."""
        run, schedule = self.run, self.orchestrator.schedule
        return {
            "config": self.config.model_dump(),
            "settings": run.settings.to_json(),
            "progress": run.progress.to_json(),
            "orchestrator": self.orchestrator.state(),
            "schedule": {"source": schedule.source, "text": schedule.text},
            "scaler": run.scaler.state_dict(),
            "wandb_id": self.wandb_id,
            "log_sizes": self.reporter.sizes(),
            "data": run.source.fingerprint(),
            "tokenizer": run.data.meta.to_json(),
            "world_size": run.ranks.world_size,
        }

    def save(self, why: str, required: bool = True, mark: str = "") -> str:
        """Save a checkpoint (rank 0, or every rank its shards) and return its name, which ends in `mark`.

        Where it could not be written, every rank raises RuntimeError; or, when it is not `required`, the run says so
        and goes on with the checkpoint before, which is not touched until a new one is whole.
        """
        run, name, error = self.run, "", None
        self.tick()
        with run.stopwatch.part("checkpoint"):
            self.finish_save()
            writes = run.ranks.is_first or run.ranks.sharded
            if self.config.async_save and not required:
                if writes:
                    self._background = BackgroundSave(self._snapshot(copied=True), why)
                return ""
            if writes:
                try:
                    name = self._write(why, mark=mark)
                except OSError as caught:
                    error = f"checkpoint at iteration {run.progress.iter} could not be written: {caught}"
            name, error = run.ranks.broadcast((name, error))
        if error and required:
            raise RuntimeError(error)
        if error:
            self.event("error", message=error, action="go on")
            self.reporter.say(f"warning: {error}; the run goes on with the checkpoint before")
            return ""
        self._saved = self._moment()
        return name

    def go_back(self, name: str) -> dict[str, Any]:
        """Become the state of a checkpoint of this run, on every rank; what was logged since is marked void."""
        run, found, error = self.run, None, None
        self.finish_save()
        try:
            loaded = checkpoint.load(checkpoint.folder(self.config.out_dir) / name)
            settings = Settings.from_json(loaded.state["settings"])
            found = loaded.state, settings, *open_model(loaded, settings.model, run.ranks, run.device)
        except Exception as caught:  # whatever it is, the other ranks must hear of it
            error = f"{type(caught).__name__}: {caught}"
        failures = [text for text in run.ranks.gather(error) if text]
        if failures or found is None:
            raise Stopped(f"cannot go back to checkpoint {name}: {failures[0]}")
        state, settings, model, moments = found
        run.restore(settings, Progress.from_json(state["progress"]), model, moments, state["scaler"])
        self.stops_seen = run.settings.stops_asked
        self._logged_tokens = run.progress.tokens
        self.reporter.void_since(state["log_sizes"])
        return state["orchestrator"]

    def keep(self, why: str) -> None:
        """Save what the run went back to, and only then remove the checkpoints of the way that was left."""
        self.save(why)
        if self.run.ranks.is_first:
            checkpoint.remove_after(self.config.out_dir, self.run.progress.iter)

    def save_unless_saved(self, why: str, required: bool = True) -> None:
        """Save unless this very state of the run is on the disk."""
        if self._saved != self._moment():
            self.save(why, required)

    def _moment(self) -> tuple[int, ...]:
        """What tells two states of the run apart: the iteration, the evaluation made, the entries fired."""
        p, position = self.run.progress, self.orchestrator.position
        return p.iter, p.last_eval_iter, position.fired, position.round_open, position.round_iter

    def why_end(self, evaluated: bool) -> str:
        """Why the run ends at this boundary, or nothing."""
        patience, p = self.config.early_stopping_patience, self.run.progress
        if p.iter >= self.config.max_iters:
            return "max_iters"
        if self.run.settings.stops_asked != self.stops_seen:
            return "stopped by the schedule"
        if evaluated and 0 < patience <= p.evals_without_gain:
            return f"early stop: no gain in {p.evals_without_gain} evaluations"
        return ""

    def finish_save(self) -> None:
        """Wait for a save in the background and record how it ended; a rank that writes nothing need not know."""
        if self._background is None:
            return
        save, self._background = self._background, None
        path, error = save.wait()
        if path is not None:
            self._record(path, "checkpoint", save.why, save.seconds)
        else:
            self.event("error", message=f"a checkpoint could not be written: {error}", action="go on")
            self.reporter.say(f"warning: a checkpoint could not be written: {error}")

    def _snapshot(self, copied: bool) -> Callable[..., Path]:
        """Writes this very state when called; with `copied` it may be called while the run goes on."""
        run, config = self.run, self.config
        model = {name: p.detach() for name, p in run.model.named_parameters()}
        optimizer = run.optimizer.state_by_name()
        if copied:
            model = {name: p.to("cpu", copy=True) for name, p in model.items()}
            optimizer = {n: {k: v.to("cpu", copy=True) for k, v in parts.items()} for n, parts in optimizer.items()}
        return partial(
            checkpoint.save,
            config.out_dir,
            self.state(),
            model,
            optimizer,
            keep_last=config.keep_last,
            keep_best=config.keep_best,
            pinned=self.orchestrator.pinned,
            group=run.ranks.saving if run.ranks.sharded else None,
        )

    def _write(self, why: str, kind: str = "checkpoint", mark: str = "") -> str:
        started = time.perf_counter()
        path = self._snapshot(copied=False)(mark=mark)
        self._record(path, kind, why, time.perf_counter() - started)
        return path.name

    def _record(self, path: Path, kind: str, why: str, seconds: float) -> None:
        name = str(path.relative_to(Path(self.config.out_dir)))
        self.event(kind, path=name, reason=why, seconds=seconds)

    def emergency(self, error: BaseException) -> None:
        """After an exception: save what there is, on rank 0 alone and without talking to the other ranks.

        Where parameters are sharded that cannot be, unless every rank raised the same (`Stopped`).
        """
        run = self.run
        if is_out_of_memory(error):
            out_of_memory.note(self.config.out_dir, run.settings.batch_size)
        together = run.ranks.sharded and isinstance(error, Stopped)
        if not run.ranks.is_first and not together:
            return
        self.finish_save()
        self.event("error", message=f"{type(error).__name__}: {error}")
        if run.ranks.sharded and not together:
            self.event("emergency", saved=False, reason="the other ranks hold parts of the weights")
            return
        if not run.consistent:
            self.event("emergency", saved=False, reason="the error came while parameters were being written")
            return
        if self._saved == self._moment():
            self.event("emergency", saved=False, reason="this state is saved already")
            return
        try:
            self._write(f"{type(error).__name__}: {error}", kind="emergency")
            self.reporter.say(f"emergency checkpoint at iteration {run.progress.iter}")
        except Exception as second:
            self.event("emergency", saved=False, reason=f"{type(second).__name__}: {second}")
