"""OptimizedModel: stateless calls in the caller's layout, generation, size of sessions."""

import dataclasses

import pytest
import torch
from cached import cached_program
from programs import llama_program, run, token_ids

from kvxform.errors import KvxformError
from kvxform.recipe import Target
from kvxform.runtime.model import OptimizedModel


@pytest.fixture(scope="module", params=["cached", "without cache"])
def model(request):
    return OptimizedModel(cached_program() if request.param == "cached" else llama_program())


@pytest.fixture(scope="module")
def ids(model):
    return token_ids(model.program, 2, 12)


def test_call_equals_the_source(model, ids):
    assert torch.allclose(model(ids), run(llama_program(), ids), atol=1e-12)


def test_padding_on_either_side(model, ids):
    source = llama_program()
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    mask[1, 7:] = 0
    logits = model(ids, mask)
    assert torch.allclose(logits[:1, 5:], run(source, ids[:1, 5:]), atol=1e-12)
    assert torch.allclose(logits[1:, :7], run(source, ids[1:, :7]), atol=1e-12)
    assert not logits[0, :5].any()
    assert not logits[1, 7:].any()


def greedy(ids, steps):
    source = llama_program()
    for _ in range(steps):
        ids = torch.cat([ids, run(source, ids)[:, -1:].argmax(-1)], 1)
    return ids


def test_greedy_generation_equals_a_plain_loop(model, ids):
    assert torch.equal(model.generate(ids, max_new_tokens=9), greedy(ids, 9))


def test_left_padded_rows_generate_what_they_do_alone(model, ids):
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    out = model.generate(ids, mask, max_new_tokens=6)
    assert torch.equal(out[:, :12], ids)
    assert torch.equal(out[0, 12:], greedy(ids[:1, 5:], 6)[0, 7:])
    assert torch.equal(out[1, 12:], greedy(ids[1:], 6)[0, 12:])


def test_rows_end_at_eos_and_are_padded(model, ids):
    free = model.generate(ids, max_new_tokens=8)[:, 12:]
    eos = int(free[0, 2])
    assert eos not in free[1].tolist()
    out = model.generate(ids, max_new_tokens=8, eos_token_id=[eos, 1000], pad_token_id=0)[:, 12:]
    assert torch.equal(out[1], free[1])
    first = free[0].tolist().index(eos)
    assert out[0, : first + 1].tolist() == free[0, : first + 1].tolist()
    assert not out[0, first + 1 :].any()


def test_generation_stops_when_all_rows_have_ended(model, ids):
    first = int(model.generate(ids[:1], max_new_tokens=1)[0, -1])
    assert model.generate(ids[:1], max_new_tokens=8, eos_token_id=first).shape == (1, 13)


def test_context_is_a_limit(model, ids):
    program = model.program.clone()
    program.info = dataclasses.replace(program.info, context_length=16)
    model = OptimizedModel(program)
    assert model.generate(ids, max_new_tokens=5).shape == (2, 17)
    with pytest.raises(KvxformError, match=r"KVX704 .* the model's 16 tokens; got 17"):
        model.generate(ids, max_new_tokens=6)
    with pytest.raises(KvxformError, match=r"KVX704 .* the model's 16 tokens; got 24"):
        model(ids.repeat(1, 2))


def test_session_is_as_long_as_the_context_unless_told():
    program = cached_program()
    assert OptimizedModel(program).new_session().max_seq_len == 2048
    program.info = dataclasses.replace(program.info, context_length=64)
    assert OptimizedModel(program).new_session().max_seq_len == 64
    with pytest.raises(KvxformError, match=r"KVX704 .* the model's 64 tokens; got 65"):
        OptimizedModel(program).new_session(max_seq_len=65)


def test_saved_model_holds_report_and_recipe(tmp_path):
    class Text:
        target = Target()

        def to_json(self):
            return "{}\n"

        def to_html(self):
            return "<html></html>\n"

        def to_yaml(self):
            return "version: 1\n"

    model = OptimizedModel(cached_program(), report=Text(), recipe=Text())
    model.save(tmp_path / "out")
    assert (tmp_path / "out" / "recipe.yaml").read_text() == "version: 1\n"
    assert (tmp_path / "out" / "report.json").read_text() == "{}\n"


def test_tokenizer_given_or_none():
    assert OptimizedModel(llama_program()).tokenizer is None
    assert OptimizedModel(llama_program(), tokenizer="given").tokenizer == "given"
