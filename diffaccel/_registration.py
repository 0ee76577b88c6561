"""Makes diffusers find this package's pipeline classes by name.

`DiffusionPipeline.from_pretrained` looks the class named in model_index.json up in the diffusers namespace only, and
importing diffusers here would cost every `import diffaccel` several seconds. So the modules of this package that define
pipelines are imported at the moment the one that defines DiffusionPipeline is, by whoever imports it first. Classes that
extend a pipeline of diffusers, which is slow to import, wait until diffusers is asked for them.
"""

import importlib
import importlib.abc
import importlib.util
import sys

_TRIGGER = "diffusers.pipelines.pipeline_utils"
_PIPELINES = ("diffaccel.models.pipeline",)  # each adds its classes to diffusers at its end
_ON_DEMAND = {"FewStep": "diffaccel.models.few_step_pipelines"}  # modules by the prefix of their classes


def _register() -> None:
    for module in _PIPELINES:
        importlib.import_module(module)
    vars(sys.modules["diffusers"])["__getattr__"] = _asked  # before what diffusers' module has of its own (PEP 562)


def _asked(name: str):
    for prefix, module in _ON_DEMAND.items():
        if name.startswith(prefix):
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module 'diffusers' has no attribute {name!r}")


class _AfterImport(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname != _TRIGGER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        execute = spec.loader.exec_module

        def execute_and_register(module):
            execute(module)
            _register()

        spec.loader.exec_module = execute_and_register
        return spec


def install() -> None:
    """Register now if diffusers' pipelines are imported already, else as soon as they are."""
    if _TRIGGER in sys.modules:
        _register()
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())
