"""The native module. Private; see `src/boundary`. Arguments go by the names of `src/call.rs`."""

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

Gradients = tuple[Tensor | None, Tensor | None]

class Objective:
    def __new__(cls, settings: dict[str, Any]) -> Objective: ...

class Layout:
    row_shape: tuple[int, ...]
    has_kl: bool
    has_ref: bool
    saved: tuple[str, ...]

class PolicyLossCall:
    layout: Layout
    numbers: Tensor
    def __new__(cls, fields: dict[str, Any], settings: dict[str, Any]) -> PolicyLossCall: ...
    def leaves(self) -> tuple[Tensor | None, Tensor | None, Tensor | None] | None: ...
    def forward(
        self, with_gradients: bool = False, row_sums: Tensor | None = None, may_keep: bool = True
    ) -> tuple[Tensor, Gradients]: ...
    def shard_sums(self, may_keep: bool = True) -> Tensor: ...
    def saved(self) -> tuple[tuple[Tensor | None, ...], dict[str, Tensor] | None]: ...

class PolicyLossMemo:
    def __new__(cls, names: list[str]) -> PolicyLossMemo: ...
    def find(self, arguments: tuple) -> PolicyLossCall | None: ...
    def learn(self, arguments: tuple, fields: dict[str, Any], settings: dict[str, Any]) -> PolicyLossCall: ...

class SdeStepCall:
    needs_noise: bool
    is_double: bool
    stored: Tensor | None
    def __new__(cls, fields: dict[str, Any], settings: dict[str, Any]) -> SdeStepCall: ...
    def give_noise(self, noise: Tensor) -> None: ...
    def leaves(self) -> Gradients | None: ...
    def forward(self, may_keep: bool = True) -> tuple[Tensor | None, Tensor, Tensor, Tensor, Tensor | None, Tensor]: ...

class SdeStepMemo:
    def __new__(cls, names: list[str]) -> SdeStepMemo: ...
    def find(self, arguments: tuple) -> SdeStepCall | None: ...
    def learn(self, arguments: tuple, fields: dict[str, Any], settings: dict[str, Any]) -> SdeStepCall: ...

def policy_loss_backward(
    grad_loss: Tensor,
    numbers: Tensor,
    latents: dict[str, Tensor],
    wants: tuple[bool, bool, bool],
    formed: Gradients | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]: ...
def policy_loss_numpy(
    fields: dict[str, Any], settings: dict[str, Any], threads: int
) -> tuple[ndarray, ndarray | None, ndarray | None]: ...
def sde_step_backward(
    grads: Gradients,
    prev_sample: Tensor,
    prev_sample_mean: Tensor,
    numbers: Tensor,
    dtypes: tuple[dtype | None, dtype | None],
) -> Gradients: ...
def instruction_set() -> str: ...
def cuda_driver() -> tuple[int, list[tuple[str, int]]] | None: ...
def cuda_images() -> list[tuple[str, int, bool, bytes]]: ...
def cuda_images_for(capability: int) -> list[tuple[str, int, bool]]: ...
def cuda_entry_points() -> list[tuple[str, int]]: ...
