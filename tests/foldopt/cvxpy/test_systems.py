import numpy as np
import torch

from foldopt._conic.form import Form, Program
from foldopt._conic.systems import Jacobian, System
from foldopt.cones import Exponential, SecondOrder

F64 = torch.float64


def program(seed, m):
    """Three programs with dense P (2, 2) and A (m, 2), in which all rows form one second-order cone."""
    draw = np.random.default_rng(seed)
    square = np.tile(np.arange(2), 2), np.array([0, 2, 4])
    tall = np.tile(np.arange(m), 2), np.array([0, m, 2 * m])
    form = Form(2, m, *square, *tall, {"zero": 0, "nonneg": 0, "soc": [m], "psd": [], "exp": 0, "pow": []})
    theta = np.concatenate([np.tile([2.0, 1, 1, 3], (3, 1)), draw.normal(size=(3, 2 + 3 * m))], 1)
    return Program(form, form.data(torch.tensor(theta)))


def jacobian(program, v):
    return Jacobian(program.form, program.data, program.matrices, program.form.cone.derivative(v))


def test_a_system_solves_with_its_own_jacobian_whatever_factors_it_was_given():
    made = program(0, 4)
    generator = torch.Generator().manual_seed(1)
    v = torch.randn(3, 4, generator=generator, dtype=F64)
    r = torch.randn(3, 6, generator=generator, dtype=F64)
    first = System(jacobian(made, v))
    for distance, taken in ((0.0, True), (1e-6, True), (0.5, False)):
        J = jacobian(made, v + distance)
        near = System(J, first)
        assert (near.factor is first.factor) == taken
        dense = torch.stack([J.times(e.expand(3, 6), False) for e in torch.eye(6, dtype=F64)], 2)
        for transposed in (False, True):
            M = dense.mT if transposed else dense
            expected = torch.linalg.solve(M, r)
            torch.testing.assert_close(near.solve(r, transposed), expected, rtol=1e-12, atol=1e-12)


def test_what_is_remembered_of_points_is_that_of_their_values():
    v = torch.tensor([[1.0, -2, 3], [0.5, 2, -1]], dtype=F64)
    for cone in (Exponential(), SecondOrder()):
        first = cone.split(v)[0]
        kept = first.clone()
        v += 1
        fresh = cone.split(v.clone())[0]
        assert torch.equal(cone.split(v)[0], fresh)
        assert not torch.equal(fresh, kept)
        assert torch.equal(first, kept)
        assert torch.equal(cone.split(v - 1)[0], kept)
        assert torch.equal(cone.derivative(v), cone.derivative(v.clone()))
