"""Mutants of what is PyTorch around the kernels: the gated projection, the Flamingo family."""

from mutation import mutants

ORIGINAL = "flamingo_conformance::eager_in_float64_is_the_original"


def recorded(*names: str) -> str:
    """Cases of the originals' blocks, as far as ids without spaces name them."""
    return " ".join(
        f"{ORIGINAL}[GatedCrossAttentionBlock|open_flamingo|{name}|seed0]" for name in names
    )


def projections(*names: str) -> str:
    return " ".join(f"gated_projection::every_gradient[{n}-interpreter]" for n in names)


CLOSED = "gated_projection::a_closed_gate_of_float16_has_finite_gradients[interpreter]"
DECODING = "media_cache::decoding_with_a_cache_is_the_whole_text_at_once[flamingo]"
BEFORE, AFTER = (
    recorded("text_before_image|immediate"),
    recorded("more_images_than_media|immediate"),
)
EARLIER = recorded("text_before_image|all_previous")
BY_DEFINITION = "flamingo_modules::flavours_by_definition"

MODULES = [
    *mutants("gated_projection", "gradients",
        ("projection-da-gate", "(weight * column)", "weight", "da without the gate",
         projections("one")),
        ("projection-derivative", "(1 - t * t) * sums", "(1 - t) * sums", "the derivative of tanh",
         projections("one")),
        ("projection-bias", "sums + bias * dbias", "sums", "the bias's share of dgate",
         projections("one")),
        ("projection-weight-gate", "dweight * column", "dweight", "dweight without the gate",
         projections("one")),
        ("projection-mask", "masked_fill(~row_mask[..., None], 0.0)",
         "masked_fill(row_mask[..., None], 0.0)", "rows that do not count", projections("masked")),
        ("projection-one-gate", "sums.sum()).view", "sums[:1]).view", "the first column's dgate",
         projections("one")),
        folder="xattn_kernels",
    ),
    *mutants("gated_projection", "product",
        ("projection-overflow", "a.float() @ b.float()", "a @ b", "infinity times a closed gate",
         CLOSED),
        folder="xattn_kernels",
    ),
    *mutants("masked_cross_attention", "visible_keys",
        ("media-cached-token", "bound[:, -1:]", "bound[:, :1]", "what the first token sees",
         DECODING),
        ("media-cached-nothing", "F.pad(media_locations, (1, 0))", "media_locations",
         "a text without tokens", "flamingo_modules::little_text_and_no_media[flamingo]"),
        ("media-all", '"last" if immediate else "all"', '"last"', "earlier media", EARLIER),
        folder="xattn_kernels/modules",
    ),
    *mutants("masked_cross_attention", "with_policy",
        ("media-none-yet", "full & (found.start > 0)", "full", "not 0 before the first media",
         BEFORE),
        ("media-mean", "torch.where(full, Nk, found.stop)", "found.stop",
         "0, not the mean, before the first media", EARLIER),
        ("media-policy", 'full if without_media is None else None', "full",
         "attention over every key becomes a mean",
         BY_DEFINITION + "[dtype0-eager-llama_hugging_face]"),
        folder="xattn_kernels/modules",
    ),
    *mutants("media_cache", "Weights",
        ("media-written", "self.received_gradient or self.states != ",
         "self.received_gradient and self.states != ", "weights that were written",
         "media_cache::a_stale_cache_is_refused[written]"),
        ("media-others", "if not same or any(", "if not same and any(", "other weights",
         "media_cache::a_cache_of_others_is_refused"),
        folder="xattn_kernels/modules",
    ),
    *mutants("gated_cross_attention", "SwiGLU",
        ("block-swiglu", "F.silu(a) * b", "a * F.silu(b)", "the value is activated",
         BY_DEFINITION + "[dtype0-eager-idefics]"),
        folder="xattn_kernels/modules",
    ),
    *mutants("gated_cross_attention", "GatedCrossAttentionBlock",
        ("block-gates", "y, h, self.ff_gate", "y, h, self.attn_gate", "one gate for both",
         recorded("image_at_0|immediate")),
        ("block-residual", "gated_residual(y, h", "gated_residual(x, h", "the attention is lost",
         recorded("image_at_0|immediate")),
        ("block-rows", "row_mask=rows", "row_mask=None", "a feed-forward without media",
         BY_DEFINITION + "[dtype0-eager-llama_meta]"),
        folder="xattn_kernels/modules",
    ),
    *mutants("perceiver_resampler", "PerceiverResampler",
        ("resampler-padding", "real.stop + len(self.latents)", "real.stop", "latents for padding",
         "perceiver_resampler::padding_is_not_read[dtype0-eager]"),
        ("resampler-residual", "feed(latents) + latents", "feed(latents)", "a residual is lost",
         ORIGINAL + "[PerceiverResampler|lucidrains|2x9x20|seed0]"),
        folder="xattn_kernels/modules",
    ),
]  # fmt: skip
