"""Every derivative that PyTorch knows, over folded layers of every kind: forward mode, torch.func, batched ones."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import foldopt
from foldopt.errors import InputError, LinearSolveError, UndeclaredParameterError
from tests.foldopt.steps import F64, iterate, problem, tanh_step


def tanh_layer():
    return foldopt.fold(iterate(tanh_step), tanh_step), tuple(t.detach() for t in problem())


def qp_layer():
    gen = torch.Generator().manual_seed(0)
    Q = torch.eye(4, dtype=F64) + 0.1 * torch.ones(4, 4, dtype=F64)
    G, h = torch.randn(6, 4, generator=gen, dtype=F64), torch.ones(6, dtype=F64)
    layer = foldopt.QPLayer()
    return (lambda p, h: layer(Q, p, G, h)), (3 * torch.randn(3, 4, generator=gen, dtype=F64), h)


def nlp_layer():
    """Nonconvex: the point of a quartic bowl nearest to c, on a circle."""
    gen = torch.Generator().manual_seed(0)
    layer = foldopt.NLPLayer(
        lambda x, c, r: (x - c).square().sum(1) + 0.1 * x.pow(4).sum(1),
        None,
        lambda x, c, r: x.square().sum(1, keepdim=True) - r,
        start=torch.ones(3),
    )
    return layer, (1 + torch.rand(3, 3, generator=gen, dtype=F64), torch.tensor([[1.0]] * 3, dtype=F64))


def pgd_layer():
    """A step that branches on data (the projection's checks), which no transform could trace."""
    gen = torch.Generator().manual_seed(0)
    Q = torch.eye(5, dtype=F64) + 0.2 * torch.ones(5, 5, dtype=F64)

    def objective(x, c, t):
        return 0.5 * torch.einsum("bi,ij,bj->b", x, Q, x) - (c * x).sum(1)

    def project(y, c, t):
        return foldopt.projections.capped_simplex(y, t)

    step = foldopt.ProjectedGradient(objective, project, 0.5)
    layer = foldopt.fold(iterate(step, 800), step)
    return layer, (torch.randn(3, 5, generator=gen, dtype=F64), torch.full((3,), 2.0, dtype=F64))


LAYERS = {make.__name__: make for make in (tanh_layer, qp_layer, nlp_layer, pgd_layer)}
each = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name in ("nlp_layer", "pgd_layer") else name for name in LAYERS],
)


def reference(layer, params):
    """Jacobians by one reverse pass per output, without torch.func."""
    return torch.autograd.functional.jacobian(layer, params)


def close(a, b, tol=1e-9):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


@each
def test_gradcheck_forward_reverse_and_batched(name):
    """Central differences against reverse mode, forward mode, and both under vmap; second order too."""
    layer, params = LAYERS[name]()
    leaves = tuple(p.clone().requires_grad_() for p in params)
    assert torch.autograd.gradcheck(layer, leaves, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(layer, leaves, check_fwd_over_rev=True, check_batched_grad=True)


@each
def test_jacrev_jacfwd_and_vectorized_jacobians_agree(name):
    layer, params = LAYERS[name]()
    expected = reference(layer, params)
    close(jacrev(layer, (0, 1))(*params), expected)
    close(jacfwd(layer, (0, 1))(*params), expected)
    close(torch.autograd.functional.jacobian(layer, params, vectorize=True), expected)
    close(torch.autograd.functional.jacobian(layer, params, vectorize=True, strategy="forward-mode"), expected)


@each
def test_hessians_by_every_nesting_agree(name):
    layer, (c, other) = LAYERS[name]()
    loss = lambda c: layer(c, other).pow(3).sum()  # noqa: E731
    expected = torch.autograd.functional.hessian(loss, c)
    close(hessian(loss)(c), expected, 1e-8)
    close(jacrev(jacrev(loss))(c), expected, 1e-8)
    close(jacfwd(jacfwd(loss))(c), expected, 1e-8)
    close(jacrev(jacfwd(loss))(c), expected, 1e-8)


@each
def test_jvp_and_vjp_are_transposed(name):
    layer, params = LAYERS[name]()
    gen = torch.Generator().manual_seed(1)
    directions = tuple(torch.randn(p.shape, generator=gen, dtype=F64) for p in params)
    x, tangent = jvp(layer, params, directions)
    cotangent = torch.randn(x.shape, generator=gen, dtype=F64)
    again, pull = vjp(layer, *params)
    close(again, x)
    pulled = pull(cotangent)
    close(sum((a * b).sum() for a, b in zip(pulled, directions, strict=True)), (cotangent * tangent).sum())
    with forward_ad.dual_level():
        dual = layer(*(forward_ad.make_dual(p, d) for p, d in zip(params, directions, strict=True)))
        close(forward_ad.unpack_dual(dual).tangent, tangent)


@each
def test_vmap_is_a_loop(name):
    layer, (c, other) = LAYERS[name]()
    many = torch.stack([c, 0.9 * c, 1.1 * c])
    shared = vmap(layer, (0, None))(many, other)
    close(shared, torch.stack([layer(m, other) for m in many]), 1e-12)
    close(vmap(vmap(lambda m: layer(m, other)))(many[None]), shared[None], 1e-12)
    per_sample = vmap(grad(lambda m: layer(m, other).square().sum()))(many)
    whole = grad(lambda many: vmap(layer, (0, None))(many, other).square().sum())(many)
    expected = torch.stack([grad(lambda m: layer(m, other).square().sum())(m) for m in many])
    close(per_sample, expected)
    close(whole, expected)


def test_vmap_gathers_the_certificates():
    layer, (c, W) = tanh_layer()
    many = torch.stack([c, -c])
    vmap(layer, (0, None))(many, W)
    assert layer.last.residual.shape == layer.last.ok.shape == (6,)
    assert layer.last.ok.all()
    cotangents = torch.eye(12, dtype=F64).reshape(12, 3, 4)
    leaf = c.clone().requires_grad_()
    x = layer(leaf, W)
    torch.autograd.grad(x, leaf, cotangents, is_grads_batched=True)
    assert layer.last.backward.ok.shape == (36,)


def test_an_empty_vmap_is_named():
    layer, (_, W) = tanh_layer()
    with pytest.raises(InputError, match="size 0"):
        vmap(layer, (0, None))(torch.zeros(0, 3, 4, dtype=F64), W)


class Net(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.features = nn.Linear(4, 4, dtype=F64)
        self.inner = nn.Linear(4, 4, dtype=F64)
        nn.init.uniform_(self.inner.weight, -0.1, 0.1)

        def update(x, c):
            return torch.tanh(self.inner(x) + c)

        self.layer = layer(self, update)

    def forward(self, inputs):
        return self.layer(self.features(inputs))


def make_net():
    torch.manual_seed(0)
    return Net(lambda self, update: foldopt.fold(iterate(update), update, modules=[self.inner]))


def test_functional_call_reaches_the_weights_inside_the_step():
    """torch.func over a network's parameters, those of the update step among them: reverse, forward, per sample."""
    net, inputs = make_net(), torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=F64)
    weights = dict(net.named_parameters())
    loss = lambda weights, inputs: functional_call(net, weights, (inputs,)).square().sum()  # noqa: E731
    detached = {name: w.detach() for name, w in weights.items()}
    by_func = grad(loss)(detached, inputs)
    expected = torch.autograd.grad(loss(weights, inputs), list(weights.values()))
    for name, g in zip(weights, expected, strict=True):
        close(by_func[name], g)
    assert float(by_func["inner.weight"].abs().max()) > 0.01
    forward = jacfwd(loss)(detached, inputs)
    per_sample = vmap(grad(loss), (None, 0))(detached, inputs[:, None])
    for name in by_func:
        close(forward[name], by_func[name])
        close(per_sample[name].sum(0), by_func[name])


def test_a_module_reached_twice_keeps_its_parameters():
    """The step closes over the whole network and names a part of it; a lasting swap would cut off the optimizer."""
    net = make_net()
    parameters = list(net.parameters())
    net(torch.randn(3, 4, dtype=F64)).sum().backward()
    assert all(a is b for a, b in zip(net.parameters(), parameters, strict=True))
    assert all(p.grad is not None for p in parameters)


def test_an_ensemble_by_vmap_over_stacked_weights():
    """vmap over functional_call: each member's solver and step see the member's own weights."""
    nets = [make_net() for _ in range(3)]
    for k, member in enumerate(nets):
        with torch.no_grad():
            for p in member.parameters():
                p.add_(0.05 * k)
    stacked, _ = torch.func.stack_module_state(nets)
    inputs = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=F64)
    together = vmap(lambda w: functional_call(nets[0], w, (inputs,)))({n: p.detach() for n, p in stacked.items()})
    close(together, torch.stack([member(inputs) for member in nets]), 1e-12)
    assert float((together[0] - together[2]).abs().max()) > 0.01


def test_a_tensor_closed_over_is_refused_rather_than_lost():
    def loss(w, c):
        step = lambda x, c: 0.5 * x + w * c  # noqa: E731
        return foldopt.fold(lambda c: 2 * w * c, step)(c).sum()

    c = torch.rand(2, 3, dtype=F64)
    for transform in (grad, jacfwd):
        with pytest.raises(UndeclaredParameterError, match=r"torch\.func"):
            transform(loss)(torch.tensor(2.0, dtype=F64), c)


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_policies_hold_under_transforms(mode):
    """A singular sample between good ones: raised, or NaN or zero at that sample alone."""

    def step(x, c):
        return torch.where(c > 0, 0.5 * x + 0.5 * c, x + 0 * c)

    c = torch.tensor([[1.0], [-1.0], [2.0]], dtype=F64)
    jacobian = {"reverse": jacrev, "forward": jacfwd}[mode]
    results = {}
    for policy, fill in (("nan", torch.nan), ("zero", 0.0)):
        layer = foldopt.fold(lambda c: c, step, on_failure=policy)
        J = jacobian(layer)(c)[:, 0, :, 0]
        results[policy] = J.diagonal()
        # a sample without a derivative has NaN in its own row and column only
        close(J[0, 0], torch.tensor(1.0, dtype=F64))
        close(J[2, 2], torch.tensor(1.0, dtype=F64))
        close(J[0, 2], torch.tensor(0.0, dtype=F64))
        expected = torch.tensor(fill, dtype=F64)
        if mode == "reverse":
            torch.testing.assert_close(J[1, 1], expected, equal_nan=True)
    layer = foldopt.fold(lambda c: c, lambda x, c: x + c - c.detach())
    with pytest.raises(LinearSolveError, match="adjoint" if mode == "reverse" else "tangent"):
        jacobian(layer)(c)


def test_state_dict_holds_the_weights_of_the_step_once():
    net, other = make_net(), make_net()
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.05)
    assert set(net.state_dict()) == {"features.weight", "features.bias", "inner.weight", "inner.bias"}
    inputs = torch.randn(3, 4, dtype=F64)
    assert float((net(inputs) - other(inputs)).detach().abs().max()) > 1e-3
    net.load_state_dict(other.state_dict())
    assert torch.equal(net(inputs), other(inputs))
    assert set(copy.deepcopy(foldopt.QPLayer()).state_dict()) == set()


def test_autocast_around_a_layer_leaves_its_precision_alone():
    """The network computes in bfloat16; the layer solves in float64 and answers in its input's dtype."""
    torch.manual_seed(0)
    linear, W = nn.Linear(4, 4), 0.2 * torch.randn(4, 4)
    layer = foldopt.fold(iterate(tanh_step), tanh_step, dtype=F64)
    inputs = torch.randn(5, 4)
    with torch.autocast("cpu", torch.bfloat16):
        c = linear(inputs)
        x = layer(c, W)
        x.float().square().sum().backward()
    assert (c.dtype, x.dtype, linear.weight.grad.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    assert float(layer.last.residual.max()) < 1e-12
    exact = layer(c.detach().double(), W.double())
    close(x.double(), exact, 5e-3)
