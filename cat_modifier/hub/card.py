# SPDX-License-Identifier: Apache-2.0
"""The model card of a checkpoint: ``README.md`` with front matter, as the Hub shows it."""

import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import CardData, ModelCard, ModelCardData, RepoCard
from loguru import logger

from cat_modifier.checkpoint.size import weight_bytes
from cat_modifier.hub.base_model import BaseModel, find_base_model
from cat_modifier.hub.libraries import library_versions
from cat_modifier.hub.markdown import (
    code,
    fenced,
    has_section,
    plain,
    read_section,
    replace_section,
    without_comments,
)
from cat_modifier.hub.run_record import RunRecord
from cat_modifier.hub.schemes import describe_schemes, is_scheme_tag

__all__ = ["CARD", "update_evaluation", "write_card"]

CARD = "README.md"
"""Name of the file"""

_TAGS = ("cat-modifier", "compressed-tensors", "llm-compressor", "vllm", "arxiv:2603.04359")
_FACTS = ("base_model", "base_model_relation")
"""Keys that a new run replaces; of all others, the user's stay"""
_SECTIONS = ("about", "creation", "measured", "evaluation")
_OF_A_RUN = ("creation", "measured", "evaluation")
"""Sections that describe one run: a model that was loaded and saved again keeps them"""
_RECIPE = "recipe.yaml"
_RECIPE_LENGTH = 20_000
"""Characters of a recipe that are shown"""


def write_card(folder: Path, target: Path, model: Any):
    """
    Write the card of a checkpoint that has just been written, or update the one of the target.

    Text outside of the marked sections stays, and so do keys of the front matter. An error is
    one warning: no card is worth a checkpoint.

    :param folder: holds the new checkpoint; receives the card
    :param target: folder that all files will be moved to; may hold an older card
    :param model: Transformers model that was saved
    """
    try:
        source = str(getattr(model.config, "_name_or_path", None) or "")
        record = RunRecord.of(model)
        older = _read_card(target)
        # without a record, it is a checkpoint that was loaded and is saved again
        base = find_base_model(source, is_quantized=record is None)
        if older is None and record is None and _is_ours(base.card):
            older = base.card
        new = _make_card(folder, model, base, record)
        content = f"{new}\n" if older is None else _merge(older, new, record is not None)
        (folder / CARD).write_text(content, encoding="utf-8", newline="")
        _warn(target, base, RepoCard(content).data.to_dict())
    except Exception as error:
        (folder / CARD).unlink(missing_ok=True)  # half of it
        reason = " ".join(str(error).split())
        logger.warning(
            f"{target / CARD}, the model card, is not written or updated, and the checkpoint "
            f"is complete without it: {type(error).__name__}: {reason}"
        )


def update_evaluation(folder: Path, kind: str, table: str, conditions: str) -> bool:
    """
    Write the results of an evaluation into the card of a checkpoint, in place of older ones of
    the same kind.

    :param folder: folder of the checkpoint
    :param kind: name of the kind, in lower case
    :param table: results in Markdown
    :param conditions: how they were measured, in plain text
    :return: whether the folder has a card that saving has written; others are left alone
    """
    path = folder / CARD
    text = path.read_bytes().decode() if path.is_file() else ""
    if not _is_ours(text):
        return False
    section = read_section(text, "evaluation") if has_section(text, "evaluation") else ""
    results = f"{without_comments(table).strip()}\n\n*{plain(conditions)}*"
    section = replace_section(section or "## Evaluation\n", f"evaluation-{kind}", results)
    text = replace_section(text, "evaluation", section)
    # a kill in between leaves the older card
    written = path.with_name(f".{CARD}.new")
    written.write_bytes(text.encode())
    written.replace(path)
    return True


def _read_card(folder: Path) -> str | None:
    path = folder / CARD
    return path.read_bytes().decode() if path.exists() else None


def _is_ours(text: str) -> bool:
    return any(has_section(text, name) for name in _SECTIONS)


def _make_card(
    folder: Path, model: Any, base: BaseModel, record: RunRecord | None
) -> ModelCard:
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    schemes = describe_schemes(quantization)
    task, auto_class = _find_task(model)
    license: Any = base.license
    data = ModelCardData(
        base_model=base.id,
        base_model_relation="quantized" if base.id else None,
        library_name="transformers",
        pipeline_tag=task,
        datasets=(record.datasets or None) if record else None,
        tags=[*_TAGS[:4], *schemes.tags, _TAGS[4]],
        **license,
    )
    name = base.name or type(model).__name__
    return ModelCard.from_template(
        data,
        template_str=(files(__package__) / "card.md.jinja").read_text(),
        title=f"{plain(name)}, {schemes.label} with CAT",
        name=f"[{plain(base.id)}](https://huggingface.co/{base.id})"
        if base.id
        else plain(name),
        scheme=schemes.text,
        products=schemes.products,
        auto_class=auto_class,
        **_describe_run(folder, record),
    )


def _describe_run(folder: Path, record: RunRecord | None) -> dict[str, Any]:
    if record is None:
        return {}
    data = " and ".join(code(one) for one in record.datasets)
    tokens = f"{record.tokens:,} tokens"
    if record.samples is not None:
        tokens += f" in {record.samples:,} samples"
    recipe = folder / _RECIPE
    text = recipe.read_text(errors="replace") if recipe.is_file() else ""
    if len(text) > _RECIPE_LENGTH:
        text = f"{text[:_RECIPE_LENGTH]}\n# ... the rest is in {_RECIPE}"
    return {
        "calibration": f"{tokens} of {data}" if data else tokens,
        "command": fenced(record.command, "bash") if record.command else "",
        "recipe": fenced(text, "yaml") if text else "",
        "versions": ", ".join(" ".join(one) for one in library_versions().items()),
        "sizes": {
            "dtype": code(record.dtype),
            "before": f"{record.size_before / 1e6:,.1f}",
            "after": f"{weight_bytes(folder) / 1e6:,.1f}",
        },
        "predictions": [
            (code(kind), count, f"{without:.1f}", f"{with_cat:.1f}")
            for kind, count, without, with_cat in record.mean_predictions()
        ],
    }


def _find_task(model: Any) -> tuple[str | None, str]:
    """
    Find the task of a model in Transformers' own tables.

    :return: task of the Hub, None if it is in no table; name of the class to load it with
    """
    try:
        from transformers import pipelines
    except ImportError:  # of a library for one of the tasks
        return None, type(model).__name__
    tasks: dict[str, Any] = pipelines.SUPPORTED_TASKS
    found: dict[str, str] = {}
    for task, entry in tasks.items():
        for auto_class in entry.get("pt", ()):
            table = getattr(auto_class, "_model_mapping", {})
            classes = table.get(type(model.config), ())
            classes = classes if isinstance(classes, (tuple, list)) else (classes,)
            if type(model) in classes:
                found.setdefault(task, auto_class.__name__)
    if not found:
        return None, type(model).__name__
    # such models are in the table of text generation, too
    task = "image-text-to-text"
    return (task, found[task]) if task in found else next(iter(found.items()))


def _merge(older: str, new: ModelCard, is_new_run: bool) -> str:
    """
    Update a card.

    :param older: the card that is there
    :param new: a card as if there were none
    :param is_new_run: whether results in the older card are of another checkpoint
    """
    card: Any = RepoCard(older)
    before = card.data.to_dict()
    merged = _merge_data(before, new.data.to_dict())
    text = card.text
    is_ours = _is_ours(text)
    for name in _SECTIONS:
        if name in _OF_A_RUN and not is_new_run and is_ours:
            continue
        # a section that the user removed stays removed
        if has_section(text, name) or not is_ours:
            text = replace_section(text, name, read_section(new.text, name))
    if merged == before:  # comments and all
        return older[: len(older) - len(card.text)] + text
    card.data, card.text = CardData(**merged), text
    return str(card)


def _merge_data(older: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """
    Merge front matters.

    :param older: front matter that is there, with keys of the user
    :param new: front matter of a new card
    """
    # what is known of another base model is not true of this one
    is_other = "base_model" in older and older["base_model"] != new.get("base_model")
    if is_other and "base_model" in new:
        replaced = set(new)
    else:
        replaced = {key for key in _FACTS if key in new}
    merged = {**new, **{key: older[key] for key in older if key not in replaced}}
    tags = older.get("tags")
    tags = [tags] if isinstance(tags, str) else list(tags or ())
    # those of an older scheme are not the user's
    own = [one for one in tags if one not in new["tags"] and not is_scheme_tag(str(one))]
    merged["tags"] = [*new["tags"], *own]
    # in the order of the older one
    return {key: merged[key] for key in dict.fromkeys([*older, *merged])}


def _warn(target: Path, base: BaseModel, data: Mapping[str, Any]):
    """Say in one sentence what only the user knows"""
    missing = [key for key in ("base_model", "license") if not data.get(key)]
    if not missing:
        return
    reason = f" ({base.problem})" if base.problem else ""
    logger.warning(
        f"{target / CARD} names no {' and no '.join(f'`{key}`' for key in missing)}, since the "
        f"model it was made from does not tell{reason}: add what you know to its front matter "
        "before you upload it"
    )
