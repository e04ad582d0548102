"""QFormer against Hugging Face's, with random weights: results, every gradient, state dicts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from support.numerics import assert_as_accurate
from support.qformer_cases import (
    DEPTH,
    DIM,
    HEADS,
    IMAGE_LENGTHS,
    LENGTHS,
    NK,
    OBJECTIVES,
    POSITIONS,
    VISUAL,
    VOCAB,
    Q,
    T,
    allowed,
    assert_same,
    inputs,
    ours,
    qformer,
    with_gradients,
)
from xattn_kernels import masks

pytestmark = pytest.mark.usefixtures("seed")

# Pinned in requirements/dev.txt, from Python 3.11 on as there is none for 3.10: the classes put
# together here, and how they read a mask, are no stable interface of it.
pytest.importorskip("transformers", reason="the Q-Former that ours must agree with")


class HuggingFace(nn.Module):
    """What of `Blip2ForImageTextRetrieval` is a Q-Former: queries, embeddings and layers."""

    def __init__(self, text: bool) -> None:
        super().__init__()
        from transformers.models.blip_2 import modeling_blip_2 as blip_2

        config = blip_2.Blip2QFormerConfig(
            hidden_size=DIM, num_hidden_layers=DEPTH, num_attention_heads=HEADS,
            intermediate_size=4 * DIM, encoder_hidden_size=VISUAL, vocab_size=VOCAB,
            max_position_embeddings=POSITIONS, use_qformer_text_input=text,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            attn_implementation="eager",
        )  # fmt: skip
        self.query_tokens = nn.Parameter(torch.empty(1, Q, DIM))
        self.embeddings = blip_2.Blip2TextEmbeddings(config) if text else None
        self.qformer = blip_2.Blip2QFormerModel(config)
        self.double()
        for name, p in self.named_parameters():
            nn.init.normal_(p, mean=name.lower().endswith("layernorm.weight"), std=0.3)

    def forward(self, image, ids=None, mask=None, queries=True) -> torch.Tensor:
        rows = self.query_tokens.expand(2, -1, -1) if queries else None
        n_queries = Q if queries else 0
        if ids is not None:
            rows = self.embeddings(ids, query_embeds=rows)
        seen = torch.arange(NK) < IMAGE_LENGTHS[:, None]
        # from 2-D they make a mask for the rows of the text too, which cross-attention lacks
        seen = seen.long() if ids is None else bias(seen[:, None, None])
        found = self.qformer(
            rows, query_length=n_queries, attention_mask=mask, encoder_hidden_states=image,
            encoder_attention_mask=seen,
        )  # fmt: skip
        return found.last_hidden_state

    def objective(self, name: str, image, ids) -> torch.Tensor:
        """As its authors call it where they do: "itc" is two calls, "itm" has a mask of keys."""
        text = torch.arange(T) < LENGTHS[:, None]
        if name == "itc":
            alone = self(image, ids, text.long(), queries=False)
            return torch.cat((self(image), alone), 1)
        if name == "itm":
            return self(image, ids, torch.cat((text.new_ones(2, Q), text), 1).long())
        return self(image, ids, bias(allowed(name)[:, None]))


def bias(seen: torch.Tensor) -> torch.Tensor:
    return torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -torch.inf)


def without_prefix(found: dict) -> dict:
    return {name.replace("dqformer.", "d"): t for name, t in found.items()}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_is_hugging_faces(objective):
    image, ids = inputs(dtype=torch.float64)
    theirs, module = HuggingFace(text=True), qformer(dtype=torch.float64)
    module.load_state_dict(theirs.state_dict(), strict=True)
    truth = with_gradients(lambda x: theirs.objective(objective, x, ids), theirs, image)
    truth = without_prefix(truth)
    assert_same(ours(module, objective, image, ids), truth, truth)


def test_without_text_is_hugging_faces():
    image, theirs = inputs(dtype=torch.float64)[0], HuggingFace(text=False)
    module = qformer(vocab_size=None, dtype=torch.float64)
    of_model = theirs.qformer.state_dict()
    module.load_state_dict(of_model | {"query_tokens": theirs.query_tokens}, strict=True)
    truth = without_prefix(with_gradients(theirs, theirs, image))
    mask = masks.padding(IMAGE_LENGTHS)
    found = with_gradients(lambda x: module(x, image_mask=mask), module, image)
    assert_same(found, truth, truth)


def test_of_their_model_only_what_it_does_not_have_is_missing():
    theirs, module = HuggingFace(text=True), qformer(dtype=torch.float64)
    found = module.load_state_dict(theirs.qformer.state_dict(), strict=False)
    tables = {f"embeddings.{name}_embeddings.weight" for name in ("word", "position")}
    assert set(found.missing_keys) == {"query_tokens"} | tables and not found.unexpected_keys


class Berts(nn.Module):
    """Hugging Face's BERT with random weights, whose types of tokens add nothing."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        config = BertConfig(
            hidden_size=DIM, num_hidden_layers=DEPTH, num_attention_heads=HEADS,
            intermediate_size=4 * DIM, vocab_size=VOCAB, max_position_embeddings=POSITIONS,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, attn_implementation="eager",
        )  # fmt: skip
        self.bert = BertModel(config).double().eval()
        for name, p in self.named_parameters():
            nn.init.normal_(p, mean=name.endswith("LayerNorm.weight"), std=0.3)
        nn.init.zeros_(self.bert.embeddings.token_type_embeddings.weight)


@pytest.mark.parametrize("whole", [True, False])
def test_starts_from_a_bert(whole):
    """The text alone is then BERT's, and queries have the feed-forwards of the text."""
    ids, theirs = inputs()[1], Berts()
    module = qformer(dtype=torch.float64, norm_eps=1e-12)
    before = {name: p.clone() for name, p in module.state_dict().items()}
    kept = module.load_bert((theirs if whole else theirs.bert).state_dict())
    truth = theirs.bert(ids).last_hidden_state
    assert_as_accurate(module(None, ids, objective="itc"), truth, truth, "text")
    after = module.state_dict()
    assert {n for n in after if torch.equal(before[n], after[n])} == set(kept)
    for n, t in after.items():
        if "_query." in n:
            assert torch.equal(t, after[n.replace("_query.", ".")])


def test_a_bert_of_another_size_is_refused():
    state = Berts().bert.state_dict()
    words = "embeddings.word_embeddings.weight"
    with pytest.raises(ValueError, match=rf"must have {words} \[14, 24\], got \[13, 24\]"):
        qformer(vocab_size=14).load_bert(state)
    del state["encoder.layer.1.output.dense.bias"]
    with pytest.raises(ValueError, match=r"encoder.layer.1.output.dense.bias \[24\], got nothing"):
        qformer().load_bert(state)
    with pytest.raises(TypeError, match="state_dict must be a mapping of weights by name"):
        qformer(vocab_size=13).load_bert(nn.Linear(2, 2))
