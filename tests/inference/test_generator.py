"""Test that generated texts equal Transformers', token for token, in batches of every size."""

import dataclasses
import functools
import importlib.util
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gqa
from gqa.inference import cpu_layout, decoding
from gqa.inference import generator as generation
from gqa.inference.decoding import GREEDY, Beam, Sample
from gqa.inference.generator import Generator, bucket
from gqa.inference.step import Inference
from gqa.interop.huggingface import from_state_dict
from gqa.model.special_tokens import SpecialTokens
from gqa.model.transformer import Transformer
from gqa.runtime.mesh import make_mesh

GOLDEN = Path(__file__).parent.parent / "golden" / "t5_search.npz"
HAVE_TORCH = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
SEARCHES = {"greedy": GREEDY, "beam": Beam(num_beams=4, length_penalty=0.0)}


@pytest.fixture(scope="module")
def golden():
    """The arrays of the golden file, its weights gathered in a state dict `weights` of float16."""
    arrays = dict(np.load(GOLDEN))
    prefix = "weight:"
    weights = {n.removeprefix(prefix): x for n, x in arrays.items() if n.startswith(prefix)}
    return arrays | {"weights": weights, "config": json.loads(str(arrays["config"]))}


@pytest.fixture(scope="module")
def trained(golden):
    """The network that has learned to copy, reverse and choose (see make_golden.py)."""
    return from_state_dict(golden["weights"], golden["config"])


def run(trained, inputs, search, **options):
    params, config = trained
    generator = Generator(Inference(config), search, 14, **options)
    return generator(generator.prepare(params), inputs)


@pytest.mark.parametrize("name", SEARCHES)
def test_texts_are_those_of_transformers(golden, trained, name):
    np.testing.assert_array_equal(run(trained, golden["inputs"], SEARCHES[name]), golden[name])


def test_golden_texts_tell_the_searches_apart(golden):
    differ = (golden["greedy"] != golden["beam"]).any(axis=1)
    np.testing.assert_array_equal(differ, golden["inputs"][:, 0] == 5)
    assert 5 < differ.sum() < 20


@pytest.mark.skipif(not HAVE_TORCH, reason="needs torch and transformers")
@pytest.mark.parametrize("name", SEARCHES)
def test_texts_are_those_of_transformers_live(golden, trained, name):
    from tests import make_golden

    model = make_golden.search_model(golden["config"])
    weights = {n: make_golden.torch.tensor(x).float() for n, x in golden["weights"].items()}
    model.load_state_dict(weights, strict=False)
    inputs, _ = make_golden.search_batch(np.random.default_rng(7), 32)
    expected = make_golden.generate(model.eval(), inputs, SEARCHES[name].num_beams)
    np.testing.assert_array_equal(run(trained, inputs, SEARCHES[name]), expected)


@pytest.fixture
def shapes(monkeypatch):
    """The shapes that were compiled, in order: (rows of the batch, capacity of the cache)."""
    shapes, advance = [], Generator._advance_rows

    def traced(self, weights, rows, cache, memory, begin, end):
        shapes.append((len(memory.mask), self.net.capacity(cache)))
        slices = self.search.num_beams * self.net.config.num_kv_heads_self_attention
        assert len(cache[0][0]) == len(rows.ended) * slices
        return advance(self, weights, rows, cache, memory, begin, end)

    monkeypatch.setattr(Generator, "_advance_rows", traced)
    return shapes


@pytest.mark.parametrize("search", [SEARCHES["beam"], Sample(2.0, seed=1)])
def test_leaving_out_and_growing_change_nothing(golden, trained, search, shapes, monkeypatch):
    inputs = golden["inputs"][:16]
    expected = run(trained, inputs, search)
    assert {rows for rows, _ in shapes} == {16}
    shapes.clear()
    for module, name, value in (
        (generation, "SHORTEST", 4),
        (generation, "EVERY", 2),
        (cpu_layout, "BLOCK", 4),
    ):
        monkeypatch.setattr(module, name, value)
    np.testing.assert_array_equal(run(trained, inputs, search), expected)
    # Each shape is compiled once, and there are no more shapes than `Generator` documents.
    assert len(shapes) == len(set(shapes)) <= 4 * (1 + math.ceil(math.log2(14 / 4)))
    rows, capacities = zip(*shapes, strict=True)
    assert len(set(rows)) >= 3
    assert set(rows) <= {16, 8, 4, 2}
    assert list(rows) == sorted(rows, reverse=True)
    assert set(capacities) >= {4, 8}
    assert list(capacities) == sorted(capacities)


@pytest.mark.parametrize("mesh", [None, make_mesh()])
def test_rows_of_no_example_are_left_out_at_once(golden, trained, shapes, mesh):
    params, config = trained
    generator = Generator(Inference(config), GREEDY, 14, mesh=mesh)
    numbers = np.full(8, -1)
    numbers[5] = 0
    tokens = generator(generator.prepare(params), golden["inputs"][:8], numbers)
    np.testing.assert_array_equal(tokens[5], golden["greedy"][5])
    assert not tokens[numbers < 0].any()
    assert {rows for rows, _ in shapes} == {1}


def test_without_stop_every_position_is_filled(golden, trained):
    tokens = run(trained, golden["inputs"], GREEDY, stop=False)
    text = golden["greedy"]
    np.testing.assert_array_equal(tokens[text > 0], text[text > 0])
    assert (tokens[text == 0] > 0).mean() > 0.9  # the model goes on after its end token


def test_a_bucket_is_the_first_that_holds_a_length():
    lengths = [1, 63, 64, 65, 129, 200, 300]
    assert [bucket(n, 300) for n in lengths] == [64, 64, 64, 128, 256, 256, 300]
    assert bucket(5, 20) == 20


@pytest.mark.parametrize(("length", "shortest", "every"), [(5, 64, 32), (7, 4, 3), (6, 2, 3)])
def test_a_text_is_cut_at_its_length_and_goes_no_further(
    golden, trained, monkeypatch, length, shortest, every
):
    """Some texts do not end, and segments would reach beyond the cache or beyond the text."""
    params, config = trained
    monkeypatch.setattr(generation, "SHORTEST", shortest)
    monkeypatch.setattr(generation, "EVERY", every)
    expected = golden["greedy"][:8, :length]
    assert (expected != config.eos_token_id).all(axis=1).any()
    generator = Generator(Inference(config), GREEDY, length)
    tokens = generator(generator.prepare(params), golden["inputs"][:8])
    np.testing.assert_array_equal(tokens, expected)


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
def test_greedy_is_the_arg_max_of_teacher_forcing(tiny, batch, random_params, num_kv_heads):
    heads = {
        "num_kv_heads_self_attention": num_kv_heads,
        "num_kv_heads_cross_attention": num_kv_heads,
    }
    config = dataclasses.replace(tiny, **heads)
    params, inputs = random_params(config), batch["inputs"]
    # Embeddings that differ more, so that the model does not repeat a single token.
    params = params | {"embedding": 4 * params["embedding"]}
    generator = Generator(Inference(config), GREEDY, 12, stop=False)
    tokens = generator(generator.prepare(params), inputs)
    # The model's own output as the target: position t then reads outputs 0..t-1.
    forced = teacher_forced(params, config, inputs, tokens)
    np.testing.assert_array_equal(forced.argmax(-1), tokens)
    assert len(np.unique(tokens)) > 3


@pytest.mark.parametrize("search", [GREEDY, Beam(3, 0.6), Sample(seed=2)])
def test_generate_is_a_generator_called_once(golden, trained, search):
    params, config = trained
    inputs = golden["inputs"][:4]
    tokens = gqa.generate(params, config, inputs, max_length=9, search=search)
    generator = Generator(Inference(config), search, 9)
    np.testing.assert_array_equal(tokens, generator(generator.prepare(params), inputs))
    full = gqa.generate(params, config, inputs, max_length=9, search=search, stop=False)
    assert full.shape == (4, 9)
    assert (full[tokens == 0] > 0).any()


def test_generate_is_greedy_by_default(tiny, batch, random_params):
    params, inputs = random_params(tiny), batch["inputs"]
    params = params | {"embedding": 4 * params["embedding"]}
    tokens = gqa.generate(params, tiny, inputs, max_length=8, stop=False)
    logits = teacher_forced(params, tiny, inputs, tokens)
    np.testing.assert_array_equal(logits.argmax(-1), tokens)


@functools.partial(jax.jit, static_argnums=1)
def teacher_forced(params, config, inputs, targets):
    batch = {"inputs": inputs, "targets": targets}
    return Transformer(config).apply({"params": params}, batch)


def test_beams_score_what_teacher_forcing_gives_their_texts(tiny, batch, random_params):
    """Equal scores show that each text was continued on its own cache when its beam moved."""
    config = dataclasses.replace(tiny, num_kv_heads_self_attention=2)
    params, net = random_params(config), Inference(config)
    B, R, length = 2, 3, 9
    search, inputs = Beam(R, 0.6), jnp.array(batch["inputs"])

    @jax.jit
    def run(params):
        weights = net.prepare(params)
        memory = net.prefill(weights, inputs, R)

        def step(tokens, index, cache):
            return net.step(weights, tokens, index, cache, memory)

        rows, cache = search.start(jnp.arange(B), length), net.init_cache(B, R, length)
        special = SpecialTokens(eos=decoding.NO_EOS)
        return decoding.advance(step, search, rows, cache, 0, length, special)[0]

    rows = run(params)
    texts = rows.tokens[:, :, 1:].reshape(B * R, length)
    forced = teacher_forced(params, config, jnp.repeat(inputs, R, axis=0), texts)
    logits = jax.nn.log_softmax(forced)
    scores = jnp.take_along_axis(logits, texts[:, :, None], axis=2).sum((1, 2))
    np.testing.assert_allclose(rows.scores.ravel(), scores, rtol=1e-4)
    assert len(np.unique(texts, axis=0)) == B * R
