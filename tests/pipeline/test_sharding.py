"""FSDP: two processes with half of the training state each make the prior that two with all of it make."""

import json
import os
import signal
from functools import partial

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from data.layout import Tokens
from pipeline.config import ConfigError, load_config
from pipeline.train import train_tokenizer
from stages.conditions.text import ClassTextConditionConfig
from stages.contract import Prompts
from stages.factory import build_prior
from stages.optimizers import build_optimizer
from stages.prior.config import PriorTrainingConfig
from stages.prior.sharding import shard, whole_state
from stages.prior.transformer import TransformerPriorConfig
from stages.training import gradient_norm
from stages.weights import read_weights
from tests.reliability.commands import CONTEXT, octaves, signal_at, two
from tests.reliability.test_resume import STEPS, checkpoints, preempted, tensors_equal
from tests.stages.toys import layout

UNCLIPPED = "prior_training.gradient_clip_norm=1e6"


def command(finished, run, strategy, *keys):
    parts = [f"tokens.path={finished}/run/tokens", f"tokenizer.path={finished}/run/tokenizer/tokenizer.safetensors"]
    return ["train-prior", finished / "tiny.yaml", f"run={run}", *parts, f"trainer.strategy={strategy}", *keys]


def trained(folder):
    return read_weights(folder / "prior/prior.safetensors")[1]


def checkpoint(folder, step):
    return torch.load(folder / f"prior/checkpoints/step{step:08d}.ckpt", weights_only=True)


def record(folder):
    """A setup: when training ends, the process writes what it keeps, in bytes, and what validation gave."""
    from stages.prior.module import PriorModule

    def kept(tensors):
        local = [each.to_local() if isinstance(each, DTensor) else each for each in tensors]
        return sum(each.untyped_storage().nbytes() for each in local)

    def write(module):
        moments = [each for state in module.optimizers().state.values() for each in state.values() if each.ndim]
        found = {
            "weights": kept(module.prior.parameters()),
            "moments": kept(moments),
            "average": kept(module.average.module.parameters()),
            "validation": module.trainer.callback_metrics["val_bits"].item(),
        }
        (folder / f"rank{module.global_rank}.json").write_text(json.dumps(found))

    PriorModule.on_train_end = write


def recorded(folder):
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def run_two(finished, folder, strategy, *keys):
    folder.mkdir()
    setup = partial(record, folder)
    ended = two(folder, *command(finished, folder, strategy, *keys), setups=(setup, setup))
    assert [rank.code for rank in ended] == [0, 0], ended
    return folder


@pytest.fixture(scope="module")
def whole(finished, tmp_path_factory):
    """An FSDP run that nothing disturbed, without clipping."""
    return run_two(finished, tmp_path_factory.mktemp("sharded") / "fsdp", "fsdp", UNCLIPPED)


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("muon", marks=pytest.mark.slow)])
def test_the_weights_are_those_of_ddp_and_each_process_keeps_half(finished, request, tmp_path, optimizer):
    """Two addends have one sum, so the mean gradient is the same bits, and all that follows goes weight by weight.

    Muon's matrices are gathered, so that every process does what all do under DDP.
    """
    keys = [UNCLIPPED, f"prior_training.optimizer={optimizer}"]
    if optimizer == "adamw":
        fsdp = request.getfixturevalue("whole")
    else:
        fsdp = run_two(finished, tmp_path / "fsdp", "fsdp", *keys)
    ddp = run_two(finished, tmp_path / "ddp", "ddp", *keys)
    one, other = trained(ddp), trained(fsdp)
    assert one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)
    for parts, all_of_it in zip(recorded(fsdp), recorded(ddp), strict=True):
        for name in ("weights", "moments", "average"):
            assert 0.45 < parts[name] / all_of_it[name] < 0.55, name
        assert parts["validation"] == all_of_it["validation"]
    # the checkpoint is DDP's, entry for entry: names, numbers of the optimiser's parameters, values
    one, other = checkpoint(ddp, 6), checkpoint(fsdp, 6)
    assert one.keys() == other.keys() and one["loops"] == other["loops"]
    assert one["state_dict"].keys() == other["state_dict"].keys()
    assert all(one["state_dict"][name].equal(other["state_dict"][name]) for name in one["state_dict"])
    (one,), (other,) = one["optimizer_states"], other["optimizer_states"]
    assert one["param_groups"] == other["param_groups"] and one["state"].keys() == other["state"].keys()
    for number, values in one["state"].items():
        assert values.keys() == other["state"][number].keys() != set()
        assert all(value.equal(other["state"][number][name]) for name, value in values.items())


def test_with_clipped_and_accumulated_gradients_the_weights_are_close_to_those_of_ddp(finished, tmp_path):
    """The norm adds shares in another order: an ulp or two of the clip's factor, which six steps carry along.

    That clipping is by the right norm is tested below; Adam would hide much of a wrong one.
    """
    keys = ["prior_training.gradient_clip_norm=0.1", "prior_training.accumulate_batches=2"]
    ddp, fsdp = (run_two(finished, tmp_path / strategy, strategy, *keys) for strategy in ("ddp", "fsdp"))
    one, other = trained(ddp), trained(fsdp)
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=1e-6, rtol=1e-5)


def test_sigterm_to_one_rank_saves_and_the_next_call_ends_with_the_same_bits(finished, whole, tmp_path):
    """In the middle of an epoch, at a step without a checkpoint of its own."""
    run = tmp_path / "run"
    again = command(finished, run, "fsdp", UNCLIPPED)
    ended = two(tmp_path, *again, setups=(None, signal_at(signal.SIGTERM, STEPS["prior"], 4)))
    assert all(map(preempted, ended)), ended
    assert checkpoints(run, "prior") == ["step00000003.ckpt", "step00000004.ckpt"]
    ended = two(tmp_path, *again)
    assert [rank.code for rank in ended] == [0, 0] and "continuing from" in ended[0].said
    assert tensors_equal(run, whole, "prior")


@pytest.mark.parametrize(("first", "then"), [("ddp", "fsdp"), ("fsdp", "ddp")])
def test_the_strategy_may_change_between_two_calls(finished, whole, tmp_path, first, then):
    run = tmp_path / "run"
    stop = signal_at(signal.SIGTERM, "stages.prior.module:PriorModule.validation_step", 1)
    assert all(map(preempted, two(tmp_path, *command(finished, run, first, UNCLIPPED), setups=(stop, None))))
    ended = two(tmp_path, *command(finished, run, then, UNCLIPPED))
    assert [rank.code for rank in ended] == [0, 0], ended
    assert tensors_equal(run, whole, "prior")


def test_what_is_exported_draws_images(finished, whole, tmp_path):
    keys = [f"tokenizer.path={finished}/run/tokenizer/tokenizer.safetensors", "count=1", f"out={tmp_path}/drawn"]
    assert octaves(tmp_path, "sample", finished / "tiny.yaml", f"run={whole}", *keys).code == 0
    assert len(list((tmp_path / "drawn").glob("*.png"))) > 3


def small_prior(**keys):
    torch.manual_seed(0)
    text = {"encoder": "words", "max_tokens": 4, "width": 0, "vocabulary": 9, "empty_length": 1}
    config = TransformerPriorConfig(**{"depth": 2, "width": 32, "heads": 4, "dropout": 0.1, **keys})
    condition = ClassTextConditionConfig(attend="cross")
    return build_prior(config, condition, layout(), ["a", "b", "c"], {**text, "encoder": "minilm", "width": 8})


def gradients(prior):
    """Of two steps on the same tokens, the second through what the first has left behind."""
    generator = torch.Generator().manual_seed(0)
    tokens = Tokens.fixed(torch.randint(0, 11, (2, 12, 1), generator=generator))
    prompts = Prompts(torch.tensor([0, 2]), torch.randn(2, 3, 8, generator=generator), torch.tensor([3, 2]))
    for _ in range(2):
        torch.manual_seed(1)
        prior.train()(tokens, prompts).nll.mean().backward()
    with torch.no_grad():
        nll = prior.eval().nll(tokens, prompts)
    return nll, {name: parameter.grad for name, parameter in prior.named_parameters()}


def compare_on_a_rank(folder, rank, keys):
    os.environ.update(MASTER_ADDR="127.0.0.1")
    store = torch.distributed.FileStore(str(folder / "store"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    whole, prior = small_prior(**keys), small_prior(**keys)
    nll, wanted = gradients(whole)
    before = {name: tensor.clone() for name, tensor in prior.state_dict().items()}
    shard(prior, init_device_mesh("cpu", (2,)))
    assert sum(isinstance(module, FSDPModule) for module in prior.modules()) == 3
    found_nll, found = gradients(prior)
    assert torch.equal(nll, found_nll)
    assert all(torch.equal(grad.full_tensor(), wanted[name]) for name, grad in found.items())
    norm = torch.stack([grad.norm() for grad in wanted.values()]).norm()
    torch.testing.assert_close(gradient_norm(prior), norm)
    torch.nn.utils.clip_grad_norm_(prior.parameters(), norm.item() / 3)
    for name, grad in found.items():
        torch.testing.assert_close(grad.full_tensor(), wanted[name] / 3)
    state = whole_state(prior)  # after a pass without a backward one, too
    assert not rank or not state
    assert rank or all(torch.equal(state[name], before[name]) for name in before)
    for network in (whole, prior):
        network.zero_grad()
        gradients(network)
        build_optimizer(network, PriorTrainingConfig(optimizer="muon")).step()
    state = whole_state(prior)
    assert rank or all(torch.equal(state[name], tensor) for name, tensor in whole.state_dict().items())
    assert rank or not any(torch.equal(state[name], before[name]) for name, _ in whole.named_parameters())
    (folder / f"equal{rank}").touch()
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("keys", [{}, {"checkpoint_gradients": True}, {"averaging": "learned"}], ids=str)
def test_every_part_of_the_transformer_gives_the_gradients_of_the_whole_one(tmp_path, keys):
    """Both ranks see one batch, so the mean of their gradients is its gradient, bit by bit, as is Muon's update."""
    ranks = [CONTEXT.Process(target=compare_on_a_rank, args=(tmp_path, rank, keys)) for rank in (0, 1)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
        rank.kill()
    assert (tmp_path / "equal0").exists() and (tmp_path / "equal1").exists()


def test_what_cannot_be_shared_out_is_refused_with_one_line(tiny):
    with pytest.raises(ConfigError, match="only train-prior supports it") as caught:
        train_tokenizer(load_config(tiny, ["trainer.strategy=fsdp", "trainer.devices=2"]))
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="trainer.strategy=fsdp with prior.kind=chunked"):
        load_config("demo-dct", ["trainer.strategy=fsdp"])
