"""`sde_step(generator=[...])`: one generator a sample, as diffusers' `randn_tensor` takes them."""

from __future__ import annotations

import pytest
import torch
from small_calls import small_call

from flowdppo_ops import reference


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(10 + seed) for seed in range(count)]


def drawing_call(row_shape: tuple[int, ...] = (4,), dtype: torch.dtype = torch.float32) -> dict:
    arguments = small_call("sde_step", row_shape, (5, 8), dtype=dtype)
    del arguments["prev_sample"]
    return arguments


def drawn_one_by_one(like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    shape = (1, *like.shape[1:])
    return torch.cat([torch.randn(shape, generator=one, dtype=dtype) for one in generators(len(like))])


@pytest.mark.parametrize("make", [list, tuple])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("row_shape", [(4,), (1,), (2, 3)], ids=str)
def test_every_sample_has_its_generator(api, row_shape, dtype, make):
    """Also where a sample is several rows, the steps of a trajectory."""
    arguments = drawing_call(row_shape, dtype)
    sample = arguments["sample"]
    noise = drawn_one_by_one(sample, torch.float64 if dtype == torch.float64 else torch.float32)
    mine = api.sde_step(**arguments, generator=make(generators(len(sample))))
    wanted = api.sde_step(**arguments, noise=noise)
    for name in ("prev_sample", "log_prob", "prev_sample_mean", "std"):
        assert torch.equal(getattr(mine, name), getattr(wanted, name)), name


def test_a_sample_does_not_depend_on_its_neighbours(api):
    """What the list is for: the same seed gives the same image in any batch."""
    arguments = drawing_call()
    whole = api.sde_step(**arguments, generator=generators(4)).prev_sample
    for row in range(4):
        alone = {name: value[row : row + 1] if torch.is_tensor(value) else value for name, value in arguments.items()}
        mine = api.sde_step(**alone, generator=[torch.Generator().manual_seed(10 + row)]).prev_sample
        assert torch.equal(mine, whole[row : row + 1])


def test_generators_are_left_where_one_by_one_leaves_them(api):
    mine, wanted = generators(4), generators(4)
    api.sde_step(**drawing_call(), generator=mine)
    for one, other in zip(mine, wanted, strict=True):
        torch.randn((1, 5, 8), generator=other)
        assert torch.equal(one.get_state(), other.get_state())


def test_generators_draw_on_their_own_device():
    """CPU generators beside latents on a GPU, for which the meta device stands in."""
    arguments = {name: value.to("meta") if torch.is_tensor(value) else value for name, value in drawing_call().items()}
    mine, wanted = generators(4), generators(4)
    assert reference.sde_step(**arguments, generator=mine).prev_sample.device.type == "meta"
    torch.randn((1, 5, 8), generator=wanted[3])
    assert torch.equal(mine[3].get_state(), wanted[3].get_state())


@pytest.mark.parametrize("count", [0, 2, 3, 5])
def test_as_many_as_samples(api, count):
    with pytest.raises(ValueError, match=r"\bgenerator\b") as caught:
        api.sde_step(**drawing_call(), generator=generators(count))
    assert str(count) in str(caught.value)
    assert "4" in str(caught.value)


@pytest.mark.parametrize("other", [7, None, "cpu", torch.zeros(1)], ids=repr)
def test_nothing_but_generators(api, other):
    with pytest.raises(TypeError, match=r"\bgenerator\b"):
        api.sde_step(**drawing_call(), generator=[*generators(3), other])


def test_no_batch_to_have_one_each(api):
    """Latents without dimensions are one sample at most."""
    zero = torch.zeros(())
    with pytest.raises(ValueError, match=r"\bgenerator\b"):
        api.sde_step(zero, zero, sigma=0.8, sigma_next=0.6, row_dims=0, generator=generators(2))


@pytest.mark.parametrize("source", ["prev_sample", "noise"])
def test_one_source_of_noise(api, source):
    arguments = drawing_call()
    with pytest.raises(ValueError, match="noise"):
        api.sde_step(**arguments, **{source: arguments["sample"]}, generator=generators(4))
