"""`QFormer`: learned queries read an image for a text, in layers of BERT."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import masks
from ..core.arguments import (
    check_choice,
    check_mapping,
    check_positive,
    check_range,
    check_sizes,
    kind,
)
from ..core.call import check_inputs, check_mask
from ..core.dispatch import run
from ..masks import KeyInterval
from .masked_cross_attention import (
    BACKENDS,
    check_tensor,
    merge_heads,
    split_heads,
)
from .stable_cross_attention import WITH_DROPOUT, check_dropout

OBJECTIVES = ("itc", "itm", "itg")


class QFormer(nn.Module):
    """Learned queries read image features, and share their self-attention with a text.

    Layers of BERT, normed after each sum; of the rows h = layernorm([query_tokens; embeddings]),

        h       = LN(h + attention(h, h))                        with the mask of the objective
        queries = LN(queries + crossattention(queries, image))   every cross_attention_every layers
        queries = LN(queries + ff_query(queries))                text = LN(text + ff(text))

    Parameters have the names of Hugging Face's `Blip2QFormerModel`, with `query_tokens` and
    `embeddings` beside them; those of `Blip2ForImageTextRetrieval` load with their prefix
    `qformer.`, and `load_bert` starts from a BERT.

    Args:
        dim, depth, heads: width, number of layers, heads of every attention.
        dim_visual: width of the image features; None is dim.
        num_queries: learned queries.
        cross_attention_every: layers 0, n, 2n, ... have cross-attention.
        ff_mult: hidden width of the feed-forwards by dim; their activation is the exact GELU.
        vocab_size: of the text; None is a module of queries alone, without `embeddings` and
            without the feed-forwards of the text.
        max_positions: longest text.
        norm_eps: eps of the LayerNorms.
        dropout: in training, of attention weights, embeddings and what layers add; BLIP-2's is 0.1.
        backend: "triton", "cuda", "torch" or "eager" for every call; None chooses for each: with
            dropout on a CPU "eager".

    Raises:
        TypeError, ValueError: an argument is not among those named here.

    Source: Li et al., "BLIP-2: bootstrapping language-image pre-training with frozen image
    encoders and large language models" (2023), section 3; layers of Devlin et al., "BERT" (2019).
    """

    def __init__(
        self, *, dim=768, depth=12, heads=12, dim_visual=None, num_queries=32,
        cross_attention_every=2, ff_mult=4, vocab_size=None, max_positions=512, norm_eps=1e-12,
        dropout=0.0, backend=None, device=None, dtype=None,
    ) -> None:  # fmt: skip
        dim_visual = dim if dim_visual is None else dim_visual
        sizes = dict(dim=dim, depth=depth, heads=heads, dim_visual=dim_visual)
        sizes |= dict(num_queries=num_queries, cross_attention_every=cross_attention_every)
        check_options(sizes | dict(ff_mult=ff_mult, max_positions=max_positions), vocab_size)
        check_positive("norm_eps", norm_eps)
        check_dropout(dropout)
        check_choice("backend", backend, None, *BACKENDS)
        super().__init__()
        self.hidden_dropout = dropout
        self.dim, self.dim_visual, self.heads = dim, dim_visual, heads
        made = dict(device=device, dtype=dtype)
        self.query_tokens = nn.Parameter(torch.empty(1, num_queries, dim, **made))
        self.embeddings = None
        if vocab_size is not None:
            sizes = dict(word_embeddings=vocab_size, position_embeddings=max_positions)
            tables = {name: nn.Embedding(n, dim, **made) for name, n in sizes.items()}
            self.embeddings = nn.ModuleDict(tables)
        self.layernorm = nn.LayerNorm(dim, eps=norm_eps, **made)
        options = dict(heads=heads, ff_mult=ff_mult, eps=norm_eps, dropout=dropout)
        options |= dict(backend=backend, made=made)
        layers = nn.ModuleList()
        for n in range(depth):
            looks = n % cross_attention_every == 0
            layers.append(Layer(dim, dim_visual if looks else None, vocab_size, **options))
        self.encoder = nn.ModuleDict(dict(layer=layers))
        self.apply(start_as_bert)
        nn.init.normal_(self.query_tokens, std=0.02)
        self.register_load_state_dict_pre_hook(without_prefix)

    def forward(
        self, image_features: Tensor | None = None, input_ids: Tensor | None = None, *,
        objective: str | None = None, text_lengths: Tensor | None = None, image_mask=None,
    ) -> Tensor:  # fmt: skip
        """[B, num_queries + T, dim]: the rows of the queries, then those of the text.

        Args:
            image_features: [B, Nk, dim_visual]; None runs the text alone, without queries. Without
                any key (Nk is 0) cross-attention adds the bias of its `output.dense` alone.
            input_ids: int32 or int64 [B, T], positions from 0; None runs the queries alone.
            objective: "itc", "itm" or "itg", which rows see which as in `masks.qformer`; needed
                with input_ids.
            text_lengths: int32 or int64 [B], the real text of each batch; the rest is padding on
                the right that no row sees. Its own rows are arbitrary. None: all is real.
            image_mask: image keys that queries attend to, as in `cross_attention`; None: all.

        Raises:
            TypeError, ValueError: an argument of a wrong type, shape, dtype or range, or missing.
        """
        check_call(self, image_features, input_ids, objective, text_lengths, image_mask)
        rows, n_queries, mask = [], 0, None
        if image_features is not None:
            n_queries = self.query_tokens.shape[1]
            rows.append(self.query_tokens.expand(len(image_features), -1, -1))
        if input_ids is not None:
            T = input_ids.shape[1]
            position = self.embeddings["position_embeddings"].weight[:T]
            rows.append(self.embeddings["word_embeddings"](input_ids) + position)
            device = input_ids.device
            mask = masks.qformer(objective, n_queries, T, text_lengths, device=device)
        h = F.dropout(self.layernorm(torch.cat(rows, dim=1)), dropout_of(self))
        for layer in self.encoder["layer"]:
            h = layer(h, n_queries, mask, image_features, image_mask)
        return h

    def load_bert(self, state_dict: Mapping[str, Tensor]) -> list[str]:
        """Starts from a BERT of this size, as BLIP-2 does.

        Its feed-forwards become those of the text and of the queries; its tables of token types,
        pooler and heads are left out.

        Args:
            state_dict: of Hugging Face's `BertModel`, or of a model that has one as `bert`.

        Returns:
            The names of the parameters that stay as they were: queries and cross-attention.

        Raises:
            TypeError: state_dict is no mapping.
            ValueError: a weight is missing, or has another shape.
        """
        return load_bert(self, state_dict)


class Layer(nn.Module):
    """A layer of `QFormer`; without dim_visual it does not look, without vocab_size has no text."""

    def __init__(
        self, dim, dim_visual, vocab_size, *, heads, ff_mult, eps, dropout, backend, made
    ) -> None:
        super().__init__()
        self.hidden_dropout = dropout
        options = dict(heads=heads, eps=eps, dropout=dropout, backend=backend, made=made)
        self.attention = Attention(dim, dim, **options)
        self.crossattention = None
        if dim_visual is not None:
            self.crossattention = Attention(dim, dim_visual, **options)
        for suffix in ("_query",) if vocab_size is None else ("", "_query"):
            hidden = nn.ModuleDict(dict(dense=nn.Linear(dim, ff_mult * dim, **made)))
            self.add_module(f"intermediate{suffix}", hidden)
            self.add_module(f"output{suffix}", residual(ff_mult * dim, dim, eps, made))

    def forward(self, h: Tensor, n_queries: int, mask, image, image_mask) -> Tensor:
        """h [B, n_queries + T, dim] -> the same."""
        h = self.attention(h, h, mask)
        queries, text = h[:, :n_queries], h[:, n_queries:]
        rows = []
        if n_queries:
            if self.crossattention is not None:
                queries = self.crossattention(queries, image, image_mask)
            rows.append(self._feed_forward("_query", queries))
        if text.shape[1]:
            rows.append(self._feed_forward("", text))
        return torch.cat(rows, dim=1) if rows else h

    def _feed_forward(self, suffix: str, x: Tensor) -> Tensor:
        hidden = F.gelu(getattr(self, f"intermediate{suffix}")["dense"](x))
        return add_and_norm(getattr(self, f"output{suffix}"), hidden, x, dropout_of(self))


class Attention(nn.Module):
    """LayerNorm(x + attention of x over `keys`)."""

    def __init__(self, dim, dim_keys, *, heads, eps, dropout, backend, made) -> None:
        super().__init__()
        self.dim_head, self.backend = dim // heads, backend
        self.dropout = self.hidden_dropout = dropout  # of the weights, of what is added
        widths = dict(query=dim, key=dim_keys, value=dim_keys)
        linears = {name: nn.Linear(width, dim, **made) for name, width in widths.items()}
        self.attention = nn.ModuleDict(linears)
        self.output = residual(dim, dim, eps, made)

    def forward(self, x: Tensor, keys: Tensor, mask: KeyInterval | Tensor | None) -> Tensor:
        seen = dict(query=x, key=keys, value=keys)
        q, k, v = (split_heads(self.attention[n](t), self.dim_head) for n, t in seen.items())
        call = check_inputs(q, k, v, mask=mask, dropout_p=self.dropout if self.training else 0.0)
        out = merge_heads(run("QFormer", WITH_DROPOUT, call, self.backend).out)
        return add_and_norm(self.output, out, x, dropout_of(self))


def residual(n_in: int, dim: int, eps: float, made: dict) -> nn.ModuleDict:
    norm = nn.LayerNorm(dim, eps=eps, **made)
    return nn.ModuleDict(dict(dense=nn.Linear(n_in, dim, **made), LayerNorm=norm))


def add_and_norm(modules: nn.ModuleDict, branch: Tensor, x: Tensor, dropout: float) -> Tensor:
    return modules["LayerNorm"](F.dropout(modules["dense"](branch), dropout) + x)


def dropout_of(module: nn.Module) -> float:
    return module.hidden_dropout if module.training else 0.0


def start_as_bert(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


@torch.no_grad()
def load_bert(module: QFormer, state_dict: Mapping[str, Tensor]) -> list[str]:
    check_mapping("state_dict", state_dict, "weights by name")
    found, prefix = {}, "bert." if any(n.startswith("bert.") for n in state_dict) else ""
    kept = [n for n in module.state_dict() if "crossattention" in n or n == "query_tokens"]
    for name, p in module.state_dict().items():
        if name in kept:
            continue
        theirs = name.replace("_query.", ".").replace(".attention.attention.", ".attention.self.")
        theirs = prefix + theirs.replace("layernorm.", "embeddings.LayerNorm.")
        given = state_dict.get(theirs)
        if given is None or given.shape != p.shape:
            got = "nothing" if given is None else list(given.shape)
            raise ValueError(f"state_dict must have {theirs} {list(p.shape)}, got {got}")
        found[name] = given
    module.load_state_dict(found, strict=False)
    return kept


def without_prefix(module: nn.Module, state_dict: dict, prefix: str, *_) -> None:
    for name in [n for n in state_dict if n.startswith(f"{prefix}qformer.")]:
        state_dict[prefix + name[len(prefix) + len("qformer.") :]] = state_dict.pop(name)


def check_options(sizes: dict, vocab_size) -> None:
    check_sizes(**sizes)
    if vocab_size is not None:
        check_sizes(vocab_size=vocab_size)
    if sizes["dim"] % sizes["heads"]:
        raise ValueError(f"heads must divide dim = {sizes['dim']}, got {sizes['heads']}")


def check_call(module: QFormer, image, input_ids, objective, text_lengths, image_mask) -> None:
    """Raises TypeError or ValueError naming the argument, what it was and what is allowed."""
    if image is None and input_ids is None:
        raise ValueError("image_features and input_ids must not both be None")
    if image is not None:
        weight = module.query_tokens
        check_tensor("image_features", image, "[B, Nk, dim_visual]", module.dim_visual, weight)
        rows = split_heads(weight, module.dim // module.heads).expand(len(image), -1, -1, -1)
        check_mask(image_mask, rows, image[:, None], name="image_mask")
    elif image_mask is not None:
        raise ValueError("image_mask must be None without image_features")
    if input_ids is not None:
        check_choice("objective", objective, *OBJECTIVES)
        check_text(module, input_ids, text_lengths)
    else:
        check_choice("objective", objective, None, *OBJECTIVES)
        if text_lengths is not None:
            raise ValueError("text_lengths must be None without input_ids")
    if image is not None and input_ids is not None and len(image) != len(input_ids):
        raise ValueError(
            f"the batch of input_ids, {len(input_ids)}, must be that of image_features, "
            f"{len(image)}"
        )


def check_text(module: QFormer, input_ids, text_lengths) -> None:
    if module.embeddings is None:
        raise ValueError("input_ids must be None in a module without vocab_size")
    words, positions = (table.weight for table in module.embeddings.values())
    if not isinstance(input_ids, Tensor) or input_ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"input_ids must be an int32 or int64 tensor, got {kind(input_ids)}")
    if input_ids.dim() != 2 or input_ids.shape[1] > len(positions):
        raise ValueError(
            f"input_ids must be [B, T] with T at most {len(positions)}, got {list(input_ids.shape)}"
        )
    if input_ids.device != words.device:
        raise ValueError(
            f"input_ids must be on the device of the weights, {words.device}, got "
            f"{input_ids.device}"
        )
    check_range("input_ids", input_ids, len(words))
    if isinstance(text_lengths, Tensor) and list(text_lengths.shape) != [len(input_ids)]:
        raise ValueError(
            f"text_lengths must be [B] = [{len(input_ids)}], got {list(text_lengths.shape)}"
        )
    if isinstance(text_lengths, Tensor) and text_lengths.device != words.device:
        raise ValueError(f"text_lengths must be on {words.device}, got {text_lengths.device}")
