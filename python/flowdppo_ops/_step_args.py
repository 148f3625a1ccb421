"""Argument checks of the functions that see a schedule, `step_loss` and `sde_step`. `_args` has the words and rules."""

from __future__ import annotations

from typing import Any, NamedTuple

from ._args import (
    LATENT_REDUCTIONS,
    REDUCTIONS,
    SAMPLERS,
    Family,
    Latents,
    LossCall,
    Schedule,
    Settings,
    Vectors,
    check_array,
    check_full_row_vector,
    check_latents,
    check_number,
    check_objective,
    check_process_group,
    check_row_vector,
    check_rows,
    check_same_device,
    require,
)
from .objectives import check_option


def _only(where: str, of: str, forms: dict[str, Any], *, needed: bool) -> tuple[str, Any]:
    """Name and value of the one that is given; `("", None)` for none, unless one is needed."""
    given = [name for name, value in forms.items() if value is not None]
    if len(given) > 1 or (needed and not given):
        came = " and ".join(given) or "none"
        raise ValueError(f"{where}: got {came} for the {of} policy, wanted exactly one of {', '.join(forms)}")
    return (given[0], forms[given[0]]) if given else ("", None)


def _form(name: str) -> str:
    return "output" if name.endswith("model_output") else "residual" if name.endswith("residual") else "mean"


def _check_guidance(where: str, uncond_output: Any, guidance_scale: Any) -> None:
    if uncond_output is not None:
        require(where, "guidance_scale", guidance_scale, "uncond_output is given")
    elif guidance_scale is not None:
        require(where, "uncond_output", uncond_output, "guidance_scale is given")


def _check_schedule(where: str, family: Family, given: dict[str, Any], *like: Any) -> list[Any]:
    """The row vectors, in order; only `guidance_scale` may be None."""
    for name, value in given.items():
        if value is None and name != "guidance_scale":
            require(where, name, value, "a number or a row vector")
    return [check_row_vector(where, family, name, value, *like) for name, value in given.items()]


def check_step_loss(
    where: str,
    family: Family,
    *,
    model_output: Any,
    sample: Any,
    prev_sample: Any,
    advantages: Any,
    sigma: Any,
    sigma_next: Any,
    noise_level: Any,
    sampler: str,
    sigma_max: Any,
    uncond_output: Any,
    guidance_scale: Any,
    old_prev_sample_mean: Any,
    old_model_output: Any,
    old_residual: Any,
    old_log_prob: Any,
    weights: Any,
    ref_prev_sample_mean: Any,
    ref_model_output: Any,
    ref_kl_weight: Any,
    ref_std: Any,
    objective: Any,
    latent_reduction: str,
    reduction: str,
    process_group: Any,
) -> LossCall:
    """The contract of `flowdppo_ops.step_loss`: checks its arguments, and brings them into the form of the operator."""
    check_process_group(where, "process_group", process_group)
    check_objective(where, objective)
    check_option(where, "sampler", sampler, SAMPLERS)
    check_option(where, "latent_reduction", latent_reduction, LATENT_REDUCTIONS)
    check_option(where, "reduction", reduction, REDUCTIONS)
    ref_kl_weight = check_number(where, "ref_kl_weight", ref_kl_weight)
    olds = {
        "old_prev_sample_mean": old_prev_sample_mean,
        "old_model_output": old_model_output,
        "old_residual": old_residual,
    }
    refs = {"ref_prev_sample_mean": ref_prev_sample_mean, "ref_model_output": ref_model_output}
    old_name, old = _only(where, "old", olds, needed=objective._needs_kl or old_log_prob is None)
    ref_name, ref = _only(where, "reference", refs, needed=ref_kl_weight != 0)
    if ref_kl_weight == 0:
        ref_name, ref = "", None
    _check_guidance(where, uncond_output, guidance_scale)
    row_shape = check_rows(where, family, advantages)

    given = {"model_output": model_output, "sample": sample, "prev_sample": prev_sample}
    optional = {"uncond_output": uncond_output, old_name: old, ref_name: ref}
    given |= {name: value for name, value in optional.items() if value is not None}
    check_latents(where, family, row_shape, given)
    check_same_device(where, family, "advantages", advantages, "model_output", model_output)
    contiguous = family.contiguous
    latents = Latents(
        contiguous(model_output),
        None if uncond_output is None else contiguous(uncond_output),
        contiguous(sample),
        contiguous(prev_sample),
        None if old is None else contiguous(old),
        None if ref is None else contiguous(ref),
    )
    like = ("advantages", advantages, row_shape, model_output.ndim)
    vectors = Vectors(
        contiguous(advantages),
        None,
        check_full_row_vector(where, family, "old_log_prob", old_log_prob, advantages),
        check_row_vector(where, family, "weights", weights, *like),
        None,
        None,
        check_row_vector(where, family, "ref_std", ref_std, *like),
    )
    rows = {
        "sigma": sigma,
        "sigma_next": sigma_next,
        "noise_level": noise_level,
        "sigma_max": sigma_max,
        "guidance_scale": guidance_scale,
    }
    schedule = Schedule(sampler, _form(old_name), _form(ref_name), *_check_schedule(where, family, rows, *like))
    density = "cps" if sampler == "cps" else "gaussian"
    settings = Settings(*objective._native, density, latent_reduction, reduction, ref_kl_weight)
    double = any(t is not None and t.dtype == family.float64 for t in (*latents, old_log_prob))
    return LossCall(row_shape, latents, vectors, schedule, settings, double)


class StepCall(NamedTuple):
    """A checked call of `sde_step`: contiguous latents, then row vectors as in `Schedule`.

    `prev_sample` when a latent is scored; `noise` when one is drawn with given noise; neither when the noise is still
    to be drawn.
    """

    row_shape: tuple[int, ...]
    model_output: Any
    uncond_output: Any
    sample: Any
    prev_sample: Any
    noise: Any
    sampler: str
    sigma: Any
    sigma_next: Any
    noise_level: Any
    sigma_max: Any
    guidance_scale: Any  # None without `uncond_output`
    log_prob_normalizer: bool
    residual_dtype: Any  # None without residual
    double: bool  # arithmetic in float64


def check_sde_step(
    where: str,
    family: Family,
    *,
    model_output: Any,
    sample: Any,
    sigma: Any,
    sigma_next: Any,
    noise_level: Any,
    sampler: str,
    sigma_max: Any,
    uncond_output: Any,
    guidance_scale: Any,
    prev_sample: Any,
    noise: Any,
    generator: Any,
    log_prob_normalizer: bool,
    residual_dtype: Any,
    row_dims: int,
) -> StepCall:
    """The contract of `flowdppo_ops.sde_step`: checks its arguments, and brings them into the form of the operator."""
    check_option(where, "sampler", sampler, SAMPLERS)
    if prev_sample is not None and (noise is not None or generator is not None):
        raise ValueError(f"{where}: got prev_sample and a source of noise, wanted one: replay draws nothing")
    if noise is not None and generator is not None:
        raise ValueError(f"{where}: got noise and generator, wanted at most one")
    _check_guidance(where, uncond_output, guidance_scale)
    check_array(where, family, "model_output", model_output)
    rank = model_output.ndim
    if isinstance(row_dims, bool) or not isinstance(row_dims, int) or not 0 <= row_dims <= rank:
        raise ValueError(f"{where}: row_dims is {row_dims!r}, wanted 0 to {rank}, the rank of the latents")
    shape = tuple(model_output.shape)
    row_shape = shape[:row_dims]
    if 0 in row_shape:
        raise ValueError(f"{where}: model_output has shape {shape}, wanted at least one row")
    latents = {
        "model_output": model_output,
        "uncond_output": uncond_output,
        "sample": sample,
        "prev_sample": prev_sample,
        "noise": noise,
    }
    given = {n: t for n, t in latents.items() if t is not None or n == "sample"}
    check_latents(where, family, row_shape, given)
    double = any(t.dtype == family.float64 for t in given.values())
    if residual_dtype is not None:
        allowed = {dtype: name for dtype, name in family.dtypes.items() if double or dtype != family.float64}
        if residual_dtype not in allowed:
            raise TypeError(f"{where}: residual_dtype is {residual_dtype}, wanted one of {', '.join(allowed.values())}")
    rows = {
        "sigma": sigma,
        "sigma_next": sigma_next,
        "noise_level": noise_level,
        "sigma_max": sigma_max,
        "guidance_scale": guidance_scale,
    }
    like = ("model_output", model_output, row_shape, rank)
    return StepCall(
        row_shape,
        *(None if t is None else family.contiguous(t) for t in latents.values()),
        sampler,
        *_check_schedule(where, family, rows, *like),
        bool(log_prob_normalizer),
        residual_dtype,
        double,
    )
