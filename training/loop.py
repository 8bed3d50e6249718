"""The loop: evaluate, consult, save, step, log. It reads top to bottom; everything it does is named elsewhere."""

from __future__ import annotations

from orchestrate.training.session import ending
from orchestrate.training.session.session import Session


def train(session: Session) -> int:
    """Train to the end of the run and return the exit code: 0 at its end, 128 + N after signal N."""
    try:
        return _train(session)
    except Exception as error:
        session.saver.emergency(error)
        ending.by_error(session, error)
        raise


def _train(session: Session) -> int:
    run, config, orchestrator, signals = session.run, session.config, session.orchestrator, session.signals
    logged_at = -1
    while True:
        p, s = run.progress, run.settings
        ends, clock = p.iter >= config.max_iters, logged_at == p.iter
        due, saves = session.must_evaluate(ends), session.must_save()

        # Where something is decided, it is decided on a last step whose outcome is known.
        if (due or saves or orchestrator.acts(due, clock)) and not session.settle():
            continue
        loss = session.evaluate() if due else None
        if config.eval_only:
            return 128 + signals.agreed if loss is None else 0
        evaluated = loss is not None
        improved = evaluated and p.best_iter == p.iter

        # The schedule acts between two steps, on numbers that every rank has.
        if not signals.agreed:
            orchestrator.consult(loss, look_at_clock=clock)

        # A signal is agreed on by all ranks before anybody stops; it may have cut the evaluation above short.
        if number := signals.poll():
            session.settle()
            session.event("signal", signal=number)
            session.save_unless_saved(f"signal {number}")
            ending.by_signal(session, number)
            return 128 + number

        if reason := session.why_end():
            if p.last_eval_iter != p.iter:
                session.evaluate()
            session.save_unless_saved("the end of the run")
            ending.by_itself(session, reason)
            return 0
        if evaluated and p.iter > 0 and (improved or config.always_save_checkpoint):
            session.save_unless_saved("best validation loss" if improved else "evaluation", required=False)
        elif saves:
            session.save_unless_saved("save_interval", required=False)

        # A step that came out sick is made again, passed over or taken back, as configured.
        result = session.heal(run.step(near=session.looks_near()))
        session.tick()
        if result is not None and p.iter % s.log_interval == 0:
            session.log_step(result)
            session.watch_memory()
            logged_at = p.iter
