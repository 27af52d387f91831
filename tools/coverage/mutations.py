"""Small wrong changes to Python source: where they can be made, and making them.

A mutant changes one expression inside a function. Text, error messages, annotations, costs, lowerings and samples
are left alone: what remains decides what is computed.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# Of what registers an op; and zip's strict, which only makes defects loud.
_LEFT_ALONE = ("cost", "lower", "samples", "domain", "flops", "aten", "importers", "strict")
_SWAPPED = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
_OPPOSITE = {
    "add": "sub", "sub": "add", "gt": "ge", "ge": "gt", "lt": "le", "le": "lt", "eq": "ne", "ne": "eq",
    "maximum": "minimum", "minimum": "maximum", "amax": "amin", "amin": "amax", "mul": "div", "div": "mul",
    "sin": "cos", "cos": "sin", "logical_and": "logical_or", "logical_or": "logical_and", "sum": "mean", "mean": "sum",
    "any": "all", "all": "any", "max": "min", "min": "max", "floor": "ceil", "ceil": "floor", "exp": "expm1",
    "log": "log1p", "argmax": "argmin", "argmin": "argmax", "cumsum": "cumprod", "sinh": "cosh", "cosh": "sinh",
    "greater": "greater_equal", "less": "less_equal",
}  # fmt: skip
_AXES = ("dim", "dims", "axis", "axes", "first", "second")
_IN_ORDER = ("sub", "div", "matmul", "where", "pow", "gt", "ge", "lt", "le", "gather", "atan2", "divide", "subtract")


@dataclass(frozen=True)
class Mutant:
    """One change.

    Attributes:
        file: path below the project's root.
        function: qualified name of the function it is in.
        role: what the function is to its op: ``vjp``, ``infer``, ``evaluate``, ...
        kind: ``sign``, ``dropped term``, ...
        line: first line of the changed expression.
        lines: first lines of the functions around it, outermost first.
        start, stop: the expression's span in the source, in UTF-8 bytes.
        new: the source in its place.
    """

    file: str
    function: str
    role: str
    kind: str
    line: int
    lines: tuple[int, ...]
    start: int
    stop: int
    old: str
    new: str

    @property
    def key(self) -> str:
        """A name that survives edits elsewhere in the file."""
        digest = hashlib.sha256(f"{self.start - self.stop} {self.old} -> {self.new}".encode()).hexdigest()[:8]
        return f"{self.file}:{self.function}:{self.kind}:{digest}"

    def apply(self, source: str) -> str:
        raw = source.encode()
        return (raw[: self.start] + self.new.encode() + raw[self.stop :]).decode()


def mutants(file: str, source: str) -> list[Mutant]:
    """Every mutant of a file, in order; keys are distinct."""
    finder = _Finder(file, source)
    finder.visit(ast.parse(source))
    seen: dict[str, int] = {}
    distinct: list[Mutant] = []
    for mutant in finder.found:
        count = seen[mutant.key] = seen.get(mutant.key, 0) + 1
        if count == 1:  # the same change of the same text in one function, made at its first place only
            distinct.append(mutant)
    return distinct


class _Finder(ast.NodeVisitor):
    """Walks functions and lambdas, knowing the role of each by how it is registered and named."""

    def __init__(self, file: str, source: str) -> None:
        self.file = file
        self.raw = source.encode()
        self.offsets = [0]
        for line in self.raw.splitlines(keepends=True):
            self.offsets.append(self.offsets[-1] + len(line))
        self.found: list[Mutant] = []
        self.names: list[str] = []
        self.roles: list[str] = []
        self.lines: list[int] = []
        self.registered = _registered(ast.parse(source))

    # --- where we are -------------------------------------------------------------------------------------

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        role = self._role(node.name)
        if role == "skip":
            return
        line = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        self._inside(node.name, role, line, node.body)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.names.append(node.name)
        for item in node.body:
            self.visit(item)
        self.names.pop()

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self._inside("<lambda>", self.roles[-1] if self.roles else "helper", node.lineno, [node.body])

    def _inside(self, name: str, role: str, line: int, body: Sequence[ast.AST]) -> None:
        self.names.append(name)
        self.roles.append(role)
        self.lines.append(line)
        for item in body:
            self.visit(item)
        self.names.pop()
        self.roles.pop()
        self.lines.pop()

    def _role(self, name: str) -> str:
        if self.file.startswith("daggc/passes"):
            return "pass"
        if name in self.registered:
            return self.registered[name]
        lowered = name.lower()
        for word in ("cost", "lower", "samples"):
            if word in lowered:
                return "skip"
        for word, role in (
            ("import", "importer"), ("infer", "infer"), ("vjp", "vjp"), ("decompose", "decompose"),
            ("evaluate", "evaluate"), ("axes", "axes"), ("backward", "vjp"),
        ):  # fmt: skip
            if word in lowered:
                return role
        return self.roles[-1] if self.roles else "helper"

    def visit_Call(self, node: ast.Call) -> None:
        self._call(node)
        self.visit(node.func)
        for arg in node.args:
            self.visit(arg)
        for keyword in node.keywords:
            if keyword.arg in _LEFT_ALONE:
                continue
            if not self.roles and keyword.arg in ("infer", "vjp", "evaluate", "decompose", "axes"):
                self.roles.append(keyword.arg)
                self.visit(keyword.value)
                self.roles.pop()
            elif keyword.arg in _AXES and isinstance(keyword.value, ast.Constant) and type(keyword.value.value) is int:
                self._replace(keyword.value, "wrong axis", str(keyword.value.value + 1))
            else:
                self.visit(keyword.value)

    # --- what can be changed ------------------------------------------------------------------------------

    def _replace(self, node: ast.AST, kind: str, new: str) -> None:
        if not self.names:  # at the top of a module: tables, registrations
            return
        start, stop = self._span(node)
        old = self.raw[start:stop].decode()
        if new != old:
            name, role = ".".join(self.names), self.roles[-1] if self.roles else "helper"
            line = node.lineno  # pyright: ignore[reportAttributeAccessIssue]  # every expression has one
            self.found.append(Mutant(self.file, name, role, kind, line, tuple(self.lines), start, stop, old, new))

    def _span(self, node: ast.AST) -> tuple[int, int]:
        at: ast.expr = node  # pyright: ignore[reportAssignmentType]
        assert at.end_lineno is not None and at.end_col_offset is not None
        return self.offsets[at.lineno - 1] + at.col_offset, self.offsets[at.end_lineno - 1] + at.end_col_offset

    def _text(self, node: ast.AST) -> str:
        start, stop = self._span(node)
        return self.raw[start:stop].decode()

    def visit_BinOp(self, node: ast.BinOp) -> None:
        left, right = self._text(node.left), self._text(node.right)
        if isinstance(node.left, ast.Constant) and isinstance(node.left.value, str):
            return
        if isinstance(node.op, ast.Add | ast.Sub):
            other = "-" if isinstance(node.op, ast.Add) else "+"
            if not isinstance(node.left, ast.Tuple | ast.List) and not isinstance(node.right, ast.Tuple | ast.List):
                self._replace(node, "sign", f"({left} {other} ({right}))")
            self._replace(node, "dropped term", f"({left})")
            if isinstance(node.op, ast.Add):
                self._replace(node, "dropped term", f"({right})")
        elif isinstance(node.op, ast.Mult):
            self._replace(node, "dropped term", f"({left})")
            self._replace(node, "dropped term", f"({right})")
        elif isinstance(node.op, ast.FloorDiv | ast.Div):
            self._replace(node, "dropped term", f"({left})")
        if isinstance(node.op, ast.Sub | ast.Div | ast.MatMult | ast.Pow | ast.FloorDiv):
            sign = {ast.Sub: "-", ast.Div: "/", ast.MatMult: "@", ast.Pow: "**", ast.FloorDiv: "//"}[type(node.op)]
            self._replace(node, "swapped operands", f"(({right}) {sign} ({left}))")
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.USub):
            self._replace(node, "sign", self._text(node.operand))
            return
        if isinstance(node.op, ast.Not):
            self._replace(node, "negated condition", f"({self._text(node.operand)})")
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        if len(node.ops) == 1:
            swapped = ast.unparse(ast.Compare(node.left, [_SWAPPED[type(node.ops[0])]()], node.comparators))
            self._replace(node, "swapped comparison", f"({swapped})")
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        texts = [f"({self._text(value)})" for value in node.values]
        word, other = (" and ", " or ") if isinstance(node.op, ast.And) else (" or ", " and ")
        self._replace(node, "negated condition", f"({other.join(texts)})")
        for index in range(len(texts)):
            self._replace(node, "dropped term", f"({word.join(texts[:index] + texts[index + 1 :])})")
        self.generic_visit(node)

    def visit_If(self, node: ast.If) -> None:
        if not isinstance(node.test, ast.Compare | ast.BoolOp):
            self._replace(node.test, "negated condition", f"(not ({self._text(node.test)}))")
        self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self._replace(node.test, "negated condition", f"(not ({self._text(node.test)}))")
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        for test in node.ifs:
            if not isinstance(test, ast.Compare | ast.BoolOp):
                self._replace(test, "negated condition", f"(not ({self._text(test)}))")
        self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        index = node.slice
        if (
            isinstance(index, ast.UnaryOp)
            and isinstance(index.op, ast.USub)
            and isinstance(index.operand, ast.Constant)
        ):
            self._replace(index, "wrong axis", f"-{index.operand.value!r} - 1")
            self.visit(node.value)
        else:
            self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        value = node.value
        if isinstance(value, bool):
            self._replace(node, "changed constant", str(not value))
        elif isinstance(value, int):
            self._replace(node, "off by one", str(value + 1))
        elif isinstance(value, float):
            self._replace(node, "changed constant", repr(value * 2 if value else 1.0))

    def _call(self, node: ast.Call) -> None:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        args = list(node.args)
        if name in ("emit", "emit_many") and args and isinstance(args[0], ast.Constant):
            self._emit(node, str(args[0].value))
            return
        if name in _OPPOSITE and isinstance(node.func, ast.Attribute | ast.Name):
            start, stop = self._span(node.func)
            head = self.raw[start:stop].decode().removesuffix(name)
            kind = "sign" if name in ("add", "sub") else "changed function"
            known = name in ("add", "sub", "any", "all", "max", "min", "sum") or head.startswith(("np.", "math."))
            if known and not (name == "sum" and not head):
                self._replace(node.func, kind, f"{head}{_OPPOSITE[name]}")
        operands = [arg for arg in args if not (isinstance(arg, ast.Name) and arg.id == "b")]
        plain = not node.keywords and len(operands) == 2
        if name in ("add", "sub", "mul") and plain and len(args) == 3:
            self._replace(node, "dropped term", self._text(operands[0]))
            if name != "sub":
                self._replace(node, "dropped term", self._text(operands[1]))
        if name == "neg" and len(operands) == 1:
            self._replace(node, "sign", self._text(operands[0]))
        if len(operands) >= 2 and name in _IN_ORDER:
            self._swap(node, operands[0], operands[1])

    def _emit(self, node: ast.Call, op: str) -> None:
        operands = [arg for arg in node.args[1:] if not isinstance(arg, ast.Starred)]
        stem, _, rest = op.partition("_")
        other = _OPPOSITE.get(op) or (f"{_OPPOSITE[stem]}_{rest}" if rest == "scalar" and stem in _OPPOSITE else None)
        if other is not None:
            kind = "sign" if stem in ("add", "sub") else "changed function"
            self._replace(node.args[0], kind, f'"{other}"')
        if op == "neg" and operands:
            self._replace(node, "sign", self._text(operands[0]))
        if op in ("add", "sub", "mul", "div") and len(operands) == 2:
            self._replace(node, "dropped term", self._text(operands[0]))
        if op in ("add_scalar", "mul_scalar", "div_scalar", "sub_scalar", "where_scalar") and operands:
            self._replace(node, "dropped term", self._text(operands[-1]))
        if len(operands) >= 2 and op not in (
            "add",
            "mul",
            "maximum",
            "minimum",
            "logical_and",
            "logical_or",
            "eq",
            "ne",
        ):
            self._swap(node, operands[-2], operands[-1])

    def _swap(self, node: ast.Call, first: ast.expr, second: ast.expr) -> None:
        start, stop = self._span(node)
        (a, b), (c, d) = self._span(first), self._span(second)
        raw = self.raw
        new = raw[start:a] + raw[c:d] + raw[b:c] + raw[a:b] + raw[d:stop]
        self._replace(node, "swapped operands", new.decode())

    # --- what is left alone -------------------------------------------------------------------------------

    def visit_Raise(self, node: ast.Raise) -> None:
        return

    def visit_Assert(self, node: ast.Assert) -> None:
        return

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        return

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)


def _registered(tree: ast.Module) -> dict[str, str]:
    """Names of functions that are given to a registration by keyword -> role."""
    roles = {
        "infer": "infer", "vjp": "vjp", "evaluate": "evaluate", "decompose": "decompose", "axes": "axes",
        "cost": "skip", "lower": "skip", "samples": "skip", "aten": "importer",
    }  # fmt: skip
    found: dict[str, str] = {}
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        for keyword in call.keywords:
            if keyword.arg in roles:
                for name in _names_in(keyword.value):
                    found.setdefault(name, roles[keyword.arg])
    return found


def _names_in(node: ast.AST) -> Iterator[str]:
    for part in ast.walk(node):
        if isinstance(part, ast.Name):
            yield part.id
