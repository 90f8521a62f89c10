"""Triton kernels, installed as `mogeo.kernels`. They know tensors only: no optimizer, no weighting, no torch.nn.

`mogeo.geometry.triton_backend` calls them, with arguments that `mogeo.geometry.ops` has checked.
"""
