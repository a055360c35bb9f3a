"""Two real processes: bitwise equal to each other, and equal to one process with the joint batch."""

import pytest
import torch

from tests.reliability.commands import CONTEXT
from tests.stages.quantizer_ranks import BORN, GIVEN, run
from tests.waiting import PATIENCE


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """States by kind: [one process, rank 0 of two, rank 1 of two]."""
    folder = tmp_path_factory.mktemp("ranks")
    places = ((1, 0), (2, 0), (2, 1))
    processes = [CONTEXT.Process(target=run, args=(folder, *place)) for place in places]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE)
        assert process.exitcode == 0
    return [torch.load(folder / f"rank{rank}of{world}.pt", weights_only=True) for world, rank in places]


@pytest.mark.parametrize("name", [*GIVEN, *BORN])
def test_weights_and_codebooks_are_bit_equal_on_both_ranks(trained, name):
    _, first, second = (states[name] for states in trained)
    for key, value in first.items():
        if key != "entropy":
            assert torch.equal(value, second[key]), key


@pytest.mark.parametrize("name", GIVEN)
def test_two_ranks_train_like_one_process_on_the_joint_batch(trained, name):
    one, first, second = (states[name] for states in trained)
    for key, value in first.items():
        if key != "entropy":
            torch.testing.assert_close(value, one[key], atol=1e-5, rtol=1e-4)
    # each rank has the entropies of its own tokens, but both share the entropy of the joint mean
    torch.testing.assert_close((first["entropy"] + second["entropy"]) / 2, one["entropy"], atol=1e-5, rtol=1e-5)


def test_the_entropy_term_made_a_difference(trained):
    """Otherwise equality would not test the entropy term."""
    assert all((trained[0][name]["entropy"] < -0.1).all() for name in GIVEN if "lfq" in name or name == "bsq")
