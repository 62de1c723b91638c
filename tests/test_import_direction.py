"""The import rule of the house, read from the syntax trees: layers, optional libraries, file names.

Of two layers that may not see each other only the files of a run folder pass between them.
"""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "nomadam"
FILES = sorted(PACKAGE.rglob("*.py"))

METHODS = {"numerics", "optimizers", "diagnostics", "quantization"}
COMMAND_LINE = (
    METHODS | {"experiments", "reports", "runs"} | {"durable_files", "progress", "terminal"}
)
# What each layer may import beside itself. A layer is a folder or a file right under nomadam/.
LAYERS = {
    "numerics": {"durable_files"},
    "optimizers": {"numerics", "durable_files"},
    "diagnostics": {"numerics"},
    "quantization": {"numerics"},
    "durable_files": set(),
    "progress": set(),
    "command_options": set(),
    "runs": {"durable_files"},
    "experiments": METHODS | {"runs", "durable_files", "intervals", "progress", "units"},
    "intervals": set(),
    "units": set(),
    "reports": {"runs", "durable_files", "intervals", "units"},
    "integrations": METHODS,
    "cli": COMMAND_LINE
    | {"command_options", "compare_command", "claims_command", "profile_command", "tune_command"},
    "claims_command": COMMAND_LINE | {"command_options"},
    "compare_command": COMMAND_LINE | {"command_options"},
    "profile_command": COMMAND_LINE,
    "tune_command": COMMAND_LINE | {"command_options"},
    "terminal": COMMAND_LINE,
    "__init__": METHODS,
    "__main__": {"cli"},
}
EXCEPTIONS = {("diagnostics/doctor.py", "optimizers")}
STANDARD_LIBRARY_ONLY = {"runs", "durable_files", "intervals", "units"}
WITHOUT_TORCH = {"reports"}
REQUIRED = {"torch", "numpy"}  # what the bare install has; the command line also has typer
FORBIDDEN_NAMES = {"util", "utils", "helper", "helpers", "common", "base", "core"}
TOO_HEAVY = ("transformers", "accelerate", "datasets", "tokenizers", "matplotlib", "rich", "typer")


def imports(source, module):
    """Every import of a file: (dotted name, whether it runs when the file is imported)."""
    found = []

    def visit(node, at_import):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            at_import = False
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            at_import = False
        if isinstance(node, ast.Import):
            found.extend((alias.name, at_import) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module[: len(module) - node.level] if node.level else ()
            start = ".".join([*package, *([node.module] if node.module else [])])
            found.extend((f"{start}.{alias.name}", at_import) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            named_here = node.args and isinstance(node.args[0], ast.Constant)
            found.extend([(node.args[0].value, at_import)] if named_here else [])
        for child in ast.iter_child_nodes(node):
            visit(child, at_import)

    visit(ast.parse(source), True)
    return found


def imports_of(path):
    inside = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return imports(path.read_text(encoding="utf-8"), inside)


def layer_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def target_of(name):
    """The layer that an imported name is in; None outside the package."""
    package, *rest = name.split(".")
    if package != PACKAGE.name:
        return None
    is_layer = rest and ((PACKAGE / rest[0]).is_dir() or (PACKAGE / f"{rest[0]}.py").is_file())
    if is_layer:
        return rest[0]
    # A public name such as nomadam.SGDSaI stands for optimizers; the version is nobody's.
    return None if rest == ["__version__"] else "optimizers"


def named(path):
    return path.relative_to(PACKAGE).as_posix()


files = pytest.mark.parametrize("path", FILES, ids=named)


def test_reader_sees_what_it_must():
    source = """
import torch, numpy.linalg
from . import slices
from ..runs import RunFolder
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import rich
def f():
    import transformers
    importlib.import_module("prodigyopt")
class C:
    import json
"""
    found = imports(source, ("nomadam", "numerics", "moments"))
    assert found == [
        ("torch", True),
        ("numpy.linalg", True),
        ("nomadam.numerics.slices", True),
        ("nomadam.runs.RunFolder", True),
        ("typing.TYPE_CHECKING", True),
        ("rich", False),
        ("transformers", False),
        ("prodigyopt", False),
        ("json", True),
    ]


def test_there_is_a_package_to_read():
    assert PACKAGE / "optimizers" / "sgd_sai.py" in FILES


@files
def test_layers_import_one_way(path):
    layer = layer_of(path)
    assert layer in LAYERS, f"say in LAYERS what nomadam/{layer} may import"
    for name, _ in imports_of(path):
        target = target_of(name)
        if target is not None and (named(path), target) not in EXCEPTIONS:
            allowed = target in LAYERS[layer] | {layer}
            assert allowed, f"{named(path)} may not import {name}, which is in {target}"


@files
def test_optional_libraries_are_imported_inside_functions(path):
    allowed = REQUIRED | {"nomadam", "__future__"} | set(sys.stdlib_module_names)
    if layer_of(path).endswith("_command") or layer_of(path) in ("cli", "command_options"):
        allowed.add("typer")
    if path.stem == "sgd_sai_triton_kernels":  # itself imported inside a function
        allowed.add("triton")
    for name, at_import in imports_of(path):
        assert not at_import or name.split(".")[0] in allowed, (
            f"{named(path)}: import {name} inside the function that needs it"
        )


@files
def test_distributed_tensors_are_imported_inside_functions(path):
    for name, at_import in imports_of(path):
        assert not at_import or not name.startswith(("torch.distributed", "torch._dynamo")), (
            f"{named(path)} imports {name} when it is loaded"
        )


@files
def test_some_layers_do_without_torch_or_any_library(path):
    layer = layer_of(path)
    for name, _ in imports_of(path):
        root = name.split(".")[0]
        if layer in STANDARD_LIBRARY_ONLY:
            known = root in sys.stdlib_module_names or root in ("nomadam", "__future__")
            assert known, f"{named(path)} is standard library only, and imports {name}"
        if layer in WITHOUT_TORCH:
            assert root not in ("torch", "accelerate", "transformers"), f"{named(path)}: {name}"


@files
def test_no_file_is_named_after_nothing(path):
    for part in path.relative_to(PACKAGE).with_suffix("").parts:
        assert not FORBIDDEN_NAMES & set(part.split("_")), f"{named(path)} says nothing"


@files
def test_no_file_is_empty(path):
    assert path.read_text(encoding="utf-8").strip(), f"{named(path)} is empty"


def loaded_by(*statements):
    """Names of the modules in a fresh process after each statement."""
    script = "import json, sys\nseen = []\n"
    script += "".join(f"{s}\nseen.append(sorted(sys.modules))\n" for s in statements)
    script += "print(json.dumps(seen))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120
    )
    return [set(modules) for modules in json.loads(done.stdout)]


def test_importing_nomadam_loads_nothing_beyond_torch():
    # What torch.optim pulls in, `import torch` has pulled in already.
    before, after = loaded_by("import torch", "from nomadam import SGDSaI")
    added = after - before
    foreign = {
        name for name in added if name.split(".")[0] not in {"nomadam", *sys.stdlib_module_names}
    }
    assert not foreign, f"import nomadam also loads {sorted(foreign)}"
    assert not {name for name in after if name.split(".")[0] in TOO_HEAVY}
    layers = {name.split(".")[1] for name in added if name.startswith("nomadam.")}
    assert layers <= {"numerics", "optimizers", "diagnostics", "quantization", "durable_files"}
