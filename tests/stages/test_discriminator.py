"""The discriminator of stage 1: networks, losses and regularizers, alone and in a training step."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from data.errors import InputError
from pipeline.__main__ import main
from pipeline.config import ConfigError, load_config
from pipeline.train import train_tokenizer
from stages.factory import build_tokenizer
from stages.tokenizer.discriminator import (
    LOSSES,
    LeCam,
    PatchDiscriminator,
    StyleDiscriminator,
    blur,
    gradient_penalty,
    halvings,
    with_deviation,
)
from stages.tokenizer.module import TokenizerModule
from stages.weights import read_weights
from tests.pipeline.test_train import Killed, run_ddp, without_codebook

STYLE = [
    "tokenizer_training.discriminator=style",
    "tokenizer_training.adversarial_loss=logistic",
    "tokenizer_training.r1_weight=4.0",
    "tokenizer_training.r1_every=2",
    "tokenizer_training.lecam_weight=0.1",
]


def images(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def style(channels=3, size=(16, 16), width=4):
    torch.manual_seed(0)
    return StyleDiscriminator(channels, width, size)


def module_of(tiny, *overrides):
    config = load_config(tiny, [*STYLE, *overrides])
    torch.manual_seed(0)
    tokenizer = build_tokenizer(config.tokenizer, (16, 16), 3)
    return TokenizerModule(tokenizer, config.tokenizer_training, config.seed)


# ---------------------------------------------------------------------- networks


@pytest.mark.parametrize(
    ("size", "count"), [((8, 8), 1), ((16, 16), 2), ((64, 64), 4), ((16, 32), 2), ((24, 16), 2), ((256, 256), 6)]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_one_logit_an_image_whatever_the_size(size, count, channels):
    assert halvings(size) == count
    discriminator = style(channels, size, width=2)
    logits = discriminator(images(3, channels, *size), images(3, channels, *size, seed=1))
    assert [part.shape for part in logits] == [(3, 1), (3, 1)]
    sum(part.sum() for part in logits).backward()
    assert all(parameter.grad is not None for parameter in discriminator.parameters())
    widest = max(layer.out_channels for layer in discriminator.modules() if isinstance(layer, nn.Conv2d))
    assert widest == 2 * min(2**count, 8)


@pytest.mark.parametrize("size", [(4, 4), (12, 12), (28, 28), (48, 48), (16, 18), (2, 64)])
def test_a_size_that_no_halving_brings_to_four_is_one_line(size):
    with pytest.raises(InputError, match=f"images of {size[0]}x{size[1]} cannot be halved.*images.size") as caught:
        StyleDiscriminator(3, 4, size)
    assert "\n" not in str(caught.value)


def test_every_layer_is_spectrally_normalised_and_stays_so_while_it_trains():
    discriminator = style(width=8)
    optimizer = torch.optim.Adam(discriminator.parameters(), 2e-4)
    for step in range(40):
        real, fake = discriminator(images(4, 3, 16, 16, seed=step), images(4, 3, 16, 16, seed=-step - 1) * 0.5)
        optimizer.zero_grad()
        LOSSES["logistic"][0](real, fake).backward()
        optimizer.step()
    discriminator.eval()
    layers = [layer for layer in discriminator.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    assert len(layers) == 1 + 3 * 2 + 3
    for layer in layers:  # one power iteration per pass lags slightly behind the weights
        assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1, abs=0.1)


def test_it_learns_to_tell_blurred_images_from_sharp_ones():
    discriminator = style(width=8)
    optimizer = torch.optim.Adam(discriminator.parameters(), 1e-3, betas=(0.5, 0.9))
    for step in range(60):
        sharp = images(16, 3, 16, 16, seed=step)
        real, fake = discriminator(sharp, functional.avg_pool2d(sharp, 3, 1, 1))
        optimizer.zero_grad()
        LOSSES["hinge"][0](real, fake).backward()
        optimizer.step()
    assert real.min() > fake.max() + 1


def test_the_blur_keeps_a_constant_and_removes_what_halving_would_fold():
    constant = torch.ones(1, 2, 8, 8)
    torch.testing.assert_close(blur(constant, padding=1)[..., 1:-1, 1:-1], constant[..., 1:-2, 1:-2])
    alternating = torch.tensor([1.0, -1.0]).repeat(4).expand(1, 2, 8, 8)
    assert blur(alternating, padding=0).abs().max() < 1e-6
    assert blur(alternating, padding=1, stride=2).shape == (1, 2, 4, 4)


@pytest.mark.parametrize(("batch", "group"), [(1, 1), (2, 2), (4, 4), (5, 1), (6, 3), (8, 4)])
def test_the_deviation_compares_neighbours_in_groups(batch, group):
    x = images(batch, 3, 2, 5)
    result = with_deviation(x)
    assert torch.equal(result[:, :3], x) and result.shape == (batch, 4, 2, 5)
    for start in range(0, batch, group):
        oracle = (x[start : start + group].numpy().var(0) + 1e-8) ** 0.5
        assert torch.allclose(result[start : start + group, 3], torch.tensor(oracle.mean()), atol=1e-6)


def test_real_and_generated_images_never_share_a_statistic():
    """With two images each, a group of four would mix both halves."""
    discriminator = style().eval()
    real = images(2, 3, 16, 16)
    (alone,) = discriminator(real)
    for seed in (1, 2):
        beside, _ = discriminator(real, images(2, 3, 16, 16, seed=seed))
        torch.testing.assert_close(beside, alone)


def test_the_patch_discriminator_gives_each_batch_its_own_logits():
    discriminator = PatchDiscriminator(3, 4, 2).eval()
    real, fake = images(2, 3, 16, 16), images(2, 3, 16, 16, seed=1)
    for logits, batch in zip(discriminator(real, fake), (real, fake), strict=True):
        torch.testing.assert_close(logits, discriminator(batch)[0])


# ---------------------------------------------------------------------- losses and regularizers


def test_logistic_losses():
    discriminator, generator = LOSSES["logistic"]
    real, fake = torch.tensor([2.0, -1.0]), torch.tensor([0.5, -3.0])
    real_terms = (math.log(1 + math.exp(-2)) + math.log(1 + math.e)) / 2
    fake_terms = (math.log(1 + math.exp(0.5)) + math.log(1 + math.exp(-3))) / 2
    assert discriminator(real, fake).item() == pytest.approx(real_terms + fake_terms)
    assert generator(fake).item() == pytest.approx((math.log(1 + math.exp(-0.5)) + math.log(1 + math.exp(3))) / 2)
    undecided = torch.zeros(3)
    assert discriminator(undecided, undecided).item() == pytest.approx(2 * math.log(2))
    sure = torch.tensor([-200.0], requires_grad=True)  # a generator that is always detected still gets gradients
    generator(sure).backward()
    assert sure.grad.item() == pytest.approx(-1)


def test_r1_is_the_mean_squared_gradient():
    """Linear discriminator: squared norm of its weight. Style discriminator: equal to finite differences."""
    weight = images(1, 3, 8, 8)
    pixels = images(5, 3, 8, 8, seed=1).requires_grad_()
    penalty = gradient_penalty((pixels * weight).sum((1, 2, 3)), pixels)
    torch.testing.assert_close(penalty, weight.square().sum())

    discriminator = style(1, (8, 8), width=2).double().eval()
    pixels = images(2, 1, 8, 8).double().requires_grad_()
    penalty = gradient_penalty(discriminator(pixels)[0], pixels)
    total, step = 0.0, 1e-6
    for index in range(pixels.numel()):
        shift = functional.one_hot(torch.tensor(index), pixels.numel()).view(pixels.shape) * step
        with torch.no_grad():
            above, below = discriminator(pixels + shift)[0].sum(), discriminator(pixels - shift)[0].sum()
        total += ((above - below).item() / (2 * step)) ** 2
    assert penalty.item() == pytest.approx(total / 2, rel=1e-4)


def test_the_gradient_of_r1_is_what_differences_of_the_penalty_give():
    discriminator = style(1, (8, 8), width=2).double().eval()
    pixels = images(2, 1, 8, 8).double().requires_grad_()
    gradient_penalty(discriminator(pixels)[0], pixels).backward()
    for name in ("from_rgb", "compare"):
        weight = discriminator.get_submodule(name).parametrizations.weight.original
        values = []
        for shift in (1e-6, -1e-6):
            weight.data.view(-1)[1] += shift
            values.append(gradient_penalty(discriminator(pixels)[0], pixels).item())
            weight.data.view(-1)[1] -= shift
        difference = (values[0] - values[1]) / 2e-6
        assert weight.grad.view(-1)[1].item() == pytest.approx(difference, rel=1e-3)


def test_lecam_pulls_to_the_other_mean_and_is_zero_there():
    lecam = LeCam()
    lecam.update(torch.tensor(2.0), torch.tensor(-1.0))
    lecam.update(torch.tensor(4.0), torch.tensor(-3.0))
    assert lecam.real.item() == pytest.approx(0.99 * 0.02 + 0.04)
    assert lecam.fake.item() == pytest.approx(-(0.99 * 0.01 + 0.03))
    assert lecam(lecam.fake.expand(3), lecam.real.expand(3)) == 0
    assert lecam(lecam.fake.expand(3) - 5, lecam.real.expand(3) + 5) == 0  # the wrong direction is not overfitting
    real, fake = torch.tensor([1.0, 3.0]), torch.tensor([-2.0, 0.0])
    oracle = sum((x - lecam.fake.item()) ** 2 for x in (1.0, 3.0)) + sum((lecam.real.item() - x) ** 2 for x in (-2, 0))
    assert lecam(real, fake).item() == pytest.approx(oracle / 2)
    restored = LeCam()
    restored.load_state_dict(lecam.state_dict())
    assert torch.equal(restored(real, fake), lecam(real, fake))


# ---------------------------------------------------------------------- within one training step


@pytest.mark.parametrize("accumulate", [1, 3])
def test_r1_comes_every_nth_update_and_counts_n_times(tiny, accumulate):
    keys = ["tokenizer_training.r1_every=3", f"tokenizer_training.accumulate_batches={accumulate}"]
    module = module_of(tiny, *keys).eval()
    pixels = images(4, 3, 16, 16)
    due = []
    for module.batches_seen in range(7 * accumulate):
        terms, logs, _ = module.loss_terms(pixels)
        due.append("r1" in terms)
        assert logs["loss/r1"] > 0  # every log entry has the latest value
    assert due == [step % 3 == 0 for step in range(7) for _ in range(accumulate)]
    needing = pixels.clone().requires_grad_()
    penalty = gradient_penalty(module.discriminator(needing)[0], needing)
    torch.testing.assert_close(terms["r1"], 4.0 / 2 * penalty * 3)
    assert not pixels.requires_grad


def test_one_backward_pass_gives_each_network_its_own_loss_only(tiny):
    """Gradients of the summed loss equal those of the generator's and the discriminator's terms separately."""
    module = module_of(tiny).eval()
    module.batches_seen = 4  # the adversarial loss is active, and R1 is due
    module.lecam.update(torch.tensor(3.0), torch.tensor(-3.0))
    pixels = images(4, 3, 16, 16)

    def gradients(names):
        module.zero_grad()
        terms, _, _ = module.loss_terms(pixels)
        assert {"r1", "lecam", "discriminator", "adversarial"} <= set(terms)
        sum(term for name, term in terms.items() if names is None or name in names).backward()
        parts = (module.tokenizer, module.discriminator)
        return [[None if p.grad is None else p.grad.clone() for p in part.parameters()] for part in parts]

    critics = {"discriminator", "r1", "lecam"}
    both, critic = gradients(None), gradients(critics)
    generator = gradients({"pixel", "commitment", "codebook", "adversarial"})
    assert all(gradient is None for gradient in (*critic[0], *generator[1]))
    for ours, apart in ((both[0], generator[0]), (both[1], critic[1])):
        for a, b in zip(ours, apart, strict=True):
            torch.testing.assert_close(a, b)
    without = gradients({"discriminator"})[1]
    for name in ("r1", "lecam"):  # each of them has an effect
        other = gradients({"discriminator", name})[1]
        assert any(not torch.allclose(a, b, atol=1e-7) for a, b in zip(without, other, strict=True))


def test_r1_stays_in_float32_under_autocast(tiny):
    module = module_of(tiny).eval()
    pixels = images(4, 3, 16, 16)
    exact, _, _ = module.loss_terms(pixels)
    with torch.autocast("cpu", torch.bfloat16):
        lowered, _, _ = module.loss_terms(pixels)
    assert all(value.dtype == torch.float32 for value in lowered.values())
    assert torch.equal(lowered["r1"], exact["r1"])


def test_without_lecam_a_checkpoint_has_no_means(tiny):
    assert not any("lecam" in name for name in module_of(tiny, "tokenizer_training.lecam_weight=0").state_dict())
    names = [name for name in module_of(tiny).state_dict() if name.startswith("lecam")]
    assert names == ["lecam.real", "lecam.fake"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("discriminator=wave", "tokenizer_training.discriminator='wave'; allowed: patch, style"),
        ("adversarial_loss=square", "tokenizer_training.adversarial_loss='square'; allowed: hinge, logistic"),
        ("r1_every=0", "tokenizer_training.r1_every=0; allowed: 1 or more"),
    ],
)
def test_a_mistake_in_the_config_is_one_line(tiny, override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(tiny, [f"tokenizer_training.{override}"])


# ---------------------------------------------------------------------- whole trainings


def test_the_command_trains_with_it_and_logs_its_terms(tmp_path, tiny, monkeypatch):
    logged = {}
    monkeypatch.setattr(TokenizerModule, "_log", lambda self, values, step: logged.setdefault(step, values))
    assert main(["train-tokenizer", str(tiny), f"run={tmp_path}/run", *STYLE]) == 0
    path = tmp_path / "run/tokenizer/tokenizer.safetensors"
    assert read_weights(path)[0]["steps"] == 6
    assert {"loss/r1", "weighted/r1", "loss/lecam", "weighted/lecam", "loss/discriminator"} <= set(logged[5])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_training_has_the_means_and_weights_of_an_uninterrupted_one(tmp_path, tiny, monkeypatch, accumulate):
    keys = [*STYLE, f"tokenizer_training.accumulate_batches={accumulate}"]
    states = []
    monkeypatch.setattr(TokenizerModule, "on_train_end", lambda self: states.append(self.state_dict()), raising=False)
    train_tokenizer(load_config(tiny, [f"run={tmp_path}/whole", *keys]))
    config = load_config(tiny, [f"run={tmp_path}/broken", *keys])
    original = TokenizerModule.training_step

    def stopping(self, batch, batch_idx):
        if self.batches_seen == 5 * accumulate - 1:
            raise Killed
        return original(self, batch, batch_idx)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(TokenizerModule, "training_step", stopping)
        train_tokenizer(config)
    train_tokenizer(config)
    whole, resumed = states
    assert whole["lecam.real"] != 0
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


def test_two_processes_train_like_one_on_the_joined_batch(tmp_path, tiny):
    """With four images per process, its minibatch deviation group is also a group of the joint batch."""
    without_codebook(tiny)
    common = [*STYLE, "tokenizer_training.max_steps=3", "tokenizer_training.adversarial_start=0"]
    (one,) = run_ddp(tmp_path, tiny, "one", *common, "tokenizer_training.batch_size_per_device=8")
    two = run_ddp(tmp_path, tiny, "two", *common, "trainer.devices=2")
    assert len(two) == 2
    for name, tensor in one.items():
        assert torch.equal(two[0][name], two[1][name]), name
        torch.testing.assert_close(two[0][name], tensor, atol=1e-5, rtol=1e-5, msg=name)
