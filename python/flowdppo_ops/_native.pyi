"""The native module. Private: addresses are trusted, see `src/python`."""

Array = tuple[int, str]
# address, dtype, and row r has element r // divide % modulo
Vector = float | tuple[int, str, int, int]
Latents = tuple[Array | None, Array | None, Array | None, Array | None]
Vectors = tuple[Vector, Vector | None, Vector | None, Vector | None, Vector | None, Vector | None, Vector | None]

Objective = tuple[str, float, float, float, str, bool, bool, bool]
Options = tuple[str, str, str, float]
Target = tuple[int, int]

__version__: str
METRICS: list[str]
FIELDS: int
BATCH_LEN: int

def policy_loss_gradient_ahead(rows: int, row_bytes: int) -> bool: ...
def policy_loss_forward(
    arrays: Latents,
    vectors: Vectors,
    rows: int,
    numel: int,
    double: bool,
    objective: Objective,
    options: Options,
    out: tuple[int, int],
    gradient_ahead: Array | None,
    threads: int,
) -> None: ...
def policy_loss_backward(
    arrays: Latents,
    grad_loss: Vector,
    numbers: int,
    rows: int,
    numel: int,
    double: bool,
    grad_mean: Array | None,
    grad_log_prob: Array | None,
    threads: int,
) -> None: ...
def policy_loss_workspace_cuda(target: Target, rows: int, numel: int, needs_batch_means: bool) -> tuple[int, bool]: ...
def policy_loss_forward_cuda(
    target: Target,
    arrays: Latents,
    vectors: Vectors,
    rows: int,
    numel: int,
    objective: Objective,
    options: Options,
    out: tuple[int, int],
    partials: tuple[int, int],
    tickets: tuple[int, int],
) -> None: ...
def policy_loss_backward_cuda(
    target: Target,
    arrays: Latents,
    grad_loss: Vector,
    numbers: int,
    rows: int,
    numel: int,
    grad_mean: Array | None,
    grad_log_prob: Array | None,
) -> None: ...
def cuda_images() -> list[tuple[str, int, bool, bytes]]: ...
def cuda_entry_points() -> list[tuple[str, int]]: ...
