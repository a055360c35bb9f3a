"""The prior: causal, conditioned, and equal with and without its cache."""

import pytest
import timm.layers as timm
import torch

from data.layout import Field, Scale, TokenLayout, Tokens
from stages.conditions.labels import ClassConditionConfig, NoConditionConfig
from stages.contract import Prompts
from stages.factory import build_prior
from stages.prior.blocks import SwiGLU
from stages.prior.transformer import TransformerPriorConfig
from stages.weights import WeightsError, check_pair, load_prior, load_tokenizer, save_prior, save_weights
from tests.stages.bitplanes import codec
from tests.stages.toys import layout, prior, same_weights

LABELS = Prompts.of_labels(torch.tensor([0, 2, -1]))


def classes(*ids):
    return Prompts.of_labels(torch.tensor(ids))


def tokens(layout, batch=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    sizes = [field.vocabulary_size for scale in layout.scales for _ in range(scale.length) for field in scale.fields]
    ids = torch.stack([torch.randint(size, (batch,), generator=generator) for size in sizes], dim=1)
    return Tokens.fixed(ids.view(batch, layout.length, layout.num_fields))


@pytest.mark.parametrize("num_fields", [1, 2])
@pytest.mark.parametrize("forced", [0, 3, 4])
@pytest.mark.parametrize("order", ["natural", "reversed"])
def test_cached_logits_equal_the_full_pass(num_fields, forced, order):
    model, sample = prior(layout(num_fields=num_fields), order=order), tokens(layout(num_fields=num_fields))
    full = model.nll(sample, LABELS)
    if order == "reversed":
        sample, full = model.to_own_order(sample), full.flip(1)
    state = model.begin(LABELS, sample.prefix(forced) if forced else None, sample.ids.shape[1])
    for position in range(forced, sample.ids.shape[1]):
        element = sample.ids[:, position]
        for index in range(num_fields):
            logits = model.logits(state, element[:, :index])
            nll = -logits.log_softmax(-1).gather(1, element[:, index : index + 1])[:, 0]
            torch.testing.assert_close(nll, full[:, position, index], atol=1e-5, rtol=1e-5)
        model.advance(state, element)


@pytest.mark.parametrize("num_fields", [1, 2])
@pytest.mark.parametrize("order", ["natural", "reversed"])
def test_the_likeliest_id_is_told_with_the_likelihood(num_fields, order):
    model, sample = prior(layout(num_fields=num_fields), order=order), tokens(layout(num_fields=num_fields), batch=60)
    asked = classes(*[0, 2, -1] * 20)
    said = model(sample, asked)
    likelihood = (-said.nll).exp()
    assert said.confidence.shape == said.hit.shape == said.nll.shape and 0 < said.hit.sum() < said.hit.numel()
    # the given id is the most likely one exactly where its probability equals the confidence
    torch.testing.assert_close(likelihood[said.hit], said.confidence[said.hit])
    assert (likelihood[~said.hit] < said.confidence[~said.hit]).all()
    assert model.train()(sample, asked).confidence is None


@pytest.mark.parametrize("num_fields", [1, 2])
def test_the_likelihood_is_normalised(num_fields):
    """Probabilities of all values of the last element sum to one, so no element sees its own target."""
    model = prior(layout(vocabulary=3, num_fields=num_fields, scales=1))
    sizes = [field.vocabulary_size for field in model.layout.scales[0].fields]
    values = torch.cartesian_prod(*[torch.arange(size) for size in sizes]).view(-1, num_fields)
    ids = tokens(model.layout, 1).ids.repeat(len(values), 1, 1)
    ids[:, -1] = values
    nll = model.nll(Tokens.fixed(ids), classes(*[0] * len(values)))
    torch.testing.assert_close((-nll[:, -1].sum(-1)).exp().sum(), torch.tensor(1.0))


def test_later_tokens_do_not_matter():
    model, sample = prior(layout()), tokens(layout())
    changed = Tokens.fixed(sample.ids.clone())
    changed.ids[:, 7:] = tokens(layout(), seed=2).ids[:, 7:]
    a, b = model.nll(sample, LABELS), model.nll(changed, LABELS)
    assert torch.equal(a[:, :7], b[:, :7]) and not torch.equal(a[:, 8:], b[:, 8:])


def test_in_reversed_order_earlier_tokens_do_not_matter_and_a_beginning_is_refused():
    model, sample = prior(layout(), order="reversed"), tokens(layout())
    changed = Tokens.fixed(sample.ids.clone())
    changed.ids[:, :7] = tokens(layout(), seed=2).ids[:, :7]
    a, b = model.nll(sample, LABELS), model.nll(changed, LABELS)
    assert torch.equal(a[:, 7:], b[:, 7:]) and not torch.equal(a[:, :6], b[:, :6])
    assert torch.equal(model.to_layout_order(model.to_own_order(sample)).ids, sample.ids)
    with pytest.raises(ValueError, match="8 of 12 elements; allowed with prior.order=reversed: all"):
        model.nll(sample.prefix(8), LABELS)
    assert [model.scale_at(position) for position in (0, 3, 4, 11)] == [2, 2, 1, 0]


def test_orders_that_a_prior_does_not_have_are_refused():
    with pytest.raises(ValueError, match="prior.order='raster'; allowed: natural, reversed, interleaved"):
        prior(layout(), order="raster")
    with pytest.raises(ValueError, match="prior.order='reversed'; allowed: natural, for streams"):
        prior(codec().layout, order="reversed")


def test_a_prefix_of_scales_has_the_same_likelihood():
    model, sample = prior(layout()), tokens(layout())
    torch.testing.assert_close(model.nll(sample.prefix(8), LABELS), model.nll(sample, LABELS)[:, :8])


def test_every_place_and_the_class_matter():
    model, sample = prior(layout()), tokens(layout())
    nll = model.nll(sample, LABELS)
    assert not torch.allclose(nll, model.nll(sample, classes(1, 1, 1)))
    for table in (model.inputs.scale_embedding, model.inputs.row_embedding, model.inputs.column_embedding):
        kept = table.weight.data.clone()
        table.weight.data.zero_()
        assert not torch.allclose(nll, model.nll(sample, LABELS))
        table.weight.data.copy_(kept)


def test_recomputing_blocks_changes_nothing():
    gradients = []
    for recompute in (False, True):
        model = prior(layout(), checkpoint_gradients=recompute).train()
        model.nll(tokens(layout()), LABELS).mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(*gradients)


def test_class_ids_out_of_range_are_refused():
    for wrong in (3, -2):
        with pytest.raises(ValueError, match=f"class id {wrong}; allowed: 0 to 2"):
            prior(layout()).nll(tokens(layout()), classes(0, wrong, 1))
    with pytest.raises(ValueError, match="no class names"):
        build_prior(TransformerPriorConfig(width=32, heads=4), ClassConditionConfig(), layout(), [])


def test_an_unconditional_prior_ignores_labels():
    model = build_prior(TransformerPriorConfig(depth=1, width=32, heads=4), NoConditionConfig(), layout(), []).eval()
    assert torch.equal(model.nll(tokens(layout()), LABELS), model.nll(tokens(layout()), classes(0, 0, 0)))


def test_saved_and_loaded_is_the_same(tmp_path):
    model, path = prior(layout(num_fields=2)), tmp_path / "prior.safetensors"
    save_prior(path, model, model.config, model.condition_config, {"tokenizer_sha256": "0" * 64})
    loaded, metadata = load_prior(path)
    sample = tokens(layout(num_fields=2))
    assert same_weights(loaded, model)
    torch.testing.assert_close(loaded.nll(sample, LABELS), model.nll(sample, LABELS))
    assert loaded.class_names == ["a", "b", "c"]
    with pytest.raises(WeightsError, match="another tokenizer"):
        check_pair(metadata, path, path)
    with pytest.raises(WeightsError, match="holds a prior, not a tokenizer"):
        load_tokenizer(path)


def test_a_prior_from_before_there_was_text_loads(tmp_path):
    model, path = prior(layout()), tmp_path / "prior.safetensors"
    save_prior(path, model, model.config, model.condition_config, {})
    _, metadata = load_prior(path)
    del metadata["text"]
    save_weights(path, model, metadata)
    loaded, _ = load_prior(path)
    assert loaded.text is None and same_weights(loaded, model)
    torch.testing.assert_close(loaded.nll(tokens(layout()), LABELS), model.nll(tokens(layout()), LABELS))


@pytest.mark.parametrize("content", [b"", b"not safetensors", b"\x80\x04\x95pickle"])
def test_foreign_files_are_refused(tmp_path, content):
    path = tmp_path / "prior.safetensors"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match="damaged or not a weights file"):
        load_prior(path)
    with pytest.raises(WeightsError, match="no such file"):
        load_prior(tmp_path / "missing")


def test_a_field_can_follow_from_the_earlier_one_and_from_what_stood_before():
    """code2 of an element is the sum of its code1 and the previous code1, modulo 16; each alone is uninformative."""
    size = 16
    fields = (Field("code1", size), Field("code2", size))
    two = TokenLayout((Scale("one", 4, (2, 2), 0, fields, (8, 8)),))
    torch.manual_seed(0)
    config = TransformerPriorConfig(depth=1, width=64, heads=4, dropout=0.0)
    model = build_prior(config, NoConditionConfig(), two, []).train()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(150):
        first = torch.randint(size, (128, 4))
        second = (first + torch.cat([torch.randint(size, (128, 1)), first[:, :-1]], dim=1)) % size
        nll = model.nll(Tokens.fixed(torch.stack([first, second], dim=-1)), classes(*[-1] * 128))
        optimizer.zero_grad()
        nll.mean().backward()
        optimizer.step()
    # unpredictable fields cost the full log 16
    assert nll[:, 1:, 1].mean() < 0.3 < 2.5 < nll[..., 0].mean()


def test_swiglu_begins_and_computes_like_timms():
    torch.manual_seed(0)
    theirs = timm.SwiGLU(24, 64, bias=False)
    torch.manual_seed(0)
    own = SwiGLU(24, 64)
    torch.testing.assert_close(own.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    x = torch.randn(2, 5, 24)
    assert torch.equal(own(x), theirs(x))
