"""An exported fx graph -> a Graph of the IR, op by op through the importers of the op table."""

from __future__ import annotations

import json
import operator
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from daggc.errors import CaptureError, DataDependentError, IRError, TypeRuleError, located
from daggc.frontend.checkpoint import Spans, enclose, note_span
from daggc.frontend.control_flow import import_control_flow
from daggc.frontend.dtypes import FROM_TORCH, ir_dtype, ir_type
from daggc.frontend.pytree import input_names
from daggc.ir.attrs import Dense
from daggc.ir.builder import Builder
from daggc.ir.graph import Graph, Value
from daggc.ir.tree import Tree
from daggc.ops import REGISTRY
from daggc.ops.call import declare
from daggc.passes.vjp import has_rule

_RECURRENT = ("aten::lstm", "aten::gru", "aten::rnn_tanh", "aten::rnn_relu")
_SPARSE_AT = {"aten::embedding": 4, "aten::embedding_bag": 5}  # where arguments say that gradients are sparse
_SMALL = 16  # elements; larger constants of the model become ports, so that text stays readable
_PLACEMENT = ("device", "layout", "pin_memory")  # arguments that are the planner's business
_WRONG_STATISTICS = (
    torch.ops.aten._native_batch_norm_legit_functional.default,
    torch.ops.aten._batch_norm_with_update_functional.default,
)
_CONSTANT_RESULTS: dict[Any, tuple[int, ...]] = {  # op -> which of its results have no gradient in torch
    **dict.fromkeys(_WRONG_STATISTICS, (1, 2)),
    torch.ops.aten._native_batch_norm_legit.no_stats: (1, 2),
    torch.ops.aten.native_layer_norm.default: (1, 2),
    torch.ops.aten.native_group_norm.default: (1, 2),
}
_CHECKS = ("_assert_tensor_metadata", "_assert_scalar", "_assert_async")  # the shapes are static and checked by us


def import_exported(
    exported: ExportedProgram,
    in_tree: Tree,
    out_tree: Tree,
    canonical: Mapping[str, str],
    kept: Sequence[str] = (),
    trains: bool = False,
) -> tuple[Graph, dict[str, torch.Tensor]]:
    """Import an exported program.

    Args:
        canonical: every name of a parameter or buffer -> the name of its port (tied ones share).
        trains: a backward may follow, which runs what is inside ``torch.utils.checkpoint`` again.
        kept: targets of the ``attribute`` ports that the results after those of ``out_tree`` become.

    Returns:
        ``@forward``, and the tensors of its ``constant`` ports by target.
    """
    b = REGISTRY.builder("forward")
    importer = _Importer(b, exported.graph_module)
    constants = _inputs(importer, exported, in_tree, canonical)
    importer.nodes(exported.graph_module, importer.values)
    _outputs(importer, exported, [*out_tree.leaf_paths()], canonical, kept)
    return enclose(b.build(), importer.spans, trains), constants


def _strip(name: str) -> str:
    """The model's own name: the capture wraps it as ``model``."""
    return name.removeprefix("model").removeprefix(".")


def _inputs(importer: _Importer, exported: ExportedProgram, in_tree: Tree, canonical: Mapping[str, str]):
    b, values = importer.b, importer.values
    placeholders = {node.name: node for node in exported.graph.nodes if node.op == "placeholder"}
    names = iter(input_names(in_tree))
    constants: dict[str, torch.Tensor] = {}
    shared: dict[str, Value] = {}
    kinds = {InputKind.PARAMETER: "param", InputKind.BUFFER: "buffer"}
    for spec in exported.graph_signature.input_specs:
        node = placeholders[spec.arg.name]
        if spec.kind == InputKind.USER_INPUT:
            target = next(names)
            values[node] = b.input(ir_type(node.meta["val"]), "input", target)
            importer.inputs[node.name] = target
        elif spec.kind in kinds:
            target = canonical[_strip(str(spec.target))]
            if target not in shared:
                shared[target] = b.input(ir_type(node.meta["val"]), kinds[spec.kind], target)
            values[node] = shared[target]
        elif spec.kind == InputKind.CONSTANT_TENSOR:
            held = exported.constants[str(spec.target)]
            if not isinstance(held, torch.Tensor):
                raise CaptureError(f"the model holds a constant {spec.target!r} that is not a tensor: {type(held)}")
            tensor = held.detach()
            if tensor.numel() <= _SMALL:
                values[node] = b.emit("constant", value=dense(tensor))
            else:
                target = _strip(str(spec.target))
                values[node] = b.input(ir_type(tensor), "constant", target)
                constants[target] = tensor
        else:
            raise CaptureError(
                f"the model uses an object that is not a tensor ({spec.kind.name}, a torch.Generator say); "
                "use torch's own generator, seeded outside of the model"
            )
    return constants


def _outputs(
    importer: _Importer,
    exported: ExportedProgram,
    paths: Sequence[str],
    canonical: Mapping[str, str],
    kept: Sequence[str],
) -> None:
    (output,) = (node for node in exported.graph.nodes if node.op == "output")
    results = iter([*(("output", path) for path in paths), *(("attribute", name) for name in kept)])
    changed: list[tuple[Value, str, str]] = []
    for spec, node in zip(exported.graph_signature.output_specs, output.args[0], strict=True):
        if spec.kind == OutputKind.USER_OUTPUT:
            importer.b.output(importer.value(node), *next(results))
        elif spec.kind == OutputKind.BUFFER_MUTATION:
            changed.append((importer.value(node), "buffer", canonical[_strip(str(spec.target))]))
        elif spec.kind == OutputKind.USER_INPUT_MUTATION:
            changed.append((importer.value(node), "input", importer.inputs[str(spec.target)]))
        else:
            raise CaptureError(
                f"the model writes to {spec.target!r} in place ({spec.kind.name}); daggc keeps changes of buffers "
                "and inputs only: change parameters through an optimizer"
            )
    for value, kind, target in changed:
        importer.b.output(value, kind, target)


def dense(tensor: torch.Tensor) -> Dense:
    """A constant of the program's text."""
    flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    data = bytes(flat.view(torch.uint8).numpy()) if flat.numel() else b""
    return Dense(ir_type(tensor), data)


class _Importer:
    """Walks fx nodes, emitting IR; keeps the value (or tuple of values) of each node."""

    def __init__(self, b: Builder, root: torch.nn.Module) -> None:
        self.b = b
        self.root = root
        self.values: dict[fx.Node, Any] = {}
        self.spans: Spans = {}  # of checkpointed regions, in the nodes emitted
        self.inputs: dict[str, str] = {}  # of the user: name of the placeholder -> target of the port

    def inside(self, b: Builder, module: torch.nn.Module) -> _Importer:
        """An importer of a module whose nodes go into another graph."""
        return _Importer(b, module)

    def value(self, node: Any) -> Value:
        value = self.values[node]
        if not isinstance(value, Value):
            raise CaptureError(f"the model returns {node}, which is not a tensor")
        return value

    def nodes(self, module: fx.GraphModule, values: dict[fx.Node, Any]) -> None:
        for node in module.graph.nodes:
            if node.op == "call_function":
                path, source = provenance(node)
                with self.b.at(path, source):
                    start = len(self.b.nodes)
                    try:
                        values[node] = self.call(module, node)
                        note_span(self.spans, node, start, len(self.b.nodes))
                    except IRError as wrong:
                        raise CaptureError(located(f"{node.target}: {wrong}", path, source)) from wrong
            elif node.op == "get_attr":
                values[node] = _attribute(module, str(node.target))

    def call(self, module: fx.GraphModule, node: fx.Node) -> Any:
        """Import one call; returns its value or values."""
        target = node.target
        args = [self.argument(arg) for arg in node.args]
        kwargs = {key: self.argument(arg) for key, arg in node.kwargs.items()}
        if target is operator.getitem:
            return self.item(node.args[0], *args)
        if isinstance(target, torch._ops.HigherOrderOperator):
            results = import_control_flow(self, target.name(), args)
            return self.inline(target.name(), args) if results is None else results
        if not isinstance(target, torch._ops.OpOverload):
            raise CaptureError(located(f"{target} is not an operation on tensors", *provenance(node)))
        if target._schema.name.split("::")[1] in _CHECKS:
            return None
        if target is torch.ops.daggc.stop_gradient.default:
            return self.b.emit("stop_gradient", *args)
        if target is torch.ops.daggc.decides.default:
            return args[0]
        if target is torch.ops.daggc.check.default:
            return self.check_branch(node, *args)
        if target is torch.ops.daggc.python_call.default:
            return self.python_call(node, *args)
        if target._schema.name.startswith("aten::as_strided"):
            _refuse_strides(node)
        if "conv" in str(target) and _channels_last(node):
            kwargs["memory_format"] = "channels_last"
        _refuse_data_dependent(node)
        start = len(self.b.nodes)
        results = self.portable(target, args, kwargs)
        if results is None or _lacks_one(node, results) or not all(map(has_rule, self.b.nodes[start:])):
            results = self.torch_call(node, target)
        self.check(node, results)
        return results

    def item(self, source: Any, results: Any, index: int) -> Any:
        """One output of an op; some, such as the statistics of a layer, have no gradient in torch."""
        value = results[index]
        if isinstance(value, Value) and index in _CONSTANT_RESULTS.get(source.target, ()):
            return self.b.emit("stop_gradient", value)
        return value

    def portable(self, target: torch._ops.OpOverload, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Through an importer of the op table, or None if there is none that takes this form of the op."""
        namespace, name = target._schema.name.split("::")
        known = f"{name}.{target._overloadname or 'default'}"
        importer = REGISTRY.importers.get(known if namespace in ("aten", "daggc") else f"{namespace}::{known}")
        if importer is None:
            return None
        try:
            return importer(self.b, *args, **kwargs)
        except (TypeRuleError, NotImplementedError):
            return None

    def torch_call(self, node: fx.Node, target: torch._ops.OpOverload) -> Any:
        """Through the door: torch runs the op, and its derivative, on the worker."""
        random = torch.Tag.nondeterministic_seeded in target.tags and not _drops_nothing(node, target)
        if random and target._schema.name in _RECURRENT:
            raise CaptureError(
                located(
                    "a recurrent layer drops out between its layers (dropout > 0 in train mode), which daggc has no op "
                    "for; use layers of one level with nn.Dropout between them",
                    *provenance(node),
                )
            )
        if random or target._schema.is_mutable:
            raise CaptureError(
                located(f"{target} is random or writes to its inputs, and daggc has no op for it", *provenance(node))
            )
        place = _SPARSE_AT.get(target._schema.name, len(node.args))
        if len(node.args) > place and node.args[place]:
            raise CaptureError(located("an embedding has sparse=True; daggc's gradients are dense", *provenance(node)))
        tensors: list[Value] = []
        positional = [self.encode(arg, tensors) for arg in node.args]
        named = [[key, self.encode(arg, tensors)] for key, arg in node.kwargs.items() if key not in _PLACEMENT]
        metas = node.meta["val"]
        types = [ir_type(meta) for meta in (metas if isinstance(metas, tuple | list) else (metas,))]
        name = f"{target._schema.name.replace('::', '.')}.{target._overloadname or 'default'}"
        results = self.b.emit_many("torch.call", *tensors, target=name, args=(positional, named), **declare(types))
        return results if isinstance(metas, tuple | list) else results[0]

    def python_call(self, node: fx.Node, target: str, spec: str, inputs: Sequence[Value]) -> Any:
        types = [ir_type(meta) for meta in node.meta["val"]]
        return self.b.emit_many("python.call", *inputs, target=target, args=json.loads(spec), **declare(types))

    def check_branch(self, node: fx.Node, x: Value, found: Value, expected: list[int]) -> Value:
        """Fail if the model's Python would decide otherwise than it did here, naming the line that decides."""
        with self.b.at(*provenance(node.args[1])):  # pyright: ignore[reportArgumentType]  # a node, by our schema
            return self.b.emit("check", x, found, expected=tuple(expected))

    def inline(self, name: str, args: list[Any]) -> Any:
        """``torch.no_grad`` regions: their body in place."""
        if name == "wrap_with_set_grad_enabled":
            enabled, body, *operands = args
        else:
            raise CaptureError(f"higher-order op {name} cannot be captured; take it out of the model")
        values: dict[fx.Node, Any] = {}
        placeholders = [node for node in body.graph.nodes if node.op == "placeholder"]
        values.update(zip(placeholders, operands, strict=True))
        outer, self.values = self.values, values
        try:
            self.nodes(body, values)
            (output,) = (node for node in body.graph.nodes if node.op == "output")
            results = [None if node is None else values[node] for node in output.args[0]]
        finally:
            self.values = outer
        if not enabled:
            results = [
                self.b.emit("stop_gradient", value) if isinstance(value, Value) and value.type.differentiable else value
                for value in results
            ]
        return tuple(results)

    def argument(self, arg: Any) -> Any:
        """An fx argument as an importer takes it."""
        if isinstance(arg, fx.Node):
            return self.values[arg]
        if isinstance(arg, list | tuple):
            return [self.argument(item) for item in arg]
        if isinstance(arg, torch.dtype):
            return ir_dtype(arg)
        if isinstance(arg, torch.device | torch.layout | torch.memory_format):
            return None
        return arg

    def encode(self, arg: Any, tensors: list[Value]) -> Any:
        """An fx argument as plain data; tensors become ``%0``, ``%1``, ..."""
        if isinstance(arg, fx.Node):
            tensors.append(self.value(arg))
            return f"%{len(tensors) - 1}"
        if isinstance(arg, list | tuple):
            return [self.encode(item, tensors) for item in arg]
        if isinstance(arg, torch.device):
            return None
        return str(arg) if isinstance(arg, torch.dtype | torch.layout | torch.memory_format) else arg

    def check(self, node: fx.Node, results: Any) -> None:
        """Refuse an import whose types are not the ones torch computed: nothing may change silently."""
        if node.target in _WRONG_STATISTICS:
            results = results[:1]  # torch declares the wrong dtype for statistics of 16-bit models
        metas = node.meta.get("val")
        pairs = zip(results, metas, strict=False) if isinstance(metas, tuple | list) else ((results, metas),)
        for value, meta in pairs:
            if isinstance(value, Value) and isinstance(meta, torch.Tensor):
                if meta.dtype not in FROM_TORCH:
                    raise CaptureError(
                        located(
                            f"{node.target} gives {meta.dtype}; daggc has the dtypes {', '.join(FROM_TORCH.values())}",
                            *provenance(node),
                        )
                    )
                expected = ir_type(meta)
                if value.type != expected:
                    raise CaptureError(
                        located(f"{node.target} was imported as {value.type}, it is {expected}", *provenance(node))
                    )


def _refuse_data_dependent(node: fx.Node) -> None:
    metas = node.meta.get("val")
    numbers = (torch.SymInt, torch.SymFloat, torch.SymBool)
    for meta in metas if isinstance(metas, tuple | list) else (metas,):
        sizes = meta.shape if isinstance(meta, torch.Tensor) else (meta,)
        if any(isinstance(size, numbers) for size in sizes):
            raise DataDependentError(
                located(
                    f"{node.target} gives a number or a shape that depends on the data of a tensor, which cannot be "
                    "captured; use torch.where or a mask, or mark the function with @daggc.opaque",
                    *provenance(node),
                )
            )


def _lacks_one(node: fx.Node, results: Any) -> bool:
    """Whether the graph reads a result that the portable op does not give."""
    read = [user.args[1] for user in node.users if user.target is operator.getitem and user.users]
    return any(results[index] is None for index in read)


def _refuse_strides(node: fx.Node) -> None:
    """What ``as_strided`` sees depends on how memory is laid out: known only where it is in order."""
    meta = node.args[0].meta.get("val") if isinstance(node.args[0], fx.Node) else None
    if not isinstance(meta, torch.Tensor) or not meta.is_contiguous():
        raise CaptureError(
            located("as_strided of a tensor that is not contiguous; call contiguous() first", *provenance(node))
        )
    target: Any = node.target
    given: dict[str, Any] = dict(zip((a.name for a in target._schema.arguments), node.args, strict=False))
    given.update(node.kwargs)
    offset, size = given.get("storage_offset"), given["size"]
    reach = (offset or 0) + sum((length - 1) * step for length, step in zip(size, given["stride"], strict=True))
    if (offset is not None and meta.storage_offset()) or (0 not in size and reach >= meta.numel()):
        raise CaptureError(
            located(
                "as_strided sees memory outside of its tensor, a part of another; apply it to the whole tensor",
                *provenance(node),
            )
        )


def _drops_nothing(node: fx.Node, target: torch._ops.OpOverload) -> bool:
    """Whether a recurrent layer, which torch tags as random, has no dropout at work."""
    if target._schema.name not in _RECURRENT:
        return False
    given = dict(zip((argument.name for argument in target._schema.arguments), node.args, strict=False))
    given.update(node.kwargs)
    return bool(given["num_layers"] == 1 or not given["dropout"] or not given["train"])


def _channels_last(node: fx.Node) -> bool:
    """Whether eager computes a convolution in channels_last: its input or weight has that layout."""
    metas = [arg.meta.get("val") for arg in node.args[:2] if isinstance(arg, fx.Node)]
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return any(
        isinstance(meta, torch.Tensor)
        and meta.dim() in formats
        and not meta.is_contiguous()
        and meta.is_contiguous(memory_format=formats[meta.dim()])
        for meta in metas
    )


def _attribute(module: torch.nn.Module, target: str) -> Any:
    for part in target.split("."):
        module = getattr(module, part)
    return module


_STDLIB = os.path.dirname(os.__file__)
_DAGGC = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


def provenance(node: fx.Node) -> tuple[str, str]:
    """The user's module path and source line of an fx node; empty where unknown."""
    stack = node.meta.get("nn_module_stack") or {}
    path = _strip(list(stack.values())[-1][0]) if stack else ""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    for filename, line in reversed(frames):
        if is_user_file(filename):
            return path, short_source(filename, int(line))
    return path, ""


def is_user_file(filename: str) -> bool:
    """Whether a source file is the user's (or a model library's) rather than torch's, Python's or ours."""
    if filename.startswith(_STDLIB) and "site-packages" not in filename:
        return False
    return not filename.startswith(_DAGGC) and not any(mark in filename for mark in ("/torch/", "<"))


def short_source(filename: str, line: int) -> str:
    """``folder/file.py:12``: short, and the same on every machine."""
    return "/".join(filename.split("/")[-2:]) + f":{line}"
