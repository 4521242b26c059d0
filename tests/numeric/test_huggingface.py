"""The adapter against the source model in transformers with its own cache: same tokens."""

from __future__ import annotations

import copy
import dataclasses
import threading

import pytest
import torch
from models import VOCAB, tiny_hf
from tiny_tokenizers import word_tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)
from transformers.generation import StoppingCriteria

import kvxform
from kvxform.capture import capture
from kvxform.errors import CacheFullError, KvxformError
from kvxform.pipeline import run_pipeline
from kvxform.recipe import load_recipe
from kvxform.runtime.huggingface import KvxformConfig, KvxformForCausalLM
from kvxform.runtime.model import OptimizedModel
from kvxform.runtime.session_cache import SessionCache

EXACT = {
    "version": 1,
    "name": "plain",
    "passes": ["insert-cache", {"page-cache": {"page_size": 16}}],
}
INT4 = {"codec": "int", "bits": 4}
RECENT = {"key": INT4, "value": INT4, "regions": {"recent": 6}}
FAMILIES = ("llama", "gpt2", "mistral")  # grouped heads, learned positions, a window of 5


def compiled(program, *passes):
    """Run the passes of a recipe; capturing is what takes the time, and is done once."""
    recipe = load_recipe({**EXACT, "passes": [*EXACT["passes"], *passes]})
    done, report = run_pipeline(program, recipe, executor=OptimizedModel, verify="none")
    return OptimizedModel(done, report=report, recipe=recipe)


@pytest.fixture(scope="module")
def sources():
    """Models that end no sequence: a random model meets its end token sooner or later."""
    return {family: tiny_hf(family, eos_token_id=None).eval() for family in FAMILIES}


@pytest.fixture(scope="module")
def programs(sources):
    return {family: capture(source).program for family, source in sources.items()}


@pytest.fixture(scope="module")
def adapters(programs):
    return {family: compiled(program).as_huggingface() for family, program in programs.items()}


@pytest.fixture(scope="module")
def source(sources):
    return sources["llama"]


@pytest.fixture(scope="module")
def program(programs):
    return programs["llama"]


@pytest.fixture(scope="module")
def adapter(adapters):
    return adapters["llama"]


@pytest.fixture(scope="module")
def int4(program):
    return compiled(program, {"quantize-kv": {"key": INT4, "value": INT4}}).as_huggingface()


def prompt(rows=1, tokens=12):
    return torch.randint(3, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(1))


def ragged():
    """Return three prompts padded on the left, and their mask."""
    ids = prompt(3)
    mask = torch.ones_like(ids)
    mask[0, :5] = mask[2, :9] = 0
    return ids.masked_fill(mask == 0, 0), mask


def assert_same(source, adapter, ids, **options):
    """Both models must give the same tokens from the same seed."""
    found = []
    for model in (source, adapter):
        torch.manual_seed(7)
        found.append(model.generate(ids, **options))
    assert found[0].shape[1] > ids.shape[1]
    assert torch.equal(*found)
    return found[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_of_a_ragged_batch(sources, adapters, family):
    ids, mask = ragged()
    options = {"attention_mask": mask, "pad_token_id": 0, "do_sample": False}
    tokens = assert_same(sources[family], adapters[family], ids, **options, max_new_tokens=48)
    assert tokens.shape == (3, 60)
    alone = adapters[family].generate(ids[2:, 9:], do_sample=False, max_new_tokens=48)
    assert torch.equal(alone[0, 3:], tokens[2, 12:])


SEARCHES = {
    "sampling": {"do_sample": True, "temperature": 1.3, "top_k": 20, "top_p": 0.9},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 4, "do_sample": False},
    "several beams": {"num_beams": 4, "num_return_sequences": 3, "do_sample": False},
    "beam sampling": {"num_beams": 3, "do_sample": True},
    "prompt lookup": {"prompt_lookup_num_tokens": 3, "do_sample": False},
    "penalty": {"repetition_penalty": 1.4, "do_sample": False},
    "chunks of the prompt": {"prefill_chunk_size": 5, "do_sample": False},
    "no cache": {"use_cache": False, "do_sample": False},
}


@pytest.mark.parametrize("name", SEARCHES)
def test_searches_find_the_same_tokens(source, adapter, name):
    assert_same(source, adapter, prompt(), max_new_tokens=24, **SEARCHES[name])


@pytest.mark.parametrize("family", FAMILIES)
def test_beams_of_a_ragged_batch(sources, adapters, family):
    ids, mask = ragged()
    options = {"attention_mask": mask, "pad_token_id": 0, "do_sample": False}
    assert_same(sources[family], adapters[family], ids, **options, num_beams=3, max_new_tokens=24)


def test_chunks_of_a_ragged_prompt(source, adapter):
    ids, mask = ragged()  # the third row has no token in the first two chunks
    options = {"attention_mask": mask, "pad_token_id": 0, "do_sample": False}
    assert_same(source, adapter, ids, **options, prefill_chunk_size=4, max_new_tokens=8)


@pytest.mark.parametrize("change", [lambda order: None, lambda order: list(reversed(order))])
def test_beams_go_wrong_if_the_cache_is_not_reordered(source, adapter, monkeypatch, change):
    options = {"num_beams": 4, "do_sample": False, "max_new_tokens": 24}
    expected = source.generate(prompt(), **options)
    reorder = SessionCache._reorder

    def reorder_wrongly(cache, order):
        if change(order) is not None:
            reorder(cache, change(order))

    monkeypatch.setattr(SessionCache, "_reorder", reorder_wrongly)
    assert not torch.equal(adapter.generate(prompt(), **options), expected)


def test_beams_share_pages(adapter):
    found = adapter.generate(
        prompt(1, 40), num_beams=4, max_new_tokens=8, return_dict_in_generate=True, do_sample=False
    )
    session = found.past_key_values.session
    assert session.sequence_lengths() == (47,) * 4
    assert session.saved_pages >= 6  # two full pages, four owners
    apart = session.plan.bytes_at(session.sequence_lengths(), session.max_seq_len)
    assert session.cache_bytes() <= apart / 2


@pytest.mark.parametrize("search", ["beams", "beam sampling", "prompt lookup"])
def test_an_int4_cache_gives_what_the_same_model_gives_without_one(int4, search):
    """Codes do not depend on how tokens arrive, so recomputing everything finds the same."""
    ids, options = prompt(), {**SEARCHES[search], "max_new_tokens": 16}
    if search == "prompt lookup":
        greedy = int4.generate(ids, max_new_tokens=16, do_sample=False, use_cache=False)
        assert torch.equal(int4.generate(ids, **options), greedy)
        return
    torch.manual_seed(3)
    expected = int4.generate(ids, **options, use_cache=False)
    torch.manual_seed(3)
    assert torch.equal(int4.generate(ids, **options), expected)


def test_greedy_tokens_are_those_of_the_optimized_model(int4):
    ids, mask = ragged()
    options = {"attention_mask": mask, "max_new_tokens": 20, "pad_token_id": 0}
    expected = int4.optimized.generate(ids, **options)
    assert torch.equal(int4.generate(ids, **options, do_sample=False), expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("roles", ["target", "assistant", "both", "lossy assistant"])
def test_assisted_decoding(source, adapter, int4, roles):
    ids, options = prompt(), {"max_new_tokens": 30, "do_sample": False}
    target = source if "assistant" in roles else adapter
    assistant = {"target": source, "both": adapter, "assistant": adapter}.get(roles, int4)
    expected = source.generate(ids, **options)
    assert torch.equal(target.generate(ids, **options, assistant_model=assistant), expected)


@pytest.mark.filterwarnings("ignore")
def test_assisted_sampling(source, adapter):
    options = {"do_sample": True, "max_new_tokens": 16, "assistant_model": source}
    assert_same(source, adapter, prompt(), **options)


def test_assisted_decoding_needs_a_cache_that_can_be_cropped(source, program):
    recent = compiled(program, {"quantize-kv": RECENT}).as_huggingface()
    for options in ({"assistant_model": source}, {"prompt_lookup_num_tokens": 3}):
        with pytest.raises(KvxformError) as caught:
            recent.generate(prompt(), max_new_tokens=8, **options)
        assert str(caught.value).startswith("KVX705 [huggingface] assisted decoding needs a cache")
    assert recent.generate(prompt(), max_new_tokens=8, num_beams=2).shape[1] > 12


def test_streamers(source, adapter, capsys):
    tokenizer, ids = word_tokenizer(), prompt()
    texts = []
    for model in (source, adapter):
        model.generate(ids, streamer=TextStreamer(tokenizer), max_new_tokens=9, do_sample=False)
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert len(texts[0].split()) >= 12
    streamer = TextIteratorStreamer(tokenizer, timeout=60)
    options = {"streamer": streamer, "max_new_tokens": 9, "do_sample": False}
    thread = threading.Thread(target=adapter.generate, args=(ids,), kwargs=options)
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert len(pieces) > 5
    assert "".join(pieces).strip() == texts[0].strip()


CHAT = [{"role": "w5", "content": "w6 w7 w8"}]


@pytest.mark.parametrize("text", [["w5 w6 w7", "w8"], "w9", CHAT], ids=["batch", "one", "chat"])
def test_text_generation_pipeline(source, adapter, text):
    found = [
        pipeline("text-generation", model=model, tokenizer=word_tokenizer())(
            text, max_new_tokens=10, do_sample=False, batch_size=2
        )
        for model in (source, adapter)
    ]
    assert found[0] == found[1]


def test_pipeline_knows_the_class(adapter, caplog):
    pipeline("text-generation", model=adapter, tokenizer=word_tokenizer())
    assert "not supported" not in caplog.text


def test_stopping_criteria_and_end_tokens(source, adapter):
    class Stop(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), input_ids.shape[1] >= 17)

    ids = prompt()
    tokens = assert_same(source, adapter, ids, stopping_criteria=[Stop()], max_new_tokens=30)
    assert tokens.shape[1] == 17
    end = int(tokens[0, 14])
    ended = assert_same(source, adapter, ids, eos_token_id=end, do_sample=False, max_new_tokens=30)
    assert ended.shape[1] <= 15
    assert ended[0, -1] == end


def test_scores_and_logits_of_a_generation(source, adapter):
    options = {"output_scores": True, "output_logits": True, "return_dict_in_generate": True}
    found = [
        model.generate(prompt(), **options, max_new_tokens=6, do_sample=False)
        for model in (source, adapter)
    ]
    for name in ("scores", "logits"):
        ours, theirs = (torch.stack(getattr(f, name)) for f in found)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_more_tokens_than_the_context_are_refused_before_any_work(adapter):
    with pytest.raises(CacheFullError) as caught:
        adapter.generate(prompt(), max_new_tokens=246)
    assert str(caught.value) == (
        "KVX703 [huggingface] prompt and new tokens must be within the model's 256 tokens; "
        "got 257. Hint: shorten the prompt, or lower max_new_tokens."
    )


@pytest.mark.parametrize("use_cache", [True, False])
def test_forward_with_padding_anywhere(source, adapter, use_cache):
    ids, mask = prompt(4), torch.ones(4, 12, dtype=torch.int64)
    mask[0, 8:] = mask[1, :3] = mask[2, 4:6] = 0  # right, left, in the middle
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    expected = source(ids, attention_mask=mask, position_ids=positions).logits
    found = adapter(ids, attention_mask=mask, use_cache=use_cache)
    real = mask.bool()
    torch.testing.assert_close(found.logits[real], expected[real], rtol=0, atol=1e-4)
    assert not found.logits[~real].any()
    assert (found.past_key_values is None) != use_cache


def test_forward_options(source, adapter):
    ids = prompt(2)
    labels = ids.masked_fill(torch.arange(12) < 4, -100)
    ours, theirs = (model(ids, labels=labels) for model in (adapter, source))
    torch.testing.assert_close(ours.loss, theirs.loss.detach(), rtol=0, atol=1e-5)
    for keep in (1, 3, torch.tensor([2, 5])):
        found = adapter(ids, logits_to_keep=keep).logits
        expected = source(ids, logits_to_keep=keep).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    logits, cache = adapter(ids, return_dict=False)
    assert isinstance(cache, SessionCache)
    assert torch.equal(logits, ours.logits)
    logits[:] = 0  # callers change what they get


def test_a_cache_goes_on_is_copied_and_grows(source, adapter):
    ids = prompt(1, 30)
    expected = source.generate(ids, max_new_tokens=9, do_sample=False)
    cache = adapter.new_cache()
    for first, last in ((0, 10), (10, 17)):
        adapter(ids[:, first:last], past_key_values=cache)
    twin = copy.deepcopy(cache)
    for each in (cache, twin):
        found = adapter.generate(ids, past_key_values=each, max_new_tokens=9, do_sample=False)
        assert torch.equal(found, expected)
    assert cache.get_seq_length() == 38
    cache.reset()
    assert (cache.get_seq_length(), cache.nbytes, cache.batch_size) == (0, 0, -1)
    assert torch.equal(
        adapter.generate(ids, past_key_values=cache, max_new_tokens=9, do_sample=False), expected
    )


def test_operations_of_the_cache(source, adapter):
    ids, mask = ragged()
    ours, theirs = adapter.new_cache(), DynamicCache(config=source.config)
    more = torch.tensor([[4, 5], [6, 7], [8, 9], [10, 11]])

    def go_on(rows, mask):
        whole = torch.cat([mask, torch.ones_like(more[:rows])], 1)
        positions = (whole.cumsum(1) - 1).clamp_min(0)
        options = {"attention_mask": whole, "position_ids": positions[:, -2:]}
        logits = [
            model(more[:rows], past_key_values=cache, **options).logits
            for model, cache in ((adapter, ours), (source, theirs))
        ]
        torch.testing.assert_close(*logits, rtol=0, atol=1e-4)
        assert ours.get_seq_length() == theirs.get_seq_length()
        return whole

    positions = (mask.cumsum(1) - 1).clamp_min(0)
    adapter(ids, attention_mask=mask, past_key_values=ours)
    source(ids, attention_mask=mask, position_ids=positions, past_key_values=theirs)
    mask = go_on(3, mask)
    for cache in (ours, theirs):
        cache.crop(-4)
    mask = go_on(3, mask[:, :-4])
    for cache in (ours, theirs):
        cache.reorder_cache(torch.tensor([2, 0, 0]))
    mask = go_on(3, mask[[2, 0, 0]])
    for cache in (ours, theirs):
        cache.batch_select_indices(torch.tensor([0, 2]))
        cache.batch_repeat_interleave(2)
    mask = go_on(4, mask[[0, 0, 2, 2]])
    assert ours.batch_size == 4
    assert ours.session.sequence_lengths() == tuple(mask.sum(1).tolist())
    ours.crop(9)  # columns to keep, as before transformers 5
    assert ours.get_seq_length() == 9
    assert not ours.is_compileable
    assert ours.is_croppable
    assert len(ours) == 2
    assert ours.get_max_length() == 256


def test_save_and_load(source, program, tmp_path):
    tokenizer = word_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    info = dataclasses.replace(program.info, tokenizer_path=str(tmp_path / "tokenizer"))
    opt = compiled(dataclasses.replace(program, info=info))
    adapter = opt.as_huggingface()
    adapter.generation_config.max_new_tokens = 7
    folder = tmp_path / "compiled"
    adapter.save_pretrained(folder)
    assert isinstance(AutoConfig.from_pretrained(folder), KvxformConfig)
    again = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map="cpu")
    assert isinstance(again, KvxformForCausalLM)
    assert again.config.to_dict() | {"_name_or_path": ""} == adapter.config.to_dict()
    expected = source.generate(prompt(), max_new_tokens=7, do_sample=False)
    assert torch.equal(again.generate(prompt(), do_sample=False), expected)
    loaded = kvxform.load(folder)
    assert torch.equal(loaded(prompt()), opt(prompt()))
    assert loaded.plan == opt.plan
    for found in (AutoTokenizer.from_pretrained(folder), loaded.tokenizer):
        assert found.get_vocab() == tokenizer.get_vocab()
    text = pipeline("text-generation", model=str(folder))("w5 w6", do_sample=False)
    assert text[0]["generated_text"].startswith("w5 w6")
    opt.save(tmp_path / "plain")
    plain = KvxformForCausalLM.from_pretrained(tmp_path / "plain")
    assert torch.equal(plain.generate(prompt(), max_new_tokens=7, do_sample=False), expected)
    adapter.save_pretrained(folder)  # over itself


def test_a_program_without_a_cache_generates_too(source, program):
    bare = OptimizedModel(program).as_huggingface()
    assert bare(prompt()).past_key_values is None
    assert_same(source, bare, prompt(), max_new_tokens=10, num_beams=2, do_sample=False)


def test_what_a_model_is_asked_for(source, program, adapter):
    assert adapter.device == torch.device("cpu")
    assert adapter.dtype == torch.float32
    assert adapter.to("cpu") is adapter.float() is adapter.eval() is adapter
    assert not adapter.training
    assert adapter.num_parameters() >= source.num_parameters()
    assert adapter.num_parameters(only_trainable=True) == 0
    assert adapter.config.vocab_size == VOCAB
    assert adapter.config.max_position_embeddings == 256
    assert adapter.generation_config.pad_token_id == 0
    assert adapter.can_generate()
    for ends, expected in (((2,), 2), ((2, 5), [2, 5])):
        info = dataclasses.replace(program.info, eos_token_ids=ends)
        model = OptimizedModel(dataclasses.replace(program, info=info)).as_huggingface()
        assert model.generation_config.eos_token_id == expected


REFUSALS = {
    "past_key_values must be what new_cache": lambda m: m(prompt(), past_key_values=DynamicCache()),
    "attention_mask must have shape": lambda m: m(prompt(), attention_mask=torch.ones(1, 5)),
    "position_ids must count": lambda m: m(prompt(), position_ids=torch.arange(1, 13)[None]),
    "the dtype of a compiled model is fixed: float32": lambda m: m.half(),
    "cache_implementation must be left out": lambda m: m.generate(
        prompt(), max_new_tokens=3, cache_implementation="static"
    ),
    "output_attentions must be left out": lambda m: m(prompt(), output_attentions=True),
    "opened from its folder": lambda m: AutoModelForCausalLM.from_config(m.config),
    "keys and values of single layers": lambda m: m.new_cache().update(None, None, 0),
    "token ids must lie in": lambda m: m(prompt() + VOCAB),
}


@pytest.mark.parametrize("message", REFUSALS)
def test_what_cannot_be_is_refused_in_one_line(adapter, message):
    with pytest.raises(KvxformError, match=rf"^KVX704 .*{message}") as caught:
        REFUSALS[message](adapter)
    assert "\n" not in str(caught.value)


def test_a_batch_that_does_not_continue_the_cache_is_refused(adapter):
    ids = prompt(2)
    cache = adapter(ids[:, :6]).past_key_values
    with pytest.raises(KvxformError, match="the 2 rows of the cache; got 1"):
        adapter(ids[:1, 6:], past_key_values=cache)
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[0, 2] = 0
    with pytest.raises(KvxformError, match="must not change where tokens are cached"):
        adapter(ids[:, 6:], attention_mask=mask, past_key_values=cache)
    found = adapter(ids[:, 6:], past_key_values=cache).logits
    torch.testing.assert_close(found, adapter(ids).logits[:, 6:], rtol=0, atol=1e-4)
