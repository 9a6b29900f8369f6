"""Requests as texts: tokens in and out, stops, limits of the context, options, whole texts."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamer_jax import convert
from dreamer_jax.data.tokenizer import load_tokenizer, train_sentencepiece
from dreamer_jax.evaluation.requests import Choose, EvaluationError, Generate, Generated, Likelihoods, Read, Reading
from dreamer_jax.evaluation.respondent import Respondent, fitted, split_options
from dreamer_jax.inference.decoder import make_decoder
from dreamer_jax.inference.engine import complete
from dreamer_jax.inference.sample import Sampling
from dreamer_jax.kernels.compute import Compute
from tests import oracle
from tests.models import changed, sizes_of, small

pytestmark = pytest.mark.xdist_group("respondent")
VOCAB = 300
CONTEXT = 48


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    file.write_bytes(train_sentencepiece(["Question: What is 12 plus 30?\nAnswer: It is 42 €."] * 4, VOCAB))
    return load_tokenizer(file)


@pytest.fixture(scope="module")
def decoder():
    config = changed(small("DR+DA"), vocab=VOCAB)
    model = convert.build(config, oracle.random_weights(sizes_of(config), seed=3, scale=0.3))
    return make_decoder(model, Compute.fastest())


@pytest.fixture(scope="module")
def respondent(decoder, tokenizer):
    return Respondent(decoder, tokenizer, CONTEXT, batch=4)


def one(respondent, request):
    ((number, outcome),) = respondent.respond([request])
    assert number == 0
    return outcome


def said(respondent, prompt, max_tokens):
    """The greedy answer to a prompt, by itself."""
    tokens = [respondent.tokenizer.bos, *respondent.tokenizer.encode(prompt)]
    [answer] = complete(respondent.decoder, [tokens], Sampling(), max_tokens=max_tokens)
    return respondent.tokenizer.decode(answer).rstrip("\ufffd")


def test_texts_are_answered_as_their_tokens_are(respondent):
    requests = [Generate(f"What is {i} plus 30?", (), 8 + i) for i in range(6)]
    outcomes = dict(respondent.respond(requests))
    for i, request in enumerate(requests):
        assert outcomes[i] == Generated(said(respondent, request.prompt, 8 + i), tokens=8 + i, finished=False)


def test_a_text_ends_before_its_first_stop_and_each_request_has_its_own(respondent):
    text = said(respondent, "What is 12?", 12)
    first, second = text[4:6], text[2]
    wanted = {0: text.split(first)[0], 1: text.split(second)[0], 2: text}
    requests = [Generate("What is 12?", stop, 12) for stop in (("never", first), (second,), ())]
    found = dict(respondent.respond(requests))
    assert {i: outcome.text for i, outcome in found.items()} == wanted
    assert [found[i].finished for i in range(3)] == [True, True, False]


def test_the_token_that_ends_documents_ends_a_text_and_is_no_part_of_it(respondent, tokenizer):
    prompt = [tokenizer.bos, *tokenizer.encode("What is 12?")]
    [answer] = complete(respondent.decoder, [prompt], Sampling(), max_tokens=6)
    ending = copy.copy(tokenizer)
    ending.eos = next(token for i, token in enumerate(answer) if i >= 2 and token not in answer[:i])
    before = answer.index(ending.eos)
    outcome = one(Respondent(respondent.decoder, ending, CONTEXT), Generate("What is 12?", (), 6))
    assert outcome == Generated(tokenizer.decode(answer[:before]).rstrip("\ufffd"), tokens=before + 1, finished=True)


def test_an_answer_ends_with_the_context_and_a_prompt_keeps_its_end(respondent, tokenizer):
    prompt = "What is 12 plus 30? " * 9
    assert len(tokenizer.encode(prompt)) > CONTEXT
    outcome = one(respondent, Generate(prompt, (), 30))
    assert (outcome.cut, outcome.finished, outcome.tokens) == (True, False, CONTEXT // 2)
    kept, cut = fitted([tokenizer.bos, *tokenizer.encode(prompt)], CONTEXT // 2)
    assert cut
    [answer] = complete(respondent.decoder, [kept], Sampling(), max_tokens=CONTEXT // 2)
    assert outcome.text == tokenizer.decode(answer).rstrip("\ufffd")
    endless = copy.copy(tokenizer)
    endless.eos = VOCAB
    short = one(Respondent(respondent.decoder, endless, CONTEXT), Generate("12", (), 200))
    assert not short.cut
    assert short.tokens == CONTEXT - len(tokenizer.encode("12")) - 1


@jax.jit
def log_probabilities(decoder, ids):
    compute = Compute(kernels="reference")
    hidden = decoder.model.forward(ids, jnp.arange(CONTEXT)[None], jnp.ones_like(ids), compute).hidden
    return jax.nn.log_softmax(decoder.model.logits(hidden, compute)[0])


def full_nats(respondent, tokens):
    """log p of each token after the first, by a full pass over the text."""
    ids = jnp.asarray([tokens + [0] * (CONTEXT - len(tokens))], jnp.int32)
    rows = np.asarray(log_probabilities(respondent.decoder, ids), np.float64)
    return [rows[i, token] for i, token in enumerate(tokens[1:])]


def test_options_are_as_likely_as_in_the_whole_text(respondent, tokenizer):
    request = Choose("What is 12 plus 30?\nAnswer:", (" 42", " It is 42 €.", " 30"))
    outcome = one(respondent, request)
    assert isinstance(outcome, Likelihoods)
    before = 1 + len(tokenizer.encode(request.context))
    for i, option in enumerate(request.options):
        nats = full_nats(respondent, [tokenizer.bos, *tokenizer.encode(request.context + option)])[before - 1 :]
        assert outcome.tokens[i] == len(nats)
        assert outcome.nats[i] == pytest.approx(sum(nats), abs=1e-4)


def test_space_at_the_end_of_a_context_belongs_to_the_options(tokenizer):
    spaced = split_options(tokenizer, Choose("What is 12? ", ("42", "30")))
    assert spaced == split_options(tokenizer, Choose("What is 12?", (" 42", " 30")))


def test_an_option_without_tokens_is_refused_by_name(respondent):
    with pytest.raises(EvaluationError, match="the option '' adds no token"):
        one(respondent, Choose("What?", (" 1", "")))


def test_a_context_that_is_too_long_loses_its_beginning(respondent, tokenizer):
    context = "What is 12 plus 30? " * 9
    outcome = one(respondent, Choose(context, (" 42", " 30")))
    assert outcome.cut
    prefix, options = split_options(tokenizer, Choose(context, (" 42", " 30")))
    room = CONTEXT - max(map(len, options))
    nats = full_nats(respondent, [*prefix[-room:], *options[0]])[room - 1 :]
    assert outcome.nats[0] == pytest.approx(sum(nats), abs=1e-4)


def test_a_whole_text_is_read_after_the_token_that_begins_documents(respondent, tokenizer):
    text = "It is 42 €."
    outcome = one(respondent, Read(text))
    nats = full_nats(respondent, [tokenizer.bos, *tokenizer.encode(text)])
    assert outcome == Reading(pytest.approx(-sum(nats), abs=1e-4), len(nats))


def test_requests_of_all_kinds_come_back_by_their_numbers(respondent):
    requests = [Read("42"), Generate("12?", (), 3), Choose("12", (" 1", " 2")), Generate("30?", (), 2), Read("7 7")]
    outcomes = dict(respondent.respond(requests))
    assert [type(outcomes[i]) for i in range(5)] == [Reading, Generated, Likelihoods, Generated, Reading]
    assert dict(respondent.respond([])) == {}
