"""After a step that did not update the weights: again in smaller pieces, on without it, back, or the end of the run.

Every rank has the same result of the step, so every rank does the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from orchestrate.training.run.sickness import OUT_OF_MEMORY, Sick
from orchestrate.training.run.step import StepResult
from orchestrate.training.schedule.ramps import in_smaller_pieces
from orchestrate.training.session.resume import newest_whole
from orchestrate.training.settings.errors import Refused, Stopped
from orchestrate.training.settings.records import differences
from orchestrate.training.store import checkpoint

if TYPE_CHECKING:
    from orchestrate.training.session.session import Session


def heal(session: Session, result: StepResult) -> StepResult | None:
    """Act on what was wrong with a step, if anything: try again with less memory, skip, go back, or stop.

    Returns the step to log, None where the run went back. Raises Stopped where the run cannot or shall not go on.
    """
    sick = result.sick
    if sick is None:
        return result
    if sick.cause == OUT_OF_MEMORY:
        return retry_smaller(session, sick)
    return result if act_on(session, sick) else None


def settle(session: Session) -> bool:
    """Wait for what became of the last step, and act on it. False where the run went back."""
    sick = session.run.diagnosis.settle()
    if sick is None:
        return True
    if sick.cause == OUT_OF_MEMORY:
        return retry_smaller(session, sick) is not None
    return act_on(session, sick)


def act_on(session: Session, sick: Sick) -> bool:
    """Skip the step, go back (False), or stop, as the configuration says."""
    config, p = session.config, session.run.progress
    p.sick_steps += 1
    limit = config.sick_step_limit
    action = "stop" if max(p.sick_steps, session.rollbacks) >= limit else config.on_sick_step
    first = sick.at.cursor.sample
    session.event("error", message=str(sick), action=action, samples=[first, first + sick.samples])
    session.reporter.say(f"{sick}: {action}")
    if action == "stop":
        raise Stopped(f"{sick}; on_sick_step {config.on_sick_step}, sick_step_limit {limit}")
    if action == "rollback":
        session.roll_back(str(sick))
        return False
    return True


def retry_smaller(session: Session, failed: Sick) -> StepResult | None:
    """Make a failed step again in smaller micro-batches: the same global batch, no sample lost or seen twice."""
    run, p = session.run, session.run.progress
    now, result = p.place, None
    # Where answers come late, one more step of the same size has been made since.
    queue = [failed, *filter(None, [run.diagnosis.settle()])]
    applied_since = run.diagnosis.late and len(queue) == 1
    while queue:
        sick = queue.pop(0)
        if sick.cause != OUT_OF_MEMORY:
            if not act_on(session, sick):
                return None
            continue
        p.go(sick.at)
        try:
            if sick.batch_size == run.settings.batch_size:
                make_smaller(session)
        except Stopped:
            p.go(now if applied_since else sick.at)
            raise
        result = run.step()
        again = result.sick or run.diagnosis.settle()
        p.go(now)
        if again:
            queue.insert(0, again)
    return None if result is None else replace(result, sick=None)


def make_smaller(session: Session) -> None:
    """Divide the micro-batch by its smallest factor, and say so. Raises Stopped where it is one sequence."""
    run, before = session.run, session.run.settings
    smaller = before.in_smaller_pieces()
    if smaller is None:
        raise Stopped("out of memory with a micro-batch of one sequence: nothing is left to make smaller")
    run.adopt(smaller)
    session.orchestrator.ramps = in_smaller_pieces(session.orchestrator.ramps, before, smaller)
    settings_before, settings_after = differences(before, smaller)
    total, trainable = run.parameter_counts()
    session.event(
        "operation",
        entry=None,
        name="adjust_batch_size",
        value=[smaller.batch_size, smaller.grad_accum],
        reason="out of memory: the same global batch in smaller pieces",
        desc="",
        over=None,
        settings_before=settings_before,
        settings_after=settings_after,
        val_loss_before=None,
        val_loss_after=None,
        seconds=0.0,
        parameters_total=total,
        parameters_trainable=trainable,
    )


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
    left_out = session.config.rollback_skip_batches * run.settings.samples_per_iter
    run.progress.cursor = run.progress.cursor.skip(left_out)
    if session.config.rollback_rewarm_iters:
        rewarm = {"rewarm_iters": session.config.rollback_rewarm_iters, "rewarms": run.settings.rewarms + 1}
        run.adopt(replace(run.settings, **rewarm))
    run.check_ranks_agree("a rollback")
    session.event(
        "rollback",
        reason=why,
        from_iter=from_iter,
        checkpoint=newest.path.name,
        next_sample=run.progress.cursor.sample,
        problems=newest.problems,
        set_aside=aside,
    )
    session.keep("rolled back")
