"""After a step that did not update the weights: again in smaller pieces, on without it, back, or the end of the run.

Every rank has the same result of the step, so every rank does the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from orchestrate.training.run.step import StepResult
from orchestrate.training.session.resume import newest_whole
from orchestrate.training.settings.errors import Refused, Stopped
from orchestrate.training.settings.records import differences
from orchestrate.training.store import checkpoint

if TYPE_CHECKING:
    from orchestrate.training.session.session import Session


def heal(session: Session, result: StepResult) -> StepResult | None:
    """After a step that did not update the weights: try again with less memory, skip, go back, or stop.

    Every rank has the same result. Returns the step to log, None where the run went back. Raises Stopped
    where the run cannot or shall not go on.
    """
    run, p, config = session.run, session.run.progress, session.config
    if not result.sick:
        p.sick_steps = 0
        return result
    iteration, first, _ = result.at
    samples = [first, first + run.settings.samples_per_iter]
    if result.sick == "out of memory":
        return retry_smaller(session, result)
    p.sick_steps += 1
    limit = config.sick_step_limit
    action = "stop" if max(p.sick_steps, session.rollbacks) >= limit else config.on_sick_step
    told = f"{result.sick} in the step after iteration {iteration}, samples {samples[0]} to {samples[1] - 1}"
    session.event("error", message=told, action=action, samples=samples)
    session.reporter.say(f"{told}: {action}")
    if action == "stop":
        raise Stopped(f"{told}; on_sick_step {config.on_sick_step}, sick_step_limit {limit}")
    if action == "rollback":
        session.roll_back(told)
        return None
    return result


def retry_smaller(session: Session, failed: StepResult) -> StepResult | None:
    """Make the failed step again in smaller micro-batches: the same global batch, no sample lost or seen twice."""
    run, p = session.run, session.run.progress
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
        session.event(
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
    return heal(session, failed)


def roll_back(session: Session, why: str) -> None:
    """Back to the newest whole checkpoint, and on with the samples after the sick ones."""
    run, from_iter = session.run, session.run.progress.iter
    session.saver.finish()

    def from_first(question: str, answer: Callable[[], str]) -> str:
        return run.ranks.broadcast(answer() if run.ranks.is_first else None)

    try:
        newest = newest_whole(session.config.out_dir, from_first)
    except Refused as error:
        raise Stopped(f"{why}; there is no checkpoint to go back to: {error}") from None
    session.rollbacks += 1
    position = session.go_back(newest.path.name)
    aside = [str(checkpoint.set_aside(path)) for path in newest.damaged] if run.ranks.is_first else []
    session.orchestrator.load_state(position)
    run.progress.samples += session.config.rollback_skip_batches * run.settings.samples_per_iter
    if session.config.rollback_rewarm_iters:
        rewarm = {"rewarm_iters": session.config.rollback_rewarm_iters, "rewarms": run.settings.rewarms + 1}
        run.adopt(replace(run.settings, **rewarm))
    run.check_ranks_agree("a rollback")
    session.event(
        "rollback",
        reason=why,
        from_iter=from_iter,
        checkpoint=newest.path.name,
        next_sample=run.progress.samples,
        problems=newest.problems,
        set_aside=aside,
    )
    session.keep("rolled back")
