"""``prior.order=scale``: nothing leaks, rounds with a cache are the full pass, and what is known has its say."""

import math
from dataclasses import replace

import pytest
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from data.layout import Field, Scale, TokenLayout, Tokens
from stages.contract import Prompts
from stages.prior.rounds import mask_of_samples, random_mask, rounds_of, still_open
from stages.prior.sampling import SamplingConfig, sample
from stages.prior.scalewise import ScalewisePrior
from stages.weights import load_prior, save_prior
from tests.reliability.commands import CONTEXT
from tests.stages.bitplanes import codec
from tests.stages.test_prior import tokens
from tests.stages.toys import layout, prior, same_weights
from tests.waiting import PATIENCE

LABELS = Prompts.of_labels(torch.tensor([0, 2, -1]))
OPEN = torch.tensor([[0, 2, 3, 5, 7, 8, 11], [1, 2, 3, 4, 5, 6, 9], [0, 1, 2, 3, 6, 10, 11]])


def masked():
    """bool [3, 12]: some of each scale, seven of each row."""
    return torch.zeros(3, 12, dtype=torch.bool).scatter_(1, OPEN, True)


def uneven(num_fields=1):
    """Scales of 1, 6 and 4 elements."""
    base = layout(num_fields=num_fields).scales
    grids = ((1, 1), (2, 3), (2, 2))
    return TokenLayout(tuple(replace(s, grid=g, length=g[0] * g[1]) for s, g in zip(base, grids, strict=True)))


def test_order_scale_is_a_prior_of_its_own():
    model = prior(layout(), order="scale")
    assert isinstance(model, ScalewisePrior) and model.writes_prefixes and not model.likelihood
    output = model(tokens(layout()), LABELS)
    assert torch.equal(output.nll[..., 0] > 0, output.judged) and 0 < output.judged.sum() < 36
    assert torch.equal(output.nll, model(tokens(layout()), LABELS).nll)  # held-out masks are always the same
    with pytest.raises(ValueError, match="no likelihood"):
        model.nll(tokens(layout()), LABELS)
    with pytest.raises(ValueError, match="12 elements|end inside a scale"):
        model(tokens(layout()).prefix(6), LABELS)


def test_no_tensor_of_a_training_pass_is_larger_or_smaller_for_its_mask():
    """Ever other sizes fragment a CPU's memory: 33 MB an update were lost so."""
    model, given = prior(layout(), order="scale").train(), tokens(layout())

    def judge(seed):
        """(how many elements were judged, the shapes of all that the backward pass needs)"""
        shapes = []
        torch.manual_seed(seed)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: (shapes.append(x.shape), x)[1], lambda x: x):
            return int(model(given, LABELS).judged.sum()), shapes

    judged, shapes = zip(*map(judge, range(4)), strict=True)
    assert len(set(judged)) > 1 and len(shapes[0]) > 10
    assert all(each == shapes[0] for each in shapes)


def test_the_cost_of_a_sample_does_not_know_its_batch():
    model, given = prior(layout(num_fields=2), order="scale"), tokens(layout(num_fields=2))
    together = model(given, LABELS)
    for rows in (slice(0, 1), slice(1, 2), slice(2, 3), slice(1, 3)):
        some = model(given[rows], LABELS[rows])
        assert torch.equal(some.judged, together.judged[rows])
        torch.testing.assert_close(some.nll, together.nll[rows], atol=1e-5, rtol=1e-5)
    assert len(together.judged.unique(dim=0)) == 3  # each has a mask of its own
    assert len(model(given[:0], LABELS[:0]).nll) == 0


@pytest.mark.parametrize("place", [0, 1, 4, 6, 8, 9])
def test_nothing_leaks(place):
    """Another id at a place changes its own cost, and that of others only where the place is seen: bit for bit."""
    model, given, open_ = prior(layout(), order="scale"), tokens(layout()), masked()
    other = Tokens.fixed(given.ids.clone())
    other.ids[:, place] = (other.ids[:, place] + 1) % 11
    before, after = (model.judge_masked(each, LABELS, open_).nll[..., 0] for each in (given, other))
    scales = torch.arange(12) // 4
    mine = place // 4
    for row in range(3):
        changed = before[row] != after[row]
        hidden = bool(open_[row, place])
        finer, same = open_[row] & (scales > mine), open_[row] & (scales == mine) & (torch.arange(12) != place)
        assert not changed[scales < mine].any()
        assert bool(changed[finer].all()) and bool(changed[place]) == hidden
        assert bool(changed[same].all()) == (not hidden) or not same.any()
        if hidden:
            assert not changed[same].any()


def test_a_scale_of_which_nothing_is_masked_is_its_clean_copy():
    """Masks of coarser scales do not matter to a finer one: it sees their clean copies."""
    model, given, open_ = prior(layout(), order="scale"), tokens(layout()), masked()
    less = open_.clone()
    less[:, :8] = False
    full, part = (model.judge_masked(given, LABELS, each).nll[:, 8:] for each in (open_, less))
    assert torch.equal(full, part)
    beginning = model.judge_masked(given.prefix(8), LABELS, open_[:, :8]).nll
    torch.testing.assert_close(beginning, model.judge_masked(given, LABELS, open_).nll[:, :8])


@pytest.mark.parametrize("num_fields", [1, 2])
@pytest.mark.parametrize("forced", [0, 1, 2])
@pytest.mark.parametrize("of", [layout, uneven])
def test_cached_rounds_equal_the_full_pass(of, num_fields, forced):
    of = of(num_fields=num_fields)
    model, given = prior(of, order="scale"), tokens(of)
    begun = of.prefix_length(forced)
    state = model.begin(LABELS, given.prefix(begun) if forced else None, of.length)
    generator = torch.Generator().manual_seed(0)
    for number in range(forced, 3):
        start, stop = of.prefix_length(number), of.prefix_length(number + 1)
        for _ in range(0 if number == 1 and not forced else 3):  # a scale that is known needs no look
            open_ = random_mask(3, [of.scales[number].length], torch.device("cpu"), generator)
            everywhere = torch.zeros(3, of.length, dtype=torch.bool)
            everywhere[:, start:stop] = open_
            full = model.judge_masked(given, LABELS, everywhere).nll[:, start:stop][open_]
            part = given.ids[:, start:stop]
            model.look(state, part.masked_fill(open_.unsqueeze(-1), 0), open_)
            for field in range(num_fields):
                wanted = part[open_]
                logits = model.logits(state, wanted[:, :field])
                nll = -logits.log_softmax(-1).gather(1, wanted[:, field : field + 1])[:, 0]
                torch.testing.assert_close(nll, full[:, field], atol=1e-5, rtol=1e-5)
        model.advance(state, given.ids[:, start:stop])


def test_each_round_computes_its_own_scale_alone(monkeypatch):
    model, seen = prior(layout(), order="scale"), []
    blocks = ScalewisePrior._blocks
    monkeypatch.setattr(model, "_blocks", lambda x, *a, **k: (seen.append(x.shape[1]), blocks(model, x, *a, **k))[1])
    sample(model, LABELS, SamplingConfig(rounds=[3, 2, 1]), range(3))
    states = model.condition.num_states
    # the condition with the first round; a finished scale with the first round of the next one
    assert seen == [states + 4, 4, 4, 4 + 4, 4, 4 + 4]


@pytest.mark.parametrize("num_fields", [1, 2])
def test_seeds_do_not_know_the_batch(num_fields):
    model = prior(layout(num_fields=num_fields), order="scale")
    settings = SamplingConfig(guidance=1.5, guidance_schedule="cosine", top_k=[5], top_p=[0.9], temperature=[1, 0.9, 2])
    together = sample(model, LABELS, settings, range(3)).ids
    alone = [sample(model, LABELS[row : row + 1], settings, [row]).ids for row in range(3)]
    assert torch.equal(together, torch.cat(alone))
    assert not torch.equal(together, sample(model, LABELS, settings, range(3, 6)).ids)
    # nor whether other rows have less to write
    keep = torch.zeros(3, 12, dtype=torch.bool)
    keep[0, :6], keep[1, 5:9] = True, True
    known = tokens(layout(num_fields=num_fields))
    some = sample(model, LABELS, settings, range(3), known=known, keep=keep).ids
    assert torch.equal(some[keep], known.ids[keep]) and torch.equal(some[2], together[2])
    one = sample(model, LABELS[:1], settings, [0], known=known[:1], keep=keep[:1]).ids
    assert torch.equal(one[0], some[0])


def test_what_is_given_stays_and_a_part_of_the_scales_is_the_same():
    model, known = prior(layout(), order="scale"), tokens(layout())
    full = sample(model, LABELS, SamplingConfig(), range(3)).ids
    for scales in (1, 2):
        part = sample(model, LABELS, SamplingConfig(scales=scales), range(3)).ids
        assert torch.equal(part, full[:, : 4 * scales])
        beginning = Tokens.fixed(full[:, : 4 * scales])
        assert torch.equal(sample(model, LABELS, SamplingConfig(), range(3), prefix=beginning).ids, full)
    other = sample(model, LABELS, SamplingConfig(), range(3), prefix=known.prefix(4)).ids
    assert torch.equal(other[:, :4], known.ids[:, :4]) and not torch.equal(other[:, 4:], full[:, 4:])
    assert torch.equal(sample(model, LABELS, SamplingConfig(), range(3), prefix=known).ids, known.ids)
    # a prefix may end inside a scale: here that is a place kept like any other
    inside = sample(model, LABELS, SamplingConfig(), range(3), prefix=known.prefix(6)).ids
    assert torch.equal(inside[:, :6], known.ids[:, :6])


def test_what_is_kept_behind_a_place_has_a_say_in_it():
    """Unlike in token order: with the last place of a scale kept, its first ones are drawn given it."""
    model, known = prior(layout(scales=1), order="scale"), tokens(layout(scales=1))
    keep = torch.zeros(3, 4, dtype=torch.bool)
    keep[:, 3] = True
    greedy = SamplingConfig(temperature=[0.0], rounds=[1])
    made = sample(model, LABELS, greedy, range(3), known=known, keep=keep).ids
    open_ = ~keep
    for row in range(3):
        for place in range(3):
            costs = []
            for code in range(11):
                ids = made.clone()
                ids[row, place] = code
                costs.append(model.judge_masked(Tokens.fixed(ids), LABELS, open_).nll[row, place].item())
            assert int(made[row, place]) == costs.index(min(costs))


def test_guidance_of_one_is_the_conditional_model_and_zero_the_unconditional():
    model = prior(layout(), order="scale")
    plain = sample(model, LABELS, SamplingConfig(), range(3)).ids
    unconditional = sample(model, LABELS.without(), SamplingConfig(), range(3)).ids
    assert not torch.equal(plain, unconditional)
    assert torch.equal(sample(model, LABELS, SamplingConfig(guidance=0.0), range(3)).ids, unconditional)


@pytest.mark.parametrize("held_out", [False, True])
def test_the_law_of_masks(held_out):
    generator = torch.Generator().manual_seed(0)
    if held_out:
        masks = mask_of_samples(torch.randint(4, (4000, 80, 1), generator=generator), [16, 64], 0)
    else:
        masks = random_mask(4000, [16, 64], torch.device("cpu"), generator)
    counts = [masks[:, :16].sum(1), masks[:, 16:].sum(1)]
    for count, length in zip(counts, (16, 64), strict=True):
        assert int(count.min()) >= 1 and int(count.max()) == length
        # of ceil(length cos(π u / 2)), u uniform: half a place above 2/π
        assert float(count.double().mean() / length) == pytest.approx(2 / math.pi + 0.5 / length, abs=0.015)
        below = (count.double() / length <= 0.5).double().mean()  # where u > 2/3
        assert float(below) == pytest.approx(1 / 3, abs=0.03)
    assert abs(float(torch.corrcoef(torch.stack(counts).double())[0, 1])) < 0.06  # each scale has its own share
    assert masks.double().mean(0).std() < 0.02  # every place as often


def test_rounds_keep_the_most_confident_and_decide_all_in_the_end():
    open_ = torch.ones(2, 8, dtype=torch.bool)
    open_[1, :3] = False
    wanted, generator = open_.sum(1), torch.Generator().manual_seed(0)
    left = []
    for turn in range(4):
        confidence = torch.rand(int(open_.sum()), generator=generator, dtype=torch.float64)
        now = still_open(open_, confidence, wanted, (turn + 1) / 4)
        assert not (now & ~open_).any()
        sure = torch.full(open_.shape, math.nan, dtype=torch.float64)
        sure[open_] = confidence
        for row in range(2):
            if now[row].any():
                assert sure[row][now[row]].max() <= sure[row][open_[row] & ~now[row]].min()
        open_ = now
        left.append(open_.sum(1).tolist())
    assert left == [[7, 4], [5, 3], [3, 1], [0, 0]]  # n cos(π/8), n cos(π/4), n cos(3π/8), 0, rounded down
    many = torch.ones(1, 2, dtype=torch.bool)
    assert still_open(many, torch.tensor([0.1, 0.2]).double(), torch.tensor([2]), 0.01).tolist() == [[True, False]]
    assert rounds_of([], 5) == [8, 2, 1, 1, 1] and rounds_of([3], 2) == [3, 3] and rounds_of([5, 4], 2) == [5, 4]


def one_place(order="scale", **keys):
    field = (Field("id", 4),)
    of = TokenLayout(tuple(Scale(f"s{k}", 1, (1, 1), 0, field, (2 << k, 2 << k)) for k in range(2)))
    return prior(of, order=order, **keys)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (one_place, "these scales have one token each"),
        (lambda: prior(codec().layout, order="scale"), "prior.order='scale'; allowed: natural, for streams"),
        (lambda: prior(layout(), order="scale", averaging="replace"), "prior.averaging=replace with prior.order=scale"),
        (lambda: prior(layout(), order="scale").compile_step(), "its steps are of many shapes"),
        (
            lambda: sample(prior(layout()), LABELS, SamplingConfig(rounds=[3]), range(3)),
            "prior.order=natural writes one element at a time",
        ),
        (
            lambda: sample(prior(layout(), order="scale"), LABELS, SamplingConfig(rounds=[3, 2]), range(3)),
            "sampling.rounds has 2 values; allowed: 1, or 3",
        ),
        (
            lambda: sample(prior(layout(), order="scale"), LABELS, SamplingConfig(rounds=[0]), range(3)),
            r"sampling.rounds=\[0\]; allowed: 1 to inf",
        ),
        (
            lambda: sample(prior(layout(), order="scale"), LABELS, SamplingConfig(confidence_noise=-1), range(3)),
            "sampling.confidence_noise=-1; allowed: 0 or more",
        ),
    ],
)
def test_what_cannot_work_is_refused(build, message):
    with pytest.raises(ValueError, match=message) as caught:
        build()
    assert "\n" not in str(caught.value)


def test_saved_and_loaded_is_the_same(tmp_path):
    model, path = prior(layout(num_fields=2), order="scale"), tmp_path / "prior.safetensors"
    save_prior(path, model, model.config, model.condition_config, {})
    loaded, _ = load_prior(path)
    assert isinstance(loaded, ScalewisePrior)
    given = tokens(layout(num_fields=2))
    assert same_weights(loaded, model)
    torch.testing.assert_close(loaded(given, LABELS).nll, model(given, LABELS).nll)
    assert torch.equal(
        sample(loaded, LABELS, SamplingConfig(), range(3)).ids, sample(model, LABELS, SamplingConfig(), range(3)).ids
    )


def source(count, generator):
    """Images of a toy world: the class and one coin decide the first scale, and every place doubles the one above."""
    labels = torch.randint(3, (count,), generator=generator)
    first = labels[:, None] + 3 * torch.randint(2, (count, 1), generator=generator) + torch.arange(4)
    ids = torch.cat([first, (first * 2) % 11, (first * 3 + 1) % 11], dim=1) % 11
    return Tokens.fixed(ids.unsqueeze(-1)), Prompts.of_labels(labels)


def test_it_learns_a_toy_world():
    """All is known but one coin of a sequence: the cost falls to it, and samples are possible ones of their class."""
    torch.manual_seed(0)
    model = prior(layout(), order="scale", width=48).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(160):
        output = model(*source(32, generator))
        loss = output.nll.sum() / output.judged.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(parameter.grad is not None for parameter in model.parameters())
    given, prompts = source(400, generator)
    output = model.eval()(given, prompts)
    bits = output.nll.detach()[..., 0] / math.log(2)
    mean = [float(bits[:, a : a + 4][output.judged[:, a : a + 4]].mean()) for a in (0, 4, 8)]
    # uniform ids cost log2(11) = 3.5 bits and more; the coin is open only where all of the first scale is masked
    assert mean[0] < 0.8 and max(mean[1:]) < 0.1
    made = sample(model, prompts, SamplingConfig(rounds=[4, 2, 1]), range(400)).ids[..., 0]
    coins = (made[:, 0] - prompts.labels) % 11
    possible = torch.isin(coins, torch.tensor([0, 3]))
    whole = (prompts.labels[:, None] + coins[:, None] + torch.arange(4)) % 11
    same = (made == torch.cat([whole, (whole * 2) % 11, (whole * 3 + 1) % 11], dim=1)).all(1) & possible
    assert same.double().mean() > 0.9
    assert 0.35 < (coins[same] == 3).double().mean() < 0.65


def gradients(model, given, prompts, open_, count):
    (model(given, prompts, open_).nll.sum() / count).backward()


class Judge(torch.nn.Module):
    """What DDP wraps: its forward is ``judge_masked``."""

    def __init__(self, prior):
        super().__init__()
        self.prior = prior

    def forward(self, given, prompts, open_):
        return self.prior.judge_masked(given, prompts, open_)


def rank(number, folder):
    """One of two processes, with one and two of three sequences' worth of masks: their shares differ."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=number, world_size=2)
    model = DistributedDataParallel(Judge(prior(layout(), order="scale")))
    given, open_ = four()
    mine = slice(2 * number, 2 * number + 2)
    count = open_[mine].sum().float()
    distributed.all_reduce(count)
    prompts = Prompts.of_labels(torch.tensor([0, 2, -1, 1]))[mine]
    gradients(model, given[mine], prompts, open_[mine], count / 2)  # the mean, as the LightningModule has it
    torch.save([parameter.grad for parameter in model.module.prior.parameters()], f"{folder}/{number}.pt")
    distributed.destroy_process_group()


def four():
    return tokens(layout(), batch=4), random_mask(4, [4, 4, 4], torch.device("cpu"), torch.Generator().manual_seed(3))


def test_two_processes_have_the_gradients_of_the_joint_batch(tmp_path):
    processes = [CONTEXT.Process(target=rank, args=(number, tmp_path)) for number in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE)
        assert process.exitcode == 0
    given, open_ = four()
    assert open_[:2].sum() != open_[2:].sum()
    model = Judge(prior(layout(), order="scale"))
    gradients(model, given, Prompts.of_labels(torch.tensor([0, 2, -1, 1])), open_, open_.sum())
    for number in (0, 1):
        for found, parameter in zip(torch.load(tmp_path / f"{number}.pt"), model.parameters(), strict=True):
            torch.testing.assert_close(found, parameter.grad, atol=1e-6, rtol=1e-4)
