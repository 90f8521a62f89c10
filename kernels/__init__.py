"""Triton kernels, installed as `mogeo.kernels`. They know tensors only: no optimizer, no weighting, no torch.nn.

`mogeo.cuda` calls them, with arguments that `mogeo.ops` has checked.
"""
