# SPDX-License-Identifier: Apache-2.0
"""
Texts to evaluate on, from wheels of PyPI. No option of this package was chosen on the
encyclopedia and on reasoning; earlier options were, on documentation and news.
"""

import bz2
import random
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml

from cat_modifier.calibration.texts import EMBEDDED, load_texts

__all__ = ["TEXTS", "read_held_out_texts"]

TEXTS = {
    "documentation": "Python's documentation, as the calibration text",
    "news": "the Lee corpus, in the wheel of gensim",
    "encyclopedia": "pages of Wikipedia with their markup, in the wheel of gensim",
    "reasoning": "worked examples of BIG-Bench Hard, in the wheel of lm-eval",
}
"""Kinds of text, and where they come from"""

_GENSIM, _LM_EVAL = "gensim==4.4.0", "lm-eval==0.4.9.1"
_NEWS = "gensim/test/test_data/lee_background.cor"
_PAGES = (
    "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
)
_EXAMPLES = "lm_eval/tasks/bbh/cot_fewshot/"


def read_held_out_texts() -> dict[str, list[str]]:
    """Download the wheels, and read the texts by the keys of ``TEXTS``, in a fixed order"""
    with TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run([*command, "--dest", folder, _GENSIM, _LM_EVAL], check=True)
        wheels = {path.name.partition("-")[0]: path for path in Path(folder).glob("*.whl")}
        with zipfile.ZipFile(wheels["gensim"]) as gensim:
            news = gensim.read(_NEWS).decode().splitlines()
            pages = bz2.decompress(gensim.read(_PAGES)).decode()
        with zipfile.ZipFile(wheels["lm_eval"]) as lm_eval:
            names = sorted(one for one in lm_eval.namelist() if one.startswith(_EXAMPLES))
            tasks = [lm_eval.read(one) for one in names if one.endswith(".yaml")]
    encyclopedia = re.findall(r"<text[^>]*>(.*?)</text>", pages, flags=re.DOTALL)
    texts = {
        "documentation": load_texts(EMBEDDED, "test"),
        "news": news,
        "encyclopedia": [page[:4000] for page in encyclopedia if len(page) > 4000],
        "reasoning": [text for task in tasks for text in _examples(task)],
    }
    for name in ("encyclopedia", "reasoning"):  # many subjects in the first windows
        random.Random(0).shuffle(texts[name])
    return texts


def _examples(task: bytes) -> list[str]:
    """Questions with their reasoning and answers; nothing for files that hold none"""
    # `!function` of other files is of no use here
    content = yaml.safe_load(re.sub(rb"!function", b"", task))
    samples = content.get("fewshot_config", {}).get("samples", [])
    return [f"Q: {one['input']}\nA: {one['target']}" for one in samples]
