"""Quantizers: ids and features agree, gradients pass, codes stay in use, large vocabularies become several fields."""

import math
from itertools import pairwise

import pytest
import torch

from stages.factory import QUANTIZERS, build_quantizer
from stages.measures.codes import perplexity
from stages.tokenizer.quantizers import (
    BSQConfig,
    CosineVQConfig,
    FSQConfig,
    LFQConfig,
    ResidualVQConfig,
    SimVQConfig,
)
from stages.tokenizer.quantizers.digits import cut
from stages.tokenizer.quantizers.quantizer import full_precision

CONFIGS = {
    "fsq": FSQConfig(levels=[8, 5, 5, 5]),
    "fsq, two numbers": FSQConfig(levels=[2, 3]),
    "fsq, two fields": FSQConfig(levels=[8] * 6),
    "lfq": LFQConfig(bits=10),
    "lfq, two fields": LFQConfig(bits=18),
    "bsq": BSQConfig(bits=6, bits_per_field=4),
    "cosine": CosineVQConfig(codes=50, code_dim=8),
    "cosine, rotation": CosineVQConfig(codes=50, code_dim=8, gradient="rotation"),
    "simvq": SimVQConfig(codes=50, code_dim=8),
    "simvq, rotation": SimVQConfig(codes=50, code_dim=8, gradient="rotation"),
    "residual": ResidualVQConfig(codes=20, code_dim=8, depth=3),
    "residual, rotation": ResidualVQConfig(codes=20, code_dim=8, depth=2, gradient="rotation"),
}
WEIGHTS = {"commitment": 0.25, "codebook": 1.0, "entropy": 0.1}


def make(config, width_out=24):
    torch.manual_seed(0)
    return build_quantizer(config, 16, width_out)


def noise(seed, batch=16):
    """Features float32 [batch, 64, 16]."""
    return torch.randn(batch, 64, 16, generator=torch.Generator().manual_seed(seed))


def train(quantizer, steps=150, weights=WEIGHTS):
    """Train a quantizer of width 16 to reconstruct its input; returns (mean squared error, ids) of other features."""
    optimizer = torch.optim.Adam(quantizer.train().parameters(), 3e-3)
    for step in range(steps):
        x = noise(step)
        result = quantizer(x)
        loss = (result.features - x).square().mean()
        loss = loss + sum(weights[name] * value for name, value in result.losses.items())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x = noise(10**6, batch=64)
    with torch.no_grad():
        result = quantizer.eval()(x)
        return float((result.features - x).square().mean()), result.ids


def use(ids, field=0, codes=64):
    """(share of codes that occur, perplexity) of a field of ids [B, N, F]."""
    counts = torch.bincount(ids[..., field].flatten(), minlength=codes)
    return float((counts > 0).float().mean()), perplexity(counts)


def test_every_kind_is_here():
    assert {config.kind for config in CONFIGS.values()} == set(QUANTIZERS)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_lookup_of_ids_is_what_was_quantised(config):
    quantizer = make(config).eval()
    x = torch.randn(3, 40, 16) * 3
    result = quantizer(x)
    assert result.features.shape == (3, 40, 24) and result.ids.shape == (3, 40, len(quantizer.fields))
    torch.testing.assert_close(quantizer.lookup(result.ids), result.features, atol=1e-5, rtol=1e-5)
    assert torch.equal(quantizer.ids(x), result.ids)
    for index, field in enumerate(quantizer.fields):
        assert result.ids[..., index].min() >= 0 and result.ids[..., index].max() < field.vocabulary_size


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_id_is_a_code_of_its_own_that_is_chosen_for_itself(config):
    """For the residual quantizer, a sum of codes may be closer to another first code, so its ids are not unique."""
    quantizer = make(config).eval()
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(field.vocabulary_size, (1, 500), generator=generator) for field in quantizer.fields]
    ids = torch.stack(drawn, dim=-1)
    codes = quantizer.codes(ids)
    assert codes.dtype == torch.float32 and codes.shape[:2] == (1, 500)
    assert len(codes[0].unique(dim=0)) == len(ids[0].unique(dim=0))
    if config.kind == "fsq":
        codes = codes * (quantizer.levels // 2)
    if config.kind != "residual":
        assert torch.equal(quantizer.choose(codes), ids)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_gradients_reach_the_encoder_and_every_parameter(config):
    quantizer = make(config).train()
    x = torch.randn(4, 64, 16, requires_grad=True)
    result = quantizer(x)
    (result.features.square().mean() + sum(result.losses.values(), torch.zeros(()))).backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    assert all(parameter.grad is not None for parameter in quantizer.parameters())


def test_fsq_reaches_every_code_and_each_id_is_another_vector():
    quantizer = make(FSQConfig(levels=[4, 3])).eval()
    quantizer.project_in = torch.nn.Identity()
    ids = quantizer(torch.randn(1, 4000, 2) * 2).ids
    assert ids.unique().tolist() == list(range(12))
    vectors = quantizer.lookup(torch.arange(12).view(1, 12, 1))[0]
    assert len(torch.unique(vectors, dim=0)) == 12


@pytest.mark.parametrize("levels", [[1200, 8], [2048, 8], [1001, 5], [8, 5]])
def test_saturated_numbers_take_the_outermost_values_of_any_number_of_levels(levels):
    """For large L, the bound 1.001 (L - 1) / 2 is past a rounding boundary."""
    quantizer = make(FSQConfig(levels=levels), width_out=2).eval()
    quantizer.project_in = quantizer.project_out = torch.nn.Identity()
    features = torch.randn(1, 4000, 2, generator=torch.Generator().manual_seed(1)) * 60
    result = quantizer(features)
    assert result.ids.min() >= 0 and result.ids.max() < math.prod(levels)
    assert torch.equal(quantizer.ids(features), result.ids)
    assert torch.equal(quantizer.lookup(result.ids), result.features)
    outermost = torch.tensor([[(level - 1) // 2 for level in levels], [-(level // 2) for level in levels]])
    saturated = quantizer(torch.tensor([[[60.0, 60.0], [-60.0, -60.0]]]))
    assert torch.equal(saturated.features[0] * (quantizer.levels // 2), outermost.float())
    assert quantizer.margins(features).min() >= 0


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_autocast_changes_neither_ids_nor_losses(config):
    quantizer = make(config).eval()
    x = torch.randn(2, 100, 16)
    with torch.autocast("cpu", torch.bfloat16):
        lowered = quantizer(x)
    exact = quantizer(x)
    assert torch.equal(lowered.ids, exact.ids)
    assert all(torch.equal(lowered.losses[name], exact.losses[name]) for name in exact.losses)


@pytest.mark.parametrize("allowed", ["highest", "high", "medium"])
def test_no_tf32_on_gpus_while_a_quantiser_works_and_the_setting_comes_back(allowed):
    """The setting is global to the process, so it can be tested without a GPU."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(allowed)
    try:
        with pytest.raises(KeyError), full_precision(torch.device("cuda")):
            assert torch.get_float32_matmul_precision() == "highest"
            assert not torch.backends.cuda.matmul.allow_tf32
            raise KeyError
        assert torch.get_float32_matmul_precision() == allowed
        with full_precision(torch.device("cpu")):
            assert torch.get_float32_matmul_precision() == allowed
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_compiled_quantiser_is_one_graph_with_the_same_ids(config):
    quantizer = make(config).eval()
    torch.compiler.reset()  # otherwise one function of many classes exceeds the recompile limit
    compiled = torch.compile(quantizer.ids, backend="eager", fullgraph=True)
    assert torch.equal(compiled(noise(0)), quantizer.ids(noise(0)))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_what_moves_less_than_its_margin_keeps_its_id(config):
    """A margin is 0 at a decision boundary: an encoding moved towards another code changes its id only there."""
    quantizer = make(config).eval()
    with torch.no_grad():
        start, end = (quantizer.encodings(noise(seed)) for seed in (1, 2))
        shares = torch.linspace(0, 1, 2001)[:, None, None]
        path = start[0, :40] * (1 - shares) + end[0, :40] * shares
        ids, margins = quantizer.choose(path), quantizer.distances(path)
    changed = (ids[1:] != ids[:-1]).any(-1)
    near = torch.minimum(margins[1:], margins[:-1])
    assert margins.min() >= 0 and changed.sum() > 20
    assert near[changed].max() < 0.05 * margins.median()


# ---------------------------------------------------------------------- fields


@pytest.mark.parametrize(
    ("sizes", "most", "lengths"),
    [
        ([2] * 18, 2**16, [9, 9]),
        ([2] * 18, 2**10, [9, 9]),
        ([2] * 16, 2**16, [16]),
        ([2] * 10, 2**9, [5, 5]),
        ([2] * 5, 2, [1] * 5),
        ([8, 5, 5, 5], 2**16, [4]),
        ([8] * 6, 2**16, [3, 3]),
        ([16, 2, 2, 2, 2], 64, [1, 4]),
    ],
)
def test_numbers_are_cut_into_the_fewest_and_most_even_fields(sizes, most, lengths):
    assert cut(sizes, most) == lengths


@pytest.mark.parametrize("config", [LFQConfig(bits=18), BSQConfig(bits=18), FSQConfig(levels=[8] * 6)])
def test_2_to_the_18_codes_are_two_fields_of_512(config):
    """Each of the 2^18 codes has its own pair of ids, and both directions are exact."""
    quantizer = make(config)
    assert [field.vocabulary_size for field in quantizer.fields] == [512, 512]
    every = torch.stack(torch.meshgrid(torch.arange(512), torch.arange(512), indexing="ij"), dim=-1).view(1, -1, 2)
    codes = quantizer.codes(every)
    encodings = codes * (quantizer.levels // 2) if config.kind == "fsq" else codes
    assert torch.equal(quantizer.choose(encodings), every)
    if config.kind == "bsq":
        torch.testing.assert_close(codes.norm(dim=-1), torch.ones(1, 2**18))


def test_lfq_takes_signs_and_bsq_signs_on_the_sphere():
    lfq, bsq = make(LFQConfig(bits=3)), make(BSQConfig(bits=3))
    numbers = torch.tensor([[[0.2, -3.0, 0.1], [-0.5, 0.5, 0.5]]])
    ids = lfq.choose(numbers)
    assert ids.tolist() == [[[1 + 4], [2 + 4]]]
    signs = torch.tensor([[[1.0, -1, 1], [-1, 1, 1]]])
    assert torch.equal(lfq.codes(ids), signs)
    torch.testing.assert_close(bsq.codes(ids), signs / math.sqrt(3))
    on_sphere = bsq.encodings(torch.randn(2, 9, 16)) / math.sqrt(3)
    torch.testing.assert_close(on_sphere.norm(dim=-1), torch.ones(2, 9))
    assert (bsq.codes(bsq.choose(on_sphere)) - on_sphere).norm(dim=-1).max() < math.sqrt(2)


# ---------------------------------------------------------------------- codebooks


@pytest.mark.parametrize("config", [CosineVQConfig, ResidualVQConfig])
def test_codebooks_start_from_data_and_revive_dead_codes(config):
    quantizer = make(config(codes=64, code_dim=8, revive_every=5, revive_below=0.1)).train()
    found = {True: set(), False: set()}
    for revives in found:
        for step in range(600):
            x = torch.randn(4, 64, 16, generator=torch.Generator().manual_seed(step))
            if step == 0:  # most rows of the first codebook start far from all data
                quantizer(x)
                first = quantizer.codebook if config is CosineVQConfig else quantizer.codebooks[0]
                first.config.revive_every = 5 * revives
                with torch.no_grad():
                    first.weight[:60] = 0.1 * first.weight[60] + 5
            ids = quantizer(x).ids
            if step >= 590:
                found[revives] |= set(ids[..., 0].flatten().tolist())
    assert len(found[True]) >= 50 and len(found[False]) <= 6


@pytest.mark.parametrize("config", [CosineVQConfig, ResidualVQConfig])
def test_revived_rows_reach_the_average_once(config):
    quantizer, average = make(config(codes=8, code_dim=4)).train(), make(config(codes=8, code_dim=4))
    quantizer(torch.randn(2, 16, 16))
    mine, averaged = dict(quantizer.named_parameters()), dict(average.named_parameters())
    books = [name for name in mine if "codebook" in name]
    assert books and not any(torch.equal(mine[name], averaged[name]) for name in books)
    quantizer.copy_revived(average)
    assert all(torch.equal(mine[name], averaged[name]) for name in books)
    with torch.no_grad():
        mine[books[0]].add_(1)
    quantizer.copy_revived(average)
    assert not torch.equal(mine[books[0]], averaged[books[0]])


def test_simvq_begins_with_the_codes_that_were_drawn():
    quantizer = make(SimVQConfig(codes=64, code_dim=8))
    assert torch.equal(quantizer.rows, quantizer.frozen)
    assert torch.equal(quantizer.codes(torch.arange(64).view(1, 64, 1))[0], quantizer.frozen)


def test_simvq_moves_all_codes_where_a_learned_codebook_leaves_most_behind():
    """Both start far from the data; without revival only the chosen rows of a learned codebook move."""
    learned = make(ResidualVQConfig(codes=64, code_dim=8, depth=1, revive_every=0), 16)
    learned.codebooks[0].started.fill_(True)
    moved = make(SimVQConfig(codes=64, code_dim=8), 16)
    frozen = moved.frozen.clone()
    with torch.no_grad():
        moved.map.bias += 2
        learned.codebooks[0].weight.copy_(moved.rows)
    before = use(moved.ids(noise(0)))[0]
    (_, stuck), (_, ids) = train(learned, 400), train(moved, 400)
    assert before < 0.2 and use(stuck)[0] < 0.4
    assert use(ids)[0] > 0.7 and use(ids)[1] > 3 * use(stuck)[1]
    assert torch.equal(moved.frozen, frozen) and "frozen" not in dict(moved.named_parameters())


def test_the_error_of_residual_quantisation_falls_with_depth():
    errors = [train(make(ResidualVQConfig(codes=16, code_dim=16, depth=depth), 16))[0] for depth in (1, 2, 3, 4)]
    assert all(later < 0.9 * earlier for earlier, later in pairwise(errors))


def test_residual_codes_are_sums_of_what_is_left_at_every_stage():
    quantizer = make(ResidualVQConfig(codes=9, code_dim=4, depth=3)).eval()
    encodings = torch.randn(2, 30, 4)
    left, total, ids = encodings, 0, []
    for codebook in quantizer.codebooks:
        ids.append(torch.cdist(left, codebook.weight.expand(2, -1, -1)).argmin(-1))
        code = codebook.weight[ids[-1]]
        left, total = left - code, total + code
    assert torch.equal(quantizer.choose(encodings), torch.stack(ids, -1))
    torch.testing.assert_close(quantizer.codes(torch.stack(ids, -1)), total)


@pytest.mark.parametrize("config", [LFQConfig, BSQConfig])
def test_the_entropy_term_brings_unused_codes_into_use(config):
    """Starts from a state in which every token has the same signs."""
    found = []
    for weight in (0.0, 0.1):
        quantizer = make(config(bits=6), 16)
        with torch.no_grad():
            quantizer.project_in.bias += 1
            quantizer.project_in.weight *= 0.5
        assert use(quantizer.ids(noise(0)))[1] < 2
        ids = train(quantizer, weights=WEIGHTS | {"entropy": weight})[1]
        found.append(use(ids)[1])
    assert found[1] > 1.3 * found[0] > 10


# ---------------------------------------------------------------------- invalid input


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("shape", [(1, 0), (0, 7)])
def test_no_tokens_have_no_features(config, shape):
    quantizer = make(config)
    ids = torch.zeros(*shape, len(quantizer.fields), dtype=torch.int64)
    assert quantizer.lookup(ids).shape == (*shape, 24)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("wrong", [-1, 5000])
def test_ids_out_of_range_are_refused(config, wrong):
    quantizer = make(config)
    ids = torch.zeros(1, 1, len(quantizer.fields), dtype=torch.int64)
    ids[..., -1] = wrong
    with pytest.raises(ValueError, match=f"id {wrong} of field {quantizer.fields[-1].name}; allowed: 0 to"):
        quantizer.lookup(ids)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (FSQConfig(levels=[8, 1]), "levels"),
        (FSQConfig(levels=[2**17]), "levels"),
        (CosineVQConfig(codes=1), "codes=1"),
        (SimVQConfig(codes=1), "codes=1"),
        (ResidualVQConfig(codes=1), "codes=1"),
        (ResidualVQConfig(depth=0), "depth=0"),
        (SimVQConfig(gradient="reinforce"), "gradient='reinforce'; allowed: straight-through, rotation"),
        (LFQConfig(bits=0), "bits=0"),
        (BSQConfig(entropy_group_bits=0), "entropy_group_bits=0"),
    ],
)
def test_configs_that_make_no_sense_are_refused(config, words):
    with pytest.raises(ValueError, match=words) as caught:
        make(config)
    assert "\n" not in str(caught.value)
