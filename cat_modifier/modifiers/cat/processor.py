# SPDX-License-Identifier: Apache-2.0
"""
The tokenizer that `oneshot` saves with a model.

llm-compressor writes it after the model. A kill in between would leave a folder that has none,
or that of an older checkpoint. So it is made a part of the model's save.
"""

from functools import wraps
from importlib import import_module
from typing import Any

from compressed_tensors import TRANSFORM_CONFIG_NAME
from compressed_tensors.utils import patch_attr

from cat_modifier.checkpoint.schema import CATTransformConfig
from cat_modifier.integrations.transformers.saving import saved_together

__all__ = ["register"]


def register():
    """
    Let `oneshot` save the tokenizer with the model, if the model has CAT transforms. Safe to
    call again.

    Does nothing if a later llm-compressor saves in another way: the tokenizer then follows the
    model.
    """
    # the package has a function of this name
    module: Any = import_module("llmcompressor.entrypoints.oneshot")
    post_process = getattr(module, "post_process", None)
    if post_process is None or hasattr(post_process, "saves_together"):
        return

    @wraps(post_process)
    def save(model_args: Any = None, recipe_args: Any = None, output_dir: Any = None):
        model: Any = getattr(model_args, "model", None)
        config = getattr(model, TRANSFORM_CONFIG_NAME, None)
        if not isinstance(config, CATTransformConfig):
            return post_process(model_args, recipe_args, output_dir)
        processor = model_args.processor
        with saved_together(model, processor), patch_attr(model_args, "processor", None):
            return post_process(model_args, recipe_args, output_dir)

    vars(save)["saves_together"] = True
    module.post_process = save
