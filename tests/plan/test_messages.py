"""Messages: each value that is sent is in one of them, with those that go the same way."""

from __future__ import annotations

from daggc.ir.attrs import Attrs
from daggc.ir.graph import Graph, Node, Port, Value
from daggc.ir.types import TensorType
from daggc.plan.messages import messages_of

WIDE = TensorType("f32", (10,))


def graph() -> Graph:
    """On a, two calls make y0, z0 and y1; all go to b, where one call reads y0 and z0, another y1 and input x."""
    a, b = WIDE.with_(device="a"), WIDE.with_(device="b")
    x, y0, z0, y1 = (Value(name, a) for name in ("x", "y0", "z0", "y1"))
    moved = {value.name: Value(f"m_{value.name}", b) for value in (x, y0, z0, y1)}
    sent = [Node("transfer", (value,), (moved[value.name],), Attrs({"device": "b"})) for value in (x, y0, z0, y1)]
    first = Node("call", (x,), (y0, z0), Attrs({"callee": "f", "device": "a"}))
    second = Node("call", (x,), (y1,), Attrs({"callee": "f", "device": "a"}))
    left, right = Value("left", b), Value("right", b)
    reads = Node("call", (moved["y0"], moved["z0"]), (left,), Attrs({"callee": "f", "device": "b"}))
    last = Node("call", (moved["y1"], moved["x"]), (right,), Attrs({"callee": "f", "device": "b"}))
    nodes = (sent[0], first, second, *sent[1:], reads, last)
    return Graph("step", (Port(x, "input", "x"),), nodes, (Port(left, "output", "0"), Port(right, "output", "1")))


def test_what_one_call_makes_and_one_call_reads_goes_together():
    found = messages_of(graph())
    assert [(own.tag, own.values, own.transfers, own.nbytes) for own in found] == [
        ("m_x", (("x", "m_x"),), (0,), 40),
        ("m_y0", (("y0", "m_y0"), ("z0", "m_z0")), (3, 4), 80),
        ("m_y1", (("y1", "m_y1"),), (5,), 40),
    ]
    assert [(own.source, own.target, own.maker, own.reader) for own in found] == [
        ("a", "b", -1, 7),
        ("a", "b", 1, 6),
        ("a", "b", 2, 7),
    ]


def test_inputs_that_are_given_everywhere_are_not_sent():
    assert [own.tag for own in messages_of(graph(), given=["x"])] == ["m_y0", "m_y1"]
