"""The native module. Private: addresses are trusted, see `src/python`."""

Array = tuple[int, str]
# address, dtype, and row r has element r // divide % modulo
Vector = float | tuple[int, str, int, int]
# _args.Latents, Vectors and Schedule
Latents = tuple[Array | None, Array | None, Array | None, Array | None, Array | None, Array | None]
Vectors = tuple[Vector, Vector | None, Vector | None, Vector | None, Vector | None, Vector | None, Vector | None]
Schedule = tuple[str, str, str, Vector, Vector, Vector, Vector, Vector | None]

# of sde_step: model_output, uncond_output, sample, prev_sample, noise
StepLatents = tuple[Array, Array | None, Array, Array | None, Array | None]
StepSchedule = tuple[str, Vector, Vector, Vector, Vector, Vector | None]
# prev_sample, prev_sample_mean, residual, log_prob, std, numbers; an address where the dtype is that of the arithmetic
StepOutputs = tuple[Array | None, int, Array | None, int, int, int]
# grad_log_prob, grad_mean, prev_sample, prev_sample_mean, numbers
StepSaved = tuple[int | None, int | None, Array, int, int]

Objective = tuple[str, float, float, float, str, str, bool, bool]
Options = tuple[str, str, str, float]
Target = tuple[int, int]
Memory = tuple[int, int]  # address, elements

__version__: str
METRICS: list[str]
FIELDS: int
STEP_FIELDS: int
BATCH_LEN: int
SDE_STEP_NUMBERS: int

def policy_loss_gradient_ahead(rows: int, row_bytes: int) -> bool: ...
def policy_loss_forward(
    arrays: Latents,
    vectors: Vectors,
    schedule: Schedule | None,
    rows: int,
    numel: int,
    double: bool,
    objective: Objective,
    options: Options,
    out: tuple[int, int],
    gradients_ahead: tuple[Array | None, Array | None] | None,
    shard_sums: int | None,
    threads: int,
) -> None: ...
def policy_loss_shard_sums(
    arrays: Latents,
    vectors: Vectors,
    schedule: Schedule | None,
    rows: int,
    numel: int,
    double: bool,
    objective: Objective,
    options: Options,
    out: int,
    threads: int,
) -> None: ...
def policy_loss_backward(
    arrays: Latents,
    forms: tuple[str, str] | None,
    grad_loss: Vector,
    numbers: int,
    rows: int,
    numel: int,
    double: bool,
    gradients: tuple[Array | None, Array | None],
    grad_log_prob: Array | None,
    threads: int,
) -> None: ...
def policy_loss_workspace_cuda(target: Target, rows: int, numel: int, needs_batch_means: bool) -> tuple[int, bool]: ...
def policy_loss_forward_cuda(
    target: Target,
    arrays: Latents,
    vectors: Vectors,
    schedule: Schedule | None,
    rows: int,
    numel: int,
    objective: Objective,
    options: Options,
    out: tuple[int, int],
    shard_sums: int | None,
    partials: Memory,
    tickets: Memory,
) -> None: ...
def policy_loss_shard_sums_cuda(
    target: Target,
    arrays: Latents,
    vectors: Vectors,
    schedule: Schedule | None,
    rows: int,
    numel: int,
    objective: Objective,
    options: Options,
    out: int,
    partials: Memory,
    tickets: Memory,
) -> None: ...
def policy_loss_backward_cuda(
    target: Target,
    arrays: Latents,
    forms: tuple[str, str] | None,
    grad_loss: Vector,
    numbers: int,
    rows: int,
    numel: int,
    gradients: tuple[Array | None, Array | None],
    grad_log_prob: Array | None,
) -> None: ...
def sde_step_forward(
    arrays: StepLatents,
    schedule: StepSchedule,
    rows: int,
    numel: int,
    double: bool,
    normalizer: bool,
    out: StepOutputs,
    threads: int,
) -> None: ...
def sde_step_backward(
    saved: StepSaved,
    rows: int,
    numel: int,
    double: bool,
    grad_output: Array | None,
    grad_uncond: Array | None,
    threads: int,
) -> None: ...
def sde_step_workspace_cuda(target: Target, rows: int, numel: int) -> tuple[int, bool]: ...
def sde_step_forward_cuda(
    target: Target,
    arrays: StepLatents,
    schedule: StepSchedule,
    rows: int,
    numel: int,
    normalizer: bool,
    out: StepOutputs,
    partials: Memory,
    tickets: Memory,
) -> None: ...
def sde_step_backward_cuda(
    target: Target,
    saved: StepSaved,
    rows: int,
    numel: int,
    grad_output: Array | None,
    grad_uncond: Array | None,
) -> None: ...
def instruction_set() -> str: ...
def cuda_driver() -> tuple[int, list[tuple[str, int]]] | None: ...
def cuda_images() -> list[tuple[str, int, bool, bytes]]: ...
def cuda_images_for(capability: int) -> list[tuple[str, int, bool]]: ...
def cuda_entry_points() -> list[tuple[str, int]]: ...
