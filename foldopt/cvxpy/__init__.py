"""A CVXPY problem as a layer: `CvxpyLayer`. Start reading at `layer.CvxpyLayer`; nothing here imports cvxpy early."""
