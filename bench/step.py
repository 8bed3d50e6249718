"""How fast is a step? Tokens per second of a configuration, beside a nanoGPT checkout, and with a waiting schedule.

    python bench/step.py config/shakespeare_char_cpu.py [--nanogpt PATH] [--rounds 8] [--steps 20] [--KEY=VALUE ...]

Everything is measured in turns inside one process, in rounds, because timings of this kind drift; a ratio is that of
the medians, and the spread of the rounds is printed beside it. Nothing of nanoGPT is shipped: PATH names a checkout.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from orchestrate.data.stream import DataSet, Meta, TokenFile  # noqa: E402
from orchestrate.training.run.device import pick_device  # noqa: E402
from orchestrate.training.run.distributed import Ranks  # noqa: E402
from orchestrate.training.run.run import Run  # noqa: E402
from orchestrate.training.schedule.dry import DryRun  # noqa: E402
from orchestrate.training.schedule.file import Schedule, parse_schedule  # noqa: E402
from orchestrate.training.schedule.orchestrator import Orchestrator  # noqa: E402
from orchestrate.training.session.start import DEFAULT_VOCAB, initial_model, model_config_from, settings_from  # noqa: E402
from orchestrate.training.settings.config import resolve  # noqa: E402

PENDING = 100


def make_run(config, tokens: Path) -> Run:
    """A run of this configuration on random tokens."""
    device = pick_device(config.device, 0)
    vocab = 65 if "char" in config.dataset or "docs" in config.dataset else DEFAULT_VOCAB
    model_config = model_config_from(config, vocab)
    from orchestrate.training.settings.records import Progress

    file = TokenFile(tokens)
    data = DataSet(file, file, Meta(vocab))
    model = initial_model(config, model_config)
    settings = settings_from(config, model_config)
    return Run(config, settings, Progress.start(settings), model, data, Ranks(device.type), device)


def nanogpt_step(path: Path, run: Run) -> Callable[[], None]:
    """One training step as nanoGPT's train.py makes it, with its own model and optimizer settings."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", path / "model.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = module
    spec.loader.exec_module(module)
    s, c = run.settings, run.settings.model
    shape = dict(block_size=c.block_size, vocab_size=c.vocab_size, n_layer=c.n_layer, n_head=c.n_head)
    model = module.GPT(module.GPTConfig(**shape, n_embd=c.n_embd, dropout=run.settings.dropout, bias=c.bias)).to(
        run.device
    )
    optimizer = model.configure_optimizers(s.weight_decay, s.learning_rate, (s.beta1, s.beta2), run.device.type)
    forward = torch.compile(model) if run.config.compile else model
    tokens = run.data.train.path
    import numpy as np

    def batch():
        data = np.memmap(tokens, dtype=np.uint16, mode="r")
        ix = torch.randint(len(data) - c.block_size, (s.batch_size,))
        x = torch.stack([torch.from_numpy(data[i : i + c.block_size].astype(np.int64)) for i in ix])
        y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + c.block_size].astype(np.int64)) for i in ix])
        if run.device.type == "cuda":
            return tuple(t.pin_memory().to(run.device, non_blocking=True) for t in (x, y))
        return x, y

    state = SimpleNamespace(batch=batch())

    def step() -> None:
        for group in optimizer.param_groups:
            group["lr"] = run.current_lr()
        for _ in range(s.grad_accum):
            with run.autocast():
                _, loss = forward(*state.batch)
                loss = loss / s.grad_accum
            state.batch = batch()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), s.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def ours(run: Run, pending: int) -> Callable[[], None]:
    """One step of the loop: consult, then step, with this many entries waiting."""
    text = "".join(f"- {{name: set_lr, value: 1e-4, at_iter: {10**9 + i}, trigger_loss: 0}}\n" for i in range(pending))
    schedule = parse_schedule(text, "bench.yaml") if pending else Schedule()
    orchestrator = Orchestrator(schedule, run, DryRun(run.settings, run.progress))

    def step() -> None:
        orchestrator.consult(None, look_at_clock=False)
        run.step()

    return step


def measure(
    contenders: dict[str, Callable[[], None]], rounds: int, steps: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds per step of each, a list over the rounds; the order turns from round to round."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for step in contenders.values():
        for _ in range(5):
            step()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            wait()
            start = time.perf_counter()
            for _ in range(steps):
                contenders[name]()
            wait()
            seconds[name].append((time.perf_counter() - start) / steps)
    return seconds


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="*")
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT to measure beside")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20, help="steps of each in a round")
    options, rest = parser.parse_known_args(arguments)
    pairs = [tuple(text.removeprefix("--").split("=", 1)) for text in rest]
    config, _ = resolve(options.config, pairs)

    import tempfile

    import numpy as np

    with tempfile.TemporaryDirectory() as folder:
        tokens = Path(folder) / "tokens.bin"
        np.random.default_rng(0).integers(0, 65, 1_000_000).astype(np.uint16).tofile(tokens)
        run = make_run(config, tokens)
        contenders = {"this project": ours(run, 0), f"with {PENDING} pending entries": ours(run, PENDING)}
        if options.nanogpt:
            contenders["nanoGPT"] = nanogpt_step(options.nanogpt, run)
        seconds = measure(contenders, options.rounds, options.steps, run.device)

        pending = parse_schedule("- {name: set_lr, value: 1e-4, at_iter: 1000000000}\n" * PENDING, "b.yaml")
        consult = Orchestrator(pending, run, DryRun(run.settings, run.progress))
        start = time.perf_counter()
        for _ in range(10000):
            consult.consult(None, look_at_clock=False)
        alone = (time.perf_counter() - start) / 10000

    base = statistics.median(seconds["this project"])
    where = torch.cuda.get_device_name() if run.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"torch {torch.__version__}, {where}, {run.dtype}, compile {config.compile}, "
        f"{run.settings.tokens_per_iter} tokens/iter"
    )
    print(f"{'':28}{'ms/step':>10}{'tokens/s':>12}{'speed':>8}   spread of rounds (ms)")
    for name, values in seconds.items():
        median = statistics.median(values)
        print(
            f"{name:28}{median * 1e3:>10.2f}{run.settings.tokens_per_iter / median:>12,.0f}{base / median:>8.3f}"
            f"   {min(values) * 1e3:.2f} .. {max(values) * 1e3:.2f}"
        )
    if options.nanogpt:
        print(f"ratio to nanoGPT: {statistics.median(seconds['nanoGPT']) / base:.3f} (above 1: faster)")
    print(f"a consultation with {PENDING} pending entries: {alone * 1e6:.1f} us, {alone / base:.3%} of a step")


if __name__ == "__main__":
    main(sys.argv[1:])
