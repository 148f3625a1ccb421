"""The native module. Private; see `src/boundary`. Arguments go by the names of `src/call.rs`."""

from collections.abc import Callable
from typing import Any

from numpy import ndarray
from torch import Tensor, dtype

__version__: str
METRICS: list[str]
FIELDS: int
STEP_FIELDS: int
BATCH_LEN: int
SDE_STEP_NUMBERS: int
LATENTS: list[str]
ROW_VECTORS: list[str]
SCHEDULE: list[str]
SDE_STEP_LATENTS: list[str]
SAMPLERS: list[str]
DENSITIES: list[str]
LATENT_REDUCTIONS: list[str]
REDUCTIONS: list[str]

# Tensors that a call is differentiated in, or their gradients.
Two = tuple[Tensor | None, Tensor | None]
Three = tuple[Tensor | None, Tensor | None, Tensor | None]

class Objective:
    def __new__(cls, settings: dict[str, Any]) -> Objective: ...

class Layout:
    row_shape: tuple[int, ...]
    has_kl: bool
    has_ref: bool
    saved: tuple[str, ...]
    dtype: dtype

class PolicyLossCall:
    def __new__(cls, fields: dict[str, Any], settings: dict[str, Any]) -> PolicyLossCall: ...
    def forward(self, row_sums: Tensor | None = None) -> list[Tensor]: ...
    def shard_sums(self, eager: bool = True) -> Tensor: ...

# `tie`: leaves, then (loss, saved, state), to the loss; `result`: loss, numbers, layout to what users are given.
class PolicyLossMemo:
    def __new__(cls, names: list[str], tie: Callable[..., Tensor], result: type) -> PolicyLossMemo: ...
    def forward(self, arguments: tuple) -> Any | None: ...
    def learn(self, arguments: tuple, fields: dict[str, Any], settings: dict[str, Any]) -> Any: ...
    def run(self, call: PolicyLossCall, row_sums: Tensor | None = None) -> Any: ...

# `prev_sample`, `log_prob`, `prev_sample_mean`, `std`, `residual`, `numbers`; the leaves.
Outputs = tuple[Tensor | None, Tensor, Tensor, Tensor, Tensor | None, Tensor]
Draw = Callable[[Tensor, dtype], Tensor]

class SdeStepCall:
    def __new__(cls, fields: dict[str, Any], settings: dict[str, Any]) -> SdeStepCall: ...
    def forward(self) -> Outputs: ...

class SdeStepMemo:
    def __new__(cls, names: list[str]) -> SdeStepMemo: ...
    def forward(self, arguments: tuple, draw: Draw) -> tuple[Outputs, Two | None] | None: ...
    def learn(
        self, arguments: tuple, fields: dict[str, Any], settings: dict[str, Any], draw: Draw
    ) -> tuple[Outputs, Two | None]: ...

def policy_loss_backward(
    grad_loss: Tensor,
    numbers: Tensor,
    latents: dict[str, Tensor],
    wants: tuple[bool, bool, bool],
    formed: Two | None = None,
) -> Three: ...
def policy_loss_numpy(
    fields: dict[str, Any], settings: dict[str, Any], threads: int
) -> tuple[ndarray, ndarray | None, ndarray | None]: ...
def sde_step_backward(
    grads: Two,
    prev_sample: Tensor,
    prev_sample_mean: Tensor,
    numbers: Tensor,
    dtypes: tuple[dtype | None, dtype | None],
) -> Two: ...
def instruction_set() -> str: ...
def cuda_driver() -> tuple[int, list[tuple[str, int]]] | None: ...
def cuda_images() -> list[tuple[str, int, bool, bytes]]: ...
def cuda_images_for(capability: int) -> list[tuple[str, int, bool]]: ...
def cuda_entry_points() -> list[tuple[str, int]]: ...
