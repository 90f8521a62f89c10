"""Triton kernels, installed as `mogeo.kernels`. They know tensors only: no optimizer, no weighting, no torch.nn.

None yet: on every device `mogeo.ops` runs the PyTorch implementations of `mogeo.cpu`.
"""
