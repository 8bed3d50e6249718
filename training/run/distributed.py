"""The ranks of a run: the only file that talks to torch.distributed.

`Ranks` is the same object on one process and on many; alone, every exchange returns what was put in. Decisions travel
over a gloo group of their own on CPU tensors, so that agreeing on something never waits for a GPU.
"""

from __future__ import annotations

import datetime
import os
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from orchestrate.model.gpt import GPT
from orchestrate.model.lineage import State
from orchestrate.training.run import sharding

# Long enough for a slow evaluation or a big save on rank 0, short enough to end a job that is stuck.
TIMEOUT = datetime.timedelta(minutes=30)
T = TypeVar("T")


class Meeting:
    """Where the processes of a start meet before they are a group: torchrun's store, or nothing for one alone."""

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", 0))
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        self.store: dist.Store | None = None
        if "RANK" in os.environ and self.world_size > 1:
            store, _, _ = next(dist.rendezvous("env://", timeout=TIMEOUT))
            # torchrun keeps its store over a restart, with the addresses of the processes that died in it.
            self.store = dist.PrefixStore(f"start_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)

    def from_first(self, question: str, answer: Callable[[], str]) -> str:
        """Rank 0's answer on every rank. Rank 0 returns when all have it: they may end now, and the store with it."""
        if self.store is None:
            return answer()
        if self.rank == 0:
            self.store.set(question, answer())
        text = self.store.get(question).decode()
        heard = [f"{question}_heard_{rank}" for rank in range(self.world_size)]
        self.store.set(heard[self.rank], "")
        if self.rank == 0:
            self.store.wait(heard)
            for key in (question, *heard):
                self.store.delete_key(key)
        return text


class SaveGroup:
    """The ranks when they save shards together, maybe in the background."""

    def __init__(self, process_group: dist.ProcessGroup) -> None:
        self.process_group = process_group
        self.is_first = dist.get_rank() == 0

    def on_first(self, work: Callable[[], T]) -> T:
        """Rank 0's result on every rank. Where it raised OSError, every rank does."""
        box: list[Any] = [None, None]
        if self.is_first:
            try:
                box[0] = work()
            except OSError as error:
                box[1] = str(error)
        dist.broadcast_object_list(box, src=0, group=self.process_group)
        if box[1] is not None:
            raise OSError(box[1])
        return box[0]


class Ranks:
    """This process among the processes of a run, as torchrun's environment describes it.

    Args:
        parallel: "ddp", a copy of the model on every rank, or "fsdp", one copy sharded over them.
        dtype: of the computation; see `sharding.shard`.
        meeting: where the processes have met already.

    Attributes: rank, local_rank, world_size, backend; sharded, whether parameters are spread over the ranks.
    """

    def __init__(
        self,
        device_type: str,
        backend: str = "auto",
        parallel: str = "ddp",
        dtype: torch.dtype = torch.float32,
        meeting: Meeting | None = None,
    ) -> None:
        meeting = meeting or Meeting()
        self.rank, self.world_size = meeting.rank, meeting.world_size
        self.dtype = dtype
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        self.backend = backend if backend != "auto" else ("nccl" if device_type == "cuda" else "gloo")
        self._control: dist.ProcessGroup | None = None
        self._pending: tuple[dist.Work, torch.Tensor] | None = None
        if self.distributed:
            # Ranks on one device type only; a wrong pair (nccl on a CPU) fails here, at second 0.
            dist.init_process_group(
                self.backend, timeout=TIMEOUT, store=meeting.store, rank=self.rank, world_size=self.world_size
            )
            self._control = dist.group.WORLD
            if self.backend != "gloo":
                self._control = dist.new_group(backend="gloo", timeout=TIMEOUT)
        self.sharded = parallel == "fsdp" and self.distributed
        if self.sharded:
            from torch.distributed.device_mesh import init_device_mesh

            self.mesh = init_device_mesh(device_type, (self.world_size,))
            # A save in the background talks while the ranks decide: it needs a line of its own.
            self.saving = SaveGroup(dist.new_group(backend="gloo", timeout=TIMEOUT))

    @property
    def distributed(self) -> bool:
        return "RANK" in os.environ and self.world_size > 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def place(self, model: GPT, device: torch.device) -> GPT:
        """The model on this rank's device, sharded where the ranks are."""
        return sharding.shard(model, self.mesh, self.dtype) if self.sharded else model.to(device)

    def place_state(self, state: State, model: GPT, device: torch.device) -> State:
        """The moments where the placed model's parameters are."""
        if self.sharded:
            return sharding.shard_state(state, model)
        return {name: {key: value.to(device) for key, value in parts.items()} for name, parts in state.items()}

    def whole(self, model: GPT, state: State) -> tuple[GPT, State]:
        """Model and moments that no other rank is needed for; their own where nothing is sharded. Collective."""
        return sharding.unshard(model, state) if self.sharded else (model, state)

    def wrap(self, model: GPT, device: torch.device) -> torch.nn.Module:
        """The module to call in training. It must be wrapped anew after any change of parameters or trainability."""
        if not self.distributed or self.sharded:
            return model
        with warnings.catch_warnings():
            # torch 2.13 renames broadcast_buffers; 2.11 knows the old name only.
            warnings.simplefilter("ignore", FutureWarning)
            return DistributedDataParallel(
                model,
                device_ids=[device.index] if device.type == "cuda" else None,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
            )

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if not self.distributed:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._control)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of the ranks, on every rank."""
        if not self.distributed:
            return [value]
        box: list[Any] = [None] * self.world_size
        dist.all_gather_object(box, value, group=self._control)
        return box

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Element-wise float64 sum over the ranks."""
        if not self.distributed:
            return values
        tensor = torch.from_numpy(np.array(values, dtype=np.float64))
        dist.all_reduce(tensor, group=self._control)
        return tensor.numpy()

    def add_up(self, tensor: torch.Tensor) -> None:
        """Make a tensor on the ranks' device the sum over them, in place. With NCCL no host waits for it."""
        if self.distributed:
            dist.all_reduce(tensor)

    def mean(self, value: float) -> float:
        """The mean over the ranks, the same on every rank."""
        return float(self.sum(np.array([value]))[0]) / self.world_size

    def turns(self, pieces: int) -> Iterator[tuple[int | None, bool]]:
        """Which of so many pieces of work is this rank's in each turn, and whether it counts; equally often everywhere.

        None where there is none left for it. With sharded weights no rank can compute alone: there one without a piece
        repeats the last, and that does not count.
        """
        for first in range(0, pieces, self.world_size):
            mine = first + self.rank
            counts = mine < pieces
            yield (min(mine, pieces - 1) if counts or self.sharded else None), counts

    def exchange_later(self, flag: int) -> int:
        """The largest flag that the ranks gave at the PREVIOUS call; this call's is sent in the background.

        A step's work hides the exchange: nobody waits for it, at the price of one call of delay. Every rank must
        call this equally often.
        """
        if not self.distributed:
            return flag
        agreed = self.finish_exchange()
        tensor = torch.tensor([flag], dtype=torch.int32)
        work = dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self._control, async_op=True)
        self._pending = (work, tensor)
        return agreed

    def finish_exchange(self) -> int:
        """The largest flag of the exchange under way (0 if there is none), waiting for it."""
        if self._pending is None:
            return 0
        work, tensor = self._pending
        self._pending = None
        work.wait()
        return int(tensor.item())

    def close(self) -> None:
        """Leave the group. Not called after an exception: the other ranks may be waiting for this one."""
        if self.distributed and dist.is_initialized():
            self.finish_exchange()
            # gloo's threads need the GIL to let go of the last exchange's tensors. The group's end joins these threads
            # and may hold the GIL meanwhile: give them time, or both wait for ever (seen on torch 2.13).
            time.sleep(0.1)
            dist.destroy_process_group()
