"""Helpers of the QP tests: they call the layer by argument names, and convert arguments to every sparse layout."""

import torch

import foldopt
from foldopt.qp.matrix import Pattern, SparseMatrix
from tests.foldopt.qp.programs import F64, stacked

MATRICES = ("Q", "G", "A")
LAYOUTS = ("coo", "csr", "csc", "SparseMatrix")


def call(layer, args):
    """Call a layer with its arguments by name."""
    return layer(args["Q"], args["p"], **{name: part for name, part in args.items() if name not in ("Q", "p")})


def arguments(program, dtype=F64):
    """Return the arguments of one program by name, without a batch dimension."""
    return {name: part[0] for name, part in stacked([program], dtype).items()}


def sparse(M, layout, at=None):
    """Return M (m, n) or (B, m, n) in a sparse layout, with entries where `at` is True; default: its nonzeros."""
    at = (M != 0 if M.dim() == 2 else (M != 0).any(0)) if at is None else at
    rows, columns = at.nonzero(as_tuple=True)
    values = M[..., rows, columns].clone()
    if layout == "SparseMatrix":
        return SparseMatrix(Pattern(rows, columns, tuple(M.shape[-2:])), values)
    batch = M.shape[:-2]
    if layout == "coo":
        sample = torch.arange(batch.numel()).repeat_interleave(len(rows))
        places = [sample] * len(batch) + [part.repeat(batch.numel()) for part in (rows, columns)]
        built = torch.sparse_coo_tensor(torch.stack(places), values.flatten(), M.shape, check_invariants=True)
        return built.coalesce()
    order = torch.arange(len(rows)) if layout == "csr" else torch.argsort(columns * M.shape[-2] + rows)
    outer, inner, size = (rows, columns, M.shape[-2]) if layout == "csr" else (columns, rows, M.shape[-1])
    pointers = torch.cat([torch.zeros(1, dtype=torch.long), torch.bincount(outer, minlength=size).cumsum(0)])
    make = torch.sparse_csr_tensor if layout == "csr" else torch.sparse_csc_tensor
    inner = inner[order].expand(*batch, -1)
    return make(pointers.expand(*batch, -1), inner, values[..., order], M.shape, check_invariants=True)


def all_sparse(args, layout="coo"):
    """Return the arguments with Q, G and A converted to sparse matrices."""
    return args | {name: sparse(args[name], layout) for name in MATRICES if name in args}


def leaf(M):
    """Return M in a form that requires a gradient, and the leaf tensor whose gradient it is."""
    if isinstance(M, SparseMatrix):
        values = M.values.detach().clone().requires_grad_()
        return SparseMatrix(M.pattern, values), values
    M = M.detach().clone().requires_grad_()
    return M, M


def asked(args, weight, wrt=("p",), layer=None, **options):
    """Return the layer, x, and the layer's gradients of weight'x with respect to the arguments `wrt`."""
    layer = foldopt.QPLayer(**options) if layer is None else layer
    leaves = {name: leaf(args[name]) for name in args if name in wrt}
    x = call(layer, args | {name: given for name, (given, _) in leaves.items()})
    value = (x * torch.as_tensor(weight, dtype=x.dtype)).sum()
    gradients = torch.autograd.grad(value, [tensor for _, tensor in leaves.values()])
    return layer, x.detach(), dict(zip(leaves, gradients, strict=True))


def densely(gradient, M):
    """Return the gradient of an argument M as a dense tensor, zero outside the pattern of M."""
    if isinstance(M, SparseMatrix):
        full = gradient.new_zeros(*gradient.shape[:-1], *M.pattern.shape)
        full[..., M.pattern.rows, M.pattern.columns] = gradient
        return full
    return gradient if gradient.layout == torch.strided else gradient.to_dense()
