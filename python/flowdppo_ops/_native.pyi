"""The native module. Private: addresses are trusted, see `src/python.rs`."""

Array = tuple[int, str]
Vector = float | tuple[int, str, int]
Latents = tuple[Array | None, Array | None, Array | None, Array | None]
Vectors = tuple[Vector, Vector | None, Vector | None, Vector | None, Vector | None, Vector | None, Vector | None]

__version__: str
METRICS: list[str]
FIELDS: int
BATCH_LEN: int

def policy_loss_forward(
    arrays: Latents,
    vectors: Vectors,
    rows: int,
    numel: int,
    double: bool,
    objective_tuple: tuple[str, float, float, float, str, bool, bool, bool],
    density: str,
    latent_reduction: str,
    reduction: str,
    ref_kl_weight: float,
    outputs: tuple[int, int],
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
