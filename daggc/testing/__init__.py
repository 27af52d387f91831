"""Tools to test what is built on the IR: generated programs, inputs for them, derivatives to compare with.

Needs Hypothesis, and neither torch nor dask. A property of your own pass, checked on programs made of the
whole op table:

    from hypothesis import given
    from daggc.interp import interpret
    from daggc.testing import programs, random_inputs

    @given(programs())
    def test_my_pass_keeps_the_meaning(program):
        inputs = random_inputs(program.forward)
        before, after = interpret(program, inputs), interpret(my_pass(program), inputs)
        for ref, array in before.items():
            np.testing.assert_array_equal(after[ref], array)

``programs(differentiable=True)`` gives programs whose derivatives compare with :func:`finite_difference`.
:func:`rounded_otherwise` tells how far two correct implementations may be apart.
:func:`op_samples` walks the op table, :func:`sample_graph` makes a one-node graph of a sample; an op
registered by a plug-in takes part in all of this through its ``samples``.
"""

from daggc.testing.arrays import domain_of, draw_array, random_inputs
from daggc.testing.gradients import Slope, finite_difference, inner, random_direction
from daggc.testing.programs import programs
from daggc.testing.rounding import rounded_otherwise
from daggc.testing.samples import OpSample, has_true_derivative, op_samples, sample_graph, with_dtype

__all__ = [
    "OpSample",
    "Slope",
    "domain_of",
    "draw_array",
    "finite_difference",
    "has_true_derivative",
    "inner",
    "op_samples",
    "programs",
    "random_direction",
    "random_inputs",
    "rounded_otherwise",
    "sample_graph",
    "with_dtype",
]
