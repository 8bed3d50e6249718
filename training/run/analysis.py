"""What there is to know of a model in training: ranks of weights, embeddings, drift, gradients, attention, noise.

Pure functions from tensors to numbers; and, of a live run, what a step shows (`NoiseScale`, `NearStep`) and what an
evaluation adds (`analyze`). Looking changes nothing: no weight, no gradient, no random number of the run.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from orchestrate.data.stream import eval_windows, gather
from orchestrate.model.config import layer_of_parameter
from orchestrate.model.gpt import GPT
from orchestrate.model.lora import reshape_lora
from orchestrate.training.run.sharding import gradient_norm, is_sharded, local, reshard
from orchestrate.training.settings.metrics import ANALYSED
from orchestrate.training.settings.records import SKETCH

if TYPE_CHECKING:
    from orchestrate.training.run.batches import Batch
    from orchestrate.training.run.run import Run

LARGEST = 1024
"""Rows that a singular value decomposition has at most; a larger matrix is projected at random to so many."""
MOST_BLOCKS = 12
"""Blocks whose matrices are looked at, spread evenly over the depth."""
WINDOWS, QUERIES = 4, 64
"""Of attention entropy: validation windows, and queries of each, spread evenly over it."""
SMOOTHING = 0.99
"""Of the noise scale: what a step before counts of the one after it; about the last 100 steps do."""


# ---------------------------------------------------------------------------------------------- numbers of tensors


def effective_rank(matrix: Tensor) -> float:
    """exp of the entropy of the singular values, divided by their sum (Roy and Vetterli 2007); 0 of a matrix of zeros.

    Between 1 and the smaller side. Where that is more than LARGEST, the matrix is multiplied by a Gaussian one (always
    the same) of so many rows first: then it is a number to compare with itself, at most LARGEST.
    """
    m = matrix.detach().double()
    m = m if m.shape[0] <= m.shape[1] else m.T
    if len(m) > LARGEST:
        m = _directions(LARGEST, len(m), m) @ m
    values = torch.linalg.eigvalsh(m @ m.T).clamp(min=0).sqrt()
    total = values.sum()
    return float(torch.special.entr(values / total).sum().exp()) if total > 0 else 0.0


def mean_cosine(rows: Tensor) -> float:
    """Mean cosine between two different rows of (n, d), over all pairs; rows of zeros have none with others."""
    unit = F.normalize(rows.detach().double(), dim=1)
    n = len(unit)
    return float((unit.sum(0).square().sum() - unit.square().sum()) / (n * (n - 1))) if n > 1 else 1.0


def isotropy(rows: Tensor) -> float:
    """min Z(c) / max Z(c) with Z(c) = sum of exp(c . row), over unit directions c; 1 where all are alike.

    Mu and Viswanath 2018, arXiv:1702.01417, equation 6: over the eigenvectors of rows^T rows, both ways. Of more than
    LARGEST columns: over so many random directions (always the same).
    """
    r = rows.detach().double()
    size = r.shape[1]
    if size <= LARGEST:
        directions = torch.linalg.eigh(r.T @ r).eigenvectors
    else:
        directions = F.normalize(_directions(LARGEST, size, r), dim=1).T
    along = r @ directions
    logs = torch.stack((along.logsumexp(0), (-along).logsumexp(0)))
    return float((logs.min() - logs.max()).exp())


def attention_entropy(q: Tensor, k: Tensor, mask: Tensor | None = None, causal: bool = False) -> float:
    """Mean entropy of what queries look at, in nats: at most the log of how many keys a query sees.

    Args:
        q: (batch, n_head, time, head_size); k: (batch, n_kv_head, time, head_size). Over at most QUERIES of the times.
        mask: added to the scores, or True where a key is seen; broadcast to (batch, n_head, time, time).
    """
    time, keys = q.shape[2], k.shape[2]
    places = torch.linspace(0, time - 1, min(QUERIES, time), dtype=torch.float64).round().long().to(q.device)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = q[:, :, places].float() @ k.float().transpose(2, 3) / math.sqrt(q.shape[3])
    if causal:
        scores = scores.masked_fill(torch.arange(keys, device=q.device) > places[:, None], -torch.inf)
    if mask is not None:
        mask = mask.expand(*mask.shape[:-2], time, keys)[..., places, :]
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.float()
    return float(torch.special.entr(scores.softmax(3)).sum(3).mean())


def sketch(weights: Mapping[str, Tensor]) -> Tensor:
    """SKETCH sums over the weights with fixed random signs, (SKETCH,) float64 on the CPU.

    The squared norm of the difference of two sketches estimates that of the weights without bias, to a relative
    standard deviation of sqrt(2 / SKETCH), 4 % (Charikar, Chen and Farach-Colton 2002, as a sketch of the norm: Thorup
    and Zhang 2012). SKETCH is a prime, so no column of a matrix falls into one sum.
    """
    sums = torch.zeros(SKETCH, dtype=torch.float64)
    for name, weight in weights.items():
        signs = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        for part in weight.detach().flatten().split(SKETCH * 4096):
            values = part.cpu().float()
            values = values * (torch.randint(0, 2, (len(values),), generator=signs, dtype=torch.int8) * 2 - 1)
            sums += F.pad(values, (0, -len(values) % SKETCH)).view(-1, SKETCH).sum(0, dtype=torch.float64)
    return sums


def noise_estimates(small: Any, small_batch: float, big: Any, big_batch: float) -> tuple[Any, Any]:
    """Unbiased estimates of |G|^2 and of tr(Sigma), the variance of one token's gradient, from two squared norms.

    McCandlish et al. 2018, arXiv:1812.06162, appendix A.1: E |G_B|^2 = |G|^2 + tr(Sigma) / B.

    Args:
        small, big: squared norms of the mean gradients over so many tokens.
    """
    squared = (big_batch * big - small_batch * small) / (big_batch - small_batch)
    return squared, (small - big) / (1 / small_batch - 1 / big_batch)


def _directions(count: int, size: int, like: Tensor) -> Tensor:
    """(count, size), the same Gaussian numbers every time."""
    return torch.randn(count, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64).to(like.device)


# ---------------------------------------------------------------------------------------------- what steps show


class NoiseScale:
    """The gradient noise scale B_simple = tr(Sigma) / |G|^2, in tokens, from the steps as they are made.

    Each step's global batch is compared with the first micro-step of a rank. Its gradient is measured when it has been
    computed: where more micro-steps of the rank follow, as what has been added up by then; where it is the rank's only
    one, by hooks, before DDP adds the ranks' gradients up. The ranks' estimates are averaged. Sharded gradients are
    never a rank's own: there it is the first micro-steps of all ranks together, and one more must follow. Estimates
    of |G|^2 and of tr(Sigma) are averaged over steps, each by itself, and only then divided: the ratio of single ones
    would be biased (appendix A.1). No backward pass is added, and no host waits.

    Args:
        values: `values()` of before.
    """

    def __init__(self, device: torch.device, values: tuple[float, ...]) -> None:
        self.sums = torch.tensor(values, device=device)
        """Running means of both, and of 1."""
        self._first: tuple[Tensor, float] | None = None
        self.targets = 0
        """Of this step's first micro-step on this rank, how many counted."""

    @staticmethod
    def why_not(run: Run) -> str:
        """Why the steps of a run tell nothing of the noise, or nothing."""
        count, ranks = run.settings.grad_accum, run.ranks
        if ranks.sharded and count <= ranks.world_size:
            return f"with parallel=fsdp it needs 2 micro-steps on each rank, so grad_accum {2 * ranks.world_size}"
        return "" if count > 1 else "it compares micro-steps, and there is one: it needs grad_accum 2"

    def values(self) -> tuple[float, float, float]:
        """What goes into a checkpoint. Waits for the device."""
        one, two, three = self.sums.tolist()
        return one, two, three

    def forget(self) -> None:
        """Begin anew: other parameters train."""
        self.sums = torch.zeros_like(self.sums)

    def begin(self) -> None:
        """Before a step."""
        self._first, self.targets = None, 0

    @contextmanager
    def first(self, run: Run, batch: Batch, micro_steps: int) -> Iterator[None]:
        """Around the backward pass of a rank's first micro-step of so many."""
        ranks, parameters = run.ranks, run.optimizer.parameters
        together = ranks.world_size if ranks.sharded else 1
        if micro_steps > 1:
            yield
            norm = gradient_norm(parameters, 0.0)
            squared = norm * norm
        elif ranks.distributed and not ranks.sharded:
            squares: list[Tensor] = []
            hooks = [p.register_hook(lambda grad: squares.append(grad.float().square().sum())) for p in parameters]
            try:
                yield
            finally:
                for hook in hooks:
                    hook.remove()
            squared = torch.stack(squares).sum()
        else:
            yield
            return
        scale = run.scaler.scale(torch.ones((), device=run.device))  # 1 without a GradScaler
        self._first = squared / (scale * scale), float(batch.y.numel() * micro_steps * together)
        self.targets = batch.targets

    def add(self, run: Run, grad_norm: Tensor, targets: float, first_targets: float, healthy: Tensor) -> None:
        """After the backward passes of a step. Collective.

        Args:
            grad_norm: of the whole batch's gradient, (), and `targets`, how many it is the mean over.
            first_targets: of the first micro-steps, over all ranks.
            healthy: () bool; otherwise the step tells nothing.
        """
        if self.why_not(run):
            return
        found = torch.zeros(3, device=run.device)
        small = first_targets if run.ranks.sharded else float(self.targets)
        if self._first is not None and 0 < small < targets:
            squared, divisor = self._first
            scaled = squared * (divisor / small) ** 2
            estimates = noise_estimates(scaled, small, grad_norm * grad_norm, targets)
            found = torch.stack((*estimates, torch.ones_like(scaled))).float()
        run.ranks.add_up(found)
        count, found = found[2], found / found[2].clamp(min=1.0)
        usable = healthy & torch.isfinite(found).all() & (count > 0)
        self.sums = torch.where(usable, SMOOTHING * self.sums + (1 - SMOOTHING) * found, self.sums)


class NearStep:
    """One step seen from near: gradients, and how far the weights moved, of the matrices of each layer.

    To be made when the gradients are complete and before they are clipped. Until `finish` there is a copy of what
    trains in host memory.
    """

    def __init__(self, run: Run) -> None:
        self.iter = run.progress.iter + 1
        """Of the weights after it."""
        self.layers: dict[str, list[str]] = {}
        self._before: dict[str, Tensor] = {}
        for name, p in zip(run.optimizer.names, run.optimizer.parameters, strict=True):
            if p.dim() >= 2:
                self.layers.setdefault(layer_of_parameter(name), []).append(name)
                self._before[name] = local(p.detach())[0].to("cpu", copy=True)
        self._sums = [[_squares(p.grad) for p in self._of(run, names)] for names in self.layers.values()]

    def finish(self, run: Run, healthy: Tensor) -> NearStep:
        """After the weights have moved; itself."""
        rows = []
        for names, gradients in zip(self.layers.values(), self._sums, strict=True):
            moved, size = [], []
            for name, p in zip(names, self._of(run, names), strict=True):
                before = self._before[name].to(run.device)
                moved.append(_squares(p.detach() - before if not is_sharded(p) else local(p.detach())[0] - before))
                size.append(_squares(before))
            rows.append(torch.stack([torch.stack(part).sum() for part in (gradients, moved, size)]))
        self._before.clear()
        self.found = torch.stack(rows) if rows else torch.zeros(0, 3)
        """(layer, 3): squared norms of gradient, update and weights before it; on this rank."""
        self.healthy = healthy
        return self

    @staticmethod
    def _of(run: Run, names: list[str]) -> list[Tensor]:
        everything = dict(zip(run.optimizer.names, run.optimizer.parameters, strict=True))
        return [everything[name] for name in names]


def _squares(tensor: Tensor | None) -> Tensor:
    """The sum of the squares of this rank's part."""
    return torch.zeros(()) if tensor is None else local(tensor)[0].float().square().sum().cpu()


# ---------------------------------------------------------------------------------------------- at an evaluation


@dataclass
class Analysis:
    """What was found of a run."""

    values: dict[str, float] = field(default_factory=dict)
    """Metric -> value; nan where there is none."""
    by_layer: dict[str, dict[str, float]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    """Metric -> why it has no value."""


@torch.no_grad()
def analyze(run: Run) -> Analysis:
    """All that is known of a run now, the same on every rank. Collective; only `progress.sketch` changes.

    The first rank computes. With shards all gather the weights in host memory, as a growth does.
    """
    found, ranks = Analysis(), run.ranks
    _of_step(run, found)
    _of_noise(run, found)
    model = ranks.whole(run.model, {})[0]
    here = _entropy(run) if ranks.is_first or ranks.sharded else 0.0
    sums: tuple[float, ...] = ()
    if ranks.is_first:
        found.values["attention_entropy"] = here
        found.values |= weight_values(model)
        sums = tuple(sketch(dict(model.named_parameters())).tolist())
        _of_drift(run, sums, _identity(model), found)
    found, sums = ranks.broadcast((found, sums))
    run.progress.sketch, run.progress.sketch_of = sums, _identity(model)
    found.values = {name: found.values[name] for name in ANALYSED if name in found.values}
    return found


def weight_values(model: GPT) -> dict[str, float]:
    """Effective ranks of matrices as they compute (q, k and v apart, adapters merged), and the embedding's geometry."""
    model = merged(model)
    device = torch.device("cpu") if model.transformer["wte"].weight.device.type == "mps" else None  # no float64 there
    blocks = model.transformer["h"]
    chosen = torch.linspace(0, len(blocks) - 1, min(MOST_BLOCKS, len(blocks))).round().long().tolist()
    ranks: dict[str, list[float]] = {"attn": [], "mlp": []}
    for n in chosen:
        attn = blocks[n].attn
        parts = [attn.c_attn.weight[rows] for rows in model.config.qkv_rows.values()]
        ranks["attn"] += [effective_rank(part.to(device)) for part in (*parts, attn.c_proj.weight)]
        ranks["mlp"] += [effective_rank(p.to(device)) for p in blocks[n].mlp.parameters() if p.dim() == 2]
    wte = model.transformer["wte"].weight.to(device)
    return {
        **{f"rank/{kind}": sum(values) / len(values) for kind, values in ranks.items()},
        "embedding/cosine": mean_cosine(wte),
        "embedding/norm": float(wte.detach().double().norm(dim=1).mean()),
        "embedding/isotropy": isotropy(wte),
    }


def merged(model: GPT) -> GPT:
    """The same function without adapters."""
    return reshape_lora(model, replace(model.config, lora={}), torch.Generator())[0] if model.config.lora else model


def _identity(model: GPT) -> str:
    """Which weights there are: sketches of others are not compared."""
    return f"{zlib.crc32(repr([(name, tuple(p.shape)) for name, p in model.named_parameters()]).encode()):08x}"


def _of_drift(run: Run, sums: tuple[float, ...], identity: str, found: Analysis) -> None:
    p = run.progress
    if not p.sketch:
        found.absent["drift"] = "it is measured from one analysis to the next, and this is the first"
    elif p.sketch_of != identity:
        found.absent["drift"] = "the model has other weights than at the last analysis"
    else:
        before, now = torch.tensor(p.sketch, dtype=torch.float64), torch.tensor(sums, dtype=torch.float64)
        found.values["drift"] = float((now - before).norm() / before.norm()) if before.any() else math.nan


def _of_noise(run: Run, found: Analysis) -> None:
    squared, trace, weight = run.noise.values()
    if why := run.noise.why_not(run):
        found.absent["grad_noise_scale"] = why
    elif not weight:
        found.absent["grad_noise_scale"] = "no step has been made yet with what trains now"
    elif squared <= 0 or trace < 0:
        found.absent["grad_noise_scale"] = "the noise hides the gradient so far: its estimated square is not positive"
    else:
        found.values["grad_noise_scale"] = trace / squared
        found.values["grad_noise_ratio"] = trace / squared / run.settings.tokens_per_iter


def _of_step(run: Run, found: Analysis) -> None:
    near, run.near = run.near, None
    if near is None or near.iter != run.progress.iter or not near.healthy:
        found.absent["update_ratio"] = "no healthy step has been looked at right before this evaluation"
        return
    squares = near.found.double().numpy()
    if run.ranks.sharded:
        squares = run.ranks.sum(squares)
    gradients, moved, size = (column**0.5 for column in squares.T)
    found.by_layer["grad_norm_by_layer"] = dict(zip(near.layers, gradients.tolist(), strict=True))
    ratios = [float(a / b) if b else math.nan for a, b in zip(moved, size, strict=True)]
    found.by_layer["update_ratio_by_layer"] = dict(zip(near.layers, ratios, strict=True))
    whole = squares.sum(axis=0)
    found.values["update_ratio"] = float((whole[1] / whole[2]) ** 0.5) if whole[2] else math.nan


class _Attention(TorchFunctionMode):
    """Hands what attention is computed from to a function, and lets it be computed."""

    def __init__(self, see: Callable[..., None]) -> None:
        super().__init__()
        self.see = see

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.see(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _entropy(run: Run) -> float:
    """Of all layers, on the first windows of the validation data, as an evaluation computes. Collective with shards."""
    found: list[float] = []

    def see(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p=0.0, is_causal=False, **_: Any):
        found.append(attention_entropy(q, k, attn_mask, is_causal))

    data = next(data for data in run.batches.data.values() if run.has_words_of(data))
    size = run.settings.model.block_size
    starts = eval_windows(data.val, min(WINDOWS, run.eval_batch_size), size)
    x, y = (torch.from_numpy(a).to(run.device) for a in gather(data.val, starts, size, run.settings.model.vocab_size))
    eager: AbstractContextManager = torch.compiler.set_stance("force_eager") if run.config.compile else nullcontext()
    was_training = run.model.training
    run.model.eval()
    try:
        with eager, run.autocast(), _Attention(see):
            run.model(x, y)
    finally:
        run.model.train(was_training)
        if run.ranks.sharded:
            reshard(run.model)
    return sum(found) / len(found)
