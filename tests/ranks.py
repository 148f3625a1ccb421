"""Processes of `torch.distributed` that stay: starting one costs seconds, asking one a millisecond."""

from __future__ import annotations

import itertools
import multiprocessing
import pickle
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

# A rank that failed leaves the others inside a collective: they give up first, and say where they were.
COLLECTIVE_TIMEOUT_S = 30
ANSWER_TIMEOUT_S = 90


class Ranks:
    """`size` processes of one world. Called with a function, which they find by its name, and its arguments, they all
    run it; the answer is what each returned, in the order of the ranks. After a failure the next call starts them anew.
    """

    def __init__(self, size: int, folder: Path, backend: str = "gloo") -> None:
        self.size, self._folder, self._backend = size, folder, backend
        self._processes: list[Any] = []
        self._pipes: list[Any] = []
        self._worlds = itertools.count()

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        if not self._processes:
            self._start()
        # Pickled here: a connection's own way with tensors is shared memory, which a rank that ends takes with it.
        for pipe in self._pipes:
            pipe.send_bytes(pickle.dumps((function, arguments)))
        deadline, answers, failures = time.monotonic() + ANSWER_TIMEOUT_S, [], []
        for rank, pipe in enumerate(self._pipes):
            try:
                came = pipe.poll(max(0.0, deadline - time.monotonic()))
                answer, failure = pickle.loads(pipe.recv_bytes()) if came else (None, "no answer\n")
            except EOFError:
                answer, failure = None, "ended\n"
            answers.append(answer)
            if failure is not None:
                failures.append(f"rank {rank} of {self.size}: {failure}")
        if failures:
            self.close()
            raise AssertionError("".join(failures))
        return answers

    def _start(self) -> None:
        # Not forked: the thread pools of this process would not come along.
        context = multiprocessing.get_context("spawn")
        store = str(self._folder / f"store-{self.size}-{next(self._worlds)}")
        for rank in range(self.size):
            pipe, other_end = context.Pipe()
            process = context.Process(
                target=_serve, args=(other_end, self._backend, store, rank, self.size), daemon=True
            )
            process.start()
            other_end.close()
            self._processes.append(process)
            self._pipes.append(pipe)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []


def _serve(pipe: Any, backend: str, store: str, rank: int, size: int) -> None:
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    torch.distributed.init_process_group(
        backend,
        store=torch.distributed.FileStore(store, size),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S),
    )
    while True:
        try:
            request = pipe.recv_bytes()
        except EOFError:  # the tests are over
            return
        try:
            function, arguments = pickle.loads(request)
            answer = function(*arguments), None
        except Exception:
            answer = None, traceback.format_exc()
        pipe.send_bytes(pickle.dumps(answer))
