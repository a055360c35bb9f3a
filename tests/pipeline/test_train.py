"""Training: two processes equal one, accumulation equals the large batch, a resumed run equals an uninterrupted one."""

from functools import partial

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn

from pipeline.config import load_config
from pipeline.errors import RunError
from pipeline.train import train_prior, train_tokenizer
from stages.conditions.labels import ClassCondition
from stages.contract import TokenizerOutput
from stages.factory import build_tokenizer
from stages.prior.module import PriorModule
from stages.tokenizer.discriminator import PatchDiscriminator, hinge_discriminator, hinge_generator
from stages.tokenizer.module import TokenizerModule
from stages.training import NonFiniteLoss, trainer_steps
from stages.weights import read_weights
from tests.pipeline.ddp_step import keep_weights
from tests.reliability.commands import octaves, two


def run_ddp(tmp_path, tiny, name, *overrides):
    """States of the module on each rank after training, with ``trainer.devices=2`` of two."""
    folder = tmp_path / name
    command, keep = ["train-tokenizer", tiny, f"run={folder}", *overrides], partial(keep_weights, folder)
    if "trainer.devices=2" in overrides:
        ended = two(folder, *command, setups=(keep, keep))
    else:
        ended = [octaves(folder, *command, setup=keep)]
    assert all(rank.code == 0 for rank in ended), ended
    return [torch.load(path, weights_only=True) for path in sorted(folder.glob("rank*.pt"))]


def without_codebook(tiny):
    """FSQ: codes that are started and revived come from the local batch, which differs by construction."""
    tiny.write_text(
        tiny.read_text().replace("kind: cosine, codes: 16, code_dim: 8, revive_every: 2", "kind: fsq, levels: [4, 4]")
    )


def close(a, b):
    return all(torch.allclose(a[name].float(), b[name].float(), atol=1e-5) for name in a)


# prefixes are drawn by each process: with all tokens for every image there is one result
NESTED = [f"tokenizer.{key}" for key in ("kind=nested", "num_tokens=5", "patch=4", "full_share=1")]


# the entropy of the mean use is that of both processes' tokens
SIGNS = ["tokenizer.quantizer.kind=lfq", "tokenizer_training.entropy_weight=0.5"]


MUON = ["tokenizer_training.optimizer=muon"]


@pytest.mark.parametrize("kind", [MUON, NESTED, SIGNS], ids=["sit-muon", "nested", "lfq"])
def test_two_processes_train_like_one_on_the_joined_batch(tmp_path, tiny, kind):
    without_codebook(tiny)
    common = ["tokenizer_training.max_steps=2", "tokenizer_training.adversarial_start=0", *kind]
    (one,) = run_ddp(tmp_path, tiny, "one", *common, "tokenizer_training.batch_size_per_device=8")
    two = run_ddp(tmp_path, tiny, "two", *common, "trainer.devices=2")
    assert len(two) == 2
    assert all(torch.equal(two[0][name], two[1][name]) for name in two[0])
    assert close(one, two[0])
    untrained = TokenizerModule(*fresh(tiny, *kind)).state_dict()
    assert not close(one, untrained)


def test_nested_tokens_stay_equal_on_both_ranks_though_each_draws_its_prefixes(tmp_path, tiny):
    two = run_ddp(tmp_path, tiny, "two", "trainer.devices=2", *NESTED[:3])
    assert len(two) == 2 and all(torch.equal(two[0][name], two[1][name]) for name in two[0])


@pytest.mark.parametrize("kind", ["cosine", "residual"])
def test_codebooks_stay_bit_equal_on_both_ranks_while_codes_are_started_and_revived(tmp_path, tiny, kind):
    keys = [f"tokenizer.quantizer.{key}" for key in (f"kind={kind}", "codes=16", "code_dim=8", "revive_every=2")]
    keys.append("tokenizer.quantizer.revive_below=2.0")  # every code used less than twice its share dies
    first, second = run_ddp(tmp_path, tiny, "two", "trainer.devices=2", *keys)
    names = [name for name in first if "quantizers" in name]
    assert any("codebook" in name for name in names)
    assert all(torch.equal(first[name], second[name]) for name in names)


def fresh(tiny, *overrides):
    config = load_config(tiny, list(overrides))
    torch.manual_seed(0)
    tokenizer = build_tokenizer(config.tokenizer, (16, 16), 3)
    return tokenizer, config.tokenizer_training, config.seed


def weights(path):
    return read_weights(path)[1]


def test_accumulated_batches_equal_the_large_batch(tmp_path, tiny):
    """Without the adversary: spectral norms move at every forward pass, so there the two differ a little."""
    without_codebook(tiny)
    common = ["tokenizer_training.max_steps=2", "tokenizer_training.adversarial_weight=0"]
    large = load_config(tiny, [f"run={tmp_path}/large", *common, "tokenizer_training.batch_size_per_device=8"])
    small = load_config(tiny, [f"run={tmp_path}/small", *common, "tokenizer_training.accumulate_batches=2"])
    a, b = weights(train_tokenizer(large)), weights(train_tokenizer(small))
    assert close(a, b)


class Killed(Exception):
    pass


def test_two_processes_that_accumulate_train_like_one_large_batch(tmp_path, tiny):
    without_codebook(tiny)
    common = ["tokenizer_training.max_steps=2", "tokenizer_training.adversarial_weight=0"]
    (one,) = run_ddp(tmp_path, tiny, "one", *common, "tokenizer_training.batch_size_per_device=16")
    two = run_ddp(tmp_path, tiny, "two", *common, "trainer.devices=2", "tokenizer_training.accumulate_batches=2")
    assert all(torch.equal(two[0][name], two[1][name]) for name in two[0])
    assert close(one, two[0])


@pytest.mark.parametrize(("accumulate", "optimizer"), [(1, []), (2, MUON)], ids=["adamw", "accumulated-muon"])
def test_a_resumed_tokenizer_equals_an_uninterrupted_one(tmp_path, tiny, monkeypatch, accumulate, optimizer):
    keys = [f"tokenizer_training.accumulate_batches={accumulate}", *optimizer]
    whole = train_tokenizer(load_config(tiny, [f"run={tmp_path}/whole", *keys]))
    assert_resumes(tmp_path, tiny, monkeypatch, TokenizerModule, train_tokenizer, whole, keys, stop=5 * accumulate - 1)


def assert_resumes(tmp_path, tiny, monkeypatch, module, train, whole, keys, stop):
    config = load_config(tiny, [f"run={tmp_path}/broken", *keys])
    original = module.training_step

    def stopping(self, batch, batch_idx):
        if self.batches_seen == stop:
            raise Killed
        return original(self, batch, batch_idx)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(module, "training_step", stopping)
        train(config)
    resumed = weights(train(config))
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in weights(whole).items())


def test_a_non_finite_loss_stops_with_step_term_and_samples(tmp_path, tiny, monkeypatch):
    config = load_config(tiny, [f"run={tmp_path}/nan"])
    original = TokenizerModule.loss_terms

    def poisoned(self, *images):
        terms, logs, ids = original(self, *images)
        if self.step == 4:
            terms["pixel"] = terms["pixel"] * float("nan")
        return terms, logs, ids

    monkeypatch.setattr(TokenizerModule, "loss_terms", poisoned)
    with pytest.raises(NonFiniteLoss, match=r"step 4: pixel is nan; samples: (\w+/\d+.png(, )?){4}\. "):
        train_tokenizer(config)
    assert not (tmp_path / "nan/tokenizer/tokenizer.safetensors").exists()
    assert (tmp_path / "nan/tokenizer/checkpoints/step00000006.ckpt").exists()  # generator step 3, counted twice


def test_the_generator_ignores_the_discriminator_until_its_start_and_never_trains_it(tiny):
    module = TokenizerModule(*fresh(tiny))
    pixels = torch.rand(4, 3, 16, 16) * 2 - 1
    for seen, share in ((0, 0.0), (1, 0.0), (2, 0.5), (3, 1.0), (9, 1.0)):
        module.batches_seen = seen
        assert module.adversarial_ramp() == share
        terms, _, _ = module.loss_terms(pixels)
        assert (terms["adversarial"] == 0) == (share == 0)
    # each network gets its own loss only
    module.zero_grad()
    terms["adversarial"].backward(retain_graph=True)
    assert all(parameter.grad is None for parameter in module.discriminator.parameters())
    module.zero_grad()
    terms["discriminator"].backward()
    assert all(parameter.grad is None for parameter in module.tokenizer.parameters())
    assert all(parameter.grad is not None for parameter in module.discriminator.parameters())


def test_the_exported_weights_are_the_average_over_the_trained_ones(tmp_path, tiny, monkeypatch):
    """timm's warm-up: step t moves the average by t^(-2/3), at least 1 - decay, towards the trained weights."""
    trained = []

    def record(self, tokenizer, step=None):
        trained.append({name: tensor.clone() for name, tensor in tokenizer.state_dict().items()})
        original(self, tokenizer, step)

    original = ModelEmaV3.update
    monkeypatch.setattr(ModelEmaV3, "update", record)
    without_codebook(tiny)
    exported = weights(train_tokenizer(load_config(tiny, [f"run={tmp_path}/run"])))
    assert len(trained) == 6
    expected = trained[0]
    for step, state in enumerate(trained[1:], 2):
        share = max(step ** (-2 / 3), 1 - 0.999)
        expected = {name: tensor + share * (state[name] - tensor) for name, tensor in expected.items()}
    assert close(exported, expected)
    for other in (trained[-1], trained[0]):
        assert not all(torch.allclose(exported[name], other[name], atol=1e-7) for name in exported)


def test_the_exported_prior_is_the_average_over_the_trained_ones(tmp_path, finished, monkeypatch):
    states = []

    def record(self, prior, step=None):
        original(self, prior, step)
        states.append([{name: x.clone() for name, x in each.state_dict().items()} for each in (prior, self.module)])

    original = ModelEmaV3.update
    monkeypatch.setattr(ModelEmaV3, "update", record)
    exported = weights(train_prior(load_config(finished / "tiny.yaml", on_tokens_of(finished, tmp_path))))
    trained, average = states[-1]
    assert len(states) == 6 and all(torch.equal(tensor, average[name]) for name, tensor in exported.items())
    assert not all(torch.allclose(tensor, trained[name], atol=1e-7) for name, tensor in exported.items())


def on_tokens_of(finished, folder):
    """Keys of a prior in ``folder`` on the tokens of the finished run."""
    tokenizer = f"tokenizer.path={finished}/run/tokenizer/tokenizer.safetensors"
    return [f"run={folder}/run", f"tokens.path={finished}/run/tokens", tokenizer]


@pytest.mark.parametrize("share", [0, 0.5])
def test_conditions_are_dropped_in_training_and_in_validation_never(tmp_path, finished, monkeypatch, share):
    seen = {True: [], False: []}

    def record(self, prompts):
        seen[self.training].append(prompts.labels)
        return original(self, prompts)

    original = ClassCondition.forward
    monkeypatch.setattr(ClassCondition, "forward", record)
    keys = [f"condition.dropout={share}", "sampling.guidance=1"]
    train_prior(load_config(finished / "tiny.yaml", [*on_tokens_of(finished, tmp_path), *keys]))
    dropped = {training: torch.cat(labels) == -1 for training, labels in seen.items()}
    assert len(dropped[True]) == 24 and bool(dropped[True].any()) == (share > 0) and not dropped[True].all()
    assert len(dropped[False]) and not dropped[False].any()


def test_bfloat16_trains_and_keeps_its_islands(tmp_path, tiny):
    """Under autocast every loss term is float32 and nearly what float32 gives."""
    module = TokenizerModule(*fresh(tiny, "tokenizer_training.perceptual=lite0"))
    pixels = torch.rand(4, 3, 16, 16) * 2 - 1
    module.tokenizer.fit([(pixels, None)])
    module.tokenizer.eval()
    exact, _, _ = module.loss_terms(pixels)
    with torch.autocast("cpu", torch.bfloat16):
        lowered, _, _ = module.loss_terms(pixels)
    for name, value in lowered.items():
        assert value.dtype == torch.float32, name
        torch.testing.assert_close(value, exact[name], rtol=0.05, atol=1e-3)
    run = train_tokenizer(load_config(tiny, [f"run={tmp_path}/bf16", "tokenizer_training.precision=bf16"]))
    assert all(tensor.dtype != torch.bfloat16 for tensor in weights(run).values())


def test_every_loss_counts_by_its_weight_once(tiny):
    names = {"pixel", "commitment", "codebook", "perceptual", "adversarial"}
    pixels = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    terms = []
    for weight in (0.5, 1.5):
        keys = [f"tokenizer_training.{name}_weight={weight}" for name in names]
        module = TokenizerModule(*fresh(tiny, "tokenizer_training.perceptual=lite0", *keys))
        module.batches_seen = 100  # the adversary has its whole weight
        module.eval()  # spectral norms stay as they are
        found, logs, _ = module.loss_terms(pixels)
        assert found.keys() == names | {"discriminator"}
        terms.append({name: value.detach() for name, value in found.items()})
        for name in names:
            torch.testing.assert_close(terms[-1][name], weight * logs[f"loss/{name}"])
    for name in names:
        torch.testing.assert_close(3 * terms[0][name], terms[1][name])


def test_a_loss_without_a_weight_is_never_dropped(tiny, monkeypatch):
    module = TokenizerModule(*fresh(tiny))
    forward = type(module.tokenizer.quantizers[0]).forward

    def surprising(self, features):
        result = forward(self, features)
        result.losses["surprise"] = result.features.mean()
        return result

    monkeypatch.setattr(type(module.tokenizer.quantizers[0]), "forward", surprising)
    with pytest.raises(KeyError, match="surprise"):
        module.loss_terms(torch.rand(4, 3, 16, 16) * 2 - 1)


def test_hinge_losses():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0])
    assert hinge_discriminator(real, fake).item() == pytest.approx(0.5 * (0.25 + 0.5))
    assert hinge_generator(fake).item() == pytest.approx(1.5)


def test_the_discriminator_is_spectrally_normalised():
    discriminator = PatchDiscriminator(3, 8, 2).train()
    for _ in range(30):
        discriminator(torch.randn(2, 3, 16, 16))
    for layer in discriminator:
        if isinstance(layer, nn.Conv2d):
            assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1, abs=0.05)


def test_lightning_counts_every_optimiser(tmp_path, tiny):
    assert trainer_steps(10, 2) == 20 and trainer_steps(10, 1) == 10
    path = train_tokenizer(load_config(tiny, [f"run={tmp_path}/a", "tokenizer_training.adversarial_weight=0"]))
    assert read_weights(path)[0]["steps"] == 6
    path = train_tokenizer(load_config(tiny, [f"run={tmp_path}/b"]))
    assert read_weights(path)[0]["steps"] == 6


def test_one_batch_can_be_learned_by_heart(tiny):
    """A tokenizer that cannot do this is broken, whatever its loss curve says."""
    tokenizer, training, _ = fresh(tiny, "tokenizer.quantizer.codes=512")
    pixels = torch.rand(4, 3, 4, 4).repeat_interleave(4, -1).repeat_interleave(4, -2) * 2 - 1
    tokenizer.fit([(pixels, None)])
    optimizer = torch.optim.Adam(tokenizer.parameters(), 3e-3)
    for _ in range(300):
        output: TokenizerOutput = tokenizer(pixels)
        error = (output.reconstruction - pixels).square().mean()
        loss = error + 0.25 * output.losses["commitment"] + output.losses["codebook"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert -10 * torch.log10(error / 4) > 26


def test_a_prior_needs_its_cache_and_a_run_its_own_config(tmp_path, tiny):
    with pytest.raises(RunError, match="cache-tokens"):
        train_prior(load_config(tiny, [f"run={tmp_path}/r"]))
    train_tokenizer(load_config(tiny, [f"run={tmp_path}/r", "tokenizer_training.max_steps=1"]))
    with pytest.raises(RunError, match=r"tokenizer_training.max_steps: 1, now 2"):
        train_tokenizer(load_config(tiny, [f"run={tmp_path}/r", "tokenizer_training.max_steps=2"]))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_prior_equals_an_uninterrupted_one(tmp_path, tiny, monkeypatch, optimizer):
    from pipeline.cache import cache_tokens

    chosen = f"prior_training.optimizer={optimizer}"
    config = load_config(tiny, [f"run={tmp_path}/whole", chosen])
    train_tokenizer(config)
    cache_tokens(config)
    keys = [f"tokens.path={tmp_path}/whole/tokens", f"tokenizer.path={tmp_path}/whole/tokenizer/tokenizer.safetensors"]
    whole = train_prior(config)
    assert_resumes(tmp_path, tiny, monkeypatch, PriorModule, train_prior, whole, [*keys, chosen], stop=4)
