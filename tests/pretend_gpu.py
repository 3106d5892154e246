"""A device that is not there, so that what fails on a GPU fails without one.

Its tensors lie in the CPU's memory but do as a GPU's: they refuse to be mixed with the CPU's, to become arrays of
numpy and to be drawn by a generator of the CPU. Importing this changes torch for the whole process, so tests run it
in one of its own: `python pretend_gpu.py notebook.ipynb output_dir [parameter=value ...]`.
"""

import sys

import nbformat
import torch
from torch.utils import _pytree as tree
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretend"
_setup_privateuseone_for_python_backend(NAME)
torch._C._set_only_lift_cpu_tensors(True)  # so that torch.tensor(..., device=NAME) comes by here
torch.inference_mode = torch.no_grad  # a tensor of inference mode cannot be wrapped

aten = torch.ops.aten
BETWEEN_DEVICES = {aten.copy_.default, aten._to_copy.default}
INDEXED = {aten.index.Tensor: (), aten.index_put_.default: (2,), aten._index_put_impl_.default: (2,)}  # with what


class There(torch.Tensor):
    """A tensor of the device; `here` is where it really is."""

    @staticmethod
    def __new__(cls, here):
        layout = {"strides": here.stride(), "storage_offset": here.storage_offset(), "dtype": here.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, here.size(), **layout, device=torch.device(NAME, 0))

    def __init__(self, here):
        self.here = here

    # What torch does through the CPU on a GPU as well, but not for a tensor of a class of its own.
    def tolist(self):
        return self.here.tolist()

    def __format__(self, form):
        return format(self.here, form)

    def __repr__(self):
        return f"There({self.here})"

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return dispatch(operation, args, kwargs or {})


class Device(TorchDispatchMode):
    """While it is entered, tensors can be made on the device."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return dispatch(operation, args, kwargs or {})


def dispatch(operation, args, kwargs):
    wanted = kwargs.get("device") and torch.device(kwargs["device"]).type
    tensors = [x for x in tree.arg_tree_leaves(*args, **kwargs) if isinstance(x, torch.Tensor)]
    any_there = any(isinstance(x, There) for x in tensors)
    if any_there and operation not in BETWEEN_DEVICES:
        # As a GPU does, it takes plain numbers and, as an index, what is on the CPU.
        alike = [args[i] for i in (0, *INDEXED[operation])] if operation in INDEXED else tensors
        if any(not isinstance(x, There) and x.ndim for x in alike):
            raise RuntimeError(f"{operation} mixes tensors of {NAME} and of the CPU")
    there = wanted == NAME or (wanted is None and any_there)
    if there and kwargs.get("generator") is not None:
        raise RuntimeError(f"{operation} on {NAME} by a generator of the CPU")
    if wanted == NAME:
        kwargs = kwargs | {"device": torch.device("cpu")}
    here_args, here_kwargs = tree.tree_map_only(There, lambda x: x.here, (args, kwargs))
    out = operation(*here_args, **here_kwargs)
    if operation is aten.copy_.default:
        return args[0]
    if not there:
        return out
    out = tree.tree_map_only(torch.Tensor, There, out)
    return return_and_correct_aliasing(operation, args, kwargs, out) if any_there else out


def execute(path: str, **parameters: str) -> None:
    """Run the code cells of a notebook with models on the device; stops with the first error."""
    from IPython.core.interactiveshell import InteractiveShell

    from helpers import models

    models.pick_device = lambda device=None: device or NAME
    shell = InteractiveShell()
    shell.displayhook.quiet = lambda: True
    with Device():
        for cell in nbformat.read(path, as_version=4).cells:
            given = parameters.items() if "parameters" in cell.metadata.get("tags", []) else ()
            if cell.cell_type == "code":
                source = "\n".join([cell.source, *(f"{name} = {value}" for name, value in given)])
                outcome = shell.run_cell(source, silent=True)
                if not outcome.success:
                    sys.exit(f"{outcome.error_in_exec or outcome.error_before_exec!r} in:\n{source}")
    print("used:", shell.user_ns["model"].W_E.device)


if __name__ == "__main__":
    notebook, output_dir, *given = sys.argv[1:]
    execute(notebook, output_dir=repr(output_dir), **dict(item.split("=") for item in given))
