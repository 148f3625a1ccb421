"""What only UniRL can show: beside its own functions and through its trainer."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from unirl_modules import INTEGRATION, trainer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(4, 3, 2, 5, 5), (1, 1, 4, 3, 3), (4, 1, 2, 3, 4, 4)], ids=["image", "one", "video"])
def test_helpers_agree_with_unirls(real, shape, dtype):
    """Drawn around the threshold and the clip range; the mask is exactly UniRL's for means that it does not round."""
    flowdppo, base = trainer("algorithms.flowdppo"), trainer("algorithms.base")
    own = flowdppo._flowdppo_kl_adv_loss, base._grpo_clip_loss
    real.enable(strict=True)
    fused = flowdppo._flowdppo_kl_adv_loss, base._grpo_clip_loss
    wide = dtype if dtype == torch.float64 else torch.float32
    for seed in range(20):
        torch.manual_seed(seed)
        old_means = torch.randn(shape, dtype=wide)
        rows = {name: torch.randn(shape[:2], dtype=wide) / 100 for name in ("new_logp", "old_logp", "advantages")}
        means = {
            "new_means": (old_means + 0.05 * torch.randn(shape, dtype=wide)).to(dtype),
            "old_means": old_means.to(dtype),
        }
        sigma_t = torch.linspace(0.5, 1.5, shape[1]).reshape(1, -1, 1, 1, 1)
        calls = (rows | means | {"sigma_t": sigma_t, "kl_mask_threshold": 1.5e-3}, rows | {"clip_range": 0.01})
        for call, theirs, ours in zip(calls, own, fused, strict=True):
            results = []
            for helper in (theirs, ours):
                leaf = rows["new_logp"].clone().requires_grad_()
                per_element, metrics = helper(**call | {"new_logp": leaf})
                gradient = torch.autograd.grad(per_element.sum(), leaf)[0]
                results.append((per_element, gradient, {name: value.item() for name, value in metrics.items()}))
            (loss, gradient, metrics), (mine, my_gradient, my_metrics) = results
            near = 1e-12 if dtype == torch.float64 else 1e-6
            # Half-precision means: a KL is as far from UniRL's as a square in half precision.
            near_kl = near if dtype == wide else 2 * torch.finfo(dtype).eps
            assert torch.allclose(mine, loss, rtol=near, atol=0)
            assert torch.allclose(my_gradient, gradient, rtol=near, atol=0)
            assert list(my_metrics) == list(metrics)
            for name, value in metrics.items():
                rounding = near_kl if name.startswith("kl_new_old") else 1e-4 if name == "ratio_std" else 10 * near
                share = 1e-7 if "frac" in name else 1e-9  # UniRL's shares are float32 always
                assert my_metrics[name] == pytest.approx(value, rel=rounding, abs=share), name
    assert real.fallbacks() == {}


@pytest.mark.parametrize("shape", [(4, 3, 11, 6), (2, 3, 4, 2, 5, 5)], ids=["token", "video"])
def test_trajectories_that_unirl_cannot_take(real, shape):
    flowdppo = trainer("algorithms.flowdppo")
    rows = {name: torch.zeros(shape[:2]) for name in ("new_logp", "old_logp", "advantages")}
    call = rows | {"new_means": torch.ones(shape), "old_means": torch.zeros(shape), "kl_mask_threshold": 1e-5}
    call["sigma_t"] = torch.ones(1, shape[1], 1, 1, 1)
    with pytest.raises(RuntimeError, match="size of tensor"):
        flowdppo._flowdppo_kl_adv_loss(**call)
    real.enable(strict=True)
    assert flowdppo._flowdppo_kl_adv_loss(**call)[1]["kl_new_old_mean"].item() == 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("eta", [0.7, 1e-7, 1e-8, 0.0])
@pytest.mark.parametrize("name", ["FlowSDEStrategy", "CPSSDEStrategy", "DanceSDEStrategy"])
def test_strategies_draw_what_unirls_draw(real, name, eta, dtype):
    fused, own = getattr(real, name)(), getattr(trainer("sde.kernels"), name)()
    noise_pred, sample = torch.randn(2, 3, 4, 5, 5).to(dtype)
    for sigma, sigma_next in ((1.0, 0.9), (0.5, 0.4), (0.1, 0.0)):
        drawn = []
        for strategy in (own, fused):
            torch.manual_seed(11)
            schedule = {"eta": eta, "sigma_max": torch.tensor(0.9)}
            step = strategy.denoise(noise_pred, sample, torch.tensor(sigma), torch.tensor(sigma_next), **schedule)
            drawn.append((step, torch.randn(2)))
        ((prev_sample, log_prob, mean), after), ((my_sample, my_log_prob, my_mean), my_after) = drawn
        assert torch.equal(my_after, after)
        ulp = torch.finfo(dtype if eta >= 1e-7 else torch.float32).eps
        assert torch.allclose(my_mean, mean, rtol=0, atol=1e-5)
        assert torch.allclose(my_sample, prev_sample, rtol=ulp, atol=1e-5)
        assert [t.dtype for t in (my_sample, my_mean)] == [t.dtype for t in (prev_sample, mean)]
        assert (my_log_prob is None) == (log_prob is None) == (eta < 1e-7)
        if eta == 0.7:
            assert torch.allclose(my_log_prob, log_prob, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    assert real.fallbacks() == {}


class Transformer(torch.nn.Module):
    """In the place of SD3's: a velocity with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.3))

    def forward(self, hidden_states, encoder_hidden_states, timestep, pooled_projections, return_dict):
        velocity = self.weight * hidden_states * (timestep / 1000).reshape(-1, 1, 1, 1).to(hidden_states.dtype)
        return (velocity + encoder_hidden_states.mean((1, 2)).reshape(-1, 1, 1, 1).to(hidden_states.dtype),)


class Backend:
    """In the place of FSDPBackend: one process."""

    grad_sync_deferred = False
    scheduler = None

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module
        self.optimizer = torch.optim.Adam(module.parameters(), lr=0.02)

    def trainable_module(self):
        return self.module

    def zero_grad(self):
        self.optimizer.zero_grad()

    def set_grad_sync(self, last):
        pass

    def optimizer_step(self, max_grad_norm):
        norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), max_grad_norm)
        self.optimizer.step()
        return norm

    def on_rollout_end(self):
        pass


def train(real: Any, fused: bool, kind: str, strategy: str, precision: str, source: str):
    """A rollout and two optimizer steps of two micro-batches each, through UniRL's stage, segment and TrainStack."""
    for name in ("models.sd3.diffusion", "types.rollout_resp", "types.conditions.text", "types.sampling"):
        importlib.import_module(f"unirl.{name}")
    diffusion, stack = trainer("models.sd3.diffusion"), trainer("train.stack")
    text, rollout = trainer("types.conditions.text"), trainer("types.rollout_resp")
    torch.manual_seed(13)
    transformer = Transformer()
    strategies = real if fused else trainer("sde.kernels")
    stage = diffusion.SD3DiffusionStage(
        model=SimpleNamespace(transformer=transformer, device="cpu"),
        step=diffusion.SD3DiffusionStep(),
        strategy=getattr(strategies, strategy)(),
        trajectory_precision=precision,
        latent_channels=4,
    )
    params = trainer("types.sampling").DiffusionSamplingParams(
        num_inference_steps=10, guidance_scale=1.0, height=64, width=64, eta=0.7, sde_indices=[0, 1, 4], seed=17
    )
    condition = text.TextEmbedCondition(embeds=torch.randn(8, 3, 4), pooled=torch.randn(8, 4))
    linear = torch.linspace(1, 0, 11)
    schedule = 3 * linear / (1 + 2 * linear)
    segment = stage.diffuse(SimpleNamespace(text=condition, negative_text=None), schedule=schedule, params=params)
    algorithms = real if fused else trainer(f"algorithms.{kind.lower()}")
    conditions_cls = importlib.import_module("unirl.models.sd3.conditions").SD3Conditions
    own = {"kl_mask_threshold": 1e-6} if kind == "FlowDPPO" else {}
    algorithm = getattr(algorithms, kind)(
        **own,
        params=params,
        pipeline=SimpleNamespace(diffusion=stage),
        old_logp_source=source,
        conditions_cls=conditions_cls,
    )
    track = rollout.RolloutTrack(
        sample_ids=[str(i) for i in range(8)],
        conditions={"text": condition},
        segment=segment,
        advantages=torch.linspace(-1, 1.2, 8),
    )
    trainer_stack = stack.TrainStack(
        fsdp_backend=Backend(transformer),
        algorithm=algorithm,
        micro_batch_size=2,
        max_grad_norm=1.0,
        num_updates_per_batch=2,
    )
    return trainer_stack.train_track(track, training_progress=0.2), transformer.weight.item(), track.segment


@pytest.mark.parametrize("source", ["rollout", "replay"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("strategy", ["FlowSDEStrategy", "CPSSDEStrategy", "DanceSDEStrategy"])
@pytest.mark.parametrize("kind", ["FlowDPPO", "FlowGRPO"])
def test_training_is_unirls(real, kind, strategy, precision, source):
    """Rollout, anchors, losses, metrics and the weight after two optimizer steps, UniRL's and ours side by side."""
    theirs, weight, segment = train(real, False, kind, strategy, precision, source)
    ours, my_weight, my_segment = train(real, True, kind, strategy, precision, source)
    stored = torch.finfo({"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]).eps
    assert my_segment.latents.dtype == segment.latents.dtype
    assert torch.allclose(my_segment.latents.float(), segment.latents.float(), rtol=stored, atol=max(4 * stored, 1e-5))
    assert my_segment.sde_logp.dtype == segment.sde_logp.dtype
    assert torch.allclose(my_segment.sde_logp, segment.sde_logp, rtol=stored, atol=max(4 * stored, 1e-5))
    assert (my_segment.sde_means is None) == (segment.sde_means is None) == (kind == "FlowGRPO")
    assert ours.metrics.keys() == theirs.metrics.keys()
    assert my_weight == pytest.approx(weight, rel=4 * stored)
    assert my_weight != pytest.approx(0.3, rel=1e-3)
    # A latent that is stored as its neighbour is another rollout: half precision is compared by its order alone.
    near = 1e-3 if precision == "fp32" else 0.2
    for name in ("loss", "grad_norm"):
        assert getattr(ours, name) == pytest.approx(getattr(theirs, name), rel=near, abs=1e-4), name
    if precision == "fp32":
        for name, value in theirs.metrics.items():
            assert ours.metrics[name] == pytest.approx(value, rel=near, abs=1e-12), name
        assert kind == "FlowGRPO" or 0 < theirs.metrics["masked_fraction"] < 0.5
    assert real.fallbacks() == {}


def test_hydra_finds_the_classes(real):
    utils = pytest.importorskip("hydra.utils")
    assert utils.get_class(f"{INTEGRATION}.FlowDPPO") is real.FlowDPPO
    built = utils.instantiate({"_target_": f"{INTEGRATION}.CPSSDEStrategy"})
    assert (type(built), built.canonical_name) == (real.CPSSDEStrategy, "cps")
