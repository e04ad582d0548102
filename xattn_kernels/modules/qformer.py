"""`QFormer`: learned queries read an image for a text, in the layers of a BERT."""

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
from ..core.dispatch import run
from ..core.tensor_arguments import check_attention, check_mask
from ..masks import KeyInterval
from .masked_cross_attention import BACKENDS, check_tensor, merge_heads, split_heads
from .stable_cross_attention import WITH_DROPOUT, check_dropout

OBJECTIVES = ("itc", "itm", "itg")


class QFormer(nn.Module):
    """Learned queries that read image features and share their self-attention with a text.

    The layers are those of BERT, with a norm after each sum, on h = LN([query_tokens; embeddings]):

        h       = LN(h + attention(h, h))                        with the mask of the objective
        queries = LN(queries + crossattention(queries, image))   every cross_attention_every layers
        queries = LN(queries + ff_query(queries))                text = LN(text + ff(text))

    The parameters have the names of `Blip2QFormerModel` of Hugging Face, plus `query_tokens` and
    `embeddings`. State dicts of `Blip2ForImageTextRetrieval` load with their prefix `qformer.`, and
    `load_bert` starts from a BERT.

    Args:
        dim, depth, heads: width, number of layers, and heads of every attention.
        dim_visual: width of the image features; None means dim.
        num_queries: number of learned queries.
        cross_attention_every: the n by which layers 0, n, 2n, ... have cross-attention.
        ff_mult: hidden width of the feed-forwards as a multiple of dim; the activation is the exact
            GELU.
        vocab_size: number of words; None means queries alone, without `embeddings` and without the
            feed-forwards of the text.
        max_positions: length of the longest text.
        norm_eps: eps of the LayerNorms.
        dropout: probability, in training, for attention weights, embeddings and the results that
            layers add; 0.1 in BLIP-2.
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
        factory = dict(device=device, dtype=dtype)
        self.query_tokens = nn.Parameter(torch.empty(1, num_queries, dim, **factory))
        self.embeddings = None
        if vocab_size is not None:
            sizes = dict(word_embeddings=vocab_size, position_embeddings=max_positions)
            tables = {name: nn.Embedding(n, dim, **factory) for name, n in sizes.items()}
            self.embeddings = nn.ModuleDict(tables)
        self.layernorm = nn.LayerNorm(dim, eps=norm_eps, **factory)
        options = dict(heads=heads, ff_mult=ff_mult, eps=norm_eps, dropout=dropout)
        options |= dict(backend=backend, factory=factory)
        layers = nn.ModuleList()
        for n in range(depth):
            has_cross_attention = n % cross_attention_every == 0
            width = dim_visual if has_cross_attention else None
            layers.append(Layer(dim, width, vocab_size, **options))
        self.encoder = nn.ModuleDict(dict(layer=layers))
        self.apply(start_as_bert)
        nn.init.normal_(self.query_tokens, std=0.02)
        self.register_load_state_dict_pre_hook(without_prefix)

    def forward(
        self, image_features: Tensor | None = None, input_ids: Tensor | None = None, *,
        objective: str | None = None, text_lengths: Tensor | None = None, image_mask=None,
    ) -> Tensor:  # fmt: skip
        """The rows of the queries, then those of the text: [B, num_queries + T, dim].

        Args:
            image_features: [B, Nk, dim_visual]; None runs the text alone, without queries. Without
                any key (Nk is 0) cross-attention adds the bias of its `output.dense` alone.
            input_ids: int32 or int64 [B, T], positions from 0; None runs the queries alone.
            objective: "itc", "itm" or "itg", the mask as in `masks.qformer`; required with
                input_ids.
            text_lengths: int32 or int64 [B], the length of the real text in each batch element.
                The tokens after it are padding that no row sees, and their rows of the result are
                arbitrary. With None all tokens are real.
            image_mask: the image keys of the queries, as in `cross_attention`; None means all.

        Raises:
            TypeError, ValueError: an argument has a wrong type, shape, dtype or range, or is
                missing.
        """
        check_arguments(self, image_features, input_ids, objective, text_lengths, image_mask)
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
        h = F.dropout(self.layernorm(torch.cat(rows, dim=1)), current_dropout(self))
        for layer in self.encoder["layer"]:
            h = layer(h, n_queries, mask, image_features, image_mask)
        return h

    def load_bert(self, state_dict: Mapping[str, Tensor]) -> list[str]:
        """Loads the weights of a BERT of this size, as BLIP-2 does, to start from.

        Each feed-forward becomes that of the text and that of the queries. The table of token
        types, the pooler and the heads are skipped.

        Args:
            state_dict: the weights of a `BertModel` of Hugging Face, or of a model that has one as
                `bert`.

        Returns:
            The names of the unchanged parameters: queries and cross-attention.

        Raises:
            TypeError: state_dict is no mapping.
            ValueError: a weight is missing or has another shape.
        """
        return load_bert(self, state_dict)


class Layer(nn.Module):
    """A layer of `QFormer`.

    It has no cross-attention if dim_visual is None, and no feed-forward for text if vocab_size is.
    """

    def __init__(
        self, dim, dim_visual, vocab_size, *, heads, ff_mult, eps, dropout, backend, factory
    ) -> None:
        super().__init__()
        self.hidden_dropout = dropout
        options = dict(heads=heads, eps=eps, dropout=dropout, backend=backend, factory=factory)
        self.attention = Attention(dim, dim, **options)
        self.crossattention = None
        if dim_visual is not None:
            self.crossattention = Attention(dim, dim_visual, **options)
        for suffix in ("_query",) if vocab_size is None else ("", "_query"):
            hidden = nn.ModuleDict(dict(dense=nn.Linear(dim, ff_mult * dim, **factory)))
            self.add_module(f"intermediate{suffix}", hidden)
            self.add_module(f"output{suffix}", residual(ff_mult * dim, dim, eps, factory))

    def forward(self, h: Tensor, n_queries: int, mask, image, image_mask) -> Tensor:
        """The rows [B, n_queries + T, dim] after this layer, in the shape of h."""
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
        """The feed-forward of x, added to x and normed; `suffix` is "" for text, or "_query"."""
        hidden = F.gelu(getattr(self, f"intermediate{suffix}")["dense"](x))
        return add_and_norm(getattr(self, f"output{suffix}"), hidden, x, current_dropout(self))


class Attention(nn.Module):
    """The LayerNorm of x plus the attention of x to `keys`."""

    def __init__(self, dim, dim_keys, *, heads, eps, dropout, backend, factory) -> None:
        super().__init__()
        self.dim_head, self.backend = dim // heads, backend
        self.dropout = self.hidden_dropout = dropout  # for the weights, for the added result
        widths = dict(query=dim, key=dim_keys, value=dim_keys)
        linears = {name: nn.Linear(width, dim, **factory) for name, width in widths.items()}
        self.attention = nn.ModuleDict(linears)
        self.output = residual(dim, dim, eps, factory)

    def forward(self, x: Tensor, keys: Tensor, mask: KeyInterval | Tensor | None) -> Tensor:
        sources = dict(query=x, key=keys, value=keys)
        q, k, v = (split_heads(self.attention[n](t), self.dim_head) for n, t in sources.items())
        inputs = check_attention(
            q, k, v, mask=mask, dropout_p=self.dropout if self.training else 0.0
        )
        out = merge_heads(run("QFormer", WITH_DROPOUT, inputs, self.backend).out)
        return add_and_norm(self.output, out, x, current_dropout(self))


def residual(n_in: int, dim: int, eps: float, factory: dict) -> nn.ModuleDict:
    """The linear layer of a branch and the norm of its sum, under the names of BERT."""
    norm = nn.LayerNorm(dim, eps=eps, **factory)
    return nn.ModuleDict(dict(dense=nn.Linear(n_in, dim, **factory), LayerNorm=norm))


def add_and_norm(modules: nn.ModuleDict, branch: Tensor, x: Tensor, dropout: float) -> Tensor:
    """The LayerNorm of x plus the dropout of a linear layer of `branch`."""
    return modules["LayerNorm"](F.dropout(modules["dense"](branch), dropout) + x)


def current_dropout(module: nn.Module) -> float:
    """The dropout probability of `module` in training, else 0."""
    return module.hidden_dropout if module.training else 0.0


def start_as_bert(module: nn.Module) -> None:
    """Initialises a linear layer or an embedding as BERT does."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


@torch.no_grad()
def load_bert(module: QFormer, state_dict: Mapping[str, Tensor]) -> list[str]:
    """Does the work of `QFormer.load_bert`."""
    check_mapping("state_dict", state_dict, "weights by name")
    renamed, prefix = {}, "bert." if any(n.startswith("bert.") for n in state_dict) else ""
    kept = [n for n in module.state_dict() if "crossattention" in n or n == "query_tokens"]
    for name, p in module.state_dict().items():
        if name in kept:
            continue
        in_bert = name.replace("_query.", ".").replace(".attention.attention.", ".attention.self.")
        in_bert = prefix + in_bert.replace("layernorm.", "embeddings.LayerNorm.")
        weight = state_dict.get(in_bert)
        if weight is None or weight.shape != p.shape:
            got = "nothing" if weight is None else list(weight.shape)
            raise ValueError(f"state_dict must have {in_bert} {list(p.shape)}, got {got}")
        renamed[name] = weight
    module.load_state_dict(renamed, strict=False)
    return kept


def without_prefix(module: nn.Module, state_dict: dict, prefix: str, *_) -> None:
    """Removes the prefix `qformer.` from the names of a state dict, in place."""
    for name in [n for n in state_dict if n.startswith(f"{prefix}qformer.")]:
        state_dict[prefix + name[len(prefix) + len("qformer.") :]] = state_dict.pop(name)


def check_options(sizes: dict, vocab_size) -> None:
    """Raises unless the sizes of a constructor are positive ints that fit each other."""
    check_sizes(**sizes)
    if vocab_size is not None:
        check_sizes(vocab_size=vocab_size)
    if sizes["dim"] % sizes["heads"]:
        raise ValueError(f"heads must divide dim = {sizes['dim']}, got {sizes['heads']}")


def check_arguments(module: QFormer, image, input_ids, objective, text_lengths, image_mask) -> None:
    """Raises unless the arguments of `forward` fit `module` and each other."""
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
    """Raises unless the words fit the tables of `module`, and their lengths fit the words."""
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
