"""The demo, end to end through its command line, at a size of seconds."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib", reason="the demo needs matplotlib")
pytest.importorskip("sklearn", reason="the demo needs scikit-learn")

import matplotlib.image

import flowdppo_ops
from flowdppo_ops import reference
from flowdppo_ops.__main__ import main
from flowdppo_ops.demo import compare, score
from flowdppo_ops.demo.data import TRAINED, digits
from flowdppo_ops.demo.model import Velocity
from flowdppo_ops.demo.rollout import path_kl, replayed_means, rollout, uniform_schedule

CONTROLS = ("symmetric mask", "no trust region")  # of the first seed alone
NAMES = ("Flow-DPPO", "Flow-GRPO", "GRPO-Guard", *CONTROLS)
TINY = ("--iterations", "3", "--epochs", "2", "--pretrain-steps", "60")


@pytest.fixture(scope="module", autouse=True)
def a_wide_trust_region():
    """Two losses that agree to rounding block the same rows, unless one is within rounding of its limit. At the demo's
    own width many are near it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "WIDTH", 1)
        yield


def run(out, *options):
    assert main(["demo", *TINY, "--out", str(out), *options]) == 0
    return json.loads((out / "results.json").read_text())


@pytest.fixture(scope="module")
def fused(tmp_path_factory):
    out = tmp_path_factory.mktemp("fused")
    return out, run(out, "--seeds", "0,4")


@pytest.fixture(scope="module")
def eager(tmp_path_factory):
    return run(tmp_path_factory.mktemp("eager"), "--seeds", "1", "--loss", "reference")


@pytest.fixture(scope="module")
def from_the_mean(tmp_path_factory):
    """`--fused loss`: the package's loss, and the reference's."""
    return tuple(
        run(tmp_path_factory.mktemp(loss), "--seeds", "1", "--fused", "loss", "--loss", loss)
        for loss in ("fused", "reference")
    )


# ---- end to end ------------------------------------------------------------------------------------------------------


def test_results_are_complete(fused):
    _, results = fused
    assert tuple(results["objectives"]) == NAMES
    for name, entry in results["objectives"].items():
        assert entry["seeds"] == ([0] if name in CONTROLS else [0, 4])
        assert len(entry["curves"]) == len(entry["scores"]) == len(entry["seeds"])
        for curve in entry["curves"]:
            assert all(len(values) == 3 and None not in values for values in curve.values())
            assert abs(curve["kl"][0]) <= 1e-8 < curve["kl"][1] < curve["kl"][2]  # starts at the pretrained model
        assert set(entry["loss_seconds"]) == {"fused", "reference"}
        assert min(entry["loss_seconds"].values()) > 0
    control = results["objectives"]["no trust region"]["curves"][0]
    assert control["masked"] == [0, 0, 0]
    assert max(results["objectives"]["Flow-DPPO"]["curves"][0]["masked"]) > 0


@pytest.mark.slow
def test_results_say_what_trained(fused, eager, from_the_mean):
    assert (fused[1]["function"], eager["function"]) == ("step_loss", "step_loss")
    assert [results["function"] for results in from_the_mean] == ["loss", "loss"]
    assert [results["settings"]["fused"] for results in (eager, *from_the_mean)] == ["step", "loss", "loss"]
    assert "calls of step_loss, for" in (fused[0] / "table.txt").read_text(encoding="utf-8")
    for entry in from_the_mean[0]["objectives"].values():
        assert set(entry["loss_seconds"]) == {"fused", "reference"}


def test_seeds_differ(fused):
    first, second = fused[1]["objectives"]["Flow-DPPO"]["curves"]
    assert first["reward"] != second["reward"]


def test_table_has_every_objective(fused):
    out, _ = fused
    lines = (out / "table.txt").read_text(encoding="utf-8").splitlines()
    for name in ("pretrained", *NAMES):
        (row,) = [line for line in lines[: 4 + len(NAMES)] if line.startswith(name)]
        numbers = row[len(name) :].replace("±", " ").split()
        assert len(numbers) == (7 if name in ("pretrained", *CONTROLS) else 12)  # 5 of 7 columns have a spread
        assert not {"nan", "inf"} & set(numbers)


def test_table_is_printed(tmp_path, capsys):
    run(tmp_path, "--seeds", "1", "--loss", "reference", "--iterations", "1", "--epochs", "1")
    assert (tmp_path / "table.txt").read_text(encoding="utf-8").strip() in capsys.readouterr().out


@pytest.mark.parametrize("name", ["reward_over_kl", "reward_over_iterations"])
def test_curves_are_drawn(fused, name):
    pixels = matplotlib.image.imread(fused[0] / f"{name}.png")[..., :3]
    assert min(pixels.shape[:2]) >= 400
    # Frame, labels and legend text are grey: without curves this is 0.
    assert ((pixels.max(-1) - pixels.min(-1)) > 0.3).mean() >= 0.005


def test_samples_are_drawn(fused):
    pixels = matplotlib.image.imread(fused[0] / "samples.png")[..., :3]
    assert min(pixels.shape[:2]) >= 400
    assert (pixels.max(-1) < 0.5).mean() >= 0.04  # with blank tiles: 0.015


# ---- fused and reference ---------------------------------------------------------------------------------------------

# Largest relative difference of two training curves. A float32 loss gives gradients right to about 1e-6 (64 elements,
# a few roundings of 6e-8 each); noise of that size in the gradient moves the reward by at most 2e-7 over these three
# iterations, the KL by 2e-7 and the gradient norm by 1.3e-7. An error of 1e-3 moves them by 5e-6, 9e-5 and 1e-3. The
# limits lie between. What could exceed them beside a wrong gradient: a row within rounding of its limit that one loss
# masks and the other does not, about 1 chance in 50 for each new set of seeds, options or platform.
LIMITS = {"reward": 1.5e-6, "kl": 5e-6, "grad_norm": 1e-5}


# The residual of the old policy is rounded to float16, its mean is not. GRPO-Guard has the drift in its ratio, so the
# rounding moves its curves by 1.9e-6, 1.2e-5 and 1e-5; the others', which see it in the KL alone, by 4e-7 at most.
FORM_LIMITS = {"reward": 1e-5, "kl": 5e-5, "grad_norm": 5e-5}


def distances(first, second):
    """Per curve, the largest relative difference over objectives; from the second iteration on for reward and KL,
    which start equal: the first value of the KL is the rounding of 0."""
    result = dict.fromkeys(LIMITS, 0.0)
    for name in NAMES:
        one, two = (results["objectives"][name]["curves"][0] for results in (first, second))
        for key in LIMITS:
            skip = 0 if key == "grad_norm" else 1
            a, b = np.array(one[key][skip:]), np.array(two[key][skip:])
            assert np.isfinite(a).all()
            assert np.isfinite(b).all()
            result[key] = max(result[key], float(np.max(np.abs(a - b) / np.abs(a))))
    return result


def assert_alike(first, second, limits=LIMITS):
    difference = distances(first, second)
    for key, limit in limits.items():
        assert difference[key] <= limit, difference
    for name in NAMES:
        one, two = (results["objectives"][name]["curves"][0]["masked"] for results in (first, second))
        assert one == pytest.approx(two, abs=1e-6)  # a mean of shares of 800 rows: one row is 3e-4


def test_fused_and_reference_train_alike(fused, eager):
    assert_alike(eager, fused[1])


def test_fused_and_reference_train_alike_from_the_mean(from_the_mean):
    assert_alike(*from_the_mean)


def test_both_forms_train_alike(fused, from_the_mean):
    """From the model's output with a float16 residual, and from the mean with a float32 one."""
    assert_alike(from_the_mean[0], fused[1], FORM_LIMITS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "seen_by"),
    [
        # Adam divides a common factor out of its steps, so only the norm shows it.
        ("common factor", {"grad_norm"}),
        # Half of the rows too strong, half too weak: the policy goes elsewhere.
        ("alternating rows", {"reward", "kl", "grad_norm"}),
    ],
)
def test_a_gradient_error_of_one_in_a_thousand_would_show(eager, tmp_path, monkeypatch, error, seen_by):
    def bent(output, **arguments):
        size = 1e-3 * torch.ones(len(output))
        if error == "alternating rows":
            size[1::2] *= -1
        # The same value, its gradient multiplied by 1 + size.
        output = output + size.reshape(-1, 1, 1, 1, 1) * (output - output.detach())
        return reference.step_loss(output, **arguments)

    monkeypatch.setattr(flowdppo_ops, "step_loss", bent)
    difference = distances(eager, run(tmp_path, "--seeds", "1"))
    assert {key for key, limit in LIMITS.items() if not difference[key] <= limit} == seen_by, difference


# ---- pieces ----------------------------------------------------------------------------------------------------------


def test_rollout_replays_to_its_own_means_and_log_probs():
    torch.manual_seed(0)
    policy, schedule = Velocity(), uniform_schedule(6, 0.7, "cpu")
    batch = rollout(policy, torch.arange(10), schedule, torch.Generator().manual_seed(1))
    assert torch.equal(batch.samples[:, 1:], batch.prev_samples[:, :-1])
    assert torch.equal(batch.images, batch.prev_samples[:, -1])
    assert batch.residuals.dtype == torch.float16
    decoded = batch.prev_samples - batch.std[..., None, None, None] * batch.residuals.float()
    assert (decoded - batch.means).abs().max() <= 2**-9 * batch.std.max()  # half an ulp of a residual below 4
    means = replayed_means(policy, batch, schedule)
    assert (means - batch.means).abs().max() <= 4e-6  # another matmul shape; values up to 4
    out = reference.loss(
        means,
        batch.means,
        torch.ones(10, 6),
        std=batch.std,
        prev_sample=batch.prev_samples,
        objective=flowdppo_ops.FlowDPPO(),
    )
    assert (out.log_prob - batch.log_probs).abs().max() <= 1e-5
    assert (out.ratio - 1).abs().max() <= 1e-5


def test_path_kl_of_a_known_drift():
    """A velocity off by a constant u moves the mean by b u: KL = 64 sum_steps (b u)^2 / (2 std^2)."""
    torch.manual_seed(0)
    policy, schedule, shift = Velocity(), uniform_schedule(5, 0.7, "cpu"), 0.3
    batch = rollout(policy, torch.arange(10), schedule, torch.Generator().manual_seed(1))
    with torch.no_grad():
        policy.write.bias += shift
    now, following = schedule.sigmas[:-1].double(), schedule.sigmas[1:].double()
    _, b, std = reference.transition(
        "flow_sde", now, following, torch.tensor(0.7), torch.tensor(schedule.sigmas[1].item())
    )
    want = 64 * ((b * shift) ** 2 / (2 * std**2)).sum().item()
    assert path_kl(batch, policy, schedule) == pytest.approx(want, rel=1e-4)


def test_digits_fill_the_range():
    data = digits()
    assert (data.images.min().item(), data.images.max().item()) == (-1, 1)
    assert data.labels.unique().tolist() == list(range(10))


def test_symmetry_reward():
    images = torch.zeros(2, 1, 8, 8)
    images[1, 0, :, 0] = 2.0  # one column of ink: 8 pixels off by 2, and their mirror images
    assert score.symmetry(images).tolist() == [0.0, -(16 * 4) / 64]


def test_frechet_distance():
    draw = np.random.default_rng(0).normal(size=(500, 16))
    assert abs(score.frechet_distance(draw, draw)) <= 1e-9
    assert score.frechet_distance(draw, draw + 0.5) == pytest.approx(16 * 0.25, abs=1e-9)
    assert score.frechet_distance(draw, 3 * draw + 2 * draw.mean(0) * -1) == pytest.approx(
        4 * np.cov(draw.T).trace(), abs=1e-9
    )  # C2 = 9 C1, equal means: tr(C1 + 9 C1 - 2 * 3 C1)


def test_judge_knows_the_real_digits():
    data = digits()
    judge = score.Judge(data)
    scores = judge.scores(data.images, data.labels)
    assert scores["legible"] >= 0.99
    assert abs(scores["held_out_frechet"]) <= 1e-6
    wrong = judge.scores(data.images, (data.labels + 2) % 10)
    assert wrong["legible"] <= 0.01
    broken = judge.scores(torch.full((20, 1, 8, 8), float("nan")), torch.arange(20) % 10)
    assert all(np.isnan(value) for value in broken.values())
    assert set(TRAINED) == {1, 3, 5, 7, 9}


# ---- command line ----------------------------------------------------------------------------------------------------


def test_no_command_prints_help(capsys):
    assert main([]) == 0
    assert "demo" in capsys.readouterr().out


def test_help_needs_no_extras():
    code = "import sys; sys.modules['torch'] = None; from flowdppo_ops.__main__ import main; main(['demo', '--help'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--iterations" in done.stdout


@pytest.mark.parametrize("extra", ["torch", "sklearn", "matplotlib", "tqdm"])
def test_missing_extra(monkeypatch, capsys, tmp_path, extra):
    monkeypatch.setitem(sys.modules, extra, None)
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"demo: {extra} not installed: pip install 'flowdppo-ops[demo]'\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds", "0"], "argument --seeds: '0', wanted a whole number of at least 1"),
        (["--seeds", "1,x"], "argument --seeds: '1,x', wanted a count, or different whole numbers"),
        (["--seeds", "1,1"], "argument --seeds: '1,1', wanted a count, or different whole numbers"),
        (["--iterations", "-1"], "argument --iterations: '-1', wanted a whole number of at least 1"),
        (["--epochs", "0.5"], "argument --epochs: '0.5', wanted a whole number of at least 1"),
        (["--loss", "eager"], "argument --loss: invalid choice: 'eager'"),
        (["--fused", "all"], "argument --fused: invalid choice: 'all'"),
        (["--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
        (["--out", __file__], "argument --out: "),
    ],
)
def test_bad_options(capsys, options, message):
    with pytest.raises(SystemExit) as exit_:
        main(["demo", *options])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_no_gpu(capsys, tmp_path):
    with pytest.raises(SystemExit):
        main(["demo", "--device", "cuda", "--out", str(tmp_path)])
    assert "argument --device: cuda is not available here" in capsys.readouterr().err
