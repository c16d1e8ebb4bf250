# SPDX-License-Identifier: Apache-2.0
"""
Names and signatures of vLLM that this package uses, in the sources of any release.

Reads sources without importing them, as CUDA builds cannot be imported everywhere. Checks the
installed release, and folders in CAT_VLLM_SOURCES, separated by colons:

    python -m pip download --no-deps --dest wheel vllm==0.33.0
    unzip -q wheel/vllm-*.whl 'vllm/*.py' -d vllm-0.33.0
    CAT_VLLM_SOURCES=$PWD/vllm-0.33.0 python -m pytest tests/integrations/vllm/test_compat.py
"""

import ast
import importlib.util
import inspect
import os
from functools import cache
from pathlib import Path

import pytest

import cat_modifier
from cat_modifier.integrations.vllm import compat
from cat_modifier.integrations.vllm.config import CATCompressedTensorsConfig
from cat_modifier.integrations.vllm.int8_linear import Int8LinearMethod
from cat_modifier.integrations.vllm.linear import TransformLinearMethod
from cat_modifier.integrations.vllm.moe import Int8ExpertsMethod

INSTALLED = Path(importlib.util.find_spec("vllm").origin).parents[1]
SOURCES = [
    Path(folder) for folder in os.environ.get("CAT_VLLM_SOURCES", "").split(":") if folder
]
PACKAGE = Path(cat_modifier.__file__).parent

CALLS = """
ApplyMoEActivationConfig.from_configs(cls, 0, 0)
BaseModelLoader.create_model(self, vllm_config=0, model_config=0, prefix=0)
BasevLLMParameter(data=0, weight_loader=0)
ChannelQuantScaleParameter(data=0, output_dim=0, weight_loader=0)
CompressedTensorsConfig._add_fused_moe_to_target_scheme_map(self)
CompressedTensorsConfig._check_scheme_supported(0)
CompressedTensorsConfig.apply_vllm_mapper(self, 0)
CompressedTensorsConfig.from_config(cls, 0)
CompressedTensorsConfig.get_quant_method(self, 0, 0)
CompressedTensorsConfig.get_scheme_dict(self, 0, 0)
CompressedTensorsConfig._get_scheme_from_parts(self, 0, 0, 0, 0, 0)
FusedMoEMethodBase(0)
FusedMoEQuantConfig.make()
LinearMethodBase.apply(self, 0, 0, 0)
LinearMethodBase.create_weights(self, 0, 0, 0, 0, 0, 0, weight_loader=0)
ModelWeightParameter(data=0, input_dim=0, output_dim=0, weight_loader=0)
PackedvLLMParameter(data=0, input_dim=0, output_dim=0, packed_dim=0, packed_factor=0)
QuantizeMethodBase.process_weights_after_loading(self, 0)
RoutedExperts.load_weights(self, 0)
WeightsMapper.map_name(self, 0)
WorkerLoRAManager._load_adapter(self, 0)
apply_moe_activation(0, 0, 0, activation_config=0)
current_platform.has_device_capability(cls, 0)
current_platform.is_cpu(self)
current_platform.is_cuda(self)
get_current_vllm_config_or_none()
get_forward_context()
get_layer_partition_names(0, 0)
get_pp_group()
init_logger(0)
ops.create_onednn_scaled_mm(0, 0, 0, True, True, 32)
ops.cutlass_scaled_mm(0, 0, scale_a=0, scale_b=0, out_dtype=0, bias=0)
ops.cutlass_scaled_mm_azp(0, 0, azp_adj=0, azp=0, scale_a=0, scale_b=0, out_dtype=0, bias=0)
ops.onednn_scaled_mm(0, 0, 0, 0, 0, 0, 0)
register_quantization_config(0)
register_weight_loader_v2_supported_method(0)
replace_parameter(0, 0, 0)
set_weight_attrs(0, 0)
"""
"""Calls as in this package, on names of compat.py"""

OVERRIDES = {
    CATCompressedTensorsConfig: "CompressedTensorsConfig",
    Int8ExpertsMethod: "FusedMoEMethodBase",
    Int8LinearMethod: "LinearMethodBase",
    TransformLinearMethod: "LinearMethodBase",
}


@cache
def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


class Sources:
    """
    Sources of a release of vLLM.

    :param folder: folder that holds the package vllm
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def file(self, module: str) -> Path | None:
        path = self.folder.joinpath(*module.split("."))
        files = (path.with_suffix(".py"), path / "__init__.py")
        return next((file for file in files if file.is_file()), None)

    def tree(self, module: str) -> ast.Module:
        file = self.file(module)
        assert file is not None, f"no module {module}"
        return parse(file)

    def find(self, module: str, name: str) -> tuple[str, ast.AST] | None:
        """Find the module that defines a name, following its imports, and the definition"""
        if self.file(f"{module}.{name}"):
            return f"{module}.{name}", self.tree(f"{module}.{name}")
        is_package = self.file(module).name == "__init__.py"
        for node in ast.walk(self.tree(module)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
                return module, node
            if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == name:
                return self.find(module, ast.unparse(node.annotation).strip("'\""))
            if isinstance(node, ast.ImportFrom):
                source = node.module or ""
                if node.level:
                    parents = module.split(".")
                    parents = parents[: len(parents) + is_package - node.level]
                    source = ".".join([*parents, *filter(None, [source])])
                for alias in node.names:
                    is_it = alias.name == "*" or (alias.asname or alias.name) == name
                    if is_it and source.startswith("vllm"):
                        wanted = name if alias.name == "*" else alias.name
                        if found := self.find(source, wanted):
                            return found
        return None

    def method(self, module: str, owner: ast.AST, name: str) -> ast.FunctionDef | None:
        """Find a method of a class, or a function of a module"""
        for node in owner.body:
            if isinstance(node, ast.FunctionDef) and node.name == name:
                return node
        for base in getattr(owner, "bases", []):
            found = self.find(module, ast.unparse(base).partition("[")[0])
            if found and (method := self.method(*found, name)):
                return method
        return None


def signature_of(function: ast.FunctionDef) -> inspect.Signature:
    args = function.args
    kind = inspect.Parameter
    positional = [*args.posonlyargs, *args.args]
    required = len(positional) - len(args.defaults)
    parameters = [
        kind(arg.arg, kind.POSITIONAL_OR_KEYWORD, default=kind.empty if i < required else None)
        for i, arg in enumerate(positional)
    ]
    if args.vararg:
        parameters.append(kind(args.vararg.arg, kind.VAR_POSITIONAL))
    for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True):
        value = kind.empty if default is None else None
        parameters.append(kind(arg.arg, kind.KEYWORD_ONLY, default=value))
    if args.kwarg:
        parameters.append(kind(args.kwarg.arg, kind.VAR_KEYWORD))
    return inspect.Signature(parameters)


def imports() -> dict[str, tuple[str, str]]:
    """Read the imports of compat.py: module and name in vLLM, by their name there"""
    return {
        alias.asname or alias.name: (node.module, alias.name)
        for node in ast.walk(ast.parse(inspect.getsource(compat)))
        if isinstance(node, ast.ImportFrom) and node.module.startswith("vllm")
        for alias in node.names
    }


@pytest.fixture(params=[INSTALLED, *SOURCES], ids=lambda folder: folder.name)
def sources(request) -> Sources:
    return Sources(request.param)


@pytest.mark.parametrize("name", imports())
def test_names_exist(sources, name):
    assert sources.find(*imports()[name]), f"vLLM has no {'.'.join(imports()[name])}"


@pytest.mark.parametrize("call", CALLS.split("\n")[1:-1])
def test_calls_fit(sources, call):
    call = ast.parse(call, mode="eval").body
    name, _, method = ast.unparse(call.func).partition(".")
    module, node = sources.find(*imports()[name])
    if method or isinstance(node, ast.ClassDef):
        node = sources.method(module, node, method or "__init__")
        assert node is not None, f"{name} has no {method}"
    arguments = [None] * len(call.args)
    if not method and node.name == "__init__":
        arguments.insert(0, "self")
    signature_of(node).bind(*arguments, **{one.arg: None for one in call.keywords})


@pytest.mark.parametrize("ours", OVERRIDES, ids=lambda ours: ours.__name__)
def test_overrides_take_what_vllm_hands_them(sources, ours):
    module, theirs = sources.find(*imports()[OVERRIDES[ours]])
    checked = 0
    for name, function in vars(ours).items():
        node = sources.method(module, theirs, name)
        if name == "__init__" or node is None:
            continue
        parameters = inspect.signature(inspect.unwrap(getattr(ours, name))).parameters
        wanted = list(signature_of(node).parameters)[1:]
        missing = [one for one in wanted if one not in parameters]
        assert not missing, f"{name} of {ours.__name__} does not take {missing}: {function}"
        checked += 1
    assert checked >= 3


def test_vllm_asks_layers_whether_they_take_quantized_inputs(sources):
    """By a name that nothing else of this package would notice the end of"""
    fusion = "vllm.model_executor.layers.fusion.quant_activation"
    _, node = sources.find(fusion, "get_input_quant_key")
    assert "requires_unquantized_input" in ast.unparse(node)


def test_only_two_modules_import_vllm():
    found = {
        str(file.relative_to(PACKAGE))
        for file in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        for module in (
            [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else [alias.name for alias in getattr(node, "names", []) if hasattr(alias, "name")]
        )
        if module.partition(".")[0] == "vllm" and not getattr(node, "level", 0)
    }
    assert found == {f"integrations/vllm/{name}.py" for name in ("compat", "plugin")}


@pytest.mark.parametrize(
    "prefix, path",
    [
        (".decoder.layers.1.layers.mlp.fc1", "model.decoder.layers.1.mlp.fc1"),
        ("model.layers.1.mlp.down_proj", "model.layers.1.mlp.down_proj"),
        ("encoder.layers.0.layers.1.linear", "encoder.layers.0.layers.1.linear"),
    ],
)
def test_wrong_names_of_layers_are_mended(prefix, path):
    assert compat.mend_prefix(prefix) == path
