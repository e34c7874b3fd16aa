import pytest
import torch
from kernel_helpers import DEVICE, poisoned

from mcdi_fast.errors import McdiError
from mcdi_fast.kernels.normal_noise import normal_noise, normal_noise_ref
from mcdi_fast.noise import philox_normal, seed_bits


@pytest.mark.parametrize(("shape", "stream"), [((1,), 0), ((5, 65), 3), ((3, 7, 50), 2**40 + 1), ((8,), 2**63 - 1)])
def test_the_numbers_of_numpy(shape, stream):
    seeds = [2**64 - 1, 0, 2**40 + 3]
    found = normal_noise(seed_bits(seeds).to(DEVICE), shape, stream, out=poisoned(3, *shape))
    # the words are the same; sine, cosine and logarithm differ in the last bits (test_noise.py has the bound)
    torch.testing.assert_close(found.cpu(), normal_noise_ref(seeds, shape, stream), rtol=1e-5, atol=4e-6)


def test_per_task_and_mask():
    seeds, mask = seed_bits(range(17)).to(DEVICE), torch.ones(4, 5, device=DEVICE)
    mask[3, 2:] = 0
    whole = normal_noise(seeds, (4, 5), 1, mask)
    assert torch.equal(whole[7:8], normal_noise(seeds[7:8].clone(), (4, 5), 1, mask))
    assert torch.equal(whole == 0, mask.expand(17, 4, 5) == 0)
    torch.testing.assert_close(
        whole.cpu(), philox_normal(range(17), 20, 1).view(-1, 4, 5) * mask.cpu(), rtol=1e-5, atol=4e-6
    )


def test_bad_input():
    seeds = seed_bits(range(3)).to(DEVICE)
    for arguments, message in [
        ((seeds[:0], (4,)), "seeds: shape"),
        ((seeds.int(), (4,)), "seeds: torch.int32"),
        ((seeds, (0,)), r"shape = \(0,\): 0 numbers a task"),
        ((seeds, (4,), -1), "stream = -1"),
        ((seeds, (4,), 0, torch.ones(5, device=DEVICE)), "mask: shape"),
    ]:
        with pytest.raises(McdiError, match=message):
            normal_noise(*arguments)
