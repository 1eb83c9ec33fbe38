"""Conic programs min 1/2 x'Px + q'x, Ax + s = b, s in K: the Newton step on their optimality conditions."""
