# SPDX-License-Identifier: Apache-2.0
"""Linears that are left alone by default. Imports no library: the command line reads it."""

__all__ = ["DEFAULT_IGNORE"]

DEFAULT_IGNORE = (
    "re:.*lm_head",
    "re:.*decoder$",
    r"re:.*(score|classifier|pooler)(\..*)?$",
    "re:.*router.*",
    r"re:.*gate(\..*)?$",
    "re:.*kv_b_proj",
    "re:.*dt_proj",
    "re:.*(vision|visual|audio).*",
    "re:.*(image|img|video).*",
    "re:.*(projector|connector|aligner).*",
    "re:.*(resampler|merger|qformer).*",
    "re:.*language_projection",
    "re:.*generation_head.*",
)
"""
The lm_head, heads of classifiers and poolers before them, routers of experts, weights that
latent attention (MLA) and state spaces read without a call, towers for images and sound, what
connects them, and heads that generate images. Recipes repeat it for the modifier that quantizes
"""
