# SPDX-License-Identifier: Apache-2.0
"""The class of Transformers that loads a model which continues text."""

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import (
    IMAGE_PROCESSOR_NAME,
    LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE,
    PROCESSOR_NAME,
    VIDEO_PROCESSOR_NAME,
    cached_file,
)

__all__ = ["auto_class", "load_model", "load_processor", "read_config"]

_CLASSES = (AutoModelForCausalLM, AutoModelForImageTextToText)


def read_config(model: str) -> PreTrainedConfig:
    """
    Read the config of a model.

    :param model: folder, or id on the Hub
    :raises OSError: if there is none
    """
    try:
        return AutoConfig.from_pretrained(model)
    except OSError as error:
        if Path(model).is_dir():
            raise
        message = f"There is no folder {model}, and it could not be read from the Hub: {error}"
        raise OSError(message) from error


def auto_class(config: PreTrainedConfig) -> Any:
    """
    Find the auto class of a model.

    :raises ValueError: if the model does not continue text
    """
    named = next(iter(config.architectures or ()), None)
    for auto in _CLASSES:
        found = auto._model_mapping.get(type(config), None)
        classes = found if isinstance(found, tuple | list) else [found]
        # early conversions wrote LLaMAForCausalLM
        names = [one.__name__.lower() for one in classes if one is not None]
        if names and (named is None or named.lower() in names):
            return auto
    raise ValueError(
        f"The model is a {named or type(config).__name__}, and the commands take models that "
        "continue text, with or without pictures. For others, call llmcompressor.oneshot with "
        "data of your own, and recipe=cat_modifier.recipe(NAME)"
    )


def load_model(model: str, config: PreTrainedConfig) -> PreTrainedModel:
    """
    Load a model to the GPUs, if there are any and it fits, else to the CPU.

    :param model: folder, or id on the Hub
    """
    device_map = "auto" if torch.cuda.is_available() else None
    loaded = auto_class(config).from_pretrained(model, dtype="auto", device_map=device_map)
    return loaded.eval()


def load_processor(model: str, config: PreTrainedConfig) -> Any:
    """
    Load what turns text into the inputs of a model, and is saved with it.

    :return: tokenizer; of a model for pictures, which has a processor, a ProcessorFiles
    """
    tokenizer = AutoTokenizer.from_pretrained(model)
    if auto_class(config) is not AutoModelForImageTextToText:
        return tokenizer
    return ProcessorFiles(model, tokenizer)


class ProcessorFiles:
    """
    A processor as its files, which are copied to the checkpoint.

    Text needs the tokenizer alone. To load processors of pictures takes torchvision.

    :param model: folder, or id on the Hub
    :param tokenizer: tokenizer of the model
    """

    def __init__(self, model: str, tokenizer: Any):
        self.tokenizer = tokenizer
        names = (
            PROCESSOR_NAME,
            IMAGE_PROCESSOR_NAME,
            VIDEO_PROCESSOR_NAME,
            LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE,
        )
        found = (
            cached_file(model, name, _raise_exceptions_for_missing_entries=False)
            for name in names
        )
        self.files = [Path(file) for file in found if file is not None]

    def save_pretrained(self, folder: str):
        self.tokenizer.save_pretrained(folder)
        for file in self.files:
            shutil.copyfile(file, Path(folder) / file.name)
