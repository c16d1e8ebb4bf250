# SPDX-License-Identifier: Apache-2.0
"""Promises of ``import cat_modifier``, each tested in a new process"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from compressed_tensors.utils.match import match_name
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.recipe import Recipe
from tiny_models import int_scheme, make_loader, make_model, make_tokens

import cat_modifier
from cat_modifier import CATModifier
from cat_modifier.calibration.default_ignore import DEFAULT_IGNORE

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
LIBRARIES = ["compressed_tensors", "llmcompressor", "pydantic", "torch", "transformers", "vllm"]

RECIPE = """
default_stage:
  default_modifiers:
    CATModifier: {transform_block_size: 32}
    CATTrainingModifier: {steps: 3}
    CATDistillationModifier: {steps: 5}
    QuantizationModifier: {targets: [Linear], scheme: W8A8}
"""


def run_python(code: str) -> str:
    """Run code in a new process, and return the last line that it prints"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process.stdout.splitlines()[-1]


def test_importing_the_package_imports_no_library():
    code = f"import sys, cat_modifier; print([m for m in {LIBRARIES} if m in sys.modules])"
    assert run_python(code) == "[]"


def test_help_of_the_command_imports_no_library():
    process = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "cat_modifier.cli", "--help"],
        capture_output=True,
        text=True,
    )
    imported = {line.rpartition("|")[2].strip() for line in process.stderr.splitlines()}
    assert "analyze" in process.stdout
    assert "cat_modifier" in imported
    assert not imported & set(LIBRARIES)


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports",
    [
        "import cat_modifier, llmcompressor",
        "import llmcompressor, cat_modifier",
        # modules of this package that import llm-compressor first
        "import cat_modifier.modifiers.cat.base",
        "import cat_modifier.modifiers.cat_distillation.base",
        "import cat_modifier.modifiers.cat_training.base",
        "import cat_modifier.calibration.collector, llmcompressor",
    ],
)
def test_recipes_find_the_modifiers(imports):
    code = f"""
{imports}
from llmcompressor.recipe import Recipe
cat, *trainings, _ = Recipe.create_instance({RECIPE!r}).modifiers
from cat_modifier import CATDistillationModifier, CATModifier, CATTrainingModifier
assert type(cat) is CATModifier
assert [type(one) for one in trainings] == [CATTrainingModifier, CATDistillationModifier]
print(cat.transform_block_size, *(one.steps for one in trainings))
"""
    assert run_python(code) == "32 3 5"


def test_a_wrong_option_in_a_recipe_is_refused():
    with pytest.raises(ValueError, match="block_sise"):
        Recipe.create_instance(RECIPE.replace("transform_block_size", "block_sise"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    model = make_model(folder / "original")
    recipe = [CATModifier(), QuantizationModifier(**int_scheme(8, 8))]
    output = str(folder / "quantized")
    oneshot(model=model, recipe=recipe, dataset=make_loader(make_tokens()), output_dir=output)
    return output


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports",
    [
        "import cat_modifier, transformers",
        "import transformers, cat_modifier",
        "import transformers.quantizers.auto, cat_modifier",
        "import transformers.modeling_utils, cat_modifier",
        "import cat_modifier.integrations.transformers.quantizer",
    ],
)
def test_transformers_loads_checkpoints(imports, checkpoint):
    code = f"""
{imports}
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({checkpoint!r})
names = [name for name, _ in model.named_parameters() if name.endswith("cat_input.weight")]
print(type(model.hf_quantizer).__name__, len(names) > 0)
"""
    assert run_python(code) == "CATHfQuantizer True"


@pytest.mark.slow
@pytest.mark.parametrize("is_installed", [True, False])
def test_transformers_refuses_checkpoints_and_says_what_to_do(checkpoint, is_installed):
    code = f"""
import sys
if not {is_installed}:
    sys.modules["cat_modifier"] = None  # an import fails
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained({checkpoint!r})
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode
    assert "input_value='pip install cat-modifier and import cat_modifier'" in process.stderr


@pytest.mark.slow
def test_a_table_of_transformers_that_moved_is_one_warning():
    code = """
import transformers.quantizers.auto as auto
del auto.AUTO_QUANTIZATION_CONFIG_MAPPING["compressed-tensors"]
import cat_modifier
print("imported")
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.stdout == "imported\n"
    lines = [line for line in process.stderr.splitlines() if "cat-modifier" in line]
    assert len(lines) == 1 and "does not work with Transformers" in lines[0]


@pytest.mark.slow
def test_a_quantizer_that_cannot_be_imported_refuses_cat_checkpoints_alone(checkpoint):
    code = f"""
import sys
import cat_modifier
sys.modules["cat_modifier.integrations.transformers.loading"] = None
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as configs
from transformers import AutoModelForCausalLM
stock = configs["compressed-tensors"].from_dict({{"format": "dense"}})
print(type(stock).__name__)
try:
    AutoModelForCausalLM.from_pretrained({checkpoint!r})
except RuntimeError as error:
    print("does not work with Transformers" in str(error))
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.stdout == "CompressedTensorsConfig\nTrue\n", process.stderr


def test_recipe_is_the_path_of_a_file():
    for name in ("w4a4", "w4a4_gptq", "nvfp4"):
        with open(cat_modifier.recipe(name)) as file:
            assert "CATModifier" in file.read()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_leave_alone_what_is_not_transformed(path):
    modifiers = yaml.safe_load(path.read_text())["quant_stage"]["quant_modifiers"]
    *_, quantization = modifiers.values()
    groups = quantization.get("config_groups", {}).values()
    named = {target for group in groups for target in group["targets"]}
    expected = [one for one in DEFAULT_IGNORE if one not in named]
    assert quantization["ignore"] == expected
    assert modifiers.get("CATModifier", {}).get("ignore", list(DEFAULT_IGNORE)) == expected


def test_towers_are_left_alone_and_text_is_not():
    """Names of Phi-4-multimodal, Janus, BLIP-2, MiniCPM-V, Video-LLaVA; of Gemma 3n"""
    towers = [
        "model.embed_tokens_extend.image_embed.img_processor.layers.0.self_attn.q_proj",
        "model.embed_tokens_extend.image_embed.img_projection_up",
        "model.generation_head.proj_out",
        "model.aligner.fc1",
        "qformer.encoder.layer.0.attention.attention.query",
        "language_projection",
        "model.merger.0.linear_1",
        "model.video_tower.encoder.layers.0.mlp.fc1",
    ]
    text = [
        "model.language_model.per_layer_model_projection",
        "model.layers.0.per_layer_projection",
        "model.layers.0.mlp.experts.0.gate_proj",
    ]
    for name in towers + text:
        is_ignored = any(match_name(name, one) for one in DEFAULT_IGNORE)
        assert is_ignored == (name in towers), name


def test_an_unknown_recipe_is_refused_with_the_names_of_all():
    with pytest.raises(ValueError, match="'w3a3'.*mxfp4, nvfp4,.*w4a4, .*w8a8"):
        cat_modifier.recipe("w3a3")


def test_all_names_exist():
    names = json.loads(
        run_python("import cat_modifier, json; print(json.dumps(cat_modifier.__all__))")
    )
    assert names == cat_modifier.__all__
    for name in names:
        assert getattr(cat_modifier, name)
        assert name in dir(cat_modifier)


def test_names_that_need_a_library_are_not_listed_without_it():
    code = """
import importlib.util, inspect
find = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name == "llmcompressor" else find(name)
import cat_modifier
names = [name for name, _ in inspect.getmembers(cat_modifier)]
print("CATModifier" in names, "recipe" in names)
"""
    assert run_python(code) == "False True"
    with pytest.raises(AttributeError, match="no attribute 'CatModifier'"):
        cat_modifier.CatModifier  # noqa: B018
