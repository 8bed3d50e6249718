"""One start of a run, wired together: the run, its orchestrator, its reporter, its checkpoints.

Holds what the loop does at a boundary, a method each; the order in which they happen is the loop's.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from orchestrate.data.mixture import Mixture
from orchestrate.training.run.analysis import Analysis, analyze
from orchestrate.training.run.casting import in_words
from orchestrate.training.run.device import on_its_way
from orchestrate.training.run.run import Run
from orchestrate.training.run.step import StepResult
from orchestrate.training.schedule.orchestrator import Orchestrator
from orchestrate.training.schedule.own import OwnFile
from orchestrate.training.session import healing
from orchestrate.training.session.resume import open_model
from orchestrate.training.session.saving import Saver
from orchestrate.training.session.scores import falls_due, scores
from orchestrate.training.session.stopping import NoSignals, SignalWatch
from orchestrate.training.session.texts import continue_prompts
from orchestrate.training.settings.config import TrainConfig
from orchestrate.training.settings.errors import Refused, Stopped
from orchestrate.training.settings.metrics import (
    LOGGED,
    ON_FIRST_RANK,
    PARTS,
    VAL_BPB,
    VAL_LOSS,
    comes_with,
    falling,
    finite,
    numbers,
    of_source,
)
from orchestrate.training.settings.records import Progress, moved
from orchestrate.training.store import checkpoint
from orchestrate.training.store.reporting import Silent, machine, memory_percent
from orchestrate.training.store.state import ScheduleText, State, UserFile
from orchestrate.training.tasks import Task
from orchestrate.training.tasks import make as tasks_of


class Session:
    """What the loop works with.

    Args:
        orchestrator: at the place in the schedule from which this start goes on.
        operations: files of the user's own operations, kept in every checkpoint so that a resume asks for them.
    """

    def __init__(
        self,
        config: TrainConfig,
        run: Run,
        orchestrator: Orchestrator,
        reporter: Silent,
        signals: SignalWatch | NoSignals,
        operations: Sequence[OwnFile] = (),
    ) -> None:
        self.config = config
        self.run = run
        self.reporter = reporter
        self.signals = signals
        self.operations = operations
        self._tasks: dict[tuple[str, ...], Sequence[Task]] = {}
        self.orchestrator = orchestrator
        orchestrator.host = self
        self.began_at = run.progress.iter
        """The iteration at which this start began."""
        self.saver = Saver(self)
        self.rollbacks = 0
        """How often this start went back because of a sick step."""
        self._over_memory = False
        self._unwritten: tuple[dict[str, Any], Callable[[], float], Callable[[], float]] | None = None
        self.stops_seen = run.settings.stops_asked
        self._clock = time.perf_counter()
        self._logged_tokens = run.progress.tokens
        self._stopping_looked_at = -1
        self._boundary_tokens = run.progress.tokens
        self._without_value: set[str] = set()

    # ------------------------------------------------------------------------------------------ telling

    def event(self, kind: str, **fields: Any) -> None:
        """One line of events.jsonl, and one for the person at the console."""
        self.reporter.event(kind, iter=self.run.progress.iter, **fields)
        if kind == "operation":
            changes = moved(fields["settings_before"], fields["settings_after"])
            over = f" over {fields['over']} iterations" if fields["over"] else ""
            losses = ""
            if fields["val_loss_after"] is not None:
                losses = f"; val loss {fields['val_loss_before']:.4f} -> {fields['val_loss_after']:.4f}"
            if "cast" in fields:
                losses += f"; {in_words(fields['cast'])}"
            desc = f" ({fields['desc']})" if fields["desc"] else ""
            number = "-" if fields["entry"] is None else str(fields["entry"])
            if "round" in fields:
                number += f" {fields['round']}/{fields['rounds']}"
            self.reporter.say(
                f"[{number}] {fields['name']}{desc}: {changes or 'no change'}{over} [{fields['reason']}]{losses}"
            )
        elif kind == "samples":
            for sample in fields["texts"]:
                self.reporter.say(f"step {self.run.progress.iter}: a text from {sample['prompt']!r}:\n{sample['text']}")
        elif kind == "rollback":
            told = f"back to iteration {self.run.progress.iter} from {fields['from_iter']}: {fields['reason']}"
            if "entry" in fields:
                told += f"; entry {fields['entry']} ({fields['name']}) will not fire again"
            self.reporter.say(told)

    def metrics(self, kind: str, **fields: Any) -> None:
        """One line of metrics.jsonl."""
        self.reporter.metrics(kind, **self._line(**fields))

    def _line(self, **fields: Any) -> dict[str, Any]:
        """What every line of metrics says of this moment."""
        run, s, p = self.run, self.run.settings, self.run.progress
        return dict(
            iter=p.iter,
            tokens=p.tokens,
            seconds=p.seconds,
            **fields,
            lr=run.current_lr(),
            batch_size=s.batch_size,
            grad_accum=s.grad_accum,
            sequence_length=s.sequence_length,
            passes=run.stream.passes(p.cursor),
            coverage=run.stream.coverage(p.cursor),
            **self._of_sources(),
        )

    def _of_sources(self) -> dict[str, float]:
        """How far each of several data sets has been read."""
        stream, cursor = self.run.stream, self.run.progress.cursor
        if not isinstance(stream, Mixture):
            return {}
        return {
            of_source(kind, name): getattr(own, kind)(stream.own(name, cursor))
            for name, own in stream.streams.items()
            for kind in ("passes", "coverage")
        }

    def tick(self) -> None:
        """Bring the run's clock up to now."""
        now = time.perf_counter()
        self.run.progress.seconds += now - self._clock
        self._clock = now

    def log_step(self, result: StepResult) -> None:
        """One line of metrics for the step just made.

        On a GPU the loss is read, and the line written, after the next step or before anything is decided: no step
        waits for it. Where the schedule or early stopping asks for a number of the line, it is written at once.
        """
        run, p = self.run, self.run.progress
        parts = run.stopwatch.take()
        stepping = sum(parts.get(name, 0.0) for name in ("data", "forward_backward", "optimizer"))
        rate = (p.tokens - self._logged_tokens) / stepping if stepping else None
        self._logged_tokens = p.tokens
        line = self._line(
            loss=None,
            grad_norm=None,
            step_lr=result.lr,
            tokens_per_second=rate,
            seconds_by_part={name: parts.get(name, 0.0) for name in PARTS},
            machine=machine(run.device) if run.ranks.is_first else {},
        )
        self._unwritten = line, on_its_way(result.loss), on_its_way(result.grad_norm)
        if not run.diagnosis.late or self._asked:
            self._write_step()

    def _write_step(self) -> None:
        """Write the line of metrics that waits for its numbers, if there is one. Every rank does at the same place."""
        if self._unwritten is None:
            return
        (line, loss, grad_norm), self._unwritten = self._unwritten, None
        run = self.run
        with run.stopwatch.part("forward_backward"):  # what the host waits for
            line["grad_norm"] = grad_norm()
            line["loss"] = run.ranks.mean(loss())
        self.reporter.metrics("train", **line)
        heads, rate = self.orchestrator.heads, line["tokens_per_second"]
        shown = {
            "loss": f"{line['loss']:.4f}",
            "lr": f"{line['step_lr']:.3g}",
            "tok/s": f"{rate:,.0f}" if rate else "-",
        }
        if heads:
            shown["next"] = ", ".join(f"[{head.number}] {head.operation.name}" for head in heads)
        self.reporter.progress(line["iter"], **shown)
        self._look_at(numbers(line))

    @property
    def _asked(self) -> set[str]:
        """Numbers of the lines of log_interval that somebody decides on."""
        stopping = {self.config.early_stopping_metric} if self.config.early_stopping_patience else set()
        return {name for name in self.orchestrator.asked | stopping if comes_with(name, LOGGED)}

    def _look_at(self, logged: dict[str, float]) -> None:
        """Hand what was logged to those who decide on it, the same on every rank."""
        asked = self._asked
        values = {name: value for name, value in logged.items() if name in asked}
        if asked.intersection(ON_FIRST_RANK):
            values = self.run.ranks.broadcast(values)
        for name in sorted(asked - values.keys() - self._without_value):
            self._without_value.add(name)
            self.reporter.say(
                f"warning: {name} has no value on this machine, and the schedule or early stopping asks for it"
            )
        self.orchestrator.observe(values)
        name = self.config.early_stopping_metric
        if self.config.early_stopping_patience and name in values:
            self._look_for_gain(name, values[name])
            if self.why_end():
                self.settle()  # the end is decided on a last step whose outcome is known

    # ------------------------------------------------------------------------------------------ measuring

    def must_evaluate(self, ends: bool) -> bool:
        """Whether an evaluation is due at this boundary: at the start, the end, each interval; never twice at one."""
        p = self.run.progress
        if self.config.eval_only or p.last_eval_iter == p.iter:
            return self.config.eval_only
        return ends or self._on_time(p)

    def _on_time(self, p: Progress) -> bool:
        s = self.run.settings
        every = s.eval_interval_tokens
        return p.tokens // every > p.last_eval_tokens // every if every else p.iter % s.eval_interval == 0

    def looks_near(self) -> bool:
        """Whether an analysis is due at the boundary after the next step, unless the run ends before its time."""
        p, every = self.run.progress, self.config.analyze_interval
        if not every:
            return False
        after = replace(p, iter=p.iter + 1, tokens=p.tokens + self.run.settings.tokens_per_iter)
        ends = after.iter >= self.config.max_iters
        return (ends or self._on_time(after)) and falls_due(every, after, ends)

    def _analysis(self, ends: bool) -> Analysis:
        """What an analysis finds at this evaluation; nothing where none is due."""
        every = self.config.analyze_interval
        if not every or not falls_due(every, self.run.progress, ends):
            return Analysis()
        with self.run.stopwatch.part("eval"):
            found = analyze(self.run)
        for name, why in found.absent.items():
            if self.run.progress.iter and why not in self._without_value:
                self._without_value.add(why)
                self.reporter.say(f"analysis: {name} has no value: {why}")
        return found

    @property
    def tasks(self) -> Sequence[Task]:
        """Those of eval_tasks as it is now."""
        names = self.run.settings.eval_tasks
        if names not in self._tasks:
            self._tasks = {names: tasks_of(names)}
        return self._tasks[names]

    def must_save(self) -> bool:
        """Whether save_interval or save_interval_tokens asks for a checkpoint at this boundary. Once for each."""
        p, config = self.run.progress, self.config
        before, self._boundary_tokens = self._boundary_tokens, p.tokens
        every, tokens = config.save_interval, config.save_interval_tokens
        return p.iter > self.began_at and bool(
            (every and p.iter % every == 0) or (tokens and p.tokens // tokens > before // tokens)
        )

    def evaluate(self) -> float | None:
        """The evaluation of this boundary: best loss, early stopping and metrics follow. None where a signal came."""
        losses = self.run.evaluate_each(self.signals.poll)
        ends = self.config.eval_only or self.run.progress.iter >= self.config.max_iters or bool(self.why_end())
        scored = None if losses is None else scores(self.run, self.tasks, ends, self.signals.poll)
        if losses is None or scored is None:
            return None
        analysis = self._analysis(ends)
        self.tick()
        p, loss, of_sources = self.run.progress, self.run.together(losses), self._losses(losses)
        recorded = p.last_val_loss if p.last_eval_iter == p.iter and not p.changed_since_eval else None
        p.last_val_loss, p.last_eval_iter, p.last_eval_tokens, p.changed_since_eval = loss, p.iter, p.tokens, False
        if p.best_val_loss is None or loss < p.best_val_loss:
            p.best_val_loss, p.best_iter = loss, p.iter
        if self.config.early_stopping_metric == VAL_LOSS:
            self._look_for_gain(VAL_LOSS, loss)
        bits = self._bits(losses)
        by_name = {**of_sources, **bits, **scored, **analysis.values}
        if (metric := self.config.early_stopping_metric) in by_name:
            self._look_for_gain(metric, by_name[metric])
        self.metrics("eval", val_loss=loss, **by_name, **analysis.by_layer, best_val_loss=p.best_val_loss)
        each = f" ({', '.join(f'{name} {value:.4f}' for name, value in losses.items())})" if of_sources else ""
        best = " (best)" if p.best_iter == p.iter else ""
        bytewise = f", {bits[VAL_BPB]:.4f} bits per byte" if VAL_BPB in bits else ""
        self.reporter.say(f"step {p.iter}: val loss {loss:.4f}{each}{best}{bytewise}")
        if scored:
            self.reporter.say(f"step {p.iter}: " + ", ".join(f"{name} {value:.4f}" for name, value in scored.items()))
        if found := analysis.values:
            self.reporter.say(f"step {p.iter}: " + ", ".join(f"{name} {value:.4g}" for name, value in found.items()))
        if noted := {name: value for name, value in by_name.items() if name in self.orchestrator.asked}:
            self.orchestrator.observe(noted)
        if recorded is not None:  # with eval_only
            same = "equals" if loss == recorded else f"differs by {loss - recorded:.3g} from"
            self.reporter.say(f"val loss {loss!r} {same} what the checkpoint recorded")
        if self.config.sample_prompts:
            try:
                self.event("samples", texts=continue_prompts(self.run))
            except Refused as error:
                self.reporter.say(f"warning: sample_prompts: {error}")
            self.tick()
        return loss

    def _losses(self, losses: dict[str, float]) -> dict[str, float]:
        """The validation losses of several data sets by the names of their metrics; of one there is val_loss alone."""
        several = len(self.run.batches.data) > 1
        return {of_source(VAL_LOSS, name): loss for name, loss in losses.items()} if several else {}

    def _bits(self, losses: dict[str, float]) -> dict[str, float]:
        """Bits per byte by the names of their metrics: together as the losses are, where all that count have them."""
        run = self.run
        before = set(run.text_bytes.missing)
        found = run.bits_per_byte(losses)
        for name in run.text_bytes.missing.keys() - before:
            self.reporter.say(f"{VAL_BPB} is not measured of {name or 'the data'}: {run.text_bytes.missing[name]}")
        several = len(run.batches.data) > 1
        counting = {name for name in losses if not several or run.config.evaluated.get(name)}
        bits = {VAL_BPB: run.together(found)} if counting <= found.keys() else {}
        return bits | ({of_source(VAL_BPB, name): value for name, value in found.items()} if several else {})

    def _look_for_gain(self, metric: str, value: float) -> None:
        """Count one more value of the metric that early stopping looks at."""
        p = self.run.progress
        if p.stopping_metric != metric:  # a resume has chosen another
            p.stopping_metric, p.stopping_best, p.evals_without_gain = metric, None, 0
        if finite(value) and (
            p.stopping_best is None
            or falling(metric, value) < falling(metric, p.stopping_best) - self.config.early_stopping_min_delta
        ):
            p.stopping_best, p.evals_without_gain = value, 0
        else:
            p.evals_without_gain += 1
        self._stopping_looked_at = p.iter

    def measure(self, why: str) -> float | None:
        """An extra evaluation around an operation; it neither counts as best nor for early stopping."""
        losses = self.run.evaluate_each(self.signals.poll)
        if losses is None:
            return None
        self.tick()
        loss, best = self.run.together(losses), self.run.progress.best_val_loss
        by_name = {**self._losses(losses), **self._bits(losses)}
        self.metrics("eval", val_loss=loss, **by_name, best_val_loss=best, why=why)
        return loss

    def watch_memory(self) -> None:
        """Save and warn once when memory crosses memory_checkpoint_percent; looked at with every line of metrics."""
        limit = self.config.memory_checkpoint_percent
        if not limit:
            return
        facts = memory_percent(self.run.device) if self.run.ranks.is_first else {}
        facts = self.run.ranks.broadcast(facts)
        over = {name: value for name, value in facts.items() if value >= limit}
        if over and not self._over_memory and self.settle():
            told = ", ".join(f"{name} memory at {value:.0f} %" for name, value in over.items())
            self.reporter.say(f"warning: {told}, memory_checkpoint_percent is {limit:g}: saving")
            self.save_unless_saved(f"{told} (memory_checkpoint_percent {limit:g})", required=False)
        self._over_memory = bool(over)

    # ------------------------------------------------------------------------------------------ healing

    def heal(self, result: StepResult) -> StepResult | None:
        """The step to log, None where the run went back; see healing.py. Raises Stopped."""
        self._write_step()  # of the step before
        return healing.heal(self, result)

    def settle(self) -> bool:
        """Know what became of the last step before anything is decided on it; False where the run went back."""
        self._write_step()
        return healing.settle(self)

    def roll_back(self, why: str) -> None:
        """Back to the newest whole checkpoint, and on with the samples after the sick ones."""
        healing.roll_back(self, why)

    # ------------------------------------------------------------------------------------------ saving

    def state(self) -> State:
        """All but the tensors that is needed to go on exactly, as it is now."""
        run, schedule = self.run, self.orchestrator.schedule
        run.progress.noise = run.noise.values()
        return State(
            config=self.config,
            settings=run.settings,
            progress=copy.deepcopy(run.progress),
            orchestrator=self.orchestrator.state(),
            schedule=ScheduleText(schedule.source, schedule.text),
            scaler=run.scaler.state_dict(),
            wandb_id=self.reporter.wandb_id,
            log_sizes=self.reporter.sizes(),
            data=run.batches.opened.fingerprint(),
            tokenizer=run.batches.opened.meta.of_tokens(),
            world_size=run.ranks.world_size,
            operations=tuple(UserFile(**file.to_json()) for file in self.operations),
        )

    def save(self, why: str, required: bool = True, mark: str = "") -> str:
        """Save a checkpoint and return its name; see `Saver.save`."""
        return self.saver.save(why, required, mark)

    def save_unless_saved(self, why: str, required: bool = True) -> None:
        """Save unless this very state of the run is on the disk."""
        self.saver.save_unless_saved(why, required)

    def go_back(self, name: str) -> dict[str, Any]:
        """Become the state of a checkpoint of this run, on every rank; what was logged since is marked void."""
        run, found, error = self.run, None, None
        self.saver.finish()
        try:
            path = checkpoint.folder(self.config.out_dir) / name
            loaded = checkpoint.load(path, whole=run.ranks.is_first)
            settings = loaded.state.present
            found = loaded.state, settings, *open_model(loaded, settings, run.ranks, run.device)
        except Exception as caught:  # whatever it is, the other ranks must hear of it
            error = f"{type(caught).__name__}: {caught}"
        failures = [text for text in run.ranks.gather(error) if text]
        if failures or found is None:
            raise Stopped(f"cannot go back to checkpoint {name}: {failures[0]}")
        state, settings, model, moments = found
        run.restore(settings, state.progress, model, moments, state.scaler)
        self.stops_seen = run.settings.stops_asked
        self._logged_tokens = run.progress.tokens
        self.reporter.void_since(state.log_sizes, run.progress.iter)
        return state.orchestrator

    def keep(self, why: str) -> None:
        """Save what the run went back to, and only then remove the checkpoints of the way that was left."""
        self.save(why)
        if self.run.ranks.is_first:
            checkpoint.remove_after(self.config.out_dir, self.run.progress.iter)

    # ------------------------------------------------------------------------------------------ ending

    def why_end(self) -> str:
        """Why the run ends at this boundary, or nothing."""
        patience, p = self.config.early_stopping_patience, self.run.progress
        if p.iter >= self.config.max_iters:
            return "max_iters"
        if self.run.settings.stops_asked != self.stops_seen:
            return "stopped by the schedule"
        if self._stopping_looked_at == p.iter and 0 < patience <= p.evals_without_gain:
            what = "evaluations" if p.stopping_metric == VAL_LOSS else f"values of {p.stopping_metric}"
            return f"early stop: no gain in {p.evals_without_gain} {what}"
        return ""
